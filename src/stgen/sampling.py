"""How the maps of a section are made window by window: what a model offers for it, and how it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from stgen.data import Rectangle
from stgen.diffusion import Solver
from stgen.windows import Tiling

__all__ = ["MapSampler", "SamplingOptions", "SpotReport", "WindowMaps"]


@dataclass(frozen=True)
class SamplingOptions:
    """How the maps of a section are sampled."""

    n_samples: int = 4
    """Samples of every map."""
    steps: int = 25
    """Network evaluations."""
    solver: Solver = "dpm++"
    """See :meth:`stgen.diffusion.Diffusion.sample`."""
    batch_size: int = 4
    """Samples drawn at a time."""
    consistency: bool = False
    """Whether maps are made to sum to what was measured."""
    tile: int | None = None
    """Side in bins of the squares in which the section is cut; by default the largest that takes a few GB of memory."""
    seed: int = 0
    device: str = "cpu"
    keep_samples: bool = False
    """Whether samples are wanted themselves, not only their spread."""
    progress: bool = False
    """Whether to show bars of what is done before the first window."""


class WindowMaps(NamedTuple):
    """The maps of some genes in a window, counts per bin."""

    maps: Iterator[np.ndarray]
    """The samples ``(genes, height, width)`` one after the other, and last the expected map."""
    total: np.ndarray | None = None
    """Expected counts over all genes ``(1, height, width)``, if they are known; with the first genes only."""


class SpotReport(NamedTuple):
    """What is known of a section's own spots, each predicted from others."""

    rows: np.ndarray
    """Which of the measured spots, shape ``(n,)``."""
    predicted: np.ndarray
    """Counts, shape ``(n, G)``."""
    scores: pd.DataFrame
    """A row per gene."""


class MapSampler(Protocol):
    """Makes the maps of a section window by window; what it needs to know is resolved and does not change."""

    genes: list[str]
    """What maps are made of."""
    n_samples: int
    """Samples of every map; 0 or 1 gives no spread."""
    tiling: Tiling
    parts: list[slice]
    """Which of the genes are taken at a time."""
    has_total: bool
    """Whether there is a map of the counts over all genes."""

    def ready(self) -> AbstractContextManager[object]:
        """Around all calls of :meth:`maps`: puts a model on its device, say, and takes it back."""

    def maps(self, window: Rectangle, part: slice) -> WindowMaps:
        """The maps of some genes in a window; a function of its arguments and of nothing that changes."""

    def record(self) -> dict[str, Any]:
        """What else to write down of a result, once all maps are made; JSON values."""

    def report(self) -> SpotReport | None:
        """What is known of the section's own spots, once all maps are made."""
