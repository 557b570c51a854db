"""Depth and composition of tissue as kriged fields: of one section from its own spots, or of any from those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stgen.kriging import Field, Kriging, Places, centered_on
from stgen.metrics import pcc

__all__ = ["Deviations", "GeneFields", "Regression", "Spots", "components", "composition"]

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


@dataclass(frozen=True)
class Spots:
    """What was measured where.

    Parameters
    ----------
    places
        Where the spots are and what they look like.
    total
        Counts of each spot over all genes, shape ``(n,)``.
    area
        Bins that each spot measured, shape ``(n,)``.
    """

    places: Places
    total: np.ndarray
    area: np.ndarray

    def __len__(self) -> int:
        return len(self.total)

    def __getitem__(self, rows: np.ndarray) -> Spots:
        return Spots(self.places[rows], self.total[rows], self.area[rows])

    @property
    def depth(self) -> np.ndarray:
        """Logarithm of the counts per bin, shape ``(n,)``."""
        return np.asarray(np.log(self.total / self.area))


class Regression:
    """Depth and composition as kriged fields.

    The counts of a place are its total times its composition. The logarithm of the total is one field. Of the
    composition, ``log1p(counts / total x median total)``, each gene is kriged twice, and the mean of both is taken: by
    itself, and through principal components of the most variable genes, each with its own kernel and noise, so that
    weak genes learn from strong ones that go with them. Across sections, where a gene by itself has little to learn
    from, only through components.

    Parameters
    ----------
    spots
        What was measured.
    guide
        Composition of the most variable genes, shape ``(n, K)``; or what remains of it.
    groups
        Numbers of the groups of spots that predict one another, shape ``(n,)``, where what is to be predicted lies in
        another section: then places are compared by what they look like only. None if it lies among the spots.
    base
        What the regression of other sections makes of these spots, shape ``(n,)`` of the depth: what remains of it is
        kriged.
    target
        Total that compositions refer to; that of the median spot by default.
    n_components
        Principal components, at most.
    seed
        Random seed.
    """

    def __init__(
        self,
        spots: Spots,
        guide: np.ndarray,
        *,
        groups: np.ndarray | None = None,
        base: np.ndarray | None = None,
        target: float | None = None,
        n_components: int = MOST_COMPONENTS,
        seed: int = 0,
    ) -> None:
        self.spots, self.groups = spots, groups
        median = float(np.median(spots.total))
        self.target = median if target is None else target
        noise = np.clip(median / spots.total, *NOISE_RANGE)  # of a share that was counted
        self.precision = 1 / noise
        self.scores = components(self.within_sections(guide)[1], self.precision, n_components)
        depth = spots.depth if base is None else spots.depth - base
        self._y = np.column_stack([self.scores, depth])
        guides = np.column_stack([self.scores[:, :GUIDES], depth])
        self.kriging = Kriging(spots.places, noise=noise, guide=guides, groups=groups, seed=seed)
        self.shared = self.kriging.solve(self._y)
        self.projection = projection(self.scores, self.precision)
        self.most = float(spots.depth.max()) + OVERSHOOT

    def composition(self, counts: np.ndarray) -> np.ndarray:
        """Counts ``(n, G)`` on the scale that is kriged."""
        return composition(counts, self.spots.total, self.target)

    def genes(self, counts: np.ndarray, base: GeneFields | None = None) -> GeneFields:
        """Krige some genes, of which ``counts (n, G)`` were measured; or what remains of them to those of other sections."""
        y = self.composition(counts)
        known = None if base is None else base.at(self.spots.places)[0]
        rest = y if known is None else y - known
        direct = self.kriging.solve(rest) if self.groups is None else None
        mean, within = self.within_sections(rest)
        return GeneFields(self, counts, y, mean, self.projection @ within, direct, base, known)

    def within_sections(self, y: np.ndarray, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The mean over sections ``(G,)`` of some spots ``(n, G)``, and what remains of each to the mean of its section."""
        section = self.spots.places.section
        precision = self.precision[rows]
        means, centered = centered_on(y, precision, None if section is None else section[rows])
        return means.mean(0), centered / np.sqrt(precision)[:, None]

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
class GeneFields:
    """Some genes: their fields, and their loadings on the components."""

    regression: Regression
    counts: np.ndarray
    y: np.ndarray
    """Their composition in the spots, shape ``(n, G)``."""
    mean: np.ndarray
    loadings: np.ndarray
    direct: Field | None
    """Each by itself; None across sections."""
    base: GeneFields | None
    """What other sections say, to which the rest of this is added."""
    known: np.ndarray | None
    """That, of the composition in the spots."""

    def combined(self, direct: np.ndarray | None, shared: np.ndarray) -> np.ndarray:
        """The mean of both predictions, ``direct (n, G)`` and by components ``(n, K)``; or that by components."""
        by_components = self.mean + shared @ self.loadings
        return by_components if direct is None else (direct + by_components) / 2

    @property
    def highest(self) -> np.ndarray:
        """Of the composition of each gene, what was seen, shape ``(G,)``."""
        seen = self.y.max(0, initial=0)
        return seen if self.base is None else np.maximum(seen, self.base.highest)

    def bounded(self, composition: np.ndarray) -> np.ndarray:
        """Composition ``(..., G)`` that is not negative, and no more than twice what was seen."""
        return np.clip(composition, 0, self.highest + OVERSHOOT * (self.highest > 0))

    def counts_of(self, composition: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Counts per bin of composition ``(..., G)`` and log total density ``(...)``; no more than twice what was seen."""
        return np.asarray(
            np.expm1(self.bounded(composition)) * (self.density(depth) / self.regression.target)[..., None]
        )

    def density(self, depth: np.ndarray) -> np.ndarray:
        """Counts per bin over all genes; no more than twice what was seen."""
        most = self.regression.most
        return np.asarray(
            np.exp(np.minimum(depth, most if self.base is None else max(most, self.base.regression.most)))
        )

    def at(self, places: Places) -> tuple[np.ndarray, np.ndarray]:
        """Expected composition ``(P, G)`` and log density of counts ``(P,)``."""
        kriging = self.regression.kriging
        shared = kriging.predict(self.regression.shared, places)
        direct = None if self.direct is None else kriging.predict(self.direct, places)
        composition, depth = self.combined(direct, shared[:, :-1]), shared[:, -1]
        if self.base is None:
            return composition, depth
        of_others, their_depth = self.base.at(places)
        return composition + of_others, depth + their_depth

    def draws(
        self, places: Places, composition: np.ndarray, depth: np.ndarray, deviations: Deviations
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What may be at places instead of what is expected there (see :meth:`at`), one draw after the other."""
        draw, drawn = deviations
        for change in np.moveaxis(draw(places), 1, 0):
            yield composition + change[:, :-1] @ self.loadings[drawn[:-1]], depth + change[:, -1]

    # ---- out of fold -------------------------------------------------------------------------------------------------

    def out_of_fold(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Counts that are predicted of each spot from the others, ``(n, G)``; and how well, gene by gene."""
        regression, shared = self.regression, self.regression.shared.out_of_fold
        composition, depth = self._composition_out_of_fold(), shared[:, -1]
        if self.base is not None:
            depth = depth + self.base.at(regression.spots.places)[1]
        total, area = regression.spots.total[:, None], regression.spots.area[:, None]
        predicted = self.counts_of(composition, depth) * area
        n = len(composition)
        score = pcc(composition, self.y)
        lower = np.tanh(np.arctanh(np.clip(score, -0.999, 0.999)) - CONFIDENCE / np.sqrt(max(n - 3, 1)))
        expected = np.exp(depth)[:, None] * area
        normed = np.log1p(predicted / expected * 1e4), np.log1p(self.counts / total * 1e4)
        scores = {
            "score": score, "trusted": lower > TRUSTED_FROM, **self._explained(composition),
            "interval_90": conformal(np.log1p(predicted), np.log1p(self.counts)), "interval_90_norm": conformal(*normed),
            "mean_counts": self.counts.mean(0),
        }  # fmt: skip
        return predicted.astype(np.float32), scores

    def _composition_out_of_fold(self) -> np.ndarray:
        """Composition that is predicted of each spot from the others, ``(n, G)``."""
        regression, shared = self.regression, self.regression.shared.out_of_fold[:, :-1]
        rest = self.y if self.known is None else self.y - self.known
        if self.direct is None:
            return self._from_other_groups(shared, rest)
        found = self.combined(self.direct.out_of_fold, shared)
        own = (shared * regression.projection.T).sum(1)  # what a spot gave to the loadings comes back to it
        found = found - own[:, None] * (rest - self.mean) / 2
        return found if self.known is None else found + self.known

    def _from_other_groups(self, shared: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """By components ``(n, K)`` that are predicted from the other groups, with means and loadings of those."""
        regression, out = self.regression, np.empty_like(rest)
        groups = np.zeros(len(rest)) if regression.groups is None else regression.groups
        for group in np.unique(groups):
            here = groups == group
            mean, within = regression.within_sections(rest[~here], ~here)
            loadings = projection(regression.scores[~here], regression.precision[~here]) @ within
            out[here] = mean + shared[here] @ loadings
        return out

    def _explained(self, composition: np.ndarray) -> dict[str, np.ndarray]:
        """Shares of the variance of each gene that looks, and surroundings, predict out of fold."""
        if self.direct is None:
            return {"from_image": self._share_of(composition), "from_neighbors": np.zeros(len(self.mean))}
        shares = {"from_image": self.direct.from_image, "from_neighbors": self.direct.from_neighbors}
        if self.known is None:
            return shares
        left = self._power(self.y - self.known) / np.maximum(self._power(self.y), 1e-12)
        shares = {name: share * left for name, share in shares.items()}
        return {**shares, "from_image": shares["from_image"] + self._share_of(self.known)}

    def _centered(self, y: np.ndarray) -> np.ndarray:
        precision = self.regression.precision
        return np.asarray(y - precision @ y / precision.sum())

    def _power(self, y: np.ndarray) -> np.ndarray:
        return np.asarray(self.regression.precision @ self._centered(y) ** 2)

    def _share_of(self, predicted: np.ndarray) -> np.ndarray:
        """Of the variance in the spots, what a prediction of them explains."""
        together = self.regression.precision @ (self._centered(predicted) * self._centered(self.y))
        return np.asarray(together / np.maximum(self._power(self.y), 1e-12))


def composition(counts: np.ndarray, total: np.ndarray, target: float | None = None) -> np.ndarray:
    """Counts ``(n, G)`` as ``log1p(counts / total x target)``, of spots with totals ``(n,)``; target is the median total."""
    return np.asarray(np.log1p(counts / total[:, None] * (np.median(total) if target is None else target)))


def components(y: np.ndarray, precision: np.ndarray, most: int = MOST_COMPONENTS) -> np.ndarray:
    """Principal components of genes ``(n, K)``, spots weighted by their precision: scores, shape ``(n, at most n - 2)``.

    Genes are divided by the square root of their standard deviation: between covariance and correlation.
    """
    centered = y - precision @ y / precision.sum()
    spread = np.sqrt(precision @ centered**2 / precision.sum())
    scaled = centered / np.sqrt(np.where(spread > 1e-9, spread, np.inf))
    _, values, directions = np.linalg.svd(scaled * np.sqrt(precision)[:, None], full_matrices=False)
    kept = min(int((values > 1e-6 * values.max(initial=0)).sum()), len(y) - 2, most)
    return np.asarray(scaled @ directions[: max(kept, 1)].T)


def projection(scores: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """What makes loadings of genes out of their values in the spots: shape ``(K, n)``; scores are orthogonal."""
    weighted = precision[:, None] * scores
    return np.asarray((weighted / np.maximum((weighted * scores).sum(0), 1e-12)).T)


def conformal(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Half the width of intervals that hold 90 % of the spots, each predicted from the others (jackknife), per column."""
    error = np.sort(np.abs(truth - prediction), axis=0)
    return np.asarray(error[min(int(np.ceil((len(error) + 1) * COVERAGE)), len(error)) - 1])
