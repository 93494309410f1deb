"""S3: listing a prefix and downloading it, in parallel ranges, resumed where a connection is cut, verified.

Everything that can go wrong becomes a ServiceError in one line; a download is there whole or not at all.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from featherweight.checkpoint.files import Listing
from featherweight.errors import ServiceError, one_line
from featherweight.progress import Progress

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
WORKERS = 8
RANGE_BYTES = 16 << 20
ATTEMPTS = 5
BACKOFF_S = 0.2
_CHUNK = 1 << 20
# Part sizes of the usual uploaders, for servers that do not tell the size of a part.
_PART_SIZES = tuple(megabytes << 20 for megabytes in (8, 5, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024))
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken", "403"}


@dataclass(frozen=True)
class S3Object:
    """One object. `name` is its key relative to the listed prefix; `etag` comes without quotes."""

    key: str
    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class _Bucket:
    """A bucket and the client that talks to it."""

    client: Any
    name: str


class _Cancelled(Exception):
    """Another range of the same download failed."""


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
    with _explained(uri):
        return _list(_bucket(uri), split_uri(uri)[1])


def _bucket(uri: str) -> _Bucket:
    return _Bucket(client(), split_uri(uri)[0])


def _list(bucket: _Bucket, prefix: str) -> list[S3Object]:
    below = list(_pages(bucket, f"{prefix}/" if prefix else ""))
    if below or not prefix:
        return below
    return [item for item in _pages(bucket, prefix) if item.key == prefix]


def _pages(bucket: _Bucket, prefix: str) -> Iterator[S3Object]:
    """All objects whose key starts with `prefix`; markers of folders are left out."""
    start = prefix.rfind("/") + 1
    for page in bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=prefix):
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):
                yield S3Object(item["Key"], item["Key"][start:], item["Size"], item["ETag"].strip('"'))


def listing(uri: str) -> Listing:
    """The files right below a prefix, as a checkpoint listing: tells whether the checkpoint is complete before any download."""
    bucket = _bucket(uri)
    with _explained(uri):
        objects = {item.name: item for item in _list(bucket, split_uri(uri)[1]) if "/" not in item.name}

    def read(name: str, length: int) -> bytes:
        stop = min(length, objects[name].size)
        with _explained(uri):
            return b"".join(_body(bucket, objects[name], 0, stop)) if stop else b""

    return Listing(uri, {name: item.size for name, item in objects.items()}, read)


def download(uri: str, folder: Path, progress: Progress = Progress(), names: Collection[str] | None = None) -> None:
    """Download what lies below `s3://bucket/prefix` into `folder`, which must be absent or empty.

    names: take only these (relative names). Progress is in bytes. Files are checked against size and checksum or ETag in a
    temporary folder beside `folder`, which is renamed at the end: where this raises (ServiceError), nothing is left behind.
    """
    bucket = _bucket(uri)
    with _explained(uri):
        objects = [item for item in _list(bucket, split_uri(uri)[1]) if names is None or item.name in names]
    if not objects:
        raise ServiceError(f"{uri} holds no objects; check the prefix (it is case-sensitive)")
    for item in objects:
        if ".." in PurePosixPath(item.name).parts or item.name.startswith("/"):
            raise ServiceError(f"{uri}: object key '{item.key}' leads out of the folder; it was not downloaded")
    with _explained(uri), _whole_or_nothing(folder) as work:
        _make_files(work, objects)
        _fetch_all(bucket, objects, work, progress)


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


def _make_files(folder: Path, objects: list[S3Object]) -> None:
    """Files of full length, still without content; refuses at once what will not fit."""
    needed, free = sum(item.size for item in objects), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"needs {needed} bytes, {free} are free", str(folder))
    for item in objects:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.truncate(item.size)


def _fetch_all(bucket: _Bucket, objects: list[S3Object], folder: Path, progress: Progress) -> None:
    """Fetch every range of every object, then verify every file."""
    cancel = threading.Event()
    total, done = sum(item.size for item in objects), 0
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            ranges = [
                pool.submit(_fetch, bucket, item, folder / item.name, start, cancel)
                for item in objects
                for start in range(0, item.size, RANGE_BYTES)
            ]
            for future in as_completed(ranges):
                done += future.result()
                progress.step(done, total)
            verified = list(pool.map(lambda item: _verify(bucket, item, folder / item.name), objects))
        except BaseException:
            cancel.set()
            pool.shutdown(cancel_futures=True)
            raise
    if not all(verified):
        progress.note(f"{verified.count(False)} of {len(objects)} files: no checksum to compare, only the size was checked")


def _fetch(bucket: _Bucket, item: S3Object, path: Path, start: int, cancel: threading.Event) -> int:
    """Write one range of an object into its file; a cut connection is taken up where it broke. Returns its bytes."""
    from botocore.exceptions import ConnectionClosedError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    stop, at = min(start + RANGE_BYTES, item.size), start
    with path.open("r+b", buffering=0) as file:
        for attempt in range(ATTEMPTS):
            try:
                for chunk in _body(bucket, item, at, stop):
                    if cancel.is_set():
                        raise _Cancelled
                    _write(file.fileno(), chunk, at)
                    at += len(chunk)
                return stop - start
            except (
                ConnectionClosedError,
                IncompleteReadError,
                ReadTimeoutError,
                ResponseStreamingError,
                ConnectionError,
            ) as error:
                cut: Exception = error
            if cancel.wait(BACKOFF_S * 2**attempt):
                raise _Cancelled
    raise ServiceError(
        f"the connection to s3://{bucket.name}/{item.key} was cut {ATTEMPTS} times at byte {at} of {item.size}; "
        "nothing was kept, run it again"
    ) from cut


def _write(descriptor: int, data: bytes, at: int) -> None:
    """All of `data` at an offset."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _body(bucket: _Bucket, item: S3Object, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of an object, in chunks."""
    answer = bucket.client.get_object(Bucket=bucket.name, Key=item.key, Range=f"bytes={start}-{stop - 1}", IfMatch=f'"{item.etag}"')
    # Not every server heeds If-Match.
    if answer["ETag"].strip('"') != item.etag:
        raise _altered(bucket, item)
    if answer["ContentLength"] != stop - start:
        raise ServiceError(f"s3://{bucket.name}/{item.key}: the server ignores byte ranges; use one that has them")
    yield from answer["Body"].iter_chunks(_CHUNK)


def _altered(bucket: _Bucket, item: S3Object) -> ServiceError:
    return ServiceError(f"s3://{bucket.name}/{item.key} was replaced while it was being read; run it again")


def _verify(bucket: _Bucket, item: S3Object, path: Path) -> bool:
    """Compare a file with its object's ETag or checksum; False where the server gives nothing to compare with.

    An ETag is the MD5 of the content, or of its parts' MD5s, unless the server encrypts with keys of its own.
    """
    if re.fullmatch("[0-9a-f]{32}", item.etag) and _hexdigest(path, "md5") == item.etag:
        return True
    head = bucket.client.head_object(Bucket=bucket.name, Key=item.key, ChecksumMode="ENABLED")
    if head["ETag"].strip('"') != item.etag:
        raise _altered(bucket, item)
    matches = _matches_checksum(head, path)
    if matches is None and not _is_opaque(head):
        matches = _matches_etag(bucket, item, path)
    if matches is False:
        raise ServiceError(f"s3://{bucket.name}/{item.key} arrived damaged (checksum differs); run it again")
    return bool(matches)


def _hexdigest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _is_opaque(head: dict[str, Any]) -> bool:
    """Whether the ETag is no MD5, by the rules of S3's encryption."""
    return head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head


def _matches_checksum(head: dict[str, Any], path: Path) -> bool | None:
    """Compare with a checksum of the whole object; None where there is none that we can compute."""
    if head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    computed: dict[str, Callable[[], bytes]] = {
        "ChecksumSHA256": lambda: bytes.fromhex(_hexdigest(path, "sha256")),
        "ChecksumSHA1": lambda: bytes.fromhex(_hexdigest(path, "sha1")),
        "ChecksumCRC32": lambda: _crc32(path).to_bytes(4, "big"),
    }
    for name, compute in computed.items():
        # A dash marks the checksum of a multipart upload's checksums.
        if name in head and "-" not in head[name]:
            return base64.b64encode(compute()).decode() == head[name]
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _matches_etag(bucket: _Bucket, item: S3Object, path: Path) -> bool | None:
    """Compare with an ETag that is an MD5, or `MD5-PARTS`; None where it is neither, or the parts' size is unknown."""
    match = re.fullmatch(r"[0-9a-f]{32}(?:-(\d+))?", item.etag)
    if match is None:
        return None
    if match[1] is None:
        return False  # a plain MD5, compared before
    first = bucket.client.head_object(Bucket=bucket.name, Key=item.key, PartNumber=1)
    parts = int(match[1])
    known = first.get("PartsCount") == parts
    for size in (first["ContentLength"],) if known else _PART_SIZES:
        if -(-item.size // size) == parts and multipart_etag(path, size) == item.etag:
            return True
    # Parts of uneven sizes, or of a size that we did not guess, prove nothing.
    return False if known and -(-item.size // first["ContentLength"]) == parts else None


def multipart_etag(path: Path, part_size: int) -> str:
    """The ETag that S3 gives a file uploaded in parts of `part_size` bytes."""
    digests = []
    with path.open("rb") as file:
        while True:
            part, left = hashlib.md5(usedforsecurity=False), part_size
            while left and (chunk := file.read(min(left, _CHUNK))):
                part.update(chunk)
                left -= len(chunk)
            if left == part_size:
                break
            digests.append(part.digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what boto3 and the disk raise into one ServiceError line."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise ServiceError(_explain_answer(uri, error.response)) from error
    except BotoCoreError as error:
        raise ServiceError(_explain_failure(uri, error)) from error
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
