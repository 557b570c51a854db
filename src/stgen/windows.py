"""How a section is cut into windows that are made one by one, and do not show it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stgen.data import Rectangle
from stgen.measurement import Footprints

__all__ = ["Tiling", "Window", "bounds_of", "round_up"]


@dataclass(frozen=True)
class Window:
    """A square of the section that is made at once, as ``y, x, height, width`` in bins."""

    core: Rectangle
    """What is kept."""
    outer: Rectangle
    """What is seen."""


@dataclass(frozen=True)
class Tiling:
    """How the grid is cut: into squares of ``tile`` bins, each made with a margin of ``margin`` bins around it.

    Windows end at the edge of the grid, where a single window over the whole section would end too.

    Parameters
    ----------
    tile, margin
        Side of a square, and how far beyond it a window reaches, in bins.
    height, width
        Size of the grid, widened to what is needed.
    footprints
        Discs that results are made to agree with: each then comes from one window.
    side
        Of every window, for models that take one size only.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.windows import Tiling
    >>> [window.outer for window in Tiling(8, 2, 8, 16).windows(np.ones((8, 16), bool))]
    [(0, 0, 8, 10), (0, 6, 8, 10)]
    """

    tile: int
    margin: int
    height: int
    width: int
    footprints: Footprints | None = None
    side: int | None = None

    def windows(self, tissue: np.ndarray) -> list[Window]:
        """The windows with tissue in their core, row by row."""
        corners = [(y, x) for y in range(0, self.height, self.tile) for x in range(0, self.width, self.tile)]
        return [self._window(y, x) for y, x in corners if tissue[y : y + self.tile, x : x + self.tile].any()]

    def _window(self, y: int, x: int) -> Window:
        height, width = min(self.tile, self.height - y), min(self.tile, self.width - x)
        (top, rows), (left, columns) = self._seen(y, height, self.height), self._seen(x, width, self.width)
        return Window((y, x, height, width), (top, left, rows, columns))

    def _seen(self, start: int, length: int, total: int) -> tuple[int, int]:
        """Where a window begins along one axis, and its length."""
        begin, end = max(start - self.margin, 0), min(start + length + self.margin, total)
        if self.side is None:
            return begin, end - begin
        return max(min(begin, total - self.side), 0), self.side

    def kept(self, window: Window) -> np.ndarray:
        """Which bins of the window its result is kept for, shape of ``window.outer``.

        Those of its core; but a disc that lies across the border of two cores belongs, with all the bins that it
        touches, to the one with its center. So each footprint comes from one window, in which it was made to agree.
        """
        y, x, height, width = window.core
        top, left, *shape = window.outer
        kept = np.zeros(shape, bool)
        kept[y - top : y - top + height, x - left : x - left + width] = True
        if self.footprints is None or self.footprints.blocks is not None:
            return kept
        rows, covered = self.footprints.coverage(*window.outer)
        if len(rows) == 0:
            return kept
        home = self.footprints.centers[rows] // self.tile == np.array([y, x]) // self.tile
        most, most_own = (
            part.max(0).toarray().reshape(shape) if part.shape[0] else np.zeros(shape, np.float32)
            for part in (covered, covered[home.all(1)])
        )
        return np.where(most > 0, most_own >= most, kept)


def round_up(n: float, unit: int) -> int:
    """The next multiple of a unit."""
    return math.ceil(n / unit) * unit


def bounds_of(mask: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
    """The smallest rectangle that holds all of a mask, and the mask in it."""
    y, x = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if len(y) == 0:
        return (slice(0, 0), slice(0, 0)), mask[:0, :0]
    box = slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)
    return box, mask[box]
