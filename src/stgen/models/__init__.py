"""Models: one contract, one place for each paper. Needs torch, numpy, pandas; no anndata, no spatialdata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stgen._checks import check_types
from stgen.models._base import DiffusionModel, Model, known_models
from stgen.models._baselines import LinearProbe, Retrieval, TrainingMean
from stgen.models._folder import locate, read
from stgen.models._lazyslide import FeaturePredictor
from stgen.models._map_baselines import Interpolate, PixelProbe, RegressionUNet
from stgen.models._map_diffusion import MapDiffusionModel
from stgen.models._map_maker import MapMaker
from stgen.models._maps import MapModel
from stgen.models.c3diff import C3Diff, C3DiffOptions
from stgen.models.diffst import DiffST, DiffSTOptions
from stgen.models.hadmst import HaDMST, HaDMSTOptions
from stgen.models.kernel_regression import KernelRegression
from stgen.models.stem import Stem, StemOptions

__all__ = [
    "C3Diff",
    "C3DiffOptions",
    "DiffST",
    "DiffSTOptions",
    "DiffusionModel",
    "FeaturePredictor",
    "HaDMST",
    "HaDMSTOptions",
    "Interpolate",
    "KernelRegression",
    "LinearProbe",
    "MapDiffusionModel",
    "MapMaker",
    "MapModel",
    "Model",
    "PixelProbe",
    "RegressionUNet",
    "Retrieval",
    "Stem",
    "StemOptions",
    "TrainingMean",
    "load",
]


@check_types
def load(path: str | Path, *, revision: str | None = None) -> Model[Any]:
    """Restore a fitted model, whatever its class.

    Parameters
    ----------
    path
        A folder that ``model.save(folder)`` wrote, or the id of a model on the Hugging Face Hub (``"owner/name"``),
        from which ``config.json`` and ``model.safetensors`` are taken. Nothing is unpickled.
    revision
        Commit, tag or branch of a model on the Hub, which pins what is loaded.

    Returns
    -------
    The model, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If there is neither a complete folder of that name nor such a model on the Hub.
    ValueError
        If there is no such class, here or among those that you have defined, or the folder is damaged: its files are
        not as they were written, do not fit each other, or hold weights that are NaN.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from stgen import models
    >>> from stgen.data import SpotData
    >>> model = models.TrainingMean(["A"], embedding_dim=2)
    >>> _ = model.fit(SpotData(np.ones((4, 1)), np.zeros((4, 2))))
    >>> model.record = {"note": "an example"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     restored = models.load(model.save(folder))
    >>> type(restored).__name__, restored.genes
    ('TrainingMean', ['A'])
    """
    folder = locate(path, revision)
    name, content = read(folder)
    known = known_models()
    if name not in known:
        raise ValueError(
            f"{folder} holds a {name!r}, which this version of stgen does not know; it knows {sorted(known)}. A "
            "class of your own must be defined, or imported, before its models are loaded."
        )
    if len(known[name]) > 1:
        raise ValueError(
            f"several modules define a model {name!r}: {', '.join(sorted(known[name]))}. Load it with its class: "
            f"{name}.load(folder)."
        )
    (cls,) = known[name].values()
    return cls.restored(folder, content)
