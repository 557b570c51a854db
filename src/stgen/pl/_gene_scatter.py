"""Two methods against each other, every gene a point."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stgen._checks import check_types, check_whole
from stgen.pl._colors import BLUE, ORANGE
from stgen.pl._scores import HIGHER_IS_BETTER, _nominal
from stgen.tl import Scores

__all__ = ["gene_scatter"]


@partial(check_types, leave=("scores",))
def gene_scatter(
    scores: Mapping[str, Scores] | pd.DataFrame,
    *,
    metric: str = "SSIM",
    n_names: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Draw the scores of two methods against each other, every gene a point. HaDM-ST, Figure 3.

    Genes that the second method predicts better are dots, those that the first one does are triangles; on the line both
    are equal.

    Parameters
    ----------
    scores
        Names of two methods and what :func:`stgen.tl.evaluate` returned for each; or a table with one column for each
        and one row per gene, which holds the metric. The first is x, the second y.
    metric
        Column of ``Scores.genes``. Higher is better for PCC, PCC/ceiling and SSIM, closer to nominal for coverage and
        the difference of Moran's I, and lower for everything else.
    n_names
        Number of genes to name: those on which the methods differ most, as far as names do not lie on each other.
    ax
        Axes to draw into; by default a new figure.

    Returns
    -------
    The Axes. Its collections are the genes that the second method predicts better, and the others. The title counts the
    former; genes that either method has no score for are left out.

    Raises
    ------
    KeyError
        If a method does not have the metric.
    ValueError
        If there are not two methods, or they have no gene in common.
    TypeError
        If ``scores`` is neither of the two.

    Examples
    --------
    >>> import pandas as pd
    >>> from stgen import pl
    >>> ax = pl.gene_scatter(pd.DataFrame({"bicubic": [0.2, 0.4], "DiffST": [0.5, 0.3]}, index=["EPCAM", "CD3E"]))
    >>> ax.get_title(), ax.get_xlim() == ax.get_ylim()
    ('DiffST better for 1 of 2 genes', True)
    """
    check_whole("n_names", n_names, least=0)
    frame = _frame(scores, metric)
    x_name, y_name = map(str, frame.columns)
    values = frame.to_numpy(float)
    cost = _cost(values, metric)
    better = cost[:, 1] < cost[:, 0]

    if ax is None:
        ax = plt.subplots(figsize=(4, 4), layout="constrained")[1]
    for chosen, color, marker, name in ((better, BLUE, "o", y_name), (~better, ORANGE, "^", x_name)):
        x, y = values[chosen].T
        ax.scatter(
            x, y, s=22, color=color, marker=marker, alpha=0.75, linewidths=0, zorder=2,
            label=f"{name} better" if name == y_name else f"{name} better or equal",
        )  # fmt: skip
    low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or 0.05
    limits = low - margin, high + margin
    ax.plot(limits, limits, color="0.4", lw=1, ls="--", zorder=1)
    ax.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"{metric}, {x_name}", ylabel=f"{metric}, {y_name}")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    for i in _apart(values, np.argsort(-np.abs(values[:, 1] - values[:, 0]), kind="stable"), n_names, high - low):
        left = values[i, 0] > (low + high) / 2  # names point to the middle
        ax.annotate(
            frame.index[i], values[i], xytext=(-5 if left else 5, 0), textcoords="offset points", fontsize="small",
            fontstyle="italic", ha="right" if left else "left", va="center", zorder=3,
        )  # fmt: skip
    ax.set_title(f"{y_name} better for {better.sum()} of {len(values)} genes", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _frame(scores: Mapping[str, Scores] | pd.DataFrame, metric: str) -> pd.DataFrame:
    """The metric ``(genes, 2)`` of the genes that have it for both methods."""
    if isinstance(scores, pd.DataFrame):
        frame = scores
    elif isinstance(scores, Mapping) and all(isinstance(value, Scores) for value in scores.values()):
        for name, value in scores.items():
            if metric not in value.genes:
                raise KeyError(f"the scores of {name!r} have no {metric!r}; they have {', '.join(value.genes)}.")
        frame = pd.DataFrame({name: value.genes[metric] for name, value in scores.items()})
    else:
        raise TypeError(
            "`scores` must map two names to results of tl.evaluate, or be a DataFrame (genes, 2 methods); found "
            f"{type(scores).__name__}."
        )
    if frame.shape[1] != 2:
        raise ValueError(
            f"two methods are compared, found {frame.shape[1]} ({', '.join(map(str, frame.columns))}); draw pair by "
            "pair, or all of them with pl.scores."
        )
    frame = frame.dropna()
    if frame.empty:
        raise ValueError(f"no gene has {metric} for both methods.")
    return frame


def _cost(values: np.ndarray, metric: str) -> np.ndarray:
    """Smaller is better."""
    nominal = _nominal(metric)
    if nominal is not None:
        return np.abs(values - nominal)
    return -values if metric in HIGHER_IS_BETTER else values


def _apart(values: np.ndarray, order: np.ndarray, n: int, size: float) -> list[int]:
    """The first ``n`` points in an order whose names do not lie on each other."""
    named: list[int] = []
    for i in order:
        if len(named) == n:
            break
        distance = np.abs(values[named] - values[i]) / max(size, 1e-12)
        if not ((distance[:, 0] < 0.3) & (distance[:, 1] < 0.05)).any():
            named.append(i)
    return named
