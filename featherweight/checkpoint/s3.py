"""S3: listing a prefix and downloading it, by boto3's transfer manager, verified.

Everything that can go wrong becomes a ServiceError in one line; a download is there whole or not at all.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from featherweight.checkpoint import s3_checksums
from featherweight.checkpoint.files import Listing, is_companion
from featherweight.errors import ServiceError, Unreachable, one_line
from featherweight.progress import Progress

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
WORKERS = 8
RANGE_BYTES = 16 << 20
ATTEMPTS = 5
LOOK_EVERY_S = 0.05
_CHUNK = 1 << 20
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken", "403"}


@dataclass(frozen=True)
class S3Object:
    """One object. `name` is its key relative to the listed prefix; `etag` comes without quotes."""

    key: str
    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class Bucket:
    """A bucket and the client that talks to it."""

    client: Any
    name: str

    def objects(self, uri: str) -> list[S3Object]:
        """The objects below `s3://bucket/prefix/`, or the one object of that very key; empty where there are none."""
        with _explained(uri):
            return _list(self, split_uri(uri)[1])


def client() -> Any:
    """A boto3 S3 client at the endpoint of AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or MLFLOW_S3_ENDPOINT_URL, else at AWS."""
    from boto3.session import Session
    from botocore.config import Config

    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=WORKERS,
        # Checksums of whole objects do not fit ranges: we verify the assembled file.
        response_checksum_validation="when_required",
    )
    return Session().client("s3", endpoint_url=endpoint, config=config)


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, prefix) of `s3://bucket/prefix`, without slashes at the prefix's ends."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise ServiceError(f"'{uri}' is not an S3 address; expected s3://bucket/prefix")
    return bucket, prefix.strip("/")


def list_objects(uri: str) -> list[S3Object]:
    """The objects below `s3://bucket/prefix/`, or the one object of that very key; empty where there are none."""
    return bucket_of(uri).objects(uri)


def bucket_of(uri: str) -> Bucket:
    """An address's bucket, with a client of its own: making one takes a while."""
    with _explained(uri):
        return Bucket(client(), split_uri(uri)[0])


def _list(bucket: Bucket, prefix: str) -> list[S3Object]:
    below = list(_pages(bucket, f"{prefix}/" if prefix else ""))
    if below or not prefix:
        return below
    return [item for item in _pages(bucket, prefix) if item.key == prefix]


def _pages(bucket: Bucket, prefix: str) -> Iterator[S3Object]:
    """All objects whose key starts with `prefix`; markers of folders are left out."""
    start = prefix.rfind("/") + 1
    for page in bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=prefix):
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):
                yield S3Object(item["Key"], item["Key"][start:], item["Size"], item["ETag"].strip('"'))


def listing(uri: str) -> Listing:
    """The files right below a prefix, as a checkpoint listing: tells whether the checkpoint is complete before any download."""
    bucket = bucket_of(uri)
    objects = {item.name: item for item in bucket.objects(uri)}
    return listing_of(uri, {name: item for name, item in objects.items() if "/" not in name or is_companion(name)}, bucket)


def listing_of(uri: str, objects: Mapping[str, S3Object], bucket: Bucket) -> Listing:
    """A checkpoint listing of objects that were listed before, by their names in the checkpoint."""

    def read(name: str, length: int) -> bytes:
        return b"".join(_range(uri, bucket, objects[name], 0, min(length, objects[name].size)))

    def stream(name: str) -> Iterator[bytes]:
        for start in range(0, objects[name].size, RANGE_BYTES):
            yield from _range(uri, bucket, objects[name], start, min(start + RANGE_BYTES, objects[name].size))

    return Listing(uri, {name: item.size for name, item in objects.items()}, read, stream)


def _range(uri: str, bucket: Bucket, item: S3Object, start: int, stop: int) -> list[bytes]:
    """The bytes [start, stop) of an object, asked for again where the connection is cut."""
    from botocore.exceptions import HTTPClientError

    with _explained(uri):
        for left in reversed(range(ATTEMPTS if stop > start else 0)):
            try:
                return list(_body(bucket, item, start, stop))
            except HTTPClientError:
                if not left:
                    raise
                time.sleep(LOOK_EVERY_S)
    return []


def download(uri: str, folder: Path, progress: Progress = Progress(), names: Collection[str] | None = None) -> None:
    """Download what lies below `s3://bucket/prefix` into `folder`, which must be absent or empty.

    names: take only these (relative names). Progress is in bytes. Files are checked against size and checksum or ETag in a
    temporary folder beside `folder`, which is renamed at the end: where this raises (ServiceError), nothing is left behind.
    """
    bucket = bucket_of(uri)
    with _explained(uri):
        objects = [item for item in _list(bucket, split_uri(uri)[1]) if names is None or item.name in names]
    if not objects:
        raise ServiceError(f"{uri} holds no objects; check the prefix (it is case-sensitive)")
    for item in objects:
        if ".." in PurePosixPath(item.name).parts or item.name.startswith("/"):
            raise ServiceError(f"{uri}: object key '{item.key}' leads out of the folder; it was not downloaded")
    with _explained(uri), _whole_or_nothing(folder) as work:
        _make_folders(work, objects)
        _fetch_all(bucket, objects, work, progress)
        _verify_all(bucket, objects, work, progress)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` at the end, and is gone after a failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield work
        work.chmod(0o755)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _make_folders(work: Path, objects: list[S3Object]) -> None:
    """The folders of all files, and the empty files, of which there is nothing to fetch; refuses at once what will not fit."""
    needed, free = sum(item.size for item in objects), shutil.disk_usage(work).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"needs {needed} bytes, {free} are free", str(work))
    for item in objects:
        path = work / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if item.size == 0:
            path.touch()


def _fetch_all(bucket: Bucket, objects: list[S3Object], work: Path, progress: Progress) -> None:
    """Let boto3's transfer manager fetch every object: in ranges side by side, each tried again where its connection is cut."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    config = TransferConfig(RANGE_BYTES, WORKERS, RANGE_BYTES, ATTEMPTS, preferred_transfer_client="classic")
    fetched = _Fetched()
    with create_transfer_manager(bucket.client, config) as manager:
        futures = [
            manager.download(bucket.name, item.key, str(work / item.name), subscribers=[fetched.of(item)])
            for item in objects
            if item.size
        ]
        total = sum(item.size for item in objects)
        while futures:
            time.sleep(LOOK_EVERY_S)
            # The result of what has failed is raised, and the manager then cancels the others.
            futures = [future for future in futures if not future.done() or future.result() is not None]
            progress.step(fetched.most(), total)
    progress.step(total, total)


class _Fetched:
    """Counts the bytes that the manager's threads tell of; those of a range that is fetched again are taken back."""

    def __init__(self) -> None:
        self._lock, self._bytes, self._most = threading.Lock(), 0, 0

    def most(self) -> int:
        """The most bytes that there have been so far."""
        with self._lock:
            self._most = max(self._most, self._bytes)
            return self._most

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count

    def of(self, item: S3Object) -> Any:
        """What the manager is to know of an object, and whom it tells of its bytes."""
        from s3transfer.subscribers import BaseSubscriber

        fetched = self

        class Subscriber(BaseSubscriber):
            def on_queued(self, future: Any, **_: Any) -> None:
                future.meta.provide_transfer_size(item.size)
                future.meta.provide_object_etag(f'"{item.etag}"')  # every request then asks for the content that was listed

            def on_progress(self, bytes_transferred: int, **_: Any) -> None:
                fetched.add(bytes_transferred)

        return Subscriber()


def _body(bucket: Bucket, item: S3Object, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of an object, in chunks."""
    answer = bucket.client.get_object(Bucket=bucket.name, Key=item.key, Range=f"bytes={start}-{stop - 1}", IfMatch=f'"{item.etag}"')
    # Not every server heeds If-Match.
    if answer["ETag"].strip('"') != item.etag:
        raise _altered(bucket, item)
    if answer["ContentLength"] != stop - start:
        raise ServiceError(f"s3://{bucket.name}/{item.key}: the server ignores byte ranges; use one that has them")
    yield from answer["Body"].iter_chunks(_CHUNK)


def _altered(bucket: Bucket, item: S3Object) -> ServiceError:
    return ServiceError(f"s3://{bucket.name}/{item.key} was replaced while it was being read; run it again")


def _verify_all(bucket: Bucket, objects: list[S3Object], work: Path, progress: Progress) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        verified = list(pool.map(lambda item: _verify(bucket, item, work / item.name), objects))
    if not all(verified):
        progress.note(f"{verified.count(False)} of {len(objects)} files: no checksum to compare, only the size was checked")


def _verify(bucket: Bucket, item: S3Object, path: Path) -> bool:
    """Compare a file with its object's size, and ETag or checksum; False where the server gives no checksum to compare with."""
    if s3_checksums.is_md5_of(item.etag, path):
        return True
    head = bucket.client.head_object(Bucket=bucket.name, Key=item.key, ChecksumMode="ENABLED")
    if head["ETag"].strip('"') != item.etag:
        raise _altered(bucket, item)
    if path.stat().st_size != item.size:
        raise ServiceError(f"s3://{bucket.name}/{item.key} has {path.stat().st_size} bytes here, {item.size} there; run it again")
    part = partial(bucket.client.head_object, Bucket=bucket.name, Key=item.key, PartNumber=1)
    matches = s3_checksums.matches(path, item.etag, head, part)
    if matches is False:
        raise ServiceError(f"s3://{bucket.name}/{item.key} arrived damaged (checksum differs); run it again")
    return bool(matches)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what boto3 and the disk raise into one ServiceError line."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except RetriesExceededError as error:
        cut = f"the connection was cut {ATTEMPTS} times ({one_line(error.last_exception)})"
        raise Unreachable(f"{uri}: {cut}; nothing was kept, run it again") from error
    except S3DownloadFailedError as error:
        raise ServiceError(f"{uri} was replaced while it was being read ({one_line(error)}); run it again") from error
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        kind = Unreachable if status in (500, 502, 503, 504) else ServiceError
        raise kind(_explain_answer(uri, error.response)) from error
    except BotoCoreError as error:
        kind = Unreachable if isinstance(error, HTTPClientError) else ServiceError
        raise kind(_explain_failure(uri, error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ServiceError(f"no space left on the disk for {uri}: {error.strerror}; free some, run it again") from error
        raise ServiceError(f"cannot write what {uri} holds: {error}") from error


def _explain_answer(uri: str, response: Any) -> str:
    """What an error that the server answered with means."""
    bucket = split_uri(uri)[0]
    code = str(response.get("Error", {}).get("Code", "unknown"))
    message = " ".join(str(response.get("Error", {}).get("Message", "")).split())
    if code in _REFUSED:
        return f"{uri}: S3 refused the credentials ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights"
    if code == "NoSuchBucket":
        return f"{uri}: there is no bucket '{bucket}'; check its name and the endpoint (AWS_ENDPOINT_URL)"
    if code in ("NoSuchKey", "404", "412", "PreconditionFailed"):
        return f"{uri} changed while it was being read ({code}); run it again"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return f"{uri}: bucket '{bucket}' lies in another region; set AWS_DEFAULT_REGION ({message})"
    return f"{uri}: S3 answered {code}: {message or 'no reason given'}"


def _explain_failure(uri: str, error: Exception) -> str:
    """What a failure on our side of the connection means."""
    from botocore import exceptions as boto

    text = one_line(error)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound):
        return f"{uri}: no S3 credentials ({text}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, boto.ParamValidationError):
        return f"{uri}: not a valid S3 address; expected s3://bucket/prefix"
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        return f"{uri}: the S3 server does not answer ({text}); check the network and AWS_ENDPOINT_URL"
    return f"{uri}: {text}"
