"""README.md of an export: what the model is, what it saw, how good it is, how to load it; YAML on top as hubs read it.

No path of the machine is in it: a catalogue and weights files are named by the last part of theirs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eclip import __version__
from eclip.config import RunConfig
from eclip.export.int8 import METRICS, Loss
from eclip.export.onnx_files import OnnxFile
from eclip.export.towers import image_class, text_class
from eclip.weights.exported import Facts

_INTENDED = """\
Intended use: embeddings of product photos and titles, and where a titled product is in a photo: search by words, photo
or a part of a photo, finding the same product in pictures of other sources, pre-sorting into categories. Look at the
numbers above for your own catalogue first (`eclip evaluate`).

Limits: a region or a nearest neighbour is always found, also where the product is not there; scores are no
probabilities except those of `match`. It knows the language and the kind of pictures of its catalogue, and what its
towers had learnt before. It was not made for pictures of people, nor for decisions about them."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that the card tells."""

    name: str
    facts: Facts
    config: RunConfig
    parameters: Mapping[str, int]
    """Learnt numbers by part."""
    evaluation: Mapping[str, Any] | None
    """evaluation.json of what was exported."""
    sizes: Mapping[str, tuple[int, int]]
    """Products and images of each split that could be opened."""
    licence: str | None
    has_towers: bool
    onnx: Sequence[OnnxFile]
    loss: Loss | None


def write_card(card: CardFacts) -> str:
    """The text of README.md."""
    parts = [
        _front_matter(card),
        f"# {card.name}",
        _summary(card),
        "## Use",
        _use(card),
        "## Data",
        _data(card),
        "## Results",
        _results(card),
        "## Use and limits",
        _INTENDED,
        "## Training",
        _training(card),
        "## Licence",
        _licence(card),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: CardFacts) -> str:
    """JSON values are YAML's."""
    head: dict[str, Any] = {
        "library_name": "eclip",
        "license": card.licence or "other",
        **({} if card.licence else {"license_name": "not-stated"}),
        "pipeline_tag": "image-feature-extraction",
        "tags": ["eclip", "e-commerce", "product-retrieval", "image-text", "visual-grounding",
                 *(["onnx"] if card.onnx else [])],
    }  # fmt: skip
    if metrics := list(_headline(card.evaluation)):
        catalogue = card.facts.training.get("catalogue", "catalogue")
        dataset = {"name": catalogue, "type": catalogue, "split": (card.evaluation or {}).get("split", "test")}
        task = {"type": "product-retrieval", "name": "product retrieval, same product"}
        head["model-index"] = [
            {"name": card.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---"])


def _headline(evaluation: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    table = ((evaluation or {}).get("tables") or {}).get("product_retrieval") or {}
    for row, metrics in table.get("rows", {}).items():
        if row != "chance" and metrics.get("mAP@1") is not None:
            yield {"type": "mAP@1", "name": f"mAP@1, {row}", "value": round(100 * metrics["mAP@1"], 2)}


def _summary(card: CardFacts) -> str:
    model, parameters = card.facts.model, card.parameters
    decoder = (
        "An instance decoder (slot attention) finds the one product in a picture that a title or another picture names."
        if card.facts.trains_decoder
        else "It was trained without the instance decoder: it has global embeddings and cosine maps alone."
    )
    rows = [
        ("image tower", f"{image_class(model)}, {model.image_size} x {model.image_size} px, patches of "
                        f"{model.patch_size}, width {model.vision_width}, {model.vision_depth} blocks",
         parameters["image tower"]),
        ("text tower", f"{text_class(model)}, width {model.text_width}, {model.text_depth} blocks, pooling "
                       f"{model.text_pooling}, at most {card.facts.max_tokens} tokens", parameters["text tower"]),
        ("instance decoder", f"{model.num_queries} queries, {model.decoder_depth} blocks", parameters["decoder"]),
    ]  # fmt: skip
    return (
        f"A vision-language model of product pictures and titles in one space of {model.embed_dim} dimensions, trained "
        f"with eclip {__version__}, objective `{card.facts.objective}` (ECLIP, arXiv 2304.02853). {decoder}\n\n"
        + _table(["part", "shape", "parameters"], [[name, shape, f"{count:,}"] for name, shape, count in rows])
    )


def _use(card: CardFacts) -> str:
    lines = [
        "```python",
        "import eclip",
        "",
        'model = eclip.load("THIS FOLDER")',
        'model.embed_texts(["red armchair"])  # (1, D), unit length',
        'model.embed_images(["photo.jpg"])  # the whole picture',
    ]
    if card.facts.trains_decoder:
        lines.append('model.embed_images(["photo.jpg"], prompts=["red armchair"])  # that product in it')
    lines += ['model.locate("photo.jpg", "red armchair")  # regions: box, score, map', "```"]
    found = "\n".join(lines) + "\n\nA new training goes on from it with `eclip train --start-from THIS FOLDER`."
    if card.facts.weights == "int8":
        found += "\n\nMatrices of linear layers and embeddings are stored in int8 and become float32 when loaded."
    if card.has_towers:
        found += "\n\n" + _use_towers(card)
    if card.onnx:
        found += "\n\n" + _use_onnx(card)
    return found


def _use_towers(card: CardFacts) -> str:
    model = card.facts.model
    image, text = image_class(model), text_class(model)
    options = {name: ", add_pooling_layer=False" if name in ("ViTModel", "BertModel") else "" for name in (image, text)}
    pooling = {
        "cls": "is its first token",
        "mean": "is the mean of `last_hidden_state` over the tokens",
        "last": "is `pooler_output`",
    }[model.text_pooling]
    return f"""The towers alone, with transformers:

```python
from transformers import {", ".join(sorted({image, text}))}

image = {image}.from_pretrained("THIS FOLDER/towers/image"{options[image]})
text = {text}.from_pretrained("THIS FOLDER/towers/text"{options[text]})
```

The pooled text {pooling}. The projections to the common space, the
instance decoder and the matching head have no class there: they are only in `model.safetensors`. Whole pictures are
squashed to the square, bicubic."""


def _use_onnx(card: CardFacts) -> str:
    model = card.facts.model
    signatures = {
        "image.onnx": f"images (n, 3, {model.image_size}, {model.image_size}) uint8 RGB -> embedding (n, D), "
        f"tokens (n, {model.grid**2}, D)",
        "text.onnx": "input_ids, attention_mask (n, L) int64 -> embedding (n, D)",
        "decoder.onnx": f"tokens (n, {model.grid**2}, D), prompt (n, D), modality (n,) int64: 0 text, 1 image -> "
        f"instance (n, D), map (n, {model.grid**2})",
    }
    rows = [[f"onnx/{f.name}", signatures.get(f.name, "the same"), f"{f.size / 1e6:.1f}", f.told()] for f in card.onnx]
    return (
        "ONNX, n and L of any size; embeddings and instances have unit length, an embedding is a prompt, pixels are "
        "normalised inside, `tokenizer.json` gives the ids (mask 1 where a token is). Compared in onnxruntime, at "
        "several sizes.\n\n" + _table(["file", "inputs -> outputs", "MB", "agreement"], rows)
    )


def _data(card: CardFacts) -> str:
    training = card.facts.training
    prints: Mapping[str, str] = training.get("fingerprints", {})
    splits = [split for split in ("train", "val", "test") if split in card.sizes or split in prints]
    rows = []
    for split in splits:
        products, images = (f"{count:,}" for count in card.sizes[split]) if split in card.sizes else ("?", "?")
        rows.append([split, products, images, f"`{prints[split]}`" if split in prints else ""])
    files = [path.name for path in (card.config.image_weights, card.config.text_weights) if path is not None]
    start = card.config.start_from
    found = f"Catalogue `{training.get('catalogue')}`."
    if rows:
        found += "\n\n" + _table(["split", "products", "images", "fingerprint"], rows)
    if files:
        found += f"\n\nThe towers started from pretrained weights: {', '.join(f'`{name}`' for name in files)}."
    if start is not None:
        found += f"\n\nTraining went on from another model of this kind: `{start.name}`."
    return found


def _results(card: CardFacts) -> str:
    if card.evaluation is None:
        found = "The run was not evaluated."
    else:
        counts = f"{card.evaluation['products']} products, {card.evaluation['images']} images"
        found = f"Split `{card.evaluation['split']}` ({counts}), nothing fine-tuned; in %, losses in nats."
        tables = card.evaluation["tables"].values()
        found = "\n\n".join([found, *(_result(table) for table in tables)])
    if card.loss is not None:
        columns = [f"{metric}, {kind}" for metric in METRICS for kind in ("float32", "int8")]
        rows = [[name, *(f"{100 * value:.1f}" for pair in row.values() for value in pair)]
                for name, row in card.loss.rows.items()]  # fmt: skip
        found += f"\n\n**int8 weights against float32**, product retrieval\n\n{_table(['', *columns], rows)}"
    elif card.facts.weights == "int8":
        found += "\n\nThe numbers are those of the float32 weights; what int8 costs was not measured."
    return found


def _result(table: Mapping[str, Any]) -> str:
    columns = list(dict.fromkeys(metric for row in table["rows"].values() for metric in row))
    factor, digits = (1, 2) if table.get("unit") == "nats" else (100, 1)
    rows = []
    for name, row in table["rows"].items():
        cells = ("" if row.get(metric) is None else f"{factor * row[metric]:.{digits}f}" for metric in columns)
        rows.append([name, *cells])
    counts = ", ".join(f"{value} {name}" for name, value in (table.get("counts") or {}).items())
    note = f"\n\n{table['note']}" if table.get("note") else ""
    return f"**{table['title']}**{f' ({counts})' if counts else ''}\n\n{_table(['', *columns], rows)}{note}"


def _training(card: CardFacts) -> str:
    config, training = card.config, card.facts.training
    optim = config.optim
    locked = [name for name, is_locked in (("image", config.lock_image), ("text", config.lock_text)) if is_locked]
    batch = config.batch_schedule or str(config.global_batch_size)
    rows = [
        ["objective", card.facts.objective],
        ["weights", f"{training.get('checkpoint')} checkpoint, step {training.get('step')} of {config.steps}"
                    f"{', moving average' if training.get('average') else ''}"],
        ["products a step", batch],
        ["optimizer", f"{optim.optimizer}, learning rate {optim.learning_rate:g} after {optim.warmup_steps} steps, "
                      f"then {optim.schedule}; weight decay {optim.weight_decay:g}"],
        ["locked towers", ", ".join(locked) or "none"],
        ["crops", f"{config.data.crop_scale[0]:g} to {config.data.crop_scale[1]:g} of the area"
                  f"{', mirrored' if config.data.flip else ''}"],
        ["seed", str(config.seed)],
    ]  # fmt: skip
    return _table(["setting", "value"], rows) + "\n\n`config.json` has every setting of the model."


def _licence(card: CardFacts) -> str:
    mine = f"Weights: {card.licence}." if card.licence else "Who exported these weights did not state their licence."
    return (
        f"{mine} The code is Apache-2.0. The catalogue, and the pretrained towers if there were any, have licences of "
        f"their own, which may bind these weights."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
