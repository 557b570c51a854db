"""Tissue structure without labels: Leiden clusters of expression, measured or predicted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from sklearn.neighbors import KNeighborsClassifier
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, TableModel
from spatialdata.transformations import get_transformation

from stgen._checks import check_types, genes_of
from stgen._spatial.records import check_new_key, copied_table, provenance, record, shallow_copy
from stgen._spatial.section import get_table
from stgen.tl.cells.locations import Locations, Window, locations_of
from stgen.transforms import transform_counts

__all__ = ["find_domains"]

logger = logging.getLogger("stgen")

FUNCTION = "tl.find_domains"
CHUNK = 512  # bins along a side of the labels' chunks
RESOLUTIONS = (1e-3, 30.0)  # between which a number of domains is searched
TRIALS = 24


@check_types
def find_domains(
    data: SpatialData | AnnData,
    *,
    map_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    genes: Sequence[str] | None = None,
    n_domains: int | None = None,
    resolution: float = 1.0,
    n_pcs: int = 30,
    n_neighbors: int = 15,
    max_locations: int = 50_000,
    seed: int = 0,
    key_added: str = "domains",
    overwrite: bool = False,
    copy: bool = False,
) -> SpatialData | AnnData | None:
    """Group spots, cells or bins by what they express: scanpy's Leiden clustering, of counts or of predictions.

    Counts are brought to 10,000 per location and to log1p, then principal components, the graph of nearest neighbors
    and its Leiden communities follow. Where something lies is not looked at: domains that are connected in space were
    found so. Predictions on the scale of log1p of counts per 10,000 are taken as they are.

    Parameters
    ----------
    data
        Object with a map of expected counts, or with a table of spots or cells.
    map_key
        A map in ``sdata.images``, counts per bin, ``(c, y, x)``.
    table_key
        Or else: a table of a SpatialData; None if there is one.
    layer
        Layer of the table with counts, or a prediction of :func:`stgen.tl.predict_expression`; None for ``X``.
    genes
        Genes to group by, all that there are by default. Counts per 10,000 are of all genes in any case (of a
        prediction: of all that were predicted).
    n_domains
        Number of domains, for which a resolution is searched. Leiden cannot give every number: the closest is taken,
        and a warning says so.
    resolution
        Of Leiden, where no number is asked for: more domains if it is larger.
    n_pcs
        Principal components to keep; fewer where there are fewer genes or locations.
    n_neighbors
        Neighbors of each location in the graph.
    max_locations
        Where there are more, so many of them, drawn at random, are clustered; each of the others goes with the majority
        of its neighbors among these, in the space of the principal components. Neighbors are found exactly, which takes
        time with the square of this number: seconds at 50,000, minutes at 200,000.
    seed
        Random seed; the same one gives the same domains.
    key_added
        Name of the result.
    overwrite
        Whether an earlier result of this function may be replaced.
    copy
        Return a copy with the result and leave ``data`` alone.

    Returns
    -------
    ``None``, or the copy. Domains are numbered from the largest on, from 0, as scanpy does. Locations with no count,
    and bins where a gene is NaN, have none. Written is

    - of a table ``obs[key_added]``, categorical: ``"0"``, ``"1"``, ...
    - of a map ``sdata.labels[key_added]``, uint16 ``(y, x)``: 0 for none, 1 for domain 0, and so on

    The record, in ``uns["stgen"][key_added]`` or ``sdata.attrs["stgen"][key_added]``, holds ``"map_key"`` or
    ``"layer"`` (neither for ``X``), ``"genes"``, ``"types"`` (names of the domains, one per line), ``"resolution"``,
    ``"n_pcs"``, ``"n_neighbors"``, ``"n_clustered"``, ``"seed"``, ``"function"``, ``"version"``.

    Raises
    ------
    KeyError
        If a map, table, layer or gene does not exist.
    TypeError
        If ``data`` is of another kind.
    ValueError
        If an argument is impossible, there are fewer than 20 locations with counts or fewer than two genes that differ
        between them, values are not counts, or the key exists, holds something else, or cannot be stored.

    See Also
    --------
    stgen.metrics.label_agreement : ARI and NMI between domains and an annotation.
    stgen.pl.domains : Draw domains beside an annotation.

    Notes
    -----
    The path is that of Stem, Section 5.2, "Unsupervised Tissue Structure Annotation", with the default steps of scanpy
    (:func:`scanpy.pp.normalize_total`, :func:`scanpy.pp.log1p`, :func:`scanpy.pp.pca`, :func:`scanpy.pp.neighbors`,
    :func:`scanpy.tl.leiden` of igraph). A prediction has no counting noise, so its neighbors are closer and its domains
    look cleaner than those of counts, whether they are right or not.

    Examples
    --------
    >>> from stgen import datasets, metrics, tl
    >>> cells = datasets.simulated_section(size_um=500)["cell_counts"]
    >>> tl.find_domains(cells, n_domains=6)
    >>> cells.obs["domains"].cat.categories.to_list()
    ['0', '1', '2', '3', '4', '5']
    >>> metrics.label_agreement(cells.obs["domains"], cells.obs["cell_type"])["ARI"] > 0.3
    True
    """
    _check_numbers(n_domains, resolution, n_pcs, n_neighbors, max_locations, seed)
    locations = locations_of(data, map_key, table_key, layer)
    chosen = genes_of(genes, locations.genes, "the table" if map_key is None else f"the map {map_key!r}")
    if len(chosen) < 2:
        raise ValueError(f"domains differ in several genes, found {len(chosen)}: {', '.join(chosen)}.")
    _check_key(data, map_key, table_key, key_added, overwrite=overwrite)

    known = np.zeros(locations.shape, bool)
    for window in locations.windows():
        known[window.at] = _has_counts(window)
    known = known.ravel()
    if known.sum() < 20:
        raise ValueError(
            f"only {known.sum()} of {known.size} locations have counts of all genes; at least 20 are needed."
        )
    n_clustered = min(int(known.sum()), max_locations)
    drawn = np.zeros(known.size, bool)
    drawn[np.random.default_rng(seed).choice(np.flatnonzero(known), n_clustered, replace=False)] = True

    columns = pd.Index(locations.genes).get_indexer(chosen)
    at, x = (np.concatenate(parts) for parts in zip(*_expression(locations, columns, drawn), strict=True))
    varies = np.ptp(x, axis=0) > 0
    if varies.sum() < 2:
        raise ValueError(f"{varies.sum()} of {len(chosen)} genes differ between locations; domains need at least two.")
    adata = AnnData(x[np.argsort(at)][:, varies])  # in one order, however the map is chunked
    n_pcs, n_neighbors = min(n_pcs, int(varies.sum()) - 1, n_clustered - 1), min(n_neighbors, n_clustered - 1)
    sc.pp.pca(adata, n_comps=n_pcs, random_state=seed)
    # exact neighbors of any number of rows: scanpy's own choice above 8,191, approximate ones, needs an older SciPy
    sc.pp.neighbors(adata, n_neighbors=n_neighbors, use_rep="X_pca", transformer="sklearn", random_state=seed)
    code, resolution = _communities(adata, n_domains, resolution, seed)

    domain = np.full(known.size, -1)
    domain[drawn] = code
    if n_clustered < known.sum():
        nearest = KNeighborsClassifier(n_neighbors).fit(adata.obsm["X_pca"], code)
        center = adata.X.mean(0)
        for at, x in _expression(locations, columns, known & ~drawn):
            domain[at] = nearest.predict((x[:, varies] - center) @ adata.varm["PCs"])
    domain = _by_size(domain)
    names = [str(number) for number in range(domain.max() + 1)]
    entry = provenance(
        FUNCTION, map_key=map_key, layer=layer, genes=chosen, types="\n".join(names), resolution=float(resolution),
        n_pcs=n_pcs, n_neighbors=n_neighbors, n_clustered=n_clustered, seed=seed,
    )  # fmt: skip
    if copy:
        data = shallow_copy(data) if isinstance(data, SpatialData) else copied_table(data)
    if map_key is None:
        table = get_table(data, table_key=table_key)
        table.obs[key_added] = pd.Categorical.from_codes(domain, categories=names)
        record(table, key_added, entry)
    else:
        data.labels[key_added] = Labels2DModel.parse(
            (domain + 1).astype(np.uint16).reshape(locations.shape), dims=("y", "x"), chunks=(CHUNK, CHUNK),
            transformations=get_transformation(data.images[map_key], get_all=True),
        )  # fmt: skip
        record(data, key_added, entry)
    logger.info("Found %d domains in %d of %d locations.", len(names), known.sum(), known.size)
    return data if copy else None


def _check_numbers(
    n_domains: int | None, resolution: float, n_pcs: int, n_neighbors: int, max_locations: int, seed: int
) -> None:
    least = {"n_domains": (n_domains, 2), "n_pcs": (n_pcs, 1), "n_neighbors": (n_neighbors, 2),
             "max_locations": (max_locations, 20), "seed": (seed, 0)}  # fmt: skip
    for name, (value, low) in least.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
            raise ValueError(f"`{name}` must be a whole number of at least {low}, found {value!r}.")
    if isinstance(resolution, bool) or not isinstance(resolution, Real) or not 0 < resolution < np.inf:
        raise ValueError(f"`resolution` must be a positive number, found {resolution!r}.")
    if seed >= 2**32:
        raise ValueError(f"`seed` must be below 2**32, found {seed}.")
    if n_domains is not None and resolution != 1.0:
        raise ValueError(f"give n_domains={n_domains} or resolution={resolution}, not both: the one decides the other.")


def _check_key(
    data: SpatialData | AnnData, map_key: str | None, table_key: str | None, key: str, *, overwrite: bool
) -> None:
    """Refuse a name that exists, unless it is an earlier result that may be replaced, and one that cannot be stored."""
    trial = SpatialData()
    if map_key is None:
        table = get_table(data, table_key=table_key)
        container, what, made, names = table.obs, "obs", table.uns, list(table.obs)
        trial["trial"] = TableModel.parse(AnnData(np.zeros((1, 1)), obs=pd.DataFrame({key: ["a"]}, index=["0"])))
    else:
        container, what, made = data.labels, "sdata.labels", data.attrs
        names = [name for _, name, _ in data.gen_elements()]
        trial.labels[key] = Labels2DModel.parse(np.zeros((1, 1), np.uint16), dims=("y", "x"))
    check_new_key(container, key, overwrite=overwrite, what=what)
    entry = made.get("stgen", {}).get(key)
    another = entry is not None and entry.get("function") != FUNCTION
    if (
        another
        or (key in container and entry is None)
        or key.lower() in {n.lower() for n in names if n not in container}
    ):
        raise ValueError(
            f"{key!r} is there and not a result of {FUNCTION}, so it is not replaced; pass another key_added=."
        )
    similar = next((name for name in container if name != key and name.lower() == key.lower()), None)
    if similar is not None:
        raise ValueError(f"{key!r} and {similar!r} cannot be stored side by side; pass another key_added=.")


# ---- expression ------------------------------------------------------------------------------------------------------


def _has_counts(window: Window) -> np.ndarray:
    """Which locations of a window have counts, all genes being known."""
    total = np.zeros(window.shape)

    def see(_: slice, block: np.ndarray) -> None:
        total[...] += block.sum(0, dtype=np.float64)

    window.each(see)
    return total > 0


def _expression(
    locations: Locations, columns: np.ndarray, wanted: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers of wanted locations, and ``log1p(counts per 10,000)`` there, ``(n, columns)``, window by window."""
    number = np.arange(wanted.size).reshape(locations.shape)
    for window in locations.windows():
        at = number[window.at].ravel()
        here = wanted[at]
        if here.any():
            counts, total = np.empty((here.sum(), len(columns)), np.float32), np.zeros(here.sum())

            def see(genes: slice, block: np.ndarray, here=here, counts=counts, total=total) -> None:
                block = block.reshape(len(block), -1)[:, here]
                total += block.sum(0, dtype=np.float64)
                first = genes.start or 0
                inside = (columns >= first) & (columns < first + len(block))
                counts[:, inside] = block[columns[inside] - first].T

            window.each(see)
            if locations.depth is not None:
                total = np.full(len(total), locations.depth)
            yield at[here], transform_counts(counts, total, "log1p_norm").astype(np.float32)


# ---- communities -----------------------------------------------------------------------------------------------------


def _communities(adata: AnnData, n_domains: int | None, resolution: float, seed: int) -> tuple[np.ndarray, float]:
    """The community of each row, and the resolution that gave them."""

    def leiden(at: float) -> np.ndarray:
        sc.tl.leiden(adata, resolution=at, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
        return adata.obs["leiden"].astype(int).to_numpy()

    if n_domains is None:
        return leiden(resolution), resolution
    low, high = np.log(RESOLUTIONS)
    found: dict[float, np.ndarray] = {}
    for _ in range(TRIALS):  # by halves: the number of communities grows with the resolution, nearly always
        middle = (low + high) / 2
        found[middle] = leiden(np.exp(middle))
        n = found[middle].max() + 1
        if n == n_domains:
            break
        low, high = (middle, high) if n < n_domains else (low, middle)
    best = min(found, key=lambda at: abs(found[at].max() + 1 - n_domains))
    n = found[best].max() + 1
    if n != n_domains:
        logger.warning(
            "Leiden gives no %d domains here; %d at a resolution of %.4g are the closest.", n_domains, n, np.exp(best)
        )
    return found[best], float(np.exp(best))


def _by_size(domain: np.ndarray) -> np.ndarray:
    """Numbers from the largest domain on; -1 stays."""
    size = np.bincount(domain[domain >= 0])
    rank: Any = np.empty(len(size), int)
    rank[np.argsort(-size, kind="stable")] = np.arange(len(size))
    return np.where(domain >= 0, rank[domain], -1)
