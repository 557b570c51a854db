"""The coordinate system in which elements meet: one rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spatialdata.transformations import get_transformation

from stgen._checks import listed
from stgen._spatial.image import is_micrometers

__all__ = ["choose_system", "systems_of"]


def systems_of(element: Any) -> list[str]:
    """Names of the coordinate systems of an element."""
    return list(get_transformation(element, get_all=True))


def choose_system(systems: Mapping[str, Sequence[str]], wanted: str | None = None) -> str:
    """A coordinate system that all share: a micrometer one if there is one, else "global", else the first.

    Parameters
    ----------
    systems
        For each element, by what it is called in a message, the names of its coordinate systems.
    wanted
        The one that was asked for.

    Raises
    ------
    KeyError
        If they do not all have the one that is wanted.
    ValueError
        If there is none that all share.
    """
    names = list(systems)
    first, *others = systems.values()
    shared = [name for name in first if all(name in other for other in others)]
    found = "; ".join(f"{name}: {listed(of_it)}" for name, of_it in systems.items())
    these = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    if wanted is not None:
        if wanted not in shared:
            raise KeyError(
                f"{these[0].upper()}{these[1:]} do not share the coordinate system {wanted!r}; found {found}."
            )
        return wanted
    if not shared:
        raise ValueError(
            f"{these[0].upper()}{these[1:]} share no coordinate system ({found}). Align them with "
            "spatialdata.transformations.set_transformation(element, transformation, to_coordinate_system=...)."
        )
    micrometers = [name for name in shared if is_micrometers(name)]
    return (micrometers or [name for name in shared if name == "global"] or shared)[0]
