"""Domains, cell types and annotations side by side, in colors that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from spatialdata import SpatialData
from xarray import DataArray

from stgen._checks import check_share, check_types
from stgen._spatial.image import affine_to, histology_of, is_micrometers
from stgen._spatial.section import get_section, get_table, shared_system
from stgen.pl._colors import CATEGORIES, GRAY
from stgen.pl._map_tables import place_of
from stgen.pl._panels import (
    Column,
    Picture,
    Pixels,
    checked_axes,
    draw_panel,
    fine_enough,
    new_axes,
    placed,
    scale_bar,
    sketch,
)

__all__ = ["domains"]

PANEL_INCHES = 4.5  # along a side: there may be many small groups


@check_types
def domains(
    data: SpatialData | AnnData,
    keys: str | Sequence[str] = "domains",
    *,
    reference: str | None = None,
    highlight: str | Sequence[str] | None = None,
    image_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    mpp: float | None = None,
    spot_um: float | None = None,
    coordinate_system: str | None = None,
    alpha: float | None = None,
    axes: np.ndarray | Sequence[Axes] | Axes | None = None,
) -> np.ndarray:
    """Draw groups of locations over the section, such as domains beside an annotation. Stem, Figure 3.

    With a reference, each group has the color of the group of the reference that it shares most locations with, one to
    one; groups that are left over have colors of their own. The title gives the agreement of both: adjusted Rand index
    (ARI) and normalized mutual information (NMI), over the locations where the reference is known.

    Parameters
    ----------
    data
        Object with the groups.
    keys
        What to draw: columns of a table's ``obs`` (also where masks have their names, if an argument for columns is
        given), such as those of :func:`stgen.tl.find_domains` and :func:`stgen.tl.localize_cell_types`, or else masks
        in ``sdata.labels``, where 0 is none.
    reference
        Column, or mask, whose colors the others take; drawn first.
    highlight
        Groups of the reference to draw in color, and with them what has their color elsewhere; all others are gray.
        Without a reference, groups of the first of ``keys``.
    image_key
        Image to draw beneath. None: no image.
    table_key, shapes_key
        Columns only: elements of a SpatialData; needed only where there are several.
    mpp
        Columns only: µm per pixel, where the data do not say; see :func:`stgen.pp.embed`.
    spot_um
        Columns only: diameter of the discs in µm; see :func:`stgen.pl.maps`.
    coordinate_system
        Masks only: the one to draw in; by default one in micrometers that all share, else "global".
    alpha
        Opacity of what is drawn over an image.
    axes
        Axes to draw into, one for each panel; by default a new figure.

    Returns
    -------
    Array of Axes, ``(1, panels)``, each with a legend of its groups. Of columns, the discs are the only collection on
    each; of masks, the mask is the last image. Both hold the number of the color.

    Raises
    ------
    KeyError
        If a column, mask, image or a group to highlight does not exist.
    ValueError
        If a column holds numbers rather than groups, nothing is known of the reference, masks to compare differ in
        shape, or ``axes`` has the wrong number.

    Examples
    --------
    >>> from stgen import datasets, pl, tl
    >>> sdata = datasets.simulated_section(size_um=500)
    >>> tl.find_domains(sdata, table_key="cell_counts", n_domains=6)
    >>> axes = pl.domains(sdata, "domains", reference="cell_type", table_key="cell_counts", image_key="he")
    >>> [ax.get_title().splitlines()[0] for ax in axes[0]]
    ['cell_type', 'domains']
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    keys = list(dict.fromkeys([*([] if reference is None else [reference]), *keys]))
    if not keys:
        raise ValueError('`keys` is empty; name what to draw, such as pl.domains(data, "domains").')
    if alpha is not None:
        check_share("alpha", alpha, "[0, 1]")
    axes = checked_axes(axes, (1, len(keys)))
    of_columns = {"table_key": table_key, "shapes_key": shapes_key, "mpp": mpp, "spot_um": spot_um}
    asked = any(value is not None for value in of_columns.values())
    if isinstance(data, SpatialData) and not asked and all(key in data.labels for key in keys):
        groups = {key: _of_mask(data, key) for key in keys}
        window, columns, um_per_unit, image = _place_masks(data, keys, coordinate_system, image_key, fine_enough(axes))
    else:
        if coordinate_system is not None:
            raise ValueError("coordinate_system: not for columns of a table, which is what `keys` names.")
        table = get_table(data, table_key=table_key, shapes_key=shapes_key)
        groups = {key: _of_column(table, key) for key in keys}
        section = get_section(data, image_key=image_key, table_key=table_key, shapes_key=shapes_key, mpp=mpp)
        discs, window = place_of(section, spot_um)
        columns, um_per_unit, image = dict.fromkeys(keys, (discs, slice(None))), None, None
        if section.mpp is not None:
            um_per_unit = 1.0
        if section.image is not None:
            image = sketch(section.image, placed(0, 0, section.image.mpp, section.image.mpp), window, fine_enough(axes))
    if highlight is not None and reference is None and len(keys) > 1:
        raise ValueError(
            "groups of several results have nothing in common but their names: pass reference= with highlight=."
        )
    agreement = {} if reference is None else _agreement(groups, reference, columns)
    color = _colors(groups, keys[0], matched=reference is not None)
    shown = _highlighted(groups[keys[0]], color[keys[0]], keys[0], highlight)
    n_colors = 1 + max(max(numbers) for numbers in color.values())
    if shown is None and n_colors > len(CATEGORIES):
        raise ValueError(
            f"{', '.join(map(repr, keys))} have {n_colors} groups, and {len(CATEGORIES)} colors can be told apart; "
            "pass highlight=<some of them>, or fewer keys."
        )

    titles = {
        key: key + (f"\nARI {agreement[key][0]:.2f}, NMI {agreement[key][1]:.2f}" if key in agreement else "")
        for key in keys
    }
    panels = [Column(titles[key], None, columns[key][0]) for key in keys]
    picture = Picture(panels, {}, window, um_per_unit, image)
    axes = new_axes(1, picture, inches=PANEL_INCHES) if axes is None else np.reshape(axes, (1, -1))
    palette = [CATEGORIES[i % len(CATEGORIES)] if shown is None or i in shown else GRAY for i in range(n_colors)]
    for ax, key, panel in zip(axes[0], keys, panels, strict=True):
        code, names = groups[key]
        numbers = np.array([*color[key], np.nan])  # -1, none, is the last
        values = numbers[code[columns[key][1]]]
        panel = panel._replace(scale="category")
        draw_panel(
            ax, picture, panel, np.ma.masked_invalid(values), {"category": (-0.5, n_colors - 0.5)},
            {"category": ListedColormap(palette)}, alpha,
        )  # fmt: skip
        ax.set_title(panel.title, fontsize="medium")
        order = np.argsort(color[key])
        _legend(ax, [names[i] for i in order], [palette[color[key][i]] for i in order])
    scale_bar(axes[0, 0], picture)
    return axes


# ---- groups ----------------------------------------------------------------------------------------------------------


def _of_column(table: AnnData, key: str) -> tuple[np.ndarray, list[str]]:
    """Number of the group of each row, -1 for none, and the names of the groups."""
    if key not in table.obs:
        raise KeyError(
            f"there is no column {key!r} in obs, which has {', '.join(map(repr, table.obs)) or 'none'}. "
            f"stgen.tl.find_domains(data, key_added={key!r}) makes one; a mask must be in sdata.labels, and all of "
            "`keys` with it."
        )
    column = table.obs[key]
    if pd.api.types.is_float_dtype(column):
        raise ValueError(
            f"obs[{key!r}] holds numbers ({column.dtype}), not groups; convert it with .astype(str) if it names them."
        )
    groups = column.astype("category").cat.remove_unused_categories().cat
    if not len(groups.categories):
        raise ValueError(f"obs[{key!r}] is missing everywhere; there is nothing to draw.")
    names = [str(name) for name in groups.categories]
    if all(name.isdigit() for name in names):  # "10" after "9"
        order = sorted(range(len(names)), key=lambda i: int(names[i]))
        rank = np.argsort([*order, len(order)])
        return np.append(rank[:-1], -1)[groups.codes.to_numpy()], [names[i] for i in order]
    return groups.codes.to_numpy().astype(int), names


def _of_mask(sdata: SpatialData, key: str) -> tuple[np.ndarray, list[str]]:
    """The same of a mask, ``(y, x)``; names from the record of the function that made it."""
    element = sdata.labels[key]
    if not isinstance(element, DataArray):
        raise ValueError(f"the mask {key!r} has several scales; pass one of a single scale.")
    values = np.asarray(element.data)
    present = np.unique(values[values > 0])
    if not len(present):
        raise ValueError(f"the mask {key!r} is 0 everywhere; there is nothing to draw.")
    entry = sdata.attrs.get("stgen", {}).get(key, {})
    names = entry["types"].split("\n") if "types" in entry else []
    code = np.where(values > 0, np.searchsorted(present, values), -1)
    return code, [names[number - 1] if number <= len(names) else str(number) for number in present]


def _agreement(
    groups: dict[str, tuple[np.ndarray, list[str]]], reference: str, places: dict[str, tuple[Any, Any]]
) -> dict[str, tuple[float, float]]:
    """ARI and NMI of each with the reference, where that is known; none where the reference is a single group."""
    truth, names = groups[reference]
    out = {}
    for key, (code, _) in groups.items():
        if key == reference:
            continue
        here, there = (places[name][0] for name in (key, reference))
        if code.shape != truth.shape or (isinstance(here, Pixels) and not np.allclose(here.matrix, there.matrix)):
            raise ValueError(
                f"{key!r} is not on the bins of the reference {reference!r} (shapes {code.shape} and {truth.shape}); "
                "only masks on the same bins can be compared."
            )
        known = truth >= 0
        if len(names) > 1:
            labels = (
                truth[known],
                code[known],
            )  # what has no group in `key` is a group of its own, as in label_agreement
            out[key] = adjusted_rand_score(*labels), normalized_mutual_info_score(*labels)
    return out


def _colors(groups: dict[str, tuple[np.ndarray, list[str]]], first: str, *, matched: bool) -> dict[str, list[int]]:
    """Number of the color of each group: of the groups of the first one in order, of others those that they share most with."""
    truth, names = groups[first]
    color = {first: list(range(len(names)))}
    for key, (code, others) in groups.items():
        if key == first:
            continue
        if not matched:
            color[key] = list(range(len(others)))
            continue
        both = (code >= 0) & (truth >= 0)
        shared = np.zeros((len(others), len(names)))
        np.add.at(shared, (code[both], truth[both]), 1)
        mine, theirs = linear_sum_assignment(-shared)
        partner = {i: j for i, j in zip(mine, theirs, strict=True) if shared[i, j] > 0}
        free = iter(sorted({*range(len(names) + len(others))} - {*range(len(names))}))
        color[key] = [int(partner[i]) if i in partner else next(free) for i in range(len(others))]
    return color


def _highlighted(
    first: tuple[np.ndarray, list[str]], color: list[int], key: str, highlight: str | Sequence[str] | None
) -> set[int] | None:
    """Numbers of the colors that are shown; None for all."""
    if highlight is None:
        return None
    wanted = [str(name) for name in ([highlight] if np.isscalar(highlight) else highlight)]
    absent = [name for name in wanted if name not in first[1]]
    if not wanted:
        raise ValueError("`highlight` is empty; leave it out, or name at least one group.")
    if absent:
        raise KeyError(
            f"{key!r} has no group {', '.join(map(repr, absent))}; its groups are {', '.join(map(repr, first[1]))}."
        )
    return {color[first[1].index(name)] for name in wanted}


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _place_masks(sdata: SpatialData, keys: list[str], system: str | None, image_key: str | None, px: int) -> tuple:
    """Window, place and shown bins of each mask, µm per unit where known, and the image beneath."""
    if image_key is not None and image_key not in sdata.images:
        raise KeyError(
            f"`image_key`: there is no image {image_key!r}; sdata.images has {', '.join(map(repr, sdata.images))}."
        )
    names = [*keys, *([] if image_key is None else [image_key])]
    system = shared_system(sdata, names, system)
    columns, corners = {}, []
    for key in keys:
        height, width = sdata.labels[key].shape
        matrix = affine_to(sdata.labels[key], system)[0]
        step = max(1, max(height, width) // px)
        at = tuple(slice((step - 1) // 2, size, step) for size in (height, width))
        columns[key] = Pixels(matrix @ placed(0, 0, step, step)), at
        corners += [matrix @ [x, y, 1] for x in (0, width) for y in (0, height)]
    (left, top), (right, bottom) = np.min(corners, 0)[:2], np.max(corners, 0)[:2]
    window = float(left), float(right), float(top), float(bottom)
    um_per_unit = 1.0 if is_micrometers(system) else None
    image = None
    if image_key is not None:
        histology = histology_of(sdata, image_key, mpp=1.0)  # in pixels
        image = sketch(histology, affine_to(sdata.images[image_key], system)[0], window, px)
    return window, columns, um_per_unit, image


def _legend(ax: Axes, names: list[str], colors: list[str]) -> None:
    """Names of the groups below the panel; those in gray are one entry."""
    shown = [(name, color) for name, color in zip(names, colors, strict=True) if color != GRAY]
    if len(shown) < len(names):
        shown.append(("other", GRAY))
    handles = [Line2D([], [], marker="s", ls="", ms=6, color=color, label=name) for name, color in shown]
    below = ax.transAxes + ScaledTranslation(0, -22 / 72, ax.figure.dpi_scale_trans)  # and below the bar of the scale
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=2 if len(shown) > 3 else 1, frameon=False,
        fontsize="small", handletextpad=0.2, columnspacing=0.8, borderaxespad=0,
    )  # fmt: skip
