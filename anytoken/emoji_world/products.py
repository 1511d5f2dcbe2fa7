"""Gene to product: is the correct product text among the five most likely of fifty?

Product texts of the test split do not occur in training, so nothing is generated: fifty real product texts are ranked
by log p(product | gene) - log p(product), which removes the prior of short and common texts (domain-conditional PMI,
Holtzman et al., arXiv 2104.08315).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from anytoken.emoji_world.directions import GENES, Record
from anytoken.emoji_world.phrases import DOCUMENTED
from anytoken.evaluation.metrics import nearest, share
from anytoken.segments import DNA, Text

if TYPE_CHECKING:
    from anytoken.emoji_world.tasks import EvalDatasets
    from anytoken.inference.api import AnyToken

CANDIDATES, TOP = 50, 5
[QUESTION] = DOCUMENTED["product"]
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def score_products(model: AnyToken, world: EvalDatasets, count: int, seed: int) -> dict[str, Any]:
    """Figures of the direction, as `report.score` gives them; none where there are no short genes of the test split."""
    genes = [one for one in world.records(GENES) if one["short"]]
    known, asked = ([one for one in genes if one["split"] == split] for split in ("train", "test"))
    products = sorted({one["product"] for one in asked})
    if len(products) < 2 or not known:
        return {}
    rng = np.random.default_rng(seed)
    prior = log_likelihoods(model, None, products)
    cases = [asked[index] for index in rng.permutation(len(asked))[:count]]
    near = nearest(compositions(cases), compositions(known))
    ranks: dict[str, list[int]] = {name: [] for name in ("model", "majority", "nearest", "chance")}
    for gene, neighbour in zip(cases, near, strict=True):
        choice = _choice(rng, products, gene["product"])  # the first is the right one
        texts = [products[index] for index in choice]
        likely = log_likelihoods(model, gene["dna"], texts)
        ranks["model"].append(_rank(likely - prior[choice]))
        ranks["majority"].append(_rank(prior[choice]))
        ranks["nearest"].append(_rank(_shared_words(known[neighbour]["product"], texts)))
        ranks["chance"].append(int(rng.integers(len(texts))))
    figures = {name: share([float(rank < TOP) for rank in found]).to_dict() for name, found in ranks.items()}
    others = ("majority", "nearest", "chance")
    first = {name: share([float(rank == 0) for rank in found]) for name, found in ranks.items()}
    perfect = share([1.0] * len(cases)).to_dict()
    return {
        "held_out": "genes of unseen products", "measure": f"top-{TOP} of {min(CANDIDATES, len(products))}",
        "valid": perfect, **figures, "ceiling": perfect, "parts": {"top-1": round(first["model"].value, 4)},
        "parts_of_others": {name: {"top-1": round(first[name].value, 4)} for name in others},
        "part_shares": {"top-1": first["model"].to_dict(), "right": figures["model"]},
        "by_holdout": {"product": figures["model"]}, "tokens_per_reply": 0.0,
        "better": all(figures["model"]["value"] > figures[name]["value"] for name in others),
    }  # fmt: skip


@torch.no_grad()
def log_likelihoods(model: AnyToken, dna: str | None, texts: Sequence[str], batch: int = 25) -> np.ndarray:
    """log p of each text as the answer to "What does this gene make?", with the gene or without; [N]."""
    prompt = model.encode_prompt([DNA(dna), Text(QUESTION)] if dna else [Text(QUESTION)])
    end = model.token_space.end
    answers = [[*model.tokenize(Text(text)), end] for text in texts]
    found = []
    for start in range(0, len(answers), batch):
        part = answers[start : start + batch]
        rows = pad_sequence([torch.tensor([*prompt, *answer]) for answer in part], True, end).to(
            model.lm.device
        )
        kept = rows.shape[1] - len(prompt) + 1  # the answer, and the position before it
        logits = model.lm(input_ids=rows, logits_to_keep=kept).logits[:, :-1].float().log_softmax(-1)
        chosen = logits.gather(-1, rows[:, len(prompt) :, None])[..., 0].cpu()
        found += [float(row[: len(answer)].sum()) for row, answer in zip(chosen, part, strict=True)]
    return np.array(found)


def compositions(genes: Sequence[Record]) -> np.ndarray:
    """Shares of residues in each protein, for the nearest training gene; [N, 20]."""
    counts: list[Counter[str]] = [Counter(one["protein"]) for one in genes]
    return np.array(
        [[found[one] / max(1, found.total()) for one in RESIDUES] for found in counts], np.float32
    )


def _choice(rng: np.random.Generator, products: Sequence[str], right: str) -> np.ndarray:
    """Indices of the correct product and of up to 49 others."""
    others = [index for index, product in enumerate(products) if product != right]
    drawn = rng.permutation(len(others))[: CANDIDATES - 1]
    return np.array([products.index(right), *(others[place] for place in drawn)])


def _rank(scores: np.ndarray) -> int:
    """The number of others at least as good as the first: a tie does not count as success."""
    return int((scores[1:] >= scores[0]).sum())


def _shared_words(product: str, texts: Sequence[str]) -> np.ndarray:
    words = set(product.casefold().split())
    sets = [set(text.casefold().split()) for text in texts]
    return np.array([len(words & one) / len(words | one) for one in sets])
