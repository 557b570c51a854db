"""Checks of what a user passes, each with one wording."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["check_positive", "check_prompt", "listed", "only_key"]


def listed(values: Iterable[Any], limit: int = 5) -> str:
    """Some values as text for a message: the first few, and how many there are."""
    values = [str(value) for value in values]
    if not values:
        return "none"
    return ", ".join(values[:limit]) + (f", ... ({len(values)} in all)" if len(values) > limit else "")


def only_key(keys: Iterable[str], key: str | None, *, argument: str, what: str) -> str:
    """``key`` if it exists, or the only one there is; otherwise an error that lists the candidates."""
    keys = list(keys)
    if key is not None:
        if key not in keys:
            raise KeyError(f"There is no {what} {key!r}; found {listed(keys)}. Pass {argument}=<one of them>.")
        return key
    if len(keys) == 1:
        return keys[0]
    if not keys:
        raise KeyError(f"The object has no {what}.")
    raise KeyError(f"There are several candidates for the {what}: {listed(keys)}. Pass {argument}=<one of them>.")


def check_positive(name: str, value: float) -> None:
    """Refuse what is no positive number of µm."""
    if isinstance(value, bool) or not (np.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number of µm, found {value!r}.")


def check_prompt(prompt: object) -> str:
    """A prompt without spaces around it.

    Raises
    ------
    ValueError
        If it is not text, or empty.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f'`prompt` must say in a few words what the image shows, such as "H&E of invasive ductal carcinoma of the '
            f'breast"; found {prompt!r}.'
        )
    return prompt.strip()
