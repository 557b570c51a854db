"""From tables to the arrays that models take, with every check that must come before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from stgen._spatial.counts import get_counts
from stgen.transforms import TransformName, transform_counts

__all__ = [
    "SYMBOL_COLUMNS",
    "embedding_key_of",
    "embedding_record",
    "expression",
    "predicted_in_x",
    "predictions_of",
    "recorded_embeddings",
    "spatial_blocks",
    "symbols_of",
]

MIN_LOCATIONS = 20
SYMBOL_COLUMNS = ("gene_symbols", "gene_symbol", "symbol", "feature_name", "gene_name", "gene_names", "SYMBOL")
RECIPE = ("model", "patch_um", "patch_px", "by_name", "default_patches", "patch_um_given", "patch_px_given")


def expression(
    table: AnnData, genes: Sequence[str], transform: TransformName, *, layer: str | None = None
) -> np.ndarray:
    """Expression of the genes on a named scale, shape ``(n, G)``; totals are over all genes of the table."""
    if layer is None and predicted_in_x(table) is not None:
        raise ValueError(
            f"the table holds a prediction in X ({predicted_in_x(table)!r}), not counts: it cannot be fitted on or "
            "scored against. Name the table, or the layer, with the measured counts."
        )
    counts = get_counts(table, layer=layer, dense=False)
    columns = table.var_names.get_indexer(genes)
    if (columns < 0).any():
        get_counts(table, genes=genes, layer=layer)  # raises, and lists what is unknown
    return transform_counts(counts[:, columns].toarray(), np.asarray(counts.sum(1)).ravel(), transform)


def predicted_in_x(table: AnnData) -> str | None:
    """Key of the prediction that is the table's ``X``; ``None`` for a table of measurements."""
    for key, entry in table.uns.get("stgen", {}).items():
        if isinstance(entry, Mapping) and entry.get("values_in") == "X":
            return key
    return None


def predictions_of(table: AnnData) -> list[str]:
    """Keys of the predictions that ``tl.predict_expression`` left in the table."""
    return [
        key
        for key, entry in table.uns.get("stgen", {}).items()
        if isinstance(entry, Mapping) and entry.get("function") == "tl.predict_expression"
    ]


def embedding_key_of(table: AnnData, embedding_key: str | None) -> str:
    """The key of the histology embedding in ``obsm``: the given one, or the only one that ``pp.embed`` recorded."""
    if embedding_key is not None:
        if embedding_key not in table.obsm:
            raise KeyError(
                f'`embedding_key`: there is no embedding obsm["{embedding_key}"]; found '
                f"{', '.join(map(str, table.obsm)) or 'none'}. stgen.pp.embed(data, image_key=..., "
                f'key_added="{embedding_key}") computes one.'
            )
        return embedding_key
    recorded = recorded_embeddings(table)
    if len(recorded) == 1:
        return recorded[0]
    if not recorded:
        raise KeyError(
            f"the table has no histology embedding (obsm has {', '.join(map(str, table.obsm)) or 'nothing'}). "
            'Compute one with stgen.pp.embed(data, image_key="..."), or name your own with embedding_key="...".'
        )
    raise KeyError(f'several embeddings: {", ".join(recorded)}. Choose one with embedding_key="...".')


def recorded_embeddings(table: AnnData) -> list[str]:
    """Keys of the embeddings that ``pp.embed`` left in ``obsm``."""
    return [
        key
        for key, entry in table.uns.get("stgen", {}).items()
        if isinstance(entry, Mapping) and entry.get("function") == "pp.embed" and key in table.obsm
    ]


def embedding_record(table: AnnData, key: str) -> dict[str, Any]:
    """What identifies an embedding, so that a model is never applied to another kind: its recipe, or its width."""
    entry = table.uns.get("stgen", {}).get(key, {})
    recipe = {k: entry[k] for k in RECIPE if k in entry}
    recipe = {k: v.item() if isinstance(v, np.generic) else v for k, v in recipe.items()}
    values = np.asarray(table.obsm[key])
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
        raise ValueError(
            f'obsm["{key}"] must be a finite array (n, features), found shape {values.shape}, dtype {values.dtype}.'
        )
    if "image_mpp" in entry:
        recipe["image_mpp"] = float(entry["image_mpp"])
    return {"key": key, "n_features": int(values.shape[1]), **recipe}


def symbols_of(table: AnnData, genes: Sequence[str]) -> dict[str, str]:
    """The symbols of genes that are named otherwise, such as by Ensembl ids, where a column of ``var`` has them."""
    column = next((name for name in SYMBOL_COLUMNS if name in table.var), None)
    if column is None or not table.var_names.is_unique:
        return {}
    symbols = table.var[column].reindex(list(genes))
    return {gene: symbol for gene, symbol in symbols.items() if isinstance(symbol, str) and symbol}


def spatial_blocks(xy: np.ndarray, n_blocks: int = 16) -> np.ndarray:
    """Cut locations into blocks of equal size by halving along the longer side again and again.

    Parameters
    ----------
    xy
        Coordinates, shape ``(n, 2)``.
    n_blocks
        Number of blocks; a power of two. Fewer where there are too few locations.

    Returns
    -------
    Block of each location, shape ``(n,)``.
    """
    block = np.zeros(len(xy), int)
    if n_blocks < 2 or len(xy) < 2:
        return block
    axis = int(np.ptp(xy[:, 1]) > np.ptp(xy[:, 0]))
    upper = np.zeros(len(xy), bool)
    upper[np.argsort(xy[:, axis], kind="stable")[len(xy) // 2 :]] = True
    for side in (False, True):
        block[upper == side] = spatial_blocks(xy[upper == side], n_blocks // 2) + side * n_blocks // 2
    return block
