"""tokenizer.json of CLIP and SigLIP: the ids of transformers, ends that are kept, padding, and files that are none."""

import json

import pytest
import torch
from tokenizers import Tokenizer as Plain

from eclip.dataloading.text import Tokenizer
from tests.dataloading.text.tower_tokenizers import BEGIN, END, TEXTS, clip_json, siglip2_json, siglip_json

KINDS = {"clip": clip_json, "siglip": siglip_json, "siglip2": siglip2_json}


def rows(tokenizer, texts, max_tokens=55):
    tokens, bounds = tokenizer.encode(texts, max_tokens)
    assert tokens.dtype == torch.int64 and bounds.dtype == torch.int32
    return [tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def test_clip_encodes_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = clip_json(tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))["model"]
    theirs = transformers.CLIPTokenizer(vocab=record["vocab"], merges=[tuple(pair) for pair in record["merges"]])
    ours = Tokenizer.from_vocab_file(path)
    texts = [*TEXTS, "", "  RED   Sofa!", "don't", "Größe 180×200", "<|endoftext|> red"]
    assert rows(ours, texts) == [theirs(text)["input_ids"] for text in texts]
    assert ours.begin_id == record["vocab"][BEGIN] and ours.end_id == ours.unk_id == record["vocab"][END]
    assert ours.vocab_size == len(record["vocab"])
    cut = theirs(TEXTS[0], truncation=True, max_length=6)["input_ids"]
    assert rows(ours, [TEXTS[0]], 6) == [cut] and cut[-1] == ours.end_id


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_before_their_end(tmp_path, kind):
    tokenizer = Tokenizer.from_vocab_file(KINDS[kind](tmp_path))
    plain = Plain.from_file(str(tmp_path / "tokenizer.json"))
    (empty, short, long) = rows(tokenizer, ["", "red sofa", "red sofa " * 30], 9)
    assert short == plain.encode("red sofa").ids
    assert len(long) == 9 and long[:-1] == plain.encode("red sofa " * 30).ids[:8]
    assert empty[-1] == short[-1] == long[-1] == tokenizer.end_id
    assert (tokenizer.begin_id is None) == (kind != "clip") and not tokenizer.padded


@pytest.mark.parametrize(("kind", "pad"), [("clip", END), ("siglip", "</s>"), ("siglip2", "<pad>")])
def test_padded_texts_have_one_length(tmp_path, kind, pad):
    path = KINDS[kind](tmp_path)
    tokenizer = Tokenizer.from_vocab_file(path, padded=True)
    assert tokenizer.padded and tokenizer.pad_id == Plain.from_file(str(path)).token_to_id(pad)
    plain = rows(Tokenizer.from_vocab_file(path), [*TEXTS, "", "sofa " * 50], 12)
    expected = [row + [tokenizer.pad_id] * (12 - len(row)) for row in plain]
    assert rows(tokenizer, [*TEXTS, "", "sofa " * 50], 12) == expected
    tokenizer.require_known(TEXTS, "v", "a")


@pytest.mark.parametrize("config", [{"pad_token": "<unk>"}, {"pad_token": {"content": "<unk>", "special": True}}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_padding_is_what_the_files_beside_say(tmp_path, name, config):
    path = siglip_json(tmp_path)
    (tmp_path / name).write_text(json.dumps(config))
    assert Tokenizer.from_vocab_file(path, padded=True).pad_id == 2
    (tmp_path / name).write_text("[]")
    assert Tokenizer.from_vocab_file(path, padded=True).pad_id == 1


def test_padding_and_truncation_of_the_file_are_not_taken(tmp_path):
    """Published files have some left over from whoever saved them."""
    path = clip_json(tmp_path)
    before = rows(Tokenizer.from_vocab_file(path), TEXTS)
    plain = Plain.from_file(str(path))
    plain.enable_padding(length=77)
    plain.enable_truncation(4)
    path.write_text(plain.to_str(), encoding="utf-8")
    assert rows(Tokenizer.from_vocab_file(path), TEXTS) == before


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(tmp_path, kind, padded):
    tokenizer = Tokenizer.from_vocab_file(KINDS[kind](tmp_path / "from"), padded=padded)
    tokenizer.save(tmp_path / "run")
    loaded = Tokenizer.load(tmp_path / "run")
    facts = ("vocab_size", "padded", "pad_id", "begin_id", "end_id", "unk_id")
    assert [getattr(loaded, name) for name in facts] == [getattr(tokenizer, name) for name in facts]
    assert rows(loaded, TEXTS, 10) == rows(tokenizer, TEXTS, 10)
    assert loaded.decode(rows(loaded, ["red lamp"])[0]).replace("▁", " ") == "red lamp"


def test_what_is_unknown_is_counted_by_the_tokenizers_own_piece(tmp_path):
    with pytest.raises(ValueError, match=r"v: \d+% of the pieces .*'Ωψ"):
        Tokenizer.from_vocab_file(siglip_json(tmp_path)).require_known(["Ωψ Ωψ"], "v", "a")
    Tokenizer.from_vocab_file(clip_json(tmp_path)).require_known(["Ωψ Ωψ"], "v", "a")


def without(name, path):
    record = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps({**record, name: None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lambda path: without("post_processor", path), "adds no token to the end of a text"),
        (lambda path: json.dumps({"<|endoftext|>": 0, "a": 1}), "a byte-pair tokenizer without its merges"),
        (lambda path: path.read_text(encoding="utf-8")[:900], "damaged, or no tokenizer.json"),
        (lambda path: '{"version": "1.0", "model": {"type": "WordPiece"}}', "damaged, or no tokenizer.json"),
        (lambda path: json.dumps({"architectures": ["CLIPModel"]}), "damaged, or no tokenizer.json"),
    ],
)
def test_other_json_is_told(tmp_path, text, words):
    path = clip_json(tmp_path)
    path.write_text(text(path), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.from_vocab_file(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.endswith("tokenizer.json of a CLIP, SigLIP or BERT")
    assert "\n" not in message


def test_a_tokenizer_json_has_its_own_case(tmp_path):
    with pytest.raises(ValueError, match="says itself how text is read; leave --cased out"):
        Tokenizer.from_vocab_file(clip_json(tmp_path), cased=True)


def test_a_berts_tokenizer_json_is_its_vocab_txt(tmp_path):
    learnt = Tokenizer.train(TEXTS, 200)
    learnt.save(tmp_path)
    read = Tokenizer.from_vocab_file(tmp_path / "tokenizer.json")
    assert rows(read, TEXTS) == rows(learnt, TEXTS) and read.pad_id == learnt.pad_id == 0
