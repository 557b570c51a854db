"""What was measured at low resolution, on the grid of a finer map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from stgen._checks import listed
from stgen._spatial.counts import get_counts
from stgen._spatial.grid import TOLERANCE, Grid, corners_of, get_map, map_counts_checked
from stgen._spatial.image import affine_to
from stgen._spatial.platforms import named_bins
from stgen._spatial.section import Locations, annotated_region, locate
from stgen.measurement import Footprints, Measurement

__all__ = ["check_on_grid", "footprints_of", "measured_bins", "measurement_of"]


def measurement_of(
    sdata: SpatialData,
    low_res: str,
    grid: Grid,
    genes: Sequence[str],
    *,
    layer: str | None = None,
    coordinate_system: str | None = None,
) -> Measurement:
    """What was measured at low resolution, on a finer grid: square bins of a map, or spots.

    Parameters
    ----------
    sdata
        Object with the measurement.
    low_res
        A map in ``sdata.images`` whose bins are whole blocks of the grid's, or a table in ``sdata.tables`` that
        annotates circles of one size, or squares of one size that lie along the grid.
    grid
        The fine grid.
    genes
        Genes to take, in this order.
    layer
        For a table: the layer with the counts; None for ``X``.
    coordinate_system
        Where grid and measurement meet; None: a micrometer one if there is one, else "global", else the first shared.

    Raises
    ------
    KeyError
        If there is no such map, table or layer, or it lacks a gene.
    ValueError
        If a layer of a map is asked for, the bins do not fit the grid, the locations are neither circles nor squares of
        one size, the counts are negative or infinite, nothing was measured on the grid, or there is no common
        coordinate system.
    """
    if low_res in sdata.images:
        if layer is not None:
            raise ValueError(f"layer={layer!r} is for tables, and {low_res!r} is a map: leave it out.")
        system = grid.shared_system(sdata, low_res, coordinate_system)
        measurement = measured_bins(sdata, low_res, grid, genes, system)
    elif low_res in sdata.tables:
        region, _ = annotated_region(sdata, sdata.tables[low_res], low_res, None)
        spots = locate(sdata, low_res, grid.shared_system(sdata, region, coordinate_system))
        counts = get_counts(sdata.tables[low_res], genes=genes, layer=layer)
        measurement = Measurement(footprints_of(spots, low_res, grid), counts, tuple(genes))
    else:
        raise KeyError(
            f"There is no map or table {low_res!r}; the images are {listed(sdata.images)}, the tables "
            f"{listed(sdata.tables)}. Pass low_res=<a map, or the table of spots>."
        )
    check_on_grid(measurement.footprints, low_res, grid)
    return measurement


def check_on_grid(footprints: Footprints, low_res: str, grid: Grid) -> None:
    """Refuse a measurement of which nothing lies on the grid."""
    centers, reach = footprints.centers, footprints.diameter / 2
    if not ((centers > -reach) & (centers < np.array([grid.height, grid.width]) + reach)).all(1).any():
        raise ValueError(
            f"Nothing of {low_res!r} was measured on the grid of {grid.width} x {grid.height} bins: "
            + (
                "it holds no values. "
                if len(centers) == 0
                else f"it lies around bin (y, x) {np.round(centers.mean(0))}. "
            )
            + "Check the coordinate systems of both."
        )


def measured_bins(
    sdata: SpatialData, low_res: str, grid: Grid, genes: Sequence[str] | None, system: str
) -> Measurement:
    """The bins of a map, on a finer grid; of all its genes by default."""
    low = get_map(sdata, low_res, genes)
    factor, offset = _block_of(sdata, low_res, grid, system)
    area = sdata.labels.get(f"{low_res}_area")  # written by pp.degrade
    if area is not None:
        area = np.asarray(area.data)
        if area.shape != low.shape[1:]:
            raise ValueError(
                f"labels['{low_res}_area'] has the shape {area.shape}, the map {low_res!r} {low.shape[1:]}; run "
                "stgen.pp.degrade(..., overwrite=True) again."
            )
        pooled = sdata.attrs.get("stgen", {}).get(low_res, {}).get("factor", factor)
        area = area * (factor / pooled) ** 2  # counted in bins of the map that was pooled, which may not be the grid's
    values = map_counts_checked(low.data, f"The map {low_res!r}")
    unknown = np.isnan(values)
    if genes is None and (unknown.any(0) != unknown.all(0)).any():
        raise ValueError(
            f"in some bins of {low_res!r}, some genes are NaN and others are not; make them all NaN, or none."
        )
    measurement = Measurement.from_map(values, factor, area, [str(name) for name in low.coords["c"].values])
    moved = replace(measurement.footprints, centers=measurement.footprints.centers + offset)
    return replace(measurement, footprints=moved)


def _block_of(sdata: SpatialData, low_res: str, grid: Grid, system: str) -> tuple[int, np.ndarray]:
    """How many bins of the grid a side of a low-resolution bin has, and where the first one begins, as y, x in bins."""
    sizes = sdata.images[low_res].sizes
    matrix = np.linalg.inv(grid.to_element(sdata, low_res, system))
    found = f"A bin of {low_res!r} is {np.sqrt(abs(np.linalg.det(matrix[:2, :2]))):.6g} bins of the grid ({grid.bin_um:.4g} µm)"
    factor = max(1, round(matrix[0, 0]))
    corners = corners_of(sizes["x"], sizes["y"])
    stretch = np.abs(corners @ (matrix[:2, :2] - factor * np.eye(2)).T).max()
    if stretch > TOLERANCE:
        turned = np.abs(matrix[:2, :2] - matrix[0, 0] * np.eye(2)).max() > TOLERANCE
        raise ValueError(
            f"{found} wide"
            + (", and turned or mirrored against it" if turned else "")
            + "; it must be a whole block of "
            "them that lies along the grid. Pass a bin_um that divides its side, or make it with stgen.pp.degrade."
        )
    offset = matrix[:2, 2][::-1]
    if np.abs(offset - np.round(offset)).max() > TOLERANCE:
        raise ValueError(
            f"{found} wide, but its upper left corner is at (y, x) = ({offset[0]:.4g}, {offset[1]:.4g}) bins, not at a "
            "corner of a bin. Use a grid with the same corner: stgen.pp.rasterize(..., bounds_um=...) for both, or "
            "stgen.pp.degrade."
        )
    return factor, np.round(offset)


def footprints_of(spots: Locations, low_res: str, grid: Grid) -> Footprints:
    """What the rows of a table measured, on a finer grid: circles of one size, or squares of one size along it.

    Circles that are named as bins of Visium HD are (``square_016um``) were squares as wide as they are.
    """
    centers = np.ascontiguousarray(grid.from_system(spots.xy, spots.system))
    if spots.diameter is not None:
        unit = np.sqrt(abs(np.linalg.det(grid.to_system(spots.system)[:2, :2])))
        diameter = float(spots.diameter / unit)
        if named_bins(spots.region):  # circles stand for squares that touch one another
            if _along(centers):
                return Footprints(centers, diameter, "square", np.full(len(centers), diameter**2))
            diameter *= 2 / np.sqrt(np.pi)  # of discs of the same area
        return Footprints(centers, diameter, "disc", np.full(len(centers), np.pi * (diameter / 2) ** 2))
    to_bins = np.linalg.inv(grid.to_system(spots.system)) @ affine_to(spots.element, spots.system)[0]
    side = _side_of_squares(spots.element, to_bins)
    if side is None:
        raise ValueError(
            f"The table {low_res!r} annotates {spots.region!r}, which are neither circles of one size nor squares of "
            "one size along the grid, so it is not known what each row measured. Pass a table of spots, or make a map "
            f"of it: stgen.pp.rasterize(sdata, table_key={low_res!r}, ...)."
        )
    return Footprints(centers, side, "square", np.full(len(centers), side**2))


def _along(centers: np.ndarray) -> bool:
    """Whether neighbors lie beside one another along the axes."""
    if len(centers) < 2:
        return True
    neighbor = cKDTree(centers).query(centers, k=2)[1][:, 1]
    step = np.abs(centers[neighbor] - centers)
    return bool(np.median(step.min(1)) < 0.01 * np.median(step.max(1)))


def _side_of_squares(element: Any, to_bins: np.ndarray) -> float | None:
    """Side in bins of polygons that are squares of one size along the grid, None if they are not."""
    geometry = getattr(element, "geometry", None)
    if geometry is None or not (geometry.geom_type == "Polygon").all():
        return None
    corners = geometry.bounds.to_numpy().reshape(-1, 2, 2)
    sides = np.abs(np.diff(corners, axis=1)[:, 0])
    side = float(sides.mean())
    squares = np.abs(sides - side).max() <= 0.01 * side and np.abs(geometry.area - side**2).max() <= 0.02 * side**2
    scale = np.sqrt(abs(np.linalg.det(to_bins[:2, :2])))
    turn = np.abs(to_bins[:2, :2] / scale)
    along = np.abs(turn - np.round(turn)).max() < 0.01
    return side * scale if squares and along else None
