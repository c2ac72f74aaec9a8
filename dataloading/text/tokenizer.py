"""`Tokenizer`: a tokenizer of the `tokenizers` library that makes packed ragged batches of titles.

WordPiece learnt from the catalogue or read from a BERT vocab.txt (wordpiece.py), or any other, CLIP's byte-pair one or
SigLIP's SentencePiece, out of Hugging Face's tokenizer.json. What is asked of it: it ends every text with a token of
its own, which is kept when a text is cut. A batch is one row of ids and the cumulative lengths, without padding; a
tower that was trained on padding (SigLIP's) gets it, to one length, as tokens like any other.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from .vocabulary import SPECIALS, WANTED, is_json, read_vocabulary
from .wordpiece import bert_tokenizer, normalizer_for, train_wordpiece

_FILE = "tokenizer.json"
_MOST_UNKNOWN = 0.1
_SHOWN_LETTERS = 30  # of an unknown word, in a message
_SAMPLE = 2000  # texts on which the share of unknown pieces is counted: 0.1 s


class Tokenizer:
    """Titles to ids: "Red sofa" -> [CLS] red sofa [SEP] of a BERT, <|startoftext|> red sofa <|endoftext|> of a CLIP.

    Attributes: vocab_size; padded, whether every text gets the length that it may have; and the ids end_id, begin_id
    (None where texts begin with none of their own), pad_id and unk_id (None where all text is known).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Raises ValueError for a tokenizer that adds no end to a text: an empty one would have no token."""
        tokenizer.no_truncation()  # `encode` cuts by itself: it changes nothing, so that threads may share it
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        around: list[int] = tokenizer.encode("").ids
        if not around:
            raise ValueError("it adds no token to the end of a text, an empty text has none")
        self.begin_id, self.end_id = around[0] if len(around) > 1 else None, around[-1]
        self.unk_id = _unknown(tokenizer)
        padding: Any = tokenizer.padding
        self.padded = padding is not None
        pad = tokenizer.token_to_id("[PAD]")
        self.pad_id: int = padding["pad_id"] if self.padded else self.end_id if pad is None else pad

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        """Learn at most `vocab_size` WordPieces, specials included. The same texts give the same ids on every machine.

        Raises ValueError when vocab_size leaves no room beside the specials or the texts hold no word.
        """
        return cls(train_wordpiece(texts, vocab_size))

    @classmethod
    def from_vocab_file(cls, path: Path, *, cased: bool = False, padded: bool = False) -> "Tokenizer":
        """A BERT vocab.txt, one piece a line, the line's number being its id; or a tokenizer.json.

        cased: of a vocab.txt, leave text as it is. Otherwise it is lower-cased and, unless the vocabulary has accents,
        stripped of them. A tokenizer.json says itself how text is read. padded: see `encode`. Raises ValueError, one
        line, for other files, and for a cased vocabulary without `cased`.
        """
        path = Path(path)
        if not is_json(path):
            vocab = read_vocabulary(path)
            made = bert_tokenizer(vocab, normalizer_for(vocab, cased, str(path)))
        elif cased:
            raise ValueError(f"{path}: a tokenizer.json says itself how text is read; leave --cased out")
        else:
            made = _read_json(path, WANTED)
        made.no_padding()
        if padded:
            pad = _pad_piece(made, path.parent)
            made.enable_padding(pad_id=made.token_to_id(pad), pad_token=pad)
        try:
            return cls(made)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {WANTED}") from None

    def require_known(self, texts: Sequence[str], where: str, advice: str) -> None:
        """Raise ValueError when more than a tenth of the pieces of `texts` (a sample of them) is unknown.

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
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises ValueError when the folder holds none, or a damaged one."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"{path}: no tokenizer there; a run folder holds one from its first step on")
        advice = "restore it from a copy of the run"
        made = _read_json(path, advice)
        try:
            return cls(made)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {advice}") from None

    def vocabulary(self) -> list[str]:
        """Every piece, in the order of their ids."""
        ids = self._tokenizer.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    def encode(self, texts: Sequence[str], max_tokens: int = 55) -> tuple[Tensor, Tensor]:
        """Texts to a ragged batch: tokens (total,) int64 and cu_seqlens (n+1,) int32.

        Each text is its pieces between begin and end, cut to max_tokens with the end kept, and where the tokenizer is
        `padded`, filled up to max_tokens; an empty text is begin and end alone.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens={max_tokens}: begin, one piece and end need 3")
        # One by one: encode_batch starts threads, which do not survive the fork of a data worker.
        ids = [self._tokenizer.encode(text).ids for text in texts]
        ids = [row if len(row) <= max_tokens else [*row[: max_tokens - 1], self.end_id] for row in ids]
        if self.padded:
            ids = [[*row, *[self.pad_id] * (max_tokens - len(row))] for row in ids]
        lengths = torch.tensor([0, *map(len, ids)], dtype=torch.int32)
        tokens = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
        return tokens, lengths.cumsum(0, dtype=torch.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials left out: for messages and figures."""
        text: str = self._tokenizer.decode([int(i) for i in ids])
        # CLIP's pieces end words with </w>, which its decoder leaves there.
        suffix = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        return text.replace(suffix, " ").strip() if suffix else text


def _read_json(path: Path, advice: str) -> tokenizers.Tokenizer:
    """A tokenizer.json. Raises ValueError, one line, for what is none; advice: its end."""
    try:
        # Not Tokenizer.from_file: it takes names of files that are UTF-8 alone, whatever the locale makes of them.
        text = path.read_text(encoding="utf-8-sig")
        record = json.loads(text)
        if isinstance(record, dict) and "model" not in record and all(type(i) is int for i in record.values()):
            raise ValueError("the vocabulary of a byte-pair tokenizer without its merges, not a tokenizer.json")
        made = tokenizers.Tokenizer.from_str(text)
        made.encode("a")  # some of what is missing is missed when it is used
        absent = [piece for piece in SPECIALS if made.token_to_id(piece) is None]
        if absent and isinstance(made.model, tokenizers.models.WordPiece):
            raise ValueError(f"a BERT's, and no {', '.join(absent)} in it")
        return made
    except BaseException as error:  # the library raises nothing more special, and panics, which are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        words = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged, or no tokenizer.json ({words}); {advice}") from None


def _unknown(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of what is not in the vocabulary."""
    model = tokenizer.model
    if isinstance(model, tokenizers.models.Unigram):
        found: int | None = json.loads(tokenizer.to_str())["model"].get("unk_id")
        return found
    piece = getattr(model, "unk_token", None)  # of the three other kinds
    return None if piece is None else tokenizer.token_to_id(piece)


def _pad_piece(tokenizer: tokenizers.Tokenizer, folder: Path) -> str:
    """What texts are padded with: as the files beside say, else as SigLIP's two tokenizers do.

    The first has </s>, which also ends its texts, though it holds a <pad>; the second has <pad>.
    """
    end = tokenizer.id_to_token(tokenizer.encode("").ids[-1]) if tokenizer.encode("").ids else None
    named = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            record = json.loads((folder / name).read_text(encoding="utf-8-sig"))
            piece = record.get("pad_token") if isinstance(record, dict) else None
            named.append(piece.get("content") if isinstance(piece, dict) else piece)
        except (OSError, ValueError):
            continue
    usual = [end] if end == "</s>" else ["<pad>", "[PAD]", end]
    for piece in (*named, *usual):
        if isinstance(piece, str) and tokenizer.token_to_id(piece) is not None:
            return piece
    raise ValueError(f"{folder}: its tokenizer has nothing to pad texts with; {WANTED}")
