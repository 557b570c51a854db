"""The sections of a comparison: tables of our own, genes, and hashes that tell other data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from stgen._spatial.counts import get_counts
from stgen._spatial.section import get_section, get_table
from stgen._spatial.tables import embedding_key_of, embedding_record, expression
from stgen.pp import select_genes
from stgen.tl.fitting.fit import Data

__all__ = ["ELSEWHERE", "choose_genes", "hashes", "named", "own_tables"]

ELSEWHERE = ("key", "image_mpp")  # of the record of an embedding: what may differ


def own_tables(
    data: Mapping[str, Data], names: Sequence[str], embedding_key: str | None, table_key: str | None, layer: str | None
) -> tuple[str, dict[str, AnnData]]:
    """The key of the embedding, and tables of our own with counts, coordinates and the embedding."""
    tables: dict[str, AnnData] = {}
    first: dict[str, Any] = {}
    for name in names:
        with named(f"section {name!r}"):
            table = get_table(data[name], table_key=table_key)
            expression(table, [], "none", layer=layer)  # refuses a prediction
            counts = sparse.csr_matrix(get_counts(table, layer=layer, dense=False), copy=True)
            counts.eliminate_zeros()
            counts.sum_duplicates()
            xy = get_section(data[name], table_key=table_key).xy_px
            embedding_key = embedding_key_of(table, embedding_key)
            found = embedding_record(table, embedding_key)
        first = first or found
        differing = [k for k in {**first, **found} if k not in ELSEWHERE and found.get(k) != first.get(k)]
        if differing:
            raise ValueError(
                f"section {name!r} was embedded otherwise than {names[0]!r}: "
                + "; ".join(f"{k} is {found.get(k)!r}, not {first.get(k)!r}" for k in differing)
                + ". Embed all in the same way with stgen.pp.embed."
            )
        embeddings = {k: np.asarray(table.obsm[k]) for k in _embedding_keys(table, embedding_key)}
        record = {k: v for k, v in table.uns.get("stgen", {}).items() if k == embedding_key}
        tables[name] = AnnData(
            counts,
            obs=table.obs.drop(columns="predicted", errors="ignore"),  # where predictions are going to be
            var=pd.DataFrame(index=table.var_names),
            obsm=embeddings | {"spatial": xy},
            uns={"stgen": record},
        )
    return first["key"], tables


def _embedding_keys(table: AnnData, key: str) -> list[str]:
    return [k for k in (key, f"{key}_views") if k in table.obsm]


def choose_genes(
    train: Mapping[str, AnnData], test: Mapping[str, AnnData], n: int, options: Mapping[str, Any]
) -> list[str]:
    """The best genes by the training sections, of those that the test sections measure too."""
    everything = min(table.n_vars for table in train.values())
    ranked = select_genes(train, everything, at_most=True, key_added=None, **options)
    shared = [gene for gene in ranked if all(gene in table.var_names for table in test.values())]
    if len(shared) < n:
        raise ValueError(
            f"{len(shared)} genes are eligible in the training sections and measured in the test sections; {n} were "
            "asked for. Pass a smaller genes=."
        )
    return shared[:n]


def hashes(table: AnnData, key: str) -> dict[str, Any]:
    """Size and hashes of all that the numbers depend on."""
    x, names = table.X, np.frombuffer("\n".join(table.var_names).encode(), np.uint8)
    parts = {
        "counts": (names, x.indptr.astype("<i8"), x.indices.astype("<i8"), x.data.astype("<f4")),
        "locations": (table.obsm["spatial"].astype("<f8"),),
        "embedding": [table.obsm[k].astype("<f4") for k in _embedding_keys(table, key)],
    }
    hashes = {}
    for name, arrays in parts.items():
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        hashes[name] = digest.hexdigest()
    return {"n_locations": table.n_obs, "n_genes": table.n_vars, **hashes}


@contextmanager
def named(what: str) -> Iterator[None]:
    """Say of which section or model an error is."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error.args[0]}") from error
