"""Gene-gene correlation of tables and maps, and prediction beside truth wherever they are kept."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import Scale

from stgen import metrics, tl
from stgen._spatial.records import provenance, record, write_image
from stgen.tl.comparison.compared import find_compared
from stgen.transforms import transform_counts

GENES = ["A", "B", "C", "D"]
BINS = {"um": Scale([10, 10], ("x", "y"))}
SHAPE = (9, 8)


@pytest.fixture
def counts() -> np.ndarray:
    """Counts ``(n, G)`` of genes that depend on each other."""
    rng = np.random.default_rng(0)
    return rng.poisson(np.exp(1 + 0.5 * rng.normal(size=(72, 2)) @ rng.normal(size=(2, 4)))).astype(np.float32)


@pytest.fixture
def table(counts: np.ndarray) -> AnnData:
    """Counts, and a prediction with samples of three of the genes, as tl.predict_expression leaves it."""
    rng = np.random.default_rng(1)
    table = AnnData(counts, var=pd.DataFrame(index=GENES))
    samples = rng.gamma(2, 1, (72, 5, 3)).astype(np.float32)
    table.layers["predicted"] = np.full((72, 4), np.nan, np.float32)
    table.layers["predicted"][:, :3] = samples[:, :, [2, 1, 0]].mean(1)
    table.var["predicted"] = [True, True, True, False]
    table.obsm["predicted_samples"] = samples
    record(table, "predicted", provenance("tl.predict_expression", transform="log1p_raw") | {"sample_genes": "C\nB\nA"})
    return table


def as_map(values: np.ndarray) -> np.ndarray:
    return values.T.reshape(-1, *SHAPE)


@pytest.fixture
def sdata(counts: np.ndarray) -> SpatialData:
    sdata = SpatialData()
    noisy = np.random.default_rng(2).poisson(counts + 1).astype(float)
    noisy[:8, 1] = np.nan  # the first row of bins
    write_image(sdata, "truth", as_map(counts), channels=GENES, transformations=BINS)
    write_image(sdata, "map", as_map(noisy), channels=GENES, transformations=BINS)
    return sdata


def test_of_layers_is_that_of_numpy(table: AnnData, counts: np.ndarray) -> None:
    table.layers["double"] = counts * 2
    found = tl.gene_correlation(table, key="double", truth_key="X", transform="none")
    np.testing.assert_allclose(found.prediction, np.corrcoef(counts.T), atol=1e-6)
    assert found.gsc == pytest.approx(1)
    assert list(found.prediction.index) == list(found.truth.columns) == GENES
    assert found.unit == "as given"


def test_of_counts_is_on_the_scale_asked_for(table: AnnData, counts: np.ndarray) -> None:
    norm = transform_counts(counts, counts.sum(1), "log1p_norm")
    found = tl.gene_correlation(table, key="X", genes=["D", "A"])
    np.testing.assert_allclose(found.prediction, np.corrcoef(norm[:, [3, 0]].T), atol=1e-6)
    assert found.truth is None
    assert np.isnan(found.gsc)


def test_of_a_prediction_is_the_mean_over_its_samples(table: AnnData, counts: np.ndarray) -> None:
    found = tl.gene_correlation(table)
    samples = np.moveaxis(table.obsm["predicted_samples"][:, :, [2, 1, 0]], 1, 0)
    truth = np.log1p(counts[:, :3])
    np.testing.assert_allclose(found.prediction, np.mean([np.corrcoef(x.T) for x in samples], 0), atol=1e-6)
    np.testing.assert_allclose(found.truth, np.corrcoef(truth.T), atol=1e-6)
    assert found.gsc == pytest.approx(metrics.gsc(samples, truth))


def test_of_maps_leaves_out_bins_that_are_not_known(sdata: SpatialData, counts: np.ndarray) -> None:
    found = tl.gene_correlation(sdata, key="map", truth_key="truth")
    truth = np.log1p(counts[8:])
    np.testing.assert_allclose(found.truth, np.corrcoef(truth.T), atol=1e-6)
    predicted = sdata["map"].to_numpy().reshape(4, -1).T[8:]
    assert found.gsc == pytest.approx(metrics.gsc(np.log1p(predicted), truth), abs=1e-6)
    assert found.gsc == pytest.approx(tl.evaluate(sdata, key="map", truth_key="truth").summary["GSC"])


def test_maps_and_tables_agree(sdata: SpatialData, table: AnnData) -> None:
    of_map = tl.gene_correlation(sdata, key="truth", transform="log1p_raw").prediction
    of_table = tl.gene_correlation(table, key="X", transform="log1p_raw").prediction
    np.testing.assert_allclose(of_map, of_table, atol=1e-6)


def test_order_of_genes_only_permutes(sdata: SpatialData) -> None:
    found = tl.gene_correlation(sdata, key="map", truth_key="truth")
    other = tl.gene_correlation(sdata, key="map", truth_key="truth", genes=GENES[::-1])
    np.testing.assert_allclose(other.prediction.loc[GENES, GENES], found.prediction, atol=1e-9)
    assert other.gsc == pytest.approx(found.gsc)


def test_samples_of_maps_are_read_by_gene_and_at_a_bin(sdata: SpatialData, counts: np.ndarray) -> None:
    samples = np.random.default_rng(3).gamma(2, 1, (4, 3, *SHAPE))
    channels = [f"{gene}:{i}" for gene in GENES for i in range(3)]
    write_image(sdata, "map_samples", samples.reshape(12, *SHAPE), channels=channels, transformations=BINS)
    found = find_compared(sdata, "map", truth_key="truth", genes=["B", "D"], transform="none")
    each = dict(found.each())
    np.testing.assert_allclose(each["D"].samples, samples[3].reshape(3, -1)[:, :], rtol=1e-6)
    at = found.at((2, 5))
    np.testing.assert_allclose(at.samples, samples[[1, 3], :, 2, 5].T, rtol=1e-6)
    np.testing.assert_allclose(at.truth, as_map(counts)[[1, 3], 2, 5])
    with pytest.raises(KeyError, match="no bin"):
        found.at((9, 0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "none"}, KeyError, "no layer 'none'"),
        ({"truth_key": "none"}, KeyError, "no layer 'none'"),
        ({"genes": ["A", "D"]}, KeyError, "D"),
        ({"genes": []}, KeyError, "none named"),
        ({"genes": ["A"]}, ValueError, "two genes"),
        ({"transform": "log1p_norm"}, ValueError, "leave `transform` out"),
        ({"key": "X", "transform": "log7"}, ValueError, "`transform` must be one of"),
    ],
)
def test_bad_input_of_tables(table: AnnData, options, error, message) -> None:
    with pytest.raises(error, match=message):
        tl.gene_correlation(table, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"truth_key": "none"}, KeyError, "no map 'none'"),
        ({"truth_key": "other"}, ValueError, "same grid"),
        ({"transform": "log1p_norm"}, ValueError, "total counts"),
        ({"genes": ["A", "Z"]}, KeyError, "Z"),
    ],
)
def test_bad_input_of_maps(sdata: SpatialData, options, error, message) -> None:
    write_image(sdata, "other", np.ones((4, 3, 3)), channels=GENES, transformations=BINS)
    with pytest.raises(error, match=message):
        tl.gene_correlation(sdata, **{"key": "map", "truth_key": "truth"} | options)
