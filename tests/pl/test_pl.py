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
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

from stgen import models, pl, tl
from stgen._spatial.records import provenance, record, write_image, write_table
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


# ---- maps of counts --------------------------------------------------------------------------------------------------

SHAPE = (12, 16)  # bins of 10 µm, from (200, 100) µm on
PLACE = {"um": Sequence([Scale([10, 10], ("x", "y")), Translation([200, 100], ("x", "y"))])}
COARSE = {"um": Sequence([Scale([40, 40], ("x", "y")), Translation([200, 100], ("x", "y"))])}


def add_map(sdata: SpatialData, key: str, values: np.ndarray, transformations=PLACE, genes=("A", "B")) -> None:
    write_image(sdata, key, values, channels=list(genes), transformations=transformations)


def a_map(seed: int, shape=SHAPE) -> np.ndarray:
    values = np.random.default_rng(seed).gamma(2, size=(2, *shape))
    values[:, 0, :3] = np.nan
    return values


@pytest.fixture
def section() -> SpatialData:
    """Maps of two genes: counts, a result with spread, low-resolution bins of 4 x 4, three spots, and an image."""
    rng = np.random.default_rng(0)
    sdata = SpatialData()
    add_map(sdata, "counts", a_map(1))
    add_map(sdata, "result", a_map(2))
    add_map(sdata, "result_std", a_map(3))
    add_map(sdata, "low", rng.gamma(20, size=(2, 3, 4)), COARSE)
    image = rng.integers(0, 255, (3, 200, 220), dtype=np.uint8)
    at = {"um": Sequence([Scale([2, 2], ("x", "y")), Translation([100, 50], ("x", "y"))])}
    sdata.images["he"] = Image2DModel.parse(image, dims=("c", "y", "x"), transformations=at)
    xy = np.array([[230.0, 130.0], [290.0, 130.0], [330.0, 180.0]])
    sdata.shapes["spots"] = ShapesModel.parse(xy, geometry=0, radius=20, transformations={"um": Identity()})
    table = AnnData(np.array([[10.0, 20], [30, 40], [50, 60]], np.float32), var=pd.DataFrame(index=["A", "B"]))
    write_table(sdata, "spot_counts", table, region="spots")
    return sdata


def drawn(ax: plt.Axes) -> np.ndarray:
    """The map on a panel, NaN where it is transparent."""
    return ax.images[-1].get_array().filled(np.nan)


def values_of(sdata: SpatialData, key: str, gene: str) -> np.ndarray:
    return sdata[key].sel(c=gene).to_numpy()


def test_maps_of_counts_draw_every_bin_where_it_lies(section: SpatialData) -> None:
    axes = pl.maps(section, ["B", "A"], keys="result", low_res="low", truth_key="counts")
    assert [ax.get_title() for ax in axes[0]] == ["measured\n40 µm bins ÷ 16", "result", "truth", "spread"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["B", "A"]
    for gene, row in zip("BA", axes, strict=True):
        np.testing.assert_allclose(drawn(row[0]), values_of(section, "low", gene) / 16, rtol=1e-6)
        for ax, key in zip(row[1:], ["result", "counts", "result_std"], strict=True):
            np.testing.assert_array_equal(drawn(ax), values_of(section, key, gene))
        for ax in row:
            assert list(ax.images[-1].get_extent()) == [200, 360, 220, 100]
            assert (*ax.get_xlim(), *ax.get_ylim()) == (200, 360, 220, 100)  # y points down
            assert ax.get_aspect() == 1
    assert axes[1, 0].texts[0].get_text() == "50 µm"


def test_maps_of_counts_share_limits_per_gene(section: SpatialData) -> None:
    add_map(section, "other", 3 * a_map(5))
    axes = pl.maps(
        section, ["A", "B"], keys=["result", "other"], low_res="low", truth_key="counts", quantiles=(0.1, 0.9),
        panels=["measured", "predicted", "truth", "spread", "error"],
    )  # fmt: skip
    assert [ax.get_title() for ax in axes[1]] == [""] * 7
    assert [ax.get_title() for ax in axes[0, 1:]] == [
        "result", "other", "truth", "result: spread", "result: error", "other: error",
    ]  # fmt: skip
    for gene, row in zip("AB", axes, strict=True):
        shown = np.concatenate([drawn(ax).ravel() for ax in row[:4]])
        for ax in row[:4]:
            np.testing.assert_allclose(ax.images[-1].get_clim(), np.nanquantile(shown, (0.1, 0.9)))
        np.testing.assert_allclose(row[4].images[-1].get_clim(), (0, np.nanquantile(drawn(row[4]), 0.9)))
        expected = values_of(section, "result", gene) - values_of(section, "counts", gene)
        np.testing.assert_allclose(drawn(row[5]), expected, atol=1e-6)
        low, high = row[5].images[-1].get_clim()
        assert low == -high < 0
        assert (low, high) == row[6].images[-1].get_clim()
        assert {ax.images[-1].get_cmap().name for ax in row} == {"viridis", "magma", "PuOr"}
    labels = [ax.get_ylabel() for ax in axes[0, 0].figure.axes if ax not in axes.ravel()]
    unit = "counts per 10 µm bin"
    assert labels == 2 * [unit, f"SD, {unit}", f"predicted minus truth,\n{unit}"]


def test_maps_of_errors_alone(section: SpatialData) -> None:
    (ax,) = pl.maps(section, "A", keys="result", truth_key="counts", panels=["error"], cmap="gray")[0]
    assert ax.get_title() == "error"
    expected = values_of(section, "result", "A") - values_of(section, "counts", "A")
    np.testing.assert_allclose(drawn(ax), expected, atol=1e-6)
    add_map(section, "less", np.ones((1, *SHAPE)), genes=["B"])
    with pytest.raises(KeyError, match="map 'less'"):
        pl.maps(section, "A", keys="result", truth_key="less", panels=["error"])


def test_maps_of_bins_of_two_sizes_are_drawn_per_finest_bin(section: SpatialData) -> None:
    axes = pl.maps(section, "A", keys=["low", "counts"])
    assert [ax.get_title() for ax in axes[0]] == ["low\n40 µm bins ÷ 16", "counts"]
    alone = pl.maps(section, "A", keys="low")[0, 0]
    assert alone.get_title() == "low"
    np.testing.assert_allclose(drawn(alone), 16 * drawn(axes[0, 0]))
    assert alone.figure.axes[1].get_ylabel() == "counts per 40 µm bin"


def test_maps_beside_spots_draw_counts_per_bin(section: SpatialData) -> None:
    ax = pl.maps(section, "B", keys="result", low_res="spot_counts")[0, 0]
    area = np.pi * 2**2  # in bins
    np.testing.assert_allclose(discs(ax).get_array(), np.array([20, 40, 60]) / area, rtol=1e-6)
    np.testing.assert_allclose(discs(ax).get_offsets(), [[230, 130], [290, 130], [330, 180]])
    np.testing.assert_allclose(discs(ax).get_widths(), 40)
    assert ax.get_title() == "measured\n40 µm spots ÷ 12.6"


def test_maps_beside_spots_draw_the_layer_that_they_were_made_from(section: SpatialData) -> None:
    section["spot_counts"].layers["counts"] = 2 * section["spot_counts"].X
    section.attrs["stgen"] = {"result": {"low_res": "spot_counts", "layer": "counts"}}
    ax = pl.maps(section, "B", keys="result", low_res="spot_counts")[0, 0]
    np.testing.assert_allclose(discs(ax).get_array(), np.array([40, 80, 120]) / (np.pi * 2**2), rtol=1e-6)


def test_maps_over_an_image(section: SpatialData) -> None:
    histology, predicted, spots = pl.maps(
        section,
        "A",
        keys="result",
        image_key="he",
        low_res="spot_counts",
        panels=["histology", "predicted", "measured"],
        bounds_um=(100, 50, 540, 450),
    )[0]
    (bare,) = histology.images
    np.testing.assert_allclose(bare.get_extent(), [100, 540, 450, 50])
    assert bare.get_array().shape[2] == 3
    beneath, above = predicted.images
    assert beneath.get_array().ndim == 2  # gray, so that colors keep their hue
    assert beneath.get_cmap().name == "gray"
    assert above.get_alpha() == 0.75
    assert discs(spots).get_alpha() is None
    given = pl.maps(section, "A", keys="result", image_key="he", alpha=0.3)[0, 0]
    assert given.images[1].get_alpha() == 0.3


def test_maps_over_dark_stains_of_several_scales(section: SpatialData) -> None:
    stains = np.random.default_rng(0).integers(0, 1500, (4, 320, 320), dtype=np.uint16)
    section.images["if"] = Image2DModel.parse(
        stains, dims=("c", "y", "x"), scale_factors=[2], transformations={"um": Scale([2, 2], ("x", "y"))}
    )
    ax = pl.maps(section, "A", keys="result", image_key="if", panels=["histology"], bounds_um=(0, 0, 640, 640))[0, 0]
    (image,) = ax.images
    np.testing.assert_allclose(image.get_extent(), [0, 640, 640, 0])
    assert image.get_array().ndim == 2
    assert 0.4 < image.get_array().mean() < 0.9
    assert image.get_clim() == (0, 1)


def test_maps_of_a_part_read_only_that_part(section: SpatialData) -> None:
    axes = pl.maps(
        section, "A", keys="result", low_res="low", image_key="he", bounds_um=(225, 110, 290, 150),
        panels=["histology", "predicted", "measured"],
    )  # fmt: skip
    histology, predicted, measured = axes[0]
    np.testing.assert_allclose((*predicted.get_xlim(), *predicted.get_ylim()), (225, 290, 150, 110))
    np.testing.assert_array_equal(drawn(predicted), values_of(section, "result", "A")[1:5, 2:9])
    np.testing.assert_allclose(predicted.images[-1].get_extent(), [220, 290, 150, 110])
    np.testing.assert_allclose(measured.images[-1].get_extent(), [200, 320, 180, 100])
    left, right, bottom, top = histology.images[0].get_extent()
    assert (left, top) == pytest.approx((225, 110), abs=2)
    assert (right, bottom) == pytest.approx((290, 150), abs=2)


@pytest.mark.parametrize(
    ("matrix", "extent"),
    [
        ([[-10, 0, 500], [0, 10, 100]], [500, 340, 220, 100]),
        ([[10, 0, 200], [0, -10, 300]], [200, 360, 180, 300]),
        ([[6, 8, 0], [-8, 6, 0]], None),
        ([[0, 10, 0], [10, 0, 0]], None),
    ],
)
def test_maps_that_are_mirrored_or_turned(section: SpatialData, matrix: list, extent: list | None) -> None:
    to = Affine(np.array([*matrix, [0, 0, 1]]), ("x", "y"), ("x", "y"))
    corner = np.full((2, *SHAPE), np.nan)
    corner[:, 0, 0] = 1
    corner[:, -1, -1] = 2  # what is drawn ends where nothing is known
    add_map(section, "placed", corner, {"um": to})
    ax = pl.maps(section, "A", keys="placed", cmap="gray")[0, 0]
    image = ax.images[-1]
    if extent is not None:
        assert list(image.get_extent()) == extent
    else:
        bins = np.array([[0, 0], [SHAPE[1], SHAPE[0]]])
        expected = ax.transData.transform(bins @ np.array(matrix)[:, :2].T)
        np.testing.assert_allclose(image.get_transform().transform(bins), expected)
        assert list(image.get_extent()) == [0, SHAPE[1], SHAPE[0], 0]
    # the first bin is where the transformation puts it
    ax.figure.canvas.draw()
    x, y = ax.transData.transform(np.array(matrix) @ [0.5, 0.5, 1])
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[..., :3]
    assert pixels[len(pixels) - 1 - int(y), int(x)].max() < 10  # black: one value is the lowest


def test_maps_larger_than_the_panel_are_strided_and_read_by_gene(section: SpatialData) -> None:
    import dask.array as da

    read = []

    def block(block_info=None):
        read.append(block_info[None]["array-location"][0])
        y, x = np.indices((1300, 2600))
        return (y * 10_000 + x).astype(np.float32)[None]

    lazy = da.map_blocks(block, dtype=np.float32, chunks=((1, 1), 1300, 2600), meta=np.empty((0, 0, 0), np.float32))
    section.images["large"] = Image2DModel.parse(
        lazy, dims=("c", "y", "x"), c_coords=["A", "B"], transformations={"um": Scale([5, 5], ("x", "y"))}
    )
    read.clear()
    ax = pl.maps(section, "B", keys="large")[0, 0]
    assert set(read) == {(1, 2)}
    y, x = np.divmod(drawn(ax), 10_000)
    assert x.shape == (325, 650)
    np.testing.assert_array_equal(x[0, :3], [1, 5, 9])
    np.testing.assert_array_equal(y[:3, 0], [1, 5, 9])
    assert list(ax.images[-1].get_extent()) == [0, 13_000, 6500, 0]
    wide = plt.subplots(figsize=(26, 13))[1]
    assert drawn(pl.maps(section, "B", keys="large", axes=wide)[0, 0]).shape == (1300, 2600)


def test_maps_that_there_are_get_listed(section: SpatialData) -> None:
    section.attrs["stgen"] = {"result": {}, "gone": {}}
    with pytest.raises(KeyError, match=r"no result 'predicted'; the maps in sdata.images are 'result': pass keys="):
        pl.maps(section, ["A"])


def test_maps_of_a_rare_gene_have_a_range(section: SpatialData) -> None:
    values = np.zeros((2, *SHAPE))
    values[0, 3, 3] = 4
    add_map(section, "rare", values)
    add_map(section, "unknown", np.full_like(values, np.nan))
    axes = pl.maps(section, ["A", "B"], keys=["rare", "unknown"], truth_key="rare", panels=["predicted", "error"])
    assert axes[0, 0].images[0].get_clim() == (0, 4)
    assert axes[1, 0].images[0].get_clim() == (0, 1)
    low, high = axes[1, 2].images[0].get_clim()
    assert low <= 0 < high


def test_maps_in_another_coordinate_system(section: SpatialData) -> None:
    pixels = {"um": PLACE["um"], "global": Sequence([PLACE["um"], Scale([2, 2], ("x", "y"))])}
    add_map(section, "both", a_map(2), pixels)
    ax = pl.maps(section, "A", keys="both", coordinate_system="global", bounds_um=(200, 100, 360, 200))[0, 0]
    assert list(ax.images[-1].get_extent()) == [400, 720, 400, 200]
    assert ax.get_xlim() == pytest.approx((400, 720))
    assert ax.texts[0].get_text() == "50 µm"
    assert np.ptp(ax.lines[0].get_xdata()) == pytest.approx(100)
    assert ax.figure.axes[1].get_ylabel() == "counts per 10 µm bin"


def test_maps_lie_on_what_spatialdata_plot_draws(section: SpatialData) -> None:
    pytest.importorskip("spatialdata_plot")
    figure, ax = plt.subplots()
    section.pl.render_images("he").pl.show(ax=ax, coordinate_systems="um")
    before = len(ax.images)
    returned = pl.maps(section, "A", keys="result", panels=["predicted"], axes=ax, alpha=0.5)
    assert returned.item() is ax
    assert len(ax.images) == before + 1
    assert list(ax.images[-1].get_extent()) == [200, 360, 220, 100]
    image = ax.images[0]
    left, right, bottom, top = image.get_extent()
    theirs = (image.get_transform() - ax.transData).transform([[left, top], [right, bottom]])
    np.testing.assert_allclose(theirs, [[100, 50], [540, 450]], atol=1.1)  # half a pixel at most
    section.pl.render_shapes("spots").pl.show(ax=ax, coordinate_systems="um")
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"genes": ["A", "X"]}, KeyError, "1 of 2 genes are not in the map 'result'.*X.*A, B"),
        ({"genes": "C", "truth_key": "more", "keys": "more"}, KeyError, "low"),
        ({"keys": ["result", "nothing"]}, KeyError, "no map 'nothing'; sdata.images has .*tl.superresolve"),
        ({"keys": "he"}, ValueError, "'he' is a picture .*no map of genes"),
        ({"keys": "result_std"}, ValueError, "the spread of 'result'"),
        ({"truth_key": "nothing"}, KeyError, "no map 'nothing'"),
        ({"low_res": "nothing"}, KeyError, "no map or table 'nothing'"),
        ({"image_key": "nothing"}, KeyError, "no image 'nothing'"),
        ({"truth_key": None, "panels": ["truth"]}, ValueError, "pass truth_key="),
        ({"low_res": None, "panels": ["measured"]}, ValueError, "pass low_res="),
        ({"panels": ["histology"]}, ValueError, "pass image_key="),
        ({"panels": ["mean"]}, ValueError, "unknown panel 'mean'; the panels are .*'truth', 'spread', 'error'"),
        ({"keys": "counts", "panels": ["spread"]}, ValueError, "no sdata.images\\['counts_std'\\]"),
        ({"truth_key": "low", "panels": ["error"]}, ValueError, "not on the same grid"),
        ({"truth_key": "elsewhere"}, ValueError, "share no coordinate system"),
        ({"coordinate_system": "px"}, KeyError, "do not share the coordinate system 'px'"),
        ({"bounds_um": (300, 100, 200, 150)}, ValueError, "`bounds_um` must be"),
        ({"bounds_um": (0, 0, 50, 50)}, ValueError, "does not lie in the window"),
        ({"table_key": "spot_counts"}, ValueError, "table_key: only for results in a table"),
        ({"keys": "predicted"}, KeyError, "low_res, truth_key: only for maps.*no map 'predicted'"),
    ],
)
def test_maps_of_counts_say_what_is_wrong(section: SpatialData, arguments: dict, error: type, message: str) -> None:
    add_map(section, "more", np.ones((1, *SHAPE)), genes=["C"])
    add_map(section, "elsewhere", a_map(1), {"px": Identity()})
    section.attrs["stgen"] = {"elsewhere": {"bin_um": 10.0}}
    given = {"genes": "A", "keys": "result", "low_res": "low", "truth_key": "counts", **arguments}
    with pytest.raises(error, match=message):
        pl.maps(section, **given)
    assert not plt.get_fignums(), "an error leaves no empty figure behind"


# ---- scores ----------------------------------------------------------------------------------------------------------


METRICS = ("PCC", "RMSE", "SSIM", "coverage_80%", "Moran_difference")


def results(**columns: list[float]) -> dict[str, tl.Scores]:
    return {
        name: tl.Scores(pd.DataFrame(dict.fromkeys(METRICS, values)), pd.Series(dtype=float))
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
    assert order("SSIM") == ["high", "nominal", "low"]
    assert order("coverage_80%") == ["nominal", "high", "low"]
    assert order("Moran_difference") == ["low", "nominal", "high"]


def test_scores_take_a_table_and_axes() -> None:
    _, ax = plt.subplots()
    assert pl.scores(pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, 4.0]}), metric="RVD", ax=ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert "RVD" in ax.get_xlabel()


def test_scores_say_what_is_wrong() -> None:
    given = results(a=[0.1, 0.2])
    with pytest.raises(KeyError, match="'a' have no 'R2'; they have PCC, RMSE, SSIM"):
        pl.scores(given, metric="R2")
    with pytest.raises(TypeError, match="`scores` must be a result of tl.evaluate"):
        pl.scores([given["a"]])
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
