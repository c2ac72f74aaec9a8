"""What a file is that should have been another: told by its first bytes, for messages."""

_KINDS = (
    (b"\x1f\x8b", "compressed with gzip"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for (git lfs pull fetches it)"),
    (b"<!doctype html", "a web page, as a download that needs a login leaves it"),
    (b"<html", "a web page, as a download that needs a login leaves it"),
    (b"<?xml", "an XML text, as a store's error message is"),
    (b"<error>", "an XML text, as a store's error message is"),
    (b"\x89hdf\r\n", "HDF5"),
    (b"gguf", "GGUF"),
    (b"pk\x03\x04", "a ZIP archive"),
)
HEAD = 512
"""Bytes that `file_kind` wants."""


def file_kind(head: bytes) -> str | None:
    """The kind of a file by its first bytes, in words that follow "it is"; None for one not known here."""
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return "zeros, as a download that was cut leaves them"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, kind in _KINDS:
        if head.startswith(start) or text[: len(start)].lower() == start:
            return kind
    if head[:1] == b"\x80" and head[1] in range(2, 6):
        return "a Python pickle"
    return None
