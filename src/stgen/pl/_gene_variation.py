"""Whether predictions vary as much as the truth, gene by gene."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from spatialdata import SpatialData

from stgen._checks import check_types
from stgen.pl._colors import BLUE, GREEN, ORANGE
from stgen.tl.comparison.compared import Compared, find_compared
from stgen.transforms import TransformName

__all__ = ["gene_variation"]


@check_types
def gene_variation(
    data: SpatialData | AnnData,
    *,
    keys: str | Sequence[str] = "predicted",
    truth_key: str | None = None,
    genes: Sequence[str] | None = None,
    transform: TransformName | None = None,
    table_key: str | None = None,
    axes: np.ndarray | Sequence[Axes] | Axes | None = None,
) -> np.ndarray:
    """Draw the variance of each gene across locations, of prediction and truth. Stem, Figures 4 to 7.

    Genes are ordered by their true variance, which is the line; points near it are good, flat clouds come from
    predictions that hardly differ between locations. Above, variances are shares of the sum over all genes: whether
    genes stand in the right proportion. Below, they are absolute.

    Parameters
    ----------
    data
        Object with the prediction: maps, or layers of a table.
    keys
        The results, one column each.
    truth_key
        The true counts: a map on the same grid; or a layer, or ``"X"``. Results of :func:`stgen.tl.predict_expression`
        have one by default, the counts that stand beside them.
    genes
        Genes to draw; None for all that prediction and truth share.
    transform
        Scale of counts: ``"log1p_raw"`` by default for maps, ``"log1p_norm"`` for tables. Results of
        :func:`stgen.tl.predict_expression` are on their own.
    table_key
        Table of a SpatialData, where there are several.
    axes
        Axes to draw into, ``(2, keys)``; by default a new figure.

    Returns
    -------
    Array of Axes, ``(2, keys)``: normalized and absolute variances. On each the line is the truth, the first collection
    the prediction, and the second, where samples were kept, single samples (the mean over samples of their variance):
    averaging samples takes variance away. The legends give RVD, the mean over genes of ``((variance - true variance) /
    true variance) ** 2``.

    Raises
    ------
    KeyError
        If a result, the truth or a gene does not exist.
    ValueError
        If maps are on different grids, counts are no counts, or ``axes`` has the wrong shape.

    Examples
    --------
    >>> from stgen import datasets, pl
    >>> sdata = datasets.simulated_section(size_um=500)
    >>> axes = pl.gene_variation(sdata["spot_counts"], keys="rate", truth_key="X")
    >>> axes.shape, axes[0, 0].get_title(), axes[1, 0].get_xlabel()
    ((2, 1), 'rate', '60 genes, by true variance')
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    compare = partial(
        find_compared, data, truth_key=truth_key, genes=genes, transform=transform, table_key=table_key, need=("truth",)
    )
    compared = {key: compare(key) for key in keys}
    if not compared:
        raise ValueError("`keys` is empty; name at least one result.")
    shape = (2, len(keys))
    if axes is None:
        figsize = (0.6 + 3.2 * len(keys), 5)
        axes = plt.subplots(*shape, figsize=figsize, squeeze=False, sharex="col", layout="constrained")[1]
    axes = np.asarray(axes, dtype=object)
    if axes.size != 2 * len(keys) or (axes.ndim == 2 and axes.shape != shape):
        raise ValueError(f"`axes` has the shape {axes.shape}, and {shape} is needed (normalized and absolute, keys).")
    axes = axes.reshape(shape)

    for column, (key, found) in zip(axes.T, compared.items(), strict=True):
        variances = _variances(found)
        order = np.argsort(variances["truth"], kind="stable")
        for ax, relative in zip(column, (True, False), strict=True):
            _draw(ax, {name: v[order] / v.sum() if relative else v[order] for name, v in variances.items()}, relative)
        column[0].set_title(key, fontsize="medium")
        column[1].set_xlabel(f"{len(order)} genes, by true variance")
    axes[0, 0].set_ylabel("variance,\nshare of the sum over genes")
    axes[1, 0].set_ylabel(f"variance,\n({next(iter(compared.values())).unit})²")
    return axes


def _variances(found: Compared) -> dict[str, np.ndarray]:
    """Variance across locations of each gene, ``(G,)``: of the truth, of the prediction, and of single samples."""
    rows = []
    for _, values in found.each():
        row = {"truth": values.known_truth.var(), "prediction": values.prediction.var()}
        if values.samples is not None:
            row["single samples"] = values.samples.var(1).mean()
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _draw(ax: Axes, variances: dict[str, np.ndarray], relative: bool) -> None:
    truth = variances["truth"]
    at = np.arange(len(truth))
    ax.plot(at, truth, color=BLUE, lw=1.8, label="truth", zorder=2)
    styles: dict[str, dict[str, Any]] = {
        "prediction": {"color": ORANGE, "marker": "o", "linewidths": 0},
        "single samples": {"facecolors": "none", "edgecolors": GREEN, "marker": "D", "linewidths": 0.8},
    }
    varies = truth > 0
    for name, style in styles.items():
        if name in variances:
            rvd = np.square(variances[name][varies] / truth[varies] - 1).mean()
            label = name if relative else f"{name}, RVD {rvd:.2f}"
            ax.scatter(at, variances[name], s=14, alpha=0.85, zorder=3, label=label, **style)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper left")
