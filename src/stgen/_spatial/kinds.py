"""Histology and maps of genes lie side by side in ``sdata.images``: neither is taken for the other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from spatialdata import SpatialData
from xarray import DataArray, DataTree

from stgen._checks import listed

__all__ = ["check_gene_map", "check_histology"]

MAKERS = {"pp.rasterize", "pp.degrade", "pp.spots_to_map", "pp.simulate_spots", "tl.superresolve", "tl.table_to_map",
          "tl.localize_cell_types"}  # fmt: skip
"""Functions whose images are maps, by their records."""

COLORS = {"r", "g", "b", "a", "red", "green", "blue", "alpha"}


def check_histology(sdata: SpatialData, key: str) -> None:
    """Refuse a map of genes where a picture of the tissue is asked for.

    Raises
    ------
    ValueError
        If its record says so, or its values are no whole numbers and all of its channels are genes of a table.
    """
    entry = sdata.attrs.get("stgen", {}).get(key)
    maker = entry.get("function") if isinstance(entry, Mapping) else None
    element = sdata.images[key]
    names = _channels(element)
    genes = np.issubdtype(_finest(element).dtype, np.floating) and any(
        names and table.n_vars and set(names) <= set(table.var_names) for table in sdata.tables.values()
    )
    if maker in MAKERS or genes:
        why = f"{maker} made it" if maker in MAKERS else "its channels are genes of a table"
        raise ValueError(
            f"The image {key!r} is a map ({why}; {listed(names)}), not the histology. Pass image_key=<the picture of "
            f"the tissue>; sdata.images has {listed(sdata.images)}."
        )


def check_gene_map(element: DataArray | DataTree, key: str) -> None:
    """Refuse a picture of the tissue where a map of genes is asked for.

    Raises
    ------
    ValueError
        If its channels are colors, or it is three or four numbered channels of whole numbers.
    """
    names = _channels(element)
    whole = np.issubdtype(_finest(element).dtype, np.integer)
    numbered = whole and all(re.fullmatch(r"\d+", name) for name in names)
    if len(names) in (3, 4) and ({name.lower() for name in names} <= COLORS or numbered):
        raise ValueError(
            f"The image {key!r} is a picture with the channels {listed(names)}, no map of genes. Name a map of counts, "
            "as stgen.pp.rasterize or stgen.tl.superresolve makes one; a picture is image_key=."
        )


def _finest(element: DataArray | DataTree) -> DataArray:
    if isinstance(element, DataArray):
        return element
    level: DataArray = next(iter(next(iter(element.children.values())).data_vars.values()))
    return level


def _channels(element: DataArray | DataTree) -> list[str]:
    finest = _finest(element)
    return [str(name) for name in finest.coords["c"].values] if "c" in finest.coords else []
