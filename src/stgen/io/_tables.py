"""Tables as Parquet and CSV."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from stgen._checks import check_types, genes_of, listed
from stgen._spatial.files import checked_path, whole_file
from stgen._spatial.section import get_table

__all__ = ["as_frame", "write_table"]

logger = logging.getLogger("stgen")

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")


@check_types
def write_table(
    data: SpatialData | AnnData,
    path: str | os.PathLike,
    *,
    table_key: str | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a table as Parquet or CSV, a row per location, for R, DuckDB and spreadsheets.

    Parameters
    ----------
    data
        Table, or object that holds it.
    path
        File to write; its name ends in ``.parquet``, ``.csv``, ``.tsv``, ``.csv.gz`` or ``.tsv.gz``.
    table_key
        Table of a SpatialData; None if there is one.
    genes
        Genes to write, in this order; None for all.
    layer
        Layer to write, such as a prediction; ``X`` by default.
    overwrite
        Whether a file of this name may be replaced.

    Returns
    -------
    The path. The columns are ``name`` (of the row), those of ``obs``, ``spatial_x`` and ``spatial_y`` (of
    ``obsm["spatial"]``, where there is one), and the genes.

    Raises
    ------
    KeyError
        If there is no such table, gene or layer.
    TypeError
        If ``data`` is neither of the two.
    ValueError
        If the name has another ending, the file exists, or two columns have one name.
    FileNotFoundError
        If the folder does not exist.

    Examples
    --------
    >>> import pandas as pd
    >>> from stgen import datasets, io
    >>> sdata = datasets.simulated_section(size_um=300)
    >>> path = io.write_table(sdata, "spots.csv", table_key="spot_counts", genes=["EPCAM", "COL1A1"])
    >>> list(pd.read_csv(path))[-2:]
    ['EPCAM', 'COL1A1']
    """
    table = get_table(data, table_key=table_key)
    genes = genes_of(genes, table.var_names, "the table")
    if layer is not None and layer not in table.layers:
        raise KeyError(f"There is no layer {layer!r}; found {listed(table.layers)}.")
    path = checked_path(path, SUFFIXES, overwrite=overwrite)
    frame = as_frame(table, genes, layer)
    with whole_file(path) as part:
        if path.name.lower().endswith(".parquet"):
            frame.to_parquet(part, index=False)
        else:
            separator = "\t" if ".tsv" in path.name.lower() else ","
            frame.to_csv(part, index=False, sep=separator)
    logger.info("%d rows and %d columns: %s.", *frame.shape, path)
    return path


def as_frame(table: AnnData, genes: Sequence[str], layer: str | None) -> pd.DataFrame:
    """A row per location: its name, ``obs``, where it is, and its genes."""
    values = (table.X if layer is None else table.layers[layer])[:, table.var_names.get_indexer(genes)]
    values = values.compute() if hasattr(values, "compute") else values
    values = values.toarray() if sparse.issparse(values) else np.asarray(values)
    parts = [pd.DataFrame({"name": table.obs_names}), table.obs.reset_index(drop=True)]
    if "spatial" in table.obsm:
        parts.append(pd.DataFrame(np.asarray(table.obsm["spatial"])[:, :2], columns=["spatial_x", "spatial_y"]))
    frame = pd.concat([*parts, pd.DataFrame(values, columns=list(genes))], axis=1)
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()].unique()
        raise ValueError(
            f"{listed(twice)}: two columns of one name, among the row's name, obs, the coordinates and the genes. "
            "Rename those of obs, or leave genes out with genes=."
        )
    return frame
