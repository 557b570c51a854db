"""A model on disk: ``config.json`` and ``model.safetensors`` in a folder or on the Hugging Face Hub. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["CONFIG", "WEIGHTS", "Content", "locate", "read_content", "read_weights", "write"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class _Written(TypedDict):
    config: dict[str, Any]  # arguments of the constructor
    record: dict[str, Any]  # of the fit


class Content(_Written, total=False):
    """What ``config.json`` holds besides the name of the ``class``."""

    sampling: dict[str, Any]  # attributes that decide how samples are drawn, of a model that has some


def write(folder: str | Path, name: str, content: Content, weights: Mapping[str, Tensor]) -> Path:
    """Write the two files of a model of the class ``name``; the folder is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"class": name, **content}, indent=1))
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, folder / WEIGHTS)
    return folder


def read_content(folder: str | Path) -> tuple[str, Content]:
    """The name of the class and what else ``config.json`` holds, once both files are known to be there.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If ``config.json`` is not a model's.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete model folder: {' and '.join(missing)} missing. "
            "model.save(folder) writes both files."
        )
    content = json.loads((folder / CONFIG).read_text())
    absent = {"class", "config", "record"} - content.keys()
    if absent:
        raise ValueError(
            f"{folder / CONFIG} lacks {', '.join(sorted(absent))}: it was not written by model.save(folder)."
        )
    return content.pop("class"), content


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors``.

    Raises
    ------
    ValueError
        If the file cannot be read as safetensors.
    """
    try:
        return load_file(Path(folder) / WEIGHTS)
    except SafetensorError as error:
        raise misfit(folder, error) from error


def misfit(folder: str | Path, error: Exception) -> ValueError:
    """What to raise if the two files do not belong together."""
    return ValueError(f"the weights in {Path(folder) / WEIGHTS} do not fit {CONFIG} beside them: {error}")


def locate(path: str | Path) -> Path:
    """A folder of that name or, if there is none, that of a model on the Hugging Face Hub, which is downloaded.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    """
    return Path(path) if Path(path).exists() else _from_hub(str(path))


def _from_hub(repo_id: str) -> Path:
    """Download the two files of a model from the Hugging Face Hub (or take them from its cache)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG, WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {repo_id!r}, and the Hugging Face Hub gives no such model ({type(error).__name__}). "
            "model.save(folder) writes a folder; a Hub id has the form 'owner/name'."
        ) from error
