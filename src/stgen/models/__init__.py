"""Models: one contract, one file per paper. Needs torch, numpy and pandas; imports neither anndata nor spatialdata."""

from __future__ import annotations

from inspect import isabstract
from pathlib import Path

from stgen.models._base import DiffusionModel, Model, read_config
from stgen.models._baselines import LinearProbe, Retrieval, TrainingMean
from stgen.models._c3diff import C3Diff
from stgen.models._diffst import DiffST
from stgen.models._hadmst import HaDMST
from stgen.models._map_baselines import Interpolate, PixelProbe, RegressionUNet
from stgen.models._maps import MapModel
from stgen.models._stem import Stem

__all__ = [
    "C3Diff",
    "DiffST",
    "DiffusionModel",
    "HaDMST",
    "Interpolate",
    "LinearProbe",
    "MapModel",
    "Model",
    "PixelProbe",
    "RegressionUNet",
    "Retrieval",
    "Stem",
    "TrainingMean",
    "load",
]


def load(path: str | Path) -> Model:
    """Restore a fitted model, whatever its class.

    Parameters
    ----------
    path
        A folder that ``model.save(folder)`` wrote, or the id of a model on the Hugging Face Hub (``"owner/name"``), from
        which ``config.json`` and ``model.safetensors`` are taken. Nothing is unpickled.

    Returns
    -------
    The model, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If there is neither a complete folder of that name nor such a model on the Hub.
    ValueError
        If the class is unknown to this version of stgen, or the weights do not fit the configuration.

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
    folder = Path(path)
    if not folder.exists():
        folder = _from_hub(str(path))
    name = read_config(folder)["class"]
    known = {cls.__name__: cls for cls in map(globals().get, __all__) if isinstance(cls, type) and not isabstract(cls)}
    if name not in known:
        raise ValueError(
            f"{folder} holds a {name!r}, which this version of stgen does not know; it knows {sorted(known)}."
        )
    return known[name].load(folder)


def _from_hub(repo_id: str) -> Path:
    """Download the two files of a model from the Hugging Face Hub (or take them from its cache)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["config.json", "model.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {repo_id!r}, and the Hugging Face Hub gives no such model ({type(error).__name__}). "
            "model.save(folder) writes a folder; a Hub id has the form 'owner/name'."
        ) from error
