"""The cloud of samples at one location, in the plane of two genes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from spatialdata import SpatialData

from stgen._checks import check_types
from stgen.pl._colors import BLUE, GREEN, PURPLE, SKY, VERMILION
from stgen.tl.comparison.compared import find_compared
from stgen.tl.prediction.predict import STATISTICS
from stgen.transforms import TransformName

__all__ = ["samples"]

STYLES = {
    "mean": {"color": GREEN, "marker": "s"},
    "median": {"color": PURPLE, "marker": "D"},
    "mode": {"color": BLUE, "marker": "^"},
    "truth": {"color": VERMILION, "marker": "X"},
}


@check_types
def samples(
    data: SpatialData | AnnData,
    pairs: Sequence[tuple[str, str]],
    *,
    location: str | int | tuple[int, int],
    key: str = "predicted",
    truth_key: str | None = None,
    transform: TransformName | None = None,
    table_key: str | None = None,
    axes: np.ndarray | Sequence[Axes] | Axes | None = None,
) -> np.ndarray:
    """Draw the samples at one location as clouds of gene pairs, with mean, median, mode and truth. Stem, Figure 8.

    Parameters
    ----------
    data
        Object with a prediction whose samples were kept (``keep_samples=True``).
    pairs
        Pairs of genes, one panel each: x and y.
    location
        Row of the table, by name or number; or bin of the map, as row and column.
    key
        The result: a map, or a layer of the table.
    truth_key
        The true counts: a map on the same grid; or a layer, by default what was predicted for. Maps are drawn without a
        truth unless one is named.
    transform
        Maps only: scale of the counts, ``"log1p_raw"`` by default.
    table_key
        Table of a SpatialData, where there are several.
    axes
        Axes to draw into, one per pair; by default a new figure with three in a row.

    Returns
    -------
    Array of Axes ``(pairs,)``. The collections on each are the samples, then mean, median, mode and truth. The mode is,
    per gene, the sample where the estimated density is highest.

    Raises
    ------
    KeyError
        If the result, its samples, a gene or the location does not exist.
    ValueError
        If no pairs are given, the location is not known, or ``axes`` has the wrong size.

    Examples
    --------
    >>> from stgen import datasets, models, pl, pp, tl
    >>> sdata = datasets.simulated_section(size_um=600)
    >>> pp.embed(sdata, image_key="he", table_key="spot_counts")
    >>> adata = sdata["spot_counts"]
    >>> width = adata.obsm["X_texture"].shape[1]
    >>> model = models.Stem(["EPCAM", "COL1A1"], embedding_dim=width, width=16, depth=1, heads=2)
    >>> options = {"fit_options": {"steps": 5}, "steps": 5, "keep_samples": True, "progress": False}
    >>> tl.predict_expression(adata, model=model, **options)
    >>> axes = pl.samples(adata, [("EPCAM", "COL1A1")], location=4)
    >>> len(axes), axes[0].get_xlabel()
    (1, 'EPCAM')
    """
    if not len(pairs) or any(len(pair) != 2 for pair in pairs):
        raise ValueError('`pairs` must hold pairs of genes, at least one: [("EPCAM", "KRT8")].')
    genes = list(dict.fromkeys(gene for pair in pairs for gene in pair))
    found = find_compared(
        data, key, truth_key=truth_key, genes=genes, transform=transform, table_key=table_key, need=("samples",)
    )
    values = found.at(location)
    samples = values.kept_samples
    if not np.isfinite(samples).all():
        raise ValueError(f"nothing was predicted at {location!r}: it is outside the tissue.")
    points = {name: STATISTICS[name](samples[None])[0] for name in ("mean", "median", "mode")}
    if values.truth is not None and np.isfinite(values.truth).all():
        points["truth"] = values.truth
    axes = _checked_axes(axes, len(pairs))

    for ax, (x, y) in zip(axes, pairs, strict=True):
        at = [genes.index(x), genes.index(y)]
        ax.scatter(*samples[:, at].T, s=16, color=SKY, alpha=0.6, linewidths=0, label="samples", zorder=1)
        for name, value in points.items():
            ax.scatter(*value[at], s=70, edgecolors="white", linewidths=0.8, label=name, zorder=3, **STYLES[name])
        ax.set_xlabel(x, fontstyle="italic")
        ax.set_ylabel(y, fontstyle="italic")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axes[0].set_title(f"{len(samples)} samples at {location}\n{found.unit}", fontsize="medium", loc="left")
    return axes


def _checked_axes(axes: np.ndarray | Sequence[Axes] | Axes | None, n: int) -> np.ndarray:
    if axes is None:
        columns, rows = min(n, 3), -(-n // 3)
        figure, axes = plt.subplots(
            rows, columns, figsize=(1.3 + 2.7 * columns, 0.5 + 2.5 * rows), squeeze=False, layout="constrained"
        )
        for ax in axes.ravel()[n:]:
            figure.delaxes(ax)
        return axes.ravel()[:n]
    axes = np.asarray(axes, dtype=object).ravel()
    if len(axes) != n:
        raise ValueError(f"`axes` has {len(axes)} Axes, and {n} are needed, one per pair.")
    return axes
