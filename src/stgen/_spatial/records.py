"""Results: where they go, and the record of how they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel

if TYPE_CHECKING:
    from spatialdata.transformations import BaseTransformation

__all__ = [
    "check_free_key",
    "check_new_key",
    "copied_table",
    "made_by",
    "provenance",
    "record",
    "recorded_layer",
    "shallow_copy",
    "write_circles",
    "write_image",
    "write_table",
]


def check_new_key(container: Mapping[str, Any], key: str, *, overwrite: bool, what: str, ours: bool = True) -> None:
    """Refuse a key that exists, unless it may be overwritten and, in ``ours``, is a result of the package."""
    if key in container and not overwrite:
        raise ValueError(f"{what}[{key!r}] exists already. Pass overwrite=True to replace it, or another key_added=.")
    if key in container and not ours:
        raise ValueError(
            f"{what}[{key!r}] is not a result of this function by its record, and is not replaced. Pass another "
            f"key_added=, or first remove it: del {what if what.startswith('sdata.') else 'adata.' + what}[{key!r}]."
        )


def check_free_key(sdata: SpatialData, kind: str, key: str, *, overwrite: bool, ours: bool) -> None:
    """Refuse a key that exists, unless it is an earlier result of the same function (``ours``) that may be overwritten."""
    container = getattr(sdata, kind)
    check_new_key(container, key, overwrite=overwrite, what=f"sdata.{kind}", ours=ours)
    if key in sdata and key not in container:
        raise ValueError(
            f"{key!r} is the name of another element, which is not in sdata.{kind}; pass another key_added=."
        )


def made_by(obj: AnnData | SpatialData, key: str, function: str) -> bool:
    """Whether the record says that a function of this package made what has this name."""
    store = obj.uns if isinstance(obj, AnnData) else obj.attrs
    entry = store.get("stgen", {}).get(key)
    return isinstance(entry, Mapping) and entry.get("function") == function


def provenance(function: str, **parameters: Any) -> dict[str, Any]:
    """A record of a result as scalars and dicts, which survive every store; None is left out."""
    entry = {"function": function}
    entry |= {name: _plain(value) for name, value in parameters.items() if value is not None}
    return entry | {"version": version("stgen")}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | pd.Index | list | tuple | set | range):
        items = [str(item) for item in (sorted(value) if isinstance(value, set) else value)]
        if len(items) <= 16:
            return ", ".join(items)
        return {"n": len(items), "sha256": hashlib.sha256("\n".join(items).encode()).hexdigest()}
    return str(value)


def record(obj: AnnData | SpatialData, key: str, entry: Mapping[str, Any]) -> None:
    """Keep ``entry`` under ``uns["stgen"][key]`` (AnnData) or ``attrs["stgen"][key]`` (SpatialData)."""
    store = obj.uns if isinstance(obj, AnnData) else obj.attrs
    kept = dict(store.get("stgen", {}))
    kept[key] = dict(entry)
    store["stgen"] = kept


def recorded_layer(sdata: SpatialData, keys: Sequence[str], low_res: str) -> str | None:
    """The layer of the table ``low_res`` that the first of some results made from it took its counts from; None: ``X``."""
    entries = [sdata.attrs.get("stgen", {}).get(key, {}) for key in keys]
    return next((entry.get("layer") for entry in entries if entry.get("low_res") == low_res), None)


def write_image(
    sdata: SpatialData,
    key: str,
    values: np.ndarray | da.Array,
    *,
    channels: Sequence[str],
    transformations: Mapping[str, BaseTransformation],
    overwrite: bool = False,
) -> None:
    """Add a float32 image ``(c, y, x)`` with named channels, one channel per chunk."""
    check_new_key(sdata.images, key, overwrite=overwrite, what="sdata.images")
    chunks = (1, min(512, values.shape[1]), min(512, values.shape[2]))
    image = Image2DModel.parse(
        values.astype(np.float32, copy=False),
        dims=("c", "y", "x"),
        c_coords=list(channels),
        transformations=dict(transformations),
        chunks=chunks,
    )
    sdata.images[key] = image


def write_table(
    sdata: SpatialData,
    key: str,
    table: AnnData,
    *,
    region: str,
    region_key: str = "region",
    instance_key: str = "instance_id",
    overwrite: bool = False,
) -> None:
    """Add a table that annotates the element ``region``; its rows are in the element's order."""
    check_new_key(sdata.tables, key, overwrite=overwrite, what="sdata.tables")
    table.obs[region_key] = pd.Categorical([region] * table.n_obs)
    table.obs[instance_key] = np.asarray(sdata[region].index)
    table.uns.pop("spatialdata_attrs", None)
    sdata.tables[key] = TableModel.parse(table, region=region, region_key=region_key, instance_key=instance_key)


def write_circles(
    sdata: SpatialData,
    key: str,
    xy: np.ndarray,
    *,
    radius: float,
    transformations: Mapping[str, BaseTransformation],
    overwrite: bool = False,
) -> None:
    """Add circles of one size, numbered from 0, at ``xy`` (n, 2)."""
    check_new_key(sdata.shapes, key, overwrite=overwrite, what="sdata.shapes")
    sdata.shapes[key] = ShapesModel.parse(
        xy, geometry=0, radius=radius, index=np.arange(len(xy)), transformations=dict(transformations)
    )


def shallow_copy(sdata: SpatialData) -> SpatialData:
    """A new object that shares images, labels, points and shapes, and has its own copies of the tables."""
    tables = {key: table.copy() for key, table in sdata.tables.items()}
    return SpatialData(
        images=dict(sdata.images),
        labels=dict(sdata.labels),
        points=dict(sdata.points),
        shapes=dict(sdata.shapes),
        tables=tables,
        attrs=dict(sdata.attrs),
    )


def copied_table(table: AnnData) -> AnnData:
    """A copy of a table, in memory."""
    return table.to_memory() if table.isbacked else table.copy()
