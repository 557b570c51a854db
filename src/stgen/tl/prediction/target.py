"""Where a prediction is made and where it goes: locations, their embedding, and the user's object."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stgen._spatial.identity import check_element_ids
from stgen._spatial.image import is_micrometers, slide_mpp
from stgen._spatial.library import library_of
from stgen._spatial.records import check_new_key, made_by, record, shallow_copy, write_table
from stgen._spatial.section import Section, find_image, get_section, get_table
from stgen._spatial.tables import embedding_key_of, embedding_record, predicted_in_x, recorded_embeddings
from stgen.pp import embed, tile_grid

__all__ = ["Prediction", "Target"]

logger = logging.getLogger("stgen")


@dataclass(frozen=True)
class Prediction:
    """What was predicted of some locations."""

    expected: np.ndarray
    """Shape ``(n, G)``."""
    std: np.ndarray | None = None
    """Spread, of the same shape."""
    samples: np.ndarray | None = None
    """Samples that are to be kept, ``(n, n_samples, G)``."""
    embedding_key: str | None = None
    """The embedding that was looked at."""
    fold: np.ndarray | None = None
    """The part of the section that each location was left out with, shape ``(n,)``."""


@dataclass
class Target:
    """Where a prediction is made and where it goes, with everything new kept apart until it is complete."""

    data: SpatialData | AnnData  # the user's object
    key_added: str
    user_table: AnnData | None  # the user's table of measurements, if the locations have one
    table_key: str | None  # its key, or that of the new table
    shapes_key: str | None  # of locations that have no such table; None if they are still to be laid
    work: SpatialData | AnnData  # shares images and shapes with the user's object; its table is our own
    table: AnnData | None  # the table of `work`: rows, coordinates, embeddings; None until locations are laid
    new_shapes: bool = False  # whether the locations themselves are new
    embedded: bool = False  # whether the embedding is new

    @classmethod
    def find(
        cls, data: SpatialData | AnnData, *, table_key: str | None, shapes_key: str | None, key_added: str
    ) -> Target:
        """Find the locations, without any work yet.

        They are the rows of a table of measurements, or else shapes (also those of an earlier prediction), or else
        tiles that :meth:`embed` will lay.
        """
        if isinstance(data, AnnData):
            light = light_table(data)
            return cls(data, key_added, data, None, None, light, light)
        if not isinstance(data, SpatialData):
            raise TypeError(f"Expected a SpatialData or AnnData object, found {type(data).__name__}.")
        if shapes_key is not None and shapes_key not in data.shapes:
            raise KeyError(f"there are no shapes {shapes_key!r}; found {', '.join(data.shapes) or 'none'}.")
        work = SpatialData(images=dict(data.images), labels=dict(data.labels), shapes=dict(data.shapes))
        predicted = {key: table for key, table in data.tables.items() if predicted_in_x(table) is not None}
        measured = {key: table for key, table in data.tables.items() if key not in predicted}
        linked = shapes_key is None or any(shapes_key in regions(table) for table in measured.values())
        if table_key in predicted:
            shapes_key = shapes_key or regions(predicted[table_key])[0]
        elif table_key is not None or (measured and linked):
            if table_key is None and shapes_key is None and len(measured) == 1:
                table_key = next(iter(measured))
            user_table = get_table(data, table_key=table_key, shapes_key=shapes_key)
            table_key = next(key for key, table in data.tables.items() if table is user_table)
            work.tables[table_key] = light_table(user_table)
            return cls(data, key_added, user_table, table_key, None, work, work.tables[table_key])
        elif predicted and shapes_key is None:
            shapes_key = regions(next(iter(predicted.values())))[0]
        target = cls(data, key_added, None, key_added, shapes_key, work, None, new_shapes=shapes_key is None)
        if shapes_key is not None:
            check_element_ids(data[shapes_key], shapes_key)
            rows = AnnData(obs=pd.DataFrame(index=data[shapes_key].index.astype(str)))
            write_table(work, key_added, rows, region=shapes_key)
            target.table = work.tables[key_added]
        return target

    def check_keys(self, genes: list[str], *, overwrite: bool) -> bool:
        """Refuse keys that exist; say whether the result goes to layers of the user's table (or to a new table)."""
        table, key = self.user_table, self.key_added
        missing = [] if table is None else [gene for gene in genes if gene not in table.var_names]
        if missing and isinstance(self.data, AnnData):
            raise KeyError(
                f"{len(missing)} of the {len(genes)} genes to predict are not in the table: {', '.join(missing[:5])}. "
                "Pass genes=[...] with those that are, or a SpatialData, which gets a new table."
            )
        if table is None or missing:
            check_new_key(self.data.tables, key, overwrite=overwrite, what="sdata.tables")
            if key in self.data.tables and predicted_in_x(self.data.tables[key]) is None:
                raise ValueError(
                    f"sdata.tables[{key!r}] is not a prediction and is not replaced; pass another key_added=."
                )
            if self.new_shapes:
                tiles = f"{key}_tiles"
                ours = made_by(self.data, tiles, "pp.tile_grid")
                check_new_key(self.data.shapes, tiles, overwrite=overwrite, what="sdata.shapes", ours=ours)
            if missing:
                logger.warning(
                    "%d of the %d genes to predict are not in %r (%s): the prediction goes into X of a table of its "
                    "own, sdata.tables[%r]. For layers beside the counts, name genes=[...] that are in it.",
                    len(missing), len(genes), self.table_key, ", ".join(missing[:5]), key,
                )  # fmt: skip
            return False
        ours = made_by(table, key, "tl.predict_expression")
        for container, what, name in (
            (table.layers, "layers", key),
            (table.layers, "layers", f"{key}_std"),
            (table.obsm, "obsm", f"{key}_samples"),
            (table.obs, "obs", f"{key}_fold"),
            (table.uns.get("stgen", {}), 'uns["stgen"]', key),
        ):
            check_new_key(container, name, overwrite=overwrite, what=what, ours=ours)
        if key in table.obs or (key in table.var and not ours):
            raise ValueError(f"var[{key!r}] or obs[{key!r}] is in use already; pass another key_added=.")
        return True

    def embed(
        self,
        trained: dict[str, Any] | None,
        embedding_key: str | None,
        *,
        image_key: str | None,
        mpp: float | None,
        device: str,
        progress: bool,
    ) -> str:
        """Key of an embedding like the one that was trained on, computed if need be; tiles are laid if need be."""
        self.lay_tiles(image_key, mpp)
        rows = self.rows
        if trained is None:
            images = self.work.images if isinstance(self.work, SpatialData) else library_of(self.work).images
            if embedding_key is not None or recorded_embeddings(rows) or not images:
                return embedding_key_of(rows, embedding_key)
            trained = {"key": "X_texture", "model": "texture", "by_name": True}
        key = embedding_key or trained["key"]
        if key not in rows.obsm:
            if embedding_key is not None or not trained.get("by_name", False):
                embedding_key_of(rows, key)  # raises, and says what to call
            embed(
                self.work, image_key=image_key, table_key=self.table_key, key_added=key, mpp=self._mpp(image_key, mpp),
                device=device, progress=progress, **recipe_of(trained),
            )  # fmt: skip
            self.embedded = True
        found = embedding_record(rows, key)
        differing = [k for k in trained if k not in ("key", "image_mpp") and found.get(k) != trained[k]]
        if differing:
            raise ValueError(
                f'obsm["{key}"] is not the embedding that the model was fitted on: '
                + "; ".join(f"{k} is {found.get(k)!r}, not {trained[k]!r}" for k in differing)
                + ". Name another embedding_key=, or remove it to have the right one computed from the image."
            )
        warn_of_resolution(found, trained)
        return key

    def lay_tiles(self, image_key: str | None, mpp: float | None) -> None:
        """A grid of tiles over the tissue, where there are no locations yet."""
        if self.table is not None:
            return
        self.shapes_key = f"{self.key_added}_tiles"
        tile_grid(
            self.work, image_key=image_key, mpp=self._mpp(image_key, mpp), key_added=self.shapes_key,
            table_key_added=self.key_added,
        )  # fmt: skip
        self.table = self.work.tables[self.key_added]

    def section(self, image_key: str | None, mpp: float | None) -> Section:
        """The locations, and the image on which they lie."""
        self.lay_tiles(image_key, mpp)
        of_tiles = None if isinstance(self.work, AnnData) else self.table_key
        return get_section(
            self.work, image_key=image_key, table_key=of_tiles, mpp=self._mpp(image_key, mpp), need_image=True
        )

    def _mpp(self, image_key: str | None, mpp: float | None) -> float | None:
        """µm per pixel of the image where only a ``WSIData`` knows them, which ``work`` is not."""
        if mpp is not None or not hasattr(self.data, "properties"):
            return mpp
        key = find_image(self.data, image_key)
        systems = get_transformation(self.data.images[key], get_all=True)
        return None if any(map(is_micrometers, systems)) else slide_mpp(self.data, key)

    @property
    def rows(self) -> AnnData:
        """The table of ``work``, once locations are there."""
        if self.table is None:
            raise RuntimeError("the locations are still to be laid; Target.embed does so.")
        return self.table

    def copy_data(self) -> SpatialData | AnnData:
        """Turn to a copy of the user's object, which is then the one to be written to."""
        if isinstance(self.data, AnnData):
            self.data = self.user_table = self.data.copy()
        else:
            self.data = shallow_copy(self.data)
            self.user_table = None if self.user_table is None else self.data.tables[self.table_key]
        return self.data

    def write(self, prediction: Prediction, genes: list[str], entry: dict[str, Any], *, as_layers: bool) -> None:
        """Put the finished result into the user's object."""
        key_added = self.key_added
        values = {key_added: prediction.expected.astype(np.float32)}
        if prediction.std is not None:
            values[f"{key_added}_std"] = prediction.std.astype(np.float32)
        rows, table = self.rows, self.user_table
        if not as_layers or table is None:
            table = AnnData(values.pop(key_added), obs=rows.obs.copy(), var=pd.DataFrame(index=genes))
            table.layers.update(values)
            table.uns["spatialdata_attrs"] = rows.uns["spatialdata_attrs"]
            if "spatial" in rows.obsm:
                table.obsm["spatial"] = rows.obsm["spatial"]
            entry = {**entry, "values_in": "X"}
        else:
            earlier = (
                (table.layers, f"{key_added}_std"),
                (table.obsm, f"{key_added}_samples"),
                (table.obs, f"{key_added}_fold"),
            )
            for container, name in earlier:  # of an earlier result of the same name
                if name in container:
                    del container[name]
        if prediction.fold is not None:
            table.obs[f"{key_added}_fold"] = pd.Categorical(prediction.fold)
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
        if prediction.samples is not None:
            table.obsm[f"{key_added}_samples"] = prediction.samples
            entry = {**entry, "sample_genes": "\n".join(genes)}
        embedding_key = prediction.embedding_key
        if embedding_key is not None and (self.embedded or not as_layers):
            table.obsm[embedding_key] = rows.obsm[embedding_key]
            record(table, embedding_key, rows.uns.get("stgen", {}).get(embedding_key, {}))
        record(table, key_added, entry)
        where = f'layers["{key_added}"]' if as_layers else f'sdata.tables["{key_added}"]'
        if not as_layers:
            if self.new_shapes:
                self.data.shapes[self.shapes_key] = self.work.shapes[self.shapes_key]
                for name, value in self.work.attrs.get("stgen", {}).items():
                    record(self.data, name, value)
            self.data.tables.pop(key_added, None)
            self.data.tables[key_added] = table
        hint = "adata.write_zarr(path)" if isinstance(self.data, AnnData) else "sdata.write(path)"
        logger.info(
            "predicted %d genes at %d locations into %s; %s saves it.",
            len(genes),
            len(prediction.expected),
            where,
            hint,
        )


def warn_of_resolution(found: dict[str, Any], trained: dict[str, Any]) -> None:
    """Say so if the embedding was read from an image much coarser or finer than the training tissue's."""
    if "image_mpp" not in found or "image_mpp" not in trained:
        return
    finest = min(float(side) for side in str(found["patch_um"]).split(",")) / float(
        str(found["patch_px"]).split(",")[0]
    )
    here, there = max(found["image_mpp"], finest), max(trained["image_mpp"], finest)
    if max(here, there) > 1.5 * min(here, there):
        logger.warning(
            "the embedding was read at %.3g µm per pixel and the model was fitted on one read at %.3g: morphology "
            "looks "
            "different at another resolution. Use images of similar resolution.", here, there,
        )  # fmt: skip


def light_table(table: AnnData) -> AnnData:
    """Rows, coordinates and embeddings of a table, without its counts."""
    kept = {key: table.uns[key] for key in ("spatial", "spatialdata_attrs", "stgen") if key in table.uns}
    return AnnData(obs=table.obs.copy(), obsm=dict(table.obsm), uns=kept)


def regions(table: AnnData) -> list[str]:
    regions = table.uns.get("spatialdata_attrs", {}).get("region", [])
    return [regions] if isinstance(regions, str) else list(regions)


def recipe_of(trained: dict[str, Any]) -> dict[str, Any]:
    """What :func:`stgen.pp.embed` must be told to embed as it did for the training tissue."""
    recipe: dict[str, Any] = {"model": trained["model"]}
    if "patch_um_given" in trained:
        recipe["patch_um"] = [float(side) for side in str(trained["patch_um_given"]).split(",")]
    if "patch_px_given" in trained:
        recipe["patch_px"] = int(trained["patch_px_given"])
    return recipe
