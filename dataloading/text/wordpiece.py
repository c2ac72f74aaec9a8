"""WordPiece over the `tokenizers` library: BERT's lower-casing and specials, titles as packed ragged batches.

A vocabulary is trained on the catalogue's own text (the same text gives the same vocabulary), or read from a BERT
vocab.txt so that pretrained text towers fit. No padding: a batch is one row of ids and the cumulative lengths.

Text must be read as the vocabulary was made: capitals in lower case where it has none, accents stripped where it has
none. Read otherwise, words become [UNK] and a tower learns nothing from titles, without a word; so both are checked.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from .vocabulary import SPECIALS, read_vocabulary

_FILE = "tokenizer.json"
_LONGEST_WORD = 100  # letters; BERT's limit, longer ones are [UNK]
_PRIVATE = 0xF0000  # first code point of the private planes, which titles do not use
# BERT's uncased vocabularies hold at most a few pieces that lower-cased text never has, cased ones a quarter and more.
_MOST_CAPITALS, _MOST_ACCENTS = 0.05, 0.01
_MOST_UNKNOWN = 0.1
_SHOWN_LETTERS = 30  # of an unknown word, in a message
_SAMPLE = 2000  # texts on which the share of unknown pieces is counted: 0.1 s


def _bert_normalizer(*, lowercase: bool = True, strip_accents: bool | None = None) -> normalizers.Normalizer:
    """strip_accents: None does as BERT, which strips them where it lower-cases."""
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
    )


def _accents_stripped(piece: str) -> str:
    """As the normalizer does it: Korean syllables come apart too."""
    return "".join(c for c in unicodedata.normalize("NFD", piece) if unicodedata.category(c) != "Mn")


def _normalizer_for(vocab: Iterable[str], cased: bool, where: str) -> normalizers.Normalizer:
    """Read text as the vocabulary was made. Raises ValueError for a cased one that is to be read in lower case."""
    if cased:
        return _bert_normalizer(lowercase=False, strip_accents=False)
    pieces = [piece for piece in vocab if not (piece.startswith("[") and piece.endswith("]"))]
    capitals = [piece for piece in pieces if piece != piece.lower()]
    if len(capitals) > _MOST_CAPITALS * len(pieces):
        raise ValueError(
            f"{where}: a cased vocabulary: {len(capitals)} of its {len(pieces)} pieces have capitals "
            f"({', '.join(map(repr, capitals[:3]))}), which text in lower case never has; say --cased, or give the "
            f"uncased one"
        )
    accented = sum(piece != _accents_stripped(piece) for piece in pieces)
    return _bert_normalizer(strip_accents=False if accented > _MOST_ACCENTS * len(pieces) else None)


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
        tokenizer.no_truncation()  # `encode` cuts by itself: it changes nothing, so that threads may share it
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        ids: list[Any] = [tokenizer.token_to_id(name) for name in SPECIALS]  # int: all have them
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids

    @classmethod
    def _from_vocab(cls, vocab: dict[str, int], normalizer: normalizers.Normalizer) -> "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
        tokenizer.normalizer = normalizer
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
        return cls._from_vocab({piece: i for i, piece in enumerate([*SPECIALS, *pieces])}, _bert_normalizer())

    @classmethod
    def from_vocab_file(cls, path: Path, *, cased: bool = False) -> "WordPiece":
        """A BERT vocab.txt: one piece a line, the line's number is its id.

        cased: leave text as it is. Otherwise it is lower-cased and, unless the vocabulary has accents, stripped of
        them. Raises ValueError, one line, for other files, and for a cased vocabulary without `cased`.
        """
        vocab = read_vocabulary(Path(path))
        return cls._from_vocab(vocab, _normalizer_for(vocab, cased, str(path)))

    def require_known(self, texts: Sequence[str], where: str, advice: str) -> None:
        """Raise ValueError when more than a tenth of the pieces of `texts` (a sample of them) is [UNK].

        where: the vocabulary's name, and advice: what to do: beginning and end of the message.
        """
        sample = texts[:: max(1, len(texts) // _SAMPLE)]
        total, unknown = 0, Counter[str]()
        for text in sample:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            total += len(encoding.ids)
            found = zip(encoding.ids, encoding.offsets, strict=True)
            unknown.update(text[start:end] for piece, (start, end) in found if piece == self.unk_id)
        share = unknown.total() / max(1, total)
        if share > _MOST_UNKNOWN:
            words = ", ".join(repr(word[:_SHOWN_LETTERS]) for word, _ in unknown.most_common(5))
            raise ValueError(
                f"{where}: {share:.0%} of the pieces of the catalogue's text are unknown to it, at most "
                f"{_MOST_UNKNOWN:.0%} may be (e.g. {words}); {advice}"
            )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, which `load` and the `tokenizers` library read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Not Tokenizer.save: of a full disk it raises an Exception of no special kind.
        (Path(folder) / _FILE).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "WordPiece":
        """Read what `save` wrote. Raises ValueError when the folder holds none, or a damaged one."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"{path}: no tokenizer there; a run folder holds one from its first step on")
        try:
            # Not Tokenizer.from_file: it takes names of files that are UTF-8 alone, whatever the locale makes of them.
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing more special
            words = " ".join(str(error).split())
            raise ValueError(f"{path}: damaged ({words}); restore it from a copy of the run") from None
        absent = [name for name in SPECIALS if tokenizer.token_to_id(name) is None]
        if absent:
            raise ValueError(f"{path}: no {', '.join(absent)} in it; restore it from a copy of the run")
        return cls(tokenizer)

    def encode(self, texts: Sequence[str], max_tokens: int = 55) -> tuple[Tensor, Tensor]:
        """Texts to a ragged batch: tokens (total,) int64 and cu_seqlens (n+1,) int32.

        Each text is [CLS] pieces [SEP], cut to max_tokens with [SEP] kept; an empty text is [CLS] [SEP]. Raises
        ValueError for a tokenizer that adds neither, and so leaves nothing of it.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens={max_tokens}: [CLS], one piece and [SEP] need 3")
        # One by one: encode_batch starts threads, which do not survive the fork of a data worker.
        ids = [self._tokenizer.encode(text).ids for text in texts]
        if not all(ids):
            text = texts[next(i for i, row in enumerate(ids) if not row)]
            raise ValueError(
                f"the text {text!r} has no token: this tokenizer adds no [CLS] and [SEP]; restore {_FILE} from a copy "
                f"of the run"
            )
        ids = [row if len(row) <= max_tokens else [*row[: max_tokens - 1], self.sep_id] for row in ids]
        lengths = torch.tensor([0, *map(len, ids)], dtype=torch.int32)
        tokens = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
        return tokens, lengths.cumsum(0, dtype=torch.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials left out: for messages and figures."""
        return self._tokenizer.decode([int(i) for i in ids])
