"""Scores of several models side by side, every gene a point."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from stgen._checks import check_types
from stgen.tl import Scores

__all__ = ["scores"]

MEANING = {
    "PCC": "Pearson correlation per gene (PCC)",
    "RVD": "relative variance distance per gene (RVD)",
    "RVD_sample": "relative variance distance per gene, single samples (RVD)",
    "CRPS": "continuous ranked probability score per gene (CRPS)",
    "SSIM": "structural similarity per gene (SSIM)",
    "SSIM_sample": "structural similarity per gene, single samples (SSIM)",
    "PCC/ceiling": "correlation per gene, as a share of the noise ceiling (PCC/ceiling)",
    "Moran_difference": "Moran's I per gene, predicted minus true",
    "residual_mean": "mean relative residual of the measurement, per gene",
    "residual_max": "largest relative residual of the measurement, per gene",
}
HIGHER_IS_BETTER = ("PCC", "PCC/ceiling", "SSIM", "SSIM_sample")


@partial(check_types, leave=("scores",))
def scores(
    scores: Scores | Mapping[str, Scores] | pd.DataFrame,
    *,
    metric: str = "PCC",
    color: str = "C0",
    ax: Axes | None = None,
) -> Axes:
    """Draw the scores of all genes for each model, the best model on top.

    Every gene is a point, the box holds the middle half of them, and the number is their average.

    Parameters
    ----------
    scores
        Names of the models and what :func:`stgen.tl.evaluate` returned for each, or what it returned for a single one;
        or a table with one column per model and one row per gene, which holds the metric.
    metric
        Column of ``Scores.genes``, such as ``"PCC"``, ``"RMSE"``, ``"RVD"`` or ``"coverage_90%"``. Higher is better
        for PCC, PCC/ceiling and SSIM, closer to the dashed line for coverage and the difference of Moran's I, and
        lower for everything else.
    color
        Color of the points.
    ax
        Axes to draw into; by default a new figure.

    Returns
    -------
    The Axes. Its y tick labels are the models, the best first.

    Raises
    ------
    KeyError
        If a model does not have the metric.
    ValueError
        If there is nothing to draw.
    TypeError
        If ``scores`` is neither of the two.

    Examples
    --------
    >>> import pandas as pd
    >>> from stgen import pl
    >>> ax = pl.scores(pd.DataFrame({"mean": [0.0, 0.0], "probe": [0.4, 0.6]}, index=["EPCAM", "CD3E"]))
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['probe', 'mean']
    """
    columns = _columns(scores, metric)
    nominal = _nominal(metric)
    columns = dict(sorted(columns.items(), key=lambda item: _rank(item[1], metric, nominal)))
    if ax is None:
        ax = plt.subplots(figsize=(5.5, 0.9 + 0.45 * len(columns)), layout="constrained")[1]
    reference = {"PCC": 0.0, "PCC/ceiling": 1.0}.get(metric, nominal)
    if reference is not None:
        ax.axvline(reference, color="0.4", lw=1, ls="--", zorder=0)
    for row, values in enumerate(columns.values()):
        jitter = np.random.default_rng(row).uniform(-0.28, 0.28, len(values))
        ax.scatter(values, row + jitter, s=9, color=color, alpha=0.45, linewidths=0, zorder=1)
        _box(ax, row, values)
    for row, values in enumerate(columns.values()):
        ax.annotate(
            f"{values.mean():.3f}", (1, row), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize="small",
        )  # fmt: skip
    ax.annotate(
        "average", (1, 1), xycoords="axes fraction", xytext=(6, 2), textcoords="offset points", va="bottom",
        fontsize="small",
    )  # fmt: skip
    ax.use_sticky_edges = False  # room beside boxes that touch the limit
    ax.set_yticks(range(len(columns)), list(columns))
    ax.set_ylim(len(columns) - 0.5, -0.5)
    ax.set_xlabel(_label(metric))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _box(ax: Axes, row: int, values: np.ndarray) -> None:
    """A horizontal box from quartile to quartile, whiskers to the last points within 1.5 times its length."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    inside = values[(values >= low - 1.5 * (high - low)) & (values <= high + 1.5 * (high - low))]
    ax.barh(row, high - low, left=low, height=0.56, facecolor="none", edgecolor="0.15", zorder=2)
    ax.hlines([row, row], [inside.min(), high], [low, inside.max()], color="0.15", lw=1, zorder=2)
    ax.vlines(middle, row - 0.28, row + 0.28, color="black", lw=2.5, zorder=3)


def _columns(scores: Scores | Mapping[str, Scores] | pd.DataFrame, metric: str) -> dict[str, np.ndarray]:
    """The metric of all genes, model by model, NaN left out."""
    if isinstance(scores, Scores):
        scores = {"prediction": scores}
    if isinstance(scores, pd.DataFrame):
        columns = {str(name): scores[name] for name in scores}
    elif isinstance(scores, Mapping) and all(isinstance(value, Scores) for value in scores.values()):
        for name, value in scores.items():
            if metric not in value.genes:
                raise KeyError(f"the scores of {name!r} have no {metric!r}; they have {', '.join(value.genes)}.")
        columns = {name: value.genes[metric] for name, value in scores.items()}
    else:
        raise TypeError(
            f"`scores` must be a result of tl.evaluate, map names to such results, or be a DataFrame (genes, models); "
            f"found {type(scores).__name__}."
        )
    columns = {name: values.dropna().to_numpy(float) for name, values in columns.items()}
    empty = [name for name, values in columns.items() if len(values) == 0]
    if empty or not columns:
        raise ValueError(f"no gene has a score to draw{' for ' + ', '.join(empty) if empty else ''}.")
    return columns


def _nominal(metric: str) -> float | None:
    """The value to come close to, of metrics that have one."""
    if metric.startswith("coverage_"):
        return float(metric.removeprefix("coverage_").rstrip("%")) / 100
    return 0.0 if metric == "Moran_difference" else None


def _rank(values: np.ndarray, metric: str, nominal: float | None) -> float:
    """Smaller is better."""
    if nominal is not None:
        return abs(values.mean() - nominal)
    return -values.mean() if metric in HIGHER_IS_BETTER else values.mean()


def _label(metric: str) -> str:
    if metric.startswith("coverage_"):
        return f"share of locations inside the {metric.removeprefix('coverage_').rstrip('%')}% interval, per gene"
    return MEANING.get(
        metric, f"{metric} per gene, in units of expression" if metric in ("RMSE", "MAE") else f"{metric} per gene"
    )
