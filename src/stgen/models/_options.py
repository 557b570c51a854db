"""Options of a family of models: each is written once, as a field of a frozen dataclass; presets are instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import NoneType
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from stgen._checks import (
    check_choice,
    check_each,
    check_flag,
    check_not_negative,
    check_positive,
    check_share,
    check_text,
    check_whole,
    unknown_option,
)
from stgen.diffusion import Diffusion
from stgen.transforms import TransformName, unit

__all__ = [
    "Count",
    "Fraction",
    "Index",
    "Levels",
    "Options",
    "Preset",
    "Share",
    "Text",
    "Transform",
    "Weight",
    "Widths",
    "check_size",
    "choose",
]


check_size = partial(check_positive, unit="")
check_index = partial(check_whole, least=0)
check_fraction = partial(check_share, within="[0, 1]")


def _check_transform(name: str, value: Any) -> Any:
    unit(value)
    return value


def _check_widths(name: str, value: Any) -> tuple[int, ...]:
    return tuple(check_each(name, value, check_whole))


def _check_levels(name: str, value: Any) -> tuple[int, ...]:
    return tuple(check_each(name, value, check_index, least=0))


# The type of a field and what its values must be; the check also makes a plain value of what is given.
Count = Annotated[int, check_whole]
Index = Annotated[int, check_index]
Fraction = Annotated[float, check_fraction]
Share = Annotated[float, check_share]
Weight = Annotated[float, check_not_negative]
Text = Annotated[str, check_text]
Transform = Annotated[TransformName, _check_transform]
Widths = Annotated[tuple[int, ...], _check_widths]
Levels = Annotated[tuple[int, ...], _check_levels]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a family of models is constructed with, besides genes and geometry. Impossible values are refused."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), hint))
        self.check()

    def check(self) -> None:
        """Refuse options that do not go together."""

    def to_config(self) -> dict[str, Any]:
        """The options as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _hints(cls: type[Options]) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value as a plain one of its field's type."""
    if NoneType in get_args(hint) and get_origin(hint) is not Annotated:
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Annotated:
        return get_args(hint)[1](name, value)
    if get_origin(hint) is Literal:
        return check_choice(name, value, get_args(hint))
    return check_flag(name, value)


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, kw_only=True)
class Preset(Generic[OptionsT]):
    """Options that go together, and what else belongs to them."""

    options: OptionsT
    """What the model is constructed with."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of :func:`stgen.train.fit`."""
    px_um: float = 2.5
    """Size of the pixels at which the image is read."""
    tile_um: float | None = None
    """Side of the tiles of a model that sees a whole tile and takes no other windows."""
    diffusion: Diffusion = field(default_factory=Diffusion)
    """The noise schedule."""


def choose(
    presets: Mapping[str, Preset[OptionsT]], preset: str, given: Mapping[str, Any], owner: str
) -> Preset[OptionsT]:
    """A preset, with the options that are given (not ``None``) in place of its own.

    Raises
    ------
    TypeError
        If there is no such option.
    ValueError
        If there is no such preset, or the options cannot be.
    """
    chosen = presets[check_choice("preset", preset, presets)]
    error = unknown_option(owner, given, [f.name for f in fields(chosen.options)])
    if error is not None:
        raise error
    own = {name: value for name, value in given.items() if value is not None}
    return replace(chosen, options=replace(chosen.options, **own))
