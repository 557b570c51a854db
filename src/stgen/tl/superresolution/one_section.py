"""Maps of one section from its own spots and image, with nothing else to learn from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from stgen._checks import check_whole
from stgen._spatial.grid import Grid
from stgen._spatial.map_inputs import MapElements
from stgen.data import MapInputs, Rectangle
from stgen.features import bin_features
from stgen.kriging import Places
from stgen.measurement import Consistency, Measurement
from stgen.models.samplers import SamplingOptions, SpotReport, WindowMaps
from stgen.tl.superresolution.section_model import Composition, SectionModel, composition
from stgen.windows import Tiling

__all__ = ["FEWEST", "FINEST_PX_UM", "OneSection", "check_learnable", "check_spots"]

logger = logging.getLogger("stgen")

FEWEST = 30  # spots
MOST = 15_000
FINEST_PX_UM = 2.0  # of the image
GUIDE_GENES = 1000  # the most variable, from which components are made
MOST_VALUES = 4e7  # in the largest arrays
MOST_GENES = 2000  # at a time
KERNELS = 7  # of which weights are kept, at most


def check_spots(n: int, found: str) -> None:
    """Refuse a section of which too little was measured."""
    if n < FEWEST:
        raise ValueError(
            f"fewer than {FEWEST} spots to learn from: {found}. A map cannot be learned from so little; use a model that was "
            "fitted on other sections: superresolve(..., model=...)."
        )


def check_learnable(inputs: MapInputs, low_res: str, like: str | None) -> None:
    """Refuse a section that nothing can be learned from; say how many spots are left out."""
    measurement = inputs.measured
    spots = measurement.footprints
    if spots.diameter < 0.999:
        raise ValueError(
            f"the bins of {like!r} are {inputs.bin_um:.4g} µm, larger than the spots of {low_res!r} "
            f"({spots.diameter * inputs.bin_um:.4g} µm). Name a finer map as like=, or leave it out."
        )
    _, first, count = np.unique(np.round(spots.centers, 3), axis=0, return_index=True, return_counts=True)
    if (count > 1).any():
        y, x = spots.centers[first[count > 1][0]]
        raise ValueError(
            f"{int((count - 1).sum())} of {len(spots)} spots of {low_res!r} lie where another one does (the first at bin "
            f"(y, x) = ({y:.1f}, {x:.1f})). Keep one of each, or sum their counts."
        )
    if len(spots) > MOST:
        raise ValueError(
            f"{low_res!r} has {len(spots)} spots, more than the {MOST} whose covariance fits in memory. Sum neighboring bins "
            "(stgen.pp.rasterize with a larger bin_um), or crop the section (spatialdata.bounding_box_query)."
        )
    empty, outside = int((measurement.totals <= 0).sum()), int((~inputs.usable).sum())
    found = f"{len(spots)} spots in {low_res!r}, {empty} without counts, {outside} off the grid or the image"
    check_spots(int((inputs.usable & (measurement.totals > 0)).sum()), found)
    if empty or outside:
        logger.warning("%s: left out.", found)


@dataclass(frozen=True)
class OneSection:
    """Stands for a model where a section is all that there is to learn from."""

    genes: list[str]
    needs_image: bool
    config: dict[str, Any] = field(default_factory=dict)
    needs_all_genes: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    tissue_reach: ClassVar[float] = 3.0
    consistent: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True

    @classmethod
    def on(cls, elements: MapElements, grid: Grid, genes: list[str]) -> OneSection:
        """For the image of a section, if there is one, at most as finely as it is."""
        if elements.image_key is None:
            return cls(genes, False, {"px_per_bin": 1})
        to_pixels = grid.to_element(elements.sdata, elements.image_key, elements.system)
        mpp = float(grid.bin_um / np.sqrt(abs(np.linalg.det(to_pixels[:2, :2]))))
        px_per_bin = max(1, round(grid.bin_um / max(FINEST_PX_UM, mpp)))
        return cls(genes, True, {"px_per_bin": px_per_bin, "image_channels": None})

    def sampler(self, inputs: MapInputs, genes: Sequence[str], options: SamplingOptions) -> SectionSampler:
        """What makes the maps."""
        return SectionSampler(inputs, genes, options, self.config["px_per_bin"])


class SectionSampler:
    """Maps from depth and composition, kriged from the section's own spots."""

    has_total = True

    def __init__(self, inputs: MapInputs, genes: Sequence[str], options: SamplingOptions, px_per_bin: int) -> None:
        if options.tile is not None:
            check_whole("tile", options.tile)
        self.inputs, self.genes, self.options = inputs, list(genes), options
        measurement = inputs.measured
        self.spots, total = measurement.footprints, measurement.totals.astype(float)
        self.kept = np.flatnonzero(inputs.usable & (total > 0))
        number = {gene: i for i, gene in enumerate(measurement.genes)}
        self._columns = np.array([number[gene] for gene in self.genes])
        self.features = None
        if inputs.image is not None:
            self.features = bin_features(
                inputs.image,
                inputs.height,
                inputs.width,
                bin_um=inputs.bin_um,
                px_per_bin=px_per_bin,
                progress=options.progress,
            )
        learned = measurement[self.kept]
        self.model = SectionModel(
            self._places_of_spots(learned),
            total[self.kept],
            most_variable(learned, total[self.kept]),
            learned.footprints.area,
            seed=options.seed,
        )
        drawn = options.n_samples > 1 or options.keep_samples
        self._deviations = self.model.deviations(options.n_samples, options.seed) if drawn else None
        self.n_samples = options.n_samples if drawn else 0
        self._plan()
        self._reports: list[tuple[np.ndarray, pd.DataFrame]] = []
        self._part: tuple[slice, Composition, Measurement] | None = None

    def _places_of_spots(self, spots: Measurement) -> Places:
        """Where the spots are, and the mean of the features over each."""
        footprints = spots.footprints
        xy = footprints.centers[:, ::-1] / self.spots.pitch
        if self.features is None:
            return Places(xy)
        area = footprints.pool(np.ones((1, *self.features.shape[1:]), np.float32))
        n_parts = max(1, self.features.nbytes // int(1e8))
        pooled = [footprints.pool(part) for part in np.array_split(self.features, n_parts)]
        return Places(xy, np.hstack(pooled) / np.maximum(area, 1e-6))

    def _plan(self) -> None:
        """Genes in parts, and the section in squares, such that arrays stay within bounds."""
        n_genes, n_spots, options = len(self.genes), len(self.kept), self.options
        at_a_time = min(int(max(MOST_VALUES // (KERNELS * n_spots), 1)), MOST_GENES, n_genes)
        self.parts = [slice(i, min(i + at_a_time, n_genes)) for i in range(0, n_genes, at_a_time)]
        side = int(np.clip(np.sqrt(MOST_VALUES / max(4 * n_spots, (options.n_samples + 3) * at_a_time)), 16, 256))
        reach = int(np.ceil(self.spots.diameter)) + 1 if options.consistency else 0
        self.tiling = Tiling(
            int(options.tile or side),
            reach,
            self.inputs.height,
            self.inputs.width,
            self.spots if options.consistency else None,
        )

    def ready(self) -> AbstractContextManager[object]:
        """Nothing to prepare."""
        return nullcontext()

    def _kriged(self, part: slice) -> tuple[Composition, Measurement]:
        """Some genes, kriged; those of the last part are kept."""
        if self._part is None or self._part[0] != part:
            measured = self.inputs.measured.of_genes(self._columns[part])
            genes = self.model.genes(measured.counts[self.kept])
            self._part = part, genes, measured
            self._reports.append(genes.out_of_fold(self.genes[part]))
        return self._part[1:]

    def maps(self, window: Rectangle, part: slice) -> WindowMaps:
        """Samples and expected map of some genes in a window."""
        genes, measured = self._kriged(part)
        maps, depth = self._maps(genes, window)
        if not self.options.consistency:
            return WindowMaps(maps, depth if part.start == 0 else None)
        tissue = self.inputs.tissue_in(window)
        total = None
        if part.start == 0:
            of_all_genes = self.inputs.measured.with_counts(self.inputs.measured.totals[:, None])
            total = next(_agreeing(iter([depth]), of_all_genes, window, tissue))
        return WindowMaps(_agreeing(maps, measured, window, tissue), total)

    def _maps(self, genes: Composition, window: Rectangle) -> tuple[Iterator[np.ndarray], np.ndarray]:
        """Samples in a window, counts per bin ``(G, h, w)`` one by one, and last the expected map; and the total."""
        top, left, height, width = window
        y, x = np.mgrid[top : top + height, left : left + width] + 0.5
        xy = np.column_stack([x.ravel(), y.ravel()]).astype(np.float32) / np.float32(self.spots.pitch)
        features = None
        if self.features is not None:
            features = self.features[:, top : top + height, left : left + width].reshape(len(self.features), -1).T
        places = Places(xy, features)
        composition, density = genes.at(places)

        def shaped(values: np.ndarray) -> np.ndarray:
            return np.moveaxis(values.reshape(height, width, -1), -1, 0)

        def maps() -> Iterator[np.ndarray]:
            if self._deviations is not None:
                draw, drawn = self._deviations
                for change in np.moveaxis(draw(places), 1, 0):
                    changed = composition + change[:, :-1] @ genes.loadings[drawn[:-1]]
                    yield shaped(genes.counts_of(changed, density + change[:, -1]))
            yield shaped(genes.counts_of(composition, density))

        return maps(), shaped(np.exp(np.minimum(density, self.model.most)))

    def record(self) -> dict[str, Any]:
        """Spots, and what is common to all genes."""
        n_trusted = int(sum(scores["trusted"].sum() for _, scores in self._reports))
        return {
            "model": "Kriging",
            "n_spots": len(self.kept),
            "n_spots_left_out": len(self.spots) - len(self.kept),
            "n_trusted": n_trusted,
            **self.model.summary(self.spots.pitch * self.inputs.bin_um),
        }

    def report(self) -> SpotReport:
        """Each spot predicted from the others."""
        predicted, scores = zip(*self._reports, strict=True)
        return SpotReport(self.kept, np.hstack(predicted), pd.concat(scores))


def most_variable(measurement: Measurement, total: np.ndarray) -> np.ndarray:
    """Counts of the genes whose composition varies most, shape ``(n, K)``."""
    variance = []
    for start in range(0, measurement.counts.shape[1], GUIDE_GENES):
        counts = _dense(measurement.counts[:, start : start + GUIDE_GENES]).astype(float)
        variance.append(composition(counts, total).var(0))
    order = np.argsort(-np.concatenate(variance), kind="stable")[:GUIDE_GENES]
    return _dense(measurement.counts[:, order]).astype(float)


def _dense(counts: np.ndarray | sparse.csc_array) -> np.ndarray:
    return counts if isinstance(counts, np.ndarray) else counts.toarray()


def _agreeing(
    maps: Iterator[np.ndarray], measured: Measurement, window: Rectangle, tissue: np.ndarray
) -> Iterator[np.ndarray]:
    """Maps of a window, made to sum to what was measured."""
    agree = Consistency(measured, *window, tissue=tissue)
    return (agree(torch.as_tensor(values, dtype=torch.float32)[None])[0].numpy() for values in maps)
