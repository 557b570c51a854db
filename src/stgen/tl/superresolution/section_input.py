"""One section as :func:`stgen.tl.superresolve` takes it without a model: what was measured, where, and what is seen there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from stgen._checks import check_positive, only_key
from stgen._spatial.counts import get_counts
from stgen._spatial.grid import Grid, apply_affine, get_map
from stgen._spatial.image import histology_of
from stgen._spatial.measured import measurement_of
from stgen._spatial.platforms import spot_pitch
from stgen._spatial.section import annotated_region, get_section
from stgen._spatial.tissue import tissue_bins, tissue_of_image
from stgen.features import bin_features
from stgen.kriging import Places
from stgen.measurement import Measurement
from stgen.tl.superresolution.result import is_result
from stgen.tl.superresolution.section_model import composition

__all__ = ["MeasuredSection"]

logger = logging.getLogger("stgen")

FEWEST = 30  # spots
MOST = 15_000
BINS_PER_SPOT = 5  # along its diameter, unless another bin_um is asked for
FINEST_PX_UM = 2.0  # of the image
GUIDE_GENES = 1000  # the most variable, from which components are made
REACH = 3.0  # pitches from a spot, as far as tissue in the image gets a result


@dataclass(frozen=True)
class MeasuredSection:
    """A section with spots that can be learned from, checked."""

    sdata: SpatialData
    image_key: str | None
    low_res: str
    layer: str | None
    """Of the table, with the counts."""
    genes: list[str]
    """Which to make maps of."""
    grid: Grid
    spots: Measurement
    """All that were measured, with the counts of one gene."""
    total: np.ndarray
    """Counts of each over all genes, shape ``(n,)``."""
    kept: np.ndarray
    """Rows of the spots to learn from."""

    @classmethod
    def of(
        cls,
        sdata: SpatialData,
        image_key: str | None,
        low_res: str | None,
        genes: Sequence[str] | None,
        *,
        layer: str | None,
        bin_um: float | None,
        factor: int | None,
        like: str | None,
        mpp: float | None,
    ) -> MeasuredSection:
        """What the arguments of :func:`stgen.tl.superresolve` name; an error if nothing can be learned from it."""
        if low_res is None or low_res not in sdata.images:
            tables = [key for key in sdata.tables if key == low_res or not is_result(sdata, key)]
            low_res = only_key(tables, low_res, argument="low_res", what="table of spots")
        genes = _genes(_names(sdata, low_res), low_res, genes)
        if low_res in sdata.tables:
            _check_enough(sdata.tables[low_res].n_obs, f"{sdata.tables[low_res].n_obs} in {low_res!r}")
        grid = _grid(sdata, image_key, low_res, bin_um=bin_um, factor=factor, like=like, mpp=mpp)
        spots = measurement_of(sdata, low_res, grid, genes[:1], layer=layer)
        if spots.diameter < 0.999:
            raise ValueError(
                f"the bins of {like!r} are {grid.bin_um:.4g} µm, larger than the spots of {low_res!r} ({spots.diameter * grid.bin_um:.4g} "
                "µm). Name a finer map as like=, or leave it out."
            )
        _check_apart(spots, low_res)
        total = _total(sdata, low_res, layer, grid)
        kept = _usable(sdata, image_key, grid, spots, total, low_res)
        return cls(sdata, image_key, low_res, layer, genes, grid, spots, total, kept)

    def measured(self, genes: list[str]) -> Measurement:
        """All spots with the counts of some genes."""
        return measurement_of(self.sdata, self.low_res, self.grid, genes, layer=self.layer)

    def most_variable(self) -> np.ndarray:
        """Counts of the genes whose composition varies most, in the spots to learn from, shape ``(n, K)``."""
        names, variance = _names(self.sdata, self.low_res), []
        for start in range(0, len(names), GUIDE_GENES):
            counts = self.measured(names[start : start + GUIDE_GENES]).counts[self.kept].astype(float)
            variance.append(composition(counts, self.total[self.kept]).var(0))
        order = np.argsort(-np.concatenate(variance), kind="stable")[:GUIDE_GENES]
        return self.measured([names[i] for i in order]).counts[self.kept].astype(float)

    def tissue(self) -> np.ndarray:
        """Which bins get a result: within a pitch of a spot; and what is tissue in the image, within three."""
        tissue = tissue_bins(self.sdata, self.grid, self.image_key, self.spots, None, None)
        if self.image_key is None:
            return tissue
        shown = tissue_of_image(self.sdata, self.grid, self.image_key, self._um_per_pixel())
        tree = cKDTree(self.spots.centers)
        for y in range(self.grid.height):
            x = np.flatnonzero(shown[y] & ~tissue[y])
            distance, _ = tree.query(
                np.column_stack([np.full(len(x), y + 0.5), x + 0.5]), distance_upper_bound=REACH * self.spots.pitch
            )
            tissue[y, x] = np.isfinite(distance)
        return tissue

    def features(self, *, progress: bool) -> np.ndarray | None:
        """Features of every bin, ``(D, height, width)``; None without an image."""
        if self.image_key is None:
            return None
        grid = self.grid
        px_per_bin = max(1, round(grid.bin_um / max(FINEST_PX_UM, self._um_per_pixel())))
        read = grid.image_window(self.sdata, self.image_key, px_per_bin=px_per_bin)
        return bin_features(read, grid.height, grid.width, bin_um=grid.bin_um, px_per_bin=px_per_bin, progress=progress)

    def image_record(self) -> dict[str, Any]:
        """How the values of the image are read, for the record of a result."""
        return {} if self.image_key is None else histology_of(self.sdata, self.image_key, mpp=1.0).record()

    def places(self, features: np.ndarray | None) -> Places:
        """Where the spots to learn from are, and the mean of the features over each."""
        spots, kept = self.spots, self.kept
        xy = spots.centers[kept][:, ::-1] / spots.pitch
        if features is None:
            return Places(xy)
        some = replace(spots, counts=spots.counts[kept], centers=spots.centers[kept], area=spots.area[kept])
        area = some.pool(np.ones((1, *features.shape[1:]), np.float32))
        pooled = [some.pool(part) for part in np.array_split(features, max(1, features.nbytes // int(1e8)))]
        return Places(xy, np.hstack(pooled) / np.maximum(area, 1e-6))

    def table(self, predicted: np.ndarray, scores: pd.DataFrame) -> AnnData:
        """A row per spot that was learned from, linked to it: what was predicted of it, ``(n, G)``, and what is known of genes."""
        table = AnnData(predicted, var=scores)
        if self.low_res in self.sdata.tables:
            source = self.sdata.tables[self.low_res]
            attrs = source.uns["spatialdata_attrs"]
            region, _ = annotated_region(self.sdata, source, self.low_res, None)
            table.obs = source.obs[[attrs["region_key"], attrs["instance_key"]]].iloc[self.kept].copy()
            table.obs[attrs["region_key"]] = pd.Categorical([region] * len(self.kept))
            table.uns["spatialdata_attrs"] = {**attrs, "region": region}
        table.obsm["bin_yx"] = self.spots.centers[self.kept]
        return table

    def _um_per_pixel(self) -> float:
        """µm per pixel of the image's finest level, by the grid's bins."""
        to_image = self.grid.to_element(self.sdata, self.image_key)
        return float(self.grid.bin_um / np.sqrt(abs(np.linalg.det(to_image[:2, :2]))))


def _names(sdata: SpatialData, low_res: str) -> list[str]:
    """The genes that were measured."""
    names = get_map(sdata, low_res).coords["c"].values if low_res in sdata.images else sdata.tables[low_res].var_names
    return [str(name) for name in names]


def _genes(known: list[str], low_res: str, genes: Sequence[str] | None) -> list[str]:
    """The genes to write: all that were measured by default."""
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


def _total(sdata: SpatialData, low_res: str, layer: str | None, grid: Grid) -> np.ndarray:
    """Counts of each spot over all genes."""
    if low_res in sdata.images:
        low = get_map(sdata, low_res)
        unknown = np.isnan(np.asarray(low.data))
        if (unknown.any(0) != unknown.all(0)).any():
            raise ValueError(
                f"in some bins of {low_res!r}, some genes are NaN and others are not; make them all NaN, or none."
            )
        return measurement_of(sdata, low_res, grid, _names(sdata, low_res)).counts.sum(1).astype(float)
    return np.asarray(get_counts(sdata.tables[low_res], layer=layer, dense=False).sum(1), float).ravel()


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
        pixel = apply_affine(grid.to_element(sdata, image_key), spots.centers[:, ::-1])
        inside &= histology_of(sdata, image_key, mpp=1.0).covers(pixel)
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
