"""Maps of a section from its own spots and image: `tl.superresolve` without a model."""

import copy
import importlib.util
import logging
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata as sd
import squidpy as sq
from scipy import sparse
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Identity, Scale, Translation, get_transformation

from stgen import datasets, models, pl, pp
from stgen._spatial.grid import Grid
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import shallow_copy
from stgen._spatial.section import get_section
from stgen.kriging import Places
from stgen.models.kernel_regression import inputs as _inputs
from stgen.models.kernel_regression import model as _model
from stgen.models.kernel_regression import sampler as _sampler
from stgen.models.kernel_regression.regression import Regression, Spots, components, composition
from stgen.tl.superresolution import superresolve as _superresolve
from stgen.tl.superresolution.superresolve import superresolve

spec = importlib.util.spec_from_file_location("tenx", Path(__file__).parents[1] / "spatial" / "tenx.py")
tenx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tenx)

SIZE_UM, N_BINS, PITCH = 640, 64, 8  # the section, and the distance of spots, in bins of 10 µm
TISSUE_UM = 480  # from the left; the rest is bare glass
SUFFIXES = ("", "_std", "_samples", "_total")
TABLE = "superresolved_out_of_fold"


def built(image, xy, table):
    """A section from an image of 2 µm per pixel and spots at x, y in µm."""
    image = Image2DModel.parse(
        image,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations={"um": Scale([2.0, 2.0], axes=("x", "y"))},
    )
    spots = ShapesModel.parse(xy, geometry=0, radius=25.0, transformations={"um": Identity()})
    table = table.copy()
    table.obs["spot_id"] = np.arange(len(xy))
    table.obsm = {}
    return SpatialData(images={"he": image}, shapes={"spots": spots}, tables={"spot_counts": table})


@pytest.fixture(scope="module")
def simulated():
    """The whole section, with its molecules. Look, don't touch."""
    return datasets.simulated_section(
        seed=1, size_um=SIZE_UM, mpp=2.0, n_genes=12, spot_pitch_um=80, spot_diameter_um=50
    )


@pytest.fixture(scope="module")
def section(simulated):
    """The section with bare glass on its right. Look, don't touch."""
    image, table = simulated["he"].values.copy(), simulated["spot_counts"]
    image[:, :, TISSUE_UM // 2 :] = 245
    kept = table.obsm["spatial"][:, 0] < TISSUE_UM - 20
    return built(image, table.obsm["spatial"][kept], table[kept])


@pytest.fixture(scope="module")
def genes(section):
    return list(section["spot_counts"].var_names)


@pytest.fixture(scope="module")
def result(section):
    """What comes of it, with samples."""
    return run(section, n_samples=3, keep_samples=True)


@pytest.fixture(scope="module")
def dense():
    """A section with many spots, so that scores are sure."""
    return datasets.simulated_section(seed=1, size_um=840, mpp=3.0, n_genes=16, spot_pitch_um=60, spot_diameter_um=40)


@pytest.fixture(scope="module")
def mapped(simulated):
    """The section with maps of 10 and of 80 µm."""
    sdata = shallow_copy(simulated)
    pp.rasterize(sdata, points_key="transcripts", genes=["EPCAM", "COL1A1", "ACTB"], bin_um=10, key_added="counts")
    pp.degrade(sdata, map_key="counts", factor=8)
    return sdata


def run(sdata, image_key="he", genes=None, **options):
    return superresolve(sdata, image_key, genes, **{"copy": True, "progress": False, "n_samples": 1} | options)


def values_of(sdata, key="superresolved"):
    return np.asarray(sdata[key].data)


def distance_to_spots(sdata, key="superresolved", spots="spots"):
    """Of each bin's center to the next spot, in bins."""
    grid = Grid.of_map(sdata, key)
    y, x = np.mgrid[: grid.height, : grid.width] + 0.5
    return cKDTree(grid.locate(sdata, spots)).query(np.stack([y, x], -1))[0]


def state(sdata):
    """All there is to an object, to be compared with what it is later."""
    elements = {name: element for _, name, element in sdata.gen_elements()}
    tables = {
        name: (table.X.toarray() if sparse.issparse(table.X) else np.array(table.X), table.obs.copy(), table.var.copy())
        for name, table in sdata.tables.items()
    }
    return elements, tables, copy.deepcopy(sdata.attrs)


def check_unchanged(sdata, before):
    elements, tables, attrs = before
    found = {name: element for _, name, element in sdata.gen_elements()}
    assert list(found) == list(elements)
    assert all(found[name] is element for name, element in elements.items())
    assert sdata.attrs == attrs
    for name, (x, obs, var) in tables.items():
        table = sdata.tables[name]
        np.testing.assert_array_equal(table.X.toarray() if sparse.issparse(table.X) else table.X, x)
        assert table.obs.equals(obs)
        assert table.var.equals(var)


# ---- the result ------------------------------------------------------------------------------------------------------


def test_maps_and_table_are_named_and_recorded(section, result, genes):
    maps = {key: result[key] for key in result.images if key != "he"}
    assert set(maps) == {f"superresolved{suffix}" for suffix in SUFFIXES}
    for image in maps.values():
        assert image.dims == ("c", "y", "x")
        assert image.dtype == np.float32
        assert image.shape[1:] == (N_BINS, N_BINS)
    assert list(maps["superresolved"].coords["c"].values) == genes
    assert list(maps["superresolved_std"].coords["c"].values) == genes
    assert list(maps["superresolved_total"].coords["c"].values) == ["total"]
    assert list(maps["superresolved_samples"].coords["c"].values) == [f"{g}:{k}" for g in genes for k in range(3)]
    entry = result.attrs["stgen"]["superresolved"]
    assert {
        "function": "tl.superresolve",
        "model": "KernelRegression",
        "image": "he",
        "low_res": "spot_counts",
    }.items() <= entry.items()
    assert (entry["unit"], entry["bin_um"], entry["seed"], entry["consistency"]) == ("counts per bin", 10.0, 0, False)
    assert (entry["n_spots"], entry["n_spots_left_out"]) == (section["spot_counts"].n_obs, 0)
    assert entry["n_trusted"] == result[TABLE].var["trusted"].sum()
    assert sum(entry["kernels"].values()) == pytest.approx(1, abs=1e-3)
    assert entry["correlation_length_um"] >= 80
    assert entry["from_image"] + entry["from_neighbors"] < 1
    statistics = {suffix: result.attrs["stgen"][f"superresolved{suffix}"]["statistic"] for suffix in SUFFIXES}
    assert statistics == {"": "expected", "_std": "std", "_samples": "samples", "_total": "total"}
    assert result.attrs["stgen"][TABLE]["statistic"] == "out of fold"


def test_bins_begin_at_the_corner_of_the_image(section, result):
    for suffix in SUFFIXES:
        transformations = get_transformation(result[f"superresolved{suffix}"], get_all=True)
        assert list(transformations) == ["um"]
        matrix = transformations["um"].to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([10, 10, 1]), atol=1e-9)


def test_counts_are_not_negative_and_of_the_measured_size(section, result):
    values = values_of(result)
    assert np.nanmin(values) >= 0
    assert np.nanmin(values_of(result, "superresolved_samples")) >= 0
    measured = section["spot_counts"].X.sum(0) / section["spot_counts"].n_obs / (np.pi * 2.5**2)
    at_spots = distance_to_spots(result) < 2.5
    found = values[:, at_spots].mean(1)
    assert np.corrcoef(found, np.asarray(measured).ravel())[0, 1] > 0.95
    total = values_of(result, "superresolved_total")[0, at_spots].mean()
    assert total == pytest.approx(np.asarray(measured).sum(), rel=0.3)


def test_nothing_is_known_off_the_tissue(result):
    known, distance = np.isfinite(values_of(result)[0]), distance_to_spots(result)
    x_um = 10 * (np.arange(N_BINS) + 0.5)
    assert known[distance < PITCH].all()
    assert known[:, x_um < TISSUE_UM].mean() > 0.95
    glass = np.broadcast_to(x_um > TISSUE_UM + 65, known.shape) & (distance > 1.3 * PITCH)
    assert glass.sum() > 100
    assert not known[glass].any()
    for suffix in SUFFIXES:
        values = values_of(result, f"superresolved{suffix}")
        assert (np.isfinite(values) == known).all()


def with_hole(section):
    """Without the spots within 125 µm of a place."""
    xy = np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y])
    kept = np.hypot(*(xy - [240, 320]).T) > 125
    return built(section["he"].values, xy[kept], section["spot_counts"][kept])


@pytest.mark.parametrize("reach", [3.0, 1.3])
def test_tissue_of_the_image_is_filled_as_far_as_three_pitches(monkeypatch, section, reach):
    monkeypatch.setattr(models.KernelRegression, "tissue_reach", reach)
    found = run(with_hole(section), genes=["EPCAM"])
    known, distance = np.isfinite(values_of(found)[0]), distance_to_spots(found)
    hole = np.hypot(*(np.mgrid[:N_BINS, :N_BINS] + 0.5 - np.array([32, 24])[:, None, None])) < 12.5
    assert (known[hole] == (distance[hole] <= max(reach * PITCH, 1e-9))).mean() > 0.97
    assert known[hole].all() == (reach == 3.0)


def test_a_gap_between_spots_stays_unknown_without_an_image(section):
    found = run(with_hole(section), None, ["EPCAM"])
    known, distance = np.isfinite(values_of(found)[0]), distance_to_spots(found)
    assert known[distance <= PITCH].all()
    assert not known[distance > 1.4 * PITCH].any()
    assert (distance > 1.4 * PITCH).any()


def test_std_is_that_of_the_samples(result, genes):
    samples = values_of(result, "superresolved_samples").reshape(len(genes), 3, N_BINS, N_BINS)
    np.testing.assert_allclose(values_of(result, "superresolved_std"), samples.std(1), rtol=1e-3, atol=1e-6)
    assert np.nanmean(samples.std(1)) > 0.001


def test_the_expected_map_does_not_depend_on_samples_or_seed(section, result):
    found = run(section, seed=7)
    assert set(found.images) == {"he", "superresolved", "superresolved_total"}
    np.testing.assert_allclose(values_of(found), values_of(result), rtol=1e-5)
    np.testing.assert_allclose(
        values_of(found, "superresolved_total"), values_of(result, "superresolved_total"), rtol=1e-5
    )


def test_one_sample_can_be_kept(section):
    found = run(section, genes=["EPCAM"], keep_samples=True)
    assert "superresolved_std" not in found
    assert list(found["superresolved_samples"].coords["c"].values) == ["EPCAM:0"]
    assert np.nanmax(np.abs(values_of(found, "superresolved_samples") - values_of(found))) > 0.01


def test_seeds_are_what_samples_depend_on(untouched_rng, section, result):
    options = {"genes": ["EPCAM"], "n_samples": 3, "keep_samples": True}
    same, other = run(section, **options), run(section, seed=1, **options)
    expected = values_of(result, "superresolved_samples")[:3]
    np.testing.assert_allclose(values_of(same, "superresolved_samples"), expected, rtol=1e-5)
    assert np.nanmax(np.abs(values_of(other, "superresolved_samples") - expected)) > 0.01


@pytest.mark.parametrize("consistency", [False, True])
def test_the_result_does_not_depend_on_tiles(section, consistency):
    options = {"genes": ["EPCAM", "COL1A1"], "n_samples": 2, "consistency": consistency}
    whole = run(section, **options)
    for tile in (22, 40):
        cut = run(section, tile=tile, **options)
        assert cut.attrs["stgen"]["superresolved"]["tile"] == tile
        for suffix in ("", "_std", "_total"):
            key = f"superresolved{suffix}"
            np.testing.assert_allclose(values_of(cut, key), values_of(whole, key), rtol=1e-3, atol=1e-5)


def test_the_result_does_not_depend_on_how_much_is_held_in_memory(monkeypatch, section, result):
    n_spots = section["spot_counts"].n_obs
    monkeypatch.setattr(_sampler, "MOST_VALUES", 7 * n_spots * 5)  # five genes at a time
    found = run(section)
    assert found.attrs["stgen"]["superresolved"]["tile"] == 16
    for suffix in ("", "_total"):
        key = f"superresolved{suffix}"
        np.testing.assert_allclose(values_of(found, key), values_of(result, key), rtol=1e-4, atol=1e-6)
    assert found[TABLE].var.round(5).equals(result[TABLE].var.round(5))


def test_a_map_does_not_depend_on_which_others_were_asked_for_or_their_order(section, result, genes):
    some = [genes[5], genes[0], genes[9]]
    found = run(section, genes=some, n_samples=3, keep_samples=True)
    at = [genes.index(gene) for gene in some]
    assert list(found["superresolved"].coords["c"].values) == some
    for suffix in ("", "_std"):
        key = f"superresolved{suffix}"
        np.testing.assert_allclose(values_of(found, key), values_of(result, key)[at], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        values_of(found, "superresolved_total"), values_of(result, "superresolved_total"), rtol=1e-5
    )
    table = found[TABLE]
    assert list(table.var_names) == some
    np.testing.assert_allclose(table.X, result[TABLE][:, some].X, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table.var["score"], result[TABLE].var.loc[some, "score"], rtol=1e-5)


def test_one_gene_may_be_named_by_itself(section, result):
    found = run(section, genes="EPCAM")
    np.testing.assert_allclose(values_of(found), values_of(result)[[0]], rtol=1e-4, atol=1e-6)


def test_the_order_of_the_spots_does_not_matter(section, result):
    order = np.random.default_rng(0).permutation(section["spot_counts"].n_obs)
    xy = np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y])
    found = run(built(section["he"].values, xy[order], section["spot_counts"][order]))
    np.testing.assert_allclose(values_of(found), values_of(result), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found[TABLE].X, result[TABLE].X[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("symmetry", ["mirrored", "turned"])
def test_the_result_turns_and_mirrors_with_the_section(section, result, symmetry):
    x, y = section["spots"].geometry.x.to_numpy(), section["spots"].geometry.y.to_numpy()
    turn, xy = {
        "mirrored": (lambda a: a[..., ::-1], (SIZE_UM - x, y)),
        "turned": (lambda a: np.rot90(a, 1, (-2, -1)), (y, SIZE_UM - x)),
    }[symmetry]
    image = np.ascontiguousarray(turn(section["he"].values))
    found = values_of(run(built(image, np.column_stack(xy), section["spot_counts"])))
    expected = turn(values_of(result))
    assert (np.isfinite(found) == np.isfinite(expected)).mean() > 0.995
    both = np.isfinite(found) & np.isfinite(expected)
    np.testing.assert_allclose(found[both], expected[both], rtol=2e-2, atol=1e-3)


def test_the_object_is_left_alone_with_copy(section, result):
    before = state(section)
    assert isinstance(run(section, genes=["EPCAM"]), SpatialData)
    check_unchanged(section, before)


def test_without_copy_the_result_is_written_and_its_place_logged(section, result, caplog):
    sdata = shallow_copy(section)
    before = state(sdata)
    with caplog.at_level(logging.INFO, "stgen"):
        assert run(sdata, copy=False) is None
    for part in ('sdata.images["superresolved_total"]', f'sdata.tables["{TABLE}"].var', "sdata.write(path)"):
        assert part in caplog.text
    np.testing.assert_allclose(values_of(sdata), values_of(result), rtol=1e-5)
    assert all(sdata[name] is element for name, element in before[0].items())


def test_an_earlier_result_is_replaced_if_asked_for_and_not_taken_for_the_spots(section, result):
    sdata = shallow_copy(result)
    found = run(sdata, genes=["EPCAM"], overwrite=True)
    assert values_of(found).shape[0] == 1
    assert set(found.images) == {"he", "superresolved", "superresolved_total"}  # nor is a part of it left
    assert found[TABLE].n_vars == 1
    other = run(sdata, genes=["EPCAM"], key_added="other")
    np.testing.assert_allclose(values_of(other, "other"), values_of(found), rtol=1e-6)
    assert other[TABLE].n_vars == 12


def test_a_result_of_a_model_replaces_table_and_total_too(mapped):
    sdata = run(mapped, low_res="counts_8x", factor=8, key_added="m")
    assert "m_out_of_fold" in sdata.tables
    model = models.Interpolate(["EPCAM", "COL1A1", "ACTB"], factor=8)
    superresolve(sdata, model=model, low_res="counts_8x", key_added="m", overwrite=True, progress=False)
    assert "m_out_of_fold" not in sdata.tables
    assert "m_total" not in sdata.images
    assert not {"m_total", "m_out_of_fold"} & set(sdata.attrs["stgen"])


# ---- store -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(section, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "maps.zarr"
    return run(section, n_samples=3, keep_samples=True, store=path, tile=24), path


def test_a_store_holds_the_same_numbers_as_memory(stored, result):
    for sdata in (stored[0], sd.read_zarr(stored[1])):
        for suffix in SUFFIXES:
            key = f"superresolved{suffix}"
            np.testing.assert_allclose(values_of(sdata, key), values_of(result, key), rtol=1e-4, atol=1e-6)
            assert list(sdata[key].coords["c"].values) == list(result[key].coords["c"].values)
            theirs, ours = (
                get_transformation(s[key], "um").to_affine_matrix(("x", "y"), ("x", "y")) for s in (sdata, result)
            )
            np.testing.assert_allclose(theirs, ours)
        np.testing.assert_allclose(sdata[TABLE].X, result[TABLE].X, rtol=1e-4, atol=1e-5)
        assert sdata[TABLE].var.round(4).equals(result[TABLE].var.round(4))
        assert sdata.attrs["stgen"][TABLE] == result.attrs["stgen"][TABLE] | {"tile": 24}


def test_maps_of_a_store_are_not_loaded(stored):
    sdata, path = stored
    for suffix in SUFFIXES:
        files = sd.get_dask_backing_files(sdata[f"superresolved{suffix}"])
        assert all(Path(file).is_relative_to(path) for file in files)
    assert {file.name for file in path.parent.iterdir()} == {path.name}  # nothing is left beside it


def test_the_table_of_a_store_is_linked_to_the_spots(stored, section):
    linked = sd.match_table_to_element(stored[0], "spots", TABLE)
    assert linked.n_obs == section["spot_counts"].n_obs
    np.testing.assert_array_equal(linked.X, stored[0][TABLE].X)


def test_nothing_is_left_of_a_store_that_fails(monkeypatch, section, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("on the way")

    monkeypatch.setattr(_superresolve, "spot_table", fail)
    sdata = shallow_copy(section)
    before = state(sdata)
    with pytest.raises(RuntimeError, match="on the way"):
        run(sdata, genes=["EPCAM"], store=tmp_path / "maps.zarr", copy=False)
    check_unchanged(sdata, before)
    assert list(tmp_path.iterdir()) == []


# ---- agreement with what was measured --------------------------------------------------------------------------------


def residual(sdata, counts, values, low_res="spot_counts"):
    """Measured counts less those of a map, in the spots that lie on the grid, in parts of the measured."""
    grid = Grid.of_map(sdata, "superresolved")
    spots = measurement_of(sdata, low_res, grid, ["EPCAM"])
    inside = (spots.footprints.centers > 2.5).all(1) & (spots.footprints.centers < N_BINS - 2.5).all(1)
    assert inside.sum() >= 30
    return (np.abs(spots.footprints.pool(values) - counts) / np.maximum(counts, 1))[inside]


def test_with_consistency_spots_hold_what_was_measured(section, genes):
    found = run(section, consistency=True, n_samples=2, keep_samples=True)
    assert found.attrs["stgen"]["superresolved"]["consistency"] is True
    counts = section["spot_counts"].X.toarray()
    assert residual(found, counts, values_of(found)).max() < 1e-3
    for number in range(2):
        assert residual(found, counts, values_of(found, "superresolved_samples")[number::2]).max() < 1e-3
    total = counts.sum(1, keepdims=True)
    assert residual(found, total, values_of(found, "superresolved_total")).max() < 1e-3


def test_by_default_spots_are_weighed_against_their_noise(section, result):
    off = residual(result, section["spot_counts"].X.toarray(), values_of(result))
    assert 0.05 < np.median(off) < 2


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_without_an_image_spots_are_kriged_alone(section):
    found = run(section, None)
    entry = found.attrs["stgen"]["superresolved"]
    assert entry.get("image") is None
    assert entry["from_image"] == 0
    assert (found[TABLE].var["from_image"] == 0).all()
    assert all(name.startswith("space") for name in entry["kernels"])
    assert entry["bin_um"] == 10
    grid = Grid.of_map(found, "superresolved")
    centers = grid.locate(found, "spots")
    np.testing.assert_allclose(centers.min(0), PITCH, atol=1e-6)  # a margin as wide as the pitch
    assert (
        (centers.max(0) + PITCH <= [grid.height, grid.width])
        & (centers.max(0) + PITCH > [grid.height - 1, grid.width - 1])
    ).all()


def test_without_an_image_a_wave_is_recovered(section):
    sdata = shallow_copy(section)
    table = sdata["spot_counts"].copy()
    x = sdata["spots"].geometry.x.to_numpy()
    table.X = np.round(400 * np.column_stack([1 + 0.8 * np.sin(x / 80), np.ones((len(x), 11))])).astype(np.float32)
    sdata.tables["spot_counts"] = table
    found = run(sdata, None, "EPCAM")
    grid, values = Grid.of_map(found, "superresolved"), values_of(found)[0]
    _, width = values.shape
    x_um = np.array([[j + 0.5, 0, 1] for j in range(width)]) @ grid.to_system("um")[0]
    known = np.isfinite(values)
    expected = np.broadcast_to(400 * (1 + 0.8 * np.sin(x_um / 80)) / (np.pi * 2.5**2), values.shape)
    assert np.corrcoef(values[known], expected[known])[0, 1] > 0.97
    assert found[TABLE].var.loc["EPCAM", "trusted"]


def test_a_gene_without_counts_is_zero_everywhere_and_not_trusted(section, genes):
    sdata = shallow_copy(section)
    table = sdata["spot_counts"].copy()
    counts = table.X.toarray()
    counts[:, 3] = 0
    table.X = sparse.csr_array(counts)
    sdata.tables["spot_counts"] = table
    found = run(sdata, genes=genes[2:5], n_samples=2)
    for suffix in ("", "_std"):
        values = values_of(found, f"superresolved{suffix}")[1]
        assert (values[np.isfinite(values)] == 0).all()
    row = found[TABLE].var.loc[genes[3]]
    assert not row["trusted"]
    assert (row[["score", "from_image", "from_neighbors", "interval_90", "interval_90_norm", "mean_counts"]] == 0).all()
    assert (found[TABLE][:, genes[3]].X == 0).all()


def test_a_table_of_one_gene_has_a_total_and_no_composition(section):
    sdata = shallow_copy(section)
    sdata.tables["spot_counts"] = sdata["spot_counts"][:, ["ACTB"]].copy()
    found = run(sdata)
    entry = found.attrs["stgen"]["superresolved"]
    assert all(np.isfinite(entry[name]) for name in ("from_image", "from_neighbors", "correlation_length_um"))
    known = np.isfinite(values_of(found))
    np.testing.assert_allclose(values_of(found)[known], values_of(found, "superresolved_total")[known], rtol=1e-4)


def emptied(section, rows):
    sdata = shallow_copy(section)
    table = sdata["spot_counts"].copy()
    counts = table.X.toarray()
    counts[rows] = 0
    table.X = sparse.csr_array(counts)
    sdata.tables["spot_counts"] = table
    return sdata


def test_spots_without_counts_are_left_out_and_counted(section, caplog):
    rows = [4, 17]
    found = run(emptied(section, rows))
    n = section["spot_counts"].n_obs
    assert "2 without counts" in caplog.text
    entry = found.attrs["stgen"]["superresolved"]
    assert (entry["n_spots"], entry["n_spots_left_out"]) == (n - 2, 2)
    assert set(found[TABLE].obs["spot_id"]) == set(range(n)) - set(rows)
    kept = np.delete(np.arange(n), rows)
    xy = np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y])
    without = run(built(section["he"].values, xy[kept], section["spot_counts"][kept]))
    known = np.isfinite(values_of(without))
    assert np.isfinite(values_of(found))[known].all()
    np.testing.assert_allclose(values_of(found)[known], values_of(without)[known], rtol=1e-4, atol=1e-6)


def test_spots_off_the_image_are_left_out(section, result):
    sdata = shallow_copy(section)
    part = Image2DModel.parse(
        section["he"].values[:, 60:], dims=("c", "y", "x"), c_coords=["r", "g", "b"],
        transformations={"um": sd.transformations.Sequence([Scale([2.0, 2.0], axes=("x", "y")), Translation([0.0, 120.0], axes=("x", "y"))])},
    )  # fmt: skip
    sdata.images["he"] = part
    sdata.images["grid"] = result["superresolved"]
    above = int((sdata["spots"].geometry.y < 120).sum())
    assert above > 3
    for like in (None, "grid"):
        found = run(sdata, genes=["EPCAM"], like=like)
        assert found.attrs["stgen"]["superresolved"]["n_spots_left_out"] == above
        assert found[TABLE].n_obs == section["spot_counts"].n_obs - above


def test_counts_of_spots_in_a_layer(section, result):
    normalized = shallow_copy(section)
    table = section["spot_counts"].copy()
    table.layers["counts"], table.X = table.X.copy(), table.X.log1p()
    normalized.tables["spot_counts"] = table
    found = run(normalized, layer="counts", n_samples=3, keep_samples=True)
    for suffix in SUFFIXES:
        np.testing.assert_array_equal(
            values_of(found, f"superresolved{suffix}"), values_of(result, f"superresolved{suffix}")
        )
    assert found.attrs["stgen"]["superresolved"]["layer"] == "counts"


@pytest.mark.parametrize(("options", "n_bins"), [({}, 5), ({"factor": 4}, 4), ({"bin_um": 10}, 8)])
def test_a_map_of_low_resolution_is_what_was_measured(mapped, options, n_bins):
    found = run(mapped, low_res="counts_8x", consistency=True, **options)
    low = mapped["counts_8x"]
    assert found["superresolved"].shape == (3, low.shape[1] * n_bins, low.shape[2] * n_bins)
    assert found.attrs["stgen"]["superresolved"]["bin_um"] == pytest.approx(80 / n_bins)
    grid = Grid.of_map(found, "superresolved")
    measured = measurement_of(mapped, "counts_8x", grid, ["EPCAM", "COL1A1", "ACTB"])
    whole = np.isclose(measured.footprints.area, n_bins**2)
    pooled = measured.footprints.pool(values_of(found))
    assert whole.sum() >= 30
    np.testing.assert_allclose(pooled[whole], measured.counts[whole], rtol=1e-3, atol=1e-3)
    table = found[TABLE]
    assert "spatialdata_attrs" not in table.uns
    assert table.n_obs == found.attrs["stgen"]["superresolved"]["n_spots"]


def test_bins_are_those_of_another_map(section, result, mapped):
    sdata = shallow_copy(section)
    sdata.images["grid"] = result["superresolved"]
    sdata.attrs["stgen"] = {"grid": result.attrs["stgen"]["superresolved"]}
    found = run(sdata, like="grid")
    np.testing.assert_allclose(values_of(found), values_of(result), rtol=1e-5)
    assert found.attrs["stgen"]["superresolved"]["like"] == "grid"
    other = run(mapped, genes=["EPCAM"], low_res="spot_counts", like="counts")
    assert other["superresolved"].shape[1:] == mapped["counts"].shape[1:]
    theirs, ours = (
        get_transformation(other[key], "um").to_affine_matrix(("x", "y"), ("x", "y"))
        for key in ("counts", "superresolved")
    )
    np.testing.assert_allclose(ours, theirs)


def test_finer_bins_hold_the_same_counts(section, result):
    fine = values_of(run(section, bin_um=5))
    assert fine.shape[1:] == (2 * N_BINS, 2 * N_BINS)
    pooled = fine.reshape(-1, N_BINS, 2, N_BINS, 2).sum((2, 4))
    both = np.isfinite(pooled) & np.isfinite(values_of(result))
    a, b = pooled[both], values_of(result)[both]
    assert a.sum() == pytest.approx(b.sum(), rel=0.3)
    assert np.corrcoef(np.log1p(a), np.log1p(b))[0, 1] > 0.9


# ---- 10x Visium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visium_section():
    return datasets.simulated_section(seed=1, size_um=SIZE_UM, mpp=2.0, n_genes=12)


@pytest.fixture(scope="module")
def visium(visium_section, tmp_path_factory):
    folder = tmp_path_factory.mktemp("visium") / "outs"
    tenx.write_visium(folder, visium_section)
    return tenx.read_visium(folder)


@pytest.fixture(scope="module")
def full(visium):
    return run(visium, "section_full_image")


def test_visium_as_it_is_read_gives_what_the_section_in_micrometers_gives(full, visium_section):
    found, expected = full, run(visium_section, low_res="spot_counts")
    assert list(get_transformation(found["superresolved"], get_all=True)) == ["section"]
    assert found.attrs["stgen"]["superresolved"]["bin_um"] == 10
    np.testing.assert_allclose(values_of(found), values_of(expected), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[TABLE].var["score"], expected[TABLE].var["score"], atol=1e-5)


@pytest.mark.parametrize("name", ["hires", "lowres"])
def test_smaller_images_of_visium_give_much_the_same(visium, full, name):
    found = run(visium, f"section_{name}_image")
    assert list(get_transformation(found["superresolved"], get_all=True)) == [f"section_downscaled_{name}", "section"]
    both = np.isfinite(values_of(found)) & np.isfinite(values_of(full))
    assert both.mean() > 0.9
    r = np.corrcoef(np.log1p(values_of(found)[both]), np.log1p(values_of(full)[both]))[0, 1]
    assert r > {"hires": 0.8, "lowres": 0.7}[name]
    corner = Grid.of_map(found, "superresolved").to_system("section")
    np.testing.assert_allclose(corner, np.diag([5, 5, 1]), atol=1e-6)  # bins of 10 µm, in pixels of 2 µm


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_predicted_spots_of_visium_go_through_squidpys_morans_i(visium, full):
    found = shallow_copy(full)
    sq.gr.spatial_neighbors(
        found, elements_to_coordinate_systems={"section": "section"}, table_key=TABLE, coord_type="generic", n_neighs=6
    )
    table = found[TABLE]
    sq.gr.spatial_autocorr(table, mode="moran", transformation=False, n_perms=None)
    weights, x = table.obsp["spatial_connectivities"].toarray(), table.X - table.X.mean(0)
    expected = len(x) / weights.sum() * (x * (weights @ x)).sum(0) / (x**2).sum(0)
    np.testing.assert_allclose(table.uns["moranI"]["I"].reindex(table.var_names), expected, rtol=1e-3, atol=1e-4)
    smoother = table.uns["moranI"]["I"].mean()
    measured = visium["table"].X.toarray()
    measured = measured - measured.mean(0)
    assert smoother > (len(x) / weights.sum() * (measured * (weights @ measured)).sum(0) / (measured**2).sum(0)).mean()


# ---- out of fold -----------------------------------------------------------------------------------------------------


def test_the_table_annotates_the_spots_and_says_what_is_known_of_each_gene(section, result, genes):
    table, var = result[TABLE], result[TABLE].var
    assert table.shape == (section["spot_counts"].n_obs, len(genes))
    assert table.X.dtype == np.float32
    assert (table.X >= 0).all()
    assert list(table.obs["spot_id"]) == list(section["spot_counts"].obs["spot_id"])
    assert sd.match_table_to_element(result, "spots", TABLE).n_obs == table.n_obs
    assert list(var.columns) == [
        "score", "trusted", "from_image", "from_neighbors", "interval_90", "interval_90_norm", "mean_counts",
    ]  # fmt: skip
    assert var["score"].between(-1, 1).all()
    assert var["trusted"].dtype == bool
    assert (var["from_image"] + var["from_neighbors"]).between(-0.5, 1).all()
    assert (var[["interval_90", "interval_90_norm"]] > 0).all(axis=None)
    np.testing.assert_allclose(var["mean_counts"], section["spot_counts"].X.toarray().mean(0), rtol=1e-5)
    np.testing.assert_allclose(table.obsm["bin_yx"], Grid.of_map(result, "superresolved").locate(result, "spots"))


def test_trusted_is_a_score_surely_above_a_tenth(result):
    var, n = result[TABLE].var, result[TABLE].n_obs
    lower = np.tanh(np.arctanh(var["score"]) - 1.645 / np.sqrt(n - 3))
    np.testing.assert_array_equal(var["trusted"], lower > 0.1)
    assert var["trusted"].any()
    assert not var["trusted"].all()


def test_intervals_hold_nine_of_ten_spots(section, result):
    measured = section["spot_counts"].X.toarray()
    off = np.abs(np.log1p(measured) - np.log1p(result[TABLE].X))
    inside = (off <= result[TABLE].var["interval_90"].to_numpy() + 1e-5).mean(0)
    assert (inside >= 0.9).all()
    assert (inside <= 0.9 + 2 / len(measured)).all()  # and no wider than need be


def small_model(n=45, n_genes=30, seed=0):
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 7, (n, 2))
    features = np.column_stack([np.sin(xy[:, 0]), np.cos(xy[:, 1])]) + 0.2 * rng.normal(size=(n, 2))
    rate = np.exp(rng.normal(size=(1, n_genes)) + features @ rng.normal(size=(2, n_genes)))
    counts = rng.poisson(rate * rng.uniform(2, 20, (n, 1))).astype(float)
    counts[:, 0] += 1
    area = np.full(n, 19.6)
    spots = Spots(Places(xy, features), counts.sum(1), area)
    return Regression(spots, composition(counts, spots.total)), counts


def test_a_spot_does_not_predict_itself():
    """Neither by kriging nor through the loadings of its genes on components: they are those of a fit without its count."""
    model, counts = small_model()
    found = model.genes(counts)
    predicted, scores = found.out_of_fold()
    shared, precision = (
        model.shared.out_of_fold,
        1 / np.clip(np.median(model.spots.total) / model.spots.total, 0.05, 50),
    )
    y = np.log1p(counts / model.spots.total[:, None] * np.median(model.spots.total))
    mean = np.average(y, axis=0, weights=precision)
    composition = np.empty_like(y)
    for i in range(len(y)):
        others = y.copy()
        others[i] = mean
        loadings = [
            (precision * s) @ (others - mean) / (precision * s**2).sum() for s in model.scores.T
        ]  # components are orthogonal
        composition[i] = (found.direct.out_of_fold[i] + mean + shared[i, :-1] @ np.array(loadings)) / 2
    highest = np.where(y.max(0) > 0, y.max(0) + np.log(2), 0)
    density = np.exp(np.minimum(shared[:, -1], model.most))[:, None]
    expected = np.expm1(np.clip(composition, 0, highest)) * density * 19.6 / np.median(model.spots.total)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(composition.T, y.T, strict=True)]
    np.testing.assert_allclose(scores["score"], r, rtol=1e-6, atol=1e-9)


def test_components_are_orthogonal_and_do_not_depend_on_the_order_of_genes():
    rng = np.random.default_rng(0)
    y, precision = rng.normal(size=(20, 40)), rng.uniform(0.1, 3, 20)
    scores = components(y, precision)
    gram = scores.T @ (precision[:, None] * scores)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9 * gram.max())
    np.testing.assert_allclose(precision @ scores, 0, atol=1e-9 * gram.max())
    assert scores.shape == (20, 18)
    again = components(y[:, rng.permutation(40)], precision)
    np.testing.assert_allclose(np.abs(again), np.abs(scores), rtol=1e-6, atol=1e-9)


def test_genes_that_follow_nothing_have_no_score():
    """Shares that belong to other spots: whatever correlates with what was measured has seen it."""
    model, counts = small_model(n=110, n_genes=60)
    rng = np.random.default_rng(1)
    shares = counts / model.spots.total[:, None]
    nothing = np.column_stack([rng.permutation(shares[:, i % 60]) for i in range(300)]) * model.spots.total[:, None]
    _, var = model.genes(nothing).out_of_fold()
    assert abs(var["score"].mean()) < 0.05
    assert var["trusted"].mean() < 0.05
    assert model.genes(counts).out_of_fold()[1]["score"].mean() > 0.5


def test_a_displaced_image_counts_for_nothing_and_does_no_harm(dense):
    options = {"low_res": "spot_counts", "bin_um": 20}
    right, blind = run(dense, **options), run(dense, None, **options)
    sdata = shallow_copy(dense)
    half = np.roll(dense["he"].values, (140, 140), (1, 2))  # by 420 µm
    sdata.images["he"] = Image2DModel.parse(
        half,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations=get_transformation(dense["he"], get_all=True),
    )
    wrong = run(sdata, **options)
    score = {name: s[TABLE].var["score"].mean() for name, s in (("right", right), ("blind", blind), ("wrong", wrong))}
    from_image = {
        name: s.attrs["stgen"]["superresolved"]["from_image"] for name, s in (("right", right), ("wrong", wrong))
    }
    assert from_image["right"] > 0.25
    assert abs(from_image["wrong"]) < 0.06
    assert score["right"] > score["blind"] + 0.1
    assert score["wrong"] > score["blind"] - 0.05


# ---- bad input -------------------------------------------------------------------------------------------------------


def rows(section, kept):
    sdata = shallow_copy(section)
    sdata.tables["spot_counts"] = sdata["spot_counts"][kept].copy()
    return sdata


def twice_in_one_place(section):
    xy = np.column_stack([section["spots"].geometry.x, section["spots"].geometry.y])
    xy[7] = xy[3]
    return built(section["he"].values, xy, section["spot_counts"])


def placed(section, transformations):
    sdata = shallow_copy(section)
    sdata.images["he"] = Image2DModel.parse(
        section["he"].values, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=transformations
    )
    return sdata


def far_image(section):
    far = [Scale([2.0, 2.0], axes=("x", "y")), Translation([5000.0, 0.0], axes=("x", "y"))]
    return placed(section, {"um": sd.transformations.Sequence(far)})


def far_image_with_map(section, result):
    sdata = far_image(section)
    sdata.images["grid"] = result["superresolved"]
    return sdata


def table_of_nothing(section):
    sdata = shallow_copy(section)
    table = sdata["spot_counts"].copy()
    del table.uns["spatialdata_attrs"]
    sdata.tables["spot_counts"] = table
    return sdata


def with_counts(section, change):
    sdata = shallow_copy(section)
    table = sdata["spot_counts"].copy()
    counts = table.X.toarray()
    change(counts)
    table.X = counts
    sdata.tables["spot_counts"] = table
    return sdata


def negative(counts):
    counts[2, 3] = -1


def unknown(counts):
    counts[2, 3] = np.nan


def twice_one_name(section):
    sdata = shallow_copy(section)
    table = sdata["spot_counts"].copy()
    table.var_names = ["EPCAM", "EPCAM", *table.var_names[2:]]
    sdata.tables["spot_counts"] = table
    return sdata


def two_tables(section):
    sdata = shallow_copy(section)
    sdata.tables["second"] = sdata["spot_counts"].copy()
    return sdata


def with_result(section, result):
    return shallow_copy(result)


def with_table_of_that_name(section):
    sdata = shallow_copy(section)
    sdata.tables[TABLE] = sdata["spot_counts"].copy()
    return sdata


def with_shapes_of_that_name(section):
    sdata = shallow_copy(section)
    sdata.shapes["Superresolved_Out_Of_Fold"] = sdata["spots"]
    return sdata


def with_coarse_map(section, result):
    sdata = shallow_copy(section)
    coarse = result["superresolved"].data[:, ::8, ::8]
    sdata.images["coarse"] = Image2DModel.parse(
        coarse, dims=("c", "y", "x"), transformations={"um": Scale([80.0, 80.0], axes=("x", "y"))}
    )
    return sdata


BAD = {
    "no SpatialData": (lambda s: s["spot_counts"], {}, TypeError, "SpatialData"),
    "29 spots": (lambda s: rows(s, slice(29)), {}, ValueError, "fewer than 30 spots.*29.*superresolve.*model="),
    "5 spots, no image": (lambda s: rows(s, slice(5)), {"image_key": None}, ValueError, "fewer than 30 spots"),
    "few spots with counts": (lambda s: emptied(s, slice(25)), {}, ValueError, "fewer than 30 spots.*25 without counts"),
    "two spots in one place": (twice_in_one_place, {}, ValueError, "1 of .* spots .* where another one does"),
    "image elsewhere": (far_image, {}, ValueError, "on the grid.*[cC]heck the coordinate systems"),
    "image off the map": (far_image_with_map, {"like": "grid"}, ValueError, "do not overlap.*set_transformation"),
    "no shared system": (
        lambda s: placed(s, {"elsewhere": Identity()}), {}, ValueError, "share no coordinate system.*set_transformation",
    ),
    "unknown layer": (None, {"layer": "nonsense"}, KeyError, "There is no layer 'nonsense'"),
    "unknown gene": (None, {"genes": ["EPCAM", "nonsense"]}, KeyError, "nonsense.*EPCAM"),
    "gene twice": (None, {"genes": ["EPCAM", "EPCAM"]}, ValueError, "each once"),
    "no genes": (None, {"genes": []}, ValueError, "at least one"),
    "name twice": (twice_one_name, {}, ValueError, "more than once.*var_names_make_unique"),
    "bin_um 0": (None, {"bin_um": 0}, ValueError, "bin_um"),
    "bin_um negative": (None, {"bin_um": -10.0}, ValueError, "bin_um"),
    "bin_um nan": (None, {"bin_um": float("nan")}, ValueError, "bin_um"),
    "bin_um infinite, no image": (None, {"bin_um": np.inf, "image_key": None}, ValueError, "bin_um"),
    "bin_um larger than spots": (None, {"bin_um": 60.0}, ValueError, "diameter of the spots.*50"),
    "factor of spots": (None, {"factor": 5}, ValueError, "`factor` is for maps.*bin_um="),
    "labels": (None, {"labels_key": "nuclei"}, ValueError, "`labels_key` is for models"),
    "prompt": (None, {"prompt": "a section"}, ValueError, "`prompt` is for models"),
    "no image of that name": (None, {"image_key": "nonsense"}, KeyError, "nonsense"),
    "no table of that name": (None, {"low_res": "nonsense"}, KeyError, "nonsense"),
    "no map of that name": (None, {"like": "nonsense"}, KeyError, "nonsense"),
    "several tables": (two_tables, {}, KeyError, "several.*low_res="),
    "table of nothing": (table_of_nothing, {}, ValueError, "annotates no element.*TableModel"),
    "table of nothing, no image": (table_of_nothing, {"image_key": None}, ValueError, "annotates no element"),
    "negative counts": (lambda s: with_counts(s, negative), {}, ValueError, "negative"),
    "unknown counts": (lambda s: with_counts(s, unknown), {}, ValueError, "NaN"),
    "tile 0": (None, {"tile": 0}, ValueError, "`tile`"),
    "tile of a fraction": (None, {"tile": 2.5}, ValueError, "`tile`"),
    "no samples": (None, {"n_samples": 0}, ValueError, "`n_samples`"),
    "seed": (None, {"seed": -1}, ValueError, "`seed`"),
    "key exists": (with_result, {}, ValueError, "exists already.*overwrite=True"),
    "table exists": (with_table_of_that_name, {"low_res": "spot_counts"}, ValueError, "out_of_fold.*exists already"),
    "table exists, of another": (
        with_table_of_that_name, {"low_res": "spot_counts", "overwrite": True}, ValueError, "out_of_fold.*another key_added",
    ),
    "table is an input": (
        with_result, {"low_res": TABLE, "overwrite": True}, ValueError, "inputs.*another key_added",
    ),
    "name of the table is taken": (with_shapes_of_that_name, {}, ValueError, "taken by another element"),
    "bins larger than spots": (with_coarse_map, {"like": "coarse"}, ValueError, "larger than the spots"),
    "like and bin_um": (with_coarse_map, {"like": "coarse", "bin_um": 10}, ValueError, "leave one of both out"),
    "like and factor": (with_coarse_map, {"like": "coarse", "factor": 5}, ValueError, "leave `factor` out"),
    "no folder": (None, {"store": "/nonsense/maps.zarr"}, FileNotFoundError, "no folder"),
}  # fmt: skip


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if anything is computed."""

    def refuse(*_, **__):
        raise AssertionError("work was begun")

    for module, name in ((_inputs, "bin_features"), (_model, "Regression"), (_superresolve, "MapResult")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(no_work, section, result, case):
    make, options, error, message = BAD[case]
    if make in (with_result, with_coarse_map, far_image_with_map):
        sdata = make(section, result)
    else:
        sdata = make(section) if make else shallow_copy(section)
    before = state(sdata) if isinstance(sdata, SpatialData) else None
    with pytest.raises(error, match=f"(?s){message}"):
        run(sdata, **{"copy": False} | options)
    if before is not None:
        check_unchanged(sdata, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "`factor`"), ({"factor": 2.5}, "`factor`"), ({"bin_um": 0}, "`bin_um`"),
        ({"bin_um": 30}, "whole number of times"), ({"bin_um": 160}, "whole number of times"),
        ({"bin_um": 10, "factor": 4}, "pass one of both"),
    ],
)  # fmt: skip
def test_impossible_bins_of_a_map_are_refused(no_work, mapped, options, message):
    before = state(mapped)
    with pytest.raises(ValueError, match=message):
        run(mapped, low_res="counts_8x", copy=False, **options)
    check_unchanged(mapped, before)


def test_maps_with_gaps_of_their_own_are_refused(no_work, mapped):
    sdata = shallow_copy(mapped)
    values = values_of(mapped, "counts_8x").copy()
    values[1, 3, 3] = np.nan
    sdata.images["counts_8x"] = Image2DModel.parse(
        values, dims=("c", "y", "x"), c_coords=["EPCAM", "COL1A1", "ACTB"], transformations=get_transformation(mapped["counts_8x"], get_all=True)
    )  # fmt: skip
    with pytest.raises(ValueError, match="some genes are NaN"):
        run(sdata, low_res="counts_8x", genes=["EPCAM"])


def test_more_than_fits_in_memory_is_refused_unless_it_goes_to_a_store(monkeypatch, section, tmp_path):
    n_bytes = 4 * 2 * N_BINS**2
    monkeypatch.setattr(_superresolve, "MOST_BYTES", n_bytes)
    run(section, genes=["EPCAM", "ACTB"])
    before = state(section)
    with pytest.raises(ValueError, match="(?s)12 genes in 64 x 64 bins.*store=.*fewer genes.*larger bin_um"):
        run(section, copy=False)
    for more in ({"n_samples": 2}, {"keep_samples": True}):
        with pytest.raises(ValueError, match="store="):
            run(section, genes=["EPCAM", "ACTB"], **more)
    check_unchanged(section, before)
    some = run(section, genes=["EPCAM", "ACTB", "COL1A1"], store=tmp_path / "maps.zarr")
    assert some["superresolved"].shape[0] == 3


def test_more_spots_than_fit_in_memory_are_refused(monkeypatch, no_work, section):
    monkeypatch.setattr(_inputs, "MOST", 31)
    before = state(section)
    with pytest.raises(ValueError, match="(?s)more than the 31.*pp.rasterize.*bounding_box_query"):
        run(section, copy=False)
    check_unchanged(section, before)


def test_a_store_that_exists_is_refused(no_work, section, tmp_path):
    (tmp_path / "maps.zarr").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        run(section, store=tmp_path / "maps.zarr")


def test_spots_on_top_of_each_other_have_no_pitch(section):
    sdata = built(section["he"].values, np.full((8, 2), 100.0), section["spot_counts"][:8])
    with pytest.raises(ValueError, match="pitch of the 8 spots"):
        Grid.of_spots(sdata, "spot_counts", bin_um=10)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def doubtful(result):
    """A result of which one gene is not trusted."""
    sdata = shallow_copy(result)
    sdata[TABLE].var["trusted"] = sdata[TABLE].var_names != "ACTB"
    yield sdata
    plt.close("all")


def test_a_panel_says_of_which_gene_the_prediction_is_not_trusted(doubtful):
    axes = pl.maps(doubtful, ["ACTB", "EPCAM"], keys="superresolved", low_res="spot_counts")
    titles = [[ax.get_title() for ax in row] for row in axes]
    assert titles[0][1] == "superresolved\nshare not predictable,\ncounts follow depth"
    assert titles[1] == ["", "", ""]
    assert titles[0][2] == "spread"
    assert "predictable" not in titles[0][0]


def test_a_panel_below_the_first_row_says_so_too(doubtful):
    axes = pl.maps(doubtful, ["EPCAM", "ACTB"], keys="superresolved", panels=["predicted", "spread"])
    assert [[ax.get_title() for ax in row] for row in axes] == [
        ["superresolved", "spread"],
        ["share not predictable,\ncounts follow depth", ""],
    ]


def test_other_results_beside_it_are_not_marked(doubtful):
    doubtful.images["other"] = doubtful["superresolved"]
    doubtful.attrs["stgen"]["other"] = doubtful.attrs["stgen"]["superresolved"]
    axes = pl.maps(doubtful, "ACTB", keys=["other", "superresolved"], panels="predicted")
    assert [ax.get_title() for ax in axes[0]] == ["other", "superresolved\nshare not predictable,\ncounts follow depth"]


def test_trusted_genes_have_plain_titles(doubtful):
    doubtful[TABLE].var["trusted"] = True
    axes = pl.maps(doubtful, "ACTB", keys="superresolved", panels="predicted")
    assert axes[0, 0].get_title() == "superresolved"


def test_the_table_out_of_fold_is_never_taken_for_that_of_the_spots(section, result):
    assert get_section(result).table is result["spot_counts"]
    assert pp.select_genes(result, 3) == pp.select_genes(section, 3)
    assert get_section(result, table_key="superresolved_out_of_fold").table is result["superresolved_out_of_fold"]
