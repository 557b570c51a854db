"""Gene-gene correlation of prediction and truth, in one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from stgen._checks import check_types
from stgen.pl._colors import check_cmaps
from stgen.tl import GeneCorrelation

__all__ = ["gene_correlation"]

MOST_NAMES = 40  # genes that are written at the sides


@partial(check_types, leave=("correlation",))
def gene_correlation(
    correlation: GeneCorrelation | Mapping[str, GeneCorrelation],
    *,
    cmap: str = "RdBu_r",
    axes: np.ndarray | Sequence[Axes] | Axes | None = None,
) -> np.ndarray:
    """Draw gene-gene correlation matrices of predictions and of the truth side by side. C3-Diff, Figure 4b.

    All have the same order of genes, that of a hierarchical clustering (average linkage) of the truth, or of the first
    prediction where there is no truth: blocks that the prediction lost, and those that it made up, stand out.

    Parameters
    ----------
    correlation
        What :func:`stgen.tl.gene_correlation` returned; or names of methods and what it returned for each, of the same
        genes and with the same truth.
    cmap
        Color map from -1 to 1; the default can be told apart by color-blind readers.
    axes
        Axes to draw into, one per prediction and one for the truth; by default a new figure.

    Returns
    -------
    Array of Axes ``(n,)``, the truth last. The titles hold GSC, how well a matrix agrees with the truth's.

    Raises
    ------
    ValueError
        If there is nothing to draw, genes or truths differ, or ``axes`` has the wrong size.
    TypeError
        If ``correlation`` is neither of the two.

    Examples
    --------
    >>> from stgen import datasets, pl, tl
    >>> sdata = datasets.simulated_section(size_um=500)
    >>> found = tl.gene_correlation(sdata["spot_counts"], key="rate", truth_key="X")
    >>> axes = pl.gene_correlation({"expected counts": found})
    >>> len(axes), axes[1].get_title()
    (2, 'truth')
    """
    check_cmaps(cmap=cmap)
    named = _named(correlation)
    first = next(iter(named.values()))
    matrices = {_title(name, result): result.prediction for name, result in named.items()}
    if first.truth is not None:
        matrices["truth"] = first.truth
    axes = _checked_axes(axes, len(matrices))
    order = _order(first.prediction if first.truth is None else first.truth)

    genes = np.asarray(first.prediction.index)[order]
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix.to_numpy()[np.ix_(order, order)], cmap=cmap, vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize="medium")
        if len(genes) <= MOST_NAMES:
            size = min(8, 200 / len(genes))
            ax.set_xticks(range(len(genes)), genes, rotation=90, fontsize=size, fontstyle="italic")
            ax.set_yticks(range(len(genes)), genes if ax is axes[0] else [], fontsize=size, fontstyle="italic")
            ax.tick_params(length=0)
        else:
            ax.set(xticks=[], yticks=[], xlabel=f"{len(genes)} genes")
        ax.spines[:].set_visible(False)
    label = f"correlation between genes,\n{first.unit}"
    bar = axes[0].figure.colorbar(image, ax=list(axes), label=label, shrink=0.7, aspect=18, pad=0.02)
    bar.ax.tick_params(labelsize="small")
    bar.ax.yaxis.label.set_size("small")
    return axes


def _named(correlation: GeneCorrelation | Mapping[str, GeneCorrelation]) -> dict[str, GeneCorrelation]:
    """Results by name, once it is known that they can stand side by side."""
    if isinstance(correlation, GeneCorrelation):
        return {"prediction": correlation}
    if not isinstance(correlation, Mapping) or not all(isinstance(x, GeneCorrelation) for x in correlation.values()):
        raise TypeError(
            "`correlation` must be what tl.gene_correlation returned, or a mapping from names to such results; found "
            f"{type(correlation).__name__}."
        )
    if not correlation:
        raise ValueError("`correlation` is empty; there is nothing to draw.")
    first_name, first = next(iter(correlation.items()))
    for name, other in correlation.items():
        if list(other.prediction.index) != list(first.prediction.index):
            raise ValueError(
                f"{first_name!r} and {name!r} have other genes; pass the same genes= to tl.gene_correlation."
            )
        if not _same(first.truth, other.truth):
            raise ValueError(
                f"{first_name!r} and {name!r} were compared with another truth; draw each with its own call."
            )
    return dict(correlation)


def _same(truth: pd.DataFrame | None, other: pd.DataFrame | None) -> bool:
    if truth is None or other is None:
        return truth is other
    return np.allclose(truth, other, atol=1e-6)


def _title(name: str, result: GeneCorrelation) -> str:
    return f"{name}\nGSC {result.gsc:.2f}" if np.isfinite(result.gsc) else name


def _checked_axes(axes: np.ndarray | Sequence[Axes] | Axes | None, n: int) -> np.ndarray:
    if axes is None:
        return plt.subplots(1, n, figsize=(1.4 + 3.1 * n, 4.2), squeeze=False, layout="compressed")[1][0]
    axes = np.asarray(axes, dtype=object).ravel()
    if len(axes) != n:
        raise ValueError(f"`axes` has {len(axes)} Axes, and {n} are needed: plt.subplots(1, {n}) makes them.")
    return axes


def _order(matrix: pd.DataFrame) -> np.ndarray:
    """Genes in the order of the leaves of a clustering."""
    if len(matrix) < 3:
        return np.arange(len(matrix))
    distance = 1 - matrix.to_numpy()
    np.fill_diagonal(distance, 0)
    distance = squareform(np.maximum((distance + distance.T) / 2, 0), checks=False)
    return leaves_list(linkage(distance, method="average", optimal_ordering=True))
