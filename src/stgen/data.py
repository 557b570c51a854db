"""What a batch is, datasets over arrays, and the order in which a training run sees them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from stgen.measurement import Kernel, Measurement
from stgen.transforms import TransformName, transform_counts

__all__ = [
    "Batch",
    "ImageReader",
    "MapData",
    "MapInputs",
    "SpotData",
    "StepSampler",
    "dihedral",
    "group_folds",
    "low_resolution_input",
]


Rectangle = tuple[int, int, int, int]
"""Some bins of a grid, as ``(y, x, height, width)``."""

MAPS = {"x", "tissue", "h", "y", "valid", "s"}  # entries of a batch that turn with the section


class Batch(TypedDict, total=False):
    """One batch. Which entries a model needs is its own affair; what they mean is not.

    ``B`` items, ``G`` genes, ``D`` features, ``C`` image channels, ``H x W`` bins with ``s x s`` image pixels in each.
    """

    index: Tensor  # (B,) row of each item in its dataset
    x: Tensor  # (B, G) or (B, G, H, W) expression, on the model's transform (log counts, say); never standardized
    h: Tensor  # (B, D) histology embedding, or (B, C, s H, s W) image
    mean: Tensor  # (B, G) prediction of x by a mean model that never saw this item, on the scale of x
    y: Tensor  # (B, G, H, W) low-resolution counts per bin, interpolated, on the model's transform
    valid: Tensor  # (B, 1, H, W) 1 where y was measured nearby, else 0
    tissue: Tensor  # (B, 1, H, W) 1 where x is known, else 0
    s: Tensor  # (B, 1, s H, s W) share of each image pixel that lies in a nucleus
    text: Tensor  # (B, D) vector of a prompt
    gene: Tensor  # (B, K) numbers of the genes that are wanted, of a model that samples each by itself; all by default


def with_each(batch: Batch, change: Callable[[Tensor], Tensor], names: Collection[str] | None = None) -> Batch:
    """The batch with its entries changed: all of them, or those that are named and there."""
    entries = cast(dict[str, Tensor], batch)  # to a type checker, the keys of a TypedDict are literals
    return cast(Batch, {k: change(v) if names is None or k in names else v for k, v in entries.items()})


def dihedral(x: Tensor, view: int) -> Tensor:
    """One of the eight rotations and reflections of a square, applied to the last two dimensions.

    Parameters
    ----------
    x
        Images or maps, shape ``(..., H, W)``.
    view
        0 is the identity, 1 to 3 are quarter turns, 4 to 7 the same after a left-right flip.

    Examples
    --------
    >>> import torch
    >>> from stgen.data import dihedral
    >>> dihedral(torch.tensor([[1, 2], [3, 4]]), 4)
    tensor([[2, 1],
            [4, 3]])
    """
    if not 0 <= view < 8:
        raise ValueError(f"`view` must lie in 0..7, found {view}.")
    return torch.rot90(x.flip(-1) if view >= 4 else x, view % 4, (-2, -1))


def _float32(values: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.float32))


@dataclass(init=False)
class SpotData:
    """Expression and histology embeddings of locations, in memory.

    Parameters
    ----------
    x
        Expression on the model's transform, shape ``(n, G)``.
    h
        Histology embeddings, shape ``(n, D)`` or, for the dihedral views of each patch, ``(n, V, D)``.
    group
        Which locations belong together (section, or block of a section), shape ``(n,)``: cross-validation inside a
        model keeps groups whole, because neighbors are nearly copies of each other.
    mean
        Prediction of ``x`` by a mean model that never saw the location, shape ``(n, G)``; a model whose transformer
        works on residuals puts it there.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.data import SpotData
    >>> data = SpotData(np.zeros((4, 3)), np.ones((4, 8, 5)))
    >>> len(data), data.n_views, data[2, 7]["h"].shape
    (4, 8, torch.Size([5]))
    """

    x: Tensor  # (n, G)
    h: Tensor  # (n, V, D)
    group: np.ndarray
    mean: Tensor | None
    noise_levels: ClassVar[int] = 8  # at which each validation item is scored: enough to compare two evaluations

    def __init__(
        self,
        x: np.ndarray | Tensor,
        h: np.ndarray | Tensor,
        group: np.ndarray | None = None,
        mean: np.ndarray | Tensor | None = None,
    ) -> None:
        self.x, views = _float32(x), _float32(h)
        self.h = views[:, None] if views.ndim == 2 else views
        self.n_views = self.h.shape[1]
        self.group = np.zeros(len(self.x), int) if group is None else np.asarray(group)
        if not len(self.x) == len(self.h) == len(self.group):
            raise ValueError(f"x, h and group differ in length: {len(self.x)}, {len(self.h)}, {len(self.group)}.")
        self.mean = None if mean is None else _float32(mean)
        if self.mean is not None and self.mean.shape != self.x.shape:
            raise ValueError(f"x and mean differ in shape: {tuple(self.x.shape)}, {tuple(self.mean.shape)}.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, item: int | tuple[int, int]) -> Batch:
        i, view = item if isinstance(item, tuple) else (item, 0)
        batch: Batch = {"index": torch.as_tensor(i), "x": self.x[i], "h": self.h[i, view]}
        if self.mean is not None:
            batch["mean"] = self.mean[i]
        return batch

    def fingerprint(self) -> list[str]:
        """What tells this dataset from another, for the checkpoint of a run."""
        return [f"{value.double().norm():.5g}" for value in (self.x, self.h[:, 0])]

    def subset(self, rows: np.ndarray) -> SpotData:
        """The same data at some rows."""
        return SpotData(self.x[rows], self.h[rows], self.group[rows], None if self.mean is None else self.mean[rows])


class ImageReader(Protocol):
    """An image on a grid of bins: ``read(y, x, height, width)`` in bins gives ``(C, s height, s width)``, with ``s`` pixels a bin."""

    px_per_bin: int
    """Pixels along a bin."""

    @property
    def n_channels(self) -> int:
        """Number of channels ``C``."""

    def __call__(self, y: int, x: int, height: int, width: int, /) -> np.ndarray:
        """The image in some bins; beyond its edge too."""


@dataclass(frozen=True)
class MapInputs:
    """What the maps of a section are made from, all on one grid of bins, resolved once: arrays, functions and numbers.

    Models are fitted on it (:class:`MapData` cuts tiles from it) and sample from it, window by window; nothing is read
    of the image before a window asks for it.

    Parameters
    ----------
    tissue
        Which bins get a result or, for training, are known, shape ``(H, W)``.
    bin_um
        Side of a bin in µm.
    image
        The histology, of models that look at it: gives ``(C, s height, s width)`` of a window.
    measurement
        The low-resolution data, if there are any.
    labels
        The share of each pixel that lies in a nucleus, ``(1, s height, s width)`` of a window, for models that look at
        it.
    text
        What a prompt says, ``(D,)``, for models that take one.
    truth
        For training: counts per bin, shape ``(G, H, W)``, an array or anything that can be sliced into one (dask,
        zarr). NaN where nothing is known.
    seen
        Which footprints of the measurement lie on the grid, and on the image if there is one, shape ``(n,)``; all by
        default.
    """

    tissue: np.ndarray
    bin_um: float = 10.0
    image: ImageReader | None = None
    measurement: Measurement | None = None
    labels: ImageReader | None = None
    text: np.ndarray | None = None
    truth: Any = None
    seen: np.ndarray | None = None

    @property
    def measured(self) -> Measurement:
        """The low-resolution data, of a section that has some."""
        if self.measurement is None:
            raise ValueError("this section has no low-resolution data.")
        return self.measurement

    @property
    def usable(self) -> np.ndarray:
        """Which footprints of the measurement are :attr:`seen`, shape ``(n,)``."""
        return np.ones(len(self.measured.footprints), bool) if self.seen is None else self.seen

    @property
    def height(self) -> int:
        """Number of rows of bins."""
        return self.tissue.shape[0]

    @property
    def width(self) -> int:
        """Number of columns of bins."""
        return self.tissue.shape[1]

    def conditions(self, window: Rectangle, transform: TransformName, kernel: Kernel) -> Batch:
        """What a model of maps is told of a window ``(y, x, height, width)``: entries of a batch, without its first dimension."""
        batch: Batch = {}
        if self.image is not None:
            batch["h"] = torch.as_tensor(np.asarray(self.image(*window), np.float32))
        if self.labels is not None:
            batch["s"] = torch.as_tensor(np.asarray(self.labels(*window), np.float32))
        if self.text is not None:
            batch["text"] = torch.as_tensor(self.text)
        if self.measurement is not None:
            batch |= low_resolution_input(self.measurement, *window, transform, kernel)
        return batch

    def tissue_in(self, window: Rectangle) -> np.ndarray:
        """Which bins of a window are tissue, shape ``(height, width)``; none beyond the grid."""
        y, x, height, width = window
        tissue = self.tissue[y : y + height, x : x + width]
        return np.pad(tissue, ((0, height - tissue.shape[0]), (0, width - tissue.shape[1])))


class MapData:
    """Aligned tiles of map, low-resolution map and histology, cut from sections when they are asked for.

    Parameters
    ----------
    sections
        The sections.
    tile
        Side of a tile, in bins.
    transform
        Scale of ``x`` and ``y``, see :func:`stgen.transforms.transform_counts`.
    kernel
        How ``y`` is interpolated, see :meth:`stgen.measurement.Measurement.interpolate`.
    stride
        Bins between the corners of neighboring tiles; ``tile // 16`` by default, so that the same tissue is seen at
        many offsets.
    min_tissue
        Share of a tile that must be known.

    Attributes
    ----------
    corners
        Section, row and column of each tile's corner, shape ``(n, 3)``.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.data import MapData, MapInputs
    >>> from stgen.measurement import Measurement
    >>> counts = np.ones((2, 32, 48))
    >>> low = Measurement.from_map(np.full((2, 4, 6), 64.0), factor=8)
    >>> image = lambda y, x, h, w: np.zeros((3, 2 * h, 2 * w))
    >>> section = MapInputs(np.ones((32, 48), bool), image=image, measurement=low, truth=counts)
    >>> tiles = MapData([section], tile=32, stride=8)
    >>> len(tiles), tiles[0, 5]["x"].shape, tiles[0]["h"].shape
    (3, torch.Size([2, 32, 32]), torch.Size([3, 64, 64]))
    """

    n_views = 8
    noise_levels: ClassVar[int] = 1  # at which each validation tile is scored; its many bins make up for the one level

    def __init__(
        self,
        sections: Sequence[MapInputs],
        *,
        tile: int,
        transform: TransformName = "log1p_raw",
        kernel: Kernel = "gaussian",
        stride: int | None = None,
        min_tissue: float = 0.5,
    ) -> None:
        self.sections, self.tile, self.transform, self.kernel = list(sections), tile, transform, kernel
        stride = stride or max(1, tile // 16)
        corners = [np.empty((0, 3), int)]
        for number, section in enumerate(self.sections):
            height, width = section.tissue.shape
            y, x = (np.unique(np.r_[0 : max(n - tile, 0) + 1 : stride, max(n - tile, 0)]) for n in (height, width))
            cumulative = np.pad(section.tissue.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            y1, x1 = np.minimum(y + tile, height), np.minimum(x + tile, width)
            known = (
                cumulative[np.ix_(y1, x1)]
                - cumulative[np.ix_(y, x1)]
                - cumulative[np.ix_(y1, x)]
                + cumulative[np.ix_(y, x)]
            )
            i, j = np.nonzero(known >= max(min_tissue * tile**2, 1))
            corners.append(np.column_stack([np.full(len(i), number), y[i], x[j]]))
        self.corners = np.concatenate(corners)

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, item: int | tuple[int, int]) -> Batch:
        i, view = item if isinstance(item, tuple) else (item, 0)
        number, y, x = self.corners[i].tolist()
        section, tile = self.sections[number], self.tile
        counts = np.asarray(section.truth[:, y : y + tile, x : x + tile], np.float32)
        known = section.tissue[y : y + tile, x : x + tile] & np.isfinite(counts).all(0)
        beyond = ((0, 0), *((0, tile - n) for n in known.shape))  # of a section smaller than a tile
        counts = np.pad(np.where(known, counts, 0), beyond)
        tiles: Batch = {
            "x": torch.as_tensor(transform_counts(counts, np.ones(1), self.transform)),
            "tissue": torch.as_tensor(np.pad(known[None].astype(np.float32), beyond)),
            "h": torch.zeros(1, tile, tile),
            "y": torch.zeros(len(counts), tile, tile),
            "valid": torch.zeros(1, tile, tile),
        }
        tiles |= section.conditions((y, x, tile, tile), self.transform, self.kernel)
        return {"index": torch.as_tensor(i), **with_each(tiles, lambda maps: dihedral(maps, view).contiguous(), MAPS)}

    def some(self, n: int) -> Iterator[Batch]:
        """At most ``n`` tiles, evenly spread over all, each as a batch of one."""
        for i in np.unique(np.linspace(0, len(self) - 1, n).round().astype(int)) if len(self) else ():
            yield with_each(self[int(i)], lambda value: value[None])

    def fingerprint(self) -> list[str]:
        """What tells this dataset from another, for the checkpoint of a run."""
        ends = [self[i] for i in (0, len(self) - 1)] if len(self) else []
        entries = [value for item in ends for value in item.values() if isinstance(value, Tensor)]
        return [f"{value.double().norm():.5g}" for value in entries]


def low_resolution_input(
    measurement: Measurement,
    y0: int,
    x0: int,
    height: int,
    width: int,
    transform: TransformName,
    kernel: Kernel = "gaussian",
) -> Batch:
    """The entries ``y`` (G, height, width) and ``valid`` (1, height, width) of a batch, for one window.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.data import low_resolution_input
    >>> from stgen.measurement import Measurement
    >>> low = Measurement.from_map(np.full((1, 2, 2), 12.0), factor=2)
    >>> low_resolution_input(low, 0, 0, 4, 4, "none")["y"].mean()
    tensor(3.)
    """
    y, valid = measurement.interpolate(y0, x0, height, width, kernel)
    return {"y": torch.as_tensor(transform_counts(y, np.ones(1), transform)), "valid": torch.as_tensor(valid)}


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of ``(row, view)`` for training steps ``start`` to ``stop``; each a function of the seed and the step.

    Rows come in seeded permutations, one after the other, so that each is seen equally often; the view is drawn anew
    each time. Because a step's batch depends on nothing before it, a run that starts at step ``k`` sees what an
    uninterrupted one would have seen from there.

    Parameters
    ----------
    n_rows, n_views
        Size of the dataset and of the augmentation.
    batch_size
        Rows in a batch.
    start, stop
        First step, and the step before which to stop.
    seed
        Random seed.

    Examples
    --------
    >>> from stgen.data import StepSampler
    >>> whole = list(StepSampler(10, 8, batch_size=4, start=0, stop=6, seed=0))
    >>> whole[3:] == list(StepSampler(10, 8, batch_size=4, start=3, stop=6, seed=0))
    True
    """

    def __init__(self, n_rows: int, n_views: int, *, batch_size: int, start: int, stop: int, seed: int) -> None:
        self.n_rows, self.n_views, self.batch_size = n_rows, n_views, batch_size
        self.start, self.stop, self.seed = start, stop, seed

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, int)
        for step in range(self.start, self.stop):
            rows = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.n_rows != epoch:
                    epoch = position // self.n_rows
                    order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.n_rows)
                rows.append(int(order[position % self.n_rows]))
            views = np.random.default_rng([self.seed, 1, step]).integers(self.n_views, size=len(rows))
            yield [(row, int(view)) for row, view in zip(rows, views, strict=True)]


def group_folds(group: np.ndarray, n_folds: int = 5) -> np.ndarray:
    """Number of the cross-validation fold of each row; groups stay whole and folds are of about equal size.

    With a single group there is nothing to keep whole, and contiguous runs of rows become the folds.

    Parameters
    ----------
    group
        Group of each row, shape ``(n,)``.
    n_folds
        Number of folds, at most; there are never more than groups (or rows).

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.data import group_folds
    >>> group_folds(np.array([0, 0, 1, 1, 2, 2]), 3)
    array([2, 2, 1, 1, 0, 0])
    """
    groups, group, sizes = np.unique(group, return_inverse=True, return_counts=True)
    if len(groups) == 1:
        return np.arange(len(group)) * min(n_folds, len(group)) // len(group)
    n_folds = min(n_folds, len(groups))
    fold, filled = np.zeros(len(groups), int), np.zeros(n_folds)
    for g in np.lexsort((-np.arange(len(groups)), -sizes)):  # largest first, each to the emptiest fold
        fold[g] = filled.argmin()
        filled[fold[g]] += sizes[g]
    return fold[group]
