"""What a user passes is what a function says it takes, or an error that names the argument."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import pytest

from stgen._checks import (
    check_choice,
    check_flag,
    check_genes,
    check_key,
    check_not_negative,
    check_number,
    check_positive,
    check_seed,
    check_share,
    check_types,
    check_whole,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@check_types
def typed(
    data: object,
    *,
    whole: int | None = None,
    number: float = 1.0,
    names: Sequence[str] | None = None,
    choice: Literal["x", "y"] | None = None,
    pair: tuple[float, float] = (0, 1),
    flag: bool = False,
    key_added: str = "k",
    groups: Mapping[str, Sequence[str]] | None = None,
    text_or_names: str | Sequence[str] = "a",
    ax: Axes | None = None,
) -> str:
    """A function of every kind of argument."""
    return "done"


def test_types_take_what_is_of_their_type():
    given = {
        "whole": [3, np.int64(3), None],
        "number": [2, 2.5, np.float32(2)],
        "names": [["a"], ("a",), np.array(["a"]), pd.Index(["a"]), []],
        "choice": ["x", None],
        "pair": [(0, 1), [0.5, 1], np.array([0.0, 1.0])],
        "flag": [True, np.bool_(True)],
        "key_added": ["a-b_c.d", "µ"],
        "groups": [{"a": ["b"]}, None],
        "text_or_names": ["a", ["a"]],
        "ax": [object()],  # known to the type checker only
    }
    for name, values in given.items():
        for value in values:
            assert typed(None, **{name: value}) == "done", (name, value)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("whole", 1.5, ValueError, "must be a whole number or None, found 1.5."),
        ("whole", "3", ValueError, "must be a whole number or None, found '3'."),
        ("whole", True, ValueError, "must be a whole number or None, found True."),
        ("number", math.nan, ValueError, "must be a finite number, found nan."),
        ("number", "x", ValueError, "must be a finite number, found 'x'."),
        ("names", "abc", TypeError, "must be a list of names, found a string; pass names=['abc']."),
        ("names", [1], TypeError, "must be a list of names or None, found [1]."),
        ("names", {"a"}, TypeError, "must be a list of names or None, found {'a'}."),
        ("choice", "z", ValueError, "must be one of 'x', 'y', found 'z'."),
        ("choice", [], ValueError, "must be one of 'x', 'y', found []."),
        ("pair", (1,), ValueError, "must be 2 values, found (1,)."),
        ("flag", 1, TypeError, "must be True or False, found 1."),
        ("key_added", "", ValueError, "must be a name that can be stored"),
        ("key_added", "a/b", ValueError, "must be a name that can be stored"),
        ("key_added", 3, TypeError, "must be text, found 3."),
        ("groups", {"a": 3}, TypeError, "must be a mapping of text to a list of names or None, found {'a': 3}."),
        ("text_or_names", 3, TypeError, "must be text or a list of names, found 3."),
    ],
)
def test_types_refuse_what_is_not(name, value, error, message):
    with pytest.raises(error) as caught:
        typed(None, **{name: value})
    assert str(caught.value).startswith(f"`{name}` {message}")


def test_typed_functions_keep_their_signature_and_their_own_errors():
    assert list(inspect.signature(typed).parameters)[:2] == ["data", "whole"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'another'"):
        typed(None, another=1)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (check_whole, ("n", "x"), "`n` must be a whole number of at least 1, found 'x'."),
        (check_whole, ("n", 0), "`n` must be a whole number of at least 1, found 0."),
        (check_whole, ("n", 10**12), "`n` must be a whole number of at most 2147483647, found 1000000000000."),
        (check_seed, (-1,), "`seed` must be a whole number of at least 0, found -1."),
        (check_number, ("x", math.inf), "`x` must be a finite number, found inf."),
        (check_positive, ("bin_um", 0), "`bin_um` must be a positive number of µm, found 0."),
        (check_positive, ("k", True, ""), "`k` must be a positive number, found True."),
        (check_not_negative, ("w", -1), "`w` must be a finite number that is not negative, found -1."),
        (check_share, ("p", 1), "`p` must be a share in [0, 1), found 1."),
        (check_share, ("p", 0, "(0, 1]"), "`p` must be a share in (0, 1], found 0."),
        (check_choice, ("kind", "c", ("a", "b")), "`kind` must be one of 'a', 'b', found 'c'."),
        (check_key, ("key", "__a"), "`key` must be a name that can be stored"),
        (check_key, ("key", "x" * 300), "`key` must be a name that can be stored"),
        (check_genes, ([],), "`genes` must be names without repetition, at least one; found none."),
        (check_genes, (["A", "A"],), "`genes` must be names without repetition, found more than once: A."),
    ],
)
def test_a_check_has_one_wording(check, arguments, message):
    with pytest.raises(ValueError, match="must be") as caught:
        check(*arguments)
    assert str(caught.value).startswith(message)


def test_checks_return_plain_values():
    assert type(check_whole("n", np.int32(3))) is int
    assert type(check_flag("f", np.bool_(True))) is bool
    assert check_share("p", 0.5) == check_number("x", 0.5, least=0, most=1) == 0.5
    assert check_genes(np.array(["A", "B"])) == ["A", "B"]
