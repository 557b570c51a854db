"""The options of a fit, and what each must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stgen._checks import (
    check_choice,
    check_flag,
    check_not_negative,
    check_positive,
    check_seed,
    check_share,
    check_whole,
    unknown_option,
)

__all__ = ["COMMON_OPTIONS", "OPTIONS", "check_device", "check_options"]

MOST_WORKERS = 64


def _unless_none(check: Callable[[str, Any], object]) -> Callable[[str, Any], object]:
    return lambda name, value: None if value is None else check(name, value)


def _check_checkpoint(name: str, value: object) -> None:
    if not isinstance(value, str | Path) or not Path(value).name:
        raise TypeError(f"`{name}` must be the path of a folder, found {value!r}.")


COMMON_OPTIONS: dict[str, Callable[[str, Any], object]] = {
    "seed": lambda name, value: check_seed(value),
    "device": lambda name, value: check_device(value),
    "progress": check_flag,
}
"""What the fit of any model may be told; one without randomness or network makes no use of it."""

OPTIONS: dict[str, Callable[[str, Any], object]] = {
    **COMMON_OPTIONS,
    "steps": check_whole,
    "batch_size": check_whole,
    "lr": check_not_negative,
    "weight_decay": check_not_negative,
    "ema_decay": lambda name, value: check_share(name, value, "[0, 1]"),
    "max_grad_norm": _unless_none(lambda name, value: check_positive(name, value, "")),
    "evaluate_every": check_whole,
    "patience": _unless_none(check_whole),
    "checkpoint": _unless_none(_check_checkpoint),
    "precision": _unless_none(lambda name, value: check_choice(name, value, ("no", "bf16", "fp16"))),
    "num_workers": lambda name, value: check_whole(name, value, least=0, most=MOST_WORKERS),
}
"""The options of :func:`fit`, and what each must be."""


def check_options(
    owner: str, options: Mapping[str, Any], known: Mapping[str, Callable[[str, Any], object]] = OPTIONS
) -> None:
    """Refuse options that a fit does not know, and values with which it cannot work.

    Parameters
    ----------
    owner
        What is fitted, for messages.
    options
        The options by name.
    known
        A check for each option that there is; by default those of :func:`fit`.

    Raises
    ------
    TypeError, ValueError
        If one is unknown, or impossible.
    """
    unknown = unknown_option(f"the fit of {owner}", options, known)
    if unknown is not None:
        raise unknown
    for name, value in options.items():
        known[name](name, value)


def check_device(device: str | torch.device | None) -> torch.device:
    """The named device; by default a GPU if there is one, else the CPU.

    Raises
    ------
    ValueError
        If the name means nothing to torch, or the machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"`device` must be the name of a device or None, found {device!r}.")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"`device`: unknown or absent device {device!r}; this machine has {', '.join(here)}."
        ) from error
    return found
