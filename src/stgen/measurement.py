"""What low-resolution data measure of a fine map, and how a fine map is made to agree with them.

Spots and low-resolution bins are one thing here: footprints on the fine grid over which counts were summed. Coordinates
are in bins of the fine grid, rows first: bin ``(i, j)`` covers ``[i, i + 1) x [j, j + 1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar, Literal, TypeAlias, overload

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor

__all__ = ["Consistency", "Footprints", "Kernel", "Measurement"]

Kernel = Literal["gaussian", "nearest", "linear", "cubic"]
Shape = Literal["square", "disc"]
Counts: TypeAlias = "np.ndarray | sparse.csc_array"

WITHIN_A_PITCH = math.exp(-0.5 * (1 / 0.45) ** 2)
"""What the Gaussian kernel is at a distance of one pitch."""

KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of the distance along one axis, in pitches
    "gaussian": lambda d: np.exp(-0.5 * (d / 0.45) ** 2),
    "nearest": lambda d: (np.abs(d) <= 0.5).astype(float),
    "linear": lambda d: np.maximum(1 - np.abs(d), 0),
    "cubic": lambda d: np.where(
        np.abs(d) <= 1,
        1.5 * np.abs(d) ** 3 - 2.5 * d**2 + 1,
        np.where(np.abs(d) < 2, -0.5 * np.abs(d) ** 3 + 2.5 * d**2 - 4 * np.abs(d) + 2, 0),
    ),
}
NEGLIGIBLE = 1e-6  # share of a bin: less is a rounding of the places
REACH = 3.0  # pitches beyond which a footprint does not count: the kernel is 1e-10 there
SUBBINS = 8  # points per side of a bin that decide how much of it a disc covers
NOTHING = 1e-6  # of what was measured: a footprint with less of a prediction has none
ROUNDING = 1e-3  # bins: an edge so close to that of a bin lies on it
AT_A_TIME = 4096  # footprints
MOST_VALUES = 2e7  # in an intermediate array
MAX_SWEEPS = 100
MOST_SCALED = 3.0
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Footprints:
    """Places of one size and shape on a fine grid, each of which was measured as a whole.

    Parameters
    ----------
    centers
        Centers ``(y, x)`` in bins, shape ``(n, 2)``.
    diameter
        Side of a square or diameter of a disc, in bins.
    shape
        ``"square"`` (low-resolution bins) or ``"disc"`` (spots).
    area
        How many bins each really measured, shape ``(n,)``; less than its size at the edge of a section.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.measurement import Footprints
    >>> footprints = Footprints(np.array([[1.0, 1.0], [1.0, 3.0]]), 2.0, "square", np.full(2, 4.0))
    >>> footprints.pool(np.ones((1, 2, 4))).ravel()
    array([4., 4.])
    """

    centers: np.ndarray
    diameter: float
    shape: Shape
    area: np.ndarray

    def __post_init__(self) -> None:
        if self.centers.shape != (len(self.area), 2) or self.area.ndim != 1:
            raise ValueError(
                f"centers (n, 2) and area (n,) do not fit together: found {self.centers.shape}, {self.area.shape}."
            )

    def __len__(self) -> int:
        return len(self.centers)

    def __getitem__(self, rows: np.ndarray) -> Footprints:
        """Some of them."""
        return Footprints(self.centers[rows], self.diameter, self.shape, self.area[rows])

    @property
    def size(self) -> float:
        """Area of a whole one, in bins."""
        return self.diameter**2 if self.shape == "square" else math.pi * (self.diameter / 2) ** 2

    @cached_property
    def pitch(self) -> float:
        """Distance between neighboring footprints, in bins."""
        if len(self) < 2:
            return self.diameter
        distance = cKDTree(self.centers).query(self.centers, k=2)[0][:, 1]
        return max(float(np.median(distance)), 1e-6)

    @cached_property
    def blocks(self) -> int | None:
        """Side in bins, if all footprints are whole blocks of the grid at multiples of their side; else ``None``."""
        side = round(self.diameter)
        if self.shape != "square" or side < 1 or abs(self.diameter - side) > ROUNDING:
            return None
        corners = (self.centers - side / 2) / side
        return side if np.abs(corners - np.round(corners)).max(initial=0) * side <= ROUNDING else None

    def near(self, y0: float, x0: float, height: float, width: float, margin: float) -> np.ndarray:
        """Rows of the footprints whose centers lie in a window or at most ``margin`` bins beside it."""
        y, x = self.centers.T
        inside = (y >= y0 - margin) & (y <= y0 + height + margin) & (x >= x0 - margin) & (x <= x0 + width + margin)
        return np.flatnonzero(inside)

    def within(self, height: int, width: int) -> np.ndarray:
        """Rows of those that lie wholly on a grid of this size: of the others, part was measured beyond it."""
        return self._inside(0, 0, height, width)

    def _inside(self, y0: float, x0: float, height: float, width: float) -> np.ndarray:
        radius = self.diameter / 2
        return self.near(y0 + radius, x0 + radius, height - self.diameter, width - self.diameter, ROUNDING)

    def coverage(self, y0: int, x0: int, height: int, width: int) -> tuple[np.ndarray, sparse.csr_array]:
        """How much of each bin of a window the footprints cover that lie wholly inside it.

        Edges of squares that are a thousandth of a bin beside those of bins lie on them, as rounding has it: nothing is
        covered beyond. The shares of a square sum to its size.

        Returns
        -------
        Rows of those footprints, and their shares of the bins, shape ``(len(rows), height * width)``.
        """
        rows = self._inside(y0, x0, height, width)
        return rows, self._covered(rows, y0, x0, height, width)

    def _covered(self, rows: np.ndarray, y0: int, x0: int, height: int, width: int) -> sparse.csr_array:
        """Shares of the window's bins that some footprints cover, some thousand footprints at a time."""
        if len(rows) > AT_A_TIME:
            batches = np.array_split(rows, -(-len(rows) // AT_A_TIME))
            return sparse.vstack([self._covered(batch, y0, x0, height, width) for batch in batches], format="csr")
        n_side = int(np.ceil(self.diameter)) + 1
        low, high = (self._on_edges(self.centers[rows] + side * self.diameter / 2) for side in (-1, 1))  # (n, 2)
        bins = np.floor(low).astype(int)[:, :, None] + np.arange(n_side)  # (n, 2, side): bins along y and along x
        if self.shape == "square":
            side = np.clip(np.minimum(bins + 1, high[..., None]) - np.maximum(bins, low[..., None]), 0, 1)
            side *= self.diameter / side.sum(2, keepdims=True)
            share = side[:, 0, :, None] * side[:, 1, None, :]
        else:
            offset = bins - self.centers[rows][:, :, None]
            points = offset[..., None] + (np.arange(SUBBINS) + 0.5) / SUBBINS  # (n, 2, side, SUBBINS)
            y, x = points.reshape(len(rows), 2, n_side * SUBBINS).transpose(1, 0, 2)
            inside = y[:, :, None] ** 2 + x[:, None, :] ** 2 <= (self.diameter / 2) ** 2
            share = inside.reshape(len(rows), n_side, SUBBINS, n_side, SUBBINS).mean((2, 4))
        y, x = bins[:, 0, :, None] - y0, bins[:, 1, None, :] - x0
        kept = (share > NEGLIGIBLE) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        footprint, i, j = np.nonzero(kept)
        position = bins[footprint, 0, i] - y0, bins[footprint, 1, j] - x0
        return sparse.csr_array(
            (share[kept].astype(np.float32), (footprint, position[0] * width + position[1])),
            shape=(len(rows), height * width),
        )

    def _on_edges(self, at: np.ndarray) -> np.ndarray:
        """Places that are next to edges of bins, on them."""
        edge = np.round(at)
        return np.where(np.abs(at - edge) <= ROUNDING * min(1.0, self.diameter), edge, at)

    def pool(self, counts: np.ndarray) -> np.ndarray:
        """Sum a fine map over every footprint: what the measurement would have been.

        Parameters
        ----------
        counts
            Counts per bin, shape ``(G, H, W)``; NaN counts as nothing.

        Returns
        -------
        Shape ``(n, G)``. The part of a footprint beyond the map counts as nothing.
        """
        n_genes, height, width = counts.shape
        covered = self._covered(np.arange(len(self)), 0, 0, height, width)
        return covered @ np.nan_to_num(np.asarray(counts, np.float64)).reshape(n_genes, -1).T

    def covers(self, height: int, width: int) -> np.ndarray:
        """Which bins of a grid they cover, if only in part, shape ``(height, width)``."""
        covered = self._covered(np.arange(len(self)), 0, 0, height, width)
        return np.asarray(covered.sum(0)).reshape(height, width) > 0

    def reached(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """Which bins of a window lie within about one pitch of one of them, shape ``(height, width)``."""
        near = self.near(y0, x0, height, width, REACH * self.pitch)
        along_y, along_x = (KERNELS["gaussian"](d) for d in self.distances(near, y0, x0, height, width))
        return along_y @ along_x.T >= WITHIN_A_PITCH

    def distances(self, rows: np.ndarray, y0: int, x0: int, height: int, width: int) -> list[np.ndarray]:
        """From the bins of a window to some footprints along y, and along x, in pitches: ``(height, n)``, ``(width, n)``."""
        return [
            (start + np.arange(n)[:, None] + 0.5 - self.centers[rows, axis]) / self.pitch
            for axis, (start, n) in enumerate([(y0, height), (x0, width)])
        ]


@dataclass(frozen=True, init=False)
class Measurement:
    """Counts summed over footprints on a fine grid.

    Also ``Measurement(counts, centers, diameter, shape, area)``, with the parameters of :class:`Footprints`, whose
    ``centers``, ``diameter``, ``shape``, ``area``, ``pitch``, ``blocks``, ``pool``, ``near`` and ``coverage`` it has.

    Parameters
    ----------
    footprints
        What was measured as a whole.
    counts
        Measured counts, shape ``(n, G)``; a sparse matrix for whole transcriptomes.
    genes
        Names of the columns; may be left out where they are not asked for.
    total
        Counts of each footprint over all genes, shape ``(n,)``; those of ``counts`` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.measurement import Measurement
    >>> low = np.array([[[4.0, 8.0]]])  # one gene, 1 x 2 low-resolution bins of 2 x 2 bins each
    >>> measurement = Measurement.from_map(low, factor=2)
    >>> measurement.density.ravel()
    array([1., 2.])
    """

    footprints: Footprints
    counts: Counts
    genes: tuple[str, ...] = ()
    total: np.ndarray | None = None

    @overload
    def __init__(
        self, footprints: Footprints, counts: Counts, genes: tuple[str, ...] = ..., total: np.ndarray | None = ...
    ) -> None: ...

    @overload
    def __init__(
        self, counts: Counts, centers: np.ndarray, diameter: float, shape: Shape, area: np.ndarray
    ) -> None: ...

    def __init__(self, *given: Any, **named: Any) -> None:
        by_places = "centers" in named or (given and not isinstance(given[0], Footprints))
        footprints, counts, genes, total = (_by_places if by_places else _by_footprints)(*given, **named)
        for name, value in {"footprints": footprints, "counts": counts, "genes": genes, "total": total}.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.counts.ndim != 2 or len(self.footprints) != self.counts.shape[0]:
            raise ValueError(
                f"counts (n, G) and {len(self.footprints)} footprints do not fit together: found shape "
                f"{self.counts.shape}."
            )
        stored = self.counts.data if sparse.issparse(self.counts) else self.counts
        if not np.isfinite(stored).all() or (np.asarray(stored) < 0).any():
            raise ValueError("measured counts must be finite and not negative.")

    @classmethod
    def from_map(
        cls, low: np.ndarray, factor: int, area: np.ndarray | None = None, genes: Sequence[str] = ()
    ) -> Measurement:
        """The bins of a low-resolution map as footprints; bins that are NaN, or have no area, are left out.

        Parameters
        ----------
        low
            Counts per low-resolution bin, shape ``(G, h, w)``.
        factor
            Fine bins along the side of a low-resolution one.
        area
            Fine bins that were measured in each, shape ``(h, w)``; ``factor ** 2`` by default.
        genes
            Names of the genes.
        """
        _, height, width = low.shape
        area = np.full((height, width), float(factor**2)) if area is None else np.asarray(area, float)
        known = np.isfinite(low).all(0) & (area > 0)
        rows, columns = np.nonzero(known)
        centers = (np.column_stack([rows, columns]) + 0.5) * factor
        counts = np.asarray(low, np.float32)[:, rows, columns].T
        return cls(Footprints(centers, float(factor), "square", area[known]), counts, tuple(genes))

    # of the footprints, see there
    centers: ClassVar[property] = property(attrgetter("footprints.centers"))
    diameter: ClassVar[property] = property(attrgetter("footprints.diameter"))
    shape: ClassVar[property] = property(attrgetter("footprints.shape"))
    area: ClassVar[property] = property(attrgetter("footprints.area"))
    pitch: ClassVar[property] = property(attrgetter("footprints.pitch"))
    blocks: ClassVar[property] = property(attrgetter("footprints.blocks"))
    pool: ClassVar[property] = property(attrgetter("footprints.pool"))
    near: ClassVar[property] = property(attrgetter("footprints.near"))
    coverage: ClassVar[property] = property(attrgetter("footprints.coverage"))

    def __len__(self) -> int:
        return len(self.footprints)

    def __getitem__(self, rows: np.ndarray) -> Measurement:
        """Some of the footprints."""
        return Measurement(
            self.footprints[rows], self.counts[rows], self.genes, None if self.total is None else self.total[rows]
        )

    def of_genes(self, columns: Sequence[int] | np.ndarray) -> Measurement:
        """Some of the genes, by number, with dense counts."""
        counts = self.counts[:, columns]
        names = tuple(self.genes[int(i)] for i in columns) if self.genes else ()
        dense = counts if isinstance(counts, np.ndarray) else counts.toarray()
        return Measurement(self.footprints, dense, names, self.totals)

    @cached_property
    def totals(self) -> np.ndarray:
        """Counts of each footprint over all genes that were measured, shape ``(n,)``."""
        return np.asarray(self.counts.sum(1)).ravel() if self.total is None else self.total

    @cached_property
    def density(self) -> np.ndarray:
        """Counts per bin of each footprint, shape ``(n, G)``."""
        return self.counts / np.maximum(self.footprints.area, 1e-6)[:, None]

    def with_counts(self, counts: np.ndarray) -> Measurement:
        """The same footprints with other counts, shape ``(n, G)``."""
        return Measurement(self.footprints, np.asarray(counts, np.float32))

    def interpolate(
        self, y0: int, x0: int, height: int, width: int, kernel: Kernel = "gaussian"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Map of the measured density on a window: ``sum K counts / sum K area``, footprints weighted by a kernel.

        It knows no lattice, so that square bins, hexagonal spots and sections with holes go one way; a bin's value is
        the same whatever the window, and turns and mirrors with the data.

        Parameters
        ----------
        y0, x0, height, width
            The window, in bins.
        kernel
            ``"gaussian"`` (as wide as bilinear interpolation, and smooth), ``"nearest"``, ``"linear"`` or ``"cubic"``
            (Keys, 1981, a = -0.5): on a lattice of squares these are what image libraries call nearest, bilinear and
            bicubic.

        Returns
        -------
        Counts per bin ``(G, height, width)``, zero where nothing is near; and ``(1, height, width)``, 1 within about
        one pitch of a footprint, else 0.
        """
        footprints = self.footprints
        near = footprints.near(y0, x0, height, width, REACH * footprints.pitch)
        distance = footprints.distances(near, y0, x0, height, width)
        smooth = [KERNELS["gaussian"](d) for d in distance]
        valid = smooth[0] @ smooth[1].T >= WITHIN_A_PITCH
        along_y, along_x = smooth if kernel == "gaussian" else [KERNELS[kernel](d) for d in distance]
        weight = (along_y * footprints.area[near]) @ along_x.T
        along_y, along_x = along_y.astype(np.float32), along_x.astype(np.float32)
        at_a_time = max(1, int(MOST_VALUES / max(1, height * len(near))))
        summed = np.concatenate(
            [
                (self.counts[near, g : g + at_a_time].T[:, None, :] * along_y) @ along_x.T
                for g in range(0, self.counts.shape[1], at_a_time)
            ]
            or [np.zeros((0, height, width), np.float32)]
        )
        density = np.where(valid & (weight > 1e-9), summed / np.maximum(weight, 1e-9), 0)
        if kernel == "cubic":  # of an incomplete lattice, its negative lobes leave next to nothing to divide by
            complete = weight > 0.5 * ((np.abs(along_y) * footprints.area[near]) @ np.abs(along_x).T)
            if not complete[valid].all():
                density = np.where(complete, density, self.interpolate(y0, x0, height, width)[0])
        return np.maximum(density, 0).astype(np.float32), valid[None].astype(np.float32)


class Consistency:
    """Scales a fine map so that its sum over each footprint of a window is what was measured there.

    Every bin is multiplied by the ratio of measured to predicted counts of its footprint, which keeps zero bins and
    proportions within a footprint as they are and cannot make counts negative. Bins in several footprints get the mean
    ratio, weighted by coverage, and the sweep is repeated until all agree to 1e-4. Footprints that reach out of the
    window are left alone. A footprint with a measurement but no prediction is filled evenly.

    Parameters
    ----------
    measurement
        What was measured.
    y0, x0, height, width
        The window, in bins.
    tissue
        Which of its bins are tissue, shape ``(height, width)``; what was measured lies there. All by default. Of a
        square that was measured in part, and it is not known in which, all tissue gets the density that was measured.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from stgen.measurement import Consistency, Measurement
    >>> measurement = Measurement.from_map(np.array([[[6.0]]]), factor=2)
    >>> agree = Consistency(measurement, 0, 0, 2, 2)
    >>> agree(torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])).round().ravel()
    tensor([0., 2., 2., 2.])
    """

    def __init__(
        self, measurement: Measurement, y0: int, x0: int, height: int, width: int, tissue: np.ndarray | None = None
    ) -> None:
        footprints = measurement.footprints
        rows, covered = footprints.coverage(y0, x0, height, width)
        if tissue is not None:
            covered = sparse.csr_array(covered * tissue.reshape(1, -1))
            covered.eliminate_zeros()
        seen = np.flatnonzero(covered.sum(1) > 0)  # a footprint without tissue cannot be agreed with
        rows, covered = rows[seen], covered[seen]
        per_bin = np.asarray(covered.sum(0)).ravel()
        share = covered.multiply(1 / np.maximum(per_bin, 1e-12)[None]).T
        self.rows = rows
        self.pool = _torch(covered)  # (n, P)
        self.share = _torch(share)  # (P, n), rows sum to 1 where a footprint covers the bin
        in_tissue = np.ones(len(rows))
        if footprints.shape == "square":
            in_tissue = np.maximum(covered.sum(1) / np.maximum(footprints.area[rows], 1e-6), 1)
        self.target = torch.as_tensor(np.asarray(measurement.counts[rows] * in_tissue[:, None], np.float32))
        self.outside = torch.as_tensor(per_bin == 0)
        self.disjoint = bool(np.diff(covered.tocsc().indptr).max(initial=0) <= 1)

    def to(self, device: torch.device | str) -> Consistency:
        """Move to a device."""
        for name in ("pool", "share", "target", "outside"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def toward(self, counts: Tensor) -> Tensor:
        """Scale counts that may still be negative, at most ``MOST_SCALED`` times up or down, once.

        For estimates on the way to a sample: their noise cancels in the sum over a footprint, but not if its negative
        half were cut off.
        """
        if len(self.rows) == 0:
            return counts
        x = counts.flatten(2).permute(2, 0, 1).flatten(1)
        target = self.target.repeat(1, len(counts))
        pooled = self.pool @ x
        ratio = (target / pooled.clamp(min=1e-6)).clamp(1 / MOST_SCALED, MOST_SCALED)
        ratio = torch.where(pooled > 0, ratio, torch.ones_like(ratio))  # less than nothing cannot be scaled to anything
        x = x * torch.where(self.outside[:, None], 1.0, self.share @ ratio)
        return x.unflatten(1, counts.shape[:2]).permute(1, 2, 0).unflatten(2, counts.shape[2:])

    def __call__(self, counts: Tensor) -> Tensor:
        """Project counts ``(S, G, height, width)``; the result is not negative and agrees with the measurement."""
        if len(self.rows) == 0:
            return counts.clamp(min=0)
        n_samples, n_genes = counts.shape[:2]
        x = counts.clamp(min=0).flatten(2).permute(2, 0, 1).flatten(1)  # (P, S G)
        target = self.target.repeat(1, n_samples)
        empty = (self.pool @ x <= NOTHING * target) & (target > 0)
        if empty.any():
            x = x + self.share @ torch.where(empty, target, torch.zeros_like(target))
        for _ in range(1 if self.disjoint else MAX_SWEEPS):
            pooled = self.pool @ x
            if not self.disjoint and ((pooled - target).abs() <= TOLERANCE * target).all():
                break
            ratio = self.share @ torch.where(target > 0, target / pooled.clamp(min=1e-30), torch.zeros_like(target))
            x = x * torch.where(self.outside[:, None], 1.0, ratio)
        return x.unflatten(1, (n_samples, n_genes)).permute(1, 2, 0).unflatten(2, counts.shape[2:])


Fields = tuple[Footprints, Counts, tuple[str, ...], np.ndarray | None]


def _by_footprints(
    footprints: Footprints, counts: Counts, genes: tuple[str, ...] = (), total: np.ndarray | None = None
) -> Fields:
    return footprints, counts, genes, total


def _by_places(counts: Counts, centers: np.ndarray, diameter: float, shape: Shape, area: np.ndarray) -> Fields:
    return Footprints(centers, diameter, shape, area), counts, (), None


def _torch(matrix: sparse.sparray) -> Tensor:
    """A sparse matrix as torch's, float32."""
    matrix = sparse.coo_array(matrix)
    index = torch.as_tensor(np.stack(matrix.coords).astype(np.int64))
    return torch.sparse_coo_tensor(
        index, torch.as_tensor(matrix.data.astype(np.float32)), matrix.shape, check_invariants=True
    ).coalesce()
