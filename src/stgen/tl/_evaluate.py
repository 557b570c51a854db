"""Score predictions against measured counts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from sklearn.neighbors import kneighbors_graph
from spatialdata import SpatialData

from stgen import metrics
from stgen._io import get_section, get_table
from stgen.tl._inputs import expression

__all__ = ["Scores", "evaluate", "score"]


class Scores(NamedTuple):
    """Result of :func:`stgen.tl.evaluate`.

    Examples
    --------
    >>> import numpy as np
    >>> from stgen.tl._evaluate import score
    >>> truth = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    >>> genes, summary = score(truth + 1, truth, ["A", "B"])
    >>> genes["PCC"].to_list(), float(summary["MSE"])
    ([1.0, 1.0], 1.0)
    """

    genes: pd.DataFrame
    """One row per gene, one column per score."""
    summary: pd.Series
    """One number per score, over all genes."""


def evaluate(
    data: SpatialData | AnnData,
    *,
    key: str = "predicted",
    truth_layer: str | None = None,
    table_key: str | None = None,
    ranking: list[str] | None = None,
) -> Scores:
    """Score a prediction against the counts of the same table, on the scale of the prediction.

    All scores are signed and nothing is rescaled. Give the same genes to every method that you compare, and report
    simple baselines (:class:`stgen.models.TrainingMean`, :class:`stgen.models.LinearProbe`) beside any model.

    Parameters
    ----------
    data
        Object with the result of :func:`stgen.tl.predict_expression` in its layers, and counts.
    key
        The result's ``key_added``.
    truth_layer
        Layer with the measured counts; by default the ``layer`` of the prediction, or ``X``.
    table_key
        Table of a SpatialData; needed only if there are several.
    ranking
        Genes in order of preference, decided on training tissue, for the honest PCC-10 and PCC-50. Without it only the
        oracle form is given, which picks the best genes on the tissue that is scored.

    Returns
    -------
    ``genes``: PCC, RMSE, MAE, RVD of the prediction; with kept samples also RVD of single samples (averaged), coverage of
    the 50, 80 and 90 % intervals, and CRPS. ``summary``: means over genes, medians of RVD, PCC-k, GSC and SSC (from the
    samples where kept; ``GSC_sample`` is that of one sample on its own), and the number of constant predictions.

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If the counts are no counts.

    Examples
    --------
    >>> from stgen import datasets, models, pp, tl
    >>> sdata = datasets.simulated_section(size_um=600)
    >>> pp.embed(sdata, image_key="he", table_key="spot_counts")
    >>> adata = sdata["spot_counts"]
    >>> probe = models.LinearProbe(pp.select_genes(adata, 10), embedding_dim=adata.obsm["X_texture"].shape[1])
    >>> tl.predict_expression(adata, model=probe, progress=False)
    >>> scores = tl.evaluate(adata)
    >>> bool(scores.summary["PCC"] > 0)
    True
    """
    table = get_table(data, table_key=table_key)
    entry = table.uns.get("stgen", {}).get(key)
    if key not in table.layers or entry is None:
        raise KeyError(
            f'there is no prediction layers["{key}"] of tl.predict_expression; the layers are '
            f"{', '.join(map(str, table.layers)) or 'none'}."
        )
    predicted = np.asarray(table.var[key], dtype=bool)
    genes = list(table.var_names[predicted])
    samples = table.obsm.get(f"{key}_samples")
    pred = np.asarray(table.layers[key])[:, predicted]
    truth = expression(table, genes, entry["transform"], layer=truth_layer or entry.get("layer"))
    if samples is not None:  # kept in the order in which the genes were asked for
        order = {gene: i for i, gene in enumerate(entry["sample_genes"].split("\n"))}
        samples = np.moveaxis(np.asarray(samples)[:, :, [order[gene] for gene in genes]], 1, 0)
    if ranking is not None:
        position = {gene: i for i, gene in enumerate(genes)}
        ranking = [position[gene] for gene in ranking if gene in position]
    return score(pred, truth, genes, samples=samples, xy=_xy(data, table_key), ranking=ranking)


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
    columns = {
        "PCC": metrics.pcc(pred, truth),
        "MSE": metrics.mse(pred, truth),
        "RMSE": metrics.rmse(pred, truth),
        "MAE": metrics.mae(pred, truth),
        "RVD": metrics.rvd(pred, truth),
    }
    single = pred[None] if samples is None else samples
    if samples is not None:
        columns["RVD_sample"] = np.mean([metrics.rvd(s, truth) for s in samples], 0)
        for level in (0.5, 0.8, 0.9):
            columns[f"coverage_{level:.0%}"] = metrics.coverage(samples, truth, level)
        columns["CRPS"] = metrics.crps(samples, truth, centered=True)
    frame = pd.DataFrame(columns, index=pd.Index(genes, name="gene"))
    summary = frame.mean().to_dict()
    summary |= {f"{name}_median": frame[name].median() for name in frame if name.startswith("RVD")}
    for k in (10, 50):
        if len(genes) > k:
            summary[f"PCC-{k}_oracle"] = metrics.top_k(frame["PCC"], k)
            if ranking is not None:
                summary[f"PCC-{k}_ranked"] = metrics.top_k(frame["PCC"], k, ranking=ranking)
    summary["GSC"] = metrics.gsc(single, truth)
    if samples is not None:
        summary["GSC_sample"] = np.mean([metrics.gsc(s, truth) for s in samples])
    if xy is not None and len(xy) > 6:
        weights = _neighbors(xy)
        summary["SSC"] = metrics.ssc(single, truth, weights)
    summary["constant_predictions"] = int((np.ptp(pred, 0) == 0).sum())
    return Scores(frame, pd.Series(summary, name="score"))


def _neighbors(xy: np.ndarray, k: int = 6) -> sp.csr_matrix:
    """Symmetric weights: one for each pair of which either is among the other's ``k`` nearest."""
    weights = kneighbors_graph(xy, k)
    return weights.maximum(weights.T)


def _xy(data: SpatialData | AnnData, table_key: str | None) -> np.ndarray | None:
    """Coordinates, if the object has any: only SSC needs them."""
    try:
        return get_section(data, table_key=table_key).xy_px
    except KeyError:
        return None
