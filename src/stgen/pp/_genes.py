"""Which genes to predict."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from stgen._checks import check_types
from stgen._spatial.counts import get_counts
from stgen._spatial.records import check_new_key, made_by, provenance, record
from stgen._spatial.section import get_table
from stgen._spatial.tables import SYMBOL_COLUMNS
from stgen.transforms import TARGET_SUM

__all__ = ["select_genes"]

logger = logging.getLogger("stgen")

_MITOCHONDRIAL_OR_RIBOSOMAL = r"^(?:MT-|RPS|RPL|mt-|Mt-|Rps|Rpl)"
_NUMBERED = r"^(?:ENS[A-Z]*[GTP]\d{6,}|FBgn\d+|WBGene\d+|[A-Z]{2}_\d+|\d+$)"  # names by databases, which say nothing of the kind
_WHOLE_TRANSCRIPTOME = 5000  # genes of a table that must have ribosomal ones among them
_PER_SECTION = 2000


@check_types
def select_genes(
    data: AnnData | SpatialData | Mapping[str, AnnData | SpatialData] | Sequence[AnnData | SpatialData],
    n: int,
    *,
    flavor: Literal["hmhvg", "hvg", "deg", "mean_var"] = "hmhvg",
    groupby: str | None = None,
    exclude: str | None = _MITOCHONDRIAL_OR_RIBOSOMAL,
    gene_symbols: str | None = None,
    transform: Literal["log1p_norm", "log1p_raw"] = "log1p_norm",
    layer: str | None = None,
    table_key: str | None = None,
    key_added: str | None = "genes",
    at_most: bool = False,
) -> list[str]:
    """Select the genes that a model is fitted to, on training tissue.

    Only genes that every section has, and that are not constant over all locations, are considered. Pass training
    sections only: a list that has seen the test section makes its scores look better than they are.

    Parameters
    ----------
    data
        One section or several, as a mapping or sequence, with raw counts.
    n
        Number of genes.
    flavor
        - ``"hmhvg"``: high mean and highly variable. Among the genes that are highly variable (2,000 per section,
          scanpy's default flavor, union over sections), those whose mean *and* standard deviation of the counts both
          rank high: the top K by mean intersected with the top K by standard deviation, for the smallest K that leaves
          ``n``. Stem's main gene set.
        - ``"hvg"``: the highly variable genes with the highest mean count.
        - ``"deg"``: genes that tell the groups of ``groupby`` apart (t-test of each group against the rest), taken in
          turn from the top of each group's list.
        - ``"mean_var"``: as ``"hmhvg"``, of all genes, with mean and variance on the scale ``transform``.
    groupby
        Column of ``obs`` with the groups for ``"deg"``, annotated regions or clusters.
    exclude
        Regular expression of names to leave out: mitochondrial (``MT-``) and ribosomal genes. None keeps all. A warning
        says where it can have matched nothing only because the names are of another kind.
    gene_symbols
        Column of ``var`` with the names that ``exclude`` is for, where ``var_names`` are Ensembl ids. What is returned
        are ``var_names`` in any case.
    transform
        Scale of ``"mean_var"``, see :func:`stgen.transforms.transform_counts`.
    layer
        Layer with the counts; default ``X``.
    table_key
        Table of a SpatialData object; None if there is one.
    key_added
        The list and how it was made are recorded under this name (see Returns); an earlier list is replaced. None does
        not record it.
    at_most
        Take fewer where fewer are eligible, instead of raising.

    Returns
    -------
    The names, best first. Recorded in each section's table: ``uns["stgen"][key_added]``, where ``"genes"`` is the list
    as one string, a name per line.

    Raises
    ------
    KeyError
        There is no column ``groupby`` or ``gene_symbols``, no such table or layer.
    ValueError
        Fewer than ``n`` genes are eligible; negative or missing counts; duplicate names.

    Examples
    --------
    >>> import stgen
    >>> sdata = stgen.datasets.simulated_section(size_um=600)
    >>> genes = stgen.pp.select_genes(sdata, 10, table_key="spot_counts")
    >>> len(genes)
    10
    """
    if flavor not in ("hmhvg", "hvg", "deg", "mean_var"):
        raise ValueError(f'`flavor` must be "hmhvg", "hvg", "deg" or "mean_var", found {flavor!r}.')
    if transform not in ("log1p_norm", "log1p_raw"):
        raise ValueError(f'`transform` must be "log1p_norm" or "log1p_raw", found {transform!r}.')
    if flavor == "deg" and groupby is None:
        raise ValueError('flavor="deg" compares groups: pass groupby=<column of obs>.')
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"`n` must be a positive number of genes, found {n!r}.")
    tables = [get_table(section, table_key=table_key) for section in _sections(data)]
    for table in tables:
        if key_added is not None and not made_by(table, key_added, "pp.select_genes"):
            check_new_key(table.uns.get("stgen", {}), key_added, overwrite=True, what='uns["stgen"]', ours=False)
        if groupby is not None and groupby not in table.obs:
            raise KeyError(f"`groupby`: obs has no column {groupby!r}; found {', '.join(table.obs.columns) or 'none'}.")
        if gene_symbols is not None and gene_symbols not in table.var:
            raise KeyError(
                f"`gene_symbols`: var has no column {gene_symbols!r}; found {', '.join(map(str, table.var)) or 'none'}."
            )
    counts = [get_counts(table, layer=layer, dense=False) for table in tables]
    shared = _shared_genes(tables, exclude, gene_symbols)
    totals = [np.asarray(c.sum(1)).ravel() for c in counts]
    counts = [c[:, table.var_names.get_indexer(shared)] for c, table in zip(counts, tables, strict=True)]
    varies = _varies(counts)
    if varies.sum() < (1 if at_most else n):
        constant = len(varies) - varies.sum()
        raise ValueError(
            f"Only {varies.sum()} genes are eligible in all "
            f"sections{f' ({constant} are constant)' if constant else ''}, {n} were asked for; pass a smaller n."
        )
    shared, counts = shared[varies], [c[:, varies] for c in counts]
    normalized = [_normalize(c, total) for c, total in zip(counts, totals, strict=True)]

    if flavor == "deg":
        groups = np.concatenate([table.obs[groupby].astype(str).to_numpy() for table in tables])
        names = _differential(sparse.vstack(normalized), groups, shared, n)
    else:
        eligible = np.ones(len(shared), dtype=bool)
        if flavor in ("hmhvg", "hvg"):
            eligible = np.any([_highly_variable(x, shared) for x in normalized], axis=0)
        scaled = counts if flavor != "mean_var" else normalized if transform == "log1p_norm" else map(np.log1p, counts)
        mean, variance = _moments(sparse.vstack(list(scaled)))
        rank = _rank(mean) if flavor == "hvg" else np.maximum(_rank(mean[eligible]), _rank(variance[eligible]))
        rank = rank[eligible] if flavor == "hvg" else rank
        names = list(shared[eligible][np.argsort(rank, kind="stable")][:n])
    if len(names) < (1 if at_most else n):
        raise ValueError(
            f"Only {len(names)} genes are eligible for flavor={flavor!r}, {n} were asked for; pass a smaller n."
        )
    entry = provenance(
        "pp.select_genes",
        flavor=flavor,
        n=n,
        groupby=groupby,
        exclude=exclude,
        gene_symbols=gene_symbols,
        layer=layer,
        sections=len(tables),
    )
    if key_added is not None:
        for table in tables:
            record(table, key_added, entry | {"genes": "\n".join(names)})
        logger.info("Selected %d genes (%s); the list is recorded in uns['stgen'][%r].", n, flavor, key_added)
    return names


def _sections(
    data: AnnData | SpatialData | Mapping[str, AnnData | SpatialData] | Iterable[AnnData | SpatialData],
) -> list[AnnData | SpatialData]:
    if isinstance(data, AnnData | SpatialData):
        return [data]
    sections = list(data.values()) if isinstance(data, Mapping) else list(data)
    if not sections:
        raise ValueError("There is no section to select genes from: `data` is empty.")
    return sections


def _shared_genes(tables: Sequence[AnnData], exclude: str | None, gene_symbols: str | None) -> pd.Index:
    """Genes that every table has, without those whose name, or symbol, matches ``exclude`` in any of them."""
    shared = tables[0].var_names
    for table in tables[1:]:
        shared = shared[shared.isin(table.var_names)]
    if exclude is None:
        return shared
    left_out = set()
    for table in tables:
        names = (
            table.var_names if gene_symbols is None else table.var[gene_symbols].astype(object).fillna("").astype(str)
        )
        left_out |= set(table.var_names[np.asarray(pd.Index(names).str.contains(exclude), bool)])
    if not left_out:
        _warn_of_names(tables[0], exclude, gene_symbols)
    return shared[~shared.isin(left_out)]


def _warn_of_names(table: AnnData, exclude: str, gene_symbols: str | None) -> None:
    """Say that ``exclude`` matched nothing, where that cannot be because there are no such genes."""
    names = table.var_names if gene_symbols is None else pd.Index(table.var[gene_symbols].astype(str))
    numbered = names.str.contains(_NUMBERED).mean() > 0.5
    if exclude == _MITOCHONDRIAL_OR_RIBOSOMAL and not numbered and table.n_vars < _WHOLE_TRANSCRIPTOME:
        return  # a panel without such genes
    column = next((name for name in SYMBOL_COLUMNS if name in table.var and name != gene_symbols), None)
    logger.warning(
        "exclude=%r matches none of the %d gene names%s, which look like %s: no gene is left out%s. %s", exclude, len(names),
        "" if gene_symbols is None else f" in var[{gene_symbols!r}]", ", ".join(map(str, names[:3])),
        ", mitochondrial and ribosomal ones neither" if exclude == _MITOCHONDRIAL_OR_RIBOSOMAL else "",
        f"The symbols may be in var[{column!r}]: pass gene_symbols={column!r}." if column is not None
        else "Pass gene_symbols=<column of var with the symbols>, another exclude=, or exclude=None.",
    )  # fmt: skip


def _varies(counts: Sequence[sparse.csr_array]) -> np.ndarray:
    """Whether a gene has different counts somewhere in the sections taken together."""
    lowest = np.min([c.min(0).toarray().ravel() for c in counts], axis=0)
    return np.max([c.max(0).toarray().ravel() for c in counts], axis=0) > lowest


def _normalize(counts: sparse.csr_array, total: np.ndarray) -> sparse.csr_array:
    """log1p of counts scaled to 10,000 per location, the total taken over all genes of the table."""
    scaled = sparse.csr_array(sparse.diags_array(TARGET_SUM / np.maximum(total, 1.0)) @ counts)
    scaled.data = np.log1p(scaled.data)
    return scaled.astype(np.float32)


def _moments(x: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    mean = np.asarray(x.mean(0)).ravel()
    return mean, np.asarray(x.multiply(x).mean(0)).ravel() - mean**2


def _rank(values: np.ndarray) -> np.ndarray:
    """0 for the highest."""
    rank = np.empty(len(values), dtype=int)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return rank


def _highly_variable(x: sparse.csr_array, names: pd.Index) -> np.ndarray:
    import scanpy as sc

    seen = np.asarray((x > 0).sum(0)).ravel() > 0
    if seen.sum() <= _PER_SECTION:
        return seen
    part = AnnData(sparse.csr_matrix(x[:, seen]), var=pd.DataFrame(index=names[seen]))
    sc.pp.highly_variable_genes(part, n_top_genes=_PER_SECTION)
    out = seen.copy()
    out[seen] = part.var["highly_variable"].to_numpy()
    return out


def _differential(x: sparse.csr_array, groups: np.ndarray, names: pd.Index, n: int) -> list[str]:
    import scanpy as sc

    names_of_groups, sizes = np.unique(groups, return_counts=True)
    labels = [label for label, size in zip(names_of_groups, sizes, strict=True) if size > 1 and label != "nan"]
    if len(labels) < 2:
        raise ValueError(f"flavor='deg' needs at least two groups of two locations, found {len(labels)}.")
    kept = np.isin(groups, labels)
    part = AnnData(sparse.csr_matrix(x[kept]), var=pd.DataFrame(index=names))
    part.obs["group"] = pd.Categorical(groups[kept])
    sc.tl.rank_genes_groups(part, "group", method="t-test", rankby_abs=False)
    ranked = part.uns["rank_genes_groups"]["names"]
    in_turn = (ranked[label][i] for i in range(len(names)) for label in labels)
    return list(dict.fromkeys(map(str, in_turn)))[:n]
