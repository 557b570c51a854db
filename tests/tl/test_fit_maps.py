"""tl.fit of models for maps."""

from __future__ import annotations

import logging

import dask.array as da
import numpy as np
import pytest
import torch
from anndata import AnnData
from spatialdata import SpatialData, deepcopy
from spatialdata.models import Image2DModel
from spatialdata.transformations import Identity, Scale, Translation, get_transformation, set_transformation

from stgen import models, pp, tl
from stgen._spatial.grid import Grid
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import shallow_copy, write_image
from stgen.data import MapData, MapInputs
from stgen.measurement import Measurement
from stgen.models import C3Diff, DiffST, Interpolate, PixelProbe, RegressionUNet, Stem
from stgen.tl.fitting.maps import MapKeys, gather_maps, pooled, split_maps

GENES = ["EPCAM", "COL1A1", "ACTB"]
FACTOR = 5
TINY = {"factor": FACTOR, "px_per_bin": 2, "widths": [8, 8]}
QUICK = {"steps": 2, "batch_size": 2, "device": "cpu", "progress": False}
KEYS = {"map_key": "counts", "image_key": "he"}


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """Constants are taken from a few tiles: they are tested elsewhere."""
    monkeypatch.setattr("stgen.models._maps.N_TILES", 16)


@pytest.fixture(scope="module")
def rasterized(simulated):
    """The simulated section with a fine map, a coarse one, and two tables of spots. Look, don't touch."""
    sdata = deepcopy(simulated)
    pp.rasterize(sdata, genes=GENES)
    write_in_memory(sdata, "counts")
    pp.degrade(sdata, map_key="counts", factor=FACTOR)
    return sdata


def write_in_memory(sdata, key, values=None):
    """Replace a map's values, computed or given."""
    element = sdata.images[key]
    transformations = get_transformation(element, get_all=True)
    names = [str(name) for name in element.coords["c"].values]
    values = np.asarray(element.data) if values is None else values
    del sdata.images[key]
    write_image(sdata, key, values, channels=names[: len(values)], transformations=transformations)


@pytest.fixture
def section(rasterized):
    """A copy that the test may change."""
    return deepcopy(rasterized)


def regression(**options):
    torch.manual_seed(0)
    return RegressionUNet(options.pop("genes", GENES), **{**TINY, **options})


def diffst(**options):
    return DiffST(GENES, **{**TINY, "width": 8, "mean_widths": [8, 8], "region": 4, **options})


def c3diff(**options):
    return C3Diff(GENES, **{**TINY, "width": 8, "code": 8, "control_widths": [8, 8], **options})


def gathered(sections, model=None, **keys):
    keys = {"map_key": "counts", "image_key": "he", "low_res": None, **keys}
    return gather_maps(model or regression(), sections, MapKeys(**keys))


# ---- what is fitted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [diffst, c3diff, regression, lambda: PixelProbe(GENES, factor=FACTOR, px_per_bin=2, blurs=[1.0])]
)
def test_one_section(rasterized, make, caplog):
    model = make()
    before = {key: element for _, key, element in rasterized.gen_elements()}
    options = {} if isinstance(model, PixelProbe) else QUICK
    with caplog.at_level(logging.INFO, "stgen"):
        assert tl.fit(model, rasterized, **KEYS, tile=16, seed=2, **options) is model
    assert model.fitted
    assert "model.save(folder) keeps it" in caplog.text
    assert all(rasterized[key] is element for key, element in before.items())
    known = np.isfinite(np.asarray(rasterized["counts"].data[0])).sum()
    entries = {
        "sections",
        "n_bins",
        "map_key",
        "image_key",
        "low_res",
        "version",
        "validation",
        "seed",
        "options",
        "history",
    }
    assert set(model.record) == entries
    assert model.record["n_bins"] == known
    assert (model.record["sections"], model.record["map_key"], model.record["validation"]) == (
        ["section"],
        "counts",
        0.125,
    )
    if options:
        assert model.record["history"]["step"] == [2]
        assert "validation" in model.record["history"]
    assert f"{known} bins of 1 section(s)" in caplog.text


def test_fitted_model_survives_the_disk(rasterized, tmp_path):
    model = tl.fit(diffst(), rasterized, **KEYS, tile=16, **QUICK)
    restored = models.load(model.save(tmp_path))
    assert restored.record == model.record
    assert restored.weights_sha256() == model.weights_sha256()


def test_interpolation_has_nothing_to_fit_and_needs_no_image(rasterized):
    sdata = SpatialData(images={"counts": rasterized["counts"]}, attrs=rasterized.attrs)
    model = tl.fit(Interpolate(GENES, factor=FACTOR), sdata, map_key="counts", tile=16)
    assert model.record["n_bins"] > 0


def test_same_seed_same_model(rasterized):
    fits = [
        tl.fit(regression(), rasterized, **KEYS, tile=16, seed=seed, **QUICK).weights_sha256() for seed in (1, 1, 2)
    ]
    assert fits[0] == fits[1] != fits[2]


def test_several_sections(rasterized):
    data = {"one": rasterized, "two": rasterized}
    model = tl.fit(regression(), data, **KEYS, tile=16, **QUICK)
    assert model.record["sections"] == ["one", "two"]
    assert model.record["n_bins"] == 2 * np.isfinite(np.asarray(rasterized["counts"].data[0])).sum()


@pytest.mark.parametrize("named", [True, False])
def test_validation_on_sections_of_their_own(rasterized, named):
    model = regression()
    seen = {}

    def fit(train, validation, **options):
        seen.update(train=train, validation=validation)
        return {}

    model.fit = fit
    tl.fit(model, {"one": rasterized}, validation={"two": rasterized} if named else rasterized, **KEYS, tile=16)
    assert model.record["validation"] == (["two"] if named else ["validation"])
    known = np.isfinite(np.asarray(rasterized["counts"].data[0]))
    for data in seen.values():  # nothing of either is held out
        np.testing.assert_array_equal(data.sections[0].tissue, known)


def test_share_held_out_is_seen_by_no_training_tile(rasterized):
    model = regression()
    seen = []
    model.fit = lambda train, validation, **options: seen.extend([train, validation]) or {}
    tl.fit(model, rasterized, validation=0.3, **KEYS, tile=16)
    train, validation = seen
    tissue = [data.sections[0].tissue for data in seen]
    known = np.isfinite(np.asarray(rasterized["counts"].data[0]))
    assert not (tissue[0] & tissue[1]).any()
    np.testing.assert_array_equal(tissue[0] | tissue[1], known)
    assert 0.2 < tissue[1].sum() / known.sum() < 0.5
    assert validation.tile == train.tile == 16
    assert len(train) > len(validation) > 0
    batch = next(train.some(1))
    assert batch["h"].shape == (1, 3, 32, 32)


def test_nothing_held_out(rasterized):
    model = tl.fit(regression(), rasterized, validation=0, **KEYS, tile=16, **QUICK)
    assert "validation" not in model.record["history"]


def split(shape, share, side=16):
    """Training and held-out tissue of a section that is tissue everywhere."""
    section = MapInputs(
        np.ones(shape, bool), measurement=Measurement.from_map(np.ones((1, 1, 1)), 4), truth=np.ones((1, *shape))
    )
    train, held_out = split_maps([section], share, side, np.random.default_rng(0))
    return train[0].tissue, held_out[0].tissue


def test_a_quarter_is_too_much_for_a_tenth():
    train, held_out = split((16, 16), 0.1)
    assert train.all()
    assert not held_out.any()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6])
def test_held_out_are_whole_blocks_of_about_the_share(share):
    train, held_out = split((70, 90), share)
    assert (train ^ held_out).all()
    rows, columns = (np.flatnonzero(np.diff(np.arange(n) * k // n)) + 1 for n, k in ((70, 5), (90, 6)))
    blocks = [block for row in np.split(held_out, rows) for block in np.split(row, columns, 1)]
    assert all(block.all() or not block.any() for block in blocks)
    assert share <= held_out.mean() <= (share + 0.05 if share else 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_leaves_enough_to_train_on(seed):
    section = MapInputs(
        np.ones((70, 70), bool), measurement=Measurement.from_map(np.ones((1, 1, 1)), 4), truth=np.ones((1, 70, 70))
    )
    train, held_out = split_maps([section], 0.125, 64, np.random.default_rng(seed))
    assert train[0].tissue.mean() >= 0.7
    assert held_out[0].tissue.mean() <= 0.3


# ---- low-resolution data --------------------------------------------------------------------------------------------


def test_low_resolution_by_default_is_the_map_itself_pooled(rasterized):
    section, record = gathered({"s": rasterized})
    explicit, _ = gathered({"s": rasterized}, low_res="counts_5x")
    one, two = section[0].measurement, explicit[0].measurement
    assert record["low_res"] is None
    np.testing.assert_allclose(one.footprints.centers, two.footprints.centers)
    np.testing.assert_allclose(one.counts, two.counts, rtol=1e-5)
    np.testing.assert_allclose(one.footprints.area, two.footprints.area)
    counts = np.asarray(rasterized["counts"].data)
    np.testing.assert_allclose(one.counts.sum(0), np.nansum(counts, (1, 2)), rtol=1e-5)
    np.testing.assert_allclose(one.footprints.pool(counts), one.counts, rtol=1e-5)
    assert one.footprints.area.sum() == np.isfinite(counts[0]).sum()


@pytest.mark.parametrize("shape", [(10, 15), (11, 13), (4, 3)])
def test_pooling_a_map_that_is_no_multiple_of_the_factor(shape):
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (2, *shape)).astype(np.float32)
    tissue = rng.random(shape) < 0.8
    counts[:, ~tissue] = np.nan
    measurement = pooled(counts, tissue, 5)
    np.testing.assert_allclose(measurement.footprints.pool(counts), measurement.counts)
    np.testing.assert_allclose(
        measurement.footprints.pool(tissue[None].astype(float))[:, 0], measurement.footprints.area
    )
    assert measurement.counts.sum() == np.nansum(counts)


def test_low_resolution_from_spots(rasterized):
    section, _ = gathered({"s": rasterized}, low_res="spot_counts")
    measurement = section[0].measurement
    assert (measurement.footprints.shape, len(measurement)) == ("disc", rasterized["spot_counts"].n_obs)
    assert measurement.footprints.diameter == pytest.approx(5.5)
    expected = measurement_of(rasterized, "spot_counts", Grid.of_map(rasterized, "counts"), GENES)
    np.testing.assert_array_equal(measurement.counts, expected.counts)
    model = tl.fit(regression(), rasterized, low_res="spot_counts", **KEYS, tile=16, **QUICK)
    assert model.record["low_res"] == "spot_counts"


def test_low_resolution_from_a_layer_of_spots(rasterized):
    table = rasterized["spot_counts"].copy()
    table.layers["counts"], table.X = table.X.copy(), table.X.log1p()
    normalized = shallow_copy(rasterized)
    normalized.tables["spot_counts"] = table
    found, record = gathered({"s": normalized}, low_res="spot_counts", layer="counts")
    expected, _ = gathered({"s": rasterized}, low_res="spot_counts")
    np.testing.assert_array_equal(found[0].measurement.counts, expected[0].measurement.counts)
    assert record["layer"] == "counts"
    model = tl.fit(regression(), normalized, low_res="spot_counts", layer="counts", **KEYS, tile=16, **QUICK)
    assert model.record["layer"] == "counts"


def test_low_resolution_map_is_what_the_network_sees(section):
    values = np.asarray(section["counts_5x"].data) * 3
    area = section["counts_5x_area"]
    write_in_memory(section, "counts_5x", values)
    assert "counts_5x_area" in section.labels
    assert area is section["counts_5x_area"]
    one, _ = gathered({"s": section})
    three, _ = gathered({"s": section}, low_res="counts_5x")
    np.testing.assert_allclose(three[0].measurement.counts, 3 * one[0].measurement.counts, rtol=1e-5)
    tiles = [MapData(sections, tile=16)[0] for sections in (one, three)]
    torch.testing.assert_close(tiles[1]["y"].expm1(), 3 * tiles[0]["y"].expm1(), rtol=1e-4, atol=1e-4)
    assert torch.equal(tiles[1]["x"], tiles[0]["x"])


def test_low_resolution_section_by_section(rasterized):
    sections = {"map": rasterized, "spots": rasterized, "none": rasterized}
    low_res = {"map": "counts_5x", "spots": "spot_counts"}
    found, record = gathered(sections, c3diff(), low_res=low_res)
    assert record["low_res"] == low_res
    for part, (name, key) in zip(found, low_res.items(), strict=False):
        expected, _ = gathered({name: rasterized}, low_res=key)
        np.testing.assert_array_equal(part.measurement.counts, expected[0].measurement.counts)
        assert part.measurement.footprints.shape == expected[0].measurement.footprints.shape
    assert found[2].measurement is None
    np.testing.assert_array_equal(found[2].truth, found[0].truth)


def test_fit_on_sections_with_and_without_low_resolution_data(rasterized, tmp_path):
    sections, options = {"with": rasterized, "without": rasterized}, {**KEYS, "tile": 16, **QUICK}
    fits = [tl.fit(c3diff(), sections, low_res=low_res, **options) for low_res in 2 * [{"with": "counts_5x"}] + [None]]
    hashes = [model.weights_sha256() for model in fits]
    assert hashes[0] == hashes[1] != hashes[2]
    assert models.load(fits[0].save(tmp_path)).record == fits[0].record
    assert fits[0].record["low_res"] == {"with": "counts_5x"}
    assert fits[0].record["sections"] == ["with", "without"]


@pytest.mark.parametrize("named", [True, False])
def test_low_resolution_of_sections_for_validation(rasterized, named):
    model, seen = c3diff(), []
    model.fit = lambda train, validation, **options: seen.extend([train, validation]) or {}
    name = "apart" if named else "validation"
    validation = {name: rasterized, "other": rasterized} if named else rasterized
    tl.fit(model, {"one": rasterized}, validation=validation, low_res={name: "counts_5x"}, **KEYS, tile=16)
    measured = [[part.measurement is not None for part in data.sections] for data in seen]
    assert measured == [[False], [True, False] if named else [True]]


def test_low_resolution_of_no_section(rasterized):
    """A model that looks at none does without; one that only can do without learns from some."""
    model = tl.fit(regression(use_low_res=False), rasterized, low_res={}, **KEYS, tile=16, **QUICK)
    assert model.record["low_res"] == {}
    model = c3diff()
    weights = model.weights_sha256()
    with pytest.raises(ValueError, match="no training section has a low-resolution map, which C3-Diff learns from"):
        tl.fit(model, rasterized, low_res={}, **KEYS, tile=16, **QUICK)
    assert model.weights_sha256() == weights
    assert not model.fitted


@pytest.mark.parametrize(
    ("make", "low_res", "message"),
    [
        (c3diff, {"one": "counts_5x", "oen": "counts_5x"}, "`low_res` names data of 'oen', which is none of the sections: 'one', 'two'"),
        (c3diff, {"one": "nothing"}, "There is no map or table 'nothing'"),
        (c3diff, {"two": "counts"}, r"section 'two': the bins of 'counts' are 1 bins of the map wide and the model's factor is 5"),
        (regression, {"one": "counts_5x"}, "names no low-resolution data of section 'two', and this RegressionUNet cannot do without"),
        (lambda: c3diff(p_missing=0.0), {"two": "counts_5x"}, "of section 'one', and this C3Diff cannot do without"),
    ],
)  # fmt: skip
def test_low_resolution_that_does_not_fit_the_sections(rasterized, make, low_res, message):
    model = make()
    weights = model.weights_sha256()
    with pytest.raises((KeyError, ValueError), match=message):
        tl.fit(model, {"one": rasterized, "two": rasterized}, low_res=low_res, **KEYS, tile=16, **QUICK)
    assert not model.fitted
    assert model.weights_sha256() == weights


# ---- what the tiles hold --------------------------------------------------------------------------------------------


def test_tiles_are_of_map_and_image_at_the_same_place(rasterized):
    model = regression()
    section, _ = gathered({"s": rasterized}, model)
    grid = Grid.of_map(rasterized, "counts")
    window = grid.image_window(rasterized, "he", px_per_bin=2)
    data = MapData(section, tile=16)
    _, y, x = data.corners[len(data) // 2]
    item = data[len(data) // 2]
    np.testing.assert_allclose(item["h"], window(y, x, 16, 16), atol=1e-6)
    counts = np.asarray(rasterized["counts"].data)[:, y : y + 16, x : x + 16]
    np.testing.assert_allclose(item["x"], np.log1p(np.nan_to_num(counts)), rtol=1e-6)
    np.testing.assert_array_equal(item["tissue"][0], np.isfinite(counts[0]))


def test_genes_are_taken_by_name(rasterized):
    model = regression(genes=["ACTB", "EPCAM"])
    section, _ = gathered({"s": rasterized}, model)
    expected = rasterized["counts"].sel(c=["ACTB", "EPCAM"]).data
    np.testing.assert_array_equal(np.asarray(section[0].truth), np.asarray(expected))


def test_maps_that_do_not_fit_in_memory_stay_lazy(section, monkeypatch):
    read, _ = gathered({"s": section})
    monkeypatch.setattr("stgen.tl.fitting.maps.IN_MEMORY", 0)
    lazy, _ = gathered({"s": section})
    assert isinstance(lazy[0].truth, da.Array)
    assert isinstance(read[0].truth, np.ndarray)
    items = [MapData(sections, tile=16)[3, 6] for sections in (read, lazy)]
    for name in items[0]:
        torch.testing.assert_close(items[0][name], items[1][name])


def image_as(sdata, kind):
    """The same histology in another form."""
    image = sdata["he"]
    values, names = np.asarray(image.data), [str(c) for c in image.coords["c"].values]
    if kind == "uint16":
        values = values.astype(np.uint16) * 257
    elif kind == "float":
        values = values.astype(np.float32) / 255
    elif kind == "RGBA":
        values, names = np.concatenate([values, np.full_like(values[:1], 255)]), ["r", "g", "b", "a"]
    transformations = get_transformation(image, get_all=True)
    scales = [2, 2] if kind == "several scales" else None
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(
        values, dims=("c", "y", "x"), c_coords=names, transformations=transformations, scale_factors=scales
    )
    return sdata


@pytest.mark.parametrize("kind", ["uint16", "RGBA", "float", "several scales"])
def test_other_forms_of_the_same_image(section, rasterized, kind):
    assert np.asarray(rasterized["he"].data).dtype == np.uint8
    one, _ = gathered({"s": rasterized})
    other, _ = gathered({"s": image_as(section, kind)})
    found, expected = (sections[0].image(3, 4, 16, 20) for sections in (other, one))
    assert found.shape == (3, 32, 40)
    if kind != "several scales":  # a coarser level was already averaged
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.mean((1, 2)), expected.mean((1, 2)), atol=0.02)
    assert tl.fit(regression(), section, **KEYS, tile=16, **QUICK).fitted


# ---- bad input ------------------------------------------------------------------------------------------------------


def spoil_values(sdata, change, key="counts"):
    values = np.array(sdata[key].data)
    change(values)
    write_in_memory(sdata, key, values)


def move_image(sdata):
    set_transformation(sdata["he"], Translation([5000, 0], axes=("x", "y")), "um")


def elsewhere(sdata, key):
    set_transformation(sdata[key], {"elsewhere": Identity()}, set_all=True)


def set_to(index, value):
    return lambda values: values.__setitem__(index, value)


BAD = {
    "map and image apart": (move_image, {}, ValueError, "the image 'he' and 'counts' do not overlap in the coordinate system 'um'"),
    "no common system": (lambda s: elsewhere(s, "he"), {}, ValueError, "share no coordinate system"),
    "no common system with spots": (
        lambda s: elsewhere(s, "spots"), {"low_res": "spot_counts"}, (ValueError, KeyError), "coordinate system",
    ),
    "negative": (
        lambda s: spoil_values(s, set_to((0, 20, 20), -1)), {}, ValueError,
        r"the map 'counts' holds negative values \(down to -1\); it must hold counts",
    ),
    "infinite": (lambda s: spoil_values(s, set_to((1, 20, 20), np.inf)), {}, ValueError, "holds infinite values"),
    "negative low resolution": (
        lambda s: spoil_values(s, set_to((0, 4, 4), -1), "counts_5x"), {"low_res": "counts_5x"}, ValueError,
        "The map 'counts_5x' holds negative values",
    ),
    "gene without counts": (
        lambda s: spoil_values(s, lambda v: v[1].__setitem__(np.isfinite(v[1]), 0)), {}, ValueError,
        r"1 gene\(s\) have no counts on the training tissue: COL1A1. Leave them out",
    ),
    "no tissue": (
        lambda s: spoil_values(s, lambda v: v.fill(np.nan)), {}, ValueError, r"3 gene\(s\) have no counts on the training tissue",
    ),
    "no counts": (lambda s: spoil_values(s, lambda v: v.fill(0)), {}, ValueError, r"3 gene\(s\) have no counts"),
    "tissue too sparse": (
        lambda s: spoil_values(s, lambda v: v.__setitem__(np.s_[:, :, 5:], np.nan)), {"tile": 32}, ValueError,
        "no tile of 32 x 32 bins has enough training tissue; the maps are 58 x 59",
    ),
    "genes missing": (
        lambda s: write_in_memory(s, "counts", np.asarray(s["counts"].data)[:2]), {}, KeyError,
        "1 of 3 genes are not in the map 'counts'",
    ),
    "no map": (lambda s: None, {"map_key": None}, ValueError, "is fitted on maps: pass map_key="),
    "unknown map": (lambda s: None, {"map_key": "nothing"}, KeyError, "nothing"),
    "an image for a map": (lambda s: None, {"map_key": "he"}, ValueError, "'he' is a picture .*no map of genes"),
    "unknown image": (lambda s: None, {"image_key": "nothing"}, KeyError, "nothing"),
    "unknown low resolution": (lambda s: None, {"low_res": "nothing"}, KeyError, "There is no map or table 'nothing'"),
    "fine map as low resolution": (
        lambda s: None, {"low_res": "counts"}, ValueError, r"are 1 bins of the map wide and the model's factor is 5; .* factor=1",
    ),
    "tile not aligned": (lambda s: None, {"tile": 33}, ValueError, "`tile` must be a multiple of 2 bins, which RegressionUNet needs"),
    "tile too small": (lambda s: None, {"tile": 0}, ValueError, "`tile` must be a multiple of 2 bins"),
    "tile larger than the section": (lambda s: None, {"tile": 128}, ValueError, "no tile of 128 x 128 bins has enough"),
    "useless": (
        lambda s: None, {"embedding_key": "X", "table_key": "spot_counts"}, ValueError,
        "RegressionUNet is a model of maps, which has no use for embedding_key, table_key",
    ),
    "layer of no table": (lambda s: None, {"layer": "raw"}, ValueError, "layer='raw' is that of a table of spots, and none was named"),
    "layer of a map": (
        lambda s: None, {"low_res": "counts_5x", "layer": "raw"}, ValueError, "layer='raw' is for tables, and 'counts_5x' is a map",
    ),
    "unknown layer": (lambda s: None, {"low_res": "spot_counts", "layer": "raw"}, KeyError, "There is no layer 'raw'"),
    "all held out": (lambda s: None, {"validation": 0.95}, ValueError, r"`validation` must be a share in \[0, 0.9\), found 0.95"),
    "device": (lambda s: None, {"device": "gpu7"}, ValueError, "unknown or absent device 'gpu7'"),
    "option": (lambda s: None, {"stepz": 3}, TypeError, "stepz"),
}  # fmt: skip


@pytest.fixture(scope="module")
def before(rasterized):
    """A fitted model and its weights."""
    model = tl.fit(regression(), rasterized, **KEYS, tile=16, **QUICK)
    return model, model.weights_sha256(), dict(model.record)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_and_the_model_left_as_it_was(section, before, what, monkeypatch):
    spoil, options, error, message = BAD[what]
    spoil(section)
    model, weights, record = before
    if what != "option":
        monkeypatch.setattr(RegressionUNet, "fit", lambda *_, **__: pytest.fail("work was begun"))
    elements = sorted(name for _, name, _ in section.gen_elements())
    with pytest.raises(error, match=message):
        tl.fit(model, section, **{**KEYS, "tile": 16, **QUICK, **options})
    assert model.weights_sha256() == weights
    assert model.record == record
    assert not model.training
    assert sorted(name for _, name, _ in section.gen_elements()) == elements


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        (
            {"image_channels": 4},
            {},
            r"images of 4 channels, and 'he' has 3 \(r, g, b\).*a model with image_channels=3",
        ),
        ({"bin_um": 20.0}, {}, r"has bins of 10 µm and the model is for 20 µm; construct it with bin_um=10"),
        (
            {"factor": 4},
            {"low_res": "counts_5x"},
            r"are 5 bins of the map wide and the model's factor is 4; .* factor=5",
        ),
    ],
)
def test_model_that_does_not_fit_the_data(rasterized, options, keys, message):
    model = regression(**options)
    weights = model.weights_sha256()
    with pytest.raises(ValueError, match=message):
        tl.fit(model, rasterized, **KEYS, **keys, tile=16, **QUICK)
    assert not model.fitted
    assert model.weights_sha256() == weights


def test_low_resolution_bins_that_do_not_fit_the_grid(section):
    set_transformation(section["counts_5x"], Scale([43.0, 43.0], axes=("x", "y")), "um")
    with pytest.raises(ValueError, match=r"A bin of 'counts_5x' is 4.3 bins of the grid"):
        tl.fit(regression(), section, **KEYS, low_res="counts_5x", tile=16, **QUICK)


def test_other_kinds_of_data(rasterized):
    with pytest.raises(TypeError, match=r"maps are in SpatialData objects; section 'a' is a AnnData"):
        tl.fit(regression(), {"a": AnnData(np.ones((3, 2)))}, **KEYS)
    with pytest.raises(ValueError, match="empty mapping"):
        tl.fit(regression(), {}, **KEYS)
    with pytest.raises(ValueError, match="Stem is a model of locations, which has no use for map_key, image_key, tile"):
        tl.fit(Stem(GENES, embedding_dim=3), rasterized, **KEYS, tile=16)
    with pytest.raises(ValueError, match="`validation` must be a share"):
        tl.fit(Stem(GENES, embedding_dim=3), rasterized["spot_counts"], validation={"a": rasterized})


def test_network_that_needs_larger_tiles(rasterized):
    with pytest.raises(ValueError, match=r"`tile` must be a multiple of 256 bins, which DiffST needs to see; found 64"):
        tl.fit(diffst(preset="paper", graph=False, hierarchy=False), rasterized, **KEYS, tile=64)
    with pytest.raises(ValueError, match=r"no tile of 256 x 256 bins has enough training tissue; the maps are 58 x 59"):
        tl.fit(diffst(preset="paper", graph=False, hierarchy=False), rasterized, **KEYS)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_run_that_ends_early_leaves_the_model_as_it_was(rasterized, before, stop, monkeypatch):
    model, weights, record = before
    calls = []

    def loss(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise stop
        return RegressionUNet.loss(model, batch)

    monkeypatch.setattr(model, "loss", loss)
    with pytest.raises(stop):
        tl.fit(model, rasterized, **KEYS, tile=16, seed=9, **QUICK)
    assert model.weights_sha256() == weights
    assert model.record == record
    assert (model.training, model.progress) == (False, 1.0)
