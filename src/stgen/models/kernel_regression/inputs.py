"""What a kernel regression takes from a section: its spots, and what they and every bin look like; checked before any work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from stgen._checks import check_enough_spots, listed
from stgen.data import ImageReader, MapInputs
from stgen.features import bin_features
from stgen.kernels import Places
from stgen.measurement import Footprints, Measurement
from stgen.models.kernel_regression.regression import Spots, composition

__all__ = [
    "MeasuredSection",
    "check_image",
    "check_pixels",
    "features_of",
    "most_variable",
    "pixel_um",
    "places_of",
]

logger = logging.getLogger("stgen")

MOST = 15_000
GUIDE_GENES = 1000  # the most variable, from which components are made
COARSER = 1.25  # times: a pixel in which features look different
AT_A_TIME = int(1e8)  # bytes of features


@dataclass(frozen=True)
class MeasuredSection:
    """A section with spots that something can be learned from.

    Parameters
    ----------
    inputs
        The section.
    measurement
        What was measured in it.
    rows
        Which spots can be learned from: on grid and image, and with counts.
    """

    inputs: MapInputs
    measurement: Measurement
    rows: np.ndarray

    @classmethod
    def of(cls, inputs: MapInputs, genes: Sequence[str], bin_um: float) -> MeasuredSection:
        """Checked: all that can be said before any work."""
        measurement = inputs.measurement
        if measurement is None:
            raise ValueError("a kernel regression learns from spots, and none were measured in this section.")
        if not abs(inputs.bin_um / bin_um - 1) <= 0.01:
            raise ValueError(f"the section is on bins of {inputs.bin_um:.4g} µm and the model is for {bin_um:.4g} µm.")
        missing = sorted(set(genes) - set(measurement.genes))
        if missing:
            raise KeyError(
                f"{len(missing)} of the {len(genes)} genes of the model were not measured: {listed(missing)}."
            )
        check_footprints(measurement.footprints, inputs.bin_um)
        counted = measurement.totals > 0
        seen = np.ones(len(counted), bool) if inputs.seen is None else inputs.seen
        rows = np.flatnonzero(counted & seen)
        found = f"{len(counted)} spots, {int((~counted).sum())} without counts, {int((~seen).sum())} off the grid or the image"
        check_enough_spots(len(rows), found)
        if len(rows) < len(counted):
            logger.warning("%s: left out.", found)
        return cls(inputs, measurement, rows)

    def some(self, n: int, rng: np.random.Generator) -> MeasuredSection:
        """The section with ``n`` of the spots, drawn at random."""
        return replace(self, rows=np.sort(rng.permutation(self.rows)[:n]))

    @property
    def xy(self) -> np.ndarray:
        """Where the spots are, in pitches, shape ``(n, 2)``."""
        return in_pitches(self.measurement.footprints[self.rows], self.measurement.footprints.pitch)

    @property
    def total(self) -> np.ndarray:
        """Counts of each spot over all genes, shape ``(n,)``."""
        return np.asarray(self.measurement.totals[self.rows], float)

    def counts(self, genes: Sequence[str]) -> np.ndarray:
        """Counts of some genes in the spots, shape ``(n, G)``."""
        number = {gene: i for i, gene in enumerate(self.measurement.genes)}
        return dense(self.measurement.counts[:, [number[gene] for gene in genes]])[self.rows]

    def spots(self, features: np.ndarray | None) -> Spots:
        """The spots, given the features of every bin."""
        footprints = self.measurement.footprints[self.rows]
        return Spots(places_of(footprints, features, self.measurement.footprints.pitch), self.total, footprints.area)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_footprints(footprints: Footprints, bin_um: float) -> None:
    """Refuse spots smaller than a bin, two of them in one place, and too many."""
    if footprints.diameter < 0.999:
        raise ValueError(
            f"the bins of {bin_um:.4g} µm are larger than the spots ({footprints.diameter * bin_um:.4g} µm); construct "
            "the model with a smaller bin_um."
        )
    _, first, count = np.unique(np.round(footprints.centers, 3), axis=0, return_index=True, return_counts=True)
    if (count > 1).any():
        y, x = footprints.centers[first[count > 1][0]]
        raise ValueError(
            f"{int((count - 1).sum())} of {len(footprints)} spots lie where another one does (the first at bin (y, x) "
            f"= ({y:.1f}, {x:.1f})). Keep one of each, or sum their counts."
        )
    if len(footprints) > MOST:
        raise ValueError(
            f"{len(footprints)} spots are more than the {MOST} whose covariance fits in memory. Sum neighboring ones "
            "(stgen.pp.rasterize with a larger bin_um), or crop the section (spatialdata.bounding_box_query)."
        )


def check_image(image: ImageReader | None, *, channels: int | None, px_per_bin: int) -> None:
    """Refuse an image that is not read as the model reads it."""
    if channels is None:
        return
    if image is None:
        raise ValueError("the model looks at the image, and there is none; construct it with image_channels=None.")
    if image.n_channels != channels:
        raise ValueError(
            f"the model takes images of {channels} channels, found {image.n_channels}; construct it with "
            f"image_channels={image.n_channels}."
        )
    if image.px_per_bin != px_per_bin:
        raise ValueError(f"the model reads {px_per_bin} pixels along a bin, and the image has {image.px_per_bin}.")


def pixel_um(inputs: MapInputs) -> float:
    """Side of the pixels in µm from which features are made: those that are read, or those of the image if they are larger."""
    if inputs.image is None:
        return np.nan
    finest = getattr(inputs.image, "finest_px_per_bin", np.inf)  # what the image has, if it says so
    return float(inputs.bin_um / min(inputs.image.px_per_bin, finest))


def check_pixels(here: float, fitted: float, bin_um: float) -> None:
    """Refuse an image whose pixels are so much larger or smaller than those of other sections that features look different."""
    if max(here, fitted) > COARSER * min(here, fitted):
        fits = max(1, int(np.floor(bin_um / max(here, fitted) + 0.2)))
        raise ValueError(
            f"pixels of {here:.3g} µm and of {fitted:.3g} µm do not look alike: features of the image would not mean "
            f"the same. A model with px_per_bin={fits} can read both: construct and fit one."
        )


# ---- spots and what they look like -----------------------------------------------------------------------------------


def features_of(inputs: MapInputs, *, progress: bool = False) -> np.ndarray | None:
    """Features of every bin, ``(D, height, width)``; None without an image."""
    if inputs.image is None:
        return None
    return bin_features(
        inputs.image, inputs.height, inputs.width, bin_um=inputs.bin_um, px_per_bin=inputs.image.px_per_bin, progress=progress
    )  # fmt: skip


def places_of(footprints: Footprints, features: np.ndarray | None, pitch: float) -> Places:
    """Where footprints are, and the mean of the features over each."""
    xy = in_pitches(footprints, pitch)
    if features is None:
        return Places(xy)
    area = footprints.pool(np.ones((1, *features.shape[1:]), np.float32))
    pooled = [footprints.pool(part) for part in np.array_split(features, max(1, features.nbytes // AT_A_TIME))]
    return Places(xy, np.hstack(pooled) / np.maximum(area, 1e-6))


def in_pitches(footprints: Footprints, pitch: float) -> np.ndarray:
    """Centers ``(x, y)`` of footprints in pitches, shape ``(n, 2)``."""
    return np.asarray(footprints.centers[:, ::-1] / pitch)


def most_variable(sections: Sequence[MeasuredSection]) -> list[str]:
    """The genes, of those measured in every section, whose composition varies most in it on average."""
    common = set.intersection(*(set(section.measurement.genes) for section in sections))
    variance = {gene: 0.0 for gene in sections[0].measurement.genes if gene in common}
    for section in sections:
        for start in range(0, len(section.measurement.genes), GUIDE_GENES):
            genes = section.measurement.genes[start : start + GUIDE_GENES]
            counts = dense(section.measurement.counts[:, start : start + GUIDE_GENES])[section.rows].astype(float)
            for gene, value in zip(genes, composition(counts, section.total).var(0), strict=True):
                if gene in common:
                    variance[gene] += float(value)
    names = list(variance)
    return [names[i] for i in np.argsort(-np.array(list(variance.values())), kind="stable")[:GUIDE_GENES]]


def dense(counts: np.ndarray | sparse.csc_array) -> np.ndarray:
    """As an array."""
    return np.asarray(counts.todense() if isinstance(counts, sparse.sparray) else counts)
