"""Checkpoints of training on disk: safetensors and JSON, replaced as a whole and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stgen._checks import check_whole

__all__ = ["SCALARS", "TENSORS", "damaged", "read", "repair", "sha256_of", "write"]

TENSORS, NUMBERS = "state.safetensors", "state.json"
SCALARS = ("step", "stale", "best_loss", "stopped", "history")


def damaged(file: Path, why: object) -> ValueError:
    """What to raise where a checkpoint cannot be read."""
    return ValueError(
        f"{file} is damaged ({why}). Delete the folder {file.parent} to start anew, or name another for `checkpoint`."
    )


def _digest(content: Mapping[str, Any]) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """Hash of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint holds, if it is what was written: numbers and tensors."""
    try:
        scalars = json.loads((folder / NUMBERS).read_text())
        found = scalars.pop("sha256", None)  # which the first checkpoints did not have
        if found is not None and found != _digest(scalars):
            raise ValueError("its content is not what was written")
        tensors_sha256 = scalars.pop("tensors_sha256", None)
        missing = {"signature", *SCALARS} - set(scalars)
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        check_whole("step", scalars["step"])
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise damaged(folder / NUMBERS, error) from error
    try:
        if tensors_sha256 not in (None, sha256_of(folder / TENSORS)):
            raise ValueError("its content is not what was written")
        return scalars, load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(folder / TENSORS, error) from error


def write(folder: Path, scalars: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint beside the old one, then put it in its place."""
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    _discard(new)
    new.mkdir(parents=True)
    save_file(tensors, new / TENSORS)
    content = {**scalars, "tensors_sha256": sha256_of(new / TENSORS)}
    (new / NUMBERS).write_text(json.dumps({**content, "sha256": _digest(content)}))
    if folder.exists():
        _discard(old)
        os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old)
    else:
        os.replace(new, folder)


def _check_ours(folder: Path) -> None:
    """Refuse a folder with anything else in it, which :func:`write` would replace."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file. Name a folder of its own for `checkpoint`.")
    foreign = {path.name for path in folder.iterdir()} - {NUMBERS, TENSORS}
    if foreign:
        raise ValueError(
            f"{folder} holds files that are no checkpoint ({', '.join(sorted(foreign)[:5])}) and would be "
            "replaced. Name a folder of its own for `checkpoint`."
        )


def _discard(folder: Path) -> None:
    """Remove what a killed run left beside its checkpoint."""
    if folder.exists():
        _check_ours(folder)
        shutil.rmtree(folder)


def repair(folder: Path) -> None:
    """Put a checkpoint in its place, and clear away what is beside it, wherever :func:`write` was killed."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        _check_ours(folder)
        _discard(old)
    elif old.exists():  # killed between the two renames
        _check_ours(old)
        os.replace(old, folder)
    _discard(folder.with_name(folder.name + ".new"))
