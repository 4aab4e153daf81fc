"""What needs no SCL on fashion: frozen halves, their concatenations, and linear maps between them."""

from __future__ import annotations

import numpy as np
import torch
from pretrain_fold import CANDIDATES, Fold
from torch.nn.functional import normalize

from prerank_tools.encoders.fusion import concat_unit
from prerank_tools.encoders.pair_batches import retrieval_metrics

WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)


def linear_map(fold: Fold) -> dict[str, float]:
    """Ridge regression from centred picture to title features; lambda chosen inside the training groups."""
    image, text = (normalize(x, dim=1).double() for x in (fold.image_ND, fold.text_ND))
    order = np.random.default_rng(fold.seed + 1000).permutation(fold.fit)
    inner_fit, inner = order[CANDIDATES:], order[:CANDIDATES]

    def score(fit: np.ndarray, test: np.ndarray, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        mean_image, mean_text = image[fit].mean(0), text[fit].mean(0)
        x, y = image[fit] - mean_image, text[fit] - mean_text
        solved = torch.linalg.solve(x.T @ x + weight * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        return normalize((image[test] - mean_image) @ solved, dim=1), normalize(text[test] - mean_text, dim=1)

    best = max(LAMBDAS, key=lambda weight: retrieval_metrics(*score(inner_fit, inner, weight))["recall@10"])
    mapped, titles = score(fold.fit, fold.test, best)
    found = {f"i2t {name}": value for name, value in retrieval_metrics(mapped, titles).items()}
    return (
        found
        | {f"t2i {name}": value for name, value in retrieval_metrics(titles, mapped).items()}
        | {"lambda": best}
    )


def halves(fold: Fold) -> dict[str, float]:
    """Neighbours by frozen titles, by frozen pictures, and by both concatenated."""
    text, image = (normalize(x[fold.unseen], dim=1) for x in (fold.text_ND, fold.image_ND))
    there = torch.ones(len(text), dtype=torch.bool)
    vectors = {"text": text, "image": image, "concat": concat_unit(text, image, there, there)}
    return {name: fold.same_type(x) for name, x in vectors.items()}


def weighted(fold: Fold) -> dict[str, float]:
    """Frozen concatenation with the text at a weight that is best on as many items of the training groups."""

    def vectors(rows: np.ndarray, weight: float, text_ND: torch.Tensor) -> torch.Tensor:
        text, image = (normalize(x[rows], dim=1) for x in (text_ND, fold.image_ND))
        return normalize(torch.cat([weight * text, image], dim=1), dim=1)

    sample = np.random.default_rng(fold.seed).choice(fold.fit, len(fold.unseen), replace=False)
    best = max(WEIGHTS, key=lambda weight: fold.same_type(vectors(sample, weight, fold.text_ND), sample))
    found = {"weight": best}
    for name, text_ND in (("knn", fold.text_ND), ("late knn", fold.bare_ND)):
        found[name] = fold.same_type(vectors(fold.unseen, best, text_ND))
    return found


def expected_picture(fold: Fold) -> dict[str, float]:
    """Titles alone again: the picture that ridge regression on the training items expects of each."""
    fit, rows = fold.fit, fold.unseen
    image, text, bare = (normalize(x, dim=1).double() for x in (fold.image_ND, fold.text_ND, fold.bare_ND))
    x, y = text[fit] - text[fit].mean(0), image[fit] - image[fit].mean(0)
    solved = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return {
        name: fold.same_type(normalize((shown[rows] - text[fit].mean(0)) @ solved, dim=1))
        for name, shown in (("knn", text), ("late knn", bare))
    }
