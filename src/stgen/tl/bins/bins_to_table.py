"""Bins of a map as a table, linked to squares."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import dask.array as da
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Affine

from stgen._checks import check_types, genes_of
from stgen._spatial.grid import Grid, apply_affine, get_map
from stgen._spatial.normalized import total_of
from stgen._spatial.records import check_free_key, made_by, provenance, record, shallow_copy
from stgen._spatial.section import check_sdata, shared_system
from stgen.tl.evaluation.maps import check_same_grid
from stgen.tl.superresolution.result import FUNCTION as SUPERRESOLVED
from stgen.tl.superresolution.result import TABLE
from stgen.transforms import TARGET_SUM

__all__ = ["FUNCTION", "bins_to_table"]

logger = logging.getLogger("stgen")

FUNCTION = "tl.bins_to_table"
Values: TypeAlias = np.ndarray | sparse.csr_matrix | da.Array


@check_types
def bins_to_table(
    sdata: SpatialData,
    map_key: str,
    *,
    genes: Sequence[str] | None = None,
    normalize: bool = False,
    spread: bool = True,
    storage: Literal["dense", "sparse", "lazy"] = "dense",
    coordinate_system: str | None = None,
    key_added: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
) -> SpatialData | None:
    """Make a table of the bins of a map, linked to squares, for scanpy, squidpy and spatialdata-plot.

    A row is a bin on which all genes are known; bins off the tissue (NaN) have none. :func:`stgen.tl.table_to_map` is
    the way back: what scanpy has computed for each bin becomes a map again.

    Parameters
    ----------
    sdata
        Object with the map.
    map_key
        Map ``(c, y, x)`` in ``sdata.images``: from :func:`stgen.tl.superresolve`, :func:`stgen.pp.rasterize`, or your
        own.
    genes
        Genes to take, in this order; None for all of the map.
    normalize
        Also make the layer of counts per 10,000 counts of all genes, by the map ``f"{map_key}_total"``, which
        :func:`stgen.tl.superresolve` writes without a model.
    spread
        Also make the layer of standard deviations, where there is a map ``f"{map_key}_std"``.
    storage
        How ``X`` and layers are held: ``"dense"`` arrays; ``"sparse"``, for maps that are mostly zero, such as counted
        ones; ``"lazy"``, dask arrays that read the map when they are computed, for sections that do not fit in memory.
    coordinate_system
        The one of ``obsm["spatial"]``; None: a micrometer one if there is one, else "global", else the only one.
    key_added
        Name of the table; default ``f"{map_key}_bins"``.
    overwrite
        Whether an earlier result of this function may be replaced.
    copy
        Return a copy with the result and leave ``sdata`` alone.

    Returns
    -------
    ``None``, or the copy. Written are ``sdata.tables[key_added]``, rows from top to bottom and from left to right, and
    the squares that it annotates, ``sdata.shapes[f"{key_added}_squares"]``:

    - ``X``: the values of the map, float32 ``(n_bins, G)``, in its unit
    - ``layers[f"{key_added}_std"]``: standard deviations, in the same unit
    - ``layers[f"{key_added}_normalized"]``: counts per 10,000, with ``normalize``; 0 where the total is 0
    - ``obs``: ``region`` and ``instance_id`` (the link), ``array_row`` and ``array_col`` (the bin, from 0), and
      ``total`` (counts of all genes), where there is a map ``f"{map_key}_total"``
    - ``var``: what :func:`stgen.tl.superresolve` found out about each gene without a model: ``score``, ``trusted``, ...
    - ``obsm["spatial"]``: centers as x, y in the coordinate system
    - ``uns["stgen"][key_added]``: ``map_key``, ``unit``, ``bin_um``, ``height``, ``width``, ``coordinate_system``,
      ``genes``, ``n_bins``, ``storage``, ``function``, ``version``

    Raises
    ------
    KeyError
        If there is no such map, gene or coordinate system, or no total by which to normalize.
    ValueError
        If no bin is known for all genes, an option is none, or a key exists.

    Notes
    -----
    Dense and sparse tables are made gene by gene; the map is never held beside them. A dense layer takes 4 bytes per
    bin and gene: 1.2 GB for the 300,000 bins of 10 µm of a Visium section and 1,000 genes.

    Examples
    --------
    >>> import scanpy as sc
    >>> from stgen import datasets, pp, tl
    >>> sdata = datasets.simulated_section(size_um=300)
    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1", "CD3E"])
    >>> tl.bins_to_table(sdata, "counts", storage="sparse")
    >>> bins = sdata["counts_bins"]
    >>> bins.n_obs == int(sdata["counts"][0].notnull().sum()), list(bins.obs)
    (True, ['region', 'instance_id', 'array_row', 'array_col'])
    >>> sc.pp.log1p(bins)  # as any table
    """
    check_sdata(sdata)
    genes = genes_of(genes, get_map(sdata, map_key).coords["c"].values, f"the map {map_key!r}")
    grid = Grid.of_map(sdata, map_key)
    system = shared_system(sdata, [map_key], coordinate_system)
    total = total_of(sdata, map_key, needed=bool(normalize))
    std_key = f"{map_key}_std" if spread and f"{map_key}_std" in sdata.images else None
    if std_key is not None:
        get_map(sdata, std_key, genes)
        check_same_grid(sdata, map_key, std_key)
    key_added = f"{map_key}_bins" if key_added is None else key_added
    squares_key = f"{key_added}_squares"
    _check_keys(sdata, key_added, squares_key, overwrite=overwrite)

    reader = _Bins.of(get_map(sdata, map_key, genes).data, map_key, storage)
    bins = pd.DataFrame({"instance_id": reader.rows, "array_row": reader.rows // grid.width})
    bins["array_col"] = reader.rows % grid.width
    if total is not None:
        bins["total"] = np.asarray(total.data[0]).ravel()[reader.rows].astype(np.float32)
    table = AnnData(reader.read(get_map(sdata, map_key, genes).data), var=_known_of_genes(sdata, map_key, genes))
    table.obs = bins.set_index(bins["instance_id"].astype(str).rename(None))
    if std_key is not None:
        table.layers[f"{key_added}_std"] = reader.read(get_map(sdata, std_key, genes).data)
    if normalize:
        table.layers[f"{key_added}_normalized"] = _normalized(table.X, bins["total"].to_numpy())
    centers = bins[["array_col", "array_row"]].to_numpy() + 0.5
    table.obsm["spatial"] = apply_affine(grid.to_system(system), centers)
    made = sdata.attrs.get("stgen", {}).get(map_key, {})
    entry = provenance(
        FUNCTION, map_key=map_key, unit=made.get("unit"), bin_um=grid.bin_um, height=grid.height, width=grid.width,
        coordinate_system=system, genes=genes, n_bins=table.n_obs, storage=storage,
        values_in="X" if made.get("function") == SUPERRESOLVED else None,
    )  # fmt: skip
    record(table, key_added, entry)
    table.obs.insert(0, "region", pd.Categorical([squares_key] * table.n_obs))
    target = shallow_copy(sdata) if copy else sdata
    for container, key in ((target.tables, key_added), (target.shapes, squares_key)):
        container.pop(key, None)
    target.shapes[squares_key] = _squares(bins, grid)
    target.tables[key_added] = TableModel.parse(
        table, region=squares_key, region_key="region", instance_key="instance_id"
    )
    logger.info(
        "%d bins of %.4g µm with %d genes: tables[%r], linked to shapes[%r]; sdata.write(path) saves it.",
        table.n_obs, grid.bin_um, len(genes), key_added, squares_key,
    )  # fmt: skip
    return target if copy else None


def _check_keys(sdata: SpatialData, key: str, squares_key: str, *, overwrite: bool) -> None:
    """Refuse keys that exist, unless both are an earlier result and may go."""
    ours = key in sdata.tables and made_by(sdata.tables[key], key, FUNCTION)
    check_free_key(sdata, "tables", key, overwrite=overwrite, ours=ours)
    check_free_key(sdata, "shapes", squares_key, overwrite=overwrite, ours=ours)


@dataclass(frozen=True)
class _Bins:
    """Reads the bins of a map on which all genes are known."""

    rows: np.ndarray
    """Number of each of these bins, counted row by row; ``(n_bins,)``."""
    storage: str

    @classmethod
    def of(cls, values: Any, map_key: str, storage: str) -> _Bins:
        """The known bins of ``values``, ``(G, y, x)``; read once, chunk by chunk."""
        known = da.isfinite(da.asarray(values)).all(0).compute()
        if not known.any():
            raise ValueError(f"no bin of the map {map_key!r} is known for all genes that are taken: there is no row.")
        return cls(np.flatnonzero(known), storage)

    def read(self, values: Any) -> Values:
        """Values ``(n_bins, G)`` of these bins, stored as is wanted."""
        values = da.asarray(values).astype(np.float32)
        if self.storage == "lazy":
            whole = values.rechunk((values.chunks[0], -1, -1))
            return whole.reshape(len(values), -1)[:, self.rows].T
        if self.storage == "sparse":
            columns = [sparse.csc_matrix(part) for part, _ in self._parts(values)]
            return sparse.csr_matrix(sparse.hstack(columns))
        dense = np.empty((len(self.rows), len(values)), np.float32)
        for part, genes in self._parts(values):
            dense[:, genes] = part
        return dense

    def _parts(self, values: da.Array) -> Iterator[tuple[np.ndarray, slice]]:
        """Some genes after the others, ``(n_bins, k)``, as they lie in chunks."""
        ends = np.cumsum([0, *values.chunks[0]]).tolist()
        for start, stop in zip(ends[:-1], ends[1:], strict=True):
            yield values[start:stop].compute().reshape(stop - start, -1)[:, self.rows].T, slice(start, stop)


def _normalized(values: Values, total: np.ndarray) -> Values:
    """Counts per 10,000 of the total of each bin; 0 where that is 0."""
    factor = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)[:, None]
    if isinstance(values, sparse.csr_matrix):
        return sparse.csr_matrix(values.multiply(factor), dtype=np.float32)
    return values * factor


def _known_of_genes(sdata: SpatialData, map_key: str, genes: list[str]) -> pd.DataFrame:
    """What was found out about each gene when the map was made, where it was made without a model."""
    table = sdata.tables.get(f"{map_key}{TABLE}")
    if table is None or not set(genes) <= set(table.var_names):
        return pd.DataFrame(index=genes)
    return table.var.loc[genes].copy()


def _squares(bins: pd.DataFrame, grid: Grid) -> GeoDataFrame:
    """The bins as squares, in bin coordinates."""
    x, y = bins["array_col"].to_numpy(), bins["array_row"].to_numpy()
    frame = GeoDataFrame(geometry=shapely.box(x, y, x + 1, y + 1), index=bins["instance_id"].to_numpy())
    axes = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
    planar = {name: Affine(grid.to_system(name), **axes) for name in grid.transformations}
    return ShapesModel.parse(frame, transformations=planar)
