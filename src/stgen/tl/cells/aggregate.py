"""Expression of single cells, from a map and the outlines of the cells."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from threading import Lock

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from dask import compute, delayed
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel
from xarray import DataArray

from stgen._checks import check_types, genes_of, only_key
from stgen._spatial.grid import Grid, apply_affine, get_map, map_counts_checked
from stgen._spatial.records import check_new_key, provenance, record, shallow_copy
from stgen._spatial.section import check_sdata
from stgen.tl.evaluation.maps import check_same_grid
from stgen.tl.evaluation.overlap import Overlap, find_overlap
from stgen.tl.superresolution.result import FUNCTION as SUPERRESOLVED

__all__ = ["aggregate_cells"]

logger = logging.getLogger("stgen")

FUNCTION = "tl.aggregate_cells"
GENES_AT_ONCE = 64


@check_types
def aggregate_cells(
    sdata: SpatialData,
    *,
    map_key: str,
    labels_key: str | None = None,
    shapes_key: str | None = None,
    genes: Sequence[str] | None = None,
    min_covered: float = 0.0,
    coordinate_system: str | None = None,
    key_added: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
) -> SpatialData | None:
    """Sum the counts of a map over cells, each bin by the share of it that a cell covers.

    Counts are taken to be spread evenly within a bin. A bin that lies in one cell gives it all of its counts, and a bin
    on a border is divided by area, exactly, whatever lies turned, mirrored or at another resolution. What lies in no
    cell stays outside, and nothing is given twice: where outlines overlap and the shares of a bin come to more than
    one, they are scaled to sum to one.

    Parameters
    ----------
    sdata
        Object with the map, and with the cells.
    map_key
        Map of counts per bin, ``(c, y, x)``, NaN where they are unknown: from :func:`stgen.tl.superresolve`,
        :func:`stgen.pp.rasterize`, or your own.
    labels_key
        Cells as a mask in ``sdata.labels``, ``(y, x)``, 0 between them.
    shapes_key
        Cells as polygons or circles in ``sdata.shapes``; give one of the two.
    genes
        Genes to sum, in this order; None for all of the map.
    min_covered
        Cells of which a smaller share lies on known bins are left out; cells of which nothing does always are.
    coordinate_system
        The one in which map and cells meet; None: a micrometer one if there is one, else "global", else the first
        shared.
    key_added
        Name of the table; default ``f"{map_key}_cells"``.
    overwrite
        Whether an earlier table of this function may be replaced.
    copy
        Return a copy with the result and leave ``sdata`` alone.

    Returns
    -------
    ``None``, or the copy. Written is ``sdata.tables[key_added]``, a row per cell, which annotates the mask or the
    shapes:

    - ``X``: counts, float32 CSR ``(n_cells, G)``, in the unit of the map
    - ``layers[f"{key_added}_std"]``: the same of the standard deviation over samples, where the map was made with
      ``keep_samples=True``: each sample is summed over cells, and then they are compared
    - ``obs``: ``region`` and ``instance_id`` (the link), ``area_um2``, and ``covered``, the share of the cell's area
      that lies on bins which are known for all genes; counts hold for this part of the cell and are not extrapolated
    - ``var["outside"]``: counts of the map that are in no row
    - ``obsm["spatial"]``: centroids as x, y in the coordinate system
    - ``uns["stgen"][key_added]``: ``map_key``, ``cells``, ``unit``, ``bin_um``, ``coordinate_system``, ``genes``,
      ``min_covered``, ``n_cells``, ``n_left_out``, ``n_samples``, ``function``, ``version``

    Raises
    ------
    KeyError
        If an element, a gene or the coordinate system does not exist.
    TypeError
        If the cells are neither a mask of whole numbers nor polygons or circles.
    ValueError
        If not one kind of cells is named, no cell lies on known bins, the map holds negative or infinite values, map
        and cells share no coordinate system, or the key exists.

    Notes
    -----
    The map is read chunk by chunk, each once, and never held as a whole; ``spatialdata.aggregate`` would sum whole
    pixels. Shares follow from the outlines by Green's theorem, not from sampling; circles are polygons of 32 sides and
    the same area.

    Examples
    --------
    >>> from stgen import datasets, pp, tl
    >>> sdata = datasets.simulated_section(size_um=300)
    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1"], bin_um=5, mask_um=None)
    >>> tl.aggregate_cells(sdata, map_key="counts", shapes_key="cells")
    >>> cells = sdata["counts_cells"]
    >>> cells.var_names.to_list(), list(cells.obs)
    (['EPCAM', 'COL1A1'], ['region', 'instance_id', 'area_um2', 'covered'])
    >>> total = cells.X.sum(0) + cells.var["outside"].to_numpy()
    >>> bool(abs(total - sdata["counts"].sum(("y", "x")).to_numpy()).max() < 0.01)
    True
    """
    check_sdata(sdata)
    if (labels_key is None) == (shapes_key is None):
        raise ValueError("name the cells with either labels_key=<mask> or shapes_key=<polygons or circles>.")
    if isinstance(min_covered, bool) or not 0 <= min_covered <= 1:
        raise ValueError(f"`min_covered` must lie between 0 and 1, found {min_covered!r}.")
    genes = genes_of(genes, get_map(sdata, map_key).coords["c"].values, f"the map {map_key!r}")
    grid = Grid.of_map(sdata, map_key)
    if labels_key is not None:
        cells_key = only_key(sdata.labels, labels_key, argument="labels_key", what="mask in sdata.labels")
    else:
        cells_key = only_key(sdata.shapes, shapes_key, argument="shapes_key", what="shapes element")
    system = grid.shared_system(sdata, cells_key, coordinate_system)
    key_added = f"{map_key}_cells" if key_added is None else key_added
    _check_key(sdata, key_added, overwrite=overwrite)
    n_samples = _n_samples(sdata, map_key, genes)

    overlap = find_overlap(sdata, cells_key, grid, system)
    summed = _Summed(get_map(sdata, map_key, genes), overlap, f"The map {map_key!r}")
    counts = sparse.hstack([sparse.csc_array(part, dtype=np.float32) for part in summed.parts()], format="csr")
    covered = summed.covered()
    kept = (covered > 0) & (covered >= min_covered)
    if not kept.any():
        raise ValueError(
            f"none of the {len(kept)} cells of {cells_key!r} has a share of {min_covered:g} or more on known bins of "
            f"the map {map_key!r}. Check that they lie on each other in {system!r}, or lower min_covered."
        )
    table = _table(overlap, counts, covered, kept, genes, grid, system)
    table.var["outside"] = np.maximum(summed.total - np.asarray(table.X.sum(0, dtype=np.float64)).ravel(), 0)
    if n_samples:
        table.layers[f"{key_added}_std"] = _spread(sdata, map_key, overlap, genes, n_samples)[kept]

    predicted = sdata.attrs.get("stgen", {}).get(map_key, {}).get("function") == SUPERRESOLVED
    entry = provenance(
        FUNCTION, map_key=map_key, cells=cells_key, unit="counts", bin_um=grid.bin_um, coordinate_system=system,
        genes=genes, min_covered=float(min_covered), n_cells=table.n_obs, n_left_out=int((~kept).sum()),
        n_samples=n_samples or None, values_in="X" if predicted else None,
    )  # fmt: skip
    record(table, key_added, entry)
    table.obs.insert(0, "region", pd.Categorical([cells_key] * table.n_obs))
    table = TableModel.parse(table, region=cells_key, region_key="region", instance_key="instance_id")
    target = shallow_copy(sdata) if copy else sdata
    target.tables.pop(key_added, None)
    target.tables[key_added] = table
    logger.info(
        "Summed %d genes over %d cells (%d left out) into tables[%r]; sdata.write(path) saves it.",
        len(genes), table.n_obs, entry["n_left_out"], key_added,
    )  # fmt: skip
    return target if copy else None


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_key(sdata: SpatialData, key: str, *, overwrite: bool) -> None:
    """Refuse a key that exists, unless it is an earlier result that may be overwritten, and names that cannot be stored."""
    check_new_key(sdata.tables, key, overwrite=overwrite, what="sdata.tables")
    if key in sdata and (
        key not in sdata.tables or sdata.tables[key].uns.get("stgen", {}).get(key, {}).get("function") != FUNCTION
    ):
        raise ValueError(f"{key!r} is in the object and not a result of {FUNCTION}; pass another key_added=.")
    SpatialData(tables={key: TableModel.parse(AnnData(np.zeros((1, 1), np.float32)))})


def _n_samples(sdata: SpatialData, map_key: str, genes: list[str]) -> int:
    """Number of samples that were kept of the map."""
    key = f"{map_key}_samples"
    if key not in sdata.images:
        return 0
    channels = [str(name) for name in get_map(sdata, key).coords["c"].values]
    n = sum(name.rpartition(":")[0] == genes[0] for name in channels)
    get_map(sdata, key, _channels(genes, n))
    check_same_grid(sdata, map_key, key)
    return n


def _channels(genes: list[str], n_samples: int) -> list[str]:
    return [f"{gene}:{number}" for gene in genes for number in range(n_samples)]


# ---- sums ------------------------------------------------------------------------------------------------------------


class _Summed:
    """Sums of a map over cells, some genes at a time; every chunk of the map is read once, and then let go.

    Parameters
    ----------
    stack
        The map, ``(c, y, x)``.
    overlap
        The cells.
    where
        How messages name the map.
    """

    def __init__(self, stack: DataArray, overlap: Overlap, where: str) -> None:
        self._values, self._where, self._overlap = da.asarray(stack.data), where, overlap
        self._known = np.ones(stack.shape[1:], bool)
        self._lock = Lock()  # chunks are read by several threads
        self.total = np.zeros(len(stack))
        """Sum of each gene over the map."""

    def parts(self) -> Iterator[np.ndarray]:
        """Sums ``(n_cells, k)`` of some genes after the others."""
        genes, *rows_columns = (_slices(sizes) for sizes in self._values.chunks)
        pieces = [_Piece.of(self._overlap, y, x) for y, x in product(*rows_columns)]
        chunks = self._values.to_delayed().reshape(len(genes), -1)
        n = max(1, GENES_AT_ONCE // genes[0].stop)
        for first in range(0, len(genes), n):
            these = genes[first : first + n]
            sums = np.zeros((len(self._overlap.instances), these[-1].stop - these[0].start))
            tasks = [
                delayed(partial(self._add, sums, where.start, where.start - these[0].start, piece))(chunk)
                for where, row in zip(these, chunks[first:], strict=False)
                for piece, chunk in zip(pieces, row, strict=True)
            ]
            compute(*tasks)
            yield sums

    def _add(self, sums: np.ndarray, gene: int, column: int, piece: _Piece, chunk: np.ndarray) -> None:
        """Add a chunk whose first gene is ``gene``, to the sums from ``column`` on."""
        chunk = map_counts_checked(chunk, self._where)
        for k, values in enumerate(chunk):  # one by one: a copy of one is small
            known = np.isfinite(values)
            values = np.where(known, values, 0).astype(np.float64).ravel()
            of_cells = piece.shares @ values
            with self._lock:
                self._known[piece.y, piece.x] &= known
                self.total[gene + k] += values.sum()
                sums[piece.cells, column + k] += of_cells

    def covered(self) -> np.ndarray:
        """Share of the area of each cell that is on bins known for all genes, once all have been read; ``(n_cells,)``."""
        of = self._overlap
        known = of.share * self._known[of.y, of.x]
        return np.minimum(np.bincount(of.cell, known, len(of.instances)) / of.area, 1)


@dataclass(frozen=True)
class _Piece:
    """The part of all cells that lies on some rows and columns of bins."""

    y: slice
    x: slice
    cells: np.ndarray
    """Cells that lie there, by position."""
    shares: sparse.csr_array
    """Share of each bin that goes to each of these cells, ``(cells, bins)``."""

    @classmethod
    def of(cls, overlap: Overlap, y: slice, x: slice) -> _Piece:
        """The part on rows ``y`` and columns ``x``."""
        there = (overlap.y >= y.start) & (overlap.y < y.stop) & (overlap.x >= x.start) & (overlap.x < x.stop)
        cells, row = np.unique(overlap.cell[there], return_inverse=True)
        width, n_bins = x.stop - x.start, (y.stop - y.start) * (x.stop - x.start)
        flat = (overlap.y[there] - y.start) * width + overlap.x[there] - x.start
        share = overlap.share[there]
        share = share / np.maximum(np.bincount(flat, share, n_bins), 1)[flat]  # no bin is given twice
        return cls(y, x, cells, sparse.csr_array((share, (row, flat)), shape=(len(cells), n_bins)))


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *sizes]).tolist()
    return [slice(*ends[i : i + 2]) for i in range(len(sizes))]


def _spread(sdata: SpatialData, map_key: str, overlap: Overlap, genes: list[str], n_samples: int) -> sparse.csr_array:
    """Standard deviation over samples of each cell's sum, ``(n_cells, G)``."""
    stack = get_map(sdata, f"{map_key}_samples", _channels(genes, n_samples))
    sums = (column for part in _Summed(stack, overlap, f"The map '{map_key}_samples'").parts() for column in part.T)
    spread = [
        np.std([next(sums) for _ in range(n_samples)], 0) for _ in genes
    ]  # of centered noise: unbiased in this form
    return sparse.csr_array(np.column_stack(spread), dtype=np.float32)


# ---- result ----------------------------------------------------------------------------------------------------------


def _table(
    overlap: Overlap,
    counts: sparse.csr_array,
    covered: np.ndarray,
    kept: np.ndarray,
    genes: list[str],
    grid: Grid,
    system: str,
) -> AnnData:
    """The cells that are kept, with their counts."""
    instances = overlap.instances[kept]
    obs = pd.DataFrame(
        {
            "instance_id": instances,
            "area_um2": overlap.area[kept] * grid.bin_um**2,
            "covered": covered[kept],
        },
        index=instances.astype(str),
    )
    table = AnnData(sparse.csr_matrix(counts[kept]), obs=obs, var=pd.DataFrame(index=genes))
    table.obsm["spatial"] = apply_affine(grid.to_system(system), overlap.centers[kept])
    return table
