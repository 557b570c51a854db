"""Spots from molecules or maps, as an instrument with spots would have measured them, and maps from spots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from anndata import AnnData
from dask import delayed
from scipy import sparse
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import PointsModel
from spatialdata.transformations import get_transformation

from stgen._checks import check_positive, check_types, genes_of, only_key
from stgen._spatial.grid import Grid, get_map, map_counts_checked
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import check_free_key, made_by, provenance, record, write_circles, write_image, write_table
from stgen._spatial.section import check_sdata, get_section, get_table
from stgen.measurement import Footprints
from stgen.pp._rasterize import Frame, Molecules, extent, lazy_map
from stgen.pp._tiles import _planar

__all__ = ["simulate_spots", "spots_to_map"]

logger = logging.getLogger("stgen")


@check_types
def simulate_spots(
    sdata: SpatialData,
    *,
    points_key: str | None = None,
    map_key: str | None = None,
    genes: Sequence[str] | None = None,
    diameter_um: float = 55.0,
    pitch_um: float = 100.0,
    layout: Literal["hex", "square"] = "hex",
    thin: float | None = None,
    seed: int = 0,
    gene_column: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    key_added: str = "spots",
    overwrite: bool = False,
) -> None:
    """Measure a single-molecule section with spots, as Visium would.

    With ``thin``, each molecule is seen by the spots with that probability only, and the molecules that are not seen
    are kept as the truth: measured and true counts are then independent given the expression, as they never are when
    the same molecule is in both.

    Parameters
    ----------
    sdata
        Object with molecules as points, or with a map of counts.
    points_key
        The molecules; None if there is one points element and no ``map_key``.
    map_key
        Measure a map instead: a spot gets the share of each bin's counts that its disc covers.
    genes
        Genes to count, in this order; None for all.
    diameter_um
        Diameter of a spot in µm.
    pitch_um
        Distance between the centers of neighboring spots in µm.
    layout
        ``"hex"``: rows ``sqrt(3) / 2`` pitches apart, every other one shifted by half a pitch. ``"square"``.
    thin
        Probability, between 0 and 1, that the spots see a molecule; None: they see all.
    seed
        Of the thinning; the same seed gives the same split, however the points are partitioned.
    gene_column, coordinate_system, mpp
        For points, as in :func:`stgen.pp.rasterize`.
    key_added
        Name of the circles; table and truth are named after it.
    overwrite
        Whether existing elements may be replaced.

    Returns
    -------
    None. Writes:

    - ``sdata.shapes[key_added]``: circles in the coordinates of the points (of the map: bins), with their
      transformations. Spots without any molecule, of whatever gene, are left out.
    - ``sdata.tables[f"{key_added}_counts"]``: their counts, float32 CSR; whole numbers from points, sums of shares from
      a map. ``obs["array_row"]`` and ``obs["array_col"]``, on a hexagonal grid counted as Visium does;
      ``obsm["spatial"]``, x, y of the circles.
    - with ``thin``, ``sdata.points[f"{key_added}_rest"]`` or ``sdata.images[f"{key_added}_rest"]``: the molecules of
      the whole section that the spots do not see, inside and outside of them: a share ``1 - thin``.
    - ``sdata.attrs["stgen"]``, under ``key_added`` and for the rest under its own name: ``"source"``,
      ``"diameter_um"``, ``"pitch_um"``, ``"layout"``, ``"thin"``, ``"seed"``, ``"unit"``, ``"n_spots"``, ``"bin_um"``
      (rest of a map), ``"function"``, ``"version"``.

    Raises
    ------
    KeyError
        If an element, coordinate system, column or gene does not exist.
    ValueError
        If spots would overlap or be smaller than a bin, no spot holds a molecule, the µm per unit are not known,
        coordinates are not finite, counts of the map are negative, infinite or, with ``thin``, not whole, or a key
        exists.

    Notes
    -----
    Molecules are read one dask partition at a time, a map in groups of genes. The rest is computed where and when it is
    looked at.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.simulate_spots(sdata, pitch_um=60, thin=0.5, key_added="sim")
    >>> sdata["sim_counts"].n_obs > 50
    True
    >>> len(sdata["sim_rest"]) < 0.52 * len(sdata["transcripts"])
    True
    """
    check_sdata(sdata)
    _check(diameter_um, pitch_um, layout, thin, seed)
    if points_key is not None and map_key is not None:
        raise ValueError(f"Both points_key={points_key!r} and map_key={map_key!r} are given; pass the one to measure.")
    rest_key = f"{key_added}_rest"
    if thin is not None and rest_key in (points_key, map_key):
        raise ValueError(
            f"{rest_key!r} is what is measured and would be replaced by what is left; pass another key_added=."
        )
    written = [("shapes", key_added), ("tables", f"{key_added}_counts")]
    if thin is not None:
        written.append(("points" if map_key is None else "images", rest_key))
    for kind, key in written:
        check_free_key(sdata, kind, key, overwrite=overwrite, ours=made_by(sdata, key_added, "pp.simulate_spots"))

    if map_key is None:
        molecules = Molecules.of(sdata, points_key, genes=genes, gene_column=gene_column)
        source, element, names = molecules.key, molecules.points, molecules.genes
        frame = Frame.of(element, source, coordinate_system, mpp)
        um = float(np.sqrt(abs(np.linalg.det(frame.matrix[:2, :2]))))  # µm per unit of the points' own coordinates
        low, high = extent(molecules.locations())
    else:
        grid = Grid.of_map(sdata, map_key)
        source, element, um = map_key, sdata.images[map_key], grid.bin_um
        names = genes_of(genes, element.coords["c"].values, f"the map {map_key!r}")
        if diameter_um < um:
            raise ValueError(f"Spots of {diameter_um:g} µm are smaller than the bins of {map_key!r} ({um:g} µm).")
        low, high = np.zeros(2), np.array([grid.width, grid.height], dtype=np.float64)
    xy, array = _lattice(low, high, pitch_um / um, layout)
    radius = diameter_um / 2 / um
    if map_key is None:
        counts, seen, starts = _count_molecules(molecules, xy, radius, thin, seed)
        rest = None if thin is None else _molecules_left(molecules, thin, seed, starts)
    else:
        counts, seen = _measure_map(sdata, map_key, names, xy, radius, thin, seed)
        rest = None if thin is None else _map_left(sdata, map_key, names, thin, seed)
    if not seen.any():
        raise ValueError(f"None of {len(xy)} spots holds a molecule of {source!r}; pass a larger diameter_um.")
    xy, array, counts = xy[seen], array[seen], counts[seen]

    table = AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(
            {"array_row": array[:, 0], "array_col": array[:, 1]}, index=[f"{key_added}_{i}" for i in range(len(xy))]
        ),
        var=pd.DataFrame(index=names),
    )
    table.obsm["spatial"] = xy
    if f"{key_added}_counts" in sdata.tables:
        del sdata.tables[f"{key_added}_counts"]
    transformations = get_transformation(element, get_all=True)
    write_circles(sdata, key_added, xy, radius=radius, transformations=_planar(transformations), overwrite=overwrite)
    write_table(sdata, f"{key_added}_counts", table, region=key_added)
    details = {
        "source": source,
        "diameter_um": float(diameter_um),
        "pitch_um": float(pitch_um),
        "layout": layout,
        "thin": thin,
        "seed": None if thin is None else seed,
    }
    record(sdata, key_added, provenance("pp.simulate_spots", **details, unit="counts", n_spots=len(xy)))
    if rest is not None:
        of_rest = {"unit": "molecules"} if map_key is None else {"unit": "counts per bin", "bin_um": um}
        if map_key is None:
            sdata.points[rest_key] = rest
        else:
            write_image(sdata, rest_key, rest, channels=names, transformations=transformations, overwrite=overwrite)
        record(sdata, rest_key, provenance("pp.simulate_spots", **details, **of_rest))
    logger.info(
        "Measured %d genes in %d spots: shapes[%r] and tables[%r]%s.",
        len(names),
        len(xy),
        key_added,
        f"{key_added}_counts",
        "" if rest is None else f", what they did not see in {'points' if map_key is None else 'images'}[{rest_key!r}]",
    )


@check_types
def spots_to_map(
    sdata: SpatialData,
    *,
    table_key: str,
    map_key: str | None = None,
    bin_um: float | None = None,
    image_key: str | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    key_added: str = "spot_map",
    overwrite: bool = False,
) -> None:
    """Draw the counts of spots as a map: in each bin the density of the spot that covers it, NaN in the gaps.

    Nothing is interpolated. The map says per bin what the spots say, so that it can be shown, or compared with another
    map on the same grid; :func:`stgen.tl.superresolve` takes the table itself.

    Parameters
    ----------
    sdata
        Object with a table that annotates circles of one size, or squares of one size along the grid.
    table_key
        The table.
    map_key
        Use the grid of this map.
    bin_um
        Without ``map_key``: side in µm of the bins of a grid that covers ``image_key`` from its upper left corner.
    image_key
        The image that goes with ``bin_um``.
    genes
        Genes to draw, in this order; None for all.
    layer
        Layer of the table with the counts; None for ``X``.
    coordinate_system
        Where grid and spots meet. None: a micrometer one if there is one, else "global", else the first shared.
    mpp
        µm per pixel of the image, where neither a micrometer coordinate system nor the 100 µm pitch of Visium spots
        tells.
    key_added
        Name of the map.
    overwrite
        Whether an existing map may be replaced.

    Returns
    -------
    None. Writes:

    - ``sdata.images[key_added]``: counts per bin, float32 ``(c, y, x)``. A bin of which one spot covers any part has
      the spot's counts, divided by its area in bins; a bin that several cover has the mean of theirs, weighted by the
      shares that they cover; any other bin is NaN.
    - ``sdata.attrs["stgen"][key_added]``: ``"table_key"``, ``"layer"``, ``"unit"``, ``"bin_um"``, ``"n_spots"``,
      ``"function"``, ``"version"``.

    Raises
    ------
    KeyError
        If an element, coordinate system, layer or gene does not exist.
    ValueError
        If the arguments do not name one grid, the locations are neither circles nor squares of one size, no spot lies
        on the grid, counts are negative or not finite, or the key exists.

    Notes
    -----
    Sums over the map, each bin weighted by the share of it that a spot covers, give back the spot's counts exactly
    where no bin is shared with another spot and the spot lies on the grid: always for squares that are whole blocks of
    bins, which tile the plane, and for discs whose gaps are at least a bin wide. Where discs share bins, it is
    approximate. The plain sum over the map is larger than the counts, since bins at the rim of a disc have its full
    density.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> stgen.pp.spots_to_map(sdata, table_key="spot_counts", image_key="he", bin_um=10, genes=["EPCAM"])
    >>> sdata["spot_map"].shape
    (1, 60, 60)
    """
    check_sdata(sdata)
    if mpp is not None:
        check_positive("mpp", mpp)
    only_key(sdata.tables, table_key, argument="table_key", what="table")
    check_free_key(sdata, "images", key_added, overwrite=overwrite, ours=made_by(sdata, key_added, "pp.spots_to_map"))
    names = genes_of(genes, get_table(sdata, table_key=table_key).var_names, f"the table {table_key!r}")
    if map_key is not None and image_key is None and bin_um is None:
        grid = Grid.of_map(sdata, map_key)
    elif map_key is None and image_key is not None and bin_um is not None:
        if mpp is None:
            mpp = get_section(sdata, table_key=table_key, image_key=image_key, coordinate_system=coordinate_system).mpp
        grid = Grid.of_image(sdata, image_key, bin_um=bin_um, mpp=mpp)
    else:
        raise ValueError(
            "The grid is that of a map, map_key=<key>, or one over an image, image_key=<key> with bin_um=<µm>; found "
            f"map_key={map_key!r}, image_key={image_key!r}, bin_um={bin_um!r}."
        )
    spots = measurement_of(sdata, table_key, grid, names, layer=layer, coordinate_system=coordinate_system)

    rows, share, area = _shares(spots.footprints, grid.height, grid.width)
    density = (spots.counts[rows] / area[:, None]).astype(np.float32)
    covered = np.asarray(share.sum(0)).reshape(grid.height, grid.width)
    per_bin = sparse.csr_array(share.T)

    def read(gene: slice, y: slice, x: slice) -> np.ndarray:
        strip = per_bin[y.start * grid.width : y.stop * grid.width] @ density[:, gene]
        block = strip.T.reshape(-1, y.stop - y.start, grid.width)[:, :, x]
        with np.errstate(invalid="ignore"):
            return block / covered[y, x]  # 0 / 0 in the gaps

    write_image(
        sdata,
        key_added,
        lazy_map(read, (len(names), grid.height, grid.width)),
        channels=names,
        transformations=grid.transformations,
        overwrite=overwrite,
    )
    entry = provenance(
        "pp.spots_to_map",
        table_key=table_key,
        layer=layer,
        unit="counts per bin",
        bin_um=grid.bin_um,
        n_spots=len(rows),
    )
    record(sdata, key_added, entry)
    logger.info("Drew %d genes of %d spots: images[%r].", len(names), len(rows), key_added)


def _check(diameter_um: float, pitch_um: float, layout: str, thin: float | None, seed: int) -> None:
    """Refuse arguments out of range, before any work."""
    check_positive("diameter_um", diameter_um)
    check_positive("pitch_um", pitch_um)
    if diameter_um > pitch_um:
        raise ValueError(
            f"Spots of {diameter_um:g} µm overlap at a pitch of {pitch_um:g} µm; pass diameter_um of at most pitch_um."
        )
    if layout not in ("hex", "square"):
        raise ValueError(f"`layout` must be 'hex' or 'square', found {layout!r}.")
    if thin is not None and not 0 < thin < 1:
        raise ValueError(f"`thin` must be None or a probability between 0 and 1, both excluded; found {thin!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"`seed` must be a whole number that is not negative, found {seed!r}.")


def _lattice(low: np.ndarray, high: np.ndarray, pitch: float, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Centers (n, 2) as x, y of a lattice that covers a rectangle, and their rows and columns on the array."""
    step = np.array([pitch, pitch * np.sqrt(3) / 2 if layout == "hex" else pitch])
    n = np.ceil((high - low) / step - 1e-9).astype(int) + 1
    row, column = (a.ravel() for a in np.mgrid[: n[1], : n[0]])
    first = (low + high - (n - 1) * step) / 2
    if layout == "square":
        return first + np.column_stack([column, row]) * step, np.column_stack([row, column])
    xy = first + np.column_stack([column + 0.5 * (row % 2), row]) * step
    return xy, np.column_stack([row, 2 * column + row % 2])


# -- from molecules ----------------------------------------------------------------------------------------------------
def _count_molecules(
    molecules: Molecules, centers: np.ndarray, radius: float, thin: float | None, seed: int
) -> tuple[sparse.csr_array, np.ndarray, list[int]]:
    """Counts ``(n, n_genes)`` in discs, which discs hold any molecule, and the first molecule of each partition."""
    tree = cKDTree(centers)
    counts = sparse.csr_array((len(centers), len(molecules.genes)), dtype=np.int64)
    seen = np.zeros(len(centers), dtype=bool)
    starts = [0]
    for xy, gene in molecules.batches():
        spot = tree.query(xy, distance_upper_bound=radius * (1 + 1e-12))[1]  # len(centers) where there is none
        inside = spot < len(centers)
        if thin is not None:
            inside &= _is_seen(len(xy), thin, seed, starts[-1])
        seen[spot[inside]] = True
        inside &= gene >= 0
        ones = np.ones(int(inside.sum()), dtype=np.int64)
        counts += sparse.csr_array((ones, (spot[inside], gene[inside])), shape=counts.shape)
        starts.append(starts[-1] + len(xy))
    return counts, seen, starts


def _is_seen(n: int, thin: float, seed: int, start: int) -> np.ndarray:
    """Which of ``n`` molecules, from number ``start`` of the section on, the spots see."""
    return np.random.Generator(np.random.PCG64(seed).advance(start)).random(n) < thin


def _molecules_left(molecules: Molecules, thin: float, seed: int, starts: list[int]) -> Any:
    """The molecules that are not seen, as a points element, lazily."""

    def left(part: pd.DataFrame, start: int) -> pd.DataFrame:
        return part[~_is_seen(len(part), thin, seed, start)]

    points = molecules.points
    parts = [delayed(left)(part, start) for part, start in zip(points.to_delayed(), starts, strict=False)]
    attrs = points.attrs.get("spatialdata_attrs", {})
    return PointsModel.parse(
        dd.from_delayed(parts, meta=points._meta, verify_meta=False),
        feature_key=attrs.get("feature_key"),
        instance_key=attrs.get("instance_key"),
        transformations=get_transformation(points, get_all=True),
        sort=True,
    )


# -- from and to maps --------------------------------------------------------------------------------------------------
def _measure_map(
    sdata: SpatialData,
    map_key: str,
    genes: list[str],
    centers: np.ndarray,
    radius: float,
    thin: float | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of a map over discs ``(n, n_genes)``, and which discs hold any count of any gene."""
    element = get_map(sdata, map_key)
    _, height, width = element.shape
    discs = Footprints(centers[:, ::-1], 2 * radius, "disc", np.zeros(len(centers)))
    position = {str(name): i for i, name in enumerate(element.coords["c"].values)}
    wanted = {position[gene]: k for k, gene in enumerate(genes)}
    counts = np.zeros((len(centers), len(genes)), dtype=np.float32)
    seen = np.zeros(len(centers), dtype=bool)
    values = _seen_part(element, map_key, thin, seed)
    group = max(1, int(2e7 / (height * width)))
    for first in range(0, element.sizes["c"], group):
        pooled = discs.pool(np.asarray(values[first : first + group]))
        seen |= (pooled > 0).any(1)
        for i in range(pooled.shape[1]):
            if first + i in wanted:
                counts[:, wanted[first + i]] = pooled[:, i]
    return counts, seen


def _map_left(sdata: SpatialData, map_key: str, genes: list[str], thin: float, seed: int) -> da.Array:
    """The counts that are not seen, lazily."""
    element = get_map(sdata, map_key)
    position = {str(name): i for i, name in enumerate(element.coords["c"].values)}
    left = element.data - _seen_part(element, map_key, thin, seed)
    return left[[position[gene] for gene in genes]]


def _seen_part(element: Any, map_key: str, thin: float | None, seed: int) -> da.Array:
    """The counts of a map that the spots see, lazily, one gene at a time: all, or a binomial share of them."""

    def draw(values: np.ndarray, block_info: dict) -> np.ndarray:
        values = map_counts_checked(values, f"The map {map_key!r}")
        if thin is None:
            return values
        known = np.nan_to_num(values)
        if (known != np.round(known)).any():
            raise ValueError(
                f"The map {map_key!r} holds counts that are not whole, which cannot be thinned. Pass thin=None, or a "
                "map of molecules from stgen.pp.rasterize."
            )
        gene = block_info[0]["array-location"][0][0]
        drawn = np.random.default_rng([seed, gene]).binomial(known.astype(np.int64), thin)
        return np.where(np.isnan(values), values, drawn).astype(np.float32)

    values = da.asarray(element.data).astype(np.float32).rechunk((1, -1, -1))
    return values.map_blocks(draw, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32))


def _shares(spots: Footprints, height: int, width: int) -> tuple[np.ndarray, sparse.csr_array, np.ndarray]:
    """Spots on a grid, the share of every bin that each covers ``(n, height * width)``, and the whole area of each."""
    margin = int(np.ceil(spots.diameter)) + 1
    rows, share = spots.coverage(-margin, -margin, height + 2 * margin, width + 2 * margin)
    area = np.asarray(share.sum(1)).ravel()
    inside = np.zeros((height + 2 * margin, width + 2 * margin), dtype=bool)
    inside[margin:-margin, margin:-margin] = True
    share = sparse.csr_array(share.tocsc()[:, np.flatnonzero(inside)])
    touching = np.flatnonzero(share.sum(1) > 0)
    return rows[touching], share[touching], area[touching]
