"""Depth and composition of one section, kriged from its spots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stgen.kriging import Field, Kriging, Places
from stgen.metrics import pcc

__all__ = ["Composition", "SectionModel", "components", "composition"]

MOST_COMPONENTS = 150
GUIDES = 50  # components by which kernels are chosen
MOST_DRAWN = 30  # components that are sampled
LEAST_KNOWN = 0.02  # of a component's variance that is predicted out of fold, if it is sampled
NOISE_RANGE = (0.05, 50.0)  # of a spot, relative to that of the median total
OVERSHOOT = np.log(2)  # above the largest that was measured, on the scale of a logarithm
COVERAGE = 0.9
TRUSTED_FROM = 0.1  # correlation out of fold, at the lower end of its confidence interval
CONFIDENCE = 1.645  # standard deviations: 95 % on one side

Deviations = tuple[Callable[[Places], np.ndarray], np.ndarray]
"""Draws of what is left open, ``(len(places), n_samples, K)`` at some places; and which columns of the components they are."""


class SectionModel:
    """Depth and composition of one section as kriged fields.

    The counts of a place are its total times its composition. The logarithm of the total is one field. Of the composition,
    ``log1p(counts / total x median total)``, each gene is kriged twice, and the mean of both is taken: by itself, and through
    principal components of the most variable genes, each with its own kernel and noise, so that weak genes learn from strong
    ones that go with them.

    Parameters
    ----------
    places
        Where the spots are and what they look like.
    total
        Counts of each spot over all genes, shape ``(n,)``.
    guide
        Counts of the most variable genes, shape ``(n, K)``.
    area
        Bins that each spot measured, shape ``(n,)``.
    seed
        Random seed.
    """

    def __init__(
        self, places: Places, total: np.ndarray, guide: np.ndarray, area: np.ndarray, *, seed: int = 0
    ) -> None:
        self.total, self.area = total, area
        self.target = float(np.median(total))
        noise = np.clip(self.target / total, *NOISE_RANGE)  # of a share that was counted
        self.precision = 1 / noise
        self.scores = components(self.composition(guide), self.precision)
        density = np.log(total / area)[:, None]
        self.kriging = Kriging(places, noise=noise, guide=np.hstack([self.scores[:, :GUIDES], density]), seed=seed)
        self._y = np.hstack([self.scores, density])
        self.shared = self.kriging.solve(self._y)
        weighted = self.precision[:, None] * self.scores
        self.regression = (weighted / np.maximum((weighted * self.scores).sum(0), 1e-12)).T
        self.most = float(density.max()) + OVERSHOOT

    def composition(self, counts: np.ndarray) -> np.ndarray:
        """Counts ``(n, G)`` on the scale that is kriged."""
        return composition(counts, self.total)

    def genes(self, counts: np.ndarray) -> Composition:
        """Krige some genes, of which ``counts (n, G)`` were measured."""
        y = self.composition(counts)
        return Composition(self, counts, y, self.kriging.solve(y), self.regression @ y)

    def deviations(self, n_samples: int, seed: int) -> Deviations:
        """Draws of what is left open of the components that can be predicted, and last of the depth."""
        known = self.shared.from_image + self.shared.from_neighbors
        drawn = np.argsort(-known[:-1])[:MOST_DRAWN]
        drawn = np.append(np.sort(drawn[known[drawn] > LEAST_KNOWN]), len(known) - 1)
        return self.kriging.draw(self._y[:, drawn], self.shared[drawn], n_samples, seed), drawn

    def summary(self, pitch_um: float) -> dict[str, Any]:
        """What is common to all genes, for the record: averages over components, weighted by what is predicted of each."""
        known = np.maximum(self.shared.from_image + self.shared.from_neighbors, 0)[:-1]
        weight = known * (self.scores**2).mean(0)
        weight = weight / max(weight.sum(), 1e-12)
        length = np.nan_to_num(self.shared.length[:-1])
        used = np.where(np.isfinite(self.shared.length[:-1]), weight, 0)
        variance = (self.scores**2).mean(0) / max((self.scores**2).mean(0).sum(), 1e-12)
        return {
            "kernels": {
                str(kernel): round(float(share[:-1] @ weight), 4) for kernel, share in self.shared.kernels.items()
            },
            "correlation_length_um": round(float(length @ used / max(used.sum(), 1e-12)) * pitch_um, 2),
            "from_image": round(float(self.shared.from_image[:-1] @ variance), 4),
            "from_neighbors": round(float(self.shared.from_neighbors[:-1] @ variance), 4),
        }


@dataclass(frozen=True)
class Composition:
    """Some genes of a section: their fields, and their loadings on the components."""

    model: SectionModel
    counts: np.ndarray
    y: np.ndarray
    fields: Field
    loadings: np.ndarray

    def combined(self, direct: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """The mean of both predictions, ``direct (n, G)`` and by components ``(n, K)``."""
        return (direct + self.fields.mean + shared @ self.loadings) / 2

    def counts_of(self, composition: np.ndarray, density: np.ndarray) -> np.ndarray:
        """Counts per bin of composition ``(..., G)`` and log total density ``(...)``; no more than twice what was seen."""
        composition = np.clip(composition, 0, self.y.max(0, initial=0) + OVERSHOOT * (self.y.max(0, initial=0) > 0))
        return np.expm1(composition) * (np.exp(np.minimum(density, self.model.most)) / self.model.target)[..., None]

    def at(self, places: Places) -> tuple[np.ndarray, np.ndarray]:
        """Expected composition ``(P, G)`` and log density of counts ``(P,)``."""
        shared = self.model.kriging.predict(self.model.shared, places)
        direct = self.model.kriging.predict(self.fields, places)
        return self.combined(direct, shared[:, :-1]), shared[:, -1]

    def out_of_fold(self, genes: Sequence[str]) -> tuple[np.ndarray, pd.DataFrame]:
        """Counts that are predicted of each spot from the others, ``(n, G)``; and how well, gene by gene."""
        shared = self.model.shared.out_of_fold
        composition = self.combined(self.fields.out_of_fold, shared[:, :-1])
        own = (shared[:, :-1] * self.model.regression.T).sum(1)  # what a spot gave to the loadings comes back to it
        composition = composition - own[:, None] * (self.y - self.fields.mean) / 2
        predicted = self.counts_of(composition, shared[:, -1]) * self.model.area[:, None]
        n = len(composition)
        score = pcc(composition, self.y)
        lower = np.tanh(np.arctanh(np.clip(score, -0.999, 0.999)) - CONFIDENCE / np.sqrt(max(n - 3, 1)))
        depth = np.exp(shared[:, -1:]) * self.model.area[:, None]
        normed = np.log1p(predicted / depth * 1e4), np.log1p(self.counts / self.model.total[:, None] * 1e4)
        scores = pd.DataFrame(
            {
                "score": score, "trusted": lower > TRUSTED_FROM, "from_image": self.fields.from_image,
                "from_neighbors": self.fields.from_neighbors,
                "interval_90": _conformal(np.log1p(predicted), np.log1p(self.counts)),
                "interval_90_norm": _conformal(*normed), "mean_counts": self.counts.mean(0),
            },
            index=list(genes),
        )  # fmt: skip
        return predicted.astype(np.float32), scores


def composition(counts: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Counts ``(n, G)`` as ``log1p(counts / total x median total)``, of spots with totals ``(n,)``."""
    return np.log1p(counts / total[:, None] * np.median(total))


def components(y: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Principal components of genes ``(n, K)``, spots weighted by their precision: scores, shape ``(n, at most n - 2)``.

    Genes are divided by the square root of their standard deviation: between covariance and correlation.
    """
    centered = y - precision @ y / precision.sum()
    spread = np.sqrt(precision @ centered**2 / precision.sum())
    scaled = centered / np.sqrt(np.where(spread > 1e-9, spread, np.inf))
    _, values, directions = np.linalg.svd(scaled * np.sqrt(precision)[:, None], full_matrices=False)
    kept = min(int((values > 1e-6 * values.max(initial=0)).sum()), len(y) - 2, MOST_COMPONENTS)
    return scaled @ directions[: max(kept, 1)].T


def _conformal(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Half the width of intervals that hold 90 % of the spots, each predicted from the others (jackknife), per column."""
    error = np.sort(np.abs(truth - prediction), axis=0)
    return error[min(int(np.ceil((len(error) + 1) * COVERAGE)), len(error)) - 1]
