"""Where a prediction is made and where it goes: locations, their embedding, and the user's object."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stgen._io import check_new_key, get_table, record, write_table
from stgen.models import Model
from stgen.pp import embed, tile_grid
from stgen.tl._inputs import embedding_key_of, embedding_record

__all__ = ["Target"]

logger = logging.getLogger("stgen")


@dataclass
class Target:
    """Where a prediction is made and where it goes, with everything new kept apart until it is complete."""

    data: SpatialData | AnnData  # the user's object
    work: SpatialData | AnnData  # shares images and shapes with the user's object; its table is our own
    table: AnnData  # the table of `work`: rows, coordinates, embeddings
    user_table: AnnData | None  # the user's table, if the locations have one
    table_key: str | None
    shapes_key: str | None  # of locations that have no table yet
    new_shapes: bool  # whether the locations themselves are new
    embedded: bool = False  # whether the embedding is new

    @classmethod
    def find(
        cls,
        data: SpatialData | AnnData,
        *,
        image_key: str | None,
        table_key: str | None,
        shapes_key: str | None,
        key_added: str,
    ) -> Target:
        """Find the locations; make a grid of tiles over the tissue where there are none."""
        if isinstance(data, AnnData):
            light = light_table(data)
            return cls(data, light, light, data, None, None, False)
        if not isinstance(data, SpatialData):
            raise TypeError(f"Expected a SpatialData or AnnData object, found {type(data).__name__}.")
        work = SpatialData(images=dict(data.images), labels=dict(data.labels), shapes=dict(data.shapes))
        linked = shapes_key is None or any(shapes_key in regions(table) for table in data.tables.values())
        if data.tables and linked:
            user_table = get_table(data, table_key=table_key, shapes_key=shapes_key)
            table_key = next(key for key, table in data.tables.items() if table is user_table)
            work.tables[table_key] = light_table(user_table)
            return cls(data, work, work.tables[table_key], user_table, table_key, shapes_key, False)
        new_shapes = shapes_key is None
        if new_shapes:
            shapes_key = f"{key_added}_tiles"
            tile_grid(work, image_key=image_key, key_added=shapes_key, table_key_added=key_added)
        elif shapes_key not in data.shapes:
            raise KeyError(f"there are no shapes {shapes_key!r}; found {', '.join(data.shapes) or 'none'}.")
        else:
            write_table(
                work, key_added, AnnData(obs=pd.DataFrame(index=data[shapes_key].index.astype(str))), region=shapes_key
            )
        return cls(data, work, work.tables[key_added], None, key_added, shapes_key, new_shapes)

    def check_keys(self, genes: list[str], key_added: str, *, overwrite: bool) -> bool:
        """Refuse keys that exist; say whether the result goes to layers of the user's table (or to a new table)."""
        table = self.user_table
        missing = [] if table is None else [gene for gene in genes if gene not in table.var_names]
        if missing and isinstance(self.data, AnnData):
            raise KeyError(
                f"{len(missing)} of the {len(genes)} genes to predict are not in the table: {', '.join(missing[:5])}. "
                "Pass genes=[...] with those that are, or a SpatialData, which gets a new table."
            )
        if table is not None and not missing:
            for container, what in ((table.layers, "layers"), (table.uns.get("stgen", {}), 'uns["stgen"]')):
                check_new_key(container, key_added, overwrite=overwrite, what=what)
            if key_added in table.obs or (key_added in table.var and key_added not in table.layers):
                raise ValueError(
                    f"var[{key_added!r}] or obs[{key_added!r}] is in use already; pass another key_added=."
                )
            return True
        check_new_key(self.data.tables, key_added, overwrite=overwrite, what="sdata.tables")
        if self.new_shapes:
            check_new_key(self.data.shapes, self.shapes_key, overwrite=overwrite, what="sdata.shapes")
        return False

    def embedding(
        self,
        model: Model | None,
        embedding_key: str | None,
        *,
        image_key: str | None,
        device: str,
        progress: bool,
    ) -> str:
        """Key of an embedding of the model's kind in the target's table, computed there if need be."""
        table = self.table
        trained = model.record["embedding"] if model is not None and model.fitted else None
        if trained is None:
            if embedding_key is not None or image_key is None:
                return embedding_key_of(table, embedding_key)
            trained = {"key": "X_texture", "model": "texture", "by_name": True}
        key = embedding_key or trained["key"]
        if key not in table.obsm:
            if embedding_key is not None or not trained.get("by_name", False):
                embedding_key_of(table, key)  # raises, and says what to call
            embed(
                self.work,
                image_key=image_key,
                table_key=self.table_key,
                key_added=key,
                device=device,
                progress=progress,
                **recipe_of(trained),
            )
            self.embedded = True
        found = embedding_record(table, key)
        differing = [k for k in trained if k != "key" and found.get(k) != trained[k]]
        if differing:
            raise ValueError(
                f'obsm["{key}"] is not the embedding that the model was fitted on: '
                + "; ".join(f"{k} is {found.get(k)!r}, not {trained[k]!r}" for k in differing)
                + ". Name another embedding_key=, or remove it to have the right one computed from the image."
            )
        return key

    def write(
        self,
        samples: np.ndarray,
        predicted: np.ndarray,
        genes: list[str],
        entry: dict[str, Any],
        *,
        key_added: str,
        as_layers: bool,
        embedding_key: str,
        keep_samples: bool,
        overwrite: bool,
    ) -> None:
        """Put the finished result into the user's object."""
        values = {key_added: predicted.astype(np.float32)}
        if samples.shape[1] > 1:
            values[f"{key_added}_std"] = samples.std(1)  # of centered noise: the population form is unbiased
        table = self.user_table
        if not as_layers:
            table = AnnData(values.pop(key_added), obs=self.table.obs.copy(), var=pd.DataFrame(index=genes))
            table.layers.update(values)
            table.uns["spatialdata_attrs"] = self.table.uns["spatialdata_attrs"]
        else:
            for container, name in ((table.layers, f"{key_added}_std"), (table.obsm, f"{key_added}_samples")):
                container.pop(name, None)  # of an earlier result of the same name
        if as_layers and genes == list(table.var_names):
            table.layers.update(values)
            table.var[key_added] = True
        elif as_layers:
            columns = table.var_names.get_indexer(genes)
            for name, value in values.items():
                full = np.full(table.shape, np.nan, np.float32)
                full[:, columns] = value
                table.layers[name] = full
            table.var[key_added] = np.isin(np.arange(table.n_vars), columns)
        if keep_samples:
            table.obsm[f"{key_added}_samples"] = samples
            entry = {**entry, "sample_genes": "\n".join(genes)}
        if self.embedded or not as_layers:
            table.obsm[embedding_key] = self.table.obsm[embedding_key]
            record(table, embedding_key, self.table.uns.get("stgen", {}).get(embedding_key, {}))
        record(table, key_added, entry)
        where = f'layers["{key_added}"]' if as_layers else f'sdata.tables["{key_added}"]'
        if not as_layers:
            if self.new_shapes:
                self.data.shapes[self.shapes_key] = self.work.shapes[self.shapes_key]
            if overwrite and key_added in self.data.tables:
                del self.data.tables[key_added]
            self.data.tables[key_added] = table
        hint = "adata.write_zarr(path)" if isinstance(self.data, AnnData) else "sdata.write(path)"
        logger.info("predicted %d genes at %d locations into %s; %s saves it.", len(genes), len(samples), where, hint)


def light_table(table: AnnData) -> AnnData:
    """Rows, coordinates and embeddings of a table, without its counts."""
    kept = {key: table.uns[key] for key in ("spatial", "spatialdata_attrs", "stgen") if key in table.uns}
    return AnnData(obs=table.obs.copy(), obsm=dict(table.obsm), uns=kept)


def regions(table: AnnData) -> list[str]:
    regions = table.uns.get("spatialdata_attrs", {}).get("region", [])
    return [regions] if isinstance(regions, str) else list(regions)


def recipe_of(trained: dict[str, Any]) -> dict[str, Any]:
    """What :func:`stgen.pp.embed` must be told to embed as it did for the training tissue."""
    recipe = {"model": trained["model"]}
    if "+" not in trained["model"] and "patch_um" in trained:  # several encoders have their own default patches
        recipe["patch_um"] = [float(side) for side in str(trained["patch_um"]).split(",")]
        recipe["patch_px"] = int(trained["patch_px"])
    return recipe
