"""WordPiece over the `tokenizers` library: BERT's lower-casing and specials, titles as packed ragged batches.

A vocabulary is trained on the catalogue's own text (the same text gives the same vocabulary), or read from a BERT
vocab.txt so that pretrained text towers fit. No padding: a batch is one row of ids and the cumulative lengths.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_FILE = "tokenizer.json"
_LONGEST_WORD = 100  # letters; BERT's limit, longer ones are [UNK]
_PRIVATE = 0xF0000  # first code point of the private planes, which titles do not use


def _bert_normalizer() -> normalizers.Normalizer:
    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)


def _train_pieces(texts: Iterable[str], limit: int) -> list[str]:
    """At most `limit` WordPieces by the byte-pair rule (merge the most frequent pair), the same at every run.

    `WordPieceTrainer` numbers the letters inside words ("##a") in the order of a randomly seeded hash map and breaks
    ties by number, so that its vocabulary changes from run to run. `BpeTrainer` sorts its alphabet: it is given words
    whose inner letters are replaced by private characters, and "##" is put back afterwards.
    """
    normalizer, splitter = _bert_normalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
        if len(word) <= _LONGEST_WORD
    )
    letters: Counter[tuple[bool, str]] = Counter()
    for word, count in words.items():
        for i, letter in enumerate(word):
            letters[i > 0, letter] += count
    # Chinese titles have thousands of letters: the rare half of a small vocabulary is left to [UNK].
    kept = sorted(sorted(letters, key=lambda x: (-letters[x], x))[: max(limit // 2, min(limit, 128))])
    code = {pair: pair[1] if not pair[0] else chr(_PRIVATE + i) for i, pair in enumerate(kept)}
    back = {c: pair[1] for pair, c in code.items() if pair[0]}

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=limit, show_progress=False, initial_alphabet=sorted(code.values()))
    coded = (
        " ".join(["".join(code[i > 0, letter] for i, letter in enumerate(word))] * words[word])
        for word in sorted(words)
        if all((i > 0, letter) in code for i, letter in enumerate(word))
    )
    bpe.train_from_iterator(coded, trainer)
    pieces = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return [("##" if piece[0] in back else "") + "".join(back.get(c, c) for c in piece) for piece, _ in pieces]


class WordPiece:
    """A BERT tokenizer: "Red sofa" -> [CLS] red sofa [SEP].

    Attributes: vocab_size, and the ids pad_id, unk_id, cls_id, sep_id, mask_id.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._max_tokens = 0
        self.vocab_size: int = tokenizer.get_vocab_size()
        ids = [tokenizer.token_to_id(name) for name in SPECIALS]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids

    @classmethod
    def _from_vocab(cls, vocab: dict[str, int], where: str) -> "WordPiece":
        absent = [name for name in SPECIALS if name not in vocab]
        if absent:
            raise ValueError(f"{where}: no {', '.join(absent)}; a BERT vocabulary holds all of {', '.join(SPECIALS)}")
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
        tokenizer.normalizer = _bert_normalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens(list(SPECIALS))
        return cls(tokenizer)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> "WordPiece":
        """Learn at most `vocab_size` pieces, specials included. The same texts give the same ids on every machine.

        Raises ValueError when vocab_size leaves no room beside the specials or the texts hold no word.
        """
        if vocab_size < 64:
            raise ValueError(f"vocab_size={vocab_size}: use at least 64, letters alone need that many")
        pieces = _train_pieces(texts, vocab_size - len(SPECIALS))
        if not pieces:
            raise ValueError("the vocabulary's texts hold no word; give titles, or a BERT vocab.txt (--vocab-file)")
        return cls._from_vocab({piece: i for i, piece in enumerate([*SPECIALS, *pieces])}, "trained vocabulary")

    @classmethod
    def from_vocab_file(cls, path: Path) -> "WordPiece":
        """A BERT vocab.txt: one piece a line, the line's number is its id. Text is lower-cased (uncased models)."""
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        vocab = {line: i for i, line in enumerate(lines)}
        if len(vocab) != len(lines):
            raise ValueError(f"{path}: {len(lines) - len(vocab)} pieces occur twice; every line must be its own piece")
        return cls._from_vocab(vocab, str(path))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, which `load` and the `tokenizers` library read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._tokenizer.no_truncation()
        self._max_tokens = 0
        self._tokenizer.save(str(Path(folder) / _FILE))

    @classmethod
    def load(cls, folder: Path) -> "WordPiece":
        """Read what `save` wrote. Raises ValueError when the folder holds none."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"{path}: no tokenizer there; a run folder holds one from its first step on")
        return cls(Tokenizer.from_file(str(path)))

    def encode(self, texts: Sequence[str], max_tokens: int = 55) -> tuple[Tensor, Tensor]:
        """Texts to a ragged batch: tokens (total,) int64 and cu_seqlens (n+1,) int32.

        Each text is [CLS] pieces [SEP], cut to max_tokens with [SEP] kept; an empty text is [CLS] [SEP].
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens={max_tokens}: [CLS], one piece and [SEP] need 3")
        if max_tokens != self._max_tokens:
            self._tokenizer.enable_truncation(max_tokens)
            self._max_tokens = max_tokens
        # One by one: encode_batch starts threads, which do not survive the fork of a data worker.
        ids = [self._tokenizer.encode(text).ids for text in texts]
        lengths = torch.tensor([0, *map(len, ids)], dtype=torch.int32)
        tokens = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
        return tokens, lengths.cumsum(0, dtype=torch.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials left out: for messages and figures."""
        return self._tokenizer.decode([int(i) for i in ids])
