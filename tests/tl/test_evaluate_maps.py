"""tl.evaluate of maps: scores with known answers, on grids that are known to be the same."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity, Scale, Sequence, Translation

from stgen import metrics, tl
from stgen._spatial.records import write_image, write_table

GENES = ["A", "B", "C"]
SHAPE = (24, 30)
FACTOR = 6
BINS = {"um": Scale([10, 10], ("x", "y"))}


def add(sdata: SpatialData, key: str, values: np.ndarray, genes=GENES, transformations=BINS, **options) -> None:
    write_image(sdata, key, values, channels=genes, transformations=transformations, **options)


def pooled(counts: np.ndarray, factor: int = FACTOR) -> np.ndarray:
    genes, height, width = counts.shape
    return counts.reshape(genes, height // factor, factor, width // factor, factor).sum((2, 4))


@pytest.fixture
def rate() -> np.ndarray:
    """Expected counts of three genes: smooth, each of its own shape and size."""
    y, x = np.indices(SHAPE) / 10
    return np.stack([4 + 3 * np.sin(x + y), 1 + np.cos(2 * x) ** 2 + y, 0.2 + 0.1 * x])


@pytest.fixture
def truth(rate: np.ndarray) -> np.ndarray:
    """Counts; two columns of bins are outside the tissue."""
    counts = np.random.default_rng(0).poisson(rate).astype(float)
    counts[:, :, -2:] = np.nan
    return counts


@pytest.fixture
def sdata(truth: np.ndarray) -> SpatialData:
    sdata = SpatialData()
    add(sdata, "counts", truth)
    return sdata


def flat(values: np.ndarray) -> np.ndarray:
    """Maps ``(G, H, W)`` as locations by genes, of the bins inside the tissue."""
    return values[:, :, :-2].reshape(len(values), -1).T


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_a_perfect_map_scores_perfectly(sdata: SpatialData, truth: np.ndarray) -> None:
    add(sdata, "best", truth)
    add(sdata, "low", pooled(np.nan_to_num(truth)), transformations={"um": Scale([60, 60], ("x", "y"))})
    genes, summary = tl.evaluate(sdata, key="best", truth_key="counts", low_res="low")
    assert list(genes.index) == GENES
    assert genes.index.name == "gene"
    np.testing.assert_allclose(genes[["PCC", "SSIM"]], 1)
    zero = ["MSE", "RMSE", "MAE", "RVD", "Moran_difference", "residual_mean", "residual_max"]
    np.testing.assert_array_equal(genes[zero], 0)
    assert summary[["GSC", "SSC"]].tolist() == pytest.approx([1, 1])
    assert summary["constant_predictions"] == 0
    assert {"GSC_sample", "CRPS", "ceiling"}.isdisjoint(summary.index)


def test_a_constant_map_correlates_with_nothing(sdata: SpatialData, truth: np.ndarray) -> None:
    add(sdata, "flat", np.full(truth.shape, np.expm1(0.5)))
    genes, summary = tl.evaluate(sdata, key="flat", truth_key="counts")
    expression = np.log1p(flat(truth))
    np.testing.assert_allclose(genes["PCC"], 0, atol=1e-9)
    np.testing.assert_allclose(genes["RVD"], 1, rtol=1e-6)
    np.testing.assert_allclose(genes["MSE"], np.square(expression - 0.5).mean(0), rtol=1e-5)
    np.testing.assert_allclose(genes["RMSE"] ** 2, genes["MSE"])
    np.testing.assert_allclose(genes["MAE"], np.abs(expression - 0.5).mean(0), rtol=1e-5)
    moran = [metrics.morans_i_map(np.log1p(gene)) for gene in truth]
    np.testing.assert_allclose(genes["Moran_difference"], np.negative(moran), rtol=1e-5)
    assert summary["constant_predictions"] == 3


def test_scores_are_those_of_metrics_on_the_known_bins(sdata: SpatialData, rate, truth) -> None:
    predicted = rate.copy()
    predicted[:, :3] = np.nan  # unknown in the prediction alone
    add(sdata, "rate", predicted)
    genes, summary = tl.evaluate(sdata, key="rate", truth_key="counts", ranking=["C", "A", "unknown"])
    pred, expected = (np.log1p(flat(values[:, 3:])) for values in (rate, truth))
    for name in ("pcc", "mse", "mae", "rvd"):
        np.testing.assert_allclose(genes[name.upper()], getattr(metrics, name)(pred, expected), rtol=1e-4)
    assert summary["GSC"] == pytest.approx(metrics.gsc(pred, expected), abs=1e-5)
    for i, gene in enumerate(GENES):
        t = np.log1p(truth[i])
        ssim = metrics.ssim(np.log1p(predicted[i]), t, np.nanmax(t[3:]))
        assert genes.loc[gene, "SSIM"] == pytest.approx(ssim, abs=1e-5)
    assert summary["RVD_median"] == pytest.approx(genes["RVD"].median())


def test_gsc_does_not_depend_on_the_windows(sdata: SpatialData, rate, monkeypatch) -> None:
    add(sdata, "rate", rate)
    add(sdata, "rate_samples", np.tile(rate, (2, 1, 1)), [f"{g}:{i}" for i in range(2) for g in GENES])
    whole = tl.evaluate(sdata, key="rate", truth_key="counts").summary
    assert whole["GSC"] == pytest.approx(whole["GSC_sample"])
    monkeypatch.setattr("stgen.tl.evaluation.maps.MIN_WINDOW", 7)
    monkeypatch.setattr("stgen.tl.evaluation.maps.WINDOW_VALUES", 1)
    assert tl.evaluate(sdata, key="rate", truth_key="counts").summary["GSC"] == pytest.approx(whole["GSC"], abs=1e-9)


@pytest.mark.parametrize(
    ("transform", "function"),
    [("log1p_raw", np.log1p), ("log2p1_raw", lambda x: np.log2(x + 1)), ("none", lambda x: x)],
)
def test_scales(sdata: SpatialData, rate, truth, transform: str, function) -> None:
    add(sdata, "rate", rate)
    scale = {"A": 2.0, "B": 0.5, "C": 4.0}
    plain = tl.evaluate(sdata, key="rate", truth_key="counts", transform=transform).genes
    np.testing.assert_allclose(plain["MAE"], np.abs(function(flat(rate)) - function(flat(truth))).mean(0), rtol=1e-5)
    for gene_scale in (scale, pd.Series(scale)):
        scaled = tl.evaluate(sdata, key="rate", truth_key="counts", transform=transform, gene_scale=gene_scale).genes
        np.testing.assert_allclose(scaled["RMSE"], plain["RMSE"] / pd.Series(scale), rtol=1e-6)
        np.testing.assert_allclose(scaled["PCC"], plain["PCC"])
        ssim = metrics.ssim(function(rate[1]) / 0.5, function(truth[1]) / 0.5, 1.0)
        assert scaled.loc["B", "SSIM"] == pytest.approx(ssim, abs=1e-5)


def test_the_map_is_scored_and_its_samples_one_by_one(sdata: SpatialData, rate, truth) -> None:
    samples = np.random.default_rng(1).gamma(2, rate / 2, (20, *rate.shape))
    add(sdata, "result", samples.mean(0))
    order = [(g, s) for g in range(3) for s in range(20)]
    add(sdata, "result_samples", np.stack([samples[s, g] for g, s in order]), [f"{GENES[g]}:{s}" for g, s in order])
    genes, summary = tl.evaluate(sdata, key="result", truth_key="counts")
    single = np.log1p(np.stack([flat(sample) for sample in samples]))
    expected = np.log1p(flat(truth))
    np.testing.assert_allclose(genes["PCC"], metrics.pcc(np.log1p(flat(samples.mean(0))), expected), rtol=1e-5)
    np.testing.assert_allclose(genes["RVD_sample"], np.mean([metrics.rvd(s, expected) for s in single], 0), rtol=1e-4)
    np.testing.assert_allclose(genes["coverage_80%"], metrics.coverage(single, expected, 0.8))
    np.testing.assert_allclose(genes["CRPS"], metrics.crps(single, expected, centered=True), rtol=1e-5)
    assert summary["GSC"] == pytest.approx(metrics.gsc(single, expected), abs=1e-5)
    assert summary["GSC_sample"] == pytest.approx(np.mean([metrics.gsc(s, expected) for s in single]), abs=1e-5)
    moran = [np.mean([metrics.morans_i_map(np.log1p(s[g][:, :-2])) for s in samples]) for g in range(3)]
    true_moran = [metrics.morans_i_map(np.log1p(t)) for t in truth]
    np.testing.assert_allclose(genes["Moran_difference"], np.subtract(moran, true_moran), atol=1e-5)
    assert summary["SSC"] == pytest.approx(np.corrcoef(moran, true_moran)[0, 1], abs=1e-4)


def test_ceiling_is_the_root_of_the_correlation_of_two_halves(sdata: SpatialData, rate, truth) -> None:
    other = np.random.default_rng(7).poisson(rate).astype(float)
    other[0] = np.nanmean(truth[0])
    add(sdata, "other", other)
    add(sdata, "rate", rate)
    genes = tl.evaluate(sdata, key="rate", truth_key="counts", replicate_key="other").genes
    correlation = metrics.pcc(np.log1p(flat(truth)), np.log1p(flat(other)))
    np.testing.assert_allclose(genes["ceiling"], np.sqrt(np.maximum(correlation, 0)), atol=1e-5)
    assert np.isnan(genes.loc["A", "PCC/ceiling"])  # a replicate that varies nowhere bounds nothing
    np.testing.assert_allclose(genes["PCC/ceiling"][1:], (genes["PCC"] / genes["ceiling"])[1:])


def test_residual_of_a_map_that_is_ten_percent_too_high(sdata: SpatialData, rate, truth) -> None:
    add(sdata, "rate", rate)
    transformations = {"um": Scale([60, 60], ("x", "y"))}
    low = pooled(rate / 1.1)
    low[0, 1, 2] = 0  # measured nothing, predicted something: relative to one count
    add(sdata, "low", low, transformations=transformations)
    genes, summary = tl.evaluate(sdata, key="rate", truth_key="counts", low_res="low")
    np.testing.assert_allclose(genes.loc[["B", "C"], "residual_max"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(genes.loc[["B", "C"], "residual_mean"], 0.1, rtol=1e-4)
    stray = pooled(rate)[0, 1, 2]
    assert genes.loc["A", "residual_max"] == pytest.approx(stray, rel=1e-5)
    assert genes.loc["A", "residual_mean"] == pytest.approx((stray + 0.1 * (low[0].size - 1)) / low[0].size, rel=1e-4)
    assert summary["residual_max"] == genes["residual_max"].max()


def test_residual_over_spots_leaves_out_those_that_reach_beyond_the_map(sdata: SpatialData, rate) -> None:
    add(sdata, "rate", np.ones_like(rate))
    xy = np.array([[100.0, 100.0], [200.0, 120.0], [0.0, 100.0]])  # the last lies half outside
    sdata.shapes["spots"] = ShapesModel.parse(xy, geometry=0, radius=40, transformations={"um": Identity()})
    area = np.pi * 4**2
    table = AnnData(np.full((3, 3), area * 0.8, np.float32), var=pd.DataFrame(index=GENES))
    write_table(sdata, "spot_counts", table, region="spots")
    genes = tl.evaluate(sdata, key="rate", truth_key="counts", low_res="spot_counts").genes
    np.testing.assert_allclose(genes["residual_max"], 0.25, rtol=0.02)


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_genes_of_both_maps_are_scored_in_the_order_of_the_prediction(sdata: SpatialData, rate, caplog) -> None:
    values = rate[[2, 0, 1]].copy()
    values[1] = np.nan  # A is known nowhere
    add(sdata, "some", np.concatenate([values, values[:1]]), ["C", "A", "B", "unmeasured"])
    with caplog.at_level(logging.WARNING, "stgen"):
        genes, summary = tl.evaluate(sdata, key="some", truth_key="counts")
    assert list(genes.index) == ["C", "B"]
    assert "A has no bin that is known both" in caplog.text
    assert summary[["GSC", "SSC"]].isna().all()  # two genes have no structure to compare
    assert np.isfinite(summary.drop(["GSC", "SSC"])).all()


def test_grids_may_say_the_same_in_other_words(sdata: SpatialData, truth: np.ndarray) -> None:
    same = Sequence([Translation([2, 0], ("x", "y")), Scale([10, 10], ("x", "y")), Translation([-20, 0], ("x", "y"))])
    add(sdata, "best", truth, transformations={"um": same, "px": Scale([3, 3], ("x", "y"))})
    assert tl.evaluate(sdata, key="best", truth_key="counts").summary["RMSE"] == 0


@pytest.mark.parametrize(
    ("shape", "transformation", "message"),
    [
        ((23, 30), Scale([10, 10], ("x", "y")), "not on the same grid: 23 x 30 and 24 x 30 bins"),
        (SHAPE, Scale([11, 11], ("x", "y")), "corners are up to 3 bins apart"),
        (SHAPE, Scale([-10, 10], ("x", "y")), "not on the same grid"),
        (SHAPE, Sequence([Scale([10, 10], ("x", "y")), Translation([5, 0], ("x", "y"))]), "up to 0.5 bins apart"),
    ],
)
def test_maps_on_other_grids_are_refused(sdata: SpatialData, shape, transformation, message: str) -> None:
    add(sdata, "other", np.ones((3, *shape)), transformations={"um": transformation})
    with pytest.raises(ValueError, match=message):
        tl.evaluate(sdata, key="other", truth_key="counts")


def spoil(sdata: SpatialData) -> None:
    values = np.ones((3, *SHAPE))
    add(sdata, "result", values)
    add(sdata, "elsewhere", values, transformations={"px": Identity()})
    add(sdata, "others", values, ["D", "E", "F"])
    add(sdata, "nowhere", np.full_like(values, np.nan))
    add(sdata, "negative", -values)
    add(sdata, "coarse", values[:, :4, :4], transformations={"um": Scale([25, 25], ("x", "y"))})
    sdata.attrs["stgen"] = {"elsewhere": {"bin_um": 10.0}}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": "nothing"}, KeyError, "no map 'nothing' to score.*'counts'.*tl.superresolve"),
        ({"truth_key": None}, KeyError, "pass truth_key="),
        ({"truth_key": "nothing"}, KeyError, "no map in sdata.images 'nothing'"),
        ({"truth_key": "elsewhere"}, ValueError, "share no coordinate system"),
        ({"truth_key": "others"}, ValueError, "no gene in common.*A, B, C.*D, E, F"),
        ({"truth_key": "nowhere"}, ValueError, "nothing to score"),
        ({"truth_key": "negative"}, ValueError, r"The map 'negative' \(A\) holds negative values"),
        ({"replicate_key": "nothing"}, KeyError, "nothing"),
        ({"low_res": "nothing"}, KeyError, "no map or table 'nothing'"),
        ({"low_res": "coarse"}, ValueError, "whole block"),
        ({"transform": "sqrt"}, ValueError, "`transform` must be one of"),
        ({"transform": "log1p_norm"}, ValueError, "needs the total counts"),
        ({"gene_scale": {"A": 1.0, "B": 1.0}}, KeyError, "no entry for 1 of 3 genes: C"),
        ({"gene_scale": {"A": 1.0, "B": 0.0, "C": 1.0}}, ValueError, "found 0 for B"),
        ({"truth_layer": "rate"}, ValueError, "`truth_layer` is for predictions in a table"),
    ],
)
def test_what_is_wrong_is_said(sdata: SpatialData, arguments: dict, error: type, message: str) -> None:
    spoil(sdata)
    with pytest.raises(error, match=message):
        tl.evaluate(sdata, **{"key": "result", "truth_key": "counts", **arguments})


def test_arguments_of_maps_are_refused_for_tables() -> None:
    with pytest.raises(KeyError, match="transform is for maps"):
        tl.evaluate(AnnData(np.ones((3, 2))), key="predicted", transform="none")
