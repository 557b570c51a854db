"""Counts of a table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np
from anndata import AnnData
from scipy import sparse

from stgen._checks import listed

__all__ = ["check_not_empty", "get_counts"]

logger = logging.getLogger("stgen")


@overload
def get_counts(
    table: AnnData, *, genes: Sequence[str] | None = None, layer: str | None = None, dense: Literal[True] = True
) -> np.ndarray: ...
@overload
def get_counts(
    table: AnnData, *, genes: Sequence[str] | None = None, layer: str | None = None, dense: Literal[False]
) -> sparse.csr_array: ...
def get_counts(
    table: AnnData, *, genes: Sequence[str] | None = None, layer: str | None = None, dense: bool = True
) -> np.ndarray | sparse.csr_array:
    """Float32 counts ``(n_obs, n_genes)``, checked; values that are no counts are warned about.

    Parameters
    ----------
    table
        Where the counts are.
    genes
        Names to take, in this order; default all.
    layer
        Layer to take; default ``X``.
    dense
        Whether to return a dense array; otherwise a CSR array.
    """
    check_not_empty(table)
    if table.n_vars == 0:
        raise ValueError(f"The table has no genes: its shape is {table.shape}.")
    if layer is not None and layer not in table.layers:
        raise KeyError(f"There is no layer {layer!r}; found {listed(table.layers)}.")
    if not table.var_names.is_unique:
        twice = table.var_names[table.var_names.duplicated()].unique()
        raise ValueError(
            f"{len(twice)} gene names occur more than once ({listed(twice)}); run adata.var_names_make_unique() first."
        )
    values = table.X if layer is None else table.layers[layer]
    where = "X" if layer is None else f"layers[{layer!r}]"
    if values is None:
        raise ValueError('The table has no X; pass layer="<name>" or set adata.X to the counts.')
    if not (isinstance(values, np.ndarray) or sparse.issparse(values) or hasattr(values, "compute")):  # on disk
        values = values.to_memory() if hasattr(values, "to_memory") else np.asarray(values)
    if genes is not None:
        genes = list(genes)
        position = table.var_names.get_indexer(genes)
        if (position < 0).any():
            unknown = [gene for gene, i in zip(genes, position, strict=True) if i < 0]
            raise KeyError(
                f"{len(unknown)} of {len(genes)} genes are not in the table ({listed(unknown)}); its names look like "
                f"{listed(table.var_names[:3])}. Leave these genes out, or bring both to the same kind of names."
            )
        values = values[:, position]
    if hasattr(values, "compute"):
        values = values.compute()
    if not np.issubdtype(values.dtype, np.number) or np.issubdtype(values.dtype, np.complexfloating):
        raise TypeError(f"{where} holds {values.dtype} values; it must hold counts.")
    stored = values.data if sparse.issparse(values) else np.asarray(values)
    if not np.isfinite(stored).all():
        raise ValueError(f"{where} holds NaN or infinite values; counts must be finite. Drop or fill them first.")
    if stored.size and stored.min() < 0:
        raise ValueError(
            f"{where} holds negative values (down to {stored.min():.4g}); it must hold counts. Pass "
            'layer="<name of the layer with the counts>".'
        )
    _warn_unless_whole(stored, where)
    if not dense:
        return sparse.csr_array(values, dtype=np.float32)
    values = values.toarray() if sparse.issparse(values) else np.asarray(values)
    return values.astype(np.float32)


def _warn_unless_whole(stored: np.ndarray, where: str) -> None:
    """Warn if the values are clearly not whole numbers, judged by a sample."""
    sample = stored.ravel()[:: max(1, stored.size // 100_000)]
    sample = sample[sample > 0]
    fractional = np.abs(sample - np.round(sample)) > 1e-3
    if fractional.size and fractional.mean() > 0.01:
        logger.warning(
            "%s does not hold whole numbers (such as %.4g) and is taken as counts. If it is normalized or "
            'log-transformed, put the counts into X (adata.X = adata.layers["counts"]), or pass layer="counts" to a '
            "function that takes it.",
            where,
            sample[np.argmax(fractional)],
        )


def check_not_empty(table: AnnData) -> None:
    if table.n_obs == 0:
        raise ValueError(f"The table is empty: its shape is {table.shape}.")
