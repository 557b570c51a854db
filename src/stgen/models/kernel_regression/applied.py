"""A kernel regression applied to a section: what other sections say of it, and what its own spots add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stgen.data import MapInputs, Rectangle
from stgen.kernels import Places
from stgen.measurement import Footprints
from stgen.models.kernel_regression.inputs import MeasuredSection, places_of
from stgen.models.kernel_regression.regression import GeneFields, Regression, composition

__all__ = ["AppliedRegression", "OtherSections", "OwnSpots", "blocks"]


@dataclass(frozen=True)
class OtherSections:
    """A regression on looks, from the spots of other sections.

    Parameters
    ----------
    regression
        The regression.
    names
        The genes of the model.
    counts
        Of these in the spots, shape ``(n, G)``.
    guide
        Counts of the genes from which components are made, shape ``(n, K)``.
    """

    regression: Regression
    names: list[str]
    counts: np.ndarray
    guide: np.ndarray

    @property
    def n_spots(self) -> int:
        """Spots to which a place is compared."""
        return len(self.regression.spots)

    def genes(self, names: Sequence[str]) -> GeneFields:
        """Some genes."""
        number = {name: i for i, name in enumerate(self.names)}
        return self.regression.genes(self.counts[:, [number[name] for name in names]])


@dataclass(frozen=True)
class OwnSpots:
    """A regression of a section's own spots, on top of that of others if there are any.

    Parameters
    ----------
    regression
        The regression, of what remains.
    section
        The section.
    others
        What other sections say.
    """

    regression: Regression
    section: MeasuredSection
    others: OtherSections | None

    @classmethod
    def of(
        cls,
        section: MeasuredSection,
        features: np.ndarray | None,
        guide_genes: Sequence[str],
        others: OtherSections | None,
        *,
        seed: int,
    ) -> OwnSpots:
        """Of a section, given the features of its bins and the genes from which components are made."""
        spots, measured = section.spots(features), set(section.measurement.genes)
        shared = [(i, gene) for i, gene in enumerate(guide_genes) if gene in measured]
        counts = section.counts([gene for _, gene in shared]).astype(float)
        if others is None:
            return cls(Regression(spots, composition(counts, spots.total), seed=seed), section, None)
        known, depth = others.regression.genes(others.guide[:, [i for i, _ in shared]]).at(spots.places)
        target = others.regression.target
        rest = composition(counts, spots.total, target) - known
        return cls(Regression(spots, rest, base=depth, target=target, seed=seed), section, others)

    @property
    def n_spots(self) -> int:
        """Spots to which a place is compared."""
        return len(self.regression.spots) + (0 if self.others is None else self.others.n_spots)

    def genes(self, names: Sequence[str]) -> GeneFields:
        """Some genes."""
        others = None if self.others is None else self.others.genes(names)
        return self.regression.genes(self.section.counts(names).astype(float), others)


@dataclass(frozen=True)
class AppliedRegression:
    """A section, and the regression that predicts it: what is derived of both, once.

    Parameters
    ----------
    inputs
        The section.
    features
        Of every bin, shape ``(D, height, width)``.
    source
        What the section is predicted from.
    """

    inputs: MapInputs
    features: np.ndarray | None
    source: OwnSpots | OtherSections

    @property
    def section(self) -> MeasuredSection | None:
        """The section, if it is predicted from its own spots."""
        return self.source.section if isinstance(self.source, OwnSpots) else None

    @property
    def regression(self) -> Regression:
        """The last one."""
        return self.source.regression

    @property
    def pitch(self) -> float:
        """Distance between neighboring spots of the section in bins; 1 if it has none."""
        return 1.0 if self.section is None else self.section.measurement.footprints.pitch

    def genes(self, names: Sequence[str]) -> GeneFields:
        """Some genes."""
        return self.source.genes(names)

    def places_of(self, footprints: Footprints) -> Places:
        """Where footprints are, and what they look like."""
        return places_of(footprints, self.features, self.pitch)

    def places_in(self, window: Rectangle) -> Places:
        """The bins of a window, row by row."""
        top, left, height, width = window
        y, x = np.mgrid[top : top + height, left : left + width] + 0.5
        xy = np.column_stack([x.ravel(), y.ravel()]).astype(np.float32) / np.float32(self.pitch)
        if self.features is None:
            return Places(xy)
        return Places(xy, self.features[:, top : top + height, left : left + width].reshape(len(self.features), -1).T)


def blocks(xy: np.ndarray, n: int) -> np.ndarray:
    """Numbers of ``n`` (a power of two) blocks of about equally many neighboring spots, shape ``(len(xy),)``.

    The spots are halved along the longer side, over and over.
    """
    block = np.zeros(len(xy), int)
    for _ in range(int(np.log2(n))):
        halved = 2 * block
        for number in np.unique(block):
            rows = np.flatnonzero(block == number)
            axis = int(np.ptp(xy[rows], axis=0).argmax())
            halved[rows[np.argsort(xy[rows, axis], kind="stable")[len(rows) // 2 :]]] += 1
        block = halved
    return block
