"""Score predictions against measured counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stgen._checks import check_types
from stgen._spatial.section import get_section, get_table
from stgen._spatial.tables import expression, predicted_in_x, predictions_of
from stgen.tl.evaluation.maps import evaluate_maps
from stgen.tl.evaluation.scores import Scores, ranks_of, score
from stgen.transforms import TransformName

__all__ = ["Scores", "evaluate"]


@check_types
def evaluate(
    data: SpatialData | AnnData,
    *,
    key: str = "predicted",
    truth_key: str | None = None,
    low_res: str | None = None,
    replicate_key: str | None = None,
    transform: TransformName | None = None,
    gene_scale: Mapping[str, float] | pd.Series | None = None,
    truth_layer: str | None = None,
    table_key: str | None = None,
    ranking: list[str] | None = None,
) -> Scores:
    """Score a prediction against measured counts: of the same table, or of a map on the same grid.

    All scores are signed and nothing is rescaled. Give the same genes to every method that you compare, and report
    simple baselines (:class:`stgen.models.TrainingMean`, :class:`stgen.models.LinearProbe`) beside any model.

    Parameters
    ----------
    data
        Object with the result of :func:`stgen.tl.predict_expression` in the layers of a table, and counts; or with a
        map of counts as an image, such as :func:`stgen.tl.superresolve` makes, and another of the truth.
    key
        The result's ``key_added``: an image of a SpatialData, or else a layer of its table.
    truth_key
        Map only: image with the true counts, on the same grid. Genes of both are scored, and bins that are NaN in
        either are left out.
    low_res
        Map only: what the prediction was made from, a map of larger bins or the table of spots (of which the layer is
        taken that the prediction was made from). Adds the residual of measurement consistency.
    replicate_key
        Map only: image with counts of the same tissue that are independent of the truth, such as the other half of the
        molecules. Adds the noise ceiling, their correlation's square root, and what a perfect sample would score.
    transform
        Map only: scale of the scores, ``"log1p_raw"`` by default, or ``"log2p1_raw"`` or ``"none"`` (counts).
        Predictions in a table are scored on their own scale.
    gene_scale
        Map only: number by which each gene is divided after the transform, for example a high quantile on training
        tissue.
    truth_layer
        Table only: layer with the measured counts; by default the ``layer`` of the prediction, or ``X``.
    table_key
        Table of a SpatialData; needed only if there are several.
    ranking
        Genes in order of preference, decided on training tissue, for the honest PCC-10 and PCC-50. Without it only the
        oracle form is given, which picks the best genes on the tissue that is scored.

    Returns
    -------
    ``genes``: PCC (0 for a constant), MSE, RMSE, MAE, RVD of the prediction; with kept samples also RVD of single
    samples (averaged), coverage of the 50, 80 and 90 % intervals (NaN of fewer than 20 samples), and CRPS. ``summary``:
    means over genes, medians of RVD, PCC-k, GSC and SSC (from the samples where kept; ``GSC_sample`` is that of one
    sample on its own), and the number of constant predictions.

    Maps also have SSIM, whose data range is 1 with ``gene_scale`` and else the largest true value of the gene on the
    scale (``SSIM_sample``: that of single samples), and ``Moran_difference``, Moran's I of prediction (or mean over
    samples) minus that of the truth, among bins that share a side. The map itself is the prediction that is scored;
    kept samples serve the scores of single samples and of the spread. With ``replicate_key``: ``ceiling``,
    ``PCC/ceiling`` and ``SSIM_replicate``, which perfect single samples would have. With ``low_res``: ``residual_mean``
    and ``residual_max``, over footprints, of ``|predicted - measured| / max(measured, 1)``, in counts; footprints that
    reach beyond the map or hold no predicted bin are left out, and ``residual_max`` of the summary is the largest over
    genes.

    Raises
    ------
    KeyError
        If there is no such result, or no truth was named for a map.
    ValueError
        If the counts are no counts, maps are on different grids or share no gene, or an argument does not fit the kind
        of result.

    Examples
    --------
    >>> from stgen import datasets, models, pp, tl
    >>> sdata = datasets.simulated_section(size_um=1000)
    >>> pp.embed(sdata, image_key="he", table_key="spot_counts")
    >>> adata = sdata["spot_counts"]
    >>> probe = models.LinearProbe(pp.select_genes(adata, 10), embedding_dim=adata.obsm["X_texture"].shape[1])
    >>> tl.predict_expression(adata, model=probe, progress=False)
    >>> scores = tl.evaluate(adata)
    >>> bool(scores.summary["PCC"] > 0)
    True

    A map, here the truth itself:

    >>> pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1"], key_added="counts")
    >>> scores = tl.evaluate(sdata, key="counts", truth_key="counts")
    >>> scores.genes.loc["EPCAM", ["RMSE", "SSIM"]].to_list()
    [0.0, 1.0]
    """
    of_maps: dict[str, Any] = {
        "truth_key": truth_key, "low_res": low_res, "replicate_key": replicate_key, "transform": transform,
        "gene_scale": gene_scale,
    }  # fmt: skip
    for_maps = {name: value for name, value in of_maps.items() if value is not None}
    is_map = isinstance(data, SpatialData) and table_key is None and key in data.images
    if for_maps and not is_map:
        images = ", ".join(map(repr, data.images)) if isinstance(data, SpatialData) else ""
        raise KeyError(
            f"{', '.join(for_maps)} {'is' if len(for_maps) == 1 else 'are'} for maps, and there is no map {key!r} to "
            f"score; sdata.images has {images or 'none'}. stgen.tl.superresolve(sdata, ..., key_added={key!r}) makes "
            "one."
        )
    if is_map:
        if truth_key is None:
            raise KeyError(
                f"{key!r} is a map, and no truth to compare it with was named: pass truth_key=<map of counts on the "
                "same grid>; stgen.pp.rasterize makes one of molecules or cells."
            )
        if truth_layer is not None:
            raise ValueError(f"`truth_layer` is for predictions in a table, and {key!r} is a map.")
        return evaluate_maps(data, key, **for_maps, ranking=ranking)
    table = get_table(data, table_key=table_key)
    entry = table.uns.get("stgen", {}).get(key)
    if key not in table.layers or entry is None:
        if predicted_in_x(table) is not None:
            raise KeyError(
                f"X of this table is the prediction {predicted_in_x(table)!r} itself: there are no counts to score it "
                "against. Predict into the table with the counts, naming genes that it has: "
                "stgen.tl.predict_expression(data, model=..., genes=[...], table_key=<that table>)."
            )
        made = predictions_of(table)
        raise KeyError(
            f'there is no prediction layers["{key}"]; '
            + (
                f"those of the table are {', '.join(map(repr, made))}: pass key=<one of them>."
                if made
                else "stgen.tl.predict_expression(data, model=...) makes one."
            )
        )
    predicted = np.asarray(table.var[key], dtype=bool)
    genes = list(table.var_names[predicted])
    samples = table.obsm.get(f"{key}_samples")
    pred = np.asarray(table.layers[key])[:, predicted]
    truth = expression(
        table, genes, entry["transform"], layer=entry.get("layer") if truth_layer is None else truth_layer
    )
    if samples is not None:  # kept in the order in which the genes were asked for
        order = {gene: i for i, gene in enumerate(entry["sample_genes"].split("\n"))}
        samples = np.moveaxis(np.asarray(samples)[:, :, [order[gene] for gene in genes]], 1, 0)
    position = {gene: i for i, gene in enumerate(genes)}
    ranked = None if ranking is None else ranks_of(ranking, position)
    return score(pred, truth, genes, samples=samples, xy=_xy(data, table_key), ranking=ranked)


def _xy(data: SpatialData | AnnData, table_key: str | None) -> np.ndarray | None:
    """Coordinates, if the object has any: only SSC needs them."""
    try:
        return get_section(data, table_key=table_key).xy_px
    except KeyError:
        return None
