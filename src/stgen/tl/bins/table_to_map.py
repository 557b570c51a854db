"""A map of what a table says of bins."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stgen._checks import check_types, genes_of, listed, only_key
from stgen._spatial.records import check_free_key, made_by, provenance, record, shallow_copy, write_image
from stgen._spatial.section import annotated_region, check_sdata
from stgen.tl.bins.bins_to_table import FUNCTION as MADE_BY

__all__ = ["table_to_map"]

logger = logging.getLogger("stgen")

FUNCTION = "tl.table_to_map"


@check_types
def table_to_map(
    sdata: SpatialData,
    table_key: str,
    *,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    columns: Sequence[str] | None = None,
    key_added: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
) -> SpatialData | None:
    """Make a map of what a table of bins holds: the way back from :func:`stgen.tl.bins_to_table`.

    Rows may be missing, in any order, and there may be other genes than before: what scanpy and squidpy leave of a
    table can be drawn, scored and aggregated as every other map. Bins without a row are NaN.

    Parameters
    ----------
    sdata
        Object with the table and its squares.
    table_key
        Table that :func:`stgen.tl.bins_to_table` made.
    genes
        Genes that become channels, in this order; None for all of the table.
    layer
        Layer of their values; ``X`` by default.
    columns
        Instead of genes, numeric columns of ``obs``, such as scores of gene sets.
    key_added
        Name of the map; default ``f"{table_key}_map"``.
    overwrite
        Whether an earlier result of this function may be replaced.
    copy
        Return a copy with the result and leave ``sdata`` alone.

    Returns
    -------
    ``None``, or the copy. Written is ``sdata.images[key_added]``, float32 ``(c, y, x)``, on the bins of the map from
    which the table was made, and ``sdata.attrs["stgen"][key_added]``: ``table_key``, ``map_key``, ``layer``, ``genes``
    or ``columns``, ``bin_um``, ``function``, ``version``.

    Raises
    ------
    KeyError
        If there is no such table, layer, gene or column, or the table's squares are gone.
    TypeError
        If a column is not numeric.
    ValueError
        If the table is not one of bins, two rows are of one bin, or the key exists.

    Examples
    --------
    >>> from stgen import datasets, pp, tl
    >>> sdata = datasets.simulated_section(size_um=300)
    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1"])
    >>> tl.bins_to_table(sdata, "counts")
    >>> sdata["counts_bins"].obs["epithelial"] = sdata["counts_bins"][:, "EPCAM"].X[:, 0] > 0
    >>> tl.table_to_map(sdata, "counts_bins", columns=["epithelial"], key_added="epithelial")
    >>> sdata["epithelial"].shape == (1, *sdata["counts"].shape[1:])
    True
    """
    check_sdata(sdata)
    only_key(sdata.tables, table_key, argument="table_key", what="table")
    table = sdata.tables[table_key]
    made = _made_as_bins(table, table_key)
    if columns is not None and (genes is not None or layer is not None):
        raise ValueError("pass either columns=<of obs>, or genes= and layer=, not both.")
    if columns is None:
        names = genes_of(genes, table.var_names, f"the table {table_key!r}")
        if layer is not None and layer not in table.layers:
            raise KeyError(f"There is no layer {layer!r}; found {listed(table.layers)}.")
    else:
        names = _numeric_columns(table, columns)
    region, instances = annotated_region(sdata, table, table_key, None)
    height, width = int(made["height"]), int(made["width"])
    instances = np.asarray(instances, dtype=np.int64)
    if len(np.unique(instances)) < len(instances):
        raise ValueError(f"the table {table_key!r} has several rows of one bin: its instance ids must be unique.")
    if len(instances) == 0 or instances.min() < 0 or instances.max() >= height * width:
        raise ValueError(
            f"the instance ids of the table {table_key!r} are not those of {height} x {width} bins; found "
            f"{listed(instances)}."
        )
    key_added = f"{table_key}_map" if key_added is None else key_added
    check_free_key(sdata, "images", key_added, overwrite=overwrite, ours=made_by(sdata, key_added, FUNCTION))

    values = np.full((len(names), height * width), np.nan, np.float32)
    source = table.X if layer is None else table.layers[layer]
    for i, name in enumerate(names):
        column = table.obs[name].to_numpy() if columns is not None else source[:, table.var_names.get_loc(name)]
        values[i, instances] = _dense(column)
    target = shallow_copy(sdata) if copy else sdata
    target.images.pop(key_added, None)
    write_image(
        target, key_added, values.reshape(-1, height, width), channels=names,
        transformations=get_transformation(sdata[region], get_all=True),
    )  # fmt: skip
    entry = provenance(
        FUNCTION, table_key=table_key, map_key=made.get("map_key"), layer=layer, bin_um=float(made["bin_um"]),
        **{"genes" if columns is None else "columns": names},
    )  # fmt: skip
    record(target, key_added, entry)
    logger.info("A map of %d channels: images[%r]; sdata.write(path) saves it.", len(names), key_added)
    return target if copy else None


def _made_as_bins(table: AnnData, table_key: str) -> dict:
    """The record of :func:`stgen.tl.bins_to_table` in a table."""
    for entry in table.uns.get("stgen", {}).values():
        if entry.get("function") == MADE_BY:
            return dict(entry)
    raise ValueError(
        f"the table {table_key!r} is not one of bins: stgen.{MADE_BY} makes such tables. Spots become a map by "
        "stgen.pp.spots_to_map, cells by stgen.pp.rasterize."
    )


def _numeric_columns(table: AnnData, columns: Sequence[str]) -> list[str]:
    columns = list(columns)
    missing = [name for name in columns if name not in table.obs]
    if missing:
        raise KeyError(f"obs has no column {listed(missing)}; found {listed(table.obs, 20)}.")
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(f"`columns` must be names without repetition, at least one; found {listed(columns)}.")
    other = [name for name in columns if not pd.api.types.is_numeric_dtype(table.obs[name])]
    if other:
        raise TypeError(
            f"the columns {listed(other)} of obs are not numeric, and a map holds numbers; "
            "stgen.pl.domains draws categories of a table as they are."
        )
    return columns


def _dense(column) -> np.ndarray:
    """A column as a float32 vector."""
    column = column.compute() if hasattr(column, "compute") else column
    column = column.toarray() if sparse.issparse(column) else np.asarray(column)
    return column.astype(np.float32).ravel()
