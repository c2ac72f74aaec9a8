"""WordPiece: deterministic training, BERT-equal encoding, ragged batches, save and load."""

import subprocess
import sys

import pytest
import torch

from eclip.dataloading.text import SPECIALS, WordPiece

TEXTS = [
    f"{c} {m} {n}, {s} cm"
    for c in ("Red", "Blue", "Café")
    for m in ("fabric", "wooden")
    for n in ("sofa", "椅子")
    for s in (90, 185)
]


def test_ragged_batch_has_specials_and_cumulative_lengths():
    tokenizer = WordPiece.train(TEXTS, vocab_size=200)
    texts = ["red sofa", "", "   ", "wooden " * 80, "椅子"]
    tokens, cu = tokenizer.encode(texts, max_tokens=12)
    assert tokens.dtype == torch.int64 and cu.dtype == torch.int32 and cu.shape == (len(texts) + 1,)
    rows = [tokens[a:b].tolist() for a, b in zip(cu[:-1], cu[1:], strict=True)]
    assert all(row[0] == tokenizer.cls_id and row[-1] == tokenizer.sep_id for row in rows)
    assert rows[1] == rows[2] == [tokenizer.cls_id, tokenizer.sep_id]
    assert len(rows[3]) == 12
    assert tokenizer.unk_id not in tokens
    assert tokenizer.decode(rows[0]) == "red sofa"


def test_no_text_gives_an_empty_batch():
    tokens, cu = WordPiece.train(TEXTS, vocab_size=200).encode([])
    assert tokens.shape == (0,) and tokens.dtype == torch.int64 and cu.tolist() == [0]


def test_lower_cases_and_strips_accents():
    tokenizer = WordPiece.train(TEXTS, vocab_size=200)
    assert torch.equal(tokenizer.encode(["RED CAFÉ"])[0], tokenizer.encode(["red cafe"])[0])


def test_unknown_letters_become_unk():
    tokenizer = WordPiece.train(TEXTS, vocab_size=200)
    assert tokenizer.encode(["Ω"])[0].tolist() == [tokenizer.cls_id, tokenizer.unk_id, tokenizer.sep_id]


def test_training_is_the_same_in_another_process(tmp_path):
    # The library's own WordPiece trainer fails this: its hash map is seeded per process.
    script = (
        "import sys, random; from eclip.dataloading.text import WordPiece; r = random.Random(0)\n"
        "words = [''.join(r.choice('abcdefgh') for _ in range(r.randint(2, 7))) for _ in range(400)]\n"
        "print(sorted(WordPiece.train(words, vocab_size=150)._tokenizer.get_vocab().items()))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


def test_vocabulary_stays_within_its_size():
    chinese = ["".join(chr(0x4E00 + 7 * i + j) for j in range(7)) for i in range(400)]
    tokenizer = WordPiece.train(chinese, vocab_size=300)
    assert tokenizer.vocab_size <= 300
    assert [tokenizer._tokenizer.id_to_token(i) for i in range(5)] == list(SPECIALS)


def test_save_and_load_give_the_same_ids(tmp_path):
    tokenizer = WordPiece.train(TEXTS, vocab_size=200)
    tokenizer.encode(TEXTS, max_tokens=5)
    tokenizer.save(tmp_path)
    loaded = WordPiece.load(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size and loaded.mask_id == tokenizer.mask_id
    for mine, theirs in zip(tokenizer.encode(TEXTS), loaded.encode(TEXTS), strict=True):
        assert torch.equal(mine, theirs)


def test_bert_vocab_file_encodes_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    pieces = [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "so",
        "##fa",
        "red",
        "cafe",
        ",",
        "190",
        "##cm",
        "椅",
    ]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    tokenizer = WordPiece.from_vocab_file(path)
    oracle = transformers.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True)
    for text in ("Red sofa, 190cm", "CAFÉ 椅", "", "unknown"):
        assert tokenizer.encode([text])[0].tolist() == oracle(text)["input_ids"]
    assert tokenizer.vocab_size == len(pieces) and tokenizer.pad_id == 0 and tokenizer.unk_id == 2


@pytest.mark.parametrize("lines, message", [(["a", "[PAD]"], r"\[UNK\]"), ([*SPECIALS, "a", "a"], "twice")])
def test_bad_vocab_file_is_one_clear_line(tmp_path, lines, message):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        WordPiece.from_vocab_file(path)
    assert "\n" not in str(error.value)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 64"):
        WordPiece.train(TEXTS, vocab_size=10)
    with pytest.raises(ValueError, match="no word"):
        WordPiece.train([" ", ""])
    with pytest.raises(ValueError, match="need 3"):
        WordPiece.train(TEXTS, vocab_size=200).encode(["a"], max_tokens=2)
    with pytest.raises(ValueError, match="no tokenizer"):
        WordPiece.load(tmp_path)
