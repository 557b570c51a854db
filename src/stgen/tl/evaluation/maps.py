"""Score maps of counts against a map of counts, bin by bin and one gene after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from spatialdata import SpatialData
from xarray import DataArray

from stgen import metrics
from stgen._spatial.grid import Grid, get_map, map_counts_checked
from stgen._spatial.map_inputs import MapElements
from stgen._spatial.records import recorded_layer
from stgen.measurement import Measurement
from stgen.tl.evaluation.scores import Scores, gene_scores, ranks_of, summarize, warn_of_few_samples
from stgen.transforms import TransformName, transform_counts, unit

__all__ = ["MapPair", "MapScale", "check_same_grid", "evaluate_maps", "map_correlation"]

logger = logging.getLogger("stgen")

WINDOW_VALUES = 2**24  # values of all genes that are in memory at a time (128 MiB in float64)
MIN_WINDOW = 64  # bins


def evaluate_maps(
    sdata: SpatialData,
    key: str,
    *,
    truth_key: str,
    low_res: str | None = None,
    replicate_key: str | None = None,
    transform: TransformName = "log1p_raw",
    gene_scale: Mapping[str, float] | pd.Series | None = None,
    ranking: Sequence[str] | None = None,
) -> Scores:
    """:func:`stgen.tl.evaluate` where the prediction is an image of the object."""
    maps = MapPair.find(sdata, key, truth_key, replicate_key)
    scale = MapScale.checked(transform, gene_scale, maps.genes)
    measurement = None
    if low_res is not None:
        layer = recorded_layer(sdata, [key], low_res)
        elements = MapElements.find(sdata, low_res=low_res, layer=layer, map_key=key)
        measurement = elements.measurement(Grid.of_map(sdata, key), maps.genes)

    if maps.n_samples:
        warn_of_few_samples(maps.n_samples)
    rows, moran = {}, {}
    known_of_all, n_constant = np.ones(get_map(sdata, key).shape[1:], bool), 0
    for gene in maps.genes:
        pred, truth, samples = maps.read(gene, scale)
        known = np.isfinite(pred) & np.isfinite(truth)
        if not known.any():
            logger.warning("%s has no bin that is known both in %r and in %r: left out.", gene, key, truth_key)
            continue
        known_of_all = known_of_all & known
        pred, truth = np.where(known, pred, np.nan), np.where(known, truth, np.nan)
        drawn = [pred] if samples is None else [np.where(known, sample, np.nan) for sample in samples]
        data_range = 1.0 if scale.by_gene else np.nanmax(truth)
        rows[gene] = _scores_of(gene, pred, truth, None if samples is None else drawn, known, data_range)
        moran[gene] = np.mean([metrics.morans_i_map(x) for x in drawn]), metrics.morans_i_map(truth)
        rows[gene]["Moran_difference"] = float(moran[gene][0] - moran[gene][1])
        n_constant += np.ptp(pred[known]) == 0
        if replicate_key is not None:
            replicate = scale(maps.counts(replicate_key, [gene])[0], gene)
            rows[gene] |= _ceiling(rows[gene]["PCC"], truth, replicate, data_range)
    if not rows:
        raise ValueError(
            f"no gene has a bin that is known both in {key!r} and in {truth_key!r}; there is nothing to score."
        )
    genes = list(rows)
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("gene")
    if measurement is not None:
        frame = frame.join(_residuals(maps, measurement))

    position = {gene: i for i, gene in enumerate(genes)}
    order = None if ranking is None else ranks_of(ranking, position)
    summary = summarize(frame, ranking=order)
    summary |= _structure(maps, genes, known_of_all, scale)
    summary["SSC"] = _pcc(*np.array(list(moran.values())).T)
    summary["constant_predictions"] = int(n_constant)
    if measurement is not None:
        summary["residual_max"] = frame["residual_max"].max()
    return Scores(frame, pd.Series(summary, name="score"))


def check_same_grid(sdata: SpatialData, key: str, other_key: str) -> None:
    """Refuse two maps whose bins are not the same ones.

    Raises
    ------
    ValueError
        If they differ in size or place, or share no coordinate system.
    """
    size, other_size = (tuple(get_map(sdata, name).shape[1:]) for name in (key, other_key))
    hint = (
        "Make both on one grid: stgen.tl.superresolve(..., like=<the other map>), or stgen.pp.rasterize(..., "
        "bin_um=..., bounds_um=...) with the same bins and bounds."
    )
    if size != other_size:
        raise ValueError(
            f"{key!r} and {other_key!r} are not on the same grid: {size[0]} x {size[1]} and {other_size[0]} x "
            f"{other_size[1]} bins (height x width). {hint}"
        )
    matrix = Grid.of_map(sdata, key).to_element(sdata, other_key)
    corners = np.array([[x, y, 1] for x in (0, size[1]) for y in (0, size[0])])
    apart = np.abs(corners @ (matrix - np.eye(3)).T).max()
    if apart > 1e-3:
        raise ValueError(
            f"{key!r} and {other_key!r} are not on the same grid: their corners are up to {apart:.4g} bins apart. "
            f"{hint}"
        )


# ---- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapScale:
    """From counts to the scale on which they are scored."""

    transform: TransformName
    by_gene: dict[str, float] | None

    @classmethod
    def checked(
        cls, transform: TransformName, by_gene: Mapping[str, float] | pd.Series | None, genes: list[str]
    ) -> MapScale:
        """The scale, once it is known that it can be."""
        unit(transform)
        if transform == "log1p_norm":
            raise ValueError(
                "transform='log1p_norm' needs the total counts of each bin, which a map of some genes does not hold; "
                "choose 'log1p_raw', 'log2p1_raw' or 'none'."
            )
        if by_gene is None:
            return cls(transform, None)
        missing = [gene for gene in genes if gene not in by_gene]
        if missing:
            raise KeyError(
                f"`gene_scale` has no entry for {len(missing)} of {len(genes)} genes: {', '.join(missing[:5])}."
            )
        by_gene = {gene: float(by_gene[gene]) for gene in genes}
        bad = [gene for gene, value in by_gene.items() if not (np.isfinite(value) and value > 0)]
        if bad:
            raise ValueError(f"`gene_scale` must be positive numbers; found {by_gene[bad[0]]:g} for {bad[0]}.")
        return cls(transform, by_gene)

    def __call__(self, counts: np.ndarray, gene: str) -> np.ndarray:
        """Counts of a gene, of any shape, in float64."""
        values = transform_counts(counts, np.ones(1), self.transform).astype(np.float64)
        return values if self.by_gene is None else values / self.by_gene[gene]


@dataclass(frozen=True)
class MapPair:
    """The maps to compare, on one grid; a channel is computed when it is asked for."""

    sdata: SpatialData
    key: str
    truth_key: str
    genes: list[str]
    n_samples: int
    """Samples that were kept; 0 for none."""

    @classmethod
    def find(cls, sdata: SpatialData, key: str, truth_key: str, replicate_key: str | None) -> MapPair:
        """The maps, once it is known that they are on one grid, and the genes that all of them have."""
        keys = [name for name in (key, truth_key, replicate_key) if name is not None]
        channels = {name: _channels(sdata, name) for name in keys}
        for other in keys[1:]:
            check_same_grid(sdata, key, other)
        genes = [gene for gene in channels[key] if all(gene in channels[other] for other in keys)]
        if not genes:
            listed = "; ".join(f"{name!r}: {', '.join(channels[name][:5])}" for name in keys)
            raise ValueError(f"the maps have no gene in common ({listed}).")
        n_samples = 0
        if f"{key}_samples" in sdata.images:
            n_samples = sum(name.rpartition(":")[0] == genes[0] for name in _channels(sdata, f"{key}_samples"))
            get_map(sdata, f"{key}_samples", [f"{gene}:{i}" for gene in genes for i in range(n_samples)])
            check_same_grid(sdata, key, f"{key}_samples")
        return cls(sdata, key, truth_key, genes, n_samples)

    def counts(self, key: str, channels: list[str]) -> np.ndarray:
        """Counts of some channels, ``(n, H, W)``, NaN where they are unknown."""
        return map_counts_checked(get_map(self.sdata, key, channels).data, f"The map {key!r} ({channels[0]})")

    def read(self, gene: str, scale: MapScale) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Prediction and truth of a gene ``(H, W)`` on the scale, and the samples ``(S, H, W)``, where there are any."""
        pred, truth = (scale(self.counts(key, [gene])[0], gene) for key in (self.key, self.truth_key))
        if self.n_samples == 0:
            return pred, truth, None
        samples = self.counts(f"{self.key}_samples", [f"{gene}:{i}" for i in range(self.n_samples)])
        return pred, truth, scale(samples, gene)

    def single(self, genes: list[str]) -> Iterator[DataArray]:
        """Every sample as a map ``(G, H, W)``, or the prediction where there are none."""
        if self.n_samples == 0:
            yield get_map(self.sdata, self.key, genes)
        for i in range(self.n_samples):
            yield get_map(self.sdata, f"{self.key}_samples", [f"{gene}:{i}" for gene in genes])


def _channels(sdata: SpatialData, key: str) -> list[str]:
    return [str(name) for name in get_map(sdata, key).coords["c"].values]


# ---- scores ----------------------------------------------------------------------------------------------------------


def _scores_of(
    gene: str,
    pred: np.ndarray,
    truth: np.ndarray,
    samples: list[np.ndarray] | None,
    known: np.ndarray,
    data_range: float,
) -> dict[str, float]:
    """The scores of one gene: those of locations, over the known bins, and SSIM of the map and of single samples."""
    of_bins = None if samples is None else np.stack([sample[known] for sample in samples])[:, :, None]
    scores = gene_scores(pred[known][:, None], truth[known][:, None], [gene], samples=of_bins).iloc[0].to_dict()
    scores["SSIM"] = _ssim(pred, truth, data_range)
    if samples is not None:
        scores["SSIM_sample"] = float(np.mean([_ssim(sample, truth, data_range) for sample in samples]))
    return scores


def _ssim(pred: np.ndarray, truth: np.ndarray, data_range: float) -> float:
    return metrics.ssim(pred, truth, data_range) if data_range > 0 else np.nan


def _ceiling(pcc: float, truth: np.ndarray, replicate: np.ndarray, data_range: float) -> dict[str, float]:
    """What a perfect prediction would score, the share of it that was reached, and the SSIM of a perfect sample."""
    both = np.isfinite(truth) & np.isfinite(replicate)
    ceiling = float(metrics.noise_ceiling(truth[both][:, None], replicate[both][:, None])[0]) if both.any() else 0.0
    return {
        "ceiling": ceiling,
        "PCC/ceiling": pcc / ceiling if ceiling > 0 else np.nan,
        "SSIM_replicate": _ssim(np.where(both, replicate, np.nan), np.where(both, truth, np.nan), data_range),
    }


def _structure(maps: MapPair, genes: list[str], known: np.ndarray, scale: MapScale) -> dict[str, float]:
    """GSC over the bins where every gene is known, as in :func:`stgen.metrics.gsc`, from matrices gathered by windows."""
    if known.sum() < 2 or len(genes) < 3:
        return {"GSC": np.nan}
    upper = np.triu_indices(len(genes), 1)
    truth = map_correlation(get_map(maps.sdata, maps.truth_key, genes), genes, known, scale)[upper]
    single = [map_correlation(stack, genes, known, scale)[upper] for stack in maps.single(genes)]
    out = {"GSC": _pcc(np.mean(single, 0), truth)}
    if maps.n_samples:
        out["GSC_sample"] = float(np.mean([_pcc(x, truth) for x in single]))
    return out


def map_correlation(stack: DataArray, genes: list[str], known: np.ndarray, scale: MapScale) -> np.ndarray:
    """Gene-gene correlation ``(G, G)`` of a map over its known bins; 0 for genes that are constant."""
    side = max(MIN_WINDOW, int(np.sqrt(WINDOW_VALUES / len(genes))))
    n, total, product, origin = 0, 0.0, 0.0, None
    for y in range(0, known.shape[0], side):
        for x in range(0, known.shape[1], side):
            window = known[y : y + side, x : x + side]
            if not window.any():
                continue
            counts = np.asarray(stack[:, y : y + side, x : x + side].data)[:, window]
            values = np.stack([scale(row, gene) for row, gene in zip(counts, genes, strict=True)])
            origin = values[:, :1] if origin is None else origin  # near the mean, for the sake of precision
            values = values - origin
            n, total, product = n + values.shape[1], total + values.sum(1), product + values @ values.T
    covariance = product / n - np.outer(total / n, total / n)
    spread = np.sqrt(np.maximum(np.diag(covariance), 0))
    norm = np.outer(spread, spread)
    return np.divide(covariance, norm, out=np.zeros_like(norm), where=(spread > 1e-9)[:, None] & (spread > 1e-9))


def _residuals(maps: MapPair, measurement: Measurement) -> pd.DataFrame:
    """How far the predicted counts of each footprint are from its measured ones, relative to these (at least 1)."""
    largest, mean, footprints = [], [], measurement.footprints
    for start in range(0, len(maps.genes), 16):
        counts = maps.counts(maps.key, maps.genes[start : start + 16])
        known = footprints.pool(np.isfinite(counts).astype(np.float32))
        complete = footprints.pool(np.ones((1, *counts.shape[1:]))) >= 0.98 * footprints.area[:, None]
        measured = measurement.counts[:, start : start + 16]
        if footprints.shape == "square":  # measured in part: its density holds for all that is predicted
            measured = measured * np.maximum(known / np.maximum(footprints.area, 1e-6)[:, None], 1)
        residual = np.abs(footprints.pool(counts) - measured) / np.maximum(measured, 1)
        residual = np.where(
            (known > 0) & complete, residual, np.nan
        )  # footprints that reach beyond the map cannot agree
        largest += _over_footprints(np.max, residual)
        mean += _over_footprints(np.mean, residual)
    return pd.DataFrame({"residual_mean": mean, "residual_max": largest}, index=pd.Index(maps.genes, name="gene"))


def _over_footprints(statistic: Callable, residual: np.ndarray) -> list[float]:
    """A statistic of each gene over the footprints that count."""
    return [float(statistic(r[np.isfinite(r)])) if np.isfinite(r).any() else np.nan for r in residual.T]


def _pcc(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two vectors; NaN where fewer than three values say nothing."""
    return float(metrics.pcc(a[:, None], b[:, None])[0]) if len(a) > 2 else np.nan
