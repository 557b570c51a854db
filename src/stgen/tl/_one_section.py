"""Maps of one section from its own spots and image, with nothing else to learn from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stgen._features import bin_features
from stgen._grid import Grid, apply_affine, check_positive, get_map, measurement_of
from stgen._image import image_levels
from stgen._io import _region, get_counts, get_section, only_key, provenance, shallow_copy, spot_pitch
from stgen.kriging import Field, Kriging, Places
from stgen.measurement import Consistency, Measurement
from stgen.tl._result import MapResult, is_result
from stgen.tl._tissue import tissue_bins, tissue_of_image
from stgen.tl._windows import Tiling, Window

__all__ = ["Composition", "SectionModel", "superresolve_section"]

logger = logging.getLogger("stgen")

FEWEST = 30  # spots
MOST = 15_000
BINS_PER_SPOT = 5  # along its diameter, unless another bin_um is asked for
FINEST_PX_UM = 2.0  # of the image
GUIDE_GENES = 1000  # the most variable, from which components are made
MOST_COMPONENTS = 150
GUIDES = 50  # components by which kernels are chosen
MOST_DRAWN = 30  # components that are sampled
LEAST_KNOWN = 0.02  # of a component's variance that is predicted out of fold, if it is sampled
NOISE_RANGE = (0.05, 50.0)  # of a spot, relative to that of the median total
OVERSHOOT = np.log(2)  # above the largest that was measured, on the scale of a logarithm
COVERAGE = 0.9
TRUSTED_FROM = 0.1  # correlation out of fold, at the lower end of its confidence interval
CONFIDENCE = 1.645  # standard deviations: 95 % on one side
REACH = 3.0  # pitches from a spot, as far as tissue in the image gets a result
MOST_VALUES = 4e7  # in the largest arrays
MOST_BYTES = 8e9  # of a result in memory


def superresolve_section(
    sdata: SpatialData,
    image_key: str | None,
    genes: Sequence[str] | None,
    *,
    low_res: str | None,
    bin_um: float | None,
    factor: int | None,
    like: str | None,
    n_samples: int,
    consistency: bool,
    key_added: str,
    keep_samples: bool,
    tile: int | None,
    seed: int,
    store: Path | None,
    mpp: float | None,
    copy: bool,
    progress: bool,
) -> SpatialData | None:
    """What :func:`stgen.tl.superresolve` does with ``model=None``; its checks of names and paths have been made."""
    if low_res is None or low_res not in sdata.images:
        tables = [key for key in sdata.tables if key == low_res or not is_result(sdata, key)]
        low_res = only_key(tables, low_res, argument="low_res", what="table of spots")
    genes = _genes(sdata, low_res, genes)
    if low_res in sdata.tables:
        _check_enough(sdata.tables[low_res].n_obs, f"{sdata.tables[low_res].n_obs} in {low_res!r}")
    grid = _grid(sdata, image_key, low_res, bin_um=bin_um, factor=factor, like=like, mpp=mpp)
    spots = measurement_of(sdata, low_res, grid, genes[:1])
    if spots.diameter < 0.999:
        raise ValueError(
            f"the bins of {like!r} are {grid.bin_um:.4g} µm, larger than the spots of {low_res!r} ({spots.diameter * grid.bin_um:.4g} "
            "µm). Name a finer map as like=, or leave it out."
        )
    _check_apart(spots, low_res)
    n_maps = 1 + (n_samples > 1) + keep_samples * n_samples
    n_bytes = 4.0 * len(genes) * grid.height * grid.width * n_maps
    if store is None and n_bytes > MOST_BYTES:
        raise ValueError(
            f"the maps of {len(genes)} genes in {grid.height} x {grid.width} bins take {n_bytes / 1e9:.0f} GB. Stream them to "
            "disk with store=<path of a new store>, name fewer genes, or pass a larger bin_um."
        )
    if tile is not None and (isinstance(tile, bool) or tile != int(tile) or tile < 1):
        raise ValueError(f"`tile` must be a whole number of bins, found {tile!r}.")
    total = _total(sdata, low_res, grid)
    kept = _usable(sdata, image_key, grid, spots, total, low_res)
    tissue = _tissue(sdata, grid, image_key, spots)

    features = None
    if image_key is not None:
        features = _features(sdata, image_key, grid, progress=progress)
    model = SectionModel(
        _places(spots, features, kept),
        total[kept],
        _guide(sdata, low_res, grid, total, kept),
        spots.area[kept],
        seed=seed,
    )
    target = shallow_copy(sdata) if copy else sdata
    deviations = model.deviations(n_samples, seed) if n_samples > 1 or keep_samples else None
    chunk = int(min(max(MOST_VALUES // (7 * len(kept)), 1), 2000))
    chunks = [slice(i, min(i + chunk, len(genes))) for i in range(0, len(genes), chunk)]
    side = int(np.clip(np.sqrt(MOST_VALUES / max(4 * len(kept), (n_samples + 3) * min(chunk, len(genes)))), 16, 256))
    reach = int(np.ceil(spots.diameter)) + 1 if consistency else 0
    tiling = Tiling(int(tile or side), reach, grid.height, grid.width, spots if consistency else None)
    windows = tiling.windows(tissue)
    whole = spots.with_counts(total[:, None])
    report = []
    with (
        MapResult(
            grid, genes, n_samples if deviations else 0, key_added, keep_samples=keep_samples, store=store, tile=tiling.tile, total=True
        ) as result,
        tqdm(total=len(chunks) * len(windows), desc="superresolve one section", unit="window", disable=not progress) as bar,
    ):  # fmt: skip
        for part in chunks:
            measured = measurement_of(sdata, low_res, grid, genes[part])
            composition = model.genes(measured.counts[kept])
            report.append(composition.report(genes[part]))
            for window in windows:
                inside = tiling.kept(window) & _part(tissue, window)
                maps, depth = _maps(model, composition, deviations, features, spots, window)
                if consistency:
                    agree = Consistency(measured, *window.outer, tissue=_part(tissue, window))
                    maps = (agree(torch.as_tensor(values, dtype=torch.float32)[None])[0].numpy() for values in maps)
                result.put(maps, inside, *window.outer[:2], part)
                if part.start == 0:
                    if consistency:
                        agree = Consistency(whole, *window.outer, tissue=_part(tissue, window))
                        depth = agree(torch.as_tensor(depth, dtype=torch.float32)[None])[0].numpy()
                    result.put_total(depth, inside, *window.outer[:2])
                bar.update()
        table = _report(sdata, low_res, genes, report, kept, spots)
        entry = provenance(
            "tl.superresolve", model="Kriging", image=image_key, low_res=low_res, like=like, genes=genes, unit="counts per bin",
            bin_um=grid.bin_um, n_samples=n_samples, consistency=consistency, tile=tiling.tile, seed=seed, n_spots=len(kept),
            n_spots_left_out=len(spots) - len(kept), n_trusted=int(table.var["trusted"].sum()), **model.summary(spots.pitch * grid.bin_um),
        )  # fmt: skip
        keys = result.hand_over(target, entry, table)
    n_trusted = int(table.var["trusted"].sum())
    logger.info(
        "superresolved %d genes in %d x %d bins of %.4g µm from %d spots into %s; %s. %d genes are predictable out of fold: "
        'see sdata.tables["%s"].var.',
        len(genes), grid.width, grid.height, grid.bin_um, len(kept), " and ".join(f'sdata.images["{key}"]' for key in keys),
        "sdata.write(path) saves it" if store is None else f"it is stored in {store}, which spatialdata.read_zarr reads",
        n_trusted, f"{key_added}_out_of_fold",
    )  # fmt: skip
    return target if copy else None


# ---- the model -------------------------------------------------------------------------------------------------------


class SectionModel:
    """Depth and composition of one section as kriged fields.

    The counts of a place are its total times its composition. The logarithm of the total is one field. Of the composition,
    ``log1p(counts / total x median total)``, each gene is kriged twice, and the mean of both is taken: by itself, and through
    principal components of the most variable genes, each with its own kernel and noise, so that weak genes learn from strong
    ones that go with them.

    Parameters
    ----------
    places
        Where the spots are and what they look like.
    total
        Counts of each spot over all genes, shape ``(n,)``.
    guide
        Counts of the most variable genes, shape ``(n, K)``.
    area
        Bins that each spot measured, shape ``(n,)``.
    seed
        Random seed.
    """

    def __init__(
        self, places: Places, total: np.ndarray, guide: np.ndarray, area: np.ndarray, *, seed: int = 0
    ) -> None:
        self.total, self.area = total, area
        self.target = float(np.median(total))
        noise = np.clip(self.target / total, *NOISE_RANGE)  # of a share that was counted
        self.precision = 1 / noise
        self.scores = components(self.composition(guide), self.precision)
        density = np.log(total / area)[:, None]
        self.kriging = Kriging(places, noise=noise, guide=np.hstack([self.scores[:, :GUIDES], density]), seed=seed)
        self._y = np.hstack([self.scores, density])
        self.shared = self.kriging.solve(self._y)
        weighted = self.precision[:, None] * self.scores
        self.regression = (weighted / np.maximum((weighted * self.scores).sum(0), 1e-12)).T
        self.most = float(density.max()) + OVERSHOOT

    def composition(self, counts: np.ndarray) -> np.ndarray:
        """Counts ``(n, G)`` on the scale that is kriged: ``log1p(counts / total x median total)``."""
        return np.log1p(counts / self.total[:, None] * self.target)

    def genes(self, counts: np.ndarray) -> Composition:
        """Krige some genes, of which ``counts (n, G)`` were measured."""
        y = self.composition(counts)
        return Composition(self, counts, y, self.kriging.solve(y), self.regression @ y)

    def deviations(self, n_samples: int, seed: int) -> Any:
        """Draws of what is left open: a function of places, shape ``(len(places), n_samples, K + 1)``; and its columns."""
        known = self.shared.from_image + self.shared.from_neighbors
        drawn = np.argsort(-known[:-1])[:MOST_DRAWN]
        drawn = np.append(np.sort(drawn[known[drawn] > LEAST_KNOWN]), len(known) - 1)
        some = _columns(self.shared, drawn)
        return self.kriging.draw(self._y[:, drawn], some, n_samples, seed), drawn

    def summary(self, pitch_um: float) -> dict[str, Any]:
        """What is common to all genes, for the record: averages over components, weighted by what is predicted of each."""
        known = np.maximum(self.shared.from_image + self.shared.from_neighbors, 0)[:-1]
        weight = known * (self.scores**2).mean(0)
        weight = weight / max(weight.sum(), 1e-12)
        length = np.nan_to_num(self.shared.length[:-1])
        used = np.where(np.isfinite(self.shared.length[:-1]), weight, 0)
        variance = (self.scores**2).mean(0) / max((self.scores**2).mean(0).sum(), 1e-12)
        return {
            "kernels": {name: round(float(share[:-1] @ weight), 4) for name, share in self.shared.kernels.items()},
            "correlation_length_um": round(float(length @ used / max(used.sum(), 1e-12)) * pitch_um, 2),
            "from_image": round(float(self.shared.from_image[:-1] @ variance), 4),
            "from_neighbors": round(float(self.shared.from_neighbors[:-1] @ variance), 4),
        }


@dataclass(frozen=True)
class Composition:
    """Some genes of a section: their fields, and their loadings on the components."""

    model: SectionModel
    counts: np.ndarray
    y: np.ndarray
    fields: Field
    loadings: np.ndarray

    def combined(self, direct: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """The mean of both predictions, ``direct (n, G)`` and by components ``(n, K)``."""
        return (direct + self.fields.mean + shared @ self.loadings) / 2

    def counts_of(self, composition: np.ndarray, density: np.ndarray) -> np.ndarray:
        """Counts per bin of composition ``(..., G)`` and log total density ``(...)``; no more than twice what was seen."""
        composition = np.clip(composition, 0, self.y.max(0, initial=0) + OVERSHOOT * (self.y.max(0, initial=0) > 0))
        return np.expm1(composition) * (np.exp(np.minimum(density, self.model.most)) / self.model.target)[..., None]

    def at(self, places: Places) -> tuple[np.ndarray, np.ndarray]:
        """Expected composition ``(P, G)`` and log density of counts ``(P,)``."""
        shared = self.model.kriging.predict(self.model.shared, places)
        direct = self.model.kriging.predict(self.fields, places)
        return self.combined(direct, shared[:, :-1]), shared[:, -1]

    def report(self, genes: Sequence[str]) -> dict[str, Any]:
        """How well each spot is predicted from the others, gene by gene."""
        shared = self.model.shared.out_of_fold
        composition = self.combined(self.fields.out_of_fold, shared[:, :-1])
        own = (shared[:, :-1] * self.model.regression.T).sum(1)  # what a spot gave to the loadings comes back to it
        composition = composition - own[:, None] * (self.y - self.fields.mean) / 2
        predicted = self.counts_of(composition, shared[:, -1]) * self.model.area[:, None]
        n = len(composition)
        score = _correlation(composition, self.y)
        lower = np.tanh(np.arctanh(np.clip(score, -0.999, 0.999)) - CONFIDENCE / np.sqrt(max(n - 3, 1)))
        depth = np.exp(shared[:, -1:]) * self.model.area[:, None]
        normed = np.log1p(predicted / depth * 1e4), np.log1p(self.counts / self.model.total[:, None] * 1e4)
        var = pd.DataFrame(
            {
                "score": score, "trusted": lower > TRUSTED_FROM, "from_image": self.fields.from_image,
                "from_neighbors": self.fields.from_neighbors,
                "interval_90": _conformal(np.log1p(predicted), np.log1p(self.counts)),
                "interval_90_norm": _conformal(*normed), "mean_counts": self.counts.mean(0),
            },
            index=list(genes),
        )  # fmt: skip
        return {"var": var, "predicted": predicted.astype(np.float32)}


def components(y: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Principal components of genes ``(n, K)``, spots weighted by their precision: scores, shape ``(n, at most n - 2)``.

    Genes are divided by the square root of their standard deviation: between covariance and correlation.
    """
    centered = y - precision @ y / precision.sum()
    spread = np.sqrt(precision @ centered**2 / precision.sum())
    scaled = centered / np.sqrt(np.where(spread > 1e-9, spread, np.inf))
    _, values, directions = np.linalg.svd(scaled * np.sqrt(precision)[:, None], full_matrices=False)
    kept = min(int((values > 1e-6 * values.max(initial=0)).sum()), len(y) - 2, MOST_COMPONENTS)
    return scaled @ directions[: max(kept, 1)].T


def _conformal(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Half the width of intervals that hold 90 % of the spots, each predicted from the others (jackknife), per column."""
    error = np.sort(np.abs(truth - prediction), axis=0)
    return error[min(int(np.ceil((len(error) + 1) * COVERAGE)), len(error)) - 1]


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of columns, 0 where one is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 1e-12, (a * b).sum(0) / np.maximum(norm, 1e-12), 0.0)


def _columns(fields: Field, columns: np.ndarray) -> Field:
    return replace(
        fields,
        mean=fields.mean[columns],
        weights={name: weight[:, columns] for name, weight in fields.weights.items()},
        out_of_fold=fields.out_of_fold[:, columns],
        from_image=fields.from_image[columns],
        from_neighbors=fields.from_neighbors[columns],
        noise=fields.noise[columns],
        kernels={name: share[columns] for name, share in fields.kernels.items()},
    )


def _maps(
    model: SectionModel,
    genes: Composition,
    deviations: Any,
    features: np.ndarray | None,
    spots: Measurement,
    window: Window,
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Samples of some genes in a window, counts per bin ``(G, h, w)`` one by one, and last the expected map; and the total."""
    top, left, height, width = window.outer
    y, x = np.mgrid[top : top + height, left : left + width] + 0.5
    xy = np.column_stack([x.ravel(), y.ravel()]).astype(np.float32) / np.float32(spots.pitch)
    if features is not None:
        features = features[:, top : top + height, left : left + width].reshape(len(features), -1).T
    places = Places(xy, features)
    composition, density = genes.at(places)

    def shaped(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(values.reshape(height, width, -1), -1, 0)

    def maps() -> Iterator[np.ndarray]:
        if deviations is not None:
            draw, drawn = deviations
            for change in np.moveaxis(draw(places), 1, 0):
                changed = composition + change[:, :-1] @ genes.loadings[drawn[:-1]]
                yield shaped(genes.counts_of(changed, density + change[:, -1]))
        yield shaped(genes.counts_of(composition, density))

    return maps(), shaped(np.exp(np.minimum(density, model.most)))


# ---- what was measured -----------------------------------------------------------------------------------------------


def _genes(sdata: SpatialData, low_res: str, genes: Sequence[str] | None) -> list[str]:
    """The genes to write: all that were measured by default."""
    known = get_map(sdata, low_res).coords["c"].values if low_res in sdata.images else sdata.tables[low_res].var_names
    known = [str(name) for name in known]
    if genes is None and len(set(known)) < len(known):
        raise ValueError(f"gene names of {low_res!r} occur more than once; run .var_names_make_unique() first.")
    genes = known if genes is None else [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
    if not genes or len(set(genes)) < len(genes):
        raise ValueError(f"`genes` must name at least one gene, and each once; found {len(genes)}.")
    unknown = sorted(set(genes) - set(known))
    if unknown:
        raise KeyError(
            f"{len(unknown)} of {len(genes)} genes are not in {low_res!r} ({', '.join(unknown[:5])}); its names look like "
            f"{', '.join(known[:3])}."
        )
    return genes


def _grid(
    sdata: SpatialData,
    image_key: str | None,
    low_res: str,
    *,
    bin_um: float | None,
    factor: int | None,
    like: str | None,
    mpp: float | None,
) -> Grid:
    """The bins of the result: those of a map, or of the image, or around the spots."""
    if bin_um is not None:
        check_positive("bin_um", bin_um)
    if factor is not None and (isinstance(factor, bool) or factor != int(factor) or factor < 1):
        raise ValueError(f"`factor` must be a whole number of at least 1, found {factor!r}.")
    if like is not None:
        grid = Grid.of_map(sdata, like)
        if bin_um is not None and not abs(bin_um / grid.bin_um - 1) <= 0.01:
            raise ValueError(
                f"the bins of {like!r} are {grid.bin_um:.4g} µm, found bin_um={bin_um!r}; leave one of both out."
            )
        if factor is not None:
            raise ValueError(f"the bins are those of like={like!r}; leave `factor` out.")
        return grid
    if low_res in sdata.images:
        low = Grid.of_map(sdata, low_res)
        if bin_um is None:
            return low.refined(int(factor or BINS_PER_SPOT))
        times = low.bin_um / bin_um
        if abs(times - round(times)) > 0.01 or round(times) < 1 or factor not in (None, round(times)):
            raise ValueError(
                f"the bins of {low_res!r} are {low.bin_um:.4g} µm, {times:.4g} times bin_um={bin_um!r}, which must be a whole "
                f"number of times and, if it is given, factor (found {factor!r}); pass one of both."
            )
        return low.refined(round(times))
    if factor is not None:
        raise ValueError(
            f"`factor` is for maps, and low_res={low_res!r} is a table of spots; pass bin_um=<µm> instead."
        )
    section = get_section(sdata, table_key=low_res, image_key=image_key, mpp=mpp)
    diameter = section.spot_diameter_um or spot_pitch(section.xy_px)[0] * (section.mpp or np.nan)
    if bin_um is None:
        bin_um = _rounded(diameter / BINS_PER_SPOT)
    if not (np.isfinite(bin_um) and 0 < bin_um <= diameter):
        raise ValueError(
            f"`bin_um` must be positive and at most the diameter of the spots ({diameter:.4g} µm), found {bin_um!r}."
        )
    if image_key is None:
        return Grid.of_spots(sdata, low_res, bin_um=bin_um, mpp=mpp)
    return Grid.of_image(sdata, image_key, bin_um=bin_um, mpp=section.mpp)


def _rounded(um: float) -> float:
    """A length rounded to one digit: 11 µm to 10, 20 to 20, 2.3 to 2."""
    unit = 10.0 ** np.floor(np.log10(um))
    return float(max(round(um / unit), 1) * unit)


def _check_enough(n: int, found: str) -> None:
    if n < FEWEST:
        raise ValueError(
            f"fewer than {FEWEST} spots to learn from: {found}. A map cannot be learned from so little; use a model that was "
            "fitted on other sections: superresolve(..., model=...)."
        )


def _check_apart(spots: Measurement, low_res: str) -> None:
    _, first, count = np.unique(np.round(spots.centers, 3), axis=0, return_index=True, return_counts=True)
    if (count > 1).any():
        y, x = spots.centers[first[count > 1][0]]
        raise ValueError(
            f"{int((count - 1).sum())} of {len(spots)} spots of {low_res!r} lie where another one does (the first at bin "
            f"(y, x) = ({y:.1f}, {x:.1f})). Keep one of each, or sum their counts."
        )


def _total(sdata: SpatialData, low_res: str, grid: Grid) -> np.ndarray:
    """Counts of each spot over all genes."""
    if low_res in sdata.images:
        low = get_map(sdata, low_res)
        unknown = np.isnan(np.asarray(low.data))
        if (unknown.any(0) != unknown.all(0)).any():
            raise ValueError(
                f"in some bins of {low_res!r}, some genes are NaN and others are not; make them all NaN, or none."
            )
        names = [str(name) for name in low.coords["c"].values]
        return measurement_of(sdata, low_res, grid, names).counts.sum(1).astype(float)
    return np.asarray(get_counts(sdata.tables[low_res], dense=False).sum(1), float).ravel()


def _usable(
    sdata: SpatialData, image_key: str | None, grid: Grid, spots: Measurement, total: np.ndarray, low_res: str
) -> np.ndarray:
    """The spots to learn from: with counts, and on the grid, and on the image if there is one."""
    if image_key is not None and grid.overlap(sdata, image_key) <= 0:
        system = grid.shared_system(sdata, image_key)
        raise ValueError(
            f"the image {image_key!r} and {low_res!r} do not overlap in the coordinate system {system!r}. Correct the "
            "transformation of one of them: spatialdata.transformations.set_transformation."
        )
    inside = ((spots.centers >= 0) & (spots.centers <= np.array([grid.height, grid.width]))).all(1)
    if image_key is not None:
        sizes = image_levels(sdata.images[image_key])[0].sizes
        pixel = apply_affine(grid.to_element(sdata, image_key), spots.centers[:, ::-1])
        inside &= ((pixel >= 0) & (pixel <= np.array([sizes["x"], sizes["y"]]))).all(1)
    kept = np.flatnonzero(inside & (total > 0))
    if len(spots) > MOST:
        raise ValueError(
            f"{low_res!r} has {len(spots)} spots, more than the {MOST} whose covariance fits in memory. Sum neighboring bins "
            "(stgen.pp.rasterize with a larger bin_um), or crop the section (spatialdata.bounding_box_query)."
        )
    empty, outside = int((total <= 0).sum()), int((~inside).sum())
    found = f"{len(spots)} spots in {low_res!r}, {empty} without counts, {outside} off the grid or the image"
    _check_enough(len(kept), found)
    if empty or outside:
        logger.warning("%s: left out.", found)
    return kept


def _tissue(sdata: SpatialData, grid: Grid, image_key: str | None, spots: Measurement) -> np.ndarray:
    """Which bins get a result: within a pitch of a spot; and what is tissue in the image, within three."""
    tissue = tissue_bins(sdata, grid, image_key, spots, None, None)
    if image_key is None:
        return tissue
    shown = tissue_of_image(sdata, grid, image_key, _um_per_pixel(sdata, grid, image_key))
    tree = cKDTree(spots.centers)
    for y in range(grid.height):
        x = np.flatnonzero(shown[y] & ~tissue[y])
        distance, _ = tree.query(
            np.column_stack([np.full(len(x), y + 0.5), x + 0.5]), distance_upper_bound=REACH * spots.pitch
        )
        tissue[y, x] = np.isfinite(distance)
    return tissue


def _guide(sdata: SpatialData, low_res: str, grid: Grid, total: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Counts of the genes whose composition varies most, shape ``(n, K)``."""
    if low_res in sdata.images:
        names = [str(name) for name in sdata.images[low_res].coords["c"].values]
    else:
        names = list(sdata.tables[low_res].var_names)
    variance = []
    for start in range(0, len(names), GUIDE_GENES):
        counts = _counts(sdata, low_res, grid, names[start : start + GUIDE_GENES])[kept]
        variance.append(np.log1p(counts / total[kept, None] * np.median(total[kept])).var(0))
    order = np.argsort(-np.concatenate(variance), kind="stable")[:GUIDE_GENES]
    return _counts(sdata, low_res, grid, [names[i] for i in order])[kept]


def _counts(sdata: SpatialData, low_res: str, grid: Grid, genes: list[str]) -> np.ndarray:
    if low_res in sdata.images:
        return measurement_of(sdata, low_res, grid, genes).counts.astype(float)
    return get_counts(sdata.tables[low_res], genes=genes).astype(float)


def _um_per_pixel(sdata: SpatialData, grid: Grid, image_key: str) -> float:
    """µm per pixel of an image's finest level, by the grid's bins."""
    return float(grid.bin_um / np.sqrt(abs(np.linalg.det(grid.to_element(sdata, image_key)[:2, :2]))))


def _features(sdata: SpatialData, image_key: str, grid: Grid, *, progress: bool) -> np.ndarray:
    px_per_bin = max(1, round(grid.bin_um / max(FINEST_PX_UM, _um_per_pixel(sdata, grid, image_key))))
    read = grid.image_window(sdata, image_key, px_per_bin=px_per_bin)
    return bin_features(read, grid.height, grid.width, bin_um=grid.bin_um, px_per_bin=px_per_bin, progress=progress)


def _places(spots: Measurement, features: np.ndarray | None, kept: np.ndarray) -> Places:
    """Where the spots are, and the mean of the features over each."""
    xy = spots.centers[kept][:, ::-1] / spots.pitch
    if features is None:
        return Places(xy)
    some = replace(spots, counts=spots.counts[kept], centers=spots.centers[kept], area=spots.area[kept])
    area = some.pool(np.ones((1, *features.shape[1:]), np.float32))
    pooled = [some.pool(part) for part in np.array_split(features, max(1, features.nbytes // int(1e8)))]
    return Places(xy, np.hstack(pooled) / np.maximum(area, 1e-6))


def _part(tissue: np.ndarray, window: Window) -> np.ndarray:
    y, x, height, width = window.outer
    return tissue[y : y + height, x : x + width]


def _report(
    sdata: SpatialData,
    low_res: str,
    genes: list[str],
    report: list[dict[str, Any]],
    kept: np.ndarray,
    spots: Measurement,
) -> AnnData:
    """Table of the spots as predicted from the others, with what is known of each gene."""
    var = pd.concat([part["var"] for part in report])
    predicted = np.hstack([part["predicted"] for part in report])
    table = AnnData(predicted, var=var)
    if low_res in sdata.tables:
        source = sdata.tables[low_res]
        attrs = source.uns["spatialdata_attrs"]
        region, _ = _region(sdata, source, low_res, None)
        table.obs = source.obs[[attrs["region_key"], attrs["instance_key"]]].iloc[kept].copy()
        table.obs[attrs["region_key"]] = pd.Categorical([region] * len(kept))
        table.uns["spatialdata_attrs"] = {**attrs, "region": region}
    table.obsm["bin_yx"] = spots.centers[kept]
    return table
