import logging

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
from anndata import AnnData
from matplotlib.colors import to_hex
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Scale

from stgen import metrics, pl, tl
from stgen.pl._colors import CATEGORIES, GRAY
from stgen.tl.cells import locations as _locations

GENES = [f"g{i}" for i in range(12)]
KINDS = np.repeat(["tumor", "stroma", "fat"], [100, 60, 40])


@pytest.fixture
def table():
    """200 spots of three kinds, each with four genes of its own, kinds in bands from top to bottom."""
    rng = np.random.default_rng(0)
    profile = 1 + 19 * np.kron(np.eye(3), np.ones(4))
    mean = profile[[{"tumor": 0, "stroma": 1, "fat": 2}[kind] for kind in KINDS]]
    depth = rng.uniform(0.5, 2, (200, 1))
    obs = pd.DataFrame({"kind": pd.Categorical(KINDS)}, index=[f"s{i}" for i in range(200)])
    xy = 100.0 * np.column_stack([np.arange(200) % 10, np.arange(200) // 10])
    counts = rng.poisson(depth * mean).astype(np.float32)
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES), obsm={"spatial": xy})


@pytest.fixture
def sdata(table):
    """The same counts as a map of 20 x 10 bins, whose last row is glass."""
    counts = table.X.T.reshape(12, 20, 10).copy()
    counts[:, -1] = np.nan
    place = {"um": Scale([10.0, 10.0], axes=("x", "y"))}
    image = Image2DModel.parse(counts, dims=("c", "y", "x"), c_coords=GENES, transformations=place, chunks=(5, 8, 3))
    kinds = pd.Categorical(KINDS).codes.reshape(20, 10).astype(np.uint16) + 1
    kinds[-1] = 0
    return sd.SpatialData(
        images={"map": image}, labels={"kind": Labels2DModel.parse(kinds, dims=("y", "x"), transformations=place)}
    )


def by_scanpy(adata, n_pcs):
    """The path as scanpy's tutorials write it, on values that are log1p already."""
    sc.pp.pca(adata, n_comps=n_pcs, random_state=0)
    sc.pp.neighbors(adata, n_neighbors=15, use_rep="X_pca", random_state=0)
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    return adata.obs["leiden"].astype(str).to_numpy()


def same_groups(a, b):
    return metrics.label_agreement(np.ravel(a), np.ravel(b))["ARI"] == 1


def test_counts_take_the_standard_path_of_scanpy(table):
    tl.find_domains(table)
    adata = table.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    assert same_groups(table.obs["domains"], by_scanpy(adata, 11))
    entry = table.uns["stgen"]["domains"]
    assert (entry["n_clustered"], entry["n_pcs"], entry["resolution"]) == (200, 11, 1.0)


def test_domains_are_numbered_from_the_largest_on(table):
    tl.find_domains(table, n_domains=3)
    assert same_groups(table.obs["domains"], KINDS)
    assert table.obs["domains"].value_counts(sort=False).to_dict() == {"0": 100, "1": 60, "2": 40}
    assert table.uns["stgen"]["domains"]["types"].split("\n") == ["0", "1", "2"]


def test_some_genes_are_normalized_by_all(table):
    some = GENES[:6]
    tl.find_domains(table, genes=some, resolution=1.0)
    adata = table.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    assert same_groups(table.obs["domains"], by_scanpy(adata[:, some].copy(), 5))


def test_predictions_of_log1p_norm_are_taken_as_they_are(table):
    rng = np.random.default_rng(1)
    values = np.abs(rng.normal(3 * (KINDS[:, None] == "fat"), 1, (200, 12))).astype(np.float32)
    table.layers["stem"] = values
    table.var["stem"] = True
    table.uns["stgen"] = {"stem": {"function": "tl.predict_expression", "transform": "log1p_norm", "unit": "log1p"}}
    tl.find_domains(table, layer="stem")
    assert same_groups(table.obs["domains"], by_scanpy(AnnData(values), 11))


def test_a_map_and_a_table_of_the_same_counts_have_the_same_domains(table, sdata, monkeypatch):
    tl.find_domains(sdata, map_key="map")
    mask = sdata.labels["domains"]
    assert mask.dtype == np.uint16
    assert (np.asarray(mask)[-1] == 0).all()
    known = table[:190].copy()
    monkeypatch.setattr(_locations, "VALUES_AT_ONCE", 100)
    tl.find_domains(known)
    assert same_groups(np.asarray(mask)[:-1], known.obs["domains"])
    assert np.asarray(mask)[:-1].min() == 1
    assert sd.transformations.get_transformation(mask, "um") == Scale([10.0, 10.0], axes=("x", "y"))


def test_locations_beyond_the_limit_go_with_their_neighbors(table, sdata):
    tl.find_domains(table, n_domains=3, max_locations=80)
    assert same_groups(table.obs["domains"], KINDS)
    assert table.uns["stgen"]["domains"]["n_clustered"] == 80
    tl.find_domains(sdata, map_key="map", n_domains=3, max_locations=80)
    assert same_groups(np.asarray(sdata["domains"])[:-1], KINDS[:190])


def test_any_number_of_rows_has_domains():
    """Above 8,191 rows scanpy chooses another search for neighbors, which not every SciPy can follow."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, 8_300)
    counts = rng.poisson(rng.gamma(1.0, 6.0, (5, 30))[group]).astype(np.float32)
    rows = AnnData(counts, obs=pd.DataFrame(index=[f"s{i}" for i in range(8_300)]))
    tl.find_domains(rows, n_domains=5)
    assert metrics.label_agreement(rows.obs["domains"], group.astype(str))["ARI"] > 0.9


def test_rows_without_counts_have_no_domain(table):
    table.X[7] = 0
    tl.find_domains(table)
    missing = table.obs["domains"].isna()
    assert missing["s7"]
    assert missing.sum() == 1


def test_a_number_of_domains_is_searched(table, caplog):
    for n in (3, 4):
        tl.find_domains(table, n_domains=n, overwrite=True)
        assert table.obs["domains"].nunique() == n
    one = table[:100].copy()  # all alike
    with caplog.at_level(logging.WARNING, "stgen"):
        tl.find_domains(table, n_domains=200, overwrite=True)
    assert "Leiden gives no 200 domains here" in caplog.text
    tl.find_domains(one, resolution=1e-3, key_added="one")
    assert one.obs["one"].nunique() == 1


def test_same_seed_same_domains_and_a_copy_leaves_the_object_alone(table):
    a, b = (tl.find_domains(table, resolution=2.0, seed=3, copy=True) for _ in range(2))
    pd.testing.assert_series_equal(a.obs["domains"], b.obs["domains"])
    assert list(table.obs) == ["kind"]
    assert "stgen" not in table.uns


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"genes": ["g0", "gX"]}, KeyError, "gX"),
        ({"genes": ["g0"]}, ValueError, "several genes"),
        ({"layer": "none"}, KeyError, "none"),
        ({"n_domains": 1}, ValueError, "at least 2"),
        ({"n_domains": 3, "resolution": 2.0}, ValueError, "not both"),
        ({"resolution": 0}, ValueError, "positive"),
        ({"n_pcs": 2.5}, ValueError, "whole number"),
        ({"n_neighbors": True}, ValueError, "whole number"),
        ({"max_locations": 5}, ValueError, "at least 20"),
        ({"map_key": "map"}, ValueError, "map_key"),
        ({"key_added": "kind"}, ValueError, "exists"),
        ({"key_added": "kind", "overwrite": True}, ValueError, "not a result"),
        ({"key_added": "KIND"}, ValueError, "side by side"),
        ({"key_added": "a b"}, ValueError, "a b"),
        ({"resolution": "1"}, ValueError, "finite number"),
        ({"seed": 2**40}, ValueError, "2"),
        ({"genes": ["g0", "constant"]}, ValueError, "1 of 2 genes differ"),
    ],
)
def test_bad_input_changes_nothing(table, options, error, message):
    if "constant" in options.get("genes", ()):
        table.X[:, 3] = 0
        table.var_names = [*GENES[:3], "constant", *GENES[4:]]
    before = table.obs.copy()
    with pytest.raises(error, match=message):
        tl.find_domains(table, **options)
    pd.testing.assert_frame_equal(table.obs, before)
    assert "stgen" not in table.uns


def test_records_of_other_functions_are_kept(table):
    table.uns["stgen"] = {"X_texture": {"function": "pp.embed"}}
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not a result"):
            tl.find_domains(table, key_added="X_texture", overwrite=overwrite)
    assert table.uns["stgen"] == {"X_texture": {"function": "pp.embed"}}


def test_genes_that_do_not_vary_say_nothing(table):
    tl.find_domains(table, genes=GENES[:8])
    table.X[:, 11] = 0
    tl.find_domains(table, key_added="more", genes=[*GENES[:8], "g11"])
    tl.find_domains(table, key_added="again", genes=GENES[:8])
    assert same_groups(table.obs["more"], table.obs["again"])


def test_more_neighbors_than_locations(table):
    tl.find_domains(table, max_locations=20, n_neighbors=30)
    assert table.uns["stgen"]["domains"]["n_neighbors"] == 19
    assert table.obs["domains"].notna().all()


def test_too_few_locations_and_taken_names(table, sdata):
    with pytest.raises(ValueError, match="only 10 of 10 locations"):
        tl.find_domains(table[:10].copy())
    with pytest.raises(ValueError, match="not a result"):
        tl.find_domains(sdata, map_key="map", key_added="map")
    with pytest.raises(ValueError, match="MAP"):
        tl.find_domains(sdata, map_key="map", key_added="MAP")
    with pytest.raises(KeyError, match="map_key="):
        tl.find_domains(sdata)
    with pytest.raises(TypeError, match="DataFrame"):
        tl.find_domains(pd.DataFrame())


# ---- pl.domains ------------------------------------------------------------------------------------------------------


def colors_of(ax):
    """Hexadecimal color of each disc, None for those that are not drawn."""
    discs = ax.collections[0]
    values = discs.get_array()
    return [
        None if m else to_hex(discs.to_rgba(v)) for v, m in zip(values.data, np.ma.getmaskarray(values), strict=True)
    ]


def test_groups_take_the_colors_of_the_reference(table):
    other = {"tumor": "b", "stroma": "c", "fat": "a"}
    table.obs["found"] = pd.Categorical([other[kind] for kind in KINDS])
    axes = pl.domains(table, "found", reference="kind", mpp=1.0)
    assert [ax.get_title() for ax in axes[0]] == ["kind", "found\nARI 1.00, NMI 1.00"]
    assert colors_of(axes[0, 0]) == colors_of(axes[0, 1])
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in axes[0]]
    assert legends == [["fat", "stroma", "tumor"], ["a", "c", "b"]]
    plt.close("all")


def test_groups_that_are_left_over_have_colors_of_their_own(table):
    halves = np.where((KINDS == "tumor") & (np.arange(200) < 30), "extra", KINDS)
    table.obs["found"] = pd.Categorical(halves)
    reference, found = pl.domains(table, "found", reference="kind", mpp=1.0)[0]
    assert colors_of(found)[30:] == colors_of(reference)[30:]
    assert set(colors_of(found)[:30]) == {CATEGORIES[3].lower()}
    plt.close("all")


def test_what_is_not_highlighted_is_gray_and_what_is_missing_is_not_drawn(table):
    table.obs["kind"] = table.obs["kind"].where(np.arange(200) > 4)
    (ax,) = pl.domains(table, "kind", highlight="stroma", mpp=1.0)[0]
    assert colors_of(ax)[:5] == [None] * 5
    assert {c == GRAY.lower() for c, kind in zip(colors_of(ax)[5:], KINDS[5:], strict=True) if kind != "stroma"} == {
        True
    }
    assert {c for c, kind in zip(colors_of(ax), KINDS, strict=True) if kind == "stroma"} == {CATEGORIES[1].lower()}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["stroma", "other"]
    plt.close("all")


def test_masks_are_drawn_where_they_lie(sdata):
    tl.find_domains(sdata, map_key="map", n_domains=3)
    kind, found = pl.domains(sdata, "domains", reference="kind")[0]
    assert found.get_title() == "domains\nARI 1.00, NMI 1.00"
    drawn = found.images[-1]
    assert drawn.get_extent() == [0, 100, 200, 0]
    np.testing.assert_array_equal(drawn.get_array()[:-1], kind.images[-1].get_array()[:-1])
    assert np.ma.getmaskarray(drawn.get_array())[-1].all()
    assert not np.ma.getmaskarray(drawn.get_array())[:-1].any()
    plt.close("all")


def test_numbers_are_in_order_and_a_column_is_drawn_where_a_mask_has_its_name(table, sdata):
    table.obs["number"] = pd.Categorical([str(i % 12) for i in range(200)])
    (ax,) = pl.domains(table, "number", mpp=1.0)[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [str(i) for i in range(12)]
    assert colors_of(ax)[:12] == [color.lower() for color in CATEGORIES[:12]]
    table.obs["region"] = pd.Categorical(["places"] * 200)
    table.obs["place"] = np.arange(200)
    sdata["places"] = ShapesModel.parse(
        table.obsm["spatial"], geometry=0, radius=5, transformations={"um": Scale([1.0, 1.0], axes=("x", "y"))}
    )
    sdata["table"] = TableModel.parse(table, region="places", region_key="region", instance_key="place")
    (mask,), (column,) = pl.domains(sdata, "kind")[0], pl.domains(sdata, "kind", table_key="table")[0]
    assert (len(mask.images), len(mask.collections), len(column.collections)) == (1, 0, 1)
    plt.close("all")


def test_a_reference_of_one_group_agrees_with_nothing(table):
    table.obs["one"] = "a"
    axes = pl.domains(table, "kind", reference="one", mpp=1.0)[0]
    assert axes[1].get_title() == "kind"
    plt.close("all")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda table, _: pl.domains(table, "absent"), KeyError, "find_domains"),
        (lambda table, _: pl.domains(table, "depth"), ValueError, "not groups"),
        (lambda table, _: pl.domains(table, "kind", highlight="bone"), KeyError, "bone"),
        (lambda table, _: pl.domains(table, []), ValueError, "empty"),
        (lambda table, _: pl.domains(table, "kind", coordinate_system="um"), ValueError, "coordinate_system"),
        (lambda table, _: pl.domains(table, "kind", axes=plt.subplots(1, 2)[1]), ValueError, "axes"),
        (lambda table, _: pl.domains(table, "many", mpp=1.0), ValueError, "40 groups, and 15"),
        (lambda table, _: pl.domains(table, ["kind", "many"], highlight="fat", mpp=1.0), ValueError, "pass reference="),
        (lambda table, _: pl.domains(table, "kind", highlight=[], mpp=1.0), ValueError, "`highlight` is empty"),
        (lambda _, sdata: pl.domains(sdata, "elsewhere", reference="kind"), ValueError, "on the bins"),
        (lambda _, sdata: pl.domains(sdata, "scales"), ValueError, "several scales"),
        (lambda _, sdata: pl.domains(sdata, "kind", image_key="he"), KeyError, "he"),
        (lambda _, sdata: pl.domains(sdata, "small", reference="kind"), ValueError, "same bins"),
        (lambda _, sdata: pl.domains(sdata, "empty"), ValueError, "0 everywhere"),
    ],
)
def test_bad_input_of_the_picture(table, sdata, call, error, message):
    table.obs["depth"] = table.X.sum(1)
    table.obs["many"] = np.arange(200) % 40
    place = {"um": Scale([30.0, 30.0], axes=("x", "y"))}
    sdata["elsewhere"] = Labels2DModel.parse(np.asarray(sdata["kind"]), dims=("y", "x"), transformations=place)
    sdata["scales"] = Labels2DModel.parse(np.asarray(sdata["kind"]), dims=("y", "x"), scale_factors=[2])
    for key, values in (("small", np.ones((5, 5), np.uint16)), ("empty", np.zeros((20, 10), np.uint16))):
        sdata[key] = Labels2DModel.parse(
            values, dims=("y", "x"), transformations={"um": Scale([10.0, 10.0], axes=("x", "y"))}
        )
    with pytest.raises(error, match=message):
        call(table, sdata)
    plt.close("all")
