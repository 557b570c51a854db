from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from stgen import metrics

TRUTH = np.random.default_rng(0).gamma(2, size=(40, 6))
PRED = TRUTH + np.random.default_rng(1).normal(size=(40, 6))


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def test_errors_are_those_of_sklearn():
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    np.testing.assert_allclose(metrics.mse(PRED, TRUTH), mean_squared_error(TRUTH, PRED, multioutput="raw_values"))
    np.testing.assert_allclose(metrics.rmse(PRED, TRUTH) ** 2, metrics.mse(PRED, TRUTH))
    np.testing.assert_allclose(metrics.mae(PRED, TRUTH), mean_absolute_error(TRUTH, PRED, multioutput="raw_values"))


# ---- correlation ----------------------------------------------------------------------------------------------------


def test_pcc_is_that_of_scipy():
    np.testing.assert_allclose(metrics.pcc(PRED, TRUTH), stats.pearsonr(PRED, TRUTH, axis=0).statistic)


def test_pcc_is_signed_and_knows_no_scale():
    np.testing.assert_allclose(metrics.pcc(-3 * TRUTH + 7, TRUTH), -1)
    np.testing.assert_allclose(metrics.pcc(100 * PRED + 7, TRUTH), metrics.pcc(PRED, TRUTH))


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_genes_correlate_with_nothing(value, dtype):
    constant = np.full(TRUTH.shape, value, dtype)
    for pair in ((constant, TRUTH), (PRED, constant), (constant, constant)):
        np.testing.assert_allclose(metrics.pcc(*pair), 0, atol=1e-9)


def test_top_k():
    scores = np.array([0.1, -0.9, 0.5, 0.3])
    assert metrics.top_k(scores, 2) == pytest.approx(0.4)
    assert metrics.top_k(scores, 99) == pytest.approx(0.0)
    assert metrics.top_k(scores, 2, ranking=np.array([1, 2, 0, 3])) == pytest.approx(-0.2)


def test_noise_ceiling_is_reached_by_the_true_rate(rng):
    rate = np.exp(rng.normal(size=(20_000, 3)) * [0.2, 0.5, 1.0]) * 3
    half_a, half_b = rng.poisson(rate), rng.poisson(rate)
    np.testing.assert_allclose(metrics.noise_ceiling(half_a, half_b), metrics.pcc(rate, half_b), atol=0.03)
    np.testing.assert_array_equal(metrics.noise_ceiling(TRUTH, -TRUTH), 0)


# ---- structure ------------------------------------------------------------------------------------------------------


def test_rvd_by_hand():
    truth = np.array([[0.0, 0.0, 5.0], [2.0, 4.0, 5.0]])  # variances 1, 4, 0
    pred = np.array([[0.0, 1.0, 1.0], [4.0, 3.0, 2.0]])  # variances 4, 1, 1/4
    np.testing.assert_allclose(metrics.rvd(pred, truth), [9.0, 0.5625, np.nan])


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
def test_rvd_of_a_constant_truth_is_not_a_number(value):
    assert np.isnan(metrics.rvd(PRED[:7], np.full((7, 6), value))).all()
    np.testing.assert_allclose(metrics.rvd(np.full(TRUTH.shape, value), TRUTH), 1)
    np.testing.assert_allclose(metrics.rvd(1e-9 * PRED, 1e-9 * TRUTH), metrics.rvd(PRED, TRUTH))


def test_gene_correlation():
    np.testing.assert_allclose(metrics.gene_correlation(TRUTH), np.corrcoef(TRUTH.T))
    x = np.column_stack([TRUTH[:, 0], np.full(40, 0.1)])
    np.testing.assert_allclose(metrics.gene_correlation(x), [[1, 0], [0, 0]], atol=1e-12)


def test_gsc_by_hand():
    """Three genes have three correlations, (ab, ac, bc). Orthogonal contrasts make them exact."""
    u, v, w = np.array([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    truth = np.column_stack([u, u + v, v + w])  # 1/sqrt 2, 0, 1/2
    pred = np.column_stack([u, v, u + v])  # 0, 1/sqrt 2, 1/sqrt 2
    expected = np.corrcoef([0.5**0.5, 0, 0.5], [0, 0.5**0.5, 0.5**0.5])[0, 1]
    assert metrics.gsc(pred, truth) == pytest.approx(expected)
    assert metrics.gsc(truth * [1, 20, 3] + 5, truth) == pytest.approx(1)


def test_structure_scores_average_over_samples():
    weights = np.eye(40, k=1) + np.eye(40, k=-1)
    samples = np.stack([PRED, TRUTH, PRED[::-1]])
    upper = np.triu_indices(6, 1)
    mean = np.mean([np.corrcoef(s.T)[upper] for s in samples], 0)
    assert metrics.gsc(samples, TRUTH) == pytest.approx(np.corrcoef(mean, np.corrcoef(TRUTH.T)[upper])[0, 1])
    moran = np.mean([metrics.morans_i(s, weights) for s in samples], 0)
    expected = np.corrcoef(moran, metrics.morans_i(TRUTH, weights))[0, 1]
    assert metrics.ssc(samples, TRUTH, weights) == pytest.approx(expected)
    for score in (metrics.gsc, lambda a, b: metrics.ssc(a, b, weights)):
        assert score(TRUTH[None], TRUTH) == pytest.approx(1)


def test_morans_i_is_that_of_squidpy():
    import anndata as ad
    import scipy.sparse as sp
    import squidpy as sq

    xy = np.stack(np.meshgrid(range(8), range(5)), -1).reshape(-1, 2)
    adata = ad.AnnData(TRUTH + np.sin(xy[:, :1]), obsm={"spatial": xy.astype(float)})
    sq.gr.spatial_neighbors(adata, coord_type="grid", n_neighs=4)
    sq.gr.spatial_autocorr(adata, mode="moran", transformation=False, n_perms=None)
    weights = adata.obsp["spatial_connectivities"]
    expected = adata.uns["moranI"]["I"].reindex(adata.var_names)
    for form in (weights, weights.toarray(), sp.coo_matrix(weights)):
        np.testing.assert_allclose(metrics.morans_i(adata.X, form), expected, rtol=1e-5)


def test_morans_i_of_a_checkerboard_is_minus_one():
    row, column = np.divmod(np.arange(36), 6)
    weights = (abs(row[:, None] - row) + abs(column[:, None] - column) == 1).astype(float)
    board = (row + column) % 2
    found = metrics.morans_i(np.column_stack([board, np.full(36, 0.1), row]), weights)
    np.testing.assert_allclose(found[:2], [-1, 0], atol=1e-12)
    assert found[2] > 0.7


# ---- samples --------------------------------------------------------------------------------------------------------


def test_crps_is_that_of_all_pairs(rng):
    samples = rng.normal(size=(7, 40, 6))
    pairs = np.abs(samples[:, None] - samples[None]).sum((0, 1)) / (7 * 6)
    expected = (np.abs(samples - TRUTH).mean(0) - pairs / 2).mean(0)
    np.testing.assert_allclose(metrics.crps(samples, TRUTH), expected)
    np.testing.assert_allclose(metrics.crps(samples[:1], TRUTH), metrics.mae(samples[0], TRUTH))


@pytest.mark.parametrize("n_samples", [2, 20])
def test_crps_of_a_perfect_forecast(rng, n_samples):
    """For a standard normal it is 1 / sqrt(pi), however few the samples (the estimator is fair)."""
    samples, truth = rng.normal(size=(n_samples, 40_000, 1)), rng.normal(size=(40_000, 1))
    assert float(metrics.crps(samples, truth)[0]) == pytest.approx(np.pi**-0.5, abs=0.015)


@pytest.mark.parametrize("n_samples", [5, 20])
def test_crps_of_centered_samples_is_as_fair(rng, n_samples):
    """Samples from centered noise lie further apart than independent ones, which would flatter the model."""
    from stgen.diffusion import centered_noise

    generators = [torch.Generator().manual_seed(i) for i in range(20_000)]
    samples = centered_noise(n_samples, (1,), generators).transpose(0, 1).numpy()
    truth = rng.normal(size=(20_000, 1))
    assert float(metrics.crps(samples, truth, centered=True)[0]) == pytest.approx(np.pi**-0.5, abs=0.012)
    assert metrics.crps(samples, truth) < metrics.crps(samples, truth, centered=True)


def test_crps_prefers_the_truth(rng):
    samples = rng.normal(size=(20, 5000, 1))
    truth = rng.normal(size=(5000, 1))
    right = metrics.crps(samples, truth)
    for wrong in (samples + 0.5, samples * 2, samples * 0.5):
        assert metrics.crps(wrong, truth) > right


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("n_samples", [20, 39])
def test_coverage_of_a_known_distribution(rng, level, n_samples):
    samples, truth = rng.gamma(3, size=(n_samples, 5000, 2)), rng.gamma(3, size=(5000, 2))
    np.testing.assert_allclose(metrics.coverage(samples, truth, level), level, atol=0.03)


def test_coverage_by_hand():
    """Thirty-nine samples: the central 95 % run from the lowest to the highest."""
    samples = np.tile(np.arange(39.0)[:, None, None], (1, 5, 1))
    truth = np.array([[-0.1], [1e-9], [7.5], [38 - 1e-9], [38.1]])
    assert metrics.coverage(samples, truth, 0.95).tolist() == [0.6]


@pytest.mark.parametrize(("n_samples", "level", "known"), [(2, 0.5, 0), (19, 0.9, 0), (20, 0.9, 1), (20, 0.95, 0)])
def test_coverage_that_the_samples_do_not_show_is_nan(rng, n_samples, level, known):
    found = metrics.coverage(rng.normal(size=(n_samples, 50, 3)), rng.normal(size=(50, 3)), level)
    assert np.isfinite(found).tolist() == [bool(known)] * 3


# ---- maps -----------------------------------------------------------------------------------------------------------


def test_ssim(rng):
    image = rng.uniform(size=(24, 30))
    assert metrics.ssim(image, image, 1.0) == pytest.approx(1)
    assert metrics.ssim(image + 0.2 * rng.normal(size=image.shape), image, 1.0) < 0.95
    a, b, c1 = 0.3, 0.8, (0.01 * 2) ** 2  # constant maps: only the luminance term is left
    found = metrics.ssim(np.full((24, 24), a), np.full((24, 24), b), 2.0)
    assert found == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1))


def test_ssim_of_a_complete_map_is_that_of_skimage(rng):
    from skimage.metrics import structural_similarity

    truth, pred = rng.gamma(2, size=(2, 31, 24))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(truth, pred, data_range=3.0, **window)
    assert metrics.ssim(pred, truth, 3.0) == pytest.approx(expected, abs=1e-12)


def test_ssim_leaves_out_unknown_bins(rng):
    truth, pred = rng.gamma(2, size=(2, 40, 30))
    outside = np.zeros(truth.shape, bool)
    outside[:, 18:] = outside[3:7, 9] = True
    values = []
    for hidden in (np.nan, 1e6):  # whatever stands in bins that the other map does not know
        holed = np.where(outside, np.nan, truth)
        values.append(metrics.ssim(np.where(outside, hidden, pred), holed, 3.0))
    assert values[0] == values[1]
    assert np.isfinite(values[0])
    assert metrics.ssim(np.where(outside, np.nan, truth), truth, 3.0) == pytest.approx(1)
    constant = metrics.ssim(np.where(outside, np.nan, 0.3), np.full(truth.shape, 0.8), 2.0)
    c1 = (0.01 * 2) ** 2
    assert constant == pytest.approx((2 * 0.3 * 0.8 + c1) / (0.3**2 + 0.8**2 + c1))


def test_ssim_without_a_bin_to_score():
    assert np.isnan(metrics.ssim(np.ones((10, 30)), np.ones((10, 30)), 1.0))
    assert np.isnan(metrics.ssim(np.full((20, 20), np.nan), np.ones((20, 20)), 1.0))
    with pytest.raises(ValueError, match="data_range must be positive, found 0"):
        metrics.ssim(np.ones((20, 20)), np.ones((20, 20)), 0)


def test_morans_i_of_a_map_is_that_of_its_grid(rng):
    values = np.cumsum(rng.normal(size=(9, 7)), 1)
    row, column = (index.ravel() for index in np.indices(values.shape))
    weights = (abs(row[:, None] - row) + abs(column[:, None] - column) == 1).astype(float)
    assert metrics.morans_i_map(values) == pytest.approx(metrics.morans_i(values.reshape(-1, 1), weights)[0])
    hole = rng.random(values.shape) < 0.2
    kept = ~hole.ravel()
    expected = metrics.morans_i(values.reshape(-1, 1)[kept], weights[np.ix_(kept, kept)])[0]
    assert metrics.morans_i_map(np.where(hole, np.nan, values)) == pytest.approx(expected)
    assert metrics.morans_i_map(np.full((4, 4), 0.1)) == 0
    assert metrics.morans_i_map(np.full((4, 4), np.nan)) == 0


# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pcc", "mse", "rmse", "mae", "rvd"])
@pytest.mark.parametrize("pred", [PRED[:-1], PRED[:, 0], PRED[None]])
def test_shapes_must_agree(name, pred):
    with pytest.raises(ValueError, match=r"both be \(locations, genes\), found"):
        getattr(metrics, name)(pred, TRUTH)


@pytest.mark.parametrize("name", ["crps", "coverage"])
def test_shapes_of_samples_must_agree(name):
    with pytest.raises(ValueError, match=r"over the truth's \(40, 6\), found \(40, 6\)"):
        getattr(metrics, name)(TRUTH, TRUTH)
