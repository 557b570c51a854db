"""The folder of a comparison: what it was, with which versions, and whether another one is the same."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stgen.tl.comparison.plan import PLAN

__all__ = ["as_json", "check_same", "holds_comparison", "read_comparison", "versions_and_machine", "write_text"]

logger = logging.getLogger("stgen")


def holds_comparison(folder: Path) -> bool:
    """Whether a comparison was begun there; an error if something else is there."""
    if (folder / "comparison.json").is_file():
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and holds something else than a comparison; name a new folder.")
    return False


def read_comparison(folder: Path) -> dict[str, Any]:
    """The content of ``comparison.json``."""
    file = folder / "comparison.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no comparison in {str(folder)!r} to repeat: it has no comparison.json. If {folder.name!r} is a "
            f"model, pass a list: [{folder.name!r}]."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    absent = {*PLAN, "embedding", "data", "made_with"} - content.keys()
    if absent:
        raise ValueError(f"{file} lacks {', '.join(sorted(absent))}: it was not written by stgen.tl.compare.")
    return content


def as_json(content: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=1, allow_nan=False)


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def versions_and_machine(device: str) -> dict[str, Any]:
    """Versions and machine, on which the last digits of the numbers depend."""
    packages = ("stgen", "torch", "numpy", "scipy", "scikit-learn", "diffusers", "accelerate")
    machine = f"{platform.system()} {platform.machine()}"
    return {
        "python": platform.python_version(), **{name: version(name) for name in packages}, "machine": machine,
        "device": device, "threads": torch.get_num_threads(),
    }  # fmt: skip


def check_same(content: dict[str, Any], made_with: dict[str, Any], other: dict[str, Any], place: Path) -> None:
    """Refuse another comparison than the one in ``place``; warn of other versions and another machine."""
    differing = _differences({name: other[name] for name in content}, content)
    if differing:
        raise ValueError(
            f"{place} holds another comparison: {'; '.join(differing[:8])}. Name a new folder, or pass what it was "
            f"made with; stgen.tl.compare({str(place)!r}, data, folder=...) repeats it."
        )
    differing = _differences(other["made_with"], made_with)
    if differing:
        logger.warning(
            "numbers may differ from those in %s, made with other versions: %s.", place, "; ".join(differing)
        )


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, and by what."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [line for k in keys for line in _differences(there.get(k), here.get(k), f"{name}.{k}".lstrip("."))]
    if there == here:
        return []
    texts = [text if len(text) <= 60 else f"{text[:57]}..." for text in map(repr, (there, here))]
    return [f"{name} was {texts[0]} and is {texts[1]}"]
