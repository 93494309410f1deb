"""Downloads from a real S3 server: whole, verified, resumed, and refused in one line."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3transfer.utils import OSUtils

from featherweight.checkpoint import s3, s3_checksums
from featherweight.checkpoint.files import missing_part
from featherweight.errors import ServiceError
from featherweight.progress import Progress
from tests.conftest import S3Server


class Recorder(Progress):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def step(self, done: int, total: int, **values: float) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Proxy:
    """A TCP proxy that cuts the first `cuts` answers longer than `after` bytes, as a bad network does."""

    def __init__(self, server: S3Server, cuts: int, after: int = 30_000) -> None:
        self.left, self.after, self.made = cuts, after, 0
        self._target = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:  # closed
                return
            far = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        passed = 0
        try:
            while data := source.recv(8192):
                target.sendall(data)
                passed += len(data)
                if answers and passed > self.after and self._cuts_now():
                    break
        except OSError:  # the other side is gone
            pass
        for end in (source, target):
            with_shutdown(end)

    def _cuts_now(self) -> bool:
        with self._lock:
            self.left -= 1
            self.made += self.left >= 0
            return self.left >= 0


def with_shutdown(end: socket.socket) -> None:
    """Close a connection for both of its threads."""
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed before
        end.close()


@pytest.fixture
def cutting(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Proxy]]:
    """Makes boto3 talk through a proxy that cuts that many answers."""
    proxies: list[Proxy] = []

    def through(cuts: int) -> Proxy:
        proxies.append(Proxy(s3_server, cuts))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].endpoint)
        return proxies[-1]

    yield through
    for proxy in proxies:
        proxy.close()


def upload(server: S3Server, files: dict[str, bytes]) -> str:
    """Put objects under s3://bucket/models/one; returns that address."""
    client = boto3.client("s3")
    for name, content in files.items():
        client.put_object(Bucket=server.bucket, Key=f"models/one/{name}", Body=content)
    return f"s3://{server.bucket}/models/one"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(call: Callable[[], Any]) -> str:
    """The one line of the ServiceError that a call raises."""
    with pytest.raises(ServiceError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


FILES = {"config.json": b"{}", "empty": b"", "sub/deep/x.txt": b"deep", "big.bin": os.urandom(300_000)}


def test_a_prefix_is_downloaded_whole(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3, "RANGE_BYTES", 70_000)
    uri, progress = upload(s3_server, FILES), Recorder()
    upload_beside = boto3.client("s3")
    upload_beside.put_object(Bucket=s3_server.bucket, Key="models/one-more/other", Body=b"a neighbour")
    s3.download(uri, tmp_path / "got", progress)
    assert contents(tmp_path / "got") == FILES
    total = sum(map(len, FILES.values()))
    assert progress.steps[-1] == (total, total)
    assert [done for done, _ in progress.steps] == sorted(done for done, _ in progress.steps)
    assert progress.notes == []
    assert [path.name for path in tmp_path.iterdir()] == ["got"]


def test_one_object_and_chosen_names(s3_server: S3Server, tmp_path: Path):
    uri = upload(s3_server, FILES)
    s3.download(f"{uri}/big.bin", tmp_path / "one")
    assert contents(tmp_path / "one") == {"big.bin": FILES["big.bin"]}
    s3.download(f"{uri}/", tmp_path / "some", names=["config.json", "sub/deep/x.txt"])
    assert set(contents(tmp_path / "some")) == {"config.json", "sub/deep/x.txt"}


def test_objects_are_listed_by_name_over_pages(s3_server: S3Server):
    folder = s3_server.folder / "many"
    folder.mkdir()
    for number in range(1100):
        (folder / f"{number:04} ä+%.txt").write_bytes(b"x")
    found = s3.list_objects(f"s3://{s3_server.bucket}/many")
    assert [item.name for item in found] == [f"{number:04} ä+%.txt" for number in range(1100)]
    assert {item.etag for item in found} == {hashlib.md5(b"x").hexdigest()}
    assert s3.list_objects(f"s3://{s3_server.bucket}/man") == []


def test_a_cut_connection_is_taken_up_where_it_broke(s3_server: S3Server, tmp_path: Path, cutting: Callable[[int], Proxy]):
    uri = upload(s3_server, FILES)
    proxy = cutting(3)
    s3.download(uri, tmp_path / "got")
    assert contents(tmp_path / "got") == FILES
    assert proxy.made == 3


def test_a_file_of_another_length_is_not_taken(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that ignores ranges answers each with the whole object; without an MD5 only the length tells."""
    uri, place = upload(s3_server, FILES), OSUtils.rename_file
    answers = Heads({"ETag": '"opaque"', "ServerSideEncryption": "aws:kms"})

    def longer(utils: OSUtils, current: str, new: str) -> None:
        with Path(current).open("ab") as file:
            file.write(b"more")
        place(utils, current, new)

    objects = [s3.S3Object(item.key, item.name, item.size, "opaque") for item in s3.list_objects(uri) if item.name == "big.bin"]
    monkeypatch.setattr(OSUtils, "rename_file", longer)
    s3._fetch_all(s3.Bucket(s3.client(), s3_server.bucket), objects, tmp_path, Progress())
    line = refusal(lambda: s3._verify(s3.Bucket(answers, "b"), objects[0], tmp_path / "big.bin"))
    assert "has 300004 bytes here, 300000 there" in line


def test_a_connection_that_keeps_breaking_leaves_nothing(s3_server: S3Server, tmp_path: Path, cutting: Callable[[int], Proxy]):
    uri = upload(s3_server, FILES)
    proxy = cutting(10**9)
    line = refusal(lambda: s3.download(uri, tmp_path / "got"))
    assert re.search(r"models/one: the connection was cut 5 times \(.+\); nothing was kept, run it again", line)
    assert proxy.made >= s3.ATTEMPTS
    assert list(tmp_path.iterdir()) == []


def test_wrong_credentials(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = upload(s3_server, FILES)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    assert "refused the credentials (SignatureDoesNotMatch)" in refusal(lambda: s3.download(uri, tmp_path / "got"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobodynobody")
    assert "refused the credentials (InvalidAccessKeyId)" in refusal(lambda: s3.list_objects(uri))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    assert "no S3 credentials" in refusal(lambda: s3.list_objects(uri))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/models", "s3://no-such-bucket"])
def test_missing_bucket(s3_server: S3Server, tmp_path: Path, uri: str):
    assert "there is no bucket 'no-such-bucket'" in refusal(lambda: s3.download(uri, tmp_path / "got"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "gs://bucket/x", "s3://b@d name/x"])
def test_an_address_that_is_none(s3_server: S3Server, uri: str):
    assert "s3://bucket/prefix" in refusal(lambda: s3.list_objects(uri))


def test_empty_prefix(s3_server: S3Server, tmp_path: Path):
    uri = f"s3://{s3_server.bucket}/nothing"
    assert "holds no objects" in refusal(lambda: s3.download(uri, tmp_path / "got"))
    assert list(tmp_path.iterdir()) == []


def test_unreachable_endpoint(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    line = refusal(lambda: s3.download(f"s3://{s3_server.bucket}/x", tmp_path / "got"))
    assert "does not answer" in line
    assert "AWS_ENDPOINT_URL" in line


@pytest.mark.parametrize("name", s3.ENDPOINTS)
def test_the_endpoint_is_taken_from_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str):
    for other in s3.ENDPOINTS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, s3_server.endpoint)
    assert s3.client().meta.endpoint_url == s3_server.endpoint


def test_an_object_that_is_replaced_meanwhile_is_not_mixed(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = upload(s3_server, {"big.bin": FILES["big.bin"]})
    seen = s3.list_objects(uri)
    upload(s3_server, {"big.bin": FILES["big.bin"][::-1]})
    monkeypatch.setattr(s3, "_list", lambda bucket, prefix: seen)
    assert "replaced while it was being read" in refusal(lambda: s3.download(uri, tmp_path / "got"))
    assert list(tmp_path.iterdir()) == []


def test_damage_on_the_way_is_found(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri, place = upload(s3_server, FILES), OSUtils.rename_file

    def flipping(utils: OSUtils, current: str, new: str) -> None:
        content = Path(current).read_bytes()
        Path(current).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        place(utils, current, new)

    monkeypatch.setattr(OSUtils, "rename_file", flipping)
    assert "arrived damaged" in refusal(lambda: s3.download(uri, tmp_path / "got"))
    assert list(tmp_path.iterdir()) == []


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size; skips where this user may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_is_refused_at_once(s3_server: S3Server, tmp_path: Path):
    uri = upload(s3_server, FILES)
    with small_disk(tmp_path / "disk", "128k") as disk:
        assert "no space left on the disk" in refusal(lambda: s3.download(uri, disk / "got"))
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = upload(s3_server, FILES)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with small_disk(tmp_path / "disk", "128k") as disk:
        assert "no space left on the disk" in refusal(lambda: s3.download(uri, disk / "got"))
        assert list(disk.iterdir()) == []


def test_a_folder_that_holds_something_is_not_overwritten(s3_server: S3Server, tmp_path: Path):
    uri, folder = upload(s3_server, FILES), tmp_path / "got"
    folder.mkdir()
    (folder / "mine").write_text("keep")
    assert "not empty" in refusal(lambda: s3.download(uri, folder))
    assert contents(tmp_path) == {"got/mine": b"keep"}


def test_keys_that_lead_out_of_the_folder_are_refused(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evil = s3.S3Object("models/one/../../evil", "../../evil", 1, "0" * 32)
    monkeypatch.setattr(s3, "_list", lambda bucket, prefix: [evil])
    assert "leads out of the folder" in refusal(lambda: s3.download("s3://b/models/one", tmp_path / "got"))
    assert list(tmp_path.iterdir()) == []


def test_whether_a_checkpoint_is_complete_is_told_from_afar(s3_server: S3Server, tiny_checkpoint: Path):
    bucket = boto3.client("s3")
    uri = f"s3://{s3_server.bucket}/new"
    assert "config.json" in str(missing_part(s3.listing(uri)))
    for path in sorted(tiny_checkpoint.iterdir()):
        assert missing_part(s3.listing(uri)) is not None or path.name == "tokenizer_config.json"
        bucket.put_object(Bucket=s3_server.bucket, Key=f"new/{path.name}", Body=path.read_bytes())
    assert missing_part(s3.listing(uri)) is None
    whole = (tiny_checkpoint / "model.safetensors").read_bytes()
    bucket.put_object(Bucket=s3_server.bucket, Key="new/model.safetensors", Body=whole[:-1])
    assert f"{uri}/model.safetensors is truncated" in str(missing_part(s3.listing(uri)))


class Heads:
    """Answers to head_object as S3 gives them; rclone's server has neither parts nor encryption."""

    def __init__(self, head: dict[str, Any], part: dict[str, Any] | None = None) -> None:
        self.head, self.part = head, part

    def head_object(self, *, PartNumber: int | None = None, **_: Any) -> dict[str, Any]:
        return self.head if PartNumber is None else self.part or self.head


PART = 5 << 20
CONTENT = os.urandom(PART + 1000)


def aws_etag(content: bytes, part: int) -> str:
    """Computed here from S3's rule: the MD5 of the parts' MD5s, and how many they are."""
    pieces = [hashlib.md5(content[start : start + part]).digest() for start in range(0, len(content), part)]
    return f"{hashlib.md5(b''.join(pieces)).hexdigest()}-{len(pieces)}"


MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = "checksum of another content"
ANSWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, bool | None]] = {
    "plain MD5": (MD5, {}, None, True),
    "wrong MD5": ("0" * 32, {}, None, None),
    "no MD5, as it is encrypted": ("0" * 32, {"ServerSideEncryption": "aws:kms"}, None, False),
    "parts, size told": (aws_etag(CONTENT, PART), {}, {"ContentLength": PART, "PartsCount": 2}, True),
    "parts, odd size told": (aws_etag(CONTENT, 5_000_000), {}, {"ContentLength": 5_000_000, "PartsCount": 2}, True),
    "parts, size guessed": (aws_etag(CONTENT, PART), {}, {"ContentLength": len(CONTENT)}, True),
    "parts, size unknown": (aws_etag(CONTENT, 5_000_000), {}, {"ContentLength": len(CONTENT)}, False),
    "wrong parts": (aws_etag(CONTENT[::-1], PART), {}, {"ContentLength": PART, "PartsCount": 2}, None),
    "uneven parts": (aws_etag(CONTENT, PART)[:-1] + "3", {}, {"ContentLength": PART, "PartsCount": 3}, False),
    "wrong checksum": (aws_etag(CONTENT, PART), {"ChecksumSHA256": SHA256}, None, None),
    "checksum of parts": (MD5[::-1], {"ChecksumSHA256": "x-2", "SSECustomerAlgorithm": "AES256"}, None, False),
    "not hexadecimal": ("W/strange", {}, None, False),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_file_is_compared_with_whatever_the_server_tells(tmp_path: Path, name: str):
    etag, head, part, expected = ANSWERS[name]
    (tmp_path / "file").write_bytes(CONTENT)
    bucket = s3.Bucket(Heads({"ETag": f'"{etag}"', **head}, part), "bucket")
    item = s3.S3Object("key", "key", len(CONTENT), etag)
    if expected is None:
        assert "arrived damaged" in refusal(lambda: s3._verify(bucket, item, tmp_path / "file"))
    else:
        assert s3._verify(bucket, item, tmp_path / "file") is expected


def test_a_checksum_that_the_server_keeps_is_compared(s3_server: S3Server, tmp_path: Path):
    boto3.client("s3").put_object(Bucket=s3_server.bucket, Key="x", Body=CONTENT, ChecksumAlgorithm="CRC32")
    head = s3.client().head_object(Bucket=s3_server.bucket, Key="x", ChecksumMode="ENABLED")
    assert "ChecksumCRC32" in head
    (tmp_path / "x").write_bytes(CONTENT)
    assert s3_checksums._matches_checksum(head, tmp_path / "x") is True
    (tmp_path / "x").write_bytes(CONTENT[::-1])
    assert s3_checksums._matches_checksum(head, tmp_path / "x") is False


@settings(max_examples=50, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), part=st.integers(1, 50))
def test_multipart_etags_follow_the_rule(tmp_path_factory: pytest.TempPathFactory, content: bytes, part: int):
    path = tmp_path_factory.getbasetemp() / "parts"
    path.write_bytes(content)
    assert s3_checksums.multipart_etag(path, part) == aws_etag(content, part)
