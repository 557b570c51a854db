"""Where maps of whole sections go: into memory, or window by window to disk."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from spatialdata import SpatialData, get_dask_backing_files

from stgen._spatial.grid import Grid
from stgen._spatial.map_inputs import MapElements
from stgen._spatial.records import check_new_key, record, write_image
from stgen._spatial.section import OUT_OF_FOLD
from stgen.data import MapInputs
from stgen.sampling import SpotReport
from stgen.tl.superresolution.streaming import WorkFolder, settle
from stgen.windows import Window

__all__ = ["TABLE", "MapResult", "check_result_keys", "check_store", "is_result", "spot_table"]

FUNCTION = "tl.superresolve"
SUFFIXES = ("", "_std", "_samples", "_total")
TABLE = "_out_of_fold"
CHUNK = 512  # bins along a side of what is written for good
GENES_PER_CHUNK = 16  # of what is streamed


def is_result(sdata: SpatialData, key: str) -> bool:
    """Whether :func:`stgen.tl.superresolve` made an element."""
    return sdata.attrs.get("stgen", {}).get(key, {}).get("function") == FUNCTION


def check_result_keys(sdata: SpatialData, key_added: str, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Refuse keys that exist, unless they are an earlier result that may be overwritten, and names that cannot be."""
    keys = [f"{key_added}{suffix}" for suffix in SUFFIXES]
    others = {name.lower(): name for _, name, _ in sdata.gen_elements() if name not in sdata.images or name not in keys}
    table = f"{key_added}{TABLE}"
    if table in sdata.tables and (table in inputs or not (overwrite and is_result(sdata, table))):
        raise ValueError(
            f"sdata.tables[{table!r}] exists already. Pass overwrite=True to replace it, if it is a result of "
            f"{FUNCTION} and none of its inputs, or another key_added=."
        )
    if table not in sdata.tables and table.lower() in others:
        raise ValueError(f"the name {others[table.lower()]!r} is taken by another element; pass another key_added=.")
    for key in keys:
        check_new_key(sdata.images, key, overwrite=overwrite, what="sdata.images")
        if key in inputs or (key in sdata.images and not is_result(sdata, key)):
            raise ValueError(
                f"sdata.images[{key!r}] is not a result of {FUNCTION} or is one of its inputs, and is not replaced; "
                "pass another key_added=."
            )
        if key.lower() in others:
            raise ValueError(f"the name {others[key.lower()]!r} is taken by another element; pass another key_added=.")


def check_store(
    sdata: SpatialData, store: str | Path | None, key_added: str, *, overwrite: bool, copy: bool = False
) -> Path | None:
    """The path to stream to; an error if something is there that must not be replaced."""
    if store is None:
        return None
    store = Path(store).absolute()
    if not store.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {store.parent} to make the store {store.name!r} in.")
    settle(store)
    if not store.exists():
        return store
    if not overwrite:
        raise ValueError(f"the store {store} exists already. Pass overwrite=True to replace it, or another store=.")
    replaced = {f"{key_added}{suffix}" for suffix in SUFFIXES}
    used = {key for _, key, element in sdata.gen_elements() if _reads(element, store)} - (set() if copy else replaced)
    if used or (sdata.path is not None and Path(sdata.path).absolute() == store):
        raise ValueError(
            f"{', '.join(sorted(used)) or 'the object itself'} of `sdata` is read from {store}, which is thus not "
            "replaced; pass another store=."
        )
    _check_replaceable(store)
    return store


def _check_replaceable(store: Path) -> None:
    """Refuse a folder that holds something else than results."""
    try:
        there = SpatialData.read(store)
    except Exception as error:  # whatever zarr says of what is no store
        raise ValueError(f"{store} is no SpatialData store and is not replaced; pass another store=.") from error
    foreign = [key for _, key, _ in there.gen_elements() if not is_result(there, key)]
    if foreign:
        raise ValueError(
            f"{store} also holds {', '.join(foreign[:5])}, which {FUNCTION} did not make, and is not replaced; pass "
            "another store=."
        )


def _reads(element: Any, store: Path) -> bool:
    try:
        files = get_dask_backing_files(element)
    except TypeError:
        return False
    return any(Path(file).absolute().is_relative_to(store) for file in files)


class MapResult:
    """Mean, spread and samples of maps, filled piece by piece; a context that leaves nothing behind if it fails.

    On the way to a store, what is done outlives an interrupt and the end of the process, and is gone on from.

    Parameters
    ----------
    grid
        The bins.
    genes
        Names of the maps.
    n_samples
        Number of samples that will be put.
    key_added
        Name of the result.
    keep_samples
        Whether to keep the samples.
    work
        Where a store is made; ``None`` keeps the result in memory.
    tile
        Side in bins of the pieces, which makes good chunks on the way to the store.
    total
        Whether there is a map of the total counts.
    """

    def __init__(
        self,
        grid: Grid,
        genes: Sequence[str],
        n_samples: int,
        key_added: str,
        *,
        keep_samples: bool,
        work: WorkFolder | None,
        tile: int,
        total: bool = False,
    ) -> None:
        self.grid, self.genes, self.key_added, self._work = grid, list(genes), key_added, work
        self._tile, self.n_samples = tile, n_samples
        self._shapes: dict[str, tuple[int, ...]] = {"": (len(genes), grid.height, grid.width)}
        if n_samples > 1:
            self._shapes["_std"] = self._shapes[""]
        if keep_samples:
            self._shapes["_samples"] = (len(genes), n_samples, grid.height, grid.width)
        if total:
            self._shapes["_total"] = (1, grid.height, grid.width)

    def __enter__(self) -> MapResult:
        try:
            if self._work is not None:
                self._work.open()
            self._arrays = {suffix: self._array(suffix, shape) for suffix, shape in self._shapes.items()}
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._work is None:
            return
        self._work.close(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"there is no space left to make the store {self._work.store}; what was made of it is removed. Free "
                "some space, or pass another store=",
            ) from error

    def _array(self, suffix: str, shape: tuple[int, ...]) -> np.ndarray | zarr.Array:
        """An array of NaN, or with what is done of it, on disk if the result goes there."""
        if self._work is None:
            return np.full(shape, np.nan, np.float32)
        path = self._work.path / "arrays" / f"array{suffix}"
        if path.exists():
            return zarr.open_array(str(path), mode="r+")
        chunks = (min(GENES_PER_CHUNK, shape[0]), *[1] * (len(shape) - 3), *(min(self._tile, n) for n in shape[-2:]))
        return zarr.create_array(
            str(path), shape=shape, chunks=chunks, dtype="float32", fill_value=np.nan, compressors=None,
        )  # fmt: skip

    def is_done(self, part: slice, window: Window) -> bool:
        """Whether an earlier call put some of the genes in a window."""
        return self._work is not None and self._work.is_done(part, window)

    def set_done(self, part: slice, window: Window) -> None:
        """Note that they are all put."""
        if self._work is not None:
            self._work.set_done(part, window)

    def put(self, maps: Iterable[np.ndarray], kept: np.ndarray, y: int, x: int, genes: slice = slice(None)) -> None:
        """Write the piece at row ``y`` and column ``x`` of some of the genes, where ``kept`` (h, w) says so.

        ``maps`` gives the samples ``(genes, h, w)`` one after the other, and at last the expected map.
        """
        height, width = kept.shape
        at = slice(y, y + height), slice(x, x + width)
        center = square = np.zeros((len(self.genes[genes]), height, width))
        for number, values in enumerate(maps):
            if number == self.n_samples:
                _put(self._arrays[""], (genes, *at), values, kept)
                continue
            change = values - center  # Welford's running moments
            center = center + change / (number + 1)
            square = square + change * (values - center)
            if "_samples" in self._arrays:
                _put(self._arrays["_samples"], (genes, number, *at), values, kept)
        if "_std" in self._arrays:  # the noise is centered: the population form is unbiased
            _put(self._arrays["_std"], (genes, *at), np.sqrt(square / self.n_samples), kept)

    def put_total(self, values: np.ndarray, kept: np.ndarray, y: int, x: int) -> None:
        """Write the piece ``(1, h, w)`` of the map of total counts."""
        height, width = kept.shape
        _put(self._arrays["_total"], (slice(None), slice(y, y + height), slice(x, x + width)), values, kept)

    def hand_over(self, sdata: SpatialData, entry: dict[str, Any], table: AnnData | None = None) -> list[str]:
        """Put the finished result into ``sdata``, from the store if it goes there; return the keys of the maps."""
        result = SpatialData()
        for suffix, array in self._arrays.items():
            key = f"{self.key_added}{suffix}"
            values = array if isinstance(array, np.ndarray) else self._lazy(array)
            write_image(
                result, key, values.reshape(-1, *values.shape[-2:]), channels=self._channels(suffix),
                transformations=self.grid.transformations,
            )  # fmt: skip
            record(result, key, {**entry, "statistic": suffix.removeprefix("_") or "expected"})
        keys = list(result.images)
        table_key = f"{self.key_added}{TABLE}"
        if table is not None:
            with _without_region():
                result.tables[table_key] = table
            record(result, table_key, {**entry, "statistic": OUT_OF_FOLD})
        entries = result.attrs["stgen"]
        if self._work is not None:
            with _without_region():
                result.write(self._work.new)
                result = _published(self._work)
        earlier = [f"{self.key_added}{suffix}" for suffix in (*SUFFIXES, TABLE)]
        kept = {key: value for key, value in sdata.attrs.get("stgen", {}).items() if key not in earlier}
        for key in earlier:
            sdata.images.pop(key, None)
        if table_key in sdata.attrs.get("stgen", {}):
            sdata.tables.pop(table_key, None)
        for key in keys:
            sdata.images[key] = result.images[key]
        if table is not None:
            sdata.tables[table_key] = result.tables[table_key]
        sdata.attrs["stgen"] = kept | entries
        return keys

    def _channels(self, suffix: str) -> list[str]:
        if suffix == "_total":
            return ["total"]
        if suffix != "_samples":
            return self.genes
        return [f"{gene}:{number}" for gene in self.genes for number in range(self._shapes[suffix][1])]

    def _lazy(self, array: zarr.Array) -> da.Array:
        """The streamed array in chunks of one map, so that each is read and written by itself."""
        lazy = da.from_zarr(array)
        return lazy.rechunk((*[1] * (lazy.ndim - 2), *(min(CHUNK, n) for n in lazy.shape[-2:])))


def _published(work: WorkFolder) -> SpatialData:
    """Move the finished store to its place, and read it there."""
    if work.store.exists() and work.overwrite:
        _check_replaceable(work.store)
    work.publish()
    try:
        return SpatialData.read(work.store)
    except BaseException:
        work.withdraw()
        raise


def spot_table(elements: MapElements, inputs: MapInputs, report: SpotReport) -> AnnData:
    """A row per spot that was learned from, linked to it: what was predicted of it, and what is known of genes."""
    table = AnnData(report.predicted, var=report.scores)
    if elements.spots is not None:
        source = elements.sdata.tables[elements.low_res]
        attrs, region = source.uns["spatialdata_attrs"], elements.spots.region
        table.obs = source.obs[[attrs["region_key"], attrs["instance_key"]]].iloc[report.rows].copy()
        table.obs[attrs["region_key"]] = pd.Categorical([region] * len(report.rows))
        table.uns["spatialdata_attrs"] = {**attrs, "region": region}
    table.obsm["bin_yx"] = inputs.measured.footprints.centers[report.rows]
    return table


@contextmanager
def _without_region() -> Iterator[None]:
    """The spots that a table annotates are in the user's object, not in the one that is made first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The table is annotating")
        yield


def _put(array: np.ndarray | zarr.Array, at: tuple, values: np.ndarray, kept: np.ndarray) -> None:
    array[at] = np.where(kept, values, array[at])
