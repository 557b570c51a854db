from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc

from stgen.transforms import UNITS, transform_counts, unit

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
