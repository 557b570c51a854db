"""Panels of genes (rows) by maps (columns): what any of them shows, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.transforms import Affine2D, ScaledTranslation
from scipy.ndimage import binary_erosion

from stgen._spatial.image import Histology

__all__ = [
    "Column",
    "Discs",
    "Picture",
    "Pixels",
    "Scale",
    "check_panels",
    "checked_axes",
    "color_bar",
    "draw",
    "draw_panel",
    "fine_enough",
    "new_axes",
    "scale_bar",
    "sketch",
]

Scale = Literal["expression", "spread", "error", "category"]

LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue
MAP_ALPHA = 0.75  # of a map that covers the image
PANEL_INCHES, BAR_INCHES = 2.4, 0.75
LETTER = 0.6  # width of a letter, in sizes of the font
SMALLEST_POINTS = 6.0  # of the name of a gene
RIM = 0.02  # of the shorter side of a map: what lies so close to its edge does not set the colors
PANEL_PX = 600  # pixels along the longer side of a panel that images are read for, at least


class Discs(NamedTuple):
    """Locations of one size."""

    xy: np.ndarray
    """Centers, ``(n, 2)``."""
    diameter: float

    def draw(self, ax: Axes, values: np.ndarray, scale: Scale, **style: Any) -> EllipseCollection:
        """Draw a value ``(n,)`` for each."""
        size = np.full(len(values), self.diameter)
        outline = 0.4 if scale == "error" and len(values) < 5000 else 0  # an error of zero is white
        discs = EllipseCollection(
            size, size, np.zeros(len(values)), units="xy", offsets=self.xy, offset_transform=ax.transData,
            array=values, linewidths=outline, edgecolors="0.6", rasterized=True, **style,
        )  # fmt: skip
        ax.add_collection(discs, autolim=False)
        return discs


class Pixels(NamedTuple):
    """An image in the coordinates of the panel."""

    matrix: np.ndarray
    """From pixels to coordinates, 3 x 3 over x, y; pixel (0, 0) covers [0, 1) x [0, 1)."""

    def draw(self, ax: Axes, values: np.ndarray, scale: Scale | None = None, **style: Any) -> AxesImage:
        """Draw an image ``(h, w)``, NaN transparent, or ``(h, w, 3)``."""
        height, width = values.shape[:2]
        style = {"interpolation": "nearest"} | style
        (a, b), (c, d) = self.matrix[:2, :2]
        if max(abs(b), abs(c)) <= 1e-9 * max(abs(a), abs(d)):  # along the axes, perhaps mirrored
            x, y = self.matrix[:2, 2]
            return ax.imshow(values, extent=(x, x + a * width, y + d * height, y), **style)
        image = ax.imshow(values, extent=(0, width, height, 0), **style)
        image.set_transform(Affine2D(self.matrix) + ax.transData)
        return image


class Column(NamedTuple):
    """One column of panels."""

    title: str
    scale: Scale | None = None
    """Columns of one scale share their colors; None for the histology alone."""
    place: Discs | Pixels | None = None
    values: Callable[[str], np.ndarray] | None = None
    """What is drawn for a gene: ``(n,)`` for discs, ``(h, w)`` for pixels."""
    note: Callable[[str], str] | None = None
    """What stands below the panel of a gene."""
    remark: Callable[[str], str] | None = None
    """What stands above the panel of a gene, below the title of the column."""


@dataclass(frozen=True)
class Picture:
    """What all panels have in common."""

    columns: list[Column]
    units: Mapping[Scale, str]
    """Labels of the color bars."""
    window: tuple[float, float, float, float]
    """Left, right, top, bottom, in coordinates."""
    um_per_unit: float | None
    """µm per unit of the coordinates, where it is known."""
    image: tuple[Pixels, np.ndarray] | None = None
    """Image to draw beneath."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What stands at the rows of genes whose names say little, such as Ensembl ids."""


def check_panels(
    panels: Sequence[str] | str | None, there: Mapping[str, str | None], default: Iterable[str]
) -> list[str]:
    """The panels to draw: those asked for, once it is known that they can be, or of the default those that can.

    Parameters
    ----------
    panels
        What was asked for.
    there
        All panels, each with the reason why it cannot be drawn, or None.
    default
        Panels to draw unless any are asked for.
    """
    if panels is None:
        return [panel for panel in default if there[panel] is None]
    panels = [panels] if isinstance(panels, str) else list(panels)
    if not panels:
        raise ValueError("`panels` is empty; leave it out, or name at least one.")
    for panel in panels:
        if panel not in there:
            raise ValueError(f"unknown panel {panel!r}; the panels are {', '.join(map(repr, there))}.")
        if there[panel] is not None:
            raise ValueError(f"the panel {panel!r} cannot be drawn: {there[panel]}.")
    return panels


def checked_axes(axes: np.ndarray | Sequence[Axes] | Axes | None, shape: tuple[int, int]) -> np.ndarray | None:
    """The given axes as an array of a shape."""
    if axes is None:
        return None
    axes = np.asarray(axes, dtype=object)
    if axes.size != shape[0] * shape[1] or (axes.ndim == 2 and axes.shape != shape):
        raise ValueError(
            f"`axes` has the shape {axes.shape}, and {shape} is needed (genes, columns): "
            f"plt.subplots({shape[0]}, {shape[1]}, squeeze=False) makes them."
        )
    return axes.reshape(shape)


def fine_enough(axes: np.ndarray | None) -> int:
    """Pixels along the longer side of the largest panel."""
    sides = [] if axes is None else [max(ax.get_window_extent().size) for ax in axes.flat]
    return max([PANEL_PX, *map(int, sides)])


def sketch(image: Histology, matrix: np.ndarray, window: tuple[float, ...], px: int) -> tuple[Pixels, np.ndarray]:
    """An image ``(h, w)`` or ``(h, w, 3)`` in [0, 1], read only as finely as a panel of ``px`` pixels needs.

    Parameters
    ----------
    image
        What to read.
    matrix
        From pixels of its finest level to coordinates of the panel.
    window
        Left, right, top, bottom of the panel, in coordinates.
    px
        Pixels along the longer side of the panel.
    """
    left, top, right, bottom = bounds_in(matrix, window)
    x0, y0, x1, y1 = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
    coarse = max(1.0, max(right - left, bottom - top) / px)  # pixels of the image per pixel that is read
    if 0 < (x1 - x0) * (y1 - y0) < image.width * image.height / 4 and min(x1 - x0, y1 - y0) > 0:
        values = image.read(x0, y0, x1 - x0, y1 - y0, mpp=coarse * image.mpp)
    else:
        x0, y0, x1, y1 = 0, 0, image.width, image.height
        values = image.thumbnail(mpp=coarse * image.mpp)
    if len(values) == 3:
        values = values.transpose(1, 2, 0)
    else:  # stains of other numbers than three: their mean, as bright as it goes
        values = values.mean(0)
        values = values / max(np.quantile(values, 0.995), 1e-6)
    step = np.array([(x1 - x0) / values.shape[1], (y1 - y0) / values.shape[0]])
    return Pixels(matrix @ placed(x0, y0, *step)), np.clip(values, 0, 1)


def placed(x: float, y: float, step_x: float, step_y: float) -> np.ndarray:
    """The matrix from pixels that begin at ``x, y`` and are ``step`` wide."""
    return np.array([[step_x, 0.0, x], [0.0, step_y, y], [0.0, 0.0, 1.0]])


def bounds_in(matrix: np.ndarray, window: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, in pixels, of what a window of the panel shows."""
    left, right, top, bottom = window
    corners = (
        np.array([[left, top, 1], [right, top, 1], [right, bottom, 1], [left, bottom, 1]]) @ np.linalg.inv(matrix).T
    )
    return *corners[:, :2].min(0), *corners[:, :2].max(0)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(
    picture: Picture,
    genes: list[str],
    axes: np.ndarray | None,
    *,
    quantiles: tuple[float, float],
    cmaps: Mapping[Scale, str | Colormap],
    alpha: float | None,
    share_colors: bool = False,
) -> np.ndarray:
    """Draw every panel, ``(genes, columns)``, with one color bar for neighbors of one scale."""
    columns = picture.columns
    if axes is None:
        axes = new_axes(len(genes), picture)
    rows = [[None if column.values is None else column.values(gene) for column in columns] for gene in genes]
    for i, (gene, values) in enumerate(zip(genes, rows, strict=True)):
        alike = rows if share_colors else [values]
        limits = _limits(alike, columns, quantiles)
        drawn = []
        for ax, column, shown in zip(axes[i], columns, values, strict=True):
            drawn.append(draw_panel(ax, picture, column, shown, limits, cmaps, alpha))
            title = [column.title if i == 0 else "", "" if column.remark is None else column.remark(gene)]
            ax.set_title("\n".join(filter(None, title)), fontsize="medium")
            if column.note is not None:
                ax.set_xlabel(column.note(gene), fontsize="small")
        _name_row(axes[i, 0], picture.labels.get(gene, gene), picture.window)
        if share_colors and i < len(genes) - 1:  # the last row draws the bars of all
            continue
        for scale, neighbors in groupby(range(len(columns)), key=lambda j: columns[j].scale):
            run = list(neighbors)
            last = drawn[run[-1]]
            if scale is not None and last is not None:
                extend = _extend([v for v in (row[j] for row in alike for j in run) if v is not None], *limits[scale])
                beside = axes[:, run].ravel() if share_colors else axes[i, run]
                color_bar(last, list(beside), picture.units[scale], extend)
    scale_bar(axes[-1, 0], picture)
    return axes


def new_axes(n_rows: int, picture: Picture, *, inches: float = PANEL_INCHES) -> np.ndarray:
    """Axes of a new figure, ``(n_rows, columns)``, each panel ``inches`` wide."""
    left, right, top, bottom = picture.window
    aspect = np.clip((bottom - top) / (right - left), 0.4, 2.5)
    n_columns = len(picture.columns)
    bars = sum(scale is not None for scale, _ in groupby(column.scale for column in picture.columns))
    width = 0.3 + inches * n_columns + BAR_INCHES * bars
    title_lines = max(1 + column.title.count("\n") for column in picture.columns)
    remarks = any(column.remark is not None for column in picture.columns)
    height = 0.1 + 0.2 * title_lines + (inches * aspect + 0.15 + 0.4 * remarks) * n_rows
    return plt.subplots(n_rows, n_columns, figsize=(width, height), squeeze=False, layout="constrained")[1]


def draw_panel(
    ax: Axes,
    picture: Picture,
    column: Column,
    values: np.ndarray | None,
    limits: Mapping[Scale, tuple[float, float]],
    cmaps: Mapping[Scale, str | Colormap],
    alpha: float | None,
) -> EllipseCollection | AxesImage | None:
    """Draw one panel, upon the image; return what a color bar is for, if there is any."""
    over_pixels = isinstance(column.place, Pixels)
    if picture.image is not None:
        pixels, image = picture.image
        if over_pixels and image.ndim == 3:  # gray, so that the colors above keep their hue
            image = image @ LUMINANCE
        fade = 0.4 if isinstance(column.place, Discs) else None
        pixels.draw(ax, image, alpha=fade, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        alpha = MAP_ALPHA if alpha is None and over_pixels else alpha
    drawn: EllipseCollection | AxesImage | None = None
    if column.place is not None and column.scale is not None and values is not None:
        norm = Normalize(*limits[column.scale])
        drawn = column.place.draw(ax, values, column.scale, cmap=cmaps[column.scale], norm=norm, alpha=alpha)
    left, right, top, bottom = picture.window
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])  # y points down, as in images
    ax.spines[:].set(visible=over_pixels, color="0.8", linewidth=0.6)
    return drawn


def _name_row(ax: Axes, name: str, window: tuple[float, float, float, float]) -> None:
    """The name of a gene along a panel, as small as it must be to fit."""
    left, right, top, bottom = window
    inches = min(ax.bbox.height, ax.bbox.width * (bottom - top) / (right - left)) / ax.figure.dpi
    largest = FontProperties(size="large").get_size_in_points()
    size = float(np.clip(72 * inches / (LETTER * max(len(name), 1)), SMALLEST_POINTS, largest))
    ax.set_ylabel(name, fontsize=size, fontstyle="italic")


def _inner(values: np.ndarray) -> np.ndarray:
    """Known values, without those at the rim of a map, unless that were most of them."""
    known = np.isfinite(values)
    depth = round(RIM * min(values.shape)) if values.ndim == 2 else 0
    if depth == 0:
        return values[known]
    inner = binary_erosion(known, iterations=depth, border_value=1)
    return values[inner if 2 * inner.sum() > known.sum() else known]


def _limits(
    rows: list[list[np.ndarray | None]], columns: list[Column], quantiles: tuple[float, float]
) -> dict[Scale, tuple[float, float]]:
    """Color limits of the scales of a gene, or of several, over all columns of a scale."""
    limits = {}
    drawn = [(column.scale, v) for row in rows for column, v in zip(columns, row, strict=True) if v is not None]
    for scale in {column.scale for column in columns if column.scale is not None}:
        parts = [_inner(v) for of, v in drawn if of == scale]
        shown = np.concatenate([*parts, np.zeros(0 if any(map(len, parts)) else 1)])
        if scale == "expression":
            low, high = np.quantile(shown, quantiles)
        else:
            shown = np.abs(shown)
            high = np.quantile(shown, quantiles[1])
            low = 0.0 if scale == "spread" else -high
        if high <= low:  # nothing varies but a few rare values, or nothing at all
            high = shown.max()
            low = -high if scale == "error" else low
        limits[scale] = float(low), float(high if high > low else low + 1)
    return limits


def _extend(shown: list[np.ndarray], lowest: float, highest: float) -> str:
    """On which sides of a color bar there are values beyond it."""
    low = min(np.nanmin(v, initial=lowest) for v in shown) < lowest
    high = max(np.nanmax(v, initial=highest) for v in shown) > highest
    return {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}[low, high]


def color_bar(drawn: EllipseCollection | AxesImage, axes: list[Axes], label: str, extend: str) -> None:
    """A color bar beside some panels; ``extend`` says where there are values beyond it."""
    places = [ax.get_subplotspec() for ax in axes]
    n_rows = len({place.rowspan.start for place in places if place is not None}) or 1
    bar = axes[0].figure.colorbar(
        drawn, ax=axes, label=label, shrink=0.8, aspect=18 * n_rows, pad=0.02, extend=extend, extendfrac=0.05 / n_rows
    )
    bar.ax.tick_params(labelsize="small")
    bar.ax.yaxis.label.set_fontsize("small")


def scale_bar(ax: Axes, picture: Picture) -> None:
    """A bar of a round number of µm below the panel, at most a third of its width; none where µm are not known."""
    if picture.um_per_unit is None:
        return
    left, right, *_ = picture.window
    third = (right - left) * picture.um_per_unit / 3 * (1 + 1e-6)  # whatever the rounding
    power = 10 ** np.floor(np.log10(third))
    length = float(max(k * power for k in (1, 2, 5) if k * power <= third))
    end = left + length / picture.um_per_unit
    # x in coordinates, y in parts of the panel, and a few points below it
    below, further = (
        ax.get_xaxis_transform() + ScaledTranslation(0, -points / 72, ax.figure.dpi_scale_trans) for points in (5, 8)
    )
    ax.plot([left, end], [0, 0], transform=below, color="black", lw=2, clip_on=False, solid_capstyle="butt")
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    ax.text(left, 0, text, transform=further, ha="left", va="top", fontsize="small")
