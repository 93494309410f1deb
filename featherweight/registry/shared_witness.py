"""A second place for the ends of histories that a team keeps: a file that lines are added to, or an S3 prefix, an object for each.

`FEATHERWEIGHT_WITNESS` names it. Nothing in it is written twice, so that a file may be append-only and a bucket write-once. A
record says which entry was the last, under a number of its own that is signed with it: an old one that is copied to a later
place counts no more than before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featherweight.checkpoint.s3 import Bucket, client, split_uri
from featherweight.errors import ServiceError, one_line
from featherweight.registry.keys import Keys
from featherweight.system.locks import locked_file

WITNESS = "FEATHERWEIGHT_WITNESS"


@dataclass(frozen=True)
class Record:
    """The `place`-th record of the model that was created at `born`: the mark of its last entry then."""

    born: int
    place: int
    mark: str

    def to_json(self, keys: Keys) -> str:
        """The stored line, signed where there is a key."""
        text = json.dumps([self.born, self.place, self.mark])
        return json.dumps({"text": text, "signature": keys.sign(text)})

    @classmethod
    def from_json(cls, line: str, keys: Keys) -> Record | None:
        """The record of a stored line; None where it is none, or where keys are trusted and none signed it."""
        try:
            told = json.loads(line)
            born, place, mark = json.loads(told["text"])
            if keys.public and not keys.signed(told["text"], str(told["signature"])):
                return None
            return cls(int(born), int(place), str(mark))
        except (ValueError, TypeError, KeyError):
            return None


def add(born: int, mark: str, keys: Keys) -> None:
    """Record the last entry of a history, where a place is named and does not hold it. Raises ServiceError where that fails."""
    where = os.environ.get(WITNESS, "")
    latest = last(born, keys) if where else []
    if not where or mark in [one.mark for one in latest]:
        return
    record = Record(born, max((one.place for one in latest), default=0) + 1, mark)
    try:
        _add(where, record, keys)
    except Exception as error:
        why = f"the decision stands, but its witness at {where} ({WITNESS}) could not be written: {one_line(error)}"
        raise ServiceError(why) from error


def last(born: int, keys: Keys) -> list[Record]:
    """The last record of a model; two where two were made at once, none where nothing was recorded or no place is named."""
    where = os.environ.get(WITNESS, "")
    if not where:
        return []
    found = list(_objects(where, born, keys) if where.startswith("s3://") else _lines(Path(where), born, keys))
    latest = max((one.place for one in found), default=0)
    return [one for one in found if one.place == latest]


def _add(where: str, record: Record, keys: Keys) -> None:
    line = record.to_json(keys)
    if where.startswith("s3://"):
        bucket, prefix = split_uri(where)
        digest = record.mark.rpartition(":")[2][:16]
        key = f"{prefix}/{record.born}/{record.place:08d}-{digest}.json".lstrip("/")
        client().put_object(Bucket=bucket, Key=key, Body=line.encode())
        return
    path = Path(where).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(path), path.open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")


def _lines(path: Path, born: int, keys: Keys) -> Iterator[Record]:
    path = path.expanduser()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        record = Record.from_json(line, keys) if str(born) in line else None
        if record is not None and record.born == born:
            yield record


def _objects(where: str, born: int, keys: Keys) -> Iterator[Record]:
    """The records of the last place that holds one that can be believed."""
    bucket = Bucket(client(), split_uri(where)[0])
    found, latest = bucket.objects(f"{where.rstrip('/')}/{born}"), 0
    for one in sorted(found, key=lambda one: one.name, reverse=True):
        number = one.name.partition("-")[0]
        if not number.isdigit() or (latest and int(number) < latest):
            continue
        body = bucket.client.get_object(Bucket=bucket.name, Key=one.key)["Body"].read(10_000)
        record = Record.from_json(body.decode(errors="replace"), keys)
        if record is not None and (record.born, record.place) == (born, int(number)):
            latest = record.place
            yield record
