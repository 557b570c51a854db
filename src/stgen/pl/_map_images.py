"""Maps of counts, drawn where they lie in a coordinate system of the section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask import compute
from spatialdata import SpatialData

from stgen._spatial.counts import get_counts
from stgen._spatial.grid import Grid, get_map
from stgen._spatial.image import affine_to, histology_of
from stgen._spatial.map_inputs import MapElements
from stgen._spatial.normalized import total_of
from stgen._spatial.records import recorded_layer
from stgen._spatial.section import annotated_region, shared_system
from stgen._spatial.tables import symbols_of
from stgen.pl._panels import (
    Column,
    Discs,
    Picture,
    Pixels,
    Scale,
    bounds_in,
    check_panels,
    checked_axes,
    fine_enough,
    placed,
    sketch,
)
from stgen.tl.evaluation.maps import check_same_grid
from stgen.tl.superresolution.result import TABLE
from stgen.transforms import TARGET_SUM

__all__ = ["picture_of_maps"]

Window = tuple[float, float, float, float]

N_SAMPLES = 2  # that are drawn beside the mean
OF_RESULT = {"spread": "_std", "samples": "_samples"}  # panels that not every result has, and what they are drawn from
MARGIN = 0.02  # of the tissue's size, around it


def picture_of_maps(
    sdata: SpatialData,
    genes: list[str],
    keys: list[str],
    *,
    panels: Sequence[str] | None,
    axes: Any,
    image_key: str | None,
    low_res: str | None,
    truth_key: str | None,
    bounds_um: Sequence[float] | None,
    coordinate_system: str | None,
    normalize: bool | None,
) -> tuple[Picture, np.ndarray | None]:
    """What to draw of maps, and the axes, once everything is checked."""
    shown = _shown(sdata, keys, panels, image_key, low_res, truth_key)
    n_columns = sum(N_SAMPLES if panel == "samples" else 1 for panel, _ in shown)
    axes = checked_axes(axes, (len(genes), n_columns))
    counted = dict.fromkeys(
        key for panel, key in shown if panel != "histology" and key is not None and key in sdata.images
    )
    spots = low_res if any(panel == "measured" for panel, _ in shown) and low_res not in sdata.images else None
    extra = [f"{key}_std" for panel, key in shown if panel == "spread"]
    if truth_key is not None and any(panel == "error" for panel, _ in shown):
        extra.append(truth_key)
    for of in [key for panel, key in shown if panel == "samples"]:
        get_map(sdata, f"{of}_samples", [f"{gene}:{number}" for gene in genes for number in range(N_SAMPLES)])
    for name in [*keys, *counted, *extra]:
        get_map(sdata, name, genes)
    region = None if spots is None else annotated_region(sdata, sdata.tables[spots], spots, None)[0]
    placed_elements = [name for name in (*(counted or keys), image_key, region) if name is not None]
    system = shared_system(sdata, placed_elements, coordinate_system)

    grids = {key: Grid.of_map(sdata, key) for key in (counted or keys)}
    fine = min(grids.values(), key=lambda grid: grid.bin_um)
    um_per_unit = fine.bin_um / np.sqrt(abs(np.linalg.det(fine.to_system(system)[:2, :2])))
    cropped = {key: _tissue(sdata, key, genes[0], grid) for key, grid in grids.items()} if bounds_um is None else {}
    window = _window(grids, system, bounds_um, um_per_unit, cropped)
    px = fine_enough(axes)
    views = {
        key: _View.of(sdata, key, grid, system, window, px, None if normalize else fine.bin_um)
        for key, grid in grids.items()
    }

    columns = []
    for panel, key in shown:
        if key is None:  # the histology
            columns.append(Column(panel))
        elif key == spots:
            layer = recorded_layer(sdata, keys, spots)
            columns.append(_spots(sdata, spots, layer, genes, fine, system, window, normalize=bool(normalize)))
        elif panel == "samples":
            columns += [_sample(key, number, views[key], len(keys)) for number in range(N_SAMPLES)]
        else:
            column = _column(panel, key, views[key], truth_key, len(keys))
            columns.append(column._replace(remark=_remark(sdata, key, genes)) if panel == "predicted" else column)
    unit = f"counts per {TARGET_SUM:,.0f}" if normalize else f"counts per {fine.bin_um:.4g} µm bin"
    units: dict[Scale, str] = {"expression": unit, "spread": f"SD, {unit}", "error": f"predicted minus truth,\n{unit}"}
    image = None
    if image_key is not None:
        histology = histology_of(sdata, image_key, mpp=1.0)  # in pixels
        image = sketch(histology, affine_to(sdata.images[image_key], system)[0], window, px)
    labels = symbols_of(sdata.tables[low_res], genes) if low_res in sdata.tables else {}
    return Picture(columns, units, window, um_per_unit, image, labels), axes


# ---- what to draw ----------------------------------------------------------------------------------------------------


def _shown(
    sdata: SpatialData,
    keys: list[str],
    panels: Sequence[str] | None,
    image_key: str | None,
    low_res: str | None,
    truth_key: str | None,
) -> list[tuple[str, str | None]]:
    """Panel and element of each column."""
    for key in [*keys, *([] if truth_key is None else [truth_key])]:
        if key not in sdata.images:
            raise KeyError(
                f"`keys`: there is no map {key!r}; sdata.images has {', '.join(map(repr, sdata.images))}. "
                f"stgen.tl.superresolve(sdata, ..., key_added={key!r}) makes one of a low-resolution measurement, "
                "stgen.pp.rasterize of molecules or cells."
            )
        if key.endswith("_std") and key.removesuffix("_std") in sdata.images:
            raise ValueError(
                f"{key!r} is the spread of {key.removesuffix('_std')!r}: name that one; the panel 'spread' is drawn "
                "beside it."
            )
    if image_key is not None and image_key not in sdata.images:
        raise KeyError(
            f"`image_key`: there is no image {image_key!r}; sdata.images has {', '.join(map(repr, sdata.images))}."
        )
    if low_res is not None and low_res not in sdata.images and low_res not in sdata.tables:
        raise KeyError(
            f"there is no map or table {low_res!r}; the images are {', '.join(map(repr, sdata.images))}, the tables "
            f"{', '.join(map(repr, sdata.tables)) or 'none'}."
        )
    spread = any(f"{key}_std" in sdata.images for key in keys)
    kept = any(f"{key}_samples" in sdata.images for key in keys)
    no_truth = "no truth was named: pass truth_key=<map of counts>"
    there = {
        "histology": None if image_key is not None else "no image was named: pass image_key=<image>",
        "measured": None if low_res is not None else "no measurement was named: pass low_res=<map or table of spots>",
        "predicted": None,
        "samples": None
        if kept
        else f"no sdata.images[{keys[0] + '_samples'!r}]; pass keep_samples=True to superresolve",
        "truth": None if truth_key is not None else no_truth,
        "spread": None if spread else f"no sdata.images[{keys[0] + '_std'!r}]",
        "error": None if truth_key is not None else no_truth,
    }
    panels = check_panels(panels, there, ("measured", "predicted", "truth", "spread"))
    if "error" in panels and truth_key is not None:
        for key in keys:
            check_same_grid(sdata, key, truth_key)
    element: dict[str, list[str | None]] = {"histology": [None], "measured": [low_res], "truth": [truth_key]}
    return [
        (panel, key)
        for panel in panels
        for key in element.get(panel, [*keys])
        if panel not in OF_RESULT or f"{key}{OF_RESULT[panel]}" in sdata.images
    ]


def _column(panel: str, key: str, view: _View, truth_key: str | None, n_keys: int) -> Column:
    """A column of pixels."""
    name = key if panel == "predicted" else panel
    if panel in ("spread", "error") and n_keys > 1:
        name = f"{key}: {panel}"
    title = view.title(name)
    if panel == "spread":
        return Column(title, "spread", view.pixels, view.reader(f"{key}_std"))
    read = view.reader(key)
    if panel == "error" and truth_key is not None:
        true = view.reader(truth_key)  # on the same grid
        return Column(title, "error", view.pixels, lambda gene: read(gene) - true(gene))
    return Column(title, "expression", view.pixels, read)


def _sample(key: str, number: int, view: _View, n_keys: int) -> Column:
    """A column of one sample of a result."""
    name = f"sample {number + 1}" if n_keys == 1 else f"{key}: sample {number + 1}"
    return Column(view.title(name), "expression", view.pixels, view.reader(f"{key}_samples", f":{number}"))


def _remark(sdata: SpatialData, key: str, genes: list[str]) -> Callable[[str], str] | None:
    """Says which genes could not be predicted out of fold, as a map without a model knows of its own; None if all could."""
    table = sdata.tables.get(f"{key}{TABLE}")
    if table is None or "trusted" not in table.var:
        return None
    doubtful = {gene for gene in genes if gene in table.var_names and not table.var.at[gene, "trusted"]}
    return (
        (lambda gene: "share not predictable,\ncounts follow depth" if gene in doubtful else "") if doubtful else None
    )


def _spots(
    sdata: SpatialData,
    table_key: str,
    layer: str | None,
    genes: list[str],
    fine: Grid,
    system: str,
    window: Window,
    *,
    normalize: bool,
) -> Column:
    """A column of discs: the counts of spots, per bin of the fine grid that a spot covers, or per 10,000."""
    elements = MapElements.find(sdata, low_res=table_key, layer=layer, coordinate_system=system)
    measurement = elements.measurement(fine, genes)
    spots, matrix = measurement.footprints, fine.to_system(system)
    xy = spots.centers[:, ::-1] @ matrix[:2, :2].T + matrix[:2, 2]
    diameter = spots.diameter * np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    left, right, top, bottom = window
    margin = diameter / 2
    near = ((xy > [left - margin, top - margin]) & (xy < [right + margin, bottom + margin])).all(1)
    values, title = measurement.density, f"measured\n{spots.diameter * fine.bin_um:.4g} µm spots"
    if normalize:
        total = np.asarray(get_counts(sdata.tables[table_key], layer=layer, dense=False).sum(1)).reshape(-1, 1)
        values = np.divide(TARGET_SUM * measurement.counts, total, out=np.full(values.shape, np.nan), where=total > 0)
    else:
        title += f" ÷ {spots.area[0]:.3g}"
    of_gene = dict(zip(genes, values[near].T, strict=True))
    return Column(title, "expression", Discs(xy[near], float(diameter)), of_gene.__getitem__)


# ---- where to draw ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """The part of a map that a panel shows, as finely as the panel can show it."""

    sdata: SpatialData
    grid: Grid
    pixels: Pixels
    rows: slice
    columns: slice
    ratio: float | None
    """Fine bins in one of this map: what its counts are divided by; None where they are normalized."""
    total: np.ndarray | None
    """Counts of all genes in each bin, by which they are normalized."""

    @classmethod
    def of(
        cls, sdata: SpatialData, key: str, grid: Grid, system: str, window: Window, px: int, fine_um: float | None
    ) -> _View:
        """The view in a window, in counts per bin of ``fine_um``, or normalized where that is None."""
        matrix = grid.to_system(system)
        x0, y0, x1, y1 = bounds_in(matrix, window)
        x0, y0 = (max(0, int(np.floor(low + 1e-6))) for low in (x0, y0))
        x1, y1 = (min(size, int(np.ceil(high - 1e-6))) for high, size in ((x1, grid.width), (y1, grid.height)))
        if x1 <= x0 or y1 <= y0:
            raise ValueError(f"the map {key!r} does not lie in the window that is drawn; check `bounds_um`.")
        step = max(1, max(x1 - x0, y1 - y0) // px)
        rows, columns = (slice(low + (step - 1) // 2, high, step) for low, high in ((y0, y1), (x0, x1)))
        pixels = Pixels(matrix @ placed(x0, y0, step, step))
        if fine_um is not None:
            return cls(sdata, grid, pixels, rows, columns, float(np.round((grid.bin_um / fine_um) ** 2, 6)), None)
        total = total_of(sdata, key, needed=True)
        return cls(sdata, grid, pixels, rows, columns, None, np.asarray(total[0, rows, columns].data, np.float64))

    def title(self, name: str) -> str:
        """The title of a panel, which says by what its counts are divided."""
        if self.ratio in (None, 1):
            return name
        return f"{name}\n{self.grid.bin_um:.4g} µm bins ÷ {self.ratio:.4g}"

    def reader(self, key: str, suffix: str = "") -> Callable[[str], np.ndarray]:
        """Reads a gene of a map on this grid, ``(h, w)`` in counts per fine bin; nothing is read before."""

        def read(gene: str) -> np.ndarray:
            values = get_map(self.sdata, key, [f"{gene}{suffix}"])[0, self.rows, self.columns].data
            values = np.asarray(values, dtype=np.float64)
            if self.total is None:
                return values / self.ratio
            return np.divide(TARGET_SUM * values, self.total, out=np.full(values.shape, np.nan), where=self.total > 0)

        return read


def _tissue(sdata: SpatialData, key: str, gene: str, grid: Grid) -> Window:
    """Left, right, top, bottom, in bins of a map, of where a gene is known, with a margin; of all of it where nothing is."""
    known = da.isfinite(da.asarray(get_map(sdata, key, [gene]).data[0]))
    rows, columns = (np.flatnonzero(along) for along in compute(known.any(1), known.any(0)))
    if len(rows) == 0:
        return 0.0, float(grid.width), 0.0, float(grid.height)
    margin = MARGIN * max(np.ptp(rows), np.ptp(columns)) + 1
    (left, right), (top, bottom) = (
        (max(0.0, at[0] - margin), min(float(size), at[-1] + 1 + margin))
        for at, size in ((columns, grid.width), (rows, grid.height))
    )
    return left, right, top, bottom


def _window(
    grids: dict[str, Grid],
    system: str,
    bounds_um: Sequence[float] | None,
    um_per_unit: float,
    cropped: Mapping[str, Window] | None = None,
) -> Window:
    """Left, right, top, bottom, in coordinates of the system: the bounds, or what all maps, or parts of them, cover."""
    if bounds_um is not None:
        bounds = np.asarray(bounds_um, dtype=float)
        if bounds.shape != (4,) or not np.isfinite(bounds).all() or (bounds[2:] <= bounds[:2]).any():
            raise ValueError(
                f"`bounds_um` must be (x_min, y_min, x_max, y_max) in µm, the first two smaller; found {bounds_um!r}."
            )
        x0, y0, x1, y1 = (float(value) for value in bounds / um_per_unit)
        return x0, x1, y0, y1
    parts = cropped or {key: (0.0, grid.width, 0.0, grid.height) for key, grid in grids.items()}
    corners = np.concatenate(
        [
            np.array([[x, y, 1] for x in parts[key][:2] for y in parts[key][2:]]) @ grid.to_system(system).T
            for key, grid in grids.items()
        ]
    )
    (left, top), (right, bottom) = corners[:, :2].min(0), corners[:, :2].max(0)
    return float(left), float(right), float(top), float(bottom)
