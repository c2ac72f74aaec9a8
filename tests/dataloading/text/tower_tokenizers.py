"""Small tokenizers built as CLIP's and SigLIP's are, as the tokenizer.json that lies beside their weights."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = ["Red fabric sofa, 90 cm", "blue wooden chair", "Café table, 185 cm", "a wooden sofa", "red lamp", "椅子"]


def clip_json(folder, texts=TEXTS, vocab_size=700):
    """Byte-pair pieces of lower-cased words with </w> at their end, between begin and end."""
    made = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 258, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    made.train_from_iterator(texts, trainer)
    # Every byte, inside a word and at its end, as in CLIP's own vocabulary: nothing is unknown to it.
    record = json.loads(made.to_str())
    pieces = sorted(record["model"]["vocab"], key=record["model"]["vocab"].__getitem__)
    ends = [f"{byte}</w>" for byte in alphabet]
    ordered = list(dict.fromkeys([*alphabet, *ends, *pieces, BEGIN, END]))
    record["model"]["vocab"] = {piece: i for i, piece in enumerate(ordered)}
    made = Tokenizer.from_str(json.dumps(record))
    made.add_special_tokens([BEGIN, END])
    made.post_processor = processors.RobertaProcessing(
        (END, ordered.index(END)), (BEGIN, ordered.index(BEGIN)), trim_offsets=False, add_prefix_space=False
    )
    made.decoder = decoders.ByteLevel()
    return write(made, folder)


def siglip_json(folder, texts=TEXTS):
    """SentencePiece of the first SigLIP: an end, no begin, and a <pad> that it does not pad with."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=80, show_progress=False, special_tokens=specials, unk_token="<unk>", shrinking_factor=0.75
    )
    made.train_from_iterator(texts * 20, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return write(made, folder)


def siglip2_json(folder, texts=TEXTS):
    """Gemma's, of the second SigLIP: byte-pair pieces with a byte for what is none of them."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=specials)
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return write(made, folder)


def write(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    return path
