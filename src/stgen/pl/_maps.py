"""Genes over the section: what was measured, what was predicted, and how sure the prediction is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from spatialdata import SpatialData

from stgen._checks import check_share, check_types
from stgen.pl._colors import check_cmaps
from stgen.pl._map_images import picture_of_maps
from stgen.pl._map_tables import picture_of_table
from stgen.pl._panels import Scale, draw

__all__ = ["maps"]

Panel = Literal["histology", "measured", "predicted", "samples", "truth", "spread", "error"]


@check_types
def maps(
    data: SpatialData | AnnData,
    genes: str | Sequence[str],
    *,
    keys: str | Sequence[str] = "predicted",
    low_res: str | None = None,
    truth_key: str | None = None,
    panels: Panel | Sequence[Panel] | None = None,
    image_key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    truth_layer: str | None = None,
    mpp: float | None = None,
    spot_um: float | None = None,
    bounds_um: tuple[float, float, float, float] | None = None,
    coordinate_system: str | None = None,
    normalize: bool | None = None,
    share_colors: bool = False,
    quantiles: tuple[float, float] = (0.01, 0.99),
    cmap: str = "viridis",
    spread_cmap: str = "magma",
    error_cmap: str = "PuOr",
    alpha: float | None = None,
    axes: np.ndarray | Sequence[Axes] | Axes | None = None,
) -> np.ndarray:
    """Draw genes over the section: measured, predicted, and the spread of the prediction.

    One row per gene. What was measured and what was predicted are drawn on one scale and with the same colors, so that
    a map which is too flat looks it.

    Results in a table are drawn as discs of the true size of the spots, and measured counts are brought to the scale of
    the prediction. Maps of counts, which are images of a SpatialData, are drawn bin by bin, transparent where they are
    unknown (NaN). Larger bins, and spots, hold more counts: these are divided by the number of the finest bins drawn
    that one of them covers, as the title says, and are then comparable. Genes that a map without a model could not
    predict out of fold (``trusted`` of :func:`stgen.tl.superresolve`) are titled "share not predictable, counts follow
    depth": what is drawn of them is the expected share of the counts of all genes.

    Parameters
    ----------
    data
        Object with the result of :func:`stgen.tl.predict_expression`, of :func:`stgen.tl.superresolve`, or with other
        maps of counts, such as :func:`stgen.pp.rasterize` makes.
    genes
        Genes to draw, one row each.
    keys
        Results to draw, each by its ``key_added``: images of the SpatialData, or else layers of a table. Several stand
        side by side and share their colors.
    low_res
        Maps only: what was measured at low resolution, a map of larger bins or a table of spots. Of a table, the layer
        is drawn that :func:`stgen.tl.superresolve` made ``keys`` from, ``X`` by default.
    truth_key
        Maps only: map of the true counts.
    panels
        What to draw, from left to right: ``"histology"`` (the image alone), ``"measured"``, ``"predicted"``,
        ``"samples"`` (maps only: two of those that were kept), ``"truth"`` (maps only), ``"spread"`` (standard
        deviation of the samples) and ``"error"`` (predicted minus measured; of maps predicted minus truth, which must
        be on the same grid). Predicted, spread and error are drawn for each of ``keys``. By default measured,
        predicted, truth and spread, as far as they exist.
    image_key
        Image to draw beneath, read at low resolution. None: no image.
    table_key, shapes_key
        Tables only: elements of a SpatialData; needed only where there are several.
    truth_layer
        Tables only: layer with the measured counts; by default ``X``.
    mpp
        Tables only: µm per pixel, where the data do not say; see :func:`stgen.pp.embed`.
    spot_um
        Tables only: diameter of the discs in µm. By default that of the spots, or the distance between neighbors where
        the locations are no circles of one size.
    bounds_um
        Maps only: part to draw as ``(x_min, y_min, x_max, y_max)``, in µm from the origin of the coordinate system. By
        default where the first gene is known.
    coordinate_system
        Maps only: the one to draw in; by default one in micrometers that all elements share, else ``"global"``.
    normalize
        Maps only: draw counts per 10,000 counts of all genes. Each map that is drawn needs ``<its key>_total`` beside
        it, which :func:`stgen.tl.superresolve` writes without a model.
    share_colors
        One scale, and one color bar, for all genes; by default each gene has its own.
    quantiles
        Values below and above these quantiles share the first and last color. Expression: of measured, predicted and
        true values together. Spread starts at zero, errors are symmetric about zero; both end at the upper quantile.
        What lies at the rim of a map, where it is least certain, does not count.
    cmap, spread_cmap, error_cmap
        Color maps of expression, spread and error; the defaults can be told apart by color-blind readers.
    alpha
        Opacity of what is drawn over the image. By default discs are opaque, and maps let an image of ``image_key``
        through.
    axes
        Axes to draw into, ``(genes, columns)``; by default a new figure.

    Returns
    -------
    Array of Axes, ``(genes, columns)``. Of a table, the discs are the only collection on each, with the values as its
    array and in the order of the table's rows; the coordinates are µm (from the upper left corner of the image, if
    there is one). Of maps, the last image on each is the map (maps larger than a panel are strided), and the
    coordinates are those of the coordinate system, so that what spatialdata-plot draws in it lies in the same place.

    Raises
    ------
    KeyError
        If a gene, a result or an element does not exist.
    ValueError
        If a gene was not predicted, results are on different scales, maps share no coordinate system, the truth is on
        another grid than a prediction whose error is asked for, ``axes`` has the wrong shape, or an argument does not
        fit the kind of result.

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

    Maps of counts, here of all molecules in bins of 10 µm beside what the spots measured of them:

    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1"], bin_um=10, key_added="counts")
    >>> axes = pl.maps(sdata, "EPCAM", keys="counts", low_res="spot_counts", image_key="he")
    >>> axes[0, 0].get_title().splitlines(), axes[0, 1].get_title()
    (['measured', '55 µm spots ÷ 23.8'], 'counts')
    """
    genes = [genes] if isinstance(genes, str) else list(genes)
    keys = [keys] if isinstance(keys, str) else list(keys)
    if not genes:
        raise ValueError('`genes` is empty; name at least one, such as pl.maps(data, ["EPCAM"]).')
    for_maps: dict[str, Any] = {
        "low_res": low_res,
        "truth_key": truth_key,
        "bounds_um": bounds_um,
        "coordinate_system": coordinate_system,
        "normalize": normalize or None,
    }
    check_cmaps(cmap=cmap, spread_cmap=spread_cmap, error_cmap=error_cmap)
    if alpha is not None:
        check_share("alpha", alpha, "[0, 1]")
    for_tables: dict[str, Any] = {
        "table_key": table_key, "shapes_key": shapes_key, "truth_layer": truth_layer, "mpp": mpp, "spot_um": spot_um
    }  # fmt: skip
    what: dict[str, Any] = {"panels": panels, "axes": axes, "image_key": image_key}
    are_maps = isinstance(data, SpatialData) and any(key in data.images for key in keys)
    _refuse(for_tables if are_maps else for_maps, keys, are_maps=are_maps)
    if not are_maps and isinstance(data, SpatialData):
        _refuse_unknown(data, keys)
    if are_maps:
        picture, axes = picture_of_maps(data, genes, keys, **what, **for_maps)
    else:
        picture, axes = picture_of_table(data, genes, keys, **what, **for_tables)
    cmaps: dict[Scale, str | Colormap] = {"expression": cmap, "spread": spread_cmap, "error": error_cmap}
    return draw(picture, genes, axes, quantiles=quantiles, cmaps=cmaps, alpha=alpha, share_colors=share_colors)


def _refuse_unknown(sdata: SpatialData, keys: list[str]) -> None:
    """Say which maps there are, where none of the keys is a result of any kind."""
    records = [sdata.attrs.get("stgen", {}), *(table.uns.get("stgen", {}) for table in sdata.tables.values())]
    maps = [key for key in records[0] if key in sdata.images]
    if keys and maps and not any(key in record for record in records for key in keys):
        raise KeyError(
            f"there is no result {', '.join(map(repr, keys))}; the maps in sdata.images are "
            f"{', '.join(map(repr, maps))}: pass keys=<some of them>."
        )


def _refuse(options: dict[str, object], keys: list[str], *, are_maps: bool) -> None:
    """Say that arguments were given which the kind of result does not have."""
    given = [name for name, value in options.items() if value is not None]
    if given and are_maps:
        raise ValueError(f"{', '.join(given)}: only for results in a table, and {keys[0]!r} is a map in sdata.images.")
    if given:
        raise KeyError(
            f"{', '.join(given)}: only for maps, and sdata.images has no map {', '.join(map(repr, keys))}; pass "
            "keys=<key_added of stgen.tl.superresolve>."
        )
