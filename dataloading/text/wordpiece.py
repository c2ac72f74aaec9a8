"""WordPiece over the `tokenizers` library: BERT's lower-casing and specials.

A vocabulary is trained on the catalogue's own text (the same text gives the same vocabulary), or read from a BERT
vocab.txt so that pretrained text towers fit.

Text must be read as the vocabulary was made: capitals in lower case where it has none, accents stripped where it has
none. Read otherwise, words become [UNK] and a tower learns nothing from titles, without a word; so both are checked.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .vocabulary import SPECIALS

_LONGEST_WORD = 100  # letters; BERT's limit, longer ones are [UNK]
_PRIVATE = 0xF0000  # first code point of the private planes, which titles do not use
# BERT's uncased vocabularies hold at most a few pieces that lower-cased text never has, cased ones a quarter and more.
_MOST_CAPITALS, _MOST_ACCENTS = 0.05, 0.01


def _bert_normalizer(*, lowercase: bool = True, strip_accents: bool | None = None) -> normalizers.Normalizer:
    """strip_accents: None does as BERT, which strips them where it lower-cases."""
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
    )


def _accents_stripped(piece: str) -> str:
    """As the normalizer does it: Korean syllables come apart too."""
    return "".join(c for c in unicodedata.normalize("NFD", piece) if unicodedata.category(c) != "Mn")


def normalizer_for(vocab: Iterable[str], cased: bool, where: str) -> normalizers.Normalizer:
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


def bert_tokenizer(vocab: dict[str, int], normalizer: normalizers.Normalizer) -> Tokenizer:
    """BERT's tokenizer of a vocabulary: "red sofa" -> [CLS] red sofa [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn at most `vocab_size` pieces, specials included. The same texts give the same ids on every machine.

    Raises ValueError when vocab_size leaves no room beside the specials or the texts hold no word.
    """
    if vocab_size < 64:
        raise ValueError(f"vocab_size={vocab_size}: use at least 64, letters alone need that many")
    pieces = _train_pieces(texts, vocab_size - len(SPECIALS))
    if not pieces:
        raise ValueError("the vocabulary's texts hold no word; give titles, or a BERT vocab.txt (--vocab-file)")
    return bert_tokenizer({piece: i for i, piece in enumerate([*SPECIALS, *pieces])}, _bert_normalizer())
