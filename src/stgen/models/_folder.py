"""A model on disk: ``config.json`` and ``model.safetensors`` in a folder, or on the Hugging Face Hub. Nothing is pickled.

``config.json`` says which weights are its own (their sha256, names, types and shapes) and carries a checksum of itself,
so that a folder that was damaged, edited or mixed is noticed before a model is built. The two files are written beside
their older versions and take their places one after the other, the weights first. Where a process ends between the two,
the configuration of the weights is still ``config.json.new``, and is read from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stgen._checkpoint import sha256_of

__all__ = [
    "CONFIG", "WEIGHTS", "Content", "check_finite", "check_sizes", "locate", "read", "read_weights", "sizes_only", "write",
]  # fmt: skip

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NEW = ".new"
FORMAT = 2
"""Of the files: 1 had neither checksums nor shapes."""

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class Content(TypedDict):
    """What ``config.json`` holds besides the name of the ``class`` and what belongs to the file."""

    config: dict[str, Any]  # arguments of the constructor
    record: dict[str, Any]  # of the fit
    sampling: NotRequired[dict[str, Any]]  # attributes that decide how samples are drawn, of a model that has some


# -- writing -----------------------------------------------------------------------------------------------------------


def write(folder: str | Path, name: str, content: Content, weights: Mapping[str, Tensor]) -> Path:
    """Write the two files of a model of the class ``name``; the folder is made if need be.

    A process that ends in the middle leaves the model that was there, or the new one.

    Raises
    ------
    ValueError
        If weights are not finite.
    """
    check_finite(weights, f"the {name}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _finish_earlier(folder)
    new_weights, new_config = (folder / f"{file}{NEW}" for file in (WEIGHTS, CONFIG))
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, new_weights)
    tensors = {key: [str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in weights.items()}
    entry = {
        "format": FORMAT,
        "class": name,
        **content,
        "weights": {"sha256": sha256_of(new_weights), "tensors": tensors},
    }
    new_config.write_text(json.dumps(sealed(entry), indent=1))
    for path in (new_weights, new_config):
        _to_disk(path)
    os.replace(new_weights, folder / WEIGHTS)
    os.replace(new_config, folder / CONFIG)
    return folder


def _finish_earlier(folder: Path) -> None:
    """Put the configuration in its place where an earlier process ended just before it did."""
    new = folder / f"{CONFIG}{NEW}"
    if not new.exists():
        return
    if (folder / WEIGHTS).exists() and _weights_of(new) == sha256_of(folder / WEIGHTS):
        os.replace(new, folder / CONFIG)
    else:
        new.unlink()


def _to_disk(path: Path) -> None:
    """Have the system write what it has only noted, so that a new name never stands for an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` holds, with a checksum of it."""
    plain = json.loads(json.dumps(entry))  # as it is read again
    return {**plain, "sha256": _checksum(plain)}


def _checksum(entry: Mapping[str, Any]) -> str:
    """Of all that ``config.json`` holds, however it is laid out."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _weights_of(config: Path) -> str | None:
    """The sha256 of the weights that a configuration says are its own; None if it is damaged or does not say."""
    try:
        return str(_parsed(config)["weights"]["sha256"])
    except (ValueError, KeyError):
        return None


# -- reading -----------------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> tuple[str, Content]:
    """The name of the class and what else ``config.json`` holds, once both files are known to be there and to be whole.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If ``config.json`` is not a model's, or one of both is not as it was written.
    """
    folder = Path(folder)
    path = _config_of(folder)
    entry = _parsed(path)
    if "weights" not in entry:
        warnings.warn(
            f"{folder} was written by an earlier version of stgen, without checksums: damage to it goes unnoticed. "
            "model.save(folder) writes it anew.",
            UserWarning,
            stacklevel=4,
        )
        return entry.pop("class"), entry  # type: ignore[return-value]
    weights = entry["weights"]
    found = read_shapes(folder)
    wanted = {name: (kind, tuple(shape)) for name, (kind, shape) in weights["tensors"].items()}
    if found != wanted or sha256_of(folder / WEIGHTS) != weights["sha256"]:
        raise ValueError(
            f"the weights in {folder / WEIGHTS} do not fit {path.name} beside them, which was written with others: one "
            "of both was damaged, or comes from another model. Save the model again, or fetch both files again."
        )
    return entry.pop("class"), entry  # type: ignore[return-value]


def _config_of(folder: Path) -> Path:
    """The configuration of the weights that are there."""
    config, new, weights = folder / CONFIG, folder / f"{CONFIG}{NEW}", folder / WEIGHTS
    if weights.is_file() and new.is_file() and _weights_of(new) == sha256_of(weights):
        return new
    missing = [path.name for path in (config, weights) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete model folder: {' and '.join(missing)} missing. "
            "model.save(folder) writes both files."
        )
    return config


def _parsed(path: Path) -> dict[str, Any]:
    """The content of a ``config.json``, whose checksum is right if it has one."""
    try:
        entry = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise ValueError(f"{path} cannot be read as JSON ({error}): it was damaged. Save the model again.") from error
    absent = {"class", "config", "record"} - (entry.keys() if isinstance(entry, dict) else set())
    if absent:
        raise ValueError(f"{path} lacks {', '.join(sorted(absent))}: it was not written by model.save(folder).")
    for name, kind in (("class", str), ("config", dict), ("record", dict), ("sampling", dict)):
        if not isinstance(entry.get(name, kind()), kind):
            raise ValueError(
                f"{path} holds no {name} that model.save(folder) could have written; found {entry[name]!r:.80}."
            )
    new = entry.keys() & {"format", "weights", "sha256"}
    if new:
        checksum = entry.pop("sha256", None)
        if checksum != _checksum(entry):
            raise ValueError(f"{path} is not as it was written: its checksum is another. Save the model again.")
        if entry["format"] != FORMAT:
            raise ValueError(
                f"{path} is of format {entry['format']}; this version of stgen knows {FORMAT}: take a newer one."
            )
    return entry


def read_shapes(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of the tensors of ``model.safetensors`` by name, from its first bytes.

    Raises
    ------
    ValueError
        If the file cannot be read as safetensors.
    """
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            kinds = {
                name: str(_DTYPES.get(s.get_dtype(), s.get_dtype())).removeprefix("torch.")
                for name, s in slices.items()
            }
            return {name: (kinds[name], tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise misfit(folder, error) from error


def check_sizes(folder: str | Path, model: nn.Module) -> None:
    """Refuse weights of other names, types or shapes than a model's, of which no more is needed than its sizes.

    Raises
    ------
    ValueError
        If they differ.
    """
    found = read_shapes(folder)
    kinds = {str(kind).removeprefix("torch."): kind for kind in _DTYPES.values()}
    unknown = sorted({kind for kind, _ in found.values()} - kinds.keys())
    if unknown:
        raise misfit(folder, ValueError(f"there are values of type {', '.join(unknown)}"))
    weights = {name: torch.empty(shape, dtype=kinds[kind], device="meta") for name, (kind, shape) in found.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise misfit(folder, error) from error
    wrong = [f"{name} is {weights[name].dtype} instead of {value.dtype}"
             for name, value in model.state_dict().items() if weights[name].dtype != value.dtype]  # fmt: skip
    if wrong:
        raise misfit(folder, ValueError("; ".join(wrong[:3])))


@contextmanager
def sizes_only(folder: str | Path) -> Iterator[None]:
    """Models that are built meanwhile have sizes and no values, and no more parts than the weights could fill."""
    most = 100 + 4 * len(read_shapes(folder))
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise misfit(folder, ValueError(f"{most} tensors and more for {len(read_shapes(folder))}"))

    register = nn.modules.module
    hooks = [
        register.register_module_parameter_registration_hook(count),
        register.register_module_module_registration_hook(count),
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors``.

    Raises
    ------
    ValueError
        If the file cannot be read as safetensors, or holds NaN or infinite values.
    """
    path = Path(folder) / WEIGHTS
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise misfit(folder, error) from error
    check_finite(weights, str(path))
    return weights


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are NaN or infinite: whatever they are used for is no number either."""
    wrong = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if wrong:
        raise ValueError(
            f"{where} holds weights that are NaN or infinite ({', '.join(wrong[:3])}): training diverged, or the file "
            "was damaged. Fit the model again, with a smaller lr."
        )


def misfit(folder: str | Path, error: Exception) -> ValueError:
    """What to raise if the two files do not belong together."""
    return ValueError(f"the weights in {Path(folder) / WEIGHTS} do not fit {CONFIG} beside them: {error}")


# -- where -------------------------------------------------------------------------------------------------------------


def locate(path: str | Path, revision: str | None = None) -> Path:
    """A folder of that name or, if there is none, that of a model on the Hugging Face Hub, which is downloaded.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    ValueError
        If a revision is asked of a folder.
    """
    if not Path(path).exists():
        return _from_hub(str(path), revision)
    if revision is not None:
        raise ValueError(f"`revision` is of a model on the Hub, and {path} is a folder; leave it out.")
    return Path(path)


def _from_hub(repo_id: str, revision: str | None) -> Path:
    """Download the two files of a model from the Hugging Face Hub (or take them from its cache)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {repo_id!r}, and the Hugging Face Hub gives no such model ({type(error).__name__}). "
            "model.save(folder) writes a folder; a Hub id has the form 'owner/name'."
        ) from error
