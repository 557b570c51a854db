"""Pictures of predictions beside their truth: what was drawn, within which limits, under which names."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import Scale

from stgen import metrics, pl, tl
from stgen._spatial.records import provenance, record, write_image
from stgen.metrics import ssim_map
from stgen.tl import GeneCorrelation, Scores

mpl.use("Agg")

GENES = ["A", "B", "C"]
BINS = {"um": Scale([10, 10], ("x", "y"))}
SHAPE = (20, 26)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def table() -> AnnData:
    """300 rows, a prediction with 24 samples from the distribution of the truth."""
    rng = np.random.default_rng(0)
    center = rng.uniform(2, 6, (300, 3))
    table = AnnData((center + rng.normal(size=(300, 3))).clip(0).astype(np.float32), var=pd.DataFrame(index=GENES))
    samples = center[:, None] + rng.normal(size=(300, 24, 3))
    table.layers["predicted"] = samples.mean(1)
    table.var["predicted"] = True
    table.obsm["predicted_samples"] = samples
    entry = provenance("tl.predict_expression", transform="none") | {"sample_genes": "A\nB\nC"}
    record(table, "predicted", entry)
    table.layers["narrow"] = table.layers["predicted"]
    table.var["narrow"] = True
    table.obsm["narrow_samples"] = center[:, None] + 0.1 * (samples - center[:, None])
    record(table, "narrow", entry)
    return table


@pytest.fixture
def sdata() -> SpatialData:
    rng = np.random.default_rng(1)
    truth = rng.gamma(2, 2, (3, *SHAPE))
    truth[:, :, -3:] = np.nan
    sdata = SpatialData()
    write_image(sdata, "truth", truth, channels=GENES, transformations=BINS)
    write_image(sdata, "map", truth + rng.uniform(0, 1, truth.shape), channels=GENES, transformations=BINS)
    return sdata


# ---- gene correlation ------------------------------------------------------------------------------------------------


def correlation(seed: int, truth: pd.DataFrame | None = None, genes=("A", "B", "C", "D", "E", "F")) -> GeneCorrelation:
    x = np.random.default_rng(seed).normal(size=(30, len(genes)))
    matrix = pd.DataFrame(metrics.gene_correlation(x), index=genes, columns=genes)
    return GeneCorrelation(matrix, truth, "log1p(counts)")


def test_gene_correlation_puts_all_in_the_order_of_the_truth() -> None:
    genes = list("ABCDEF")
    truth = pd.DataFrame(np.eye(6), index=genes, columns=genes)
    for i, j in (("A", "D"), ("B", "F"), ("C", "E")):
        truth.loc[i, j] = truth.loc[j, i] = 0.9
    results = {"x": correlation(0, truth), "y": correlation(1, truth)}
    axes = pl.gene_correlation(results)
    assert [ax.get_title() for ax in axes] == [*(f"{n}\nGSC {r.gsc:.2f}" for n, r in results.items()), "truth"]
    order = [label.get_text() for label in axes[0].get_xticklabels()]
    assert {frozenset(order[i : i + 2]) for i in (0, 2, 4)} == {frozenset("AD"), frozenset("BF"), frozenset("CE")}
    for ax, matrix in zip(axes, [results["x"].prediction, results["y"].prediction, truth], strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), matrix.loc[order, order])
        assert ax.images[0].get_clim() == (-1, 1)


def test_gene_correlation_without_truth_and_on_given_axes() -> None:
    ax = plt.figure().subplots()
    (drawn,) = pl.gene_correlation(correlation(0), axes=ax)
    assert drawn is ax
    assert ax.get_title() == "prediction"
    many = pl.gene_correlation(correlation(0, genes=[f"g{i}" for i in range(50)]))[0]
    assert many.get_xlabel() == "50 genes"
    assert len(many.get_xticks()) == 0


def test_gene_correlation_refuses_what_cannot_be_compared() -> None:
    truth = correlation(5).prediction
    with pytest.raises(TypeError, match="tl.gene_correlation returned"):
        pl.gene_correlation(truth)
    with pytest.raises(ValueError, match="empty"):
        pl.gene_correlation({})
    with pytest.raises(ValueError, match="other genes"):
        pl.gene_correlation({"x": correlation(0), "y": correlation(0, genes=list("ABC"))})
    with pytest.raises(ValueError, match="another truth"):
        pl.gene_correlation({"x": correlation(0, truth), "y": correlation(0)})
    with pytest.raises(ValueError, match="2 are needed"):
        pl.gene_correlation(correlation(0, truth), axes=plt.figure().subplots())


# ---- local SSIM ------------------------------------------------------------------------------------------------------


def test_ssim_map_has_the_mean_that_is_scored() -> None:
    rng = np.random.default_rng(0)
    truth = rng.gamma(2, 1, (30, 24))
    pred = truth + rng.normal(size=truth.shape)
    truth[8:12, 5:9] = np.nan
    similarity = ssim_map(pred, truth, 4.0)
    assert np.nanmean(similarity) == pytest.approx(metrics.ssim(pred, truth, 4.0))
    assert np.isnan(similarity[8:12, 5:9]).all()
    assert np.isnan(similarity[:5]).all()
    np.testing.assert_allclose(ssim_map(truth, truth, 4.0)[5:8, 5:-5], 1)


def test_local_ssim_lies_where_the_map_does(sdata: SpatialData) -> None:
    axes = pl.local_ssim(sdata, ["B", "A"], keys=["map", "truth"], truth_key="truth")
    assert axes.shape == (2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["map", "truth"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["B", "A"]
    assert axes[0, 1].get_xlabel() == "SSIM 1.00"
    scored = tl.evaluate(sdata, key="map", truth_key="truth").genes["SSIM"]
    assert axes[1, 0].get_xlabel() == f"SSIM {scored['A']:.2f}"
    image = axes[0, 0].images[0]
    assert image.get_array().shape == SHAPE
    assert image.get_clim() == (-1, 1)
    assert image.get_extent() == [0, 260, 200, 0]
    assert (axes[0, 0].get_xlim(), axes[0, 0].get_ylim()) == ((0, 260), (200, 0))


def test_local_ssim_bad_input(sdata: SpatialData, table: AnnData) -> None:
    with pytest.raises(TypeError, match="SpatialData"):
        pl.local_ssim(table, "A", truth_key="truth")
    with pytest.raises(KeyError, match="no map 'none'"):
        pl.local_ssim(sdata, "A", keys="none", truth_key="truth")
    with pytest.raises(KeyError, match="Z"):
        pl.local_ssim(sdata, "Z", keys="map", truth_key="truth")
    with pytest.raises(ValueError, match="data_range"):
        pl.local_ssim(sdata, "A", keys="map", truth_key="truth", data_range=0)
    with pytest.raises(ValueError, match="shape"):
        pl.local_ssim(sdata, "A", keys="map", truth_key="truth", axes=plt.figure().subplots(1, 2))


# ---- gene scatter ----------------------------------------------------------------------------------------------------


def test_gene_scatter_draws_both_sides_of_the_line() -> None:
    frame = pd.DataFrame({"x": [0.1, 0.5, 0.3, np.nan], "y": [0.2, 0.4, 0.9, 1.0]}, index=list("ABCD"))
    ax = pl.gene_scatter(frame, n_names=1)
    assert ax.get_title() == "y better for 2 of 3 genes"
    above, below = (points.get_offsets() for points in ax.collections)
    np.testing.assert_allclose(above, [[0.1, 0.2], [0.3, 0.9]])
    np.testing.assert_allclose(below, [[0.5, 0.4]])
    assert ax.get_xlim() == ax.get_ylim()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("SSIM, x", "SSIM, y")
    assert [text.get_text() for text in ax.texts] == ["C"]


@pytest.mark.parametrize(("metric", "better"), [("RMSE", 1), ("PCC", 2), ("coverage_90%", 1)])
def test_gene_scatter_knows_what_is_better(metric: str, better: int) -> None:
    x, y = (pd.DataFrame({metric: values}, index=list("ABC")) for values in ([0.1, 0.9, 0.9], [0.2, 0.3, 1.0]))
    ax = pl.gene_scatter({"x": Scores(x, pd.Series()), "y": Scores(y, pd.Series())}, metric=metric)
    assert ax.get_title() == f"y better for {better} of 3 genes"


def test_gene_scatter_bad_input() -> None:
    frame = pd.DataFrame({"x": [0.1], "y": [0.2], "z": [0.2]})
    with pytest.raises(ValueError, match="found 3"):
        pl.gene_scatter(frame)
    with pytest.raises(ValueError, match="no gene"):
        pl.gene_scatter(frame[["x", "y"]] * np.nan)
    with pytest.raises(TypeError, match="tl.evaluate"):
        pl.gene_scatter([1, 2])
    with pytest.raises(KeyError, match="no 'SSIM'"):
        pl.gene_scatter({"x": Scores(frame, pd.Series()), "y": Scores(frame, pd.Series())})


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_draws_coverage(table: AnnData) -> None:
    ax = pl.calibration(table, keys=["predicted", "narrow"], levels=(0.2, 0.5, 0.8, 0.95))
    _, good, narrow = ax.lines
    assert good.get_xdata().tolist() == [0.2, 0.5, 0.8]  # 24 samples span .92
    samples = np.moveaxis(table.obsm["predicted_samples"], 1, 0)
    expected = [metrics.coverage(samples, table.X, level).mean() for level in (0.2, 0.5, 0.8)]
    np.testing.assert_allclose(good.get_ydata(), expected)
    np.testing.assert_allclose(good.get_ydata(), good.get_xdata(), atol=0.05)
    assert narrow.get_ydata().max() < 0.2
    assert narrow.get_label().startswith("narrow (off by 0.4")
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 1), (0, 1))


def test_calibration_of_maps(sdata: SpatialData) -> None:
    truth = sdata["truth"].to_numpy()
    spread = np.random.default_rng(0).uniform(-1, 1, (3, 21, *SHAPE))
    channels = [f"{gene}:{i}" for gene in GENES for i in range(21)]
    write_image(
        sdata, "map_samples", (truth[:, None] + 1 + spread).reshape(63, *SHAPE), channels=channels, transformations=BINS
    )
    ax = pl.calibration(sdata, keys="map", truth_key="truth", genes=["A", "C"], levels=[0.5])
    assert ax.lines[1].get_ydata()[0] == 0  # all samples lie above


def test_calibration_of_few_samples_is_nan_and_says_why(table: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    table.obsm["narrow_samples"] = table.obsm["narrow_samples"][:, :19]
    ax = pl.calibration(table, keys=["narrow", "predicted"], levels=(0.2, 0.5))
    _, few, enough = ax.lines
    assert np.isnan(few.get_ydata()).all()
    assert np.isfinite(enough.get_ydata()).all()
    assert few.get_label() == "narrow (19 samples, at least 20 are needed)"
    assert "the calibration of 'narrow' is NaN: 19 samples" in caplog.text


def test_calibration_bad_input(table: AnnData, sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match="levels"):
        pl.calibration(table, levels=[1.0])
    with pytest.raises(ValueError, match="draw more samples"):
        pl.calibration(table, levels=[0.95])
    with pytest.raises(KeyError, match="keep_samples=True"):
        pl.calibration(sdata, keys="map", truth_key="truth")
    with pytest.raises(KeyError, match="truth_key"):
        pl.calibration(sdata, keys="map")


# ---- gene variation --------------------------------------------------------------------------------------------------


def test_gene_variation_orders_genes_by_true_variance(table: AnnData) -> None:
    axes = pl.gene_variation(table, keys=["predicted", "narrow"])
    assert axes.shape == (2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["predicted", "narrow"]
    truth, predicted = table.X.astype(float).var(0), table.layers["predicted"].var(0)
    order = np.argsort(truth)
    relative, absolute = axes[:, 0]
    np.testing.assert_allclose(absolute.lines[0].get_ydata(), truth[order])
    np.testing.assert_allclose(absolute.collections[0].get_offsets()[:, 1], predicted[order])
    single = table.obsm["predicted_samples"].var(0).mean(0)
    np.testing.assert_allclose(absolute.collections[1].get_offsets()[:, 1], single[order])
    np.testing.assert_allclose(relative.lines[0].get_ydata(), truth[order] / truth.sum())
    np.testing.assert_allclose(relative.collections[0].get_offsets()[:, 1], predicted[order] / predicted.sum())
    rvd = metrics.rvd(table.layers["predicted"], table.X).mean()
    assert f"prediction, RVD {rvd:.2f}" in [text.get_text() for text in absolute.get_legend().get_texts()]
    assert absolute.get_ylabel() == "variance,\n(as given)²"


def test_gene_variation_of_maps_is_over_known_bins(sdata: SpatialData) -> None:
    axes = pl.gene_variation(sdata, keys="map", truth_key="truth", transform="none")
    truth = np.nanvar(sdata["truth"].to_numpy().astype(float), axis=(1, 2))
    np.testing.assert_allclose(axes[1, 0].lines[0].get_ydata(), np.sort(truth), rtol=1e-5)
    assert len(axes[1, 0].collections) == 1


def test_gene_variation_bad_input(table: AnnData, sdata: SpatialData) -> None:
    with pytest.raises(KeyError, match="truth_key"):
        pl.gene_variation(sdata, keys="map")
    with pytest.raises(ValueError, match="empty"):
        pl.gene_variation(table, keys=[])
    with pytest.raises(ValueError, match="shape"):
        pl.gene_variation(table, axes=plt.figure().subplots(1, 3))


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_samples_draws_the_cloud_of_a_location(table: AnnData) -> None:
    table.obs_names = [f"s{i}" for i in range(300)]
    axes = pl.samples(table, [("A", "B"), ("C", "A")], location="s7")
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [("A", "B"), ("C", "A")]
    cloud, mean, median, mode, truth = (points.get_offsets() for points in axes[1].collections)
    samples = table.obsm["predicted_samples"][7][:, [2, 0]]
    np.testing.assert_allclose(cloud, samples)
    np.testing.assert_allclose(mean, [samples.mean(0)])
    np.testing.assert_allclose(median, [np.median(samples, 0)])
    assert (np.isclose(mode[0], samples)).any(0).all()
    np.testing.assert_allclose(truth, [table.X[7, [2, 0]]])
    assert axes[0].get_title(loc="left") == "24 samples at s7\nas given"


def test_samples_bad_input(table: AnnData, sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match="pairs"):
        pl.samples(table, [], location=0)
    with pytest.raises(KeyError, match="no row"):
        pl.samples(table, [("A", "B")], location="none")
    with pytest.raises(KeyError, match="no row 300"):
        pl.samples(table, [("A", "B")], location=300)
    with pytest.raises(KeyError, match="Z"):
        pl.samples(table, [("A", "Z")], location=0)
    with pytest.raises(KeyError, match="keep_samples"):
        pl.samples(sdata, [("A", "B")], location=(0, 0), key="map")
    with pytest.raises(ValueError, match="1 are needed"):
        pl.samples(table, [("A", "B")], location=0, axes=plt.figure().subplots(1, 2))
    write_image(
        sdata,
        "map_samples",
        np.full((6, *SHAPE), np.nan),
        channels=[f"{g}:{i}" for g in GENES for i in (0, 1)],
        transformations=BINS,
    )
    with pytest.raises(ValueError, match="outside the tissue"):
        pl.samples(sdata, [("A", "B")], location=(0, 0), key="map")
