"""Maps: counts per bin and gene, from molecules or from a table, and maps of lower resolution."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.ndimage import distance_transform_edt
from spatialdata import SpatialData
from spatialdata.transformations import Affine, BaseTransformation, Scale, Translation, get_transformation
from spatialdata.transformations import Sequence as Chain

from stgen._checks import check_positive, check_types, genes_of, listed, only_key
from stgen._spatial.counts import get_counts
from stgen._spatial.grid import apply_affine
from stgen._spatial.image import affine_to, is_micrometers, micrometers_per_unit
from stgen._spatial.platforms import um_per_unit_of_bins
from stgen._spatial.records import check_free_key, made_by, provenance, record, write_image
from stgen._spatial.section import annotated_region, check_sdata, get_section

__all__ = ["rasterize"]

logger = logging.getLogger("stgen")

_CHUNK = 512  # bins along a side of what is computed at once
_MOST_BINS = 1e9
_XY = ("x", "y")
_EMPTY = np.empty((0, 0, 0), np.float32)


@check_types
def rasterize(
    sdata: SpatialData,
    *,
    genes: Sequence[str] | None = None,
    points_key: str | None = None,
    table_key: str | None = None,
    bin_um: float = 10.0,
    gene_column: str | None = None,
    mask_um: float | None = 50.0,
    bounds_um: tuple[float, float, float, float] | None = None,
    layer: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    key_added: str = "counts",
    overwrite: bool = False,
) -> None:
    """Count molecules, or the counts of cells or bins, per square bin and gene.

    Parameters
    ----------
    sdata
        Object with molecules as points, or with a table that annotates cells or bins.
    genes
        Genes to count, in this order; None for all names there are, control probes included.
    points_key
        The molecules; None if there is one points element and no ``table_key``.
    table_key
        Count a table instead: all of a row goes into the bin where its instance has the centroid.
    bin_um
        Side of a bin in µm. For a table of regular bins (Visium HD), a multiple of theirs.
    gene_column
        Column of the points with the gene; None for their feature key, else ``"gene"`` or ``"feature_name"``.
    mask_um
        Bins whose center is farther than this from that of every bin with a molecule of any gene (with a table: with
        an instance) are outside the tissue and NaN. None for no mask.
    bounds_um
        ``(x_min, y_min, x_max, y_max)`` in µm along the coordinate system: the grid starts exactly there and has whole
        bins only; what lies outside is ignored. None: everything, on a grid whose lines are at multiples of ``bin_um``.
    layer
        Layer of the table with the counts; None for ``X``.
    coordinate_system
        The grid lies along its axes. None: a micrometer one if there is one, else "global", else the first.
    mpp
        µm per unit of that coordinate system. None: 1 if its name says micrometers, else from one that does, or from
        the bins of Visium HD, which are named after their side (``square_016um``). For the "global" pixels of a Xenium
        section, 0.2125.
    key_added
        Name of the map.
    overwrite
        Whether an existing map may be replaced.

    Returns
    -------
    None. Writes:

    - ``sdata.images[key_added]``: counts per bin, float32 ``(c, y, x)``, a channel per gene, NaN outside the tissue,
      with transformations to all coordinate systems of the source.
    - ``sdata.attrs["stgen"][key_added]``: ``"source"``, ``"layer"``, ``"unit"``, ``"bin_um"``, ``"mask_um"``,
      ``"coordinate_system"``, ``"genes"``, ``"function"``, ``"version"``.

    Raises
    ------
    KeyError
        If an element, coordinate system, column, layer or gene does not exist.
    ValueError
        If a bin is larger than the section, nothing lies within the bounds, coordinates are not finite, counts are
        negative or not finite, the µm per unit are not known, or the key exists.

    Notes
    -----
    Molecules are read one dask partition at a time. The counts that are not zero are kept; a channel becomes a dense
    array where and when it is looked at, 512 x 512 bins at a time.

    :func:`spatialdata.rasterize` draws one value per pixel and call, all molecules or one column, and would read the
    molecules once per gene.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.rasterize(sdata, genes=["EPCAM", "COL1A1"], bin_um=20)
    >>> sdata["counts"].sizes["c"]
    2
    """
    check_sdata(sdata)
    check_positive("bin_um", bin_um)
    if mask_um is not None and not (np.isfinite(mask_um) and mask_um >= 0):
        raise ValueError(f"`mask_um` must be None or a number of µm that is not negative, found {mask_um!r}.")
    check_free_key(sdata, "images", key_added, overwrite=overwrite, ours=made_by(sdata, key_added, "pp.rasterize"))
    if points_key is not None and table_key is not None:
        raise ValueError(
            f"Both points_key={points_key!r} and table_key={table_key!r} are given; pass the one to count."
        )
    if layer is not None and table_key is None:
        raise ValueError(
            f"`layer` is of a table, and molecules are counted; pass table_key=, or leave layer={layer!r} out."
        )
    if table_key is None:
        molecules = Molecules.of(sdata, points_key, genes=genes, gene_column=gene_column)
        source, element, names = molecules.key, molecules.points, molecules.genes
        frame = Frame.of(element, source, coordinate_system, mpp)
        locations, batches = frame.molecules(molecules)
    else:
        only_key(sdata.tables, table_key, argument="table_key", what="table")
        source, (region, _) = table_key, annotated_region(sdata, sdata.tables[table_key], table_key, None)
        element, names = sdata[region], genes_of(genes, sdata.tables[table_key].var_names, f"the table {table_key!r}")
        frame = Frame.of(element, region, coordinate_system, mpp)
        locations, batches = frame.instances(sdata, table_key, names, layer)

    origin, height, width = _bins_over(locations, bin_um, bounds_um)
    counts, seen = _count(batches(), len(names), origin, bin_um, height, width)
    if not seen.any():
        raise ValueError(
            f"Nothing of {source!r} lies within bounds_um={bounds_um!r}. They are µm along the axes of "
            f"{frame.system!r}; leave them out to cover everything."
        )
    tissue = np.ones_like(seen)
    if mask_um is not None:
        tissue = distance_transform_edt(~seen) * bin_um <= mask_um * (1 + 1e-9)

    def read(gene: slice, y: slice, x: slice) -> np.ndarray:
        strips = counts[gene, y.start * width : y.stop * width].toarray()
        block = strips.reshape(-1, y.stop - y.start, width)[:, :, x]
        return np.where(tissue[y, x], block, np.float32(np.nan))

    write_image(
        sdata,
        key_added,
        lazy_map(read, (len(names), height, width)),
        channels=names,
        transformations=frame.transformations(element, origin, bin_um),
        overwrite=overwrite,
    )
    entry = provenance(
        "pp.rasterize",
        source=source,
        layer=layer,
        unit="counts per bin",
        bin_um=float(bin_um),
        mask_um=mask_um,
        coordinate_system=frame.system,
        genes=names,
    )
    record(sdata, key_added, entry)
    logger.info("Counted %d genes in %d x %d bins of %g µm: images[%r].", len(names), width, height, bin_um, key_added)


# -- where the counts come from ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Molecules:
    """A points element, read one partition at a time."""

    key: str
    points: Any
    column: str
    genes: list[str]

    @classmethod
    def of(
        cls, sdata: SpatialData, points_key: str | None, *, genes: Sequence[str] | None, gene_column: str | None
    ) -> Molecules:
        """The molecules of ``genes``, checked; None for all names."""
        if points_key is None and not sdata.points and sdata.tables:
            raise KeyError(
                f"The object has no points. Pass table_key=<one of {listed(sdata.tables)}> to count a table."
            )
        results = sdata.attrs.get("stgen", {}) if points_key is None else {}
        keys = [key for key in sdata.points if key not in results]
        key = only_key(keys, points_key, argument="points_key", what="points element")
        points = sdata.points[key]
        column = _gene_column(points, key, gene_column)
        known = points[column]
        if isinstance(known.dtype, pd.CategoricalDtype) and known.cat.known:
            names = known.cat.categories
        else:
            names = known.dropna().unique().compute().sort_values()
        return cls(key, points, column, genes_of(genes, names, f"the column {column!r} of {key!r}"))

    def locations(self) -> Iterator[np.ndarray]:
        """``(n, 2)`` as x, y in their own coordinates, per partition."""
        for part in self._parts(list(_XY)):
            yield self._xy(part)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Locations ``(n, 2)`` and the positions ``(n,)`` of their genes in ``genes``, -1 for any other, per partition."""
        index = pd.Index(self.genes)
        for part in self._parts([*_XY, self.column]):
            names = part[self.column]
            if isinstance(names.dtype, pd.CategoricalDtype):
                position = np.append(index.get_indexer(names.cat.categories.astype(str)), -1)
                yield self._xy(part), position[names.cat.codes.to_numpy()]
            else:
                yield self._xy(part), index.get_indexer(names.astype(str))

    def _parts(self, columns: list[str]) -> Iterator[pd.DataFrame]:
        chosen = self.points[columns]
        return (chosen.partitions[i].compute() for i in range(chosen.npartitions))

    def _xy(self, part: pd.DataFrame) -> np.ndarray:
        xy = part[list(_XY)].to_numpy(np.float64)
        bad = ~np.isfinite(xy).all(1)
        if bad.any():
            raise ValueError(f"The points {self.key!r} have molecules without finite coordinates; drop them.")
        return xy


def _gene_column(points: Any, key: str, wanted: str | None) -> str:
    feature_key = points.attrs.get("spatialdata_attrs", {}).get("feature_key")
    candidates = [wanted] if wanted is not None else [feature_key, "gene", "feature_name"]
    column = next((name for name in candidates if name in points.columns), None)
    if column is None:
        what = (
            f"no column {wanted!r}" if wanted is not None else "no feature key, and no column 'gene' or 'feature_name'"
        )
        raise KeyError(
            f"The points {key!r} have {what}; found {listed(points.columns, 10)}. Pass gene_column=<one of them>."
        )
    return column


@dataclass(frozen=True)
class Frame:
    """The axes along which bins or spots are laid: those of a coordinate system, in µm."""

    system: str
    unit: float
    """µm per unit of the system."""
    matrix: np.ndarray
    """From the element's own coordinates to µm, 3 x 3 over x, y."""

    @classmethod
    def of(cls, element: Any, key: str, coordinate_system: str | None, mpp: float | None) -> Frame:
        """The frame of an element, in the system asked for or the most suitable one."""
        systems = list(get_transformation(element, get_all=True))
        if coordinate_system is None:
            micrometers = [name for name in systems if is_micrometers(name)]
            coordinate_system = (micrometers or [name for name in systems if name == "global"] or systems)[0]
        elif coordinate_system not in systems:
            raise KeyError(f"{key!r} is not in the coordinate system {coordinate_system!r}; found {listed(systems)}.")
        matrix, scale = affine_to(element, coordinate_system)
        if mpp is not None:
            check_positive("mpp", mpp)
        unit = mpp or (1.0 if is_micrometers(coordinate_system) else micrometers_per_unit(element, scale))
        unit = unit or um_per_unit_of_bins(element, key, coordinate_system)
        if unit is None:
            raise ValueError(
                f"The µm per unit of the coordinate system {coordinate_system!r} are not known: none of {key!r} "
                f'({listed(systems)}) is named micrometers. Pass mpp=<µm per unit> (0.2125 for "global" of a Xenium '
                "section), or add a micrometer coordinate system: stgen.pp.name_micrometers(...)."
            )
        return cls(coordinate_system, float(unit), np.diag([unit, unit, 1.0]) @ matrix)

    def molecules(self, molecules: Molecules) -> tuple[Callable, Callable]:
        """Functions that give locations (µm), and locations with sparse counts ``(n, n_genes)``, batch by batch."""

        def batches() -> Iterator[tuple[np.ndarray, sparse.coo_array]]:
            for xy, gene in molecules.batches():
                row = np.flatnonzero(gene >= 0)
                ones = np.ones(len(row), np.float32)
                counts = sparse.coo_array((ones, (row, gene[row])), shape=(len(xy), len(molecules.genes)))
                yield apply_affine(self.matrix, xy), counts

        return lambda: (apply_affine(self.matrix, xy) for xy in molecules.locations()), batches

    def instances(
        self, sdata: SpatialData, table_key: str, genes: list[str], layer: str | None
    ) -> tuple[Callable, Callable]:
        """The same of a table's instances, in one batch."""
        section = get_section(sdata, table_key=table_key, coordinate_system=self.system, mpp=self.unit)
        counts = get_counts(section.table, genes=genes, layer=layer, dense=False)
        return lambda: [section.xy_um], lambda: [(section.xy_um, counts.tocoo())]

    def transformations(self, element: Any, origin_um: np.ndarray, bin_um: float) -> dict[str, BaseTransformation]:
        """From bin coordinates on this frame to every coordinate system of the element."""
        first = [
            Scale([bin_um / self.unit] * 2, axes=_XY),
            Translation((origin_um / self.unit).tolist(), axes=_XY),
        ]
        to_own = np.linalg.inv(affine_to(element, self.system)[0])
        result = {}
        for name in get_transformation(element, get_all=True):
            between = [Affine(affine_to(element, name)[0] @ to_own, _XY, _XY)] if name != self.system else []
            result[name] = Chain([*first, *between])
        return result


# -- counting ----------------------------------------------------------------------------------------------------------
def _bins_over(
    locations: Callable[[], Iterable[np.ndarray]], bin_um: float, bounds_um: Sequence[float] | None
) -> tuple[np.ndarray, int, int]:
    """Upper left corner of the grid as x, y in µm, and its height and width in bins."""
    if bounds_um is None:
        low, high = extent(locations())
        first, last = np.floor(low / bin_um), np.floor(high / bin_um)
        too_large = bin_um > (high - low).min()
        origin, (width, height) = first * bin_um, (last - first + 1).astype(int)
    else:
        bounds = np.asarray(bounds_um, dtype=np.float64)
        if bounds.shape != (4,) or not np.isfinite(bounds).all() or (bounds[2:] <= bounds[:2]).any():
            raise ValueError(
                f"`bounds_um` must be (x_min, y_min, x_max, y_max) in µm, the first two smaller; found {bounds_um!r}."
            )
        low, high = bounds[:2], bounds[2:]
        width, height = np.floor((high - low) / bin_um + 1e-6).astype(int)
        too_large, origin = min(width, height) == 0, low
    if too_large:
        size = high - low
        raise ValueError(
            f"Bins of {bin_um:g} µm are larger than the section, which is {size[0]:.4g} x {size[1]:.4g} µm. Pass a "
            "smaller bin_um; if the section is larger, check mpp and the coordinate system."
        )
    if float(height) * float(width) > _MOST_BINS:
        raise ValueError(
            f"A grid of {width:g} x {height:g} bins of {bin_um:g} µm is more than can be held. Pass a larger bin_um or "
            "bounds_um; if the section is smaller, check mpp and the coordinate system."
        )
    return origin, int(height), int(width)


def _count(
    batches: Iterable[tuple[np.ndarray, sparse.coo_array]],
    n_genes: int,
    origin: np.ndarray,
    bin_um: float,
    height: int,
    width: int,
) -> tuple[sparse.csr_array, np.ndarray]:
    """Counts ``(n_genes, height * width)``, and which bins hold anything, ``(height, width)``."""
    parts = []
    seen = np.zeros(height * width, dtype=bool)
    for xy, counts in batches:
        x, y = np.floor((xy - origin) / bin_um).astype(np.int64).T
        flat = np.where((x >= 0) & (x < width) & (y >= 0) & (y < height), y * width + x, -1)
        seen[flat[flat >= 0]] = True
        row, gene = counts.coords
        inside = flat[row] >= 0
        parts.append(
            sparse.csr_array((counts.data[inside], (gene[inside], flat[row[inside]])), shape=(n_genes, height * width))
        )
        if len(parts) > 16:
            parts = [sum(parts[1:], parts[0])]
    return sum(parts[1:], parts[0]), seen.reshape(height, width)


def extent(locations: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x, y over batches of locations."""
    ends = [(xy.min(0), xy.max(0)) for xy in locations if len(xy)]
    if not ends:
        raise ValueError("There are no molecules: the points element has no rows.")
    return np.min([low for low, _ in ends], 0), np.max([high for _, high in ends], 0)


# -- shared ------------------------------------------------------------------------------------------------------------
def lazy_map(read: Callable[[slice, slice, slice], np.ndarray], shape: tuple[int, int, int]) -> da.Array:
    """A dask array ``(c, y, x)``, float32, of which each chunk calls ``read(genes, rows, columns)``."""

    def block(block_info: dict[Any, Any]) -> np.ndarray:
        return read(*(slice(*ends) for ends in block_info[None]["array-location"])).astype(np.float32, copy=False)

    chunks = da.core.normalize_chunks((1, _CHUNK, _CHUNK), shape)
    return da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=_EMPTY, name=f"stgen-map-{uuid4().hex}")
