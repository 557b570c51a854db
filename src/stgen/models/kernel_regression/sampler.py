"""Maps of a kernel regression, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch

from stgen._checks import check_whole
from stgen.data import Rectangle
from stgen.measurement import Consistency, Measurement
from stgen.models.kernel_regression.applied import AppliedRegression
from stgen.models.kernel_regression.regression import GeneFields
from stgen.sampling import SamplingOptions, SpotReport, WindowMaps
from stgen.windows import Tiling

__all__ = ["KernelSampler"]

MOST_VALUES = 4e7  # in the largest arrays
MOST_GENES = 2000  # at a time
KERNELS = 7  # of which weights are kept, at most


class KernelSampler:
    """Maps of a section from depth and composition, kriged from spots and looks.

    Parameters
    ----------
    applied
        The regression that predicts the section.
    genes
        Which of the model's genes to make maps of.
    options
        How to sample.
    """

    has_total = True

    def __init__(self, applied: AppliedRegression, genes: Sequence[str], options: SamplingOptions) -> None:
        if options.tile is not None:
            check_whole("tile", options.tile)
        self.applied, self.genes, self.options = applied, list(genes), options
        drawn = options.n_samples > 1 or options.keep_samples
        self._deviations = applied.regression.deviations(options.n_samples, options.seed) if drawn else None
        self.n_samples = options.n_samples if drawn else 0
        self.measurement = applied.inputs.measurement if options.consistency else None
        self._plan()
        self._reports: dict[int, tuple[np.ndarray, pd.DataFrame]] = {}  # of parts, by their first gene
        self._part: tuple[slice, GeneFields, Measurement | None] | None = None

    def _plan(self) -> None:
        """Genes in parts, and the section in squares, such that arrays stay within bounds."""
        n_genes, n_spots, options = len(self.genes), self.applied.source.n_spots, self.options
        at_a_time = min(int(max(MOST_VALUES // (KERNELS * n_spots), 1)), MOST_GENES, n_genes)
        self.parts = [slice(i, min(i + at_a_time, n_genes)) for i in range(0, n_genes, at_a_time)]
        side = int(np.clip(np.sqrt(MOST_VALUES / max(4 * n_spots, (options.n_samples + 3) * at_a_time)), 16, 256))
        footprints = None if self.measurement is None else self.measurement.footprints
        reach = 0 if footprints is None else int(np.ceil(footprints.diameter)) + 1
        inputs = self.applied.inputs
        self.tiling = Tiling(int(options.tile or side), reach, inputs.height, inputs.width, footprints)

    def ready(self) -> AbstractContextManager[object]:
        """Nothing to prepare."""
        return nullcontext()

    def _kriged(self, part: slice) -> tuple[GeneFields, Measurement | None]:
        """Some genes, kriged; those of the last part are kept."""
        if self._part is None or self._part[0] != part:
            names = self.genes[part]
            genes, measured = self.applied.genes(names), None
            if self.measurement is not None:
                number = {gene: i for i, gene in enumerate(self.measurement.genes)}
                measured = self.measurement.of_genes([number[name] for name in names])
            self._part = part, genes, measured
            if self.applied.section is not None and part.start not in self._reports:
                predicted, scores = genes.out_of_fold()
                self._reports[part.start] = predicted, pd.DataFrame(scores, index=names)
        return self._part[1:]

    def maps(self, window: Rectangle, part: slice) -> WindowMaps:
        """Samples and expected map of some genes in a window."""
        genes, measured = self._kriged(part)
        maps, total = self._maps(genes, window)
        first = part.start == 0
        if self.measurement is None or measured is None:
            return WindowMaps(maps, total if first else None)
        tissue = self.applied.inputs.tissue_in(window)
        if first:
            of_all_genes = self.measurement.with_counts(self.measurement.totals[:, None])
            total = next(agreeing(iter([total]), of_all_genes, window, tissue))
        return WindowMaps(agreeing(maps, measured, window, tissue), total if first else None)

    def _maps(self, genes: GeneFields, window: Rectangle) -> tuple[Iterator[np.ndarray], np.ndarray]:
        """Samples in a window, counts per bin ``(G, h, w)`` one by one, and last the expected map; and the total."""
        height, width = window[2:]
        places = self.applied.places_in(window)
        composition, depth = genes.at(places)

        def shaped(values: np.ndarray) -> np.ndarray:
            return np.moveaxis(values.reshape(height, width, -1), -1, 0)

        def maps() -> Iterator[np.ndarray]:
            if self._deviations is not None:
                for drawn in genes.draws(places, composition, depth, self._deviations):
                    yield shaped(genes.counts_of(*drawn))
            yield shaped(genes.counts_of(composition, depth))

        return maps(), shaped(genes.density(depth))

    def record(self) -> dict[str, Any]:
        """Spots, and what is common to all genes."""
        section, regression = self.applied.section, self.applied.regression
        if section is None:
            return regression.summary(1.0)
        return {
            "n_spots": len(section.rows),
            "n_spots_left_out": len(section.measurement) - len(section.rows),
            "n_trusted": int(sum(scores["trusted"].sum() for _, scores in self._all_reports())),
            **regression.summary(self.applied.pitch * self.applied.inputs.bin_um),
        }  # fmt: skip

    def report(self) -> SpotReport | None:
        """Each of the section's own spots, predicted from the others."""
        if self.applied.section is None:
            return None
        predicted, scores = zip(*self._all_reports(), strict=True)
        return SpotReport(self.applied.section.rows, np.hstack(predicted), pd.concat(scores))

    def _all_reports(self) -> list[tuple[np.ndarray, pd.DataFrame]]:
        """Those of all parts; of parts without a map that was made here, too."""
        for part in self.parts:
            if part.start not in self._reports:
                self._kriged(part)
        return [self._reports[part.start] for part in self.parts]


def agreeing(
    maps: Iterator[np.ndarray], measured: Measurement, window: Rectangle, tissue: np.ndarray
) -> Iterator[np.ndarray]:
    """Maps of a window, made to sum to what was measured."""
    agree = Consistency(measured, *window, tissue=tissue)
    return (agree(torch.as_tensor(values, dtype=torch.float32)[None])[0].numpy() for values in maps)
