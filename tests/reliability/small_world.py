"""Small valid objects, one valid call of every public function on them, and fingerprints that show any change."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import spatialdata
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stgen import datasets, models, pp, tl

FACTOR = 4
TINY_MAPS = {"factor": FACTOR, "px_per_bin": 2, "bin_um": 20.0, "widths": [8, 8]}
TINY_STEM = {"width": 8, "depth": 1, "heads": 2, "genes_per_token": 1}
FEW = {"steps": 2, "batch_size": 4, "progress": False}
QUIET = {"progress": False}


class World:
    """A simulated section with every kind of result in it, models that were fitted, and a folder to write to.

    ``sdata`` is what all calls get. :meth:`renew` brings it back after a call that was right to change it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sdata = datasets.simulated_section(seed=1, size_um=480, mpp=2.0, n_genes=6, spot_pitch_um=70)
            self.genes = list(sdata["spot_counts"].var_names[:3])
            pp.embed(sdata, image_key="he", table_key="spot_counts", **QUIET)
            pp.rasterize(sdata, genes=self.genes, bin_um=20, bounds_um=(0, 0, 480, 480))
            pp.degrade(sdata, map_key="counts", factor=FACTOR)
            pp.segment_nuclei(sdata, image_key="he", min_area_um2=20, **QUIET)
            table = sdata["spot_counts"]
            table.layers["counts"] = table.X.copy()
            self.width = table.obsm["X_texture"].shape[1]
            self.probe = tl.fit(models.LinearProbe(self.genes, embedding_dim=self.width), table)
            self.stem = tl.fit(models.Stem(self.genes, embedding_dim=self.width, **TINY_STEM), table, **FEW)
            predict = {"table_key": "spot_counts", "n_samples": 3, "steps": 2, **QUIET}
            tl.predict_expression(sdata, model=self.stem, keep_samples=True, **predict)
            maps = {"map_key": "counts", "image_key": "he", "low_res": f"counts_{FACTOR}x", "tile": 8}
            more = {"width": 8, "mean_widths": [8, 8], "region": 4}
            self.diffst = tl.fit(models.DiffST(self.genes, **TINY_MAPS, **more), sdata, **maps, **FEW)
            self.unet = models.RegressionUNet(self.genes, **TINY_MAPS)
            tl.superresolve(sdata, "he", self.genes, low_res="spot_counts", bin_um=20, n_samples=2, **QUIET)
            tl.find_domains(sdata, map_key="counts", n_pcs=2)
            tl.bins_to_table(sdata, "counts", key_added="bins")
        self.pristine = sdata
        self.renew()
        self.models = {"probe": self.probe, "stem": self.stem, "diffst": self.diffst, "unet": self.unet}
        self.saved = self.probe.save(folder / "probe")

    def renew(self) -> None:
        """The objects as they were at first."""
        self.sdata = spatialdata.deepcopy(self.pristine)
        self.table = self.sdata["spot_counts"].copy()
        self.other = self.table[::-1].copy()
        self.other.X = self.other.X * 2

    @cached_property
    def scores(self) -> tl.Scores:
        return tl.evaluate(self.pristine, table_key="spot_counts")

    @cached_property
    def correlation(self) -> tl.GeneCorrelation:
        return tl.gene_correlation(self.pristine, table_key="spot_counts")

    def fingerprint(self) -> dict[str, str]:
        """Everything that a refused call must leave as it was."""
        state = fingerprint_of_section(self.sdata) | {
            f"table {k}": v for k, v in fingerprint_of_table(self.table).items()
        }
        state |= {f"model {name}": fingerprint_of_model(model) for name, model in self.models.items()}
        return state | {f"file {name}": digest for name, digest in fingerprint_of_folder(self.folder).items()}


# -- fingerprints --------------------------------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """A short hash of arrays, bytes and of whatever prints itself."""
    found = hashlib.blake2b(digest_size=12)
    for value in values:
        if hasattr(value, "tocsr"):
            value = value.tocsr()
            found.update(digest(value.data, value.indices, value.indptr).encode())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, pd.DataFrame):
            hashes = pd.util.hash_pandas_object(value.astype(str), index=True).to_numpy()
            found.update(f"{list(value.columns)}{list(map(str, value.dtypes))}".encode() + hashes.tobytes())
        else:
            found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()


def fingerprint_of_table(table: AnnData) -> dict[str, str]:
    """Of every part of a table."""
    state = {"X": digest(table.X), "obs": digest(table.obs), "var": digest(table.var), "uns": digest(dict(table.uns))}
    for part in ("layers", "obsm", "obsp", "varm"):
        state |= {f"{part} {name}": digest(value) for name, value in getattr(table, part).items()}
    return state


def fingerprint_of_section(sdata: SpatialData) -> dict[str, str]:
    """Of every element with its transformations, of every table, and of the attributes."""
    state = {"attrs": digest(dict(sdata.attrs))}
    for kind, name, element in sdata.gen_elements():
        if kind == "tables":
            state |= {f"{name} {part}": value for part, value in fingerprint_of_table(element).items()}
            continue
        where = repr({system: t.to_affine_matrix(("x", "y"), ("x", "y")).tolist()
                      for system, t in get_transformation(element, get_all=True).items()})  # fmt: skip
        if kind in ("images", "labels"):
            content = digest(
                np.asarray(element.data), np.asarray(element.coords["c"] if "c" in element.coords else 0).tolist()
            )
        elif kind == "shapes":
            content = digest(pd.DataFrame(element.drop(columns="geometry")), element.geometry.to_wkb().tolist())
        else:
            content = digest(list(element.columns), element.npartitions)
        state[f"{kind} {name}"] = digest(where, content, dict(element.attrs).keys())
    return state


def fingerprint_of_model(model: models.Model) -> str:
    """Of the weights, the arguments, the record and the mode."""
    weights = {name: digest(value.detach().cpu().numpy()) for name, value in model.state_dict().items()}
    return digest(weights, model.config, model.record, model.training, model.fitted)


def fingerprint_of_folder(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    return {str(path.relative_to(folder)): digest(path.read_bytes()) if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))}  # fmt: skip


# -- one valid call of every public function -----------------------------------------------------------------------------


def calls() -> dict[str, Callable[[World], dict[str, Any]]]:
    """A valid call of every public function and class, by name; behind a ``/`` another way to call the same."""
    spots = {"image_key": "he", "table_key": "spot_counts"}
    low_res = f"counts_{FACTOR}x"
    maps = {"map_key": "counts", "image_key": "he", "low_res": low_res, "tile": 8}
    made = {
        "pp.check_alignment": lambda w: {"data": w.sdata, **spots},
        "pp.degrade": lambda w: {"sdata": w.sdata, "map_key": "counts", "factor": 2},
        "pp.embed": lambda w: {"data": w.sdata, **spots, "key_added": "X_new", **QUIET},
        "pp.embed/shapes": lambda w: {"data": w.sdata, "image_key": "he", "shapes_key": "spots", "key_added": "X_new", **QUIET},
        "pp.name_micrometers": lambda w: {"sdata": w.sdata, "points_key": "transcripts", "coordinate_system": "um",
                                          "key_added": "microns"},
        "pp.rasterize": lambda w: {"sdata": w.sdata, "genes": w.genes, "key_added": "new"},
        "pp.segment_nuclei": lambda w: {"sdata": w.sdata, "image_key": "he", "key_added": "new", "min_area_um2": 20, **QUIET},
        "pp.select_genes": lambda w: {"data": w.sdata, "n": 3, "table_key": "spot_counts"},
        "pp.simulate_spots": lambda w: {"sdata": w.sdata, "points_key": "transcripts", "key_added": "new"},
        "pp.spots_to_map": lambda w: {"sdata": w.sdata, "table_key": "spot_counts", "map_key": "counts"},
        "pp.tile_grid": lambda w: {"sdata": w.sdata, "image_key": "he"},
        "tl.aggregate_cells": lambda w: {"sdata": w.sdata, "map_key": "counts", "shapes_key": "cells", "key_added": "new"},
        "tl.compare": lambda w: {"models": ["TrainingMean"], "data": {"a": w.table, "b": w.other}, "test": "b",
                                 "folder": w.folder / "comparison", "genes": w.genes, "n_samples": 2, "steps": 2,
                                 "allow_same_patient": True, **QUIET},
        "tl.evaluate": lambda w: {"data": w.sdata, "table_key": "spot_counts"},
        "tl.evaluate/maps": lambda w: {"data": w.sdata, "key": "superresolved", "truth_key": "counts"},
        "tl.find_domains": lambda w: {"data": w.sdata, "map_key": "counts", "n_pcs": 2, "key_added": "new"},
        "tl.fit": lambda w: {"model": w.stem, "data": w.table, "embedding_key": "X_texture", **FEW},
        "tl.fit/maps": lambda w: {"model": w.unet, "data": w.sdata, **maps, **FEW},
        "tl.fit/probe": lambda w: {"model": w.probe, "data": w.table},
        "tl.gene_correlation": lambda w: {"data": w.sdata, "table_key": "spot_counts"},
        "tl.localize_cell_types": lambda w: {"data": w.sdata, "table_key": "spot_counts", "key_added": "new",
                                             "markers": {"a": [w.genes[0]], "b": [w.genes[1]]}},
        "tl.predict_expression": lambda w: {"data": w.sdata, **spots, "key_added": "new", **QUIET},
        "tl.predict_expression/model": lambda w: {"data": w.table, "model": w.stem, "n_samples": 2, "steps": 2,
                                                  "key_added": "new", **QUIET},
        "tl.superresolve": lambda w: {"sdata": w.sdata, "image_key": "he", "genes": w.genes, "low_res": "spot_counts",
                                      "bin_um": 20.0, "n_samples": 2, "key_added": "new", **QUIET},
        "tl.superresolve/model": lambda w: {"sdata": w.sdata, "image_key": "he", "model": w.diffst, "low_res": low_res,
                                            "n_samples": 2, "steps": 2, "key_added": "new", **QUIET},
        "pl.calibration": lambda w: {"data": w.sdata, "table_key": "spot_counts"},
        "pl.domains": lambda w: {"data": w.sdata, "keys": "domains"},
        "pl.gene_correlation": lambda w: {"correlation": w.correlation},
        "pl.gene_scatter": lambda w: {"scores": {"a": w.scores, "b": w.scores}, "metric": "PCC"},
        "pl.gene_variation": lambda w: {"data": w.sdata, "table_key": "spot_counts"},
        "pl.history": lambda w: {"model": w.stem},
        "pl.local_ssim": lambda w: {"sdata": w.sdata, "genes": w.genes[0], "truth_key": "counts"},
        "pl.maps": lambda w: {"data": w.sdata, "genes": w.genes[0], "table_key": "spot_counts"},
        "pl.maps/maps": lambda w: {"data": w.sdata, "genes": w.genes[0], "keys": "superresolved", "truth_key": "counts"},
        "pl.samples": lambda w: {"data": w.sdata, "pairs": [tuple(w.genes[:2])], "location": 0, "table_key": "spot_counts"},
        "pl.scores": lambda w: {"scores": {"a": w.scores}},
        "pl.report": lambda w: {"sdata": w.sdata, "key": "superresolved", "path": w.folder / "report.html"},
        "pp.to_spatialdata": lambda w: {"adata": w.table, "mpp": 1.0, "spot_um": 55.0},
        "tl.bins_to_table": lambda w: {"sdata": w.sdata, "map_key": "counts", "key_added": "new"},
        "tl.table_to_map": lambda w: {"sdata": w.sdata, "table_key": "bins", "key_added": "new"},
        "io.write_geojson": lambda w: {"sdata": w.sdata, "key": "spots", "path": w.folder / "spots.geojson"},
        "io.write_ome_tiff": lambda w: {"sdata": w.sdata, "map_key": "counts", "path": w.folder / "map.ome.tiff"},
        "io.write_table": lambda w: {"data": w.sdata, "path": w.folder / "table.csv", "table_key": "spot_counts"},
        "models.FeaturePredictor": lambda w: {"model": w.probe},
        "models.load": lambda w: {"path": w.saved},
        "datasets.her2st": lambda w: {"section": "B4", "path": w.folder},
        "datasets.mouse_olfactory_bulb": lambda w: {"section": "MOB1", "path": w.folder},
        "datasets.simulated_section": lambda w: {"size_um": 320.0, "mpp": 4.0, "n_genes": 4},
        "datasets.xenium_pancreas": lambda w: {"path": w.folder},
    }  # fmt: skip
    constructors = {
        "C3Diff": {**TINY_MAPS, "width": 8, "code": 8, "control_widths": [8, 8]},
        "DiffST": {**TINY_MAPS, "width": 8, "mean_widths": [8, 8], "region": 4},
        "HaDMST": {**TINY_MAPS, "width": 8, "mean_widths": [8, 8], "token": 2},
        "Interpolate": {"factor": FACTOR},
        "KernelRegression": {},
        "LinearProbe": {"embedding_dim": 4},
        "PixelProbe": {"factor": FACTOR},
        "RegressionUNet": TINY_MAPS,
        "Retrieval": {"embedding_dim": 4},
        "Stem": {"embedding_dim": 4, **TINY_STEM},
        "TrainingMean": {"embedding_dim": 4},
    }
    for name, options in constructors.items():
        made[f"models.{name}"] = lambda w, options=options: {"genes": list(w.genes), **options}
    return made


UNABLE = ("datasets.her2st", "datasets.mouse_olfactory_bulb", "datasets.xenium_pancreas")
"""Functions whose valid call needs files that nobody may give away: only their refusals are tried."""


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor what stgen logs below an error."""
    logger = logging.getLogger("stgen")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
