"""Genes over the section: what was measured, what was predicted, and how sure the prediction is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from spatialdata import SpatialData

from stgen._io import Section, get_section, get_table, spot_pitch
from stgen.metrics import pcc
from stgen.tl._inputs import expression

__all__ = ["maps"]

Panel = Literal["histology", "measured", "predicted", "spread", "error"]

SCALE_OF = {"measured": "expression", "predicted": "expression", "spread": "spread", "error": "error"}
PANEL_INCHES, BAR_INCHES, THUMBNAIL_PX = 2.4, 0.75, 600


def maps(
    data: SpatialData | AnnData,
    genes: str | Sequence[str],
    *,
    keys: str | Sequence[str] = "predicted",
    panels: Sequence[Panel] | None = None,
    image_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    truth_layer: str | None = None,
    mpp: float | None = None,
    spot_um: float | None = None,
    quantiles: tuple[float, float] = (0.01, 0.99),
    cmap: str = "viridis",
    spread_cmap: str = "magma",
    error_cmap: str = "PuOr",
    axes: np.ndarray | Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw genes over the section: measured, predicted, and the spread of the prediction.

    One row per gene. Measured counts are brought to the scale of the prediction, and both are drawn with the same
    colors, so that a map which is too flat looks it. Discs have the true size of the spots.

    Parameters
    ----------
    data
        Object with the result of :func:`stgen.tl.predict_expression`.
    genes
        Genes to draw, one row each.
    keys
        Results to draw, each by its ``key_added``. Several stand side by side and share their colors.
    panels
        What to draw, from left to right: ``"histology"`` (the image alone), ``"measured"``, ``"predicted"``,
        ``"spread"`` (standard deviation of the samples) and ``"error"`` (predicted minus measured). The last three are
        drawn for each of ``keys``. By default measured, predicted and spread, as far as they exist.
    image_key
        Image to draw beneath the discs, read at low resolution. None: no image.
    table_key, shapes_key
        Elements of a SpatialData; needed only where there are several.
    truth_layer
        Layer with the measured counts; by default ``X``.
    mpp
        µm per pixel, where the data do not say; see :func:`stgen.pp.embed`.
    spot_um
        Diameter of the discs in µm. By default that of the spots, or the distance between neighbors where the locations
        are no circles of one size.
    quantiles
        Values below and above these quantiles share the first and last color. Expression: of measured and predicted values
        together. Spread starts at zero, errors are symmetric about zero; both end at the upper quantile.
    cmap, spread_cmap, error_cmap
        Color maps of expression, spread and error; the defaults can be told apart by color-blind readers.
    axes
        Axes to draw into, ``(genes, columns)``; by default a new figure.

    Returns
    -------
    Array of Axes, ``(genes, columns)``. On each, the discs are the only collection, with the values as its array and in
    the order of the table's rows. The coordinates are µm (from the upper left corner of the image, if there is one).

    Raises
    ------
    KeyError
        If a gene, a result or an element does not exist.
    ValueError
        If a gene was not predicted, results are on different scales, or ``axes`` has the wrong shape.

    Examples
    --------
    >>> from stgen import datasets, models, pl, pp, tl
    >>> sdata = datasets.simulated_section(size_um=700)
    >>> pp.embed(sdata, image_key="he", table_key="spot_counts")
    >>> adata = sdata["spot_counts"]
    >>> probe = models.LinearProbe(["EPCAM", "COL1A1"], embedding_dim=adata.obsm["X_texture"].shape[1])
    >>> tl.predict_expression(sdata, model=probe, table_key="spot_counts", key_added="probe", progress=False)
    >>> axes = pl.maps(sdata, ["EPCAM", "COL1A1"], keys="probe", image_key="he", table_key="spot_counts")
    >>> axes.shape, axes[0, 1].get_title()
    ((2, 2), 'probe')
    """
    genes = [genes] if isinstance(genes, str) else list(genes)
    keys = [keys] if isinstance(keys, str) else list(keys)
    table = get_table(data, table_key=table_key, shapes_key=shapes_key)
    entries = _check(table, genes, keys)
    columns = _columns(table, keys, panels, image_key)
    axes = _checked_axes(axes, (len(genes), len(columns)))
    section = get_section(data, image_key=image_key, table_key=table_key, shapes_key=shapes_key, mpp=mpp)
    values = _values(table, genes, columns, entries[keys[0]]["transform"], truth_layer)
    scene = _scene(section, spot_um)
    if axes is None:
        axes = _new_axes(len(genes), columns, scene)

    color_maps = {"expression": cmap, "spread": spread_cmap, "error": error_cmap}
    unit = entries[keys[0]]["unit"]
    labels = {"expression": unit, "spread": f"SD, {unit}", "error": f"predicted minus measured,\n{unit}"}
    for i, gene in enumerate(genes):
        norms = _norms(values, columns, i, quantiles)
        for j, column in enumerate(columns):
            _draw_panel(
                axes[i, j], scene, column, None if column.scale is None else values[column][:, i], norms, color_maps
            )
            axes[i, j].set_title(column.title(len(keys)) if i == 0 else "", fontsize="medium")
            _note_correlation(axes[i, j], values, column, i)
        axes[i, 0].set_ylabel(gene, fontsize="large", fontstyle="italic")
        for scale, run in groupby(range(len(columns)), key=lambda j: columns[j].scale):
            run = list(run)
            if scale is not None:
                drawn = axes[i, run[-1]].collections[0]
                bar = axes[i, 0].figure.colorbar(
                    drawn, ax=list(axes[i, run]), label=labels[scale], shrink=0.8, aspect=18, pad=0.02,
                    extend=_extend([values[columns[j]][:, i] for j in run], drawn.norm),
                )  # fmt: skip
                bar.ax.tick_params(labelsize="small")
                bar.ax.yaxis.label.set_size("small")
    if section.mpp is not None:
        _scale_bar(axes[-1, 0], scene)
    return axes


# ---- what to draw ----------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """One column of panels: what is shown, and of which result."""

    panel: Panel
    key: str | None

    @property
    def scale(self) -> str | None:
        """Panels of one scale share their colors."""
        return SCALE_OF.get(self.panel)

    def title(self, n_keys: int) -> str:
        if self.key is None:
            return self.panel
        if self.panel == "predicted":
            return self.key
        return self.panel if n_keys == 1 else f"{self.key}: {self.panel}"


def _check(table: AnnData, genes: list[str], keys: list[str]) -> dict[str, Mapping[str, Any]]:
    """The records of the results, once it is known that the genes can be drawn from them."""
    records = table.uns.get("stgen", {})
    results = {
        key: entry
        for key, entry in records.items()
        if isinstance(entry, Mapping) and entry.get("function") == "tl.predict_expression"
    }
    absent = [key for key in keys if key not in results]
    if absent or not keys:
        raise KeyError(
            f"there is no prediction {', '.join(map(repr, absent)) or '(`keys` is empty)'}; the table has "
            f"{', '.join(map(repr, results)) or 'none'}. "
            "stgen.tl.predict_expression(data, model=..., key_added=<key>) makes one."
        )
    if not genes:
        raise ValueError('`genes` is empty; name at least one, such as pl.maps(data, ["EPCAM"]).')
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


def _columns(table: AnnData, keys: list[str], panels: Sequence[Panel] | None, image_key: str | None) -> list[_Column]:
    """The columns, of the panels asked for or of those there are."""
    there = {
        "histology": image_key is not None,
        "measured": all(key in table.layers for key in keys),  # else X is the prediction itself
        "predicted": True,
        "spread": any(f"{key}_std" in table.layers for key in keys),
    }
    there["error"] = there["measured"]
    if panels is None:
        panels = [panel for panel in ("measured", "predicted", "spread") if there[panel]]
    panels = [panels] if isinstance(panels, str) else list(panels)
    for panel in panels:
        if panel not in there:
            raise ValueError(f"unknown panel {panel!r}; the panels are {', '.join(map(repr, there))}.")
        if not there[panel]:
            why = {
                "histology": "no image was named: pass image_key=<image>",
                "spread": f"no table.layers[{keys[0] + '_std'!r}]: the model is deterministic, or n_samples was 1",
            }
            nothing = "the table holds predictions only, no counts of the same locations"
            raise ValueError(f"the panel {panel!r} cannot be drawn: {why.get(panel, nothing)}.")
    if not panels:
        raise ValueError("`panels` is empty; leave it out, or name at least one.")
    return [
        _Column(panel, key)
        for panel in panels
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
    table: AnnData, genes: list[str], columns: list[_Column], transform: str, truth_layer: str | None
) -> dict[_Column, np.ndarray]:
    """What each column shows, ``(n, genes)``."""
    out = {}
    if any(column.panel in ("measured", "error") for column in columns):
        measured = expression(table, genes, transform, layer=truth_layer).astype(np.float64)
    for column in columns:
        if column.panel == "measured":
            out[column] = measured
        elif column.panel != "histology":
            layer = f"{column.key}_std" if column.panel == "spread" else _layer(table, column.key)
            out[column] = np.column_stack([_column_of(table, layer, gene) for gene in genes])
            if column.panel == "error":
                out[column] -= measured
    return out


def _norms(
    values: dict[_Column, np.ndarray], columns: list[_Column], i: int, quantiles: tuple[float, float]
) -> dict[str, Normalize]:
    """Color limits of the scales of one gene."""
    norms = {}
    for scale in {column.scale for column in columns} - {None}:
        shown = np.concatenate([values[column][:, i] for column in columns if column.scale == scale])
        if scale == "expression":
            low, high = np.quantile(shown, quantiles)
        else:
            high = np.quantile(np.abs(shown), quantiles[1])
            low = 0.0 if scale == "spread" else -high
        norms[scale] = Normalize(low, high if high > low else low + 1)
    return norms


def _extend(shown: list[np.ndarray], norm: Normalize) -> str:
    """On which sides of a color bar there are values beyond it."""
    low, high = min(v.min() for v in shown) < norm.vmin, max(v.max() for v in shown) > norm.vmax
    return {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}[low, high]


# ---- where to draw ---------------------------------------------------------------------------------------------------


class _Scene(NamedTuple):
    """What all panels have in common."""

    xy: np.ndarray  # (n, 2) in µm, or in units of the coordinates where µm are not known
    diameter: float
    window: tuple[float, float, float, float]  # left, right, top, bottom
    image: np.ndarray | None  # (h, w) or (h, w, 3)
    extent: tuple[float, float, float, float] | None


def _scene(section: Section, spot_um: float | None) -> _Scene:
    xy = section.xy_px if section.mpp is None else section.xy_um
    size = max(np.ptp(xy, 0).max(), 1e-9)
    pitch = spot_pitch(xy)[0]
    pitch = pitch if np.isfinite(pitch) else size / 10
    diameter = spot_um or section.spot_diameter_um or pitch
    margin = max(diameter, 0.5 * pitch)
    (left, top), (right, bottom) = xy.min(0) - margin, xy.max(0) + margin
    image = extent = None
    if section.image is not None:
        coarse = max(section.image.mpp, max(right - left, bottom - top) / THUMBNAIL_PX)
        image = section.image.thumbnail(mpp=coarse)
        image = np.clip(image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0), 0, 1)
        extent = (0, section.image.width * section.mpp, section.image.height * section.mpp, 0)
    return _Scene(xy, float(diameter), (left, right, top, bottom), image, extent)


def _checked_axes(axes: np.ndarray | Sequence[Axes] | Axes | None, shape: tuple[int, int]) -> np.ndarray | None:
    if axes is None:
        return None
    axes = np.asarray(axes, dtype=object)
    if axes.size != shape[0] * shape[1] or (axes.ndim == 2 and axes.shape != shape):
        raise ValueError(
            f"`axes` has the shape {axes.shape}, and {shape} is needed (genes, columns): "
            f"plt.subplots({shape[0]}, {shape[1]}, squeeze=False) makes them."
        )
    return axes.reshape(shape)


def _new_axes(n_rows: int, columns: list[_Column], scene: _Scene) -> np.ndarray:
    left, right, top, bottom = scene.window
    aspect = np.clip((bottom - top) / (right - left), 0.4, 2.5)
    bars = sum(scale is not None for scale, _ in groupby(column.scale for column in columns))
    width = 0.3 + PANEL_INCHES * len(columns) + BAR_INCHES * bars
    height = 0.3 + (PANEL_INCHES * aspect + 0.15) * n_rows
    return plt.subplots(n_rows, len(columns), figsize=(width, height), squeeze=False, layout="constrained")[1]


def _draw_panel(
    ax: Axes,
    scene: _Scene,
    column: _Column,
    values: np.ndarray | None,
    norms: dict[str, Normalize],
    cmaps: dict[str, str],
) -> None:
    if scene.image is not None:
        fade = None if column.scale is None else 0.4
        ax.imshow(scene.image, extent=scene.extent, alpha=fade, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    if values is not None:
        size = np.full(len(values), scene.diameter)
        outline = 0.4 if column.panel == "error" and len(values) < 5000 else 0  # an error of zero is white
        discs = EllipseCollection(
            size, size, np.zeros(len(values)), units="xy", offsets=scene.xy, offset_transform=ax.transData,
            array=values, cmap=cmaps[column.scale], norm=norms[column.scale], linewidths=outline, edgecolors="0.6",
            rasterized=True,
        )  # fmt: skip
        ax.add_collection(discs, autolim=False)
    left, right, top, bottom = scene.window
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])  # y points down, as in images
    ax.spines[:].set_visible(False)


def _note_correlation(ax: Axes, values: dict[_Column, np.ndarray], column: _Column, i: int) -> None:
    """Write the gene's correlation beneath a prediction that stands beside what was measured."""
    measured = next((v for c, v in values.items() if c.panel == "measured"), None)
    if column.panel == "predicted" and measured is not None:
        ax.set_xlabel(f"PCC {pcc(values[column][:, [i]], measured[:, [i]])[0]:.2f}", fontsize="small")


def _scale_bar(ax: Axes, scene: _Scene) -> None:
    """A bar of a round number of µm below the panel, at most a third of its width."""
    left, right, *_ = scene.window
    power = 10 ** np.floor(np.log10((right - left) / 3))
    length = float(max(k * power for k in (1, 2, 5) if k * power <= (right - left) / 3))
    below = ax.get_xaxis_transform()  # x in µm, y in parts of the panel
    ax.plot(
        [left, left + length],
        [-0.03, -0.03],
        color="black",
        lw=2,
        transform=below,
        clip_on=False,
        solid_capstyle="butt",
    )
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    ax.text(left, -0.05, text, transform=below, ha="left", va="top", fontsize="small")
