"""Reading a BERT vocab.txt: one piece a line, the line's number is its id; and what other files are taken for one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..file_kinds import HEAD, file_kind

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WANTED = "give the vocab.txt of a BERT (WordPiece, one piece a line), or a tokenizer.json of a CLIP, SigLIP or BERT"
_INSTEAD = "give the tokenizer.json that lies beside it, or that transformers' save_pretrained writes"


def is_json(path: Path) -> bool:
    """Whether a file begins as a JSON object does, as a tokenizer.json. False for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    except OSError:
        return False


def read_vocabulary(path: Path) -> dict[str, int]:
    """Pieces and their ids. Raises ValueError, one line, for a file that is no such vocabulary.

    Lines end with a line feed alone: BERT's Chinese vocabulary holds U+2028, which Python takes for a line's end too.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); {WANTED}") from error
    if kind := _other_kind(data):
        raise ValueError(f"{path}: it is {kind}; {WANTED}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 (byte {error.start}); {WANTED}, in UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    vocab = _numbered(lines, path)
    absent = [name for name in SPECIALS if name not in vocab]
    if absent:
        kind = _near_miss(lines, absent[0]) or _kind_by_pieces(vocab)
        raise ValueError(f"{path}: no {', '.join(absent)}; {kind}a BERT vocabulary holds all of {', '.join(SPECIALS)}")
    return vocab


def _numbered(lines: list[str], path: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for i, line in enumerate(lines):
        if line in vocab:
            count = len(lines) - len(set(lines))
            raise ValueError(
                f"{path}: {line!r} stands in lines {vocab[line] + 1} and {i + 1} ({count} pieces occur twice); every "
                f"line must be its own piece: its number is a row of the embedding"
            )
        vocab[line] = i
    return vocab


def _other_kind(data: bytes) -> str | None:
    """What a file is that is no list of pieces, by its beginning."""
    head = data[:HEAD]
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if kind := file_kind(head):
        return kind
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 text, and must be UTF-8"
    if b"\0" in data or (start[:1] in b"\n\x0a" and b"<unk>" in head[:40]) or head[:2] == b"\n\x0e":
        return f"binary, perhaps a SentencePiece model: {_INSTEAD}"
    if start.startswith(b"#version"):
        return f"the merges of a byte-pair tokenizer (GPT-2, CLIP, RoBERTa): {_INSTEAD}"
    return None


def _near_miss(lines: Sequence[str], special: str) -> str:
    """A remark on the line that holds a special piece and more: its count, quotes, blanks, the whole vocabulary."""
    for i, line in enumerate(lines):
        if (at := line.lower().find(special.lower())) >= 0:
            shown = line[max(0, at - 5) : at + len(special) + 15]
            return f"line {i + 1} is {shown!r}: every line must be a piece and nothing else: "
    return ""


def _kind_by_pieces(vocab: Mapping[str, int]) -> str:
    """A remark on what a vocabulary without BERT's specials is."""
    pieces = list(vocab)[:1000]
    if any(piece.startswith(("▁", "<unk>\t")) for piece in pieces):
        return f"it is a SentencePiece vocabulary (SigLIP, T5, XLM-R, ALBERT): {_INSTEAD}; "
    if {"<s>", "<pad>", "</s>", "<unk>"} & vocab.keys() or any(piece.startswith("Ġ") for piece in pieces):
        return f"it is a byte-pair vocabulary (GPT-2, CLIP, RoBERTa): {_INSTEAD}; "
    return ""
