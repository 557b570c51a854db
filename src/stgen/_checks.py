"""Checks of what a user passes, each with one wording.

:func:`check_types` holds a public function to the types in its signature. What a type does not say (at least 1, a
share, a name that exists) is said by one of the other checks in the function's first lines.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

__all__ = [
    "check_choice",
    "check_enough_spots",
    "check_each",
    "check_flag",
    "check_genes",
    "check_key",
    "check_not_negative",
    "check_number",
    "check_positive",
    "check_prompt",
    "check_seed",
    "check_share",
    "check_text",
    "check_types",
    "check_whole",
    "genes_of",
    "chosen_genes",
    "listed",
    "only_key",
    "unknown_option",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

LARGEST = 2**31 - 1
"""The largest whole number that is taken where there is no smaller limit."""

FEWEST_SPOTS = 30
"""Of a section that something is learned from."""

FARTHEST_UM = 1e7
"""The largest length that is taken, ten meters: what is larger is in another unit."""

LONGEST_KEY = 200
"""Letters of the longest name: a file of that name, and ``_samples`` behind it, must be possible."""


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


# -- numbers -----------------------------------------------------------------------------------------------------------


def check_whole(name: str, value: object, *, least: int = 1, most: int = LARGEST) -> int:
    """A whole number from ``least`` to ``most``; a float that happens to be whole is none."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is not None and least <= number <= most:
        return number
    limit = f"at most {most}" if number is not None and number > most else f"at least {least}"
    raise ValueError(f"`{name}` must be a whole number of {limit}, found {shown(value)}.")


def check_seed(seed: object) -> int:
    """What random numbers may begin with."""
    return check_whole("seed", seed, least=0, most=2**63 - 1)


def is_number(value: object) -> bool:
    """Whether a value is a finite number: not NaN, not infinite, not True."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: Any, *, least: float | None = None, most: float | None = None) -> float:
    """A finite number from ``least`` to ``most``."""
    if is_number(value) and (least is None or value >= least) and (most is None or value <= most):
        return float(value)
    limits = [f"{word} {limit:g}" for word, limit in (("at least", least), ("at most", most)) if limit is not None]
    limit = " of " + " and ".join(limits) if limits else ""
    raise ValueError(f"`{name}` must be a finite number{limit}, found {shown(value)}.")


def check_positive(name: str, value: Any, unit: str = "µm") -> float:
    """A positive number, of µm unless ``unit`` is another or empty."""
    if is_number(value) and value > 0:
        return float(value)
    of = f" of {unit}" if unit else ""
    raise ValueError(f"`{name}` must be a positive number{of}, found {shown(value)}.")


def check_not_negative(name: str, value: Any) -> float:
    """A finite number that is zero or more."""
    if is_number(value) and value >= 0:
        return float(value)
    raise ValueError(f"`{name}` must be a finite number that is not negative, found {shown(value)}.")


def check_share(name: str, value: Any, within: str = "[0, 1)") -> float:
    """A share within an interval as mathematicians write it: ``[0, 1)`` contains 0 and not 1."""
    low, high = (float(end) for end in within[1:-1].split(","))
    if is_number(value):
        above = value >= low if within[0] == "[" else value > low
        if above and (value <= high if within[-1] == "]" else value < high):
            return float(value)
    raise ValueError(f"`{name}` must be a share in {within}, found {shown(value)}.")


def check_each(name: str, values: object, check: Callable[[str, Any], T], *, least: int = 1) -> list[T]:
    """A list of at least so many values, each of which passes a check: ``check_each("widths", widths, check_whole)``."""
    if not is_sequence(values):
        raise TypeError(f"`{name}` must be a list, found {shown(values)}.")
    items = list(values)  # type: ignore[call-overload]
    if len(items) < least:
        raise ValueError(f"`{name}` must hold at least {least} value{'s' * (least > 1)}, found {shown(items)}.")
    return [check(f"{name}[{i}]", item) for i, item in enumerate(items)]


# -- words -------------------------------------------------------------------------------------------------------------


def check_flag(name: str, value: object) -> bool:
    """True or False."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"`{name}` must be True or False, found {shown(value)}.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """One of some words."""
    choices = tuple(choices)
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, found {shown(value)}.")


def check_text(name: str, value: object) -> str:
    """Text that is not empty."""
    if isinstance(value, str) and value.strip():
        return str(value)
    raise ValueError(f"`{name}` must be text, found {shown(value)}.")


def unknown_option(owner: str, given: Iterable[str], known: Collection[str]) -> TypeError | None:
    """What to raise if there is no option of some name that is given: names those that there are, and the nearest."""
    wrong = [name for name in given if name not in known]
    if not wrong:
        return None
    near = get_close_matches(wrong[0], known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return TypeError(
        f"{owner} takes no option {', '.join(map(repr, wrong))}.{hint} Its options are {', '.join(sorted(known))}."
    )


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
            f'breast"; found {shown(prompt)}.'
        )
    return prompt.strip()


def check_key(name: str, key: object) -> str:
    """The name of a new result, which every store must be able to hold.

    Raises
    ------
    TypeError
        If it is not text.
    ValueError
        If it is empty, too long, begins with two underscores or has letters that no element's name may have.
    """
    if not isinstance(key, str):
        raise TypeError(f"`{name}` must be text, found {shown(key)}.")
    if (
        not 0 < len(key) <= LONGEST_KEY
        or key in (".", "..")
        or key.startswith("__")
        or not all(letter.isalnum() or letter in "_-." for letter in key)
    ):
        raise ValueError(
            f"`{name}` must be a name that can be stored: 1 to {LONGEST_KEY} alphanumeric characters, '_', '-' or '.', "
            f"not beginning with '__'; found {shown(key)}."
        )
    return key


def check_genes(genes: Any, name: str = "genes") -> list[str]:
    """Names of genes as a list: at least one, each of them once."""
    if isinstance(genes, str):
        raise TypeError(f"`{name}` must be a list of names, found a string; pass {name}=[{genes!r}].")
    if not is_sequence(genes) or not all(isinstance(gene, str) for gene in genes):
        raise TypeError(f"`{name}` must be a list of names, found {shown(genes)}.")
    names = [str(gene) for gene in genes]
    if len(set(names)) < len(names):
        twice = sorted({gene for gene in names if names.count(gene) > 1})
        raise ValueError(f"`{name}` must be names without repetition, found more than once: {listed(twice)}.")
    if not names or not all(names):
        raise ValueError(f"`{name}` must be names without repetition, at least one; found {listed(names)}.")
    return names


def chosen_genes(genes: str | Iterable[str] | None, known: Sequence[str], where: str) -> list[str]:
    """Those of the ``known`` genes that are wanted, each once; all by default. ``where`` says in a message what knows them.

    Raises
    ------
    KeyError
        If one is unknown.
    ValueError
        If none is named, or one twice.
    """
    if genes is None and len(set(known)) < len(known):
        raise ValueError(f"gene names of {where} occur more than once; run .var_names_make_unique() first.")
    names = list(known) if genes is None else [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`genes` must name at least one gene, and each once; found {listed(names)}.")
    there = set(known)
    unknown = [gene for gene in names if gene not in there]
    if unknown:
        raise KeyError(
            f"{len(unknown)} of {len(names)} genes unknown to {where}: {listed(unknown)}. It has {len(known)} genes, "
            f"such as {listed(known[:3])}."
        )
    return names


def genes_of(genes: Sequence[str] | None, known: Sequence[str], where: str) -> list[str]:
    """``genes`` as a list of names that exist; all of them for None."""
    known = [str(name) for name in known]
    if genes is None:
        if not known:
            raise ValueError(f"There are no genes in {where}.")
        return known
    if isinstance(genes, str):
        raise TypeError(f"`genes` must be a list of names, found a string; pass genes=[{genes!r}].")
    genes = list(genes)
    if not genes or len(set(genes)) < len(genes):
        raise ValueError(f"`genes` must be names without repetition, at least one; found {listed(genes)}.")
    missing = [gene for gene in genes if gene not in set(known)]
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(genes)} genes are not in {where} ({listed(missing)}); its names look like "
            f"{listed(known[:3])}."
        )
    return genes


def check_enough_spots(n: int, found: str) -> None:
    """Refuse a section of which too little was measured to learn from."""
    if n < FEWEST_SPOTS:
        raise ValueError(
            f"fewer than {FEWEST_SPOTS} spots to learn from: {found}. Nothing can be learned from so little; use a "
            "model that was fitted on other sections: stgen.tl.superresolve(..., model=...)."
        )


# -- types -------------------------------------------------------------------------------------------------------------


def check_types(function: Callable[P, R], leave: Collection[str] = ()) -> Callable[P, R]:
    """Hold the arguments of a public function to the types in its signature, before it begins.

    A value must be of the type that its argument is annotated with: numbers are finite, a whole number is no float, a
    sequence of text is not one text, ``key_added`` and other names of results can be stored. A class that only the type
    checker imports (``if TYPE_CHECKING:``) is not looked at; the function does. So it does with the arguments named in
    ``leave``, of which it has more to say than their type.

    Raises
    ------
    TypeError, ValueError
        ```n_samples`` must be a whole number, found 'x'.``: the name of the argument, what it must be, what was found.
    """
    signature = inspect.signature(function)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    fixed = {name: p for name, p in signature.parameters.items() if p.kind not in variable and name not in leave}
    annotations: dict[str, Any] = {}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not annotations:
            annotations.update({name: _resolved(p.annotation, function) for name, p in fixed.items()})
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # an argument too many or too few: the function says so itself
            return function(*args, **kwargs)
        for name in given.keys() & annotations.keys():
            value, default = given[name], fixed[name].default
            if value is not default:
                _check_type(name, value, annotations[name])
        return function(*args, **kwargs)

    return checked


class _Names(dict[str, Any]):
    """Names of a module, and :data:`~typing.Any` for those which only the type checker imports."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def _resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    """An annotation, which in this package is text, as a type."""
    if annotation is inspect.Parameter.empty:
        return Any
    if isinstance(annotation, str):
        names = _Names(getattr(function, "__globals__", {}))
        try:
            return eval(annotation, {}, names)
        except (TypeError, AttributeError):  # an operation on what only the type checker imports
            return Any
    return annotation


def _check_type(name: str, value: object, kind: Any) -> None:
    """Refuse a value that is not of the kind of its argument: a ValueError where a number or a choice belongs."""
    if name in ("key_added", "table_key_added") and value is not None:
        check_key(name, value)
    if isinstance(value, str) and not value and str in {kind, *get_args(kind)} and name != "title":
        raise ValueError(f"`{name}` must be text that is not empty.")
    kinds = {kind, *get_args(kind)}
    if int in kinds and isinstance(value, Integral) and not isinstance(value, bool):
        check_seed(value) if name == "seed" else check_whole(name, value, least=-LARGEST)
    if name == "mpp" or name.endswith("_um"):
        sizes: list[Any] = list(value) if isinstance(value, tuple | list) else [value]
        for size in sizes:
            if is_number(size) and abs(size) > FARTHEST_UM:
                raise ValueError(f"`{name}` must be in µm, at most {FARTHEST_UM:g}; found {shown(value)}.")
    if _fits(value, kind):
        return
    for one in (kind, *get_args(kind)):
        if get_origin(one) is Literal:
            check_choice(name, value, get_args(one))
    if isinstance(value, str) and Sequence[str] in (kind, *get_args(kind)):
        check_genes(value, name)
    numeric = {int, float} & kinds
    raise (ValueError if numeric else TypeError)(f"`{name}` must be {_described(kind)}, found {shown(value)}.")


def is_sequence(value: object) -> bool:
    """Whether a value is a list, a tuple, an array or an index, but not text, a mapping or a set."""
    text_or_mapping = isinstance(value, str | bytes | Mapping)
    one_dimensional = getattr(value, "ndim", 1) == 1
    return not text_or_mapping and one_dimensional and hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind that an annotation names; of an unknown kind everything is."""
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if kind is None or kind is type(None):
        return value is None
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str | int | type(None)) and value in inner
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return is_number(value)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return is_sequence(value) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is not None and isinstance(origin, type):
        return _fits_collection(value, origin, inner)
    return not isinstance(kind, type) or isinstance(value, kind)


def _fits_collection(value: Any, origin: type, inner: tuple[Any, ...]) -> bool:
    """Whether a value is a collection of its kind, and what is in it of theirs."""
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if issubclass(origin, Sequence):
        words = bool(inner) and get_origin(inner[0]) is not Literal  # the function itself says which words there are
        return is_sequence(value) and all(_fits(item, inner[0]) for item in (value if words else ()))
    return callable(value) if issubclass(origin, Callable) else isinstance(value, origin)  # type: ignore[arg-type]


_WORDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text", type(None): "None"}


def _described(kind: Any) -> str:
    """A kind in words: ``a whole number or None``."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_described(one) for one in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"{len(inner)} values"
    if origin is not None and isinstance(origin, type):
        if issubclass(origin, Mapping):
            return "a mapping of " + " to ".join(_described(one) for one in inner)
        if issubclass(origin, Sequence):
            words = {str: "a list of names", float: "a list of finite numbers", int: "a list of whole numbers"}
            return words.get(inner[0], "a list")
        return "a function"
    if kind in _WORDS:
        return _WORDS[kind]
    word = getattr(kind, "__name__", str(kind))
    return f"{'an' if word[0] in 'AEIOUaeiou' else 'a'} {word}"


def shown(value: object) -> str:
    """A value for a message, cut off where it is long."""
    text = repr(value) if isinstance(value, str | Real | bytes | type(None) | list | tuple | dict | set) else ""
    text = text or f"{type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."
