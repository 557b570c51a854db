"""Which row of a table belongs to which instance of an element: checked here, before anything is matched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from stgen._checks import listed

__all__ = ["check_element_ids", "check_row_names", "position_of"]


def check_row_names(table: AnnData, name: str = "The table") -> None:
    """Refuse rows of one name: results are given back by them.

    Raises
    ------
    ValueError
        If a name occurs more than once.
    """
    if not table.obs_names.is_unique:
        twice = table.obs_names[table.obs_names.duplicated()].unique()
        raise ValueError(
            f"{name} has {len(twice)} names of rows (obs_names) more than once ({listed(twice)}); run "
            "adata.obs_names_make_unique() first."
        )


def check_element_ids(element: Any, key: str) -> None:
    """Refuse an element of which two instances have one id.

    Raises
    ------
    ValueError
        If an id occurs more than once, as after elements were put together.
    """
    index = getattr(element, "index", None)
    if isinstance(index, pd.Index) and not index.is_unique:
        twice = index[index.duplicated()].unique()
        raise ValueError(
            f"{key!r} has {len(twice)} ids (its index) more than once ({listed(twice)}), so it is not known which "
            f"instance a row belongs to. Number them anew, and the tables that annotate it: sdata[{key!r}].index = "
            f"range(len(sdata[{key!r}]))."
        )


def position_of(ids: pd.Series, element: Any, index: pd.Index, *, region: str, table_key: str) -> np.ndarray:
    """The position in ``index``, the instances of the element ``region``, of each row of a table.

    Raises
    ------
    ValueError
        If an id occurs more than once in the element or in the table, is text in one and a number in the other, or is
        not in the element.
    """
    check_element_ids(element, region)
    instances = pd.Index(ids)
    column = f"obs[{str(ids.name)!r}]"
    if isinstance(instances, pd.CategoricalIndex):
        instances = pd.Index(instances.astype(instances.categories.dtype))
    if not instances.is_unique:
        twice = instances[instances.duplicated()].unique()
        raise ValueError(
            f"{len(twice)} instances of {region!r} have more than one row in the table {table_key!r} ({listed(twice)} "
            f"in {column}). Keep one row of each: table[~table.obs[{str(ids.name)!r}].duplicated()].copy()."
        )
    here, there = _kind(instances), _kind(index)
    if {here, there} == {"text", "whole numbers"}:
        to = "int" if there == "whole numbers" else "str"
        raise ValueError(
            f"The ids of the table {table_key!r} are {here} ({column}: {listed(map(repr, instances[:3]))}) and those "
            f"of {region!r} are {there} ({listed(map(repr, index[:3]))}): the types must be equal. Bring them to one: "
            f"table.{column} = table.{column}.astype({to})."
        )
    position = index.get_indexer(instances)
    if (position < 0).any():
        missing = instances[position < 0]
        raise ValueError(
            f"{len(missing)} rows of the table {table_key!r} point at instances that {region!r} does not have "
            f"({listed(missing)}). Match them with sdata.filter_by_coordinate_system or "
            "spatialdata.match_table_to_element."
        )
    return np.asarray(position)


def _kind(ids: pd.Index) -> str:
    kind = pd.api.types.infer_dtype(ids, skipna=True)
    if kind in ("integer", "floating", "mixed-integer-float"):
        return "whole numbers"
    return "text" if kind in ("string", "bytes") else kind
