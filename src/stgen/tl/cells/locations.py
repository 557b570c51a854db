"""Counts at locations, the bins of a map or the rows of a table, read some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from threading import Lock
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from dask import compute, delayed
from spatialdata import SpatialData

from stgen._checks import genes_of
from stgen._spatial.counts import get_counts
from stgen._spatial.grid import Grid, get_map, map_counts_checked
from stgen._spatial.section import get_table
from stgen._spatial.tables import predicted_in_x
from stgen.tl.cells.aggregate import FUNCTION as AGGREGATED
from stgen.tl.cells.aggregate import _n_samples, _slices, _Summed
from stgen.tl.evaluation.overlap import find_overlap
from stgen.transforms import TransformName, inverse_transform

__all__ = ["Bins", "Locations", "Rows", "Window", "bins_of_map", "locations_of", "rows_of_table"]

VALUES_AT_ONCE = 2**22  # of a table

Slices = tuple[slice, ...]
See = Callable[[slice, np.ndarray], None]
"""What is shown which genes, and their counts ``(k, ...)``."""
Take = Callable[[slice, list[str]], np.ndarray]
"""Gives the counts ``(rows, genes)`` of some rows and genes."""


@dataclass(frozen=True)
class Window:
    """Some of the locations, whose counts come in blocks."""

    at: Slices
    shape: tuple[int, ...]
    blocks: list[tuple[slice, Any]]
    """Which genes, and their counts ``(k, ...)``, now or delayed."""
    where: str
    """How messages name the values."""

    def each(self, see: See) -> None:
        """Show every block, one at a time; each is read once, in any order, and then let go."""
        lock = Lock()

        def checked(genes: slice, counts: np.ndarray) -> None:
            counts = map_counts_checked(counts, self.where)
            with lock:
                see(genes, counts)

        compute(*(delayed(partial(checked, genes))(counts) for genes, counts in self.blocks))


@dataclass(frozen=True)
class Bins:
    """A map, read chunk by chunk."""

    sdata: SpatialData
    key: str
    """Of the map that is read, which may be that of the samples."""
    genes: list[str]
    n_samples: int
    number: int | None = None
    """Of the sample."""
    depth: None = None
    """Counts of each bin over all genes are not known beforehand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height and width."""
        return get_map(self.sdata, self.key).shape[1:]

    def of(self, genes: Sequence[str]) -> Bins:
        """The same of some genes."""
        return replace(self, genes=list(genes))

    def windows(self) -> Iterator[Window]:
        """The bins, a chunk at a time."""
        channels = self.genes if self.number is None else [f"{gene}:{self.number}" for gene in self.genes]
        values = da.asarray(get_map(self.sdata, self.key, channels).data)
        genes, rows, columns = (_slices(sizes) for sizes in values.chunks)
        chunks = values.to_delayed()
        for (i, y), (j, x) in product(enumerate(rows), enumerate(columns)):
            shape = y.stop - y.start, x.stop - x.start
            yield Window((y, x), shape, list(zip(genes, chunks[:, i, j], strict=True)), f"The map {self.key!r}")

    def samples(self) -> Iterator[Bins]:
        """Each sample as a map."""
        return (replace(self, key=f"{self.key}_samples", number=number) for number in range(self.n_samples))


@dataclass(frozen=True)
class Rows:
    """A table, read some rows at a time."""

    n_obs: int
    genes: list[str]
    take: Take
    n_samples: int = 0
    sample: Callable[[int, list[str]], Take] | None = None
    """What takes the counts of a sample, given its number and the genes that will be asked for."""
    depth: float | None = None
    """Counts of each location over all genes, also those that are not here; None where they are not all alike."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows."""
        return (self.n_obs,)

    def of(self, genes: Sequence[str]) -> Rows:
        """The same of some genes."""
        return replace(self, genes=list(genes))

    def windows(self) -> Iterator[Window]:
        """The rows, some at a time."""
        n = max(1, VALUES_AT_ONCE // len(self.genes))
        for start in range(0, self.n_obs, n):
            rows = slice(start, min(start + n, self.n_obs))
            counts = self.take(rows, self.genes).T
            yield Window((rows,), (rows.stop - start,), [(slice(None), counts)], "The table")

    def samples(self) -> Iterator[Rows]:
        """Each sample as a table."""
        if self.sample is not None:
            for number in range(self.n_samples):
                yield replace(self, take=self.sample(number, self.genes))


Locations = Bins | Rows


def locations_of(
    data: SpatialData | AnnData, map_key: str | None, table_key: str | None, layer: str | None
) -> Locations:
    """The bins of the map that is named, or else the rows of a table."""
    if not isinstance(data, SpatialData | AnnData):
        raise TypeError(f"Expected a SpatialData or AnnData object, found {type(data).__name__}.")
    if map_key is not None:
        if isinstance(data, AnnData) or table_key is not None or layer is not None:
            raise ValueError(
                "map_key= names a map of a SpatialData; leave it out for a table, and table_key= and layer= for a map."
            )
        return bins_of_map(data, map_key)
    if isinstance(data, SpatialData) and not data.tables:
        names = ", ".join(data.images) or "none"
        raise KeyError(f"the object has no table; pass map_key=<one of the maps in sdata.images: {names}>.")
    return rows_of_table(data, table_key, layer)


def bins_of_map(sdata: SpatialData, map_key: str) -> Bins:
    """The bins of a map, with all of its genes."""
    genes = genes_of(None, get_map(sdata, map_key).coords["c"].values, f"the map {map_key!r}")
    return Bins(sdata, map_key, genes, _n_samples(sdata, map_key, genes))


def rows_of_table(data: SpatialData | AnnData, table_key: str | None, layer: str | None) -> Rows:
    """The counts of a table, or a prediction brought back to counts, and the samples of either."""
    table = get_table(data, table_key=table_key)
    key = layer if layer is not None else predicted_in_x(table)
    entry = table.uns.get("stgen", {}).get(key, {})
    if (
        key is not None
        and entry.get("function") == "tl.predict_expression"
        and (layer in table.layers or entry.get("values_in") == "X")
    ):
        return _of_prediction(table, key, entry)
    counts = get_counts(table, layer=layer, dense=False)
    genes = list(table.var_names)

    def take(rows: slice, names: list[str]) -> np.ndarray:
        return counts[rows][:, table.var_names.get_indexer(names)].toarray()

    n_samples, sample = 0, None
    made = [
        e for e in table.uns.get("stgen", {}).values() if isinstance(e, Mapping) and e.get("function") == AGGREGATED
    ]
    if made and layer is None and isinstance(data, SpatialData):
        n_samples, sample = _samples_of_cells(data, table, made[-1], genes)
    return Rows(table.n_obs, genes, take, n_samples, sample)


def _of_prediction(table: AnnData, key: str, entry: Mapping[str, Any]) -> Rows:
    """A result of :func:`stgen.tl.predict_expression`, brought back to counts (per 10,000 where the depth is not known)."""
    stored = table.layers[key] if key in table.layers else table.X
    predicted = np.asarray(table.var[key], bool) if key in table.layers else np.ones(table.n_vars, bool)
    genes = list(table.var_names[predicted])
    name: TransformName = "log1p_raw" if entry["transform"] == "log1p_norm" else entry["transform"]
    depth = 1e4 if entry["transform"] == "log1p_norm" else None

    def take(rows: slice, names: list[str]) -> np.ndarray:
        return inverse_transform(np.asarray(stored[rows])[:, table.var_names.get_indexer(names)], name)

    if "sample_genes" not in entry:
        return Rows(table.n_obs, genes, take, depth=depth)
    kept, order = table.obsm[f"{key}_samples"], pd.Index(entry["sample_genes"].split("\n"))

    def sample(number: int, _: list[str]) -> Take:
        return lambda rows, names: inverse_transform(np.asarray(kept[rows, number])[:, order.get_indexer(names)], name)

    return Rows(table.n_obs, genes, take, kept.shape[1], sample, depth)


def _samples_of_cells(
    sdata: SpatialData, table: AnnData, made: Mapping[str, Any], genes: list[str]
) -> tuple[int, Callable[[int, list[str]], Take] | None]:
    """Samples of the map that was summed over cells, to be summed in the same way; none where map or cells are gone."""
    map_key, cells, system = made["map_key"], made["cells"], made["coordinate_system"]
    if f"{map_key}_samples" not in sdata.images or map_key not in sdata.images or cells not in sdata:
        return 0, None
    names = table.obs[table.uns["spatialdata_attrs"]["instance_key"]]
    overlap = None

    def sample(number: int, wanted: list[str]) -> Take:
        nonlocal overlap
        overlap = overlap or find_overlap(sdata, cells, Grid.of_map(sdata, map_key), system)
        stack = get_map(sdata, f"{map_key}_samples", [f"{gene}:{number}" for gene in wanted])
        sums = np.concatenate(list(_Summed(stack, overlap, f"The map '{map_key}_samples'").parts()), axis=1)
        row, column = pd.Index(overlap.instances).get_indexer(names), pd.Index(wanted)
        if (row < 0).any():
            raise ValueError(
                f"{(row < 0).sum()} rows of the table are no cells of {cells!r} any more, so the samples of "
                f"{map_key!r} cannot be summed over them; run stgen.tl.aggregate_cells again."
            )
        return lambda rows, some: sums[row[rows]][:, column.get_indexer(some)]

    return _n_samples(sdata, map_key, genes), sample
