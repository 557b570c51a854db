"""What was measured at low resolution, on the grid of a finer map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from spatialdata import SpatialData

from stgen._checks import listed
from stgen._spatial.counts import get_counts
from stgen._spatial.grid import TOLERANCE, Grid, corners_of, get_map, map_counts_checked
from stgen._spatial.section import annotated_region, get_section
from stgen.measurement import Measurement

__all__ = ["measurement_of"]


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
        If a layer of a map is asked for, the bins do not fit the grid, the locations are neither circles nor squares of one size, the counts are
        negative or infinite, nothing was measured on the grid, or there is no common coordinate system.
    """
    if low_res in sdata.images:
        if layer is not None:
            raise ValueError(f"layer={layer!r} is for tables, and {low_res!r} is a map: leave it out.")
        measurement = _measured_bins(sdata, low_res, grid, list(genes), coordinate_system)
    elif low_res in sdata.tables:
        measurement = _measured_spots(sdata, low_res, grid, list(genes), layer, coordinate_system)
    else:
        raise KeyError(
            f"There is no map or table {low_res!r}; the images are {listed(sdata.images)}, the tables "
            f"{listed(sdata.tables)}. Pass low_res=<a map, or the table of spots>."
        )
    centers, reach = measurement.centers, measurement.diameter / 2
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
    return measurement


def _measured_bins(
    sdata: SpatialData, low_res: str, grid: Grid, genes: list[str], coordinate_system: str | None
) -> Measurement:
    low = get_map(sdata, low_res, genes)
    factor, offset = _block_of(sdata, low_res, grid, coordinate_system)
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
    measurement = Measurement.from_map(values, factor, area)
    return replace(measurement, centers=measurement.centers + offset)


def _block_of(sdata: SpatialData, low_res: str, grid: Grid, coordinate_system: str | None) -> tuple[int, np.ndarray]:
    """How many bins of the grid a side of a low-resolution bin has, and where the first one begins, as y, x in bins."""
    sizes = sdata.images[low_res].sizes
    matrix = np.linalg.inv(grid.to_element(sdata, low_res, coordinate_system))
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


def _measured_spots(
    sdata: SpatialData, low_res: str, grid: Grid, genes: list[str], layer: str | None, coordinate_system: str | None
) -> Measurement:
    table = sdata.tables[low_res]
    region, _ = annotated_region(sdata, table, low_res, None)
    system = grid.shared_system(sdata, region, coordinate_system)
    spots = get_section(sdata, table_key=low_res, coordinate_system=system, mpp=1.0)  # in units of the system
    centers = grid.from_system(spots.xy_px, system)
    if spots.spot_diameter_um is not None:
        unit = np.sqrt(abs(np.linalg.det(grid.to_system(system)[:2, :2])))
        diameter, shape = float(spots.spot_diameter_um / unit), "disc"
        size = np.pi * (diameter / 2) ** 2
    else:
        diameter, shape = (
            _side_of_squares(sdata[region], np.linalg.inv(grid.to_element(sdata, region, system))),
            "square",
        )
        if diameter is None:
            raise ValueError(
                f"The table {low_res!r} annotates {region!r}, which are neither circles of one size nor squares of one "
                "size along the grid, so it is not known what each row measured. Pass a table of spots, or make a map "
                f"of it: stgen.pp.rasterize(sdata, table_key={low_res!r}, ...)."
            )
        size = diameter**2
    return Measurement(
        counts=get_counts(table, genes=genes, layer=layer),
        centers=np.ascontiguousarray(centers),
        diameter=diameter,
        shape=shape,
        area=np.full(len(centers), size),
    )


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


# -- coordinates ------------------------------------------------------------------------------------------------------
