from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc
import torch

from stgen.transforms import UNITS, inverse_transform, transform_counts, unit

COUNTS = np.random.default_rng(0).poisson(2.0, (20, 7))
TOTAL = COUNTS.sum(1) + 5


def test_normalized_is_that_of_scanpy():
    adata = sc.AnnData(
        np.column_stack([COUNTS, np.full(20, 5)]).astype(np.float32)
    )  # all genes, the modeled ones first
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(transform_counts(COUNTS, TOTAL, "log1p_norm"), adata.X[:, :7], rtol=1e-5)


def test_raw_logarithms():
    np.testing.assert_allclose(transform_counts(COUNTS, TOTAL, "log1p_raw"), np.log(COUNTS + 1), rtol=1e-6)
    np.testing.assert_allclose(transform_counts(COUNTS, TOTAL, "log2p1_raw"), np.log2(COUNTS + 1), rtol=1e-6)
    np.testing.assert_array_equal(transform_counts(COUNTS, TOTAL, "none"), COUNTS)


@pytest.mark.parametrize("name", UNITS)
def test_zero_stays_zero(name):
    x = transform_counts(np.zeros((2, 3)), np.array([0.0, 10.0]), name)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("name", UNITS)
def test_more_counts_are_never_less(name):
    x = transform_counts(np.arange(50)[:, None], np.full(50, 100), name)
    assert (np.diff(x[:, 0]) > 0).all()


def test_input_is_left_alone():
    counts = COUNTS.astype(np.float32)
    transform_counts(counts, TOTAL, "log1p_norm")
    np.testing.assert_array_equal(counts, COUNTS)


def test_units():
    assert {unit(name) for name in UNITS} == set(UNITS.values())
    assert unit("log1p_norm") == "log1p(counts per 10,000)"
    with pytest.raises(ValueError, match="unknown transform 'log10'; the transforms are 'log1p_norm'"):
        transform_counts(COUNTS, TOTAL, "log10")


@pytest.mark.parametrize("name", ["log1p_raw", "log2p1_raw", "none"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_counts_come_back(name, kind):
    x = kind(transform_counts(COUNTS, TOTAL, name))
    counts = inverse_transform(x, name)
    assert type(counts) is type(x)
    assert counts.shape == x.shape
    np.testing.assert_allclose(counts, COUNTS, rtol=1e-5, atol=1e-6)


def test_inverse_of_maps_and_of_what_no_count_gives():
    x = torch.linspace(-0.5, 3, 24).reshape(1, 2, 3, 4)
    torch.testing.assert_close(inverse_transform(x, "log1p_raw"), x.exp() - 1)
    torch.testing.assert_close(inverse_transform(x, "log2p1_raw"), 2**x - 1)
    assert inverse_transform(x, "none") is x


def test_what_cannot_be_undone():
    with pytest.raises(ValueError, match="cannot be undone without library sizes; use transform='log1p_raw'"):
        inverse_transform(np.zeros(3), "log1p_norm")
    with pytest.raises(ValueError, match="unknown transform 'log10'"):
        inverse_transform(np.zeros(3), "log10")
