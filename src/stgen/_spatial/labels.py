"""Masks of cells or nuclei, read on a grid of bins."""

from __future__ import annotations

import logging

import numpy as np
import shapely
from spatialdata import SpatialData
from xarray import DataArray, DataTree

from stgen._checks import only_key
from stgen._spatial.grid import Grid, apply_affine
from stgen._spatial.image import image_levels

__all__ = ["LabelsWindow", "finest_mask", "labels_window", "outlines"]

logger = logging.getLogger("stgen")

SAMPLES = 2  # along a side of a pixel that is read
ROWS = 2048  # of a mask that are read at a time
STRIP = 32  # bins that are looked at at a time, in both directions


def finest_mask(element: DataArray | DataTree, key: str) -> DataArray:
    """The finest level of a mask, ``(y, x)``.

    Raises
    ------
    TypeError
        If it does not hold whole numbers with these dimensions.
    """
    mask = image_levels(element)[0]
    if set(mask.dims) != {"y", "x"} or not np.issubdtype(mask.dtype, np.integer):
        raise TypeError(
            f"{key!r} must hold whole numbers with the dimensions y, x; found {mask.dtype} with {tuple(mask.dims)}."
        )
    return mask.transpose("y", "x")


def labels_window(
    sdata: SpatialData, labels_key: str, grid: Grid, *, px_per_bin: int, coordinate_system: str | None = None
) -> LabelsWindow:
    """A reader of a mask on a grid.

    Raises
    ------
    KeyError
        If there is no such mask.
    TypeError
        If the element is no mask.
    ValueError
        If mask and grid share no coordinate system, or do not overlap there.
    """
    only_key(sdata.labels, labels_key, argument="labels_key", what="mask in sdata.labels")
    mask = finest_mask(sdata.labels[labels_key], labels_key)
    system = grid.shared_system(sdata, labels_key, coordinate_system)
    matrix = grid.to_element(sdata, labels_key, system)
    height, width = mask.shape
    covered = grid.covered_by(matrix, width, height)
    if covered <= 0:
        raise ValueError(
            f"the labels {labels_key!r} ({height} x {width} pixels) and the map do not overlap in the coordinate "
            f"system {system!r}. Correct the transformation of one of them "
            "(spatialdata.transformations.set_transformation), or outline the nuclei of the image that goes with the "
            "map: stgen.pp.segment_nuclei."
        )
    if covered < 0.9:
        logger.warning("the labels %r cover %.0f %% of the map; beyond them there are none.", labels_key, 100 * covered)
    return LabelsWindow(mask, matrix, px_per_bin)


class LabelsWindow:
    """Which share of each pixel is labeled: ``window(y0, x0, height, width)`` in bins.

    Returns float32 ``(1, height * px_per_bin, width * px_per_bin)``, at 2 x 2 places per pixel. Beyond the mask nothing
    is labeled. A bin has the same values in whatever window it is read.

    Parameters
    ----------
    mask
        Labels, 0 for none, ``(y, x)``.
    matrix
        From bin coordinates to pixels of the mask, 3 x 3 over x, y.
    px_per_bin
        Pixels along each side of a bin.
    """

    def __init__(self, mask: DataArray, matrix: np.ndarray, px_per_bin: int) -> None:
        self.px_per_bin, self.n_channels = px_per_bin, 1
        self._mask, self._matrix = mask, matrix

    def __call__(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """The share that is labeled in ``height`` x ``width`` bins from row ``y0`` and column ``x0`` on."""
        px = self.px_per_bin
        share = np.empty((1, height * px, width * px), np.float32)
        for y in range(0, height, STRIP):
            for x in range(0, width, STRIP):
                part = share[0, y * px : (y + STRIP) * px, x * px : (x + STRIP) * px]
                part[:] = self._share(y0 + y, x0 + x, part.shape[0] // px, part.shape[1] // px)
        return share

    def _share(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        n = self.px_per_bin * SAMPLES
        y, x = ((start * n + np.arange(size * n) + 0.5) / n for start, size in ((y0, height), (x0, width)))
        places = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1)
        column, row = np.floor(apply_affine(self._matrix, places)).astype(int).transpose(2, 0, 1)
        inside = (row >= 0) & (row < self._mask.shape[0]) & (column >= 0) & (column < self._mask.shape[1])
        labeled = np.zeros(inside.shape, np.float32)
        if inside.any():
            top, left = row[inside].min(), column[inside].min()
            part = np.asarray(self._mask[top : row[inside].max() + 1, left : column[inside].max() + 1].data)
            labeled[inside] = part[row[inside] - top, column[inside] - left] > 0
        shape = height * self.px_per_bin, SAMPLES, width * self.px_per_bin, SAMPLES
        return labeled.reshape(shape).mean((1, 3))


def outlines(mask: DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Outlines of the labels of a mask ``(y, x)`` along the sides of its pixels, from 0 at its corner.

    Returns
    -------
    The labels, ``(n,)``, and a polygon of each, or several as one, ``(n,)``.
    """
    labels, boxes = [], []
    for top in range(0, mask.sizes["y"], ROWS):
        values = np.asarray(mask[top : top + ROWS].data)
        starts = np.diff(values, axis=1, prepend=values[:, :1] + 1) != 0  # of runs of one label in a row
        y, x = np.nonzero(starts)
        after = np.append(x[1:], values.shape[1])
        stop = np.where(np.append(y[1:], -1) == y, after, values.shape[1])
        label = values[y, x]
        kept = label != 0
        labels.append(label[kept])
        boxes.append(shapely.box(x[kept], y[kept] + top, stop[kept], y[kept] + top + 1))
    label, box_of = np.concatenate(labels), np.concatenate(boxes)
    order = np.argsort(label, kind="stable")
    numbers, first = np.unique(label[order], return_index=True)
    parts = np.split(box_of[order], first[1:]) if len(numbers) else []
    whole = np.array([shapely.union_all(part) for part in parts], dtype=object)
    return numbers, shapely.simplify(whole, 0)  # without corners on straight sides
