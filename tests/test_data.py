from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from stgen.data import SpotData, StepSampler, dihedral, group_folds

# ---- the eight views of a square ------------------------------------------------------------------------------------

SQUARE = torch.arange(9).reshape(3, 3)


def as_bytes(x):
    return x.contiguous().numpy().tobytes()


def test_views_are_the_dihedral_group():
    views = {as_bytes(dihedral(SQUARE, v)): v for v in range(8)}
    assert len(views) == 8
    assert torch.equal(dihedral(SQUARE, 0), SQUARE)
    table = np.array([[views[as_bytes(dihedral(dihedral(SQUARE, a), b))] for a in range(8)] for b in range(8)])
    for line in itertools.chain(table, table.T):  # closed, and every element has an inverse: a Latin square
        assert sorted(line) == list(range(8))


def test_views_act_on_the_last_two_dimensions():
    maps = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    for view in range(8):
        torch.testing.assert_close(dihedral(maps, view)[1, 2], dihedral(maps[1, 2], view))


def test_views_as_documented():
    assert torch.equal(dihedral(SQUARE, 4), SQUARE.flip(-1))
    assert torch.equal(dihedral(SQUARE, 2), SQUARE.flip(0, 1))
    with pytest.raises(ValueError, match=r"0\.\.7, found 8"):
        dihedral(SQUARE, 8)


# ---- locations ------------------------------------------------------------------------------------------------------


def test_spot_data(spots):
    assert len(spots) == 72
    assert spots.n_views == 1
    item = spots[3]
    assert set(item) == {"index", "x", "h"}
    assert item["x"].dtype == item["h"].dtype == torch.float32
    assert int(item["index"]) == 3
    assert torch.equal(item["h"], spots.h[3, 0])


def test_views_of_the_embedding():
    h = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    data = SpotData(np.zeros((2, 1)), h)
    assert data.n_views == 8
    assert data[1, 5]["h"].tolist() == h[1, 5].tolist()
    assert data[1]["h"].tolist() == h[1, 0].tolist()


def test_subset_takes_everything_along(spots):
    data = SpotData(spots.x, spots.h, spots.group, mean=spots.x + 1)
    part = data.subset(np.array([5, 60]))
    assert torch.equal(part.x, spots.x[[5, 60]])
    assert torch.equal(part.h, spots.h[[5, 60]])
    assert torch.equal(part[1]["mean"], spots.x[60] + 1)
    assert part.group.tolist() == [0, 5]


def test_mean_becomes_like_the_rest():
    data = SpotData(np.zeros((2, 3)), np.zeros((2, 1)), mean=np.ones((2, 3)))
    assert data[0]["mean"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"x and mean differ in shape: \(2, 3\), \(3, 3\)"):
        SpotData(np.zeros((2, 3)), np.zeros((2, 1)), mean=np.ones((3, 3)))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="differ in length: 3, 2, 3"):
        SpotData(np.zeros((3, 1)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="differ in length: 3, 3, 1"):
        SpotData(np.zeros((3, 1)), np.zeros((3, 1)), np.zeros(1))


# ---- order of training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])
def test_every_row_is_seen_equally_often(batch_size):
    steps = 10  # of 10 rows: whole passes over the data, whatever the size of the batch
    batches = list(StepSampler(10, 3, batch_size=batch_size, start=0, stop=steps, seed=1))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    rows = [row for batch in batches for row, _ in batch]
    assert Counter(rows) == dict.fromkeys(range(10), batch_size)
    for epoch in range(batch_size):
        assert sorted(rows[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert batch_size == 1 or rows[:10] != rows[10:20]  # in another order each time


def test_views_are_drawn_evenly():
    views = [view for batch in StepSampler(10, 8, batch_size=80, start=0, stop=100, seed=0) for _, view in batch]
    counts = np.bincount(views, minlength=8)
    assert abs(counts / 1000 - 1).max() < 0.12  # four standard deviations
    assert len({tuple(b) for b in StepSampler(4, 8, batch_size=4, start=0, stop=20, seed=0)}) == 20


@pytest.mark.parametrize("start", [0, 1, 7, 30])
def test_a_run_that_starts_late_sees_what_the_other_would_have_seen(start):
    whole = list(StepSampler(11, 8, batch_size=4, start=0, stop=30, seed=5))
    late = StepSampler(11, 8, batch_size=4, start=start, stop=30, seed=5)
    assert whole[start:] == list(late)
    assert list(late) == list(late)
    assert len(late) == 30 - start


def test_another_seed_another_order():
    one, two = (list(StepSampler(50, 1, batch_size=50, start=0, stop=1, seed=s)) for s in (0, 1))
    assert one != two
    assert len(StepSampler(5, 1, batch_size=1, start=9, stop=3, seed=0)) == 0


# ---- folds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_folds", [2, 5, 20])
def test_folds_keep_groups_whole(n_folds):
    group = np.random.default_rng(0).choice(["a", "b", "c", "d", "e", "f", "g"], 200)
    folds = group_folds(group, n_folds)
    assert set(folds) == set(range(min(n_folds, 7)))
    for name in np.unique(group):
        assert len(set(folds[group == name])) == 1


def test_folds_are_balanced():
    group = np.repeat(np.arange(20), np.arange(1, 21))
    sizes = np.bincount(group_folds(group, 5))
    assert sizes.sum() == 210
    assert sizes.max() - sizes.min() <= 3
    assert group_folds(group, 5).tolist() == group_folds(group, 5).tolist()


@pytest.mark.parametrize(("n", "expected"), [(10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), (3, [0, 1, 2])])
def test_one_group_is_cut_into_runs(n, expected):
    assert group_folds(np.zeros(n)).tolist() == expected
