"""Pictures: what was drawn, on which scale, under which names."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.collections import EllipseCollection, PathCollection
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from stgen import models, pl, tl
from stgen._results import provenance, record
from stgen.transforms import transform_counts, unit

mpl.use("Agg")

GENES = ["A", "B", "C", "D"]
N = 42


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def add_result(table: AnnData, key: str, *, transform: str = "log1p_norm", genes=GENES, spread: bool = True) -> None:
    """Write what tl.predict_expression writes."""
    rng = np.random.default_rng(len(key))
    columns = table.var_names.get_indexer(genes)
    for name in (key, f"{key}_std") if spread else (key,):
        values = np.full(table.shape, np.nan, np.float32)
        values[:, columns] = rng.uniform(0.5, 8, (table.n_obs, len(genes)))
        table.layers[name] = values
    table.var[key] = table.var_names.isin(genes)
    record(table, key, provenance("tl.predict_expression", transform=transform, unit=unit(transform)))


@pytest.fixture
def sdata() -> SpatialData:
    """42 spots of 55 µm on a hexagonal grid of 100 µm pitch over an image of 2 µm per pixel."""
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(N), 7)
    xy = np.column_stack([100 + 100 * column + 50 * (row % 2), 90 + 100 * np.sqrt(0.75) * row])
    um = {"um": Identity()}
    table = AnnData(
        rng.poisson(5, (N, 4)).astype(np.float32),
        obs=pd.DataFrame(
            {"region": pd.Categorical(["spots"] * N), "id": np.arange(N)}, index=[f"s{i}" for i in range(N)]
        ),
        var=pd.DataFrame(index=GENES),
    )
    add_result(table, "stem")
    add_result(table, "probe", spread=False)
    image = rng.integers(0, 255, (3, 320, 450), dtype=np.uint8)
    return SpatialData(
        images={
            "he": Image2DModel.parse(image, dims=("c", "y", "x"), transformations={"um": Scale([2, 2], ("x", "y"))})
        },
        shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=27.5, transformations=um)},
        tables={"counts": TableModel.parse(table, region="spots", region_key="region", instance_key="id")},
    )


def discs(ax: plt.Axes) -> EllipseCollection:
    (collection,) = ax.collections
    assert isinstance(collection, EllipseCollection)
    return collection


# ---- maps ------------------------------------------------------------------------------------------------------------


def test_maps_draw_counts_on_the_scale_of_the_prediction(sdata: SpatialData) -> None:
    table = sdata["counts"]
    axes = pl.maps(sdata, ["C", "A"], keys="stem")
    assert axes.shape == (2, 3)
    expected = transform_counts(table.X, table.X.sum(1), "log1p_norm")
    for i, gene in enumerate([2, 0]):
        np.testing.assert_allclose(discs(axes[i, 0]).get_array(), expected[:, gene], rtol=1e-6)
        np.testing.assert_allclose(discs(axes[i, 1]).get_array(), table.layers["stem"][:, gene], rtol=1e-6)
        np.testing.assert_allclose(discs(axes[i, 2]).get_array(), table.layers["stem_std"][:, gene], rtol=1e-6)
    assert [ax.get_title() for ax in axes[0]] == ["measured", "stem", "spread"]
    assert [ax.get_title() for ax in axes[1]] == ["", "", ""]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["C", "A"]


def test_maps_share_limits_between_measured_and_predicted(sdata: SpatialData) -> None:
    axes = pl.maps(sdata, ["A", "B"], keys=["stem", "probe"], quantiles=(0.1, 0.9))
    assert [ax.get_title() for ax in axes[0]] == ["measured", "stem", "probe", "stem: spread"]
    for row in axes:
        shown = np.concatenate([discs(ax).get_array().data for ax in row[:3]])
        limits = {discs(ax).get_clim() for ax in row[:3]}
        assert limits == {tuple(np.quantile(shown, (0.1, 0.9)))}
        spread = discs(row[3])
        assert spread.get_clim() == (0, np.quantile(spread.get_array().data, 0.9))
        assert spread.get_cmap().name != discs(row[0]).get_cmap().name
    assert discs(axes[0, 0]).get_clim() != discs(axes[1, 0]).get_clim()  # each gene has its own


def test_maps_errors_are_signed_and_symmetric(sdata: SpatialData) -> None:
    axes = pl.maps(sdata, "A", keys="stem", panels=["error", "measured", "predicted"])
    error, measured, predicted = (discs(ax) for ax in axes[0])
    np.testing.assert_allclose(error.get_array(), predicted.get_array() - measured.get_array(), atol=1e-6)
    low, high = error.get_clim()
    assert low == -high < 0


def test_maps_color_bars_name_the_unit(sdata: SpatialData) -> None:
    axes = pl.maps(sdata, "A", keys=["stem", "probe"], panels=["measured", "predicted", "spread", "error"])
    labels = [ax.get_ylabel() for ax in axes[0, 0].figure.axes if ax not in axes.ravel()]
    name = "log1p(counts per 10,000)"
    assert labels == [name, f"SD, {name}", f"predicted minus measured,\n{name}"]  # one bar for panels of one scale


def test_maps_discs_have_true_size_and_place(sdata: SpatialData) -> None:
    ax = pl.maps(sdata, "A", keys="stem", image_key="he")[0, 0]
    drawn = discs(ax)
    np.testing.assert_allclose(drawn.get_widths(), 55)
    assert drawn._units == "xy"
    centers = np.column_stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y])
    np.testing.assert_allclose(drawn.get_offsets(), centers)
    assert drawn.get_offset_transform() == ax.transData
    left, right, bottom, top = *ax.get_xlim(), *ax.get_ylim()
    assert ax.get_aspect() == 1
    assert bottom > top, "y points down"
    assert left < centers[:, 0].min() - 27.5
    assert right > centers[:, 0].max() + 27.5
    assert top < centers[:, 1].min() - 27.5
    assert bottom > centers[:, 1].max() + 27.5


def test_maps_put_the_image_where_it_belongs(sdata: SpatialData) -> None:
    axes = pl.maps(sdata, "A", keys="stem", image_key="he", panels=["histology", "predicted"])
    bare, predicted = axes[0]
    assert list(bare.images[0].get_extent()) == [0, 900, 640, 0]  # µm
    thumbnail = bare.images[0].get_array()
    assert thumbnail.shape[2] == 3
    assert thumbnail.mean() == pytest.approx(np.asarray(sdata["he"]).mean() / 255, abs=0.01)
    assert bare.get_xlim() == predicted.get_xlim()
    assert not bare.collections
    assert predicted.images[0].get_alpha() < 1
    assert not pl.maps(sdata, "A", keys="stem")[0, 0].images


def test_maps_scale_bar_is_a_round_number_of_micrometers(sdata: SpatialData) -> None:
    axes = pl.maps(sdata, ["A", "B"], keys="stem")
    (bar,), (text,) = axes[1, 0].lines, axes[1, 0].texts
    assert np.ptp(bar.get_xdata()) == 200
    assert text.get_text() == "200 µm"
    assert not axes[0, 0].lines


def test_maps_without_known_micrometers_have_no_scale_bar(sdata: SpatialData) -> None:
    table = sdata["counts"].copy()
    table.obsm["spatial"] = 3.0 * np.column_stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y])
    ax = pl.maps(table, "A", keys="stem")[0, 0]
    assert not ax.lines
    np.testing.assert_allclose(discs(ax).get_widths(), 300)  # the distance between neighbors
    np.testing.assert_allclose(discs(pl.maps(table, "A", keys="stem", spot_um=7)[0, 0]).get_widths(), 7)
    with_scale = pl.maps(table, "A", keys="stem", mpp=1 / 3)[0, 0]
    assert with_scale.texts[0].get_text() == "200 µm"


def test_maps_write_the_correlation_beneath_the_prediction(sdata: SpatialData) -> None:
    axes = pl.maps(sdata, ["A"], keys="stem")
    r = np.corrcoef(discs(axes[0, 0]).get_array(), discs(axes[0, 1]).get_array())[0, 1]
    assert axes[0, 1].get_xlabel() == f"PCC {r:.2f}"
    assert pl.maps(sdata, "A", keys="stem", panels=["predicted"])[0, 0].get_xlabel() == ""


def test_maps_of_a_table_of_predictions_alone(sdata: SpatialData) -> None:
    values = sdata["counts"].layers["stem"].copy()
    sdata["counts"].layers.clear()
    sdata["counts"].X = values
    axes = pl.maps(sdata, "B", keys="stem")
    assert [ax.get_title() for ax in axes[0]] == ["stem"]
    np.testing.assert_allclose(discs(axes[0, 0]).get_array(), values[:, 1], rtol=1e-6)
    with pytest.raises(ValueError, match="holds predictions only"):
        pl.maps(sdata, "B", keys="stem", panels=["measured"])


def test_maps_draw_into_given_axes_and_change_nothing(sdata: SpatialData) -> None:
    before = sdata["counts"].copy()
    figure, axes = plt.subplots(2, 3)
    returned = pl.maps(sdata, ["A", "B"], keys="stem", axes=axes)
    assert (returned == axes).all()
    assert plt.get_fignums() == [figure.number]
    assert pl.maps(sdata, "A", keys="probe", axes=plt.subplots(1, 2)[1]).shape == (1, 2)
    after = sdata["counts"]
    assert set(after.layers) == set(before.layers)
    assert (after.X == before.X).all()
    with pytest.raises(ValueError, match=r"\(1, 3\) is needed"):
        pl.maps(sdata, "A", keys="stem", axes=axes)


def test_maps_of_a_constant_gene_have_a_range(sdata: SpatialData) -> None:
    sdata["counts"].layers["stem"][:, 0] = 2.0
    ax = pl.maps(sdata, "A", keys="stem", panels=["predicted"])[0, 0]
    assert discs(ax).get_clim() == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"genes": ["A", "nothing"]}, KeyError, "1 of 2 genes are not in the table: nothing"),
        ({"genes": []}, ValueError, "`genes` is empty"),
        ({"keys": "other"}, KeyError, "no prediction 'other'; the table has 'stem', 'probe'.*tl.predict_expression"),
        ({"keys": []}, KeyError, "`keys` is empty"),
        ({"panels": ["truth"]}, ValueError, "unknown panel 'truth'; the panels are 'histology', 'measured'"),
        ({"panels": ["histology"]}, ValueError, "pass image_key="),
        ({"keys": "probe", "panels": ["spread"]}, ValueError, "'probe_std'.*deterministic"),
        ({"panels": []}, ValueError, "`panels` is empty"),
        ({"image_key": "other"}, KeyError, "other"),
        ({"table_key": "other"}, KeyError, "other"),
    ],
)
def test_maps_say_what_is_wrong(sdata: SpatialData, arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pl.maps(sdata, **{"genes": ["A"], "keys": "stem", **arguments})
    assert not plt.get_fignums(), "an error leaves no empty figure behind"


def test_maps_refuse_genes_without_prediction_and_mixed_scales(sdata: SpatialData) -> None:
    add_result(sdata["counts"], "part", genes=["A", "B"])
    with pytest.raises(ValueError, match="C was not predicted under 'part'"):
        pl.maps(sdata, ["A", "C"], keys="part")
    add_result(sdata["counts"], "raw", transform="log2p1_raw")
    with pytest.raises(ValueError, match="different scales"):
        pl.maps(sdata, "A", keys=["stem", "raw"])


# ---- scores ----------------------------------------------------------------------------------------------------------


def results(**columns: list[float]) -> dict[str, tl.Scores]:
    return {
        name: tl.Scores(pd.DataFrame({"PCC": values, "RMSE": values, "coverage_80%": values}), pd.Series(dtype=float))
        for name, values in columns.items()
    }


def points(ax: plt.Axes) -> list[np.ndarray]:
    return [c.get_offsets().data for c in ax.collections if isinstance(c, PathCollection)]


def test_scores_are_sorted_and_every_gene_is_a_point() -> None:
    given = results(worse=[0.1, 0.2, np.nan], best=[0.5, 0.7, 0.9], middle=[0.3, 0.4, 0.2])
    ax = pl.scores(given)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["best", "middle", "worse"]
    assert [set(xy[:, 0]) for xy in points(ax)] == [{0.5, 0.7, 0.9}, {0.3, 0.4, 0.2}, {0.1, 0.2}]
    for row, xy in enumerate(points(ax)):
        assert np.abs(xy[:, 1] - row).max() < 0.5
    low, high = sorted(ax.get_ylim())
    assert low < 0 < 2 < high
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the best on top"
    assert "PCC" in ax.get_xlabel()
    assert [text.get_text() for text in ax.texts][:3] == ["0.700", "0.300", "0.150"]


def test_scores_know_which_way_is_better() -> None:
    given = results(low=[0.1, 0.2], nominal=[0.8, 0.82], high=[0.99, 1.0])

    def order(metric: str) -> list[str]:
        return [label.get_text() for label in pl.scores(given, metric=metric).get_yticklabels()]

    assert order("PCC") == ["high", "nominal", "low"]
    assert order("RMSE") == ["low", "nominal", "high"]
    assert order("coverage_80%") == ["nominal", "high", "low"]


def test_scores_take_a_table_and_axes() -> None:
    _, ax = plt.subplots()
    assert pl.scores(pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, 4.0]}), metric="RVD", ax=ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert "RVD" in ax.get_xlabel()


def test_scores_say_what_is_wrong() -> None:
    given = results(a=[0.1, 0.2])
    with pytest.raises(KeyError, match="'a' have no 'R2'; they have PCC, RMSE"):
        pl.scores(given, metric="R2")
    with pytest.raises(TypeError, match="For a single model"):
        pl.scores(given["a"])
    with pytest.raises(ValueError, match="no gene has a score to draw for a"):
        pl.scores(results(a=[np.nan]))
    with pytest.raises(ValueError, match="no gene has a score"):
        pl.scores({})
    assert not plt.get_fignums()


# ---- history ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> models.Model:
    model = models.TrainingMean(["A"], embedding_dim=1)
    model.record = {
        "history": {
            "step": [10, 20, 30], "loss": [1.0, 0.6, 0.5], "mse": [0.9, 0.5, 0.4], "vlb": [0.1, 0.1, 0.1],
            "validation": [1.1, 0.7, 0.8],
        }
    }  # fmt: skip
    return model


def test_history_draws_every_loss_and_marks_the_weights_that_were_kept(model: models.Model) -> None:
    ax = pl.history(model)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["training"].get_xdata()) == [10, 20, 30]
    assert list(lines["training"].get_ydata()) == [1.0, 0.6, 0.5]
    assert list(lines["training: vlb"].get_ydata()) == [0.1, 0.1, 0.1]
    assert list(lines["validation (averaged weights)"].get_ydata()) == [1.1, 0.7, 0.8]
    assert set(lines["weights kept, step 20"].get_xdata()) == {20}
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel() == "loss"


def test_history_leaves_out_a_term_that_is_the_total(model: models.Model) -> None:
    history = model.record["history"]
    history["mse"] = list(history["loss"])
    del history["vlb"], history["validation"]
    _, ax = plt.subplots()
    assert pl.history(model, ax=ax) is ax
    assert [line.get_label() for line in ax.lines] == ["training"]


def test_history_says_what_is_wrong() -> None:
    model = models.TrainingMean(["A"], embedding_dim=1)
    with pytest.raises(ValueError, match="has not been fitted"):
        pl.history(model)
    model.record = {"history": {}}
    with pytest.raises(ValueError, match="solved at once"):
        pl.history(model)
    assert not plt.get_fignums()
