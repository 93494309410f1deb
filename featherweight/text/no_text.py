"""What a file's first bytes tell that holds no text, or text in an encoding that looks like UTF-8 and is another."""

from __future__ import annotations

import re

PARQUET = b"PAR1"
MOST_CONTROLS = 0.02
"""Share of control characters beyond which bytes are no text; those of a terminal's colours are none of them."""
FEWEST = 3
"""Characters of another encoding that are no coincidence."""

NO_TEXT = {
    b"PK\x03\x04": "a zip archive or an Office document",
    b"PK\x05\x06": "an empty zip archive",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF87a": "a GIF image",
    b"GIF89a": "a GIF image",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a": "a RAR archive",
    b"SQLite format 3\0": "an SQLite database",
    b"ARROW1": "an Arrow file, which Parquet can take the place of",
    b"\xff\xff\xff\xff": "an Arrow stream, which Parquet can take the place of",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"Obj\x01": "an Avro file, which Parquet can take the place of",
    b"ORC": "an ORC file, which Parquet can take the place of",
    b"%!PS": "a PostScript document",
    b"\x1f\x9d": "compressed by compress (.Z), of which gzip can take the place",
    b"\x04\x22\x4d\x18": "compressed by LZ4, of which gzip can take the place",
    b"\xff\x06\0\0sNaPpY": "compressed by Snappy, of which gzip can take the place",
    **dict.fromkeys((b"(dp0\n", b"(lp0\n", b"ccopy_reg\n"), "a pickle, which can run code and is not opened"),
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS, in whose place 'git lfs pull' puts the file",
}
"""By a file's first bytes."""
_CONTROLS = bytes(one for one in range(32) if one not in b"\0\b\t\n\v\f\r\x1a\x1b")
_UTF7 = re.compile(rb"\+[A-Za-z0-9+/]{2,}-?")
_HZ = re.compile(rb"~\{(?:[\x21-\x77][\x21-\x7e])+~\}")
_QUOTED = re.compile(rb"=[C-F][0-9A-F](?:=[89AB][0-9A-F])+")
_BASE64 = re.compile(rb"\s*(?:[A-Za-z0-9+/]{60,76}\r?\n){2,}[A-Za-z0-9+/=\r\n]*")
_UU = re.compile(rb"begin [0-7]{3} [^\n]+\n(?:[\x20-\x60]{2,61}\r?\n){2}")


def kind_without_text(head: bytes) -> str | None:
    """What the file is instead of text; None where it may be some."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head.startswith(PARQUET):
        return "a compressed Parquet file, which is to be decompressed"
    if head.lstrip().startswith(b"%PDF-"):
        return "a PDF document"
    if head.startswith(b"RIFF") and head[8:12] in (b"WAVE", b"WEBP", b"AVI "):
        return "a recording or an image (RIFF)"
    found = next(((magic, kind) for magic, kind in NO_TEXT.items() if head.startswith(magic)), None)
    if found is None or (found[0].isalnum() and not _is_binary(head)):  # prose may begin with ORC, or GGUF
        return None
    return found[1]


def _is_binary(head: bytes) -> bool:
    return b"\0" in head or control_share(head) > 0


def other_encoding(head: bytes) -> str | None:
    """The encoding whose letters stand there as plain ASCII would; None where there is none."""
    if b"\x1b$" in head:
        return "ISO-2022, as Japanese mail is written in"
    if not head.isascii():
        return None
    if len(_HZ.findall(head)) >= FEWEST:
        return "HZ, a Chinese encoding"
    if len(_QUOTED.findall(head)) >= FEWEST and b"=\n" in head.replace(b"\r", b""):
        return "mail in quoted-printable"
    if _BASE64.fullmatch(head) or _UU.match(head):
        return "base64 or uuencoded bytes"
    return "UTF-7" if _is_utf7(head) else None


def _is_utf7(head: bytes) -> bool:
    """Whether every plus sign begins letters of other scripts, or is one by itself (`+-`)."""
    groups = [group for group in _UTF7.findall(head) if group.endswith(b"-")]
    try:
        words = [group.decode("utf-7") for group in groups]
        whole = head[: head.rfind(b"\n") + 1 or len(head)].decode("utf-7")
    except UnicodeDecodeError:
        return False
    foreign = [word for word in words if word and not word.isascii() and word.isprintable()]
    return len(foreign) >= FEWEST and len(foreign) == len(groups) and "+" not in whole.replace("+ ", "")


def control_share(head: bytes) -> float:
    """How many of the bytes are control characters that no text has."""
    return (len(head) - len(head.translate(None, _CONTROLS))) / max(1, len(head))
