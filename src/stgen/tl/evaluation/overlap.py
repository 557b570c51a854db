"""Which share of which bin each cell covers, exactly, for polygons, circles and masks under any affine transformation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import shapely
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from xarray import DataArray

from stgen._spatial.grid import Grid, apply_affine
from stgen._spatial.identity import check_element_ids
from stgen._spatial.labels import finest_mask

__all__ = ["Overlap", "find_overlap"]

TILE = 2048  # pixels along a side of a mask that are read at a time
BATCH = 20_000  # polygons at a time
CIRCLE_SIDES = 32
ROUNDING = 1e-9  # of a bin


class Edges(NamedTuple):
    """Straight pieces of the outlines of cells, with the cell on the left of each (x to the right, y up)."""

    cell: np.ndarray
    """Number of the cell, ``(n,)``."""
    start: np.ndarray
    """Where they begin, as x, y, ``(n, 2)``."""
    stop: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """Cells on a grid of bins, and the pairs of a cell and a bin that overlap."""

    instances: np.ndarray
    """Name or number of each cell in its element, ``(n,)``."""
    area: np.ndarray
    """Area of each cell in bins, on the grid or not, ``(n,)``."""
    centers: np.ndarray
    """Centroids as x, y in bins, ``(n, 2)``."""
    cell: np.ndarray
    """Position of each pair's cell in ``instances``."""
    y: np.ndarray
    """Row of each pair's bin."""
    x: np.ndarray
    """Column of each pair's bin."""
    share: np.ndarray
    """Share of the bin that the cell covers. A pair can occur several times; its shares add up."""


def find_overlap(sdata: SpatialData, key: str, grid: Grid, coordinate_system: str | None = None) -> Overlap:
    """The overlap of shapes or of a mask with the bins of a grid; cells without an area are left out.

    Raises
    ------
    TypeError
        If the element is neither shapes of polygons or circles nor a mask ``(y, x)`` of whole numbers.
    ValueError
        If the element and the grid share no coordinate system.
    """
    element = sdata[key]
    check_element_ids(element, key)
    to_bins = np.linalg.inv(grid.to_element(sdata, key, coordinate_system))
    names = None
    if isinstance(element, GeoDataFrame):
        names, batches = element.index.to_numpy(), _edges_of_shapes(element, key)
    else:
        batches = _edges_of_labels(finest_mask(element, key))
    pairs, moments = [], []
    for edges in batches:
        edges = _moved(edges, to_bins)
        pairs.append(_shares(edges, grid.height, grid.width))
        moments.append(_moments(edges))
    numbers, summed = _added(moments)
    there = summed[:, 0] > ROUNDING
    numbers, summed = numbers[there], summed[there]
    cell, y, x, share = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    kept = np.isin(cell, numbers)
    return Overlap(
        instances=numbers if names is None else names[numbers],
        area=summed[:, 0],
        centers=summed[:, 1:] / summed[:, :1],
        cell=np.searchsorted(numbers, cell[kept]),
        y=y[kept],
        x=x[kept],
        share=share[kept],
    )


# ---- outlines --------------------------------------------------------------------------------------------------------


def _edges_of_shapes(shapes: GeoDataFrame, key: str) -> Iterator[Edges]:
    """Outlines of circles or polygons, batch by batch; a cell's number is its row."""
    kinds = set(shapes.geom_type)
    if not kinds or not (kinds == {"Point"} or kinds <= {"Polygon", "MultiPolygon"}):
        found = ", ".join(sorted(map(str, kinds))) or "nothing"
        raise TypeError(f"{key!r} holds {found}; cells must be polygons or circles.")
    outlines = _circles if kinds == {"Point"} else _polygons
    for begin in range(0, len(shapes), BATCH):
        cell, start, stop = outlines(shapes.iloc[begin : begin + BATCH])
        yield Edges(cell + begin, start, stop)


def _circles(circles: GeoDataFrame) -> Edges:
    """Circles as regular polygons of the same area."""
    angle = 2 * np.pi * np.arange(CIRCLE_SIDES + 1) / CIRCLE_SIDES
    radius = circles["radius"].to_numpy(float) * np.sqrt(angle[1] / np.sin(angle[1]))
    center = np.column_stack([circles.geometry.x, circles.geometry.y])
    corners = center[:, None] + radius[:, None, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    cell = np.repeat(np.arange(len(circles)), CIRCLE_SIDES)
    return Edges(cell, corners[:, :-1].reshape(-1, 2), corners[:, 1:].reshape(-1, 2))


def _polygons(shapes: GeoDataFrame) -> Edges:
    """Polygons with or without holes, those that are not valid repaired."""
    polygons = shapes.geometry.to_numpy().copy()
    wrong = ~shapely.is_valid(polygons)
    polygons[wrong] = shapely.buffer(polygons[wrong], 0)
    parts, cell = shapely.get_parts(polygons, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    is_hole = np.diff(part, prepend=-1) == 0  # the first ring of a part is its outside
    rings = np.where(shapely.is_ccw(rings) == is_hole, shapely.reverse(rings), rings)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    inside = np.diff(ring) == 0
    return Edges(cell[part[ring[:-1][inside]]], xy[:-1][inside], xy[1:][inside])


def _edges_of_labels(mask: DataArray) -> Iterator[Edges]:
    """Outlines of the labels of a mask, tile by tile, where they end at the borders; a cell's number is its label."""
    height, width = mask.shape
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            tile = np.asarray(mask[top : top + TILE, left : left + TILE].data).astype(np.int64)
            tile = np.pad(tile, 1)
            upright = _faces(tile[1:-1, :-1], tile[1:-1, 1:], np.array([0, 1]))  # between left and right neighbors
            lying = _faces(tile[1:, 1:-1], tile[:-1, 1:-1], np.array([1, 0]))  # between lower and upper neighbors
            cell, start, stop = (np.concatenate(parts) for parts in zip(upright, lying, strict=True))
            yield Edges(cell, start + [left, top], stop + [left, top])


def _faces(before: np.ndarray, behind: np.ndarray, along: np.ndarray) -> Edges:
    """Sides of pixels between two labels: once for the one before, and in the other direction for the one behind."""
    y, x = np.nonzero(before != behind)
    start = np.column_stack([x, y]).astype(np.float64)
    stop = start + along
    cell = np.concatenate([before[y, x], behind[y, x]])
    labeled = cell != 0
    start, stop = np.concatenate([start, stop]), np.concatenate([stop, start])
    return Edges(cell[labeled], start[labeled], stop[labeled])


def _moved(edges: Edges, matrix: np.ndarray) -> Edges:
    """Edges under a 3 x 3 matrix over x, y, still with the cell on their left."""
    start, stop = apply_affine(matrix, edges.start), apply_affine(matrix, edges.stop)
    mirrored = np.linalg.det(matrix[:2, :2]) < 0
    return Edges(edges.cell, stop, start) if mirrored else Edges(edges.cell, start, stop)


# ---- areas -----------------------------------------------------------------------------------------------------------


def _shares(edges: Edges, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Cell, row, column and share of every bin that a cell covers in part or whole.

    By Green's theorem: what an edge of height ``dy`` adds to the covered area of its row is ``-dy`` in all columns to
    its right, and the part of it that lies to the right of the edge in its own column. Outlines are closed, so that the
    sums over each row of a cell end at zero.
    """
    (x0, y0), (x1, y1) = edges.start.T, edges.stop.T
    edge, row = _cuts(y0, y1)  # at the lines between rows
    inside = (row >= 0) & (row < height) & (y0 != y1)[edge]
    edge, row = edge[inside], row[inside]
    slope = (x1 - x0)[edge] / (y1 - y0)[edge]
    low, high = np.maximum(np.minimum(y0, y1)[edge], row), np.minimum(np.maximum(y0, y1)[edge], row + 1)
    ends = x0[edge] + slope * (low - y0[edge]), x0[edge] + slope * (high - y0[edge])
    left, right = np.minimum(*ends), np.maximum(*ends)
    covers = (high - low) * np.sign(y0 - y1)[edge]
    cell = edges.cell[edge]

    piece, column = _cuts(left, right)  # at the lines between columns
    begin, end = np.maximum(left[piece], column), np.minimum(right[piece], column + 1)
    span = (right - left)[piece]
    part = np.divide(end - begin, span, out=np.ones_like(span), where=span > 0)
    covers, cell, row = covers[piece] * part, cell[piece], row[piece]
    middle = np.where((column >= 0) & (column < width), (begin + end) / 2 - column, 0)
    return _filled(cell, row, np.clip(column, 0, width), covers * (1 - middle), covers * middle, height, width)


def _cuts(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals from ``a`` to ``b`` (or back) cut at whole numbers: number of the interval, and whole number below."""
    first = np.floor(np.minimum(a, b)).astype(np.int64)
    n = np.maximum(np.ceil(np.maximum(a, b)).astype(np.int64) - first, 1)
    interval = np.repeat(np.arange(len(n)), n)
    return interval, first[interval] + np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)


def _filled(
    cell: np.ndarray, row: np.ndarray, column: np.ndarray, here: np.ndarray, on: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, ...]:
    """Sum along the rows of each cell what begins to be covered in a column (``here``) and in the next one (``on``)."""
    run = cell * height + row
    order = np.argsort(run, kind="stable")
    run, column, here, on = run[order], column[order], here[order], on[order]
    begins = np.flatnonzero(np.diff(run, prepend=-1))
    if len(begins) == 0:
        return (*(np.empty(0, np.int64) for _ in range(3)), np.empty(0))
    first = np.minimum.reduceat(column, begins)
    length = np.maximum.reduceat(column, begins) + 2 - first
    offset = np.cumsum(length) - length
    in_run = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(run)))
    at = offset[in_run] + column - first[in_run]
    n = int(length.sum())
    share = np.cumsum(np.bincount(at, here, n) + np.bincount(at + 1, on, n))
    number = np.repeat(np.arange(len(begins)), length)
    x = first[number] + np.arange(n) - offset[number]
    covered = (share > ROUNDING) & (x < width)
    cell, y = np.divmod(run[begins][number[covered]], height)
    return cell, y, x[covered], share[covered]


def _moments(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the cells, and their area and its moments in x and y, ``(n, 3)``, by Green's theorem."""
    (x0, y0), (x1, y1) = edges.start.T, edges.stop.T
    dx, dy = x1 - x0, y1 - y0
    parts = (x0 + x1) / 2 * dy, (x0**2 + x0 * x1 + x1**2) / 6 * dy, -(y0**2 + y0 * y1 + y1**2) / 6 * dx
    return _added([(edges.cell, np.column_stack(parts))])


def _added(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the same number, added up."""
    numbers, rows = (np.concatenate(values) for values in zip(*parts, strict=True))
    unique, position = np.unique(numbers, return_inverse=True)
    columns = [np.bincount(position, column, len(unique)) for column in rows.T]
    return unique, np.column_stack(columns)
