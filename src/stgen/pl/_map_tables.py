"""Predictions in a table, drawn as discs of the size of the spots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from stgen._spatial.platforms import spot_pitch
from stgen._spatial.section import Section, get_section, get_table
from stgen._spatial.tables import expression, predictions_of, symbols_of
from stgen.metrics import pcc
from stgen.pl._panels import Column, Discs, Picture, Scale, check_panels, checked_axes, fine_enough, placed, sketch
from stgen.transforms import TransformName

__all__ = ["picture_of_table", "place_of"]

SCALE_OF: dict[str, Scale] = {"measured": "expression", "predicted": "expression", "spread": "spread", "error": "error"}


def picture_of_table(
    data: SpatialData | AnnData,
    genes: list[str],
    keys: list[str],
    *,
    panels: Sequence[str] | None,
    axes: Any,
    image_key: str | None,
    table_key: str | None,
    shapes_key: str | None,
    truth_layer: str | None,
    mpp: float | None,
    spot_um: float | None,
) -> tuple[Picture, np.ndarray | None]:
    """What to draw of results in a table, and the axes, once everything is checked."""
    table = get_table(data, table_key=table_key, shapes_key=shapes_key)
    entries = _check(table, genes, keys)
    shown = _shown(table, keys, panels, image_key)
    axes = checked_axes(axes, (len(genes), len(shown)))
    section = get_section(data, image_key=image_key, table_key=table_key, shapes_key=shapes_key, mpp=mpp)
    values = _values(table, genes, shown, entries[keys[0]]["transform"], truth_layer)

    discs, window = place_of(section, spot_um)
    columns = []
    for panel, key in shown:
        if panel == "histology":
            columns.append(Column(panel))
            continue
        of_gene = dict(zip(genes, values[panel, key].T, strict=True))
        note = None
        if panel == "predicted" and ("measured", None) in values:
            measured = dict(zip(genes, values["measured", None].T, strict=True))
            note = _correlation(of_gene, measured)
        title = _title(panel, key, len(keys))
        columns.append(Column(title, SCALE_OF[panel], discs, of_gene.__getitem__, note))
    unit = entries[keys[0]]["unit"]
    units: dict[Scale, str] = {
        "expression": unit,
        "spread": f"SD, {unit}",
        "error": f"predicted minus measured,\n{unit}",
    }
    image = None
    if section.image is not None:
        image = sketch(section.image, placed(0, 0, section.image.mpp, section.image.mpp), window, fine_enough(axes))
    um_per_unit = None if section.mpp is None else 1.0
    return Picture(columns, units, window, um_per_unit, image, symbols_of(table, genes)), axes


def _title(panel: str, key: str | None, n_keys: int) -> str:
    if key is None:
        return panel
    if panel == "predicted":
        return key
    return panel if n_keys == 1 else f"{key}: {panel}"


def _correlation(predicted: Mapping[str, np.ndarray], measured: Mapping[str, np.ndarray]) -> Callable[[str], str]:
    """Writes the correlation of a gene, for below a prediction that stands beside what was measured."""
    return lambda gene: f"PCC {pcc(predicted[gene][:, None], measured[gene][:, None])[0]:.2f}"


def _check(table: AnnData, genes: list[str], keys: list[str]) -> dict[str, Mapping[str, Any]]:
    """The records of the results, once it is known that the genes can be drawn from them."""
    results = {key: table.uns["stgen"][key] for key in predictions_of(table)}
    absent = [key for key in keys if key not in results]
    if absent or not keys:
        raise KeyError(
            f"there is no prediction {', '.join(map(repr, absent)) or '(`keys` is empty)'}; the table has "
            f"{', '.join(map(repr, results)) or 'none'}. "
            "stgen.tl.predict_expression(data, model=..., key_added=<key>) makes one."
        )
    unknown = [gene for gene in genes if gene not in table.var_names]
    if unknown:
        raise KeyError(
            f"{len(unknown)} of {len(genes)} genes are not in the table: {', '.join(map(str, unknown[:5]))}. Its "
            f"{table.n_vars} genes are {', '.join(table.var_names[:5])}{', ...' if table.n_vars > 5 else ''}"
        )
    for key in keys:
        missing = [gene for gene in genes if not np.isfinite(_column_of(table, _layer(table, key), gene)).all()]
        if missing:
            raise ValueError(
                f"{', '.join(missing[:5])} was not predicted under {key!r}, whose model has other genes: "
                f'table.var_names[table.var["{key}"]] lists them. Draw some of these, or predict with a model that has '
                f"{missing[0]}."
            )
    units = {key: str(results[key]["unit"]) for key in keys}
    if len(set(units.values())) > 1:
        listed = ", ".join(f"{key!r}: {unit}" for key, unit in units.items())
        raise ValueError(f"the predictions are on different scales ({listed}); draw each with its own call.")
    return {key: results[key] for key in keys}


def _shown(
    table: AnnData, keys: list[str], panels: Sequence[str] | None, image_key: str | None
) -> list[tuple[str, str | None]]:
    """Panel and result of each column."""
    counts = all(key in table.layers for key in keys)  # else X is the prediction itself
    spread = any(f"{key}_std" in table.layers for key in keys)
    no_counts = None if counts else "the table holds predictions only, no counts of the same locations"
    there = {
        "histology": None if image_key is not None else "no image was named: pass image_key=<image>",
        "measured": no_counts,
        "predicted": None,
        "spread": None
        if spread
        else f"no table.layers[{keys[0] + '_std'!r}]: the model is deterministic, or n_samples was 1",
        "error": no_counts,
    }
    return [
        (panel, key)
        for panel in check_panels(panels, there, ("measured", "predicted", "spread"))
        for key in ([None] if panel in ("histology", "measured") else keys)
        if panel != "spread" or f"{key}_std" in table.layers
    ]


def _layer(table: AnnData, key: str) -> str | None:
    """Where the values of a result are: a layer, or ``X`` (None) of a table that holds nothing else."""
    return key if key in table.layers else None


def _column_of(table: AnnData, layer: str | None, gene: str) -> np.ndarray:
    column = (table.X if layer is None else table.layers[layer])[:, table.var_names.get_loc(gene)]
    return np.asarray(column.todense() if hasattr(column, "todense") else column, dtype=np.float64).ravel()


def _values(
    table: AnnData,
    genes: list[str],
    shown: list[tuple[str, str | None]],
    transform: TransformName,
    truth_layer: str | None,
) -> dict[tuple[str, str | None], np.ndarray]:
    """What each column shows, ``(n, genes)``."""
    out = {}
    if any(panel in ("measured", "error") for panel, _ in shown):
        measured = expression(table, genes, transform, layer=truth_layer).astype(np.float64)
    for panel, key in shown:
        if panel == "measured":
            out[panel, key] = measured
        elif key is not None:
            layer = f"{key}_std" if panel == "spread" else _layer(table, key)
            out[panel, key] = np.column_stack([_column_of(table, layer, gene) for gene in genes])
            if panel == "error":
                out[panel, key] -= measured
    return out


def place_of(section: Section, spot_um: float | None) -> tuple[Discs, tuple[float, float, float, float]]:
    """The discs, in µm (or in units of the coordinates where µm are not known), and the window that holds them."""
    xy = section.xy_px if section.mpp is None else section.xy_um
    size = max(np.ptp(xy, 0).max(), 1e-9)
    pitch = spot_pitch(xy)[0]
    pitch = pitch if np.isfinite(pitch) else size / 10
    diameter = spot_um or section.spot_diameter_um or pitch
    margin = max(diameter, 0.5 * pitch)
    (left, top), (right, bottom) = xy.min(0) - margin, xy.max(0) + margin
    return Discs(xy, float(diameter)), (left, right, top, bottom)
