"""The scores of a prediction: what is reported per gene, and what over all genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.neighbors import kneighbors_graph

from stgen import _html, metrics
from stgen._checks import listed

__all__ = ["Scores", "gene_scores", "ranks_of", "score", "summarize", "warn_of_few_samples"]

logger = logging.getLogger("stgen")

SHOWN = 10  # genes, in a notebook


class Scores(NamedTuple):
    """Result of :func:`stgen.tl.evaluate`.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.tl.evaluation.scores import score
    >>> truth = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    >>> genes, summary = score(truth + 1, truth, ["A", "B"])
    >>> genes["PCC"].to_list(), float(summary["MSE"])
    ([1.0, 1.0], 1.0)
    """

    genes: pd.DataFrame
    """One row per gene, one column per score."""
    summary: pd.Series
    """One number per score, over all genes."""

    def _repr_html_(self) -> str:
        shown = self.genes.iloc[:SHOWN]
        rows = [(gene, *values) for gene, values in zip(shown.index, shown.to_numpy(), strict=True)]
        parts = [
            _html.tag("p", _html.tag("b", "over all genes")),
            _html.table(self.summary.items(), ["score", "value"]),
            _html.tag("p", _html.tag("b", "per gene")),
            _html.table(rows, ["gene", *shown]),
        ]
        if len(self.genes) > SHOWN:
            parts.append(_html.tag("p", f"... {len(self.genes) - SHOWN:,} more genes in .genes"))
        return _html.tag("div", *parts)


def score(
    pred: np.ndarray,
    truth: np.ndarray,
    genes: list[str],
    *,
    samples: np.ndarray | None = None,
    xy: np.ndarray | None = None,
    ranking: list[int] | None = None,
) -> Scores:
    """Every score of a prediction ``(n, G)``, of samples ``(S, n, G)`` where there are any, and of what they share."""
    frame = gene_scores(pred, truth, genes, samples=samples)
    summary = summarize(frame, ranking=ranking)
    single = pred[None] if samples is None else samples
    summary["GSC"] = metrics.gsc(single, truth)
    if samples is not None:
        warn_of_few_samples(len(samples))
        summary["GSC_sample"] = float(np.mean([metrics.gsc(s, truth) for s in samples]))
    if xy is not None and len(xy) > 6:
        weights = _neighbors(xy)
        summary["SSC"] = metrics.ssc(single, truth, weights)
    summary["constant_predictions"] = int((np.ptp(pred, 0) == 0).sum())
    return Scores(frame, pd.Series(summary, name="score"))


def gene_scores(
    pred: np.ndarray, truth: np.ndarray, genes: list[str], *, samples: np.ndarray | None = None
) -> pd.DataFrame:
    """The scores that each gene has on its own, one row per gene."""
    columns = {
        "PCC": metrics.pcc(pred, truth),
        "MSE": metrics.mse(pred, truth),
        "RMSE": metrics.rmse(pred, truth),
        "MAE": metrics.mae(pred, truth),
        "RVD": metrics.rvd(pred, truth),
    }
    if samples is not None:
        columns["RVD_sample"] = np.mean([metrics.rvd(s, truth) for s in samples], 0)
        for level in (0.5, 0.8, 0.9):
            columns[f"coverage_{level:.0%}"] = metrics.coverage(samples, truth, level)
        columns["CRPS"] = metrics.crps(samples, truth, centered=True)
    return pd.DataFrame(columns, index=pd.Index(genes, name="gene"))


def ranks_of(ranking: Sequence[str], position: Mapping[str, int]) -> list[int]:
    """Positions of the ranked genes, those first that come first; genes that were not scored are passed over."""
    ranked = [position[gene] for gene in ranking if gene in position]
    if not ranked:
        raise ValueError(
            f"`ranking` names none of the scored genes, which are {listed(position)}; found {listed(ranking)}."
        )
    return ranked


def summarize(frame: pd.DataFrame, *, ranking: list[int] | None = None) -> dict[str, float]:
    """Means over genes, medians of RVD, and PCC-k."""
    summary = frame.mean().to_dict()
    summary |= {f"{name}_median": frame[name].median() for name in frame if name.startswith("RVD")}
    for k in (10, 50):
        if len(frame) > k:
            summary[f"PCC-{k}_oracle"] = metrics.top_k(frame["PCC"], k)
            if ranking is not None:
                summary[f"PCC-{k}_ranked"] = metrics.top_k(frame["PCC"], k, ranking=ranking)
    return summary


def warn_of_few_samples(n_samples: int) -> None:
    """Say why the coverage of few samples is NaN."""
    if n_samples < metrics.LEAST_SAMPLES:
        logger.warning(
            "coverage is NaN: %d samples do not show where an interval ends, at least %d do. Predict again with "
            "n_samples=%d, keep_samples=True.", n_samples, metrics.LEAST_SAMPLES, metrics.LEAST_SAMPLES,
        )  # fmt: skip


def _neighbors(xy: np.ndarray, k: int = 6) -> sp.csr_matrix:
    """Symmetric weights: one for each pair of which either is among the other's ``k`` nearest."""
    weights = kneighbors_graph(xy, k)
    return weights.maximum(weights.T)
