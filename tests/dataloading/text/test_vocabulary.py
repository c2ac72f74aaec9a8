"""vocab.txt: its lines, and the files that are taken for one."""

import gzip
import json

import pytest

from eclip.dataloading.text import SPECIALS, Tokenizer, read_vocabulary

ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\xa0", "\u3000", " ", "##\u2028", "﹨"]


def write(folder, data):
    path = folder / "vocab.txt"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(*pieces, end="\n"):
    return end.join([*SPECIALS, *pieces])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end", "end end", "end end end"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_pieces_that_python_takes_for_line_ends(tmp_path, end, last, mark):
    path = write(tmp_path, mark + lines("red", *ODD, "chair", end=end) + last.replace("end", end).replace(" ", ""))
    vocab = read_vocabulary(path)
    assert list(vocab) == [*SPECIALS, "red", *ODD, "chair"]
    assert list(vocab.values()) == list(range(len(vocab)))
    tokenizer = Tokenizer.from_vocab_file(path)
    assert tokenizer.vocab_size == len(vocab)
    assert tokenizer.encode(["red chair"])[0].tolist()[1:-1] == [5, 6 + len(ODD)]


def test_a_carriage_return_within_a_line_and_an_empty_piece(tmp_path):
    assert list(read_vocabulary(write(tmp_path, lines("a\rb", "", "c"))))[5:] == ["a\rb", "", "c"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (lines("a", "b", "a", "b"), r"'a' stands in lines 6 and 8 \(2 pieces occur twice\)"),
        ("[PAD]\n[UNK]\nred\n", r"no \[CLS\], \[SEP\], \[MASK\]; a BERT vocabulary"),
        (
            "\n".join(f"{piece}\t{i}" for i, piece in enumerate((*SPECIALS, "red"))),
            r"line 1 is '\[PAD\]\\t0': every line",
        ),
        (lines("red", end=" \n"), r"line 1 is '\[PAD\] ': every line must be a piece and nothing else"),
        (lines("red", end="\r"), r"line 1 is '\[PAD\]\\r\[UNK\]"),
        (lines("red").lower(), r"line 1 is '\[pad\]'"),
        (lines("für").encode("latin-1"), "line 6 is not UTF-8"),
        (lines("red").encode("utf-16"), "UTF-16"),
        (lines("sofa").encode("utf-16-le"), "binary"),
        (gzip.compress(lines("red").encode(), mtime=0), "compressed with gzip"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("<!doctype html>\n<html>", "a web page"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c", "SentencePiece.*give the tokenizer.json"),
        ("<unk>\t0\n<s>\t0\n</s>\t0\n▁the\t-3.1\n", "SentencePiece.*give the tokenizer.json"),
        ("<pad>\n<s>\n</s>\n<unk>\n▁the\n", "SentencePiece.*give the tokenizer.json"),
        ("<s>\n<pad>\n</s>\n<unk>\nĠthe\n", "byte-pair.*give the tokenizer.json"),
        ("#version: 0.2\nĠ t\nh e\n", "merges of a byte-pair.*give the tokenizer.json"),
        (json.dumps({"<|endoftext|>": 0, "Ġthe": 1}), "byte-pair"),
        ('{\n  "version": "1.0",\n  "model": {"type": "WordPiece"}}', "tokenizer.json"),
    ],
)
def test_other_files_are_told(tmp_path, data, words):
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.from_vocab_file(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_folder_is_no_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_vocabulary(tmp_path)
