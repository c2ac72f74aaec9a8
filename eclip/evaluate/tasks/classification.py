"""Zero-shot classification: the class whose name, put into prompt templates, is most similar to the embedding."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eclip.dataloading.text import Tokenizer
from eclip.evaluate.evaluator import Evaluator, Outcome, Split
from eclip.evaluate.extraction import encode_texts
from eclip.evaluate.features import Features
from eclip.evaluate.report.tables import Table
from eclip.model.eclip import ECLIP

TEMPLATES = ("{}", "a {}", "a photo of a {}", "{} for sale", "a product photo: {}")
"""A class's feature is the mean of its normalised template features, normalised again (CLIP's prompt ensemble)."""


def run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]:
    """Category and, where attributes have it, type (head noun), among the names that occur in these images."""
    kinds = {
        "category": [product.category for product in split.products()],
        "type": [str(product.attributes.get("type") or "") for product in split.products()],
    }
    for kind, found in kinds.items():
        names = sorted(set(found) - {""})
        if len(names) < 2:
            yield f"classification_{kind}", f"{len(names)} different {kind} names in this split, at least 2 are needed"
            continue
        classes = class_features(
            evaluator.model,
            evaluator.tokenizer,
            names,
            max_tokens=evaluator.config.data.max_tokens,
            device=evaluator.device,
        )
        labels = np.array([names.index(name) if name else -1 for name in found])
        yield f"classification_{kind}", classify(split.features, classes, labels, title=f"zero-shot {kind}")


def class_features(
    model: ECLIP, tokenizer: Tokenizer, names: Sequence[str], *, max_tokens: int, device: torch.device
) -> Tensor:
    """(classes, D) on the CPU, L2-normalised."""
    prompts = [template.format(name.lower()) for name in names for template in TEMPLATES]
    texts = encode_texts(model, tokenizer, prompts, max_tokens=max_tokens, device=device).cpu()
    means = F.normalize(texts, dim=-1).view(len(names), len(TEMPLATES), -1).mean(1)
    return F.normalize(means, dim=-1)


def classify(features: Features, classes: Tensor, labels: NDArray[np.int64], *, title: str) -> Table | str:
    """Acc@1 of every embedding against `classes` (C, D); labels (n,) in 0..C-1, negative where unknown (left out).

    Chance is a uniform guess, 1/C; the majority row always names the commonest class of these images. Returns a table,
    or the reason why there is none.
    """
    known = labels >= 0
    if not known.any():
        return "no image of this split has a class"
    truth = labels[known]
    rows = {}
    for name, embedding in features.select(known).embeddings().items():
        rows[name] = {"Acc@1": float(((embedding @ classes.T).argmax(1).numpy() == truth).mean())}
    rows["chance"] = {"Acc@1": 1 / len(classes)}
    rows["majority class"] = {"Acc@1": float(np.bincount(truth).max() / len(truth))}
    return Table(title=title, rows=rows, counts={"images": len(truth), "classes": len(classes)})
