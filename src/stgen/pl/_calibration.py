"""Whether the spread of the samples is as wide as it should be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from spatialdata import SpatialData

from stgen._checks import check_types
from stgen.metrics import LEAST_SAMPLES, coverage
from stgen.pl._colors import SERIES
from stgen.tl.comparison.compared import Values, find_compared
from stgen.transforms import TransformName

__all__ = ["calibration"]

logger = logging.getLogger("stgen")

MARKERS = "os^Dvp"
ROUNDING = 1e-9


@check_types
def calibration(
    data: SpatialData | AnnData,
    *,
    keys: str | Sequence[str] = "predicted",
    truth_key: str | None = None,
    genes: Sequence[str] | None = None,
    levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    transform: TransformName | None = None,
    table_key: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how often the truth lies in the intervals of the samples, against how often it should.

    A calibrated prediction lies on the dashed line. Below it the intervals are too narrow and the model is too sure of
    itself; above it they are too wide. The line is the average over genes, the band holds the middle half of them.

    Parameters
    ----------
    data
        Object with predictions whose samples were kept (``keep_samples=True``): maps of :func:`stgen.tl.superresolve`,
        or layers of :func:`stgen.tl.predict_expression`.
    keys
        The results, one line each.
    truth_key
        The true counts: a map on the same grid; or a layer, by default what was predicted for.
    genes
        Genes to average over; None for all.
    levels
        Nominal coverage of the central intervals, in (0, 1). Intervals wider than all samples together are left out:
        above ``(S - 1) / (S + 1)`` of ``S`` samples, .905 of 20. The coverage of fewer than 20 samples is NaN: nothing
        is drawn of them, and their label and the logger say why.
    transform
        Maps only: scale of the counts; intervals depend on it little. By default ``"log1p_raw"``.
    table_key
        Table of a SpatialData, where there are several.
    ax
        Axes to draw into; by default a new figure.

    Returns
    -------
    The Axes. A line per result, labeled with its name and its calibration error: the mean distance from the dashed
    line.

    Raises
    ------
    KeyError
        If a result, its samples, the truth or a gene does not exist.
    ValueError
        If a level is not in (0, 1), or all are wider than the samples together.

    Notes
    -----
    Samples are of the expected expression, while the truth is counted: the noise of counting is not in their spread, so
    that sparse genes lie below the line even where a model knows the expectation well. Where truth and interval are
    both exactly zero, it counts as covered.

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
    >>> ax = pl.calibration(adata)
    >>> len(ax.lines), ax.lines[1].get_label().split()[0]
    (2, 'predicted')
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    nominal = np.unique(np.asarray(levels, dtype=np.float64))
    if not keys or nominal.size == 0 or not ((nominal > 0) & (nominal < 1)).all():
        raise ValueError(f"`keys` must name a result, and `levels` must lie between 0 and 1; found {keys}, {nominal}.")
    compare = partial(
        find_compared, data, truth_key=truth_key, genes=genes, transform=transform, table_key=table_key,
        need=("truth", "samples"),
    )  # fmt: skip
    compared = {key: compare(key) for key in keys}
    few = [key for key, found in compared.items() if found.n_samples < LEAST_SAMPLES]
    most = {key: (found.n_samples - 1) / (found.n_samples + 1) for key, found in compared.items() if key not in few}
    for key, highest in most.items():
        if highest + ROUNDING < nominal[0]:
            raise ValueError(
                f"{compared[key].n_samples} samples of {key!r} span {highest:.2f} of the distribution, less than any "
                "of the levels; draw more samples."
            )

    if ax is None:
        ax = plt.subplots(figsize=(4, 4), layout="constrained")[1]
    ax.plot([0, 1], [0, 1], color="0.4", lw=1, ls="--", zorder=1, label="calibrated")
    for number, (key, found) in enumerate(compared.items()):
        color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        if key in few:
            reason = f"{found.n_samples} samples, at least {LEAST_SAMPLES} are needed"
            logger.warning("the calibration of %r is NaN: %s. Predict again with more n_samples.", key, reason)
            ax.plot(nominal, np.full(len(nominal), np.nan), color=color, marker=marker, ms=4, label=f"{key} ({reason})")
            continue
        shown = nominal[nominal <= most[key] + ROUNDING]
        observed = np.array([_observed(values, shown) for _, values in found.each()])
        mean = observed.mean(0)
        if len(observed) > 1:
            ax.fill_between(shown, *np.quantile(observed, (0.25, 0.75), axis=0), color=color, alpha=0.2, lw=0)
        error = np.abs(mean - shown).mean()
        ax.plot(shown, mean, color=color, marker=marker, ms=4, zorder=2, label=f"{key} (off by {error:.2f})")
    ax.set(
        xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="nominal coverage of the interval",
        ylabel="share of locations whose truth is inside",
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return ax


def _observed(values: Values, levels: np.ndarray) -> list[float]:
    """Coverage of a gene at each level."""
    samples, truth = values.kept_samples[:, :, None], values.known_truth[:, None]
    return [float(coverage(samples, truth, level)[0]) for level in levels]
