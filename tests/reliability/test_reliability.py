"""A quick profile of ``make reliability``."""

from __future__ import annotations

import pytest
from bad_inputs import public
from damaged_folders import MOST_MB, run_all
from kills import run_all as kill
from properties import PROPERTIES, run
from small_world import calls


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_hold(name: str) -> None:
    run(name, 10)


def test_damaged_folders_load_as_saved_or_are_refused() -> None:
    outcomes, mb = run_all(120)
    assert [str(outcome) for outcome in outcomes if not outcome.ok] == []
    assert mb < MOST_MB


def test_a_killed_save_leaves_the_old_model_or_the_new() -> None:
    assert [str(outcome) for outcome in kill(10, names=("save",)) if not outcome.ok] == []


def test_every_public_function_has_a_valid_call() -> None:
    assert {name.split("/")[0] for name in calls()} == set(public())
