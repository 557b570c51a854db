"""Scores of predicted expression, as pure functions over arrays.

All are signed and none rescales its input: predictions and truth must be on the **same, stated scale** (for example
``log1p(counts per 10,000)``), and a score holds for that scale only. Arrays are ``(n, G)``, locations by genes, unless
a function says otherwise; samples of a generative model are ``(S, n, G)``. Scores come per gene, so that the caller
decides how to average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.ndimage import gaussian_filter

__all__ = [
    "coverage",
    "crps",
    "gene_correlation",
    "gsc",
    "label_agreement",
    "mae",
    "morans_i",
    "morans_i_map",
    "mse",
    "noise_ceiling",
    "pcc",
    "rmse",
    "rvd",
    "ssc",
    "ssim",
    "ssim_map",
    "top_k",
]

LEAST_SAMPLES = 20
"""Samples that coverage and calibration need."""


def pcc(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson correlation across locations, per gene. A gene that is constant in either array scores 0.

    Parameters
    ----------
    pred, truth
        Shape ``(n, G)``, same scale.

    Returns
    -------
    Shape ``(G,)``, in [-1, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.metrics import pcc
    >>> pcc(np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), np.array([[6.0, 0.0], [4.0, 1.0], [2.0, 2.0]]))
    array([-1.,  0.])
    """
    pred, truth = _pair(pred, truth)
    pred, truth = pred - pred.mean(0), truth - truth.mean(0)
    norm = np.sqrt(np.square(pred).sum(0) * np.square(truth).sum(0))
    tiny = 1e-12 * len(pred)  # a constant in floating point is constant up to rounding
    return np.divide((pred * truth).sum(0), norm, out=np.zeros(pred.shape[1]), where=norm > tiny)


def top_k(scores: np.ndarray, k: int, *, ranking: np.ndarray | Sequence[int] | None = None) -> float:
    """Mean score of ``k`` genes: PCC-k of the literature.

    Parameters
    ----------
    scores
        Score per gene, shape ``(G,)``.
    k
        Number of genes; all of them if there are fewer.
    ranking
        Genes in order of preference, as indices, decided on training tissue. Without it the ``k`` *best* scores are
        averaged, as published ("oracle"): that choice is made on the test tissue and flatters every method, noise
        included.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.metrics import top_k
    >>> scores = np.array([0.1, 0.5, 0.3])
    >>> top_k(scores, 2), top_k(scores, 2, ranking=np.array([0, 2, 1]))
    (0.4, 0.2)
    """
    scores = np.asarray(scores)
    chosen = np.sort(scores)[::-1][:k] if ranking is None else scores[np.asarray(ranking)[:k]]
    return float(chosen.mean())


def mse(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error, per gene, in squared units of the scale; shape ``(G,)``."""
    pred, truth = _pair(pred, truth)
    return np.square(pred - truth).mean(0)


def rmse(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean squared error, per gene, in units of the scale; shape ``(G,)``."""
    return np.sqrt(mse(pred, truth))


def mae(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute error, per gene, in units of the scale; shape ``(G,)``."""
    pred, truth = _pair(pred, truth)
    return np.abs(pred - truth).mean(0)


def rvd(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Relative variance distance, per gene: ``((var_pred - var_truth) / var_truth) ** 2``. Stem, Section 5 (RVD).

    Variances are over locations. 0 is perfect, 1 is what a constant prediction scores. Averaging samples shrinks the
    variance, so report it for single samples as well as for their mean.

    Returns
    -------
    Shape ``(G,)``; NaN where the truth is constant, so that no gene blows up the mean unseen.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.metrics import rvd
    >>> truth = np.array([[0.0], [2.0]])
    >>> rvd(truth, truth), rvd(0 * truth, truth)
    (array([0.]), array([1.]))
    """
    pred, truth = _pair(pred, truth)
    var_pred, var_truth = pred.var(0), truth.var(0)
    varies = var_truth > 1e-24 * np.square(truth).mean(0)  # a constant in floating point is constant up to rounding
    return np.square(np.divide(var_pred - var_truth, var_truth, out=np.full(len(var_truth), np.nan), where=varies))


def gene_correlation(x: np.ndarray) -> np.ndarray:
    """Gene-gene Pearson correlation across locations, shape ``(G, G)``; 0 for genes that are constant."""
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(0)
    norm = np.sqrt(np.square(x).sum(0))
    x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-9 * np.sqrt(len(x)))
    return x.T @ x


def gsc(pred: np.ndarray, truth: np.ndarray) -> float:
    """Gene structure correlation: Pearson correlation of the two gene-gene correlation matrices (upper triangles).

    Parameters
    ----------
    pred
        A prediction ``(n, G)``, or samples ``(S, n, G)``: the matrix of each sample is taken, then their mean. The
        matrix of a mean of samples would be another thing: averaging adds co-expression that no sample has.
    truth
        Shape ``(n, G)``. Its matrix carries the counting noise of ``n`` locations, so that even a replicate of the
        tissue does not score 1.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.metrics import gsc
    >>> truth = np.random.default_rng(0).normal(size=(50, 6))
    >>> round(gsc(truth * 3 + 1, truth), 6)
    1.0
    """
    samples, truth = _samples(np.reshape(pred, (-1, *np.shape(pred)[-2:])), truth)
    upper = np.triu_indices(truth.shape[1], 1)
    mean = np.mean([gene_correlation(x)[upper] for x in samples], 0)
    return float(pcc(mean[:, None], gene_correlation(truth)[upper][:, None])[0])


def morans_i(x: np.ndarray, weights: sp.spmatrix | np.ndarray) -> np.ndarray:
    """Moran's I, per gene: how alike neighbors are.

    Parameters
    ----------
    x
        Shape ``(n, G)``.
    weights
        Spatial weights, shape ``(n, n)``, for example ``adata.obsp["spatial_connectivities"]`` of squidpy.

    Returns
    -------
    Shape ``(G,)``; 0 for constant genes.
    """
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(0)
    weights = sp.csr_matrix(weights)
    power = np.square(x).sum(0)
    cross = (x * (weights @ x)).sum(0)
    return np.divide(len(x) / weights.sum() * cross, power, out=np.zeros(x.shape[1]), where=power > 1e-12 * len(x))


def morans_i_map(values: np.ndarray) -> float:
    """Moran's I of one map, where the neighbors of a bin are the four that share a side with it.

    Parameters
    ----------
    values
        Shape ``(H, W)``; NaN bins, and pairs with them, are left out.

    Returns
    -------
    What :func:`morans_i` gives with these neighbors; 0 for a constant map.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.metrics import morans_i_map
    >>> morans_i_map(np.indices((4, 4)).sum(0) % 2)  # a checkerboard
    -1.0
    """
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    n = known.sum()
    x = np.where(known, values - values[known].mean(), 0) if n else values
    pairs = (known[1:] & known[:-1]).sum() + (known[:, 1:] & known[:, :-1]).sum()
    power = np.square(x).sum()
    if pairs == 0 or power <= 1e-12 * n:
        return 0.0
    cross = (x[1:] * x[:-1]).sum() + (x[:, 1:] * x[:, :-1]).sum()
    return float(n / pairs * cross / power)


def ssc(pred: np.ndarray, truth: np.ndarray, weights: sp.spmatrix | np.ndarray) -> float:
    """Spatial structure correlation: Pearson correlation, over genes, of Moran's I of prediction and of truth.

    Parameters
    ----------
    pred
        A prediction ``(n, G)``, or samples ``(S, n, G)``, whose Moran's I are averaged.
    truth
        Shape ``(n, G)``.
    weights
        Spatial weights, see :func:`morans_i`.
    """
    samples, truth = _samples(np.reshape(pred, (-1, *np.shape(pred)[-2:])), truth)
    mean = np.mean([morans_i(x, weights) for x in samples], 0)
    return float(pcc(mean[:, None], morans_i(truth, weights)[:, None])[0])


def coverage(samples: np.ndarray, truth: np.ndarray, level: float = 0.9) -> np.ndarray:
    """Share of locations whose truth lies in the central interval of the samples, per gene.

    Fewer than 20 samples do not show where an interval ends, and no number of them shows one that is wider than all of
    them, above ``(S - 1) / (S + 1)``: the coverage is NaN.

    Parameters
    ----------
    samples
        Shape ``(S, n, G)``.
    truth
        Shape ``(n, G)``.
    level
        Nominal coverage. Independent samples of a calibrated model score this number; samples from centered noise score
        a little more (.916 instead of .9 for 20 samples of a Gaussian model).

    Returns
    -------
    Shape ``(G,)``, in [0, 1], or NaN.
    """
    samples, truth = _samples(samples, truth)
    if len(samples) < LEAST_SAMPLES or level > (len(samples) - 1) / (len(samples) + 1) + 1e-9:
        return np.full(samples.shape[2], np.nan)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return ((low <= truth) & (truth <= high)).mean(0)


def crps(samples: np.ndarray, truth: np.ndarray, *, centered: bool = False) -> np.ndarray:
    """Continuous ranked probability score, per gene, in units of the scale (lower is better; the MAE of one sample).

    The fair estimator, ``mean |x - y| - mean |x - x'| / 2`` over distinct pairs of samples.

    Parameters
    ----------
    samples
        Shape ``(S, n, G)``.
    truth
        Shape ``(n, G)``.
    centered
        Whether the samples come from centered noise (:func:`stgen.diffusion.centered_noise`). Pairs of them lie further
        apart than independent ones, by ``sqrt(S / (S - 1))`` in a Gaussian model, which is then taken out.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.metrics import crps
    >>> crps(np.array([[[1.0]], [[3.0]]]), np.array([[2.0]]))
    array([0.])
    """
    samples, truth = _samples(samples, truth)
    n = len(samples)
    error = np.abs(samples - truth).mean(0)
    if n == 1:
        return error.mean(0)
    ranks = 2 * np.arange(1, n + 1) - n - 1
    spread = np.einsum("s,sng->ng", ranks, np.sort(samples, 0)) * 2 / (n * (n - 1))
    if centered:
        spread = spread * np.sqrt((n - 1) / n)
    return (error - spread / 2).mean(0)


def noise_ceiling(half_a: np.ndarray, half_b: np.ndarray) -> np.ndarray:
    """Best correlation that any prediction of ``half_b`` can reach, per gene; shape ``(G,)``.

    Two halves of the same molecules, split at random, correlate only as far as counting noise allows. A prediction that
    knew the true rate would correlate with either by the square root of that.
    """
    return np.sqrt(np.maximum(pcc(half_a, half_b), 0))


def ssim(pred: np.ndarray, truth: np.ndarray, data_range: float) -> float:
    """Structural similarity of one map with the truth (Gaussian window of sigma 1.5, 11 bins wide).

    Parameters
    ----------
    pred, truth
        Shape ``(H, W)``, same scale. Bins that are NaN in either are unknown: they are not scored and have no weight in
        the windows of their neighbors.
    data_range
        Range of the values, **fixed on training tissue**: scaling each map by its own range rewards empty maps.

    Returns
    -------
    Mean over the known bins whose window lies on the map, at most 1; NaN if there is none. Without NaN that is the
    value of :func:`skimage.metrics.structural_similarity` with ``gaussian_weights=True, use_sample_covariance=False``.
    """
    similarity = ssim_map(pred, truth, data_range)
    scored = np.isfinite(similarity)
    return float(similarity[scored].mean()) if scored.any() else float("nan")


def ssim_map(pred: np.ndarray, truth: np.ndarray, data_range: float) -> np.ndarray:
    """Structural similarity of one map with the truth around each bin; parameters as for :func:`ssim`.

    Returns
    -------
    Shape ``(H, W)``, at most 1. NaN where either map is, and within 5 bins of the border, where the window does not lie
    on the map.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.metrics import ssim_map
    >>> truth = np.random.default_rng(0).random((12, 12))
    >>> similarity = ssim_map(truth, truth, 1.0)
    >>> int(np.isfinite(similarity).sum()), round(float(np.nanmin(similarity)), 6)
    (4, 1.0)
    """
    pred, truth = np.asarray(pred, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if pred.shape != truth.shape or pred.ndim != 2:
        raise ValueError(f"prediction and truth must both be (height, width), found {pred.shape} and {truth.shape}.")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, found {data_range!r}.")
    known = np.isfinite(pred) & np.isfinite(truth)
    weight = np.where(known, gaussian_filter(known.astype(np.float64), 1.5, truncate=3.5), np.nan)
    weight[:5] = weight[-5:] = weight[:, :5] = weight[:, -5:] = np.nan

    def local_mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5) / weight

    p, t = np.where(known, pred, 0), np.where(known, truth, 0)
    mean_p, mean_t = local_mean(p), local_mean(t)
    var_p, var_t = local_mean(p * p) - mean_p**2, local_mean(t * t) - mean_t**2
    covariance = local_mean(p * t) - mean_p * mean_t
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_p * mean_t + c1) * (2 * covariance + c2)
    return similarity / ((mean_p**2 + mean_t**2 + c1) * (var_p + var_t + c2))


def label_agreement(pred: np.ndarray, truth: np.ndarray) -> dict[str, float | dict[str, float]]:
    """How well labels, such as cell types, agree with known ones.

    Locations whose true label is missing (None or NaN) are left out; those whose predicted label is missing count as
    wrong.

    Parameters
    ----------
    pred, truth
        Labels of the same locations, any array of shape ``(n,)``.

    Returns
    -------
    - ``"accuracy"``: share of the locations whose labels are the same, in [0, 1]
    - ``"ARI"``: adjusted Rand index, at most 1, 0 for labels at random; names of groups do not matter
    - ``"NMI"``: normalized mutual information (arithmetic mean), in [0, 1]; names do not matter
    - ``"F1"``: F1 score of each type that occurs in the truth, in [0, 1]

    Raises
    ------
    ValueError
        If the arrays differ in length, or no true label is known.

    Examples
    --------
    >>> from stgen.metrics import label_agreement
    >>> scores = label_agreement(["T", "B", None, "B"], ["T", "B", "B", None])
    >>> round(scores["accuracy"], 3), scores["F1"]
    (0.667, {'B': 0.6666666666666666, 'T': 1.0})
    """
    from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score

    pred, truth = np.asarray(pred, dtype=object), np.asarray(truth, dtype=object)
    if pred.shape != truth.shape or pred.ndim != 1:
        raise ValueError(f"labels must be two arrays of one length, found the shapes {pred.shape} and {truth.shape}.")
    known = ~pd.isna(truth)
    if not known.any():
        raise ValueError("no true label is known; there is nothing to compare with.")
    pred = np.where(pd.isna(pred), "", pred.astype(str))[known].astype(str)  # a missing one is a label of its own
    truth = truth[known].astype(str)
    types = np.unique(truth)
    f1 = f1_score(truth, pred, labels=types, average=None, zero_division=0)
    return {
        "accuracy": float((pred == truth).mean()),
        "ARI": float(adjusted_rand_score(truth, pred)),
        "NMI": float(normalized_mutual_info_score(truth, pred)),
        "F1": dict(zip(types.tolist(), f1.tolist(), strict=True)),
    }


def _pair(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays in float64, once their shapes are known to agree."""
    pred, truth = np.asarray(pred, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if pred.shape != truth.shape or pred.ndim != 2:
        raise ValueError(f"prediction and truth must both be (locations, genes), found {pred.shape} and {truth.shape}.")
    if not (np.isfinite(pred).all() and np.isfinite(truth).all()):
        raise ValueError("prediction and truth must be finite; leave out genes that were not predicted.")
    return pred, truth


def _samples(samples: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples and truth in float64, once their shapes are known to agree."""
    samples, truth = np.asarray(samples, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if samples.ndim != 3 or samples.shape[1:] != truth.shape:
        raise ValueError(
            f"samples must be (samples, locations, genes) over the truth's {truth.shape}, found {samples.shape}."
        )
    return samples, truth
