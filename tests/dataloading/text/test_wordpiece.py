"""WordPiece: deterministic training, BERT-equal encoding, ragged batches, save and load."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eclip.dataloading.text import SPECIALS, Tokenizer
from tests.helpers import run_command

TEXTS = [
    f"{c} {m} {n}, {s} cm"
    for c in ("Red", "Blue", "Café")
    for m in ("fabric", "wooden")
    for n in ("sofa", "椅子")
    for s in (90, 185)
]


def test_ragged_batch_has_specials_and_cumulative_lengths():
    tokenizer = Tokenizer.train(TEXTS, vocab_size=200)
    texts = ["red sofa", "", "   ", "wooden " * 80, "椅子"]
    tokens, cu = tokenizer.encode(texts, max_tokens=12)
    assert tokens.dtype == torch.int64 and cu.dtype == torch.int32 and cu.shape == (len(texts) + 1,)
    rows = [tokens[a:b].tolist() for a, b in zip(cu[:-1], cu[1:], strict=True)]
    assert all(row[0] == tokenizer.begin_id and row[-1] == tokenizer.end_id for row in rows)
    assert rows[1] == rows[2] == [tokenizer.begin_id, tokenizer.end_id]
    assert len(rows[3]) == 12
    assert tokenizer.unk_id not in tokens
    assert tokenizer.decode(rows[0]) == "red sofa"


def test_no_text_gives_an_empty_batch():
    tokens, cu = Tokenizer.train(TEXTS, vocab_size=200).encode([])
    assert tokens.shape == (0,) and tokens.dtype == torch.int64 and cu.tolist() == [0]


def test_lower_cases_and_strips_accents():
    tokenizer = Tokenizer.train(TEXTS, vocab_size=200)
    assert torch.equal(tokenizer.encode(["RED CAFÉ"])[0], tokenizer.encode(["red cafe"])[0])


def test_unknown_letters_become_unk():
    tokenizer = Tokenizer.train(TEXTS, vocab_size=200)
    assert tokenizer.encode(["Ω"])[0].tolist() == [tokenizer.begin_id, tokenizer.unk_id, tokenizer.end_id]


def test_training_is_the_same_in_another_process(tmp_path):
    # The library's own WordPiece trainer fails this: its hash map is seeded per process.
    script = (
        "import sys, random; from eclip.dataloading.text import Tokenizer; r = random.Random(0)\n"
        "words = [''.join(r.choice('abcdefgh') for _ in range(r.randint(2, 7))) for _ in range(400)]\n"
        "print(sorted(Tokenizer.train(words, vocab_size=150)._tokenizer.get_vocab().items()))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


def test_vocabulary_stays_within_its_size():
    chinese = ["".join(chr(0x4E00 + 7 * i + j) for j in range(7)) for i in range(400)]
    tokenizer = Tokenizer.train(chinese, vocab_size=300)
    assert tokenizer.vocab_size <= 300
    assert [tokenizer._tokenizer.id_to_token(i) for i in range(5)] == list(SPECIALS)


def test_save_and_load_give_the_same_ids(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, vocab_size=200)
    tokenizer.encode(TEXTS, max_tokens=5)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size and loaded.end_id == tokenizer.end_id
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
    tokenizer = Tokenizer.from_vocab_file(path)
    oracle = transformers.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True)
    for text in ("Red sofa, 190cm", "CAFÉ 椅", "", "unknown"):
        assert tokenizer.encode([text])[0].tolist() == oracle(text)["input_ids"]
    assert tokenizer.vocab_size == len(pieces) and tokenizer.pad_id == 0 and tokenizer.unk_id == 2


@pytest.mark.parametrize("lines, message", [(["a", "[PAD]"], r"\[UNK\]"), ([*SPECIALS, "a", "a"], "twice")])
def test_bad_vocab_file_is_one_clear_line(tmp_path, lines, message):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_vocab_file(path)
    assert "\n" not in str(error.value)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 64"):
        Tokenizer.train(TEXTS, vocab_size=10)
    with pytest.raises(ValueError, match="no word"):
        Tokenizer.train([" ", ""])
    with pytest.raises(ValueError, match="need 3"):
        Tokenizer.train(TEXTS, vocab_size=200).encode(["a"], max_tokens=2)
    with pytest.raises(ValueError, match="no tokenizer"):
        Tokenizer.load(tmp_path)


def test_cased_leaves_capitals_and_accents(tmp_path):
    path = vocab_file(tmp_path, "Sofa", "sofa", "Café", "cafe")
    tokenizer = Tokenizer.from_vocab_file(path, cased=True)
    assert tokenizer.encode(["Sofa sofa Café cafe"])[0].tolist()[1:-1] == [5, 6, 7, 8]


def test_cased_encodes_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    pieces = [*SPECIALS, "Red", "So", "##fa", "Café", "椅", "für"]
    tokenizer = Tokenizer.from_vocab_file(vocab_file(tmp_path, *pieces[5:]), cased=True)
    oracle = transformers.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=False)
    for text in ("Red Sofa Café", "red 椅 für FÜR"):
        assert tokenizer.encode([text])[0].tolist() == oracle(text)["input_ids"]


@pytest.mark.parametrize("pieces", [["Red", "Sofa", "a"], ["Ø", "##A", "b"], ["КРАСНЫЙ"]])
def test_cased_vocabulary_read_in_lower_case_is_refused(tmp_path, pieces):
    with pytest.raises(ValueError, match=f"a cased vocabulary.*'{pieces[0]}'.*--cased"):
        Tokenizer.from_vocab_file(vocab_file(tmp_path, *pieces))


@pytest.mark.parametrize(
    ("pieces", "text"),
    [(["für", "##ä"], "FÜR"), (["소파", "의자"], "소파"), (["ソファー", "でんわ"], "でんわ"), (["красный", "й"], "Й")],
)
def test_accents_stay_where_the_vocabulary_has_them(tmp_path, pieces, text):
    """Stripping them would take Korean syllables and Japanese voiced letters apart: all would be unknown."""
    tokenizer = Tokenizer.from_vocab_file(vocab_file(tmp_path, *pieces))
    assert tokenizer.unk_id not in tokenizer.encode([text])[0]


def test_a_few_odd_pieces_change_nothing(tmp_path):
    pieces = [*(f"w{i}" for i in range(200)), "<S>", "é", "[Unused1]"]
    tokenizer = Tokenizer.from_vocab_file(vocab_file(tmp_path, *pieces, "cafe"))
    assert tokenizer.encode(["CAFÉ"])[0].tolist()[1:-1] == [5 + len(pieces)]


ENGLISH = ("red", "fabric", "sofa", "90", "cm", ",", *"abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("text", ["红色沙发 三人位", "Красный диван", "أريكة حمراء", "빨간 소파", "Ω Ψ red"])
def test_vocabulary_of_another_language_is_refused(tmp_path, text):
    tokenizer = Tokenizer.from_vocab_file(vocab_file(tmp_path, *ENGLISH))
    with pytest.raises(ValueError, match=r"vocab.txt: \d+% of the pieces .* at most 10% .*e\.g\. '.*do this$") as error:
        tokenizer.require_known([text, "red sofa"], "vocab.txt", "do this")
    assert "\n" not in str(error.value)


def test_lower_case_vocabulary_read_as_cased_is_refused(tmp_path):
    tokenizer = Tokenizer.from_vocab_file(vocab_file(tmp_path, *ENGLISH), cased=True)
    with pytest.raises(ValueError, match="'Red'"):
        tokenizer.require_known(["Red fabric sofa, 90 cm"] * 5000, "v", "a")
    Tokenizer.from_vocab_file(vocab_file(tmp_path, *ENGLISH)).require_known(["Red fabric sofa, 90 cm"], "v", "a")


def test_few_unknown_pieces_are_allowed():
    tokenizer = Tokenizer.train(TEXTS, vocab_size=200)
    tokenizer.require_known([*TEXTS * 10, "🛋 Ω"], "v", "a")
    tokenizer.require_known([], "v", "a")
    tokenizer.require_known(["", " "], "v", "a")


def test_counting_unknown_pieces_leaves_encoding_as_it_was():
    tokenizer = Tokenizer.train(TEXTS, vocab_size=200)
    before = tokenizer.encode(TEXTS, max_tokens=6)
    tokenizer.require_known(TEXTS, "v", "a")
    assert all(torch.equal(a, b) for a, b in zip(before, tokenizer.encode(TEXTS, max_tokens=6), strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"[UNK]"', b'"[unk]"'),
        lambda data: b"\xff" + data,
        lambda data: b"{}",
        lambda data: b"[]",
    ],
)
def test_damaged_tokenizer_is_one_line(tmp_path, damage):
    Tokenizer.train(TEXTS, vocab_size=200).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*restore it") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def vocab_file(folder, *pieces):
    path = folder / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, *pieces]) + "\n", encoding="utf-8")
    return path


def test_saved_and_loaded_in_a_folder_that_the_locale_cannot_spell(tmp_path):
    folder = tmp_path / "läufe 运行"
    Tokenizer.train(TEXTS, vocab_size=200).save(folder)
    code = "import sys; from eclip.dataloading.text import Tokenizer as T; T.load(sys.argv[1]).save(sys.argv[1])"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run_command([sys.executable, "-c", code, str(folder)], env=plain)
    assert Tokenizer.load(folder).vocab_size <= 200


def test_a_tokenizer_that_leaves_nothing_of_a_text_is_refused(tmp_path):
    Tokenizer.train(TEXTS, vocab_size=200).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**saved, "post_processor": None}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: it adds no token to the end of a text.*restore it"):
        Tokenizer.load(tmp_path)


def test_threads_share_a_tokenizer(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, vocab_size=200)
    texts = [" ".join(TEXTS)] * 20
    alone = {n: tokenizer.encode(texts, n) for n in (3, 9, 40)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: (n, tokenizer.encode(texts, n)), [3, 9, 40] * 20))
    assert all(torch.equal(a, b) for n, both in found for a, b in zip(both, alone[n], strict=True))
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is None
