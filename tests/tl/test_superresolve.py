from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spatialdata import SpatialData, read_zarr
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, get_transformation, set_transformation
from spatialdata.transformations import Sequence as Chain
from torch import nn

from stgen import models, pp, tl
from stgen._spatial.grid import Grid
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import provenance, record, shallow_copy, write_image
from stgen.data import MapInputs
from stgen.diffusion import Diffusion
from stgen.models import MapDiffusionModel, _map_sampler
from stgen.models._map_sampler import NetworkSampler
from stgen.sampling import SamplingOptions
from stgen.tl.superresolution.superresolve import superresolve

GENES = ["EPCAM", "COL1A1", "ACTB"]
STEPS = 3
N_BINS = 60  # the simulated section is 600 µm wide
QUICK = {"steps": STEPS, "n_samples": 2, "device": "cpu", "progress": False}


class Local(MapDiffusionModel):
    """A diffusion model that sees ``REACH`` bins far at each step, and whose pooling must stay aligned."""

    REACH = 5

    def __init__(self, genes=GENES, *, factor=4, bin_um=10.0, image_channels=3, px_per_bin=2, needs_low_res=True):
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            transform="log1p_raw", needs_low_res=needs_low_res,
        )  # fmt: skip
        self.needs_low_res = needs_low_res
        self.align, self.halo = 2, 2 * self.REACH * STEPS
        self.diffusion = Diffusion(prediction="x_0")
        n, n_in = len(genes), image_channels + len(genes) + (len(genes) + 1 if needs_low_res else 0)
        self.fine, self.coarse = nn.Conv2d(n_in, n, 3, padding=1), nn.Conv2d(n_in, n, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        for weight in (self.fine.weight, self.coarse.weight):
            nn.init.normal_(weight, std=0.1, generator=generator)
        self.record = {"sections": ["none"]}

    def condition(self, batch):
        cond = {"h": F.avg_pool2d(batch["h"], self.config["px_per_bin"])}
        return cond | ({"y": batch["y"], "valid": batch["valid"]} if self.needs_low_res else {})

    def denoise(self, x_t, t, cond):
        x = torch.cat([x_t, *cond.values()], 1)
        coarse = F.interpolate(self.coarse(F.avg_pool2d(x, 2)), scale_factor=2, mode="nearest")
        return F.softplus(self.fine(x) + coarse)

    def to_network(self, x, cond):
        return x

    def from_network(self, x_0, cond):
        return x_0


@pytest.fixture(scope="module")
def model():
    return Local()


def c3diff(genes=GENES, **options):
    """A gene-wise model that may do without low-resolution data, with weights at random."""
    small = {"px_per_bin": 2, "width": 8, "code": 8, "widths": [8], "control_widths": [8], "patch": 1}
    model = models.C3Diff(genes, **{"factor": 4, **small, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    nn.init.ones_(model.own.bias)  # of the mean, which is then positive
    model.record = {"sections": ["none"]}
    return model


def add_low_res(sdata, factor=4, n=N_BINS, key="low", unknown=(), seed=0, values=None, **kwargs):
    """A low-resolution map of Poisson counts over the image; ``unknown`` lists bins (row, column) without data."""
    side = n // factor
    if values is None:
        rate = np.random.default_rng(seed).gamma(0.7, 8.0, (len(GENES), side, side))
        values = np.random.default_rng(seed).poisson(rate).astype(float)
    for row, column in unknown:
        values[:, row, column] = np.nan
    transformations = kwargs.get("transformations", {"um": Scale([10.0 * factor] * 2, axes=("x", "y"))})
    write_image(sdata, key, values, channels=GENES, transformations=transformations)
    record(sdata, key, provenance("pp.degrade", bin_um=10.0 * factor, unit="counts per bin"))
    return values


@pytest.fixture
def section(simulated):
    """The simulated section with a low-resolution map, of which one corner is unknown."""
    section = shallow_copy(simulated)
    add_low_res(section, unknown=[(0, 0), (0, 1), (7, 7)])
    return section


def values_of(sdata, key="superresolved"):
    return np.asarray(sdata.images[key].data)


def pooled_error(sdata, low_res, key="superresolved"):
    """Largest relative difference between what was measured and the map summed over it."""
    grid = Grid.of_map(sdata, key)
    measurement = measurement_of(sdata, low_res, grid, GENES)
    radius = measurement.footprints.diameter / 2
    inside = (measurement.footprints.centers >= radius).all(1)
    inside &= (measurement.footprints.centers <= np.array([grid.height, grid.width]) - radius).all(1)
    pooled = measurement.footprints.pool(values_of(sdata, key))[inside]
    counts = measurement.counts[inside]
    assert inside.sum() > 10
    off = np.abs(pooled - counts)
    return float(np.where(off > 0, off / np.where(counts > 0, counts, 1e-30), 0).max())  # of zero, nothing is near


# ---- the result -----------------------------------------------------------------------------------------------------


def test_mean_is_that_on_the_scale_of_the_model(section, model):
    superresolve(section, "he", model=model, low_res="low", keep_samples=True, consistency=False, **QUICK)
    by_sample = values_of(section, "superresolved_samples").reshape(3, 2, N_BINS, N_BINS)
    np.testing.assert_allclose(values_of(section), np.expm1(np.log1p(by_sample).mean(1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("low_res", ["low", None])
def test_expected_map_is_the_regression_where_there_is_one(section, low_res):
    model, like = c3diff(), None if low_res else "counts"
    pp.rasterize(section, points_key="transcripts", genes=GENES, bin_um=10, key_added="counts", overwrite=True)
    seen = []
    condition = model.condition
    model.condition = lambda batch: seen.append(condition(batch)) or seen[-1]
    superresolve(section, "he", model=model, low_res=low_res, like=like, keep_samples=True, consistency=False, **QUICK)
    cond = seen[-1]
    expected = torch.expm1(cond["mean"] * cond["scale"]).clamp(min=0)[0].detach().numpy()[:, :N_BINS, :N_BINS]
    found = values_of(section)
    known = np.isfinite(found)
    assert known.mean() > 0.5
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-4, atol=1e-5)
    by_sample = values_of(section, "superresolved_samples").reshape(3, 2, *found.shape[1:])
    assert np.nanmax(np.abs(np.expm1(np.log1p(by_sample).mean(1)) - found)) > 0.01


def test_result(section, model, caplog, untouched_rng):
    before = {key: element for _, key, element in section.gen_elements()}
    with caplog.at_level(logging.INFO, "stgen"):
        assert superresolve(section, "he", model=model, low_res="low", keep_samples=True, **QUICK) is None
    assert 'sdata.images["superresolved"]' in caplog.text
    assert "sdata.write" in caplog.text
    mean, std, samples = (section.images[f"superresolved{suffix}"] for suffix in ("", "_std", "_samples"))
    for image in (mean, std):
        assert image.dims == ("c", "y", "x")
        assert image.shape == (3, N_BINS, N_BINS)
        assert image.dtype == np.float32
        assert list(image.coords["c"].values) == GENES
    assert mean.data.chunksize == (1, N_BINS, N_BINS)
    assert list(samples.coords["c"].values) == [f"{gene}:{k}" for gene in GENES for k in range(2)]
    by_sample = values_of(section, "superresolved_samples").reshape(3, 2, N_BINS, N_BINS)
    np.testing.assert_allclose(values_of(section, "superresolved_std"), by_sample.std(1), rtol=1e-4, atol=1e-6)
    assert np.nanmin(by_sample) >= 0
    assert np.nanmean(by_sample.std(1)) > 0.01
    assert all(section[key] is element for key, element in before.items())
    entry = section.attrs["stgen"]["superresolved"]
    assert entry["function"] == "tl.superresolve"
    assert entry["weights_sha256"] == model.weights_sha256()
    assert entry["unit"] == "counts per bin"
    assert (entry["bin_um"], entry["low_res"], entry["image"], entry["seed"]) == (10.0, "low", "he", 0)
    assert {section.attrs["stgen"][f"superresolved{s}"]["statistic"] for s in ("", "_std", "_samples")} == {
        "expected", "std", "samples",
    }  # fmt: skip


def test_nothing_is_known_where_nothing_was_measured(section, model):
    superresolve(section, model=model, low_res="low", **QUICK)
    expected = np.zeros((N_BINS, N_BINS), bool)
    for row, column in [(0, 0), (0, 1), (7, 7)]:
        expected[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = True
    for key in ("superresolved", "superresolved_std"):
        assert (np.isnan(values_of(section, key)) == expected).all()


def test_nothing_is_known_far_from_spots(sdata):
    superresolve(sdata, model=Local(factor=10), low_res="spot_counts", **QUICK)
    known = np.isfinite(values_of(sdata)[0])
    centers = Grid.of_map(sdata, "superresolved").locate(sdata, "spots")
    y, x = np.mgrid[:N_BINS, :N_BINS] + 0.5
    distance = np.sqrt(((np.stack([y, x], -1)[:, :, None] - centers) ** 2).sum(-1)).min(-1)
    assert known[distance < 5].all()
    assert not known[distance > 12].any()


def test_counts_of_spots_in_a_layer(normalized):
    """What is made of them is what is made of counts in X; scores know where they are."""
    options = {"model": Local(factor=10), "low_res": "spot_counts", **QUICK}
    superresolve(normalized, layer="counts", **options)
    scores = tl.evaluate(normalized, key="superresolved", truth_key="superresolved", low_res="spot_counts")
    assert scores.summary["residual_max"] < 1e-3
    assert normalized.attrs["stgen"]["superresolved"]["layer"] == "counts"
    normalized["spot_counts"].X = normalized["spot_counts"].layers["counts"]
    superresolve(normalized, key_added="of_x", **options)
    np.testing.assert_array_equal(values_of(normalized), values_of(normalized, "of_x"))
    assert "layer" not in normalized.attrs["stgen"]["of_x"]


def test_a_point_lies_in_its_bin(sdata, model):
    """In the coordinate system of the section: whoever asks for a place in µm finds the value computed for it."""
    set_transformation(
        sdata["he"], Chain([Scale([1, 1], axes=("x", "y")), Translation([50, 20], axes=("x", "y"))]), "um"
    )
    moved = Chain([Scale([40, 40], axes=("x", "y")), Translation([50, 20], axes=("x", "y"))])
    low = add_low_res(sdata, transformations={"um": moved, "slide": Identity()})
    superresolve(sdata, model=model, low_res="low", **QUICK)
    image = sdata.images["superresolved"]
    transformations = get_transformation(image, get_all=True)
    assert set(transformations) == {"um", "slide"}
    to_um = transformations["um"].to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))
    np.testing.assert_allclose(to_um, [[10, 0, 50], [0, 10, 20], [0, 0, 1]], atol=1e-9)
    x, y = np.linalg.inv(to_um)[:2] @ [50 + 205.0, 20 + 81.0, 1]
    row, column = int(y), int(x)
    assert (row, column) == (8, 20)
    block = values_of(sdata)[:, row // 4 * 4 :, column // 4 * 4 :][:, :4, :4]
    np.testing.assert_allclose(block.sum((1, 2)), low[:, row // 4, column // 4], rtol=1e-3)


def test_only_the_requested_genes_are_written_and_they_do_not_change(section, model):
    superresolve(section, model=model, low_res="low", **QUICK)
    superresolve(
        section, None, ["ACTB", "EPCAM"], model=model, low_res="low", key_added="some", keep_samples=True, **QUICK
    )
    assert list(section["some"].coords["c"].values) == ["ACTB", "EPCAM"]
    assert list(section["some_samples"].coords["c"].values) == ["ACTB:0", "ACTB:1", "EPCAM:0", "EPCAM:1"]
    np.testing.assert_array_equal(values_of(section, "some"), values_of(section)[[2, 0]])


def test_deterministic_model_has_no_spread(section):
    interpolate = models.Interpolate(GENES, factor=4)
    superresolve(section, "he", model=interpolate, low_res="low", **QUICK)
    assert "superresolved_std" not in section.images
    assert section.attrs["stgen"]["superresolved"]["n_samples"] == 1
    assert pooled_error(section, "low") < 1e-3


def test_without_an_image_and_without_consistency_interpolation_is_interpolation(section):
    del section.images["he"]
    superresolve(
        section, model=models.Interpolate(GENES, factor=4, kernel="nearest"), low_res="low", consistency=False, **QUICK
    )
    low = np.asarray(section["low"].data)
    np.testing.assert_allclose(values_of(section), np.kron(low, np.ones((4, 4))) / 16, rtol=1e-5, atol=1e-7)


def test_from_histology_alone(sdata, monkeypatch):
    """Without measurement, the result is where the image shows tissue."""
    image = np.full((3, 600, 600), 245, np.uint8)
    image[:, 200:400, 100:500] = np.array([180, 90, 160], np.uint8)[:, None, None]
    sdata.images["he"] = Image2DModel.parse(image, dims=("c", "y", "x"), transformations={"um": Identity()})
    superresolve(sdata, model=Local(needs_low_res=False), **QUICK)
    known = np.isfinite(values_of(sdata)[1])
    assert known[20:40, 10:50].all()
    assert not known[:14].any()
    assert not known[:, 56:].any()
    assert sdata.attrs["stgen"]["superresolved"]["consistency"] is False

    def all_tissue(image):
        return np.ones((50, 50), bool), 12.0

    monkeypatch.setattr("stgen._spatial.tissue.tissue_mask", all_tissue)
    superresolve(sdata, model=Local(needs_low_res=False), key_added="everywhere", **QUICK)
    assert np.isfinite(values_of(sdata, "everywhere")).all()


def test_same_seed_same_result(section, model):
    for key, seed in (("a", 1), ("b", 1), ("c", 2)):
        superresolve(section, model=model, low_res="low", key_added=key, seed=seed, **QUICK)
    np.testing.assert_array_equal(values_of(section, "a"), values_of(section, "b"))
    assert np.nanmean(np.abs(values_of(section, "a") - values_of(section, "c"))) > 1e-3


def test_a_saved_model_is_loaded(section, tmp_path):
    path = models.Interpolate(GENES, factor=4).save(tmp_path / "model")
    superresolve(section, model=path, low_res="low", **QUICK)
    superresolve(section, model=str(path), low_res="low", key_added="again", **QUICK)
    np.testing.assert_array_equal(values_of(section), values_of(section, "again"))


def test_copy_leaves_the_object_alone(section, model):
    before = set(section.images), dict(section.attrs["stgen"])
    result = superresolve(section, model=model, low_res="low", copy=True, **QUICK)
    assert "superresolved" in result.images
    assert "superresolved" in result.attrs["stgen"]
    assert (set(section.images), section.attrs["stgen"]) == before


def test_overwriting_removes_what_the_new_result_does_not_have(section, model):
    superresolve(section, model=model, low_res="low", keep_samples=True, **QUICK)
    superresolve(section, model=model, low_res="low", overwrite=True, **QUICK | {"n_samples": 1})
    assert not {"superresolved_std", "superresolved_samples"} & {*section.images, *section.attrs["stgen"]}


# ---- gene by gene ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_res", ["low", None])
def test_one_gene_of_a_gene_wise_model_is_that_of_all(section, low_res):
    model, options = c3diff(), {**QUICK, "low_res": low_res, "consistency": low_res is not None}
    superresolve(section, "he", model=model, keep_samples=True, **options)
    for genes in (["ACTB"], ["COL1A1", "EPCAM"]):
        columns = [GENES.index(gene) for gene in genes]
        superresolve(section, "he", genes, model=model, keep_samples=True, overwrite=True, key_added="some", **options)
        for suffix in ("", "_std", "_samples"):
            whole = values_of(section, f"superresolved{suffix}").reshape(3, -1, N_BINS, N_BINS)
            some = values_of(section, f"some{suffix}").reshape(len(genes), -1, N_BINS, N_BINS)
            np.testing.assert_allclose(some, whole[columns], rtol=1e-4, atol=1e-4)
    assert np.nanstd(values_of(section)) > 0.1


def test_only_the_requested_genes_are_sampled(section, monkeypatch):
    model, seen = c3diff(), []
    denoise = type(model).denoise
    monkeypatch.setattr(type(model), "denoise", lambda m, x, t, cond: seen.append(x.shape[1]) or denoise(m, x, t, cond))
    superresolve(section, "he", ["ACTB"], model=model, low_res="low", **QUICK)
    assert set(seen) == {1}


def test_genes_are_sampled_in_parts_that_fit_into_memory(section, monkeypatch):
    model, options = c3diff(), {**QUICK, "low_res": "low", "tile": 60, "keep_samples": True}
    superresolve(section, "he", model=model, **options)
    monkeypatch.setattr(_map_sampler, "MOST_VALUES", 2 * 2 * 60 * 60)  # two genes of two samples
    seen, sample = [], type(model).sample
    monkeypatch.setattr(
        type(model),
        "sample",
        lambda m, batch, *a, **k: seen.append(batch["gene"].tolist()) or sample(m, batch, *a, **k),
    )
    superresolve(section, "he", model=model, key_added="parts", **options)
    assert seen == [[[0, 1]], [[2]]]
    for suffix in ("", "_std", "_samples"):
        one, two = (values_of(section, f"{key}{suffix}") for key in ("superresolved", "parts"))
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
    assert pooled_error(section, "low", "parts") < 1e-3


def plan_of(model, tile=None, *, n_samples=4, measurement=None, consistency=False):
    """How a model would make the maps of the whole grid."""
    inputs = MapInputs(np.ones((60, 60), bool), measurement=measurement)
    options = SamplingOptions(n_samples=n_samples, batch_size=n_samples, tile=tile, consistency=consistency)
    return NetworkSampler(model, inputs, model.genes, options)


def test_tile_of_a_gene_wise_model_does_not_shrink_with_its_genes(monkeypatch):
    monkeypatch.setattr(_map_sampler, "MOST_VALUES", 4 * (20 + 2 * 32) ** 2 + 1)
    for n_genes in (1, 50):
        plain = plan_of(c3diff([f"g{i}" for i in range(n_genes)]))
        assert (plain.tiling.tile, plain.tiling.margin) == (20, 32)
        parts = plain.parts
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n_genes))


def test_gene_wise_model_needs_low_resolution_data_only_if_it_never_missed_them(section):
    superresolve(section, "he", model=c3diff(), **QUICK)
    assert np.isfinite(values_of(section)).any()
    with pytest.raises(
        ValueError, match=r"C3Diff was fitted with low-resolution expression and needs it: pass low_res="
    ):
        superresolve(section, "he", model=c3diff(p_missing=0.0), key_added="other", **QUICK)
    with pytest.raises(KeyError, match="1 of 1 genes unknown to the C3Diff: NOPE"):
        superresolve(section, "he", ["NOPE"], model=c3diff(), key_added="other", **QUICK)
    assert "other" not in section.images


def test_factor_matters_to_models_that_look_at_the_map(section):
    coarser(section)
    options = {**QUICK, "low_res": "coarser", "consistency": False}
    with pytest.raises(ValueError, match=r"sharpen maps 4 times, and the bins of 'coarser' are 10\s+times its own"):
        superresolve(section, "he", model=c3diff(), **options)
    torch.manual_seed(0)
    blind = models.RegressionUNet(GENES, factor=4, use_low_res=False, widths=[8], px_per_bin=2)
    blind.record = {"sections": ["none"]}
    superresolve(section, "he", model=blind, **options)
    superresolve(section, "he", model=blind, key_added="agrees", **{**options, "consistency": True})
    assert pooled_error(section, "coarser", "agrees") < 1e-3


# ---- bins of another map --------------------------------------------------------------------------------------------


def add_fine(sdata, shape=(40, 50), offset=(80.0, 40.0), bin_um=10.0):
    """A map of bins that begin at ``offset`` (x, y, in µm), with an unknown corner."""
    values = np.ones((1, *shape))
    values[:, :7, :9] = np.nan
    system = Chain([Scale([bin_um] * 2, axes=("x", "y")), Translation(list(offset), axes=("x", "y"))])
    write_image(sdata, "fine", values, channels=["EPCAM"], transformations={"um": system})
    record(sdata, "fine", provenance("pp.rasterize", bin_um=bin_um, unit="counts per bin"))


@pytest.mark.parametrize("low_res", [None, "low", "spot_counts"])
def test_bins_of_another_map(section, low_res):
    add_fine(section)
    model = c3diff(factor=10 if low_res == "spot_counts" else 4)
    superresolve(section, "he", model=model, low_res=low_res, like="fine", **QUICK)
    result, fine = section["superresolved"], section["fine"]
    assert result.shape[1:] == fine.shape[1:]
    matrices = [get_transformation(e, "um").to_affine_matrix(("x", "y"), ("x", "y")) for e in (result, fine)]
    np.testing.assert_allclose(*matrices)
    assert section.attrs["stgen"]["superresolved"]["like"] == "fine"
    known = np.isfinite(values_of(section))
    if low_res is None:  # what is tissue is taken from there, too
        assert (known == np.isfinite(np.asarray(fine.data))).all()
    else:
        assert known[:, :7, :9].any()
        assert pooled_error(section, low_res) < 1e-3


def test_same_bins_give_the_same_result(section, model):
    values = np.ones((1, N_BINS, N_BINS))
    write_image(section, "fine", values, channels=["EPCAM"], transformations={"um": Scale([10, 10], axes=("x", "y"))})
    record(section, "fine", provenance("pp.rasterize", bin_um=10.0, unit="counts per bin"))
    superresolve(section, "he", model=model, low_res="low", **QUICK)
    superresolve(section, "he", model=model, low_res="low", like="fine", key_added="there", **QUICK)
    np.testing.assert_array_equal(values_of(section, "there"), values_of(section))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"like": "nothing"}, KeyError, "nothing"),
        ({"like": "fine", "factor": 4}, ValueError, "the bins are those of like='fine'; leave `factor` out"),
        ({"like": "low"}, ValueError, "the bins of 'low' are 40 µm, and the model is for 10 µm. Name a map of that"),
        ({"like": "fine", "key_added": "fine", "overwrite": True}, ValueError, "not replaced"),
    ],
)
def test_bins_that_do_not_fit(section, arguments, error, message):
    add_fine(section)
    before = set(section.images)
    with pytest.raises(error, match=message):
        superresolve(section, "he", model=Untouchable(), **{"low_res": "low", **QUICK, **arguments})
    assert set(section.images) == before


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "low_res", "factor"), [("dpm++", "low", 4), ("ddpm", "spot_counts", 10)])
def test_result_does_not_depend_on_tile_and_batch(section, solver, low_res, factor):
    """One window, four and sixteen; with a halo as wide as what all steps together see, the same to 1e-4."""
    model = Local(factor=factor)
    options = QUICK | {"n_samples": 3, "solver": solver, "consistency": False}
    for key, tile, batch_size in [("one", 60, 3), ("four", 32, 2), ("sixteen", 16, 1)]:
        superresolve(section, model=model, low_res=low_res, tile=tile, batch_size=batch_size, key_added=key, **options)
    assert np.nanstd(values_of(section, "one")) > 0.1
    for key in ("four", "sixteen"):
        for suffix in ("", "_std"):
            np.testing.assert_allclose(
                values_of(section, key + suffix), values_of(section, "one" + suffix), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("low_res", ["low", None])
def test_result_of_a_gene_wise_model_does_not_depend_on_the_tile(section, low_res):
    """Its convolutions, at one resolution here, see 9 bins of the condition and 6 at each step: the halo holds all."""
    model = c3diff(guidance=1.5)
    options = {**QUICK, "low_res": low_res, "consistency": False}
    for key, tile in [("one", 60), ("many", 12)]:
        superresolve(section, "he", model=model, tile=tile, key_added=key, **options)
    for suffix in ("", "_std"):
        one, many = (values_of(section, key + suffix) for key in ("one", "many"))
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)
        assert np.nanstd(one) > 1e-3


@pytest.mark.parametrize(("low_res", "factor"), [("low", 4), ("spot_counts", 10)])
def test_result_does_not_depend_on_the_tile_with_consistency(section, low_res, factor):
    """Footprints carry what happens in one bin to all of theirs at every step, so the halo must be wider."""
    model = Local(factor=factor)
    model.halo = 48
    for key, tile in [("one", 60), ("sixteen", 16)]:
        superresolve(section, model=model, low_res=low_res, tile=tile, key_added=key, **QUICK)
    np.testing.assert_allclose(values_of(section, "sixteen"), values_of(section, "one"), rtol=1e-4, atol=1e-4)


def test_windows_tile_the_grid(model):
    tissue = np.ones((60, 60), bool)
    tiling = plan_of(model, 14, n_samples=2).tiling
    assert (tiling.height, tiling.width) == (60, 60)
    seen = np.zeros((60, 60), int)
    for window in tiling.windows(tissue):
        y, x, height, width = window.core
        top, left, rows, columns = window.outer
        seen[y : y + height, x : x + width] += 1
        assert all(n % model.align == 0 for n in window.core + window.outer)
        assert (top, left) == (max(y - model.halo, 0), max(x - model.halo, 0))
        assert (top + rows, left + columns) == (min(y + height + model.halo, 60), min(x + width + model.halo, 60))
        assert tiling.kept(window).sum() == height * width
    assert (seen == 1).all()
    tissue[:] = False
    tissue[20, 30] = True
    assert [window.core for window in tiling.windows(tissue)] == [(14, 28, 14, 14)]


@pytest.mark.parametrize("tile", [8, 10, 22])
def test_every_bin_and_every_disc_comes_from_one_window(section, tile):
    """Also where the discs lie across borders and corners of the squares."""
    model = Local(factor=10)
    grid = Grid.of_image(section, "he", bin_um=10)
    measurement = measurement_of(section, "spot_counts", grid, GENES)
    tissue = np.ones((grid.height, grid.width), bool)
    tiling = plan_of(model, tile, n_samples=2, measurement=measurement, consistency=True).tiling
    owner = np.full((60, 60), -1)
    for number, window in enumerate(tiling.windows(tissue)):
        top, left, rows, columns = window.outer
        part = owner[top : top + rows, left : left + columns]
        kept = tiling.kept(window)
        assert (part[kept] == -1).all()
        part[kept] = number
    assert (owner >= 0).all()
    rows, covered = tiling.footprints.coverage(0, 0, 60, 60)
    assert len(rows) == len(measurement)
    straddling = 0
    for disc in range(len(rows)):
        bins = covered[[disc]].indices
        assert len(set(owner.ravel()[bins])) == 1
        straddling += len({(i // 60 // tile, i % 60 // tile) for i in bins}) > 1
    assert straddling > 5


@pytest.mark.parametrize(("low_res", "factor", "tile"), [("low", 6, 30), ("spot_counts", 10, 18)])
def test_a_model_that_takes_one_size_of_window_gets_it(simulated, low_res, factor, tile):
    """And what was measured in footprints across the borders of these windows is kept all the same."""
    section = shallow_copy(simulated)
    add_low_res(section, factor=6)
    sizes = set()

    class OneSize(Local):
        fixed_tile = True

        def sample(self, batch, *args, **kwargs):
            sizes.add(tuple(batch["y"].shape[2:]))
            return super().sample(batch, *args, **kwargs)

    model = OneSize(factor=factor)
    model.align, model.halo = 32, 0
    superresolve(section, "he", model=model, low_res=low_res, **QUICK)
    assert sizes == {(32, 32)}
    assert section.attrs["stgen"]["superresolved"]["tile"] == tile
    assert pooled_error(section, low_res) < 1e-3
    with pytest.raises(ValueError, match=rf"windows of 32 bins and no others, of which {tile} .*found tile=32"):
        superresolve(section, "he", model=model, low_res=low_res, tile=32, key_added="other", **QUICK)
    model.align = 4
    with pytest.raises(ValueError, match="of which 0 can be kept"):
        superresolve(section, "he", model=model, low_res=low_res, key_added="other", **QUICK)


def test_the_default_tile_keeps_memory_within_bounds(model, monkeypatch):
    assert plan_of(model).tiling.tile == 60
    monkeypatch.setattr(_map_sampler, "MOST_VALUES", 4 * 3 * (20 + 2 * model.halo) ** 2 + 1)
    assert plan_of(model).tiling.tile == 20
    monkeypatch.setattr(_map_sampler, "MOST_VALUES", 1)
    assert plan_of(model).tiling.tile == model.align


# ---- consistency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, 32])
@pytest.mark.parametrize("low_res", ["low", "spot_counts"])
def test_maps_sum_to_what_was_measured(section, low_res, tile):
    model = Local(factor=4 if low_res == "low" else 10)
    superresolve(section, model=model, low_res=low_res, tile=tile, keep_samples=True, **QUICK)
    assert pooled_error(section, low_res) < 1e-3
    samples = values_of(section, "superresolved_samples").reshape(3, 2, N_BINS, N_BINS)
    for k in range(2):
        write_image(
            section, f"sample{k}", samples[:, k], channels=GENES,
            transformations=get_transformation(section["superresolved"], get_all=True),
        )  # fmt: skip
        assert pooled_error(section, low_res, f"sample{k}") < 1e-3
    superresolve(section, "he", model=model, low_res=low_res, consistency=False, key_added="free", **QUICK)
    assert pooled_error(section, low_res, "free") > 0.1


def test_consistency_is_applied_inside_the_sampler(section, model):
    """At every step: what the network sees is changed, not only what it gave."""
    seen = []

    class Watching(Local):
        def denoise(self, x_t, t, cond):
            seen.append(x_t)
            return super().denoise(x_t, t, cond)

    superresolve(section, model=Watching(), low_res="low", **QUICK)
    superresolve(section, model=Watching(), low_res="low", key_added="free", consistency=False, **QUICK)
    with_, without = seen[:STEPS], seen[STEPS:]
    torch.testing.assert_close(with_[0], without[0])
    assert not torch.allclose(with_[1], without[1], atol=0.01)


def test_a_wild_model_gives_finite_counts(section):
    class Wild(Local):
        def denoise(self, x_t, t, cond):
            return 300 * super().denoise(x_t, t, cond)

    superresolve(section, model=Wild(), low_res="low", **QUICK)
    assert pooled_error(section, "low") < 1e-3


@pytest.mark.parametrize("tile", [None, 20])
def test_blocks_that_reach_out_of_the_map_keep_their_counts(simulated, tile):
    """A map whose sides are no multiple of the factor comes back in its own size."""
    section = shallow_copy(simulated)
    counts = np.random.default_rng(0).poisson(2.0, (3, 58, 57)).astype(float)
    write_image(section, "counts", counts, channels=GENES, transformations={"um": Scale([10, 10], axes=("x", "y"))})
    record(section, "counts", provenance("pp.rasterize", bin_um=10.0))
    pp.degrade(section, map_key="counts", factor=4)
    superresolve(section, model=Local(), low_res="counts_4x", tile=tile, **QUICK)
    result, low = values_of(section), np.asarray(section["counts_4x"].data)
    assert result.shape == counts.shape
    assert np.isfinite(result).all()
    whole = np.pad(result, ((0, 0), (0, 2), (0, 3)))
    np.testing.assert_allclose(whole.reshape(3, 15, 4, 15, 4).sum((2, 4)), low, rtol=1e-3)


# ---- images ---------------------------------------------------------------------------------------------------------


def test_rgba_and_16_bit_images_are_as_good(section, model):
    rgb = np.asarray(section["he"].data)
    rgb8 = np.round(rgb / rgb.max() * 255).astype(np.uint8)
    opaque = np.full((1, *rgb8.shape[1:]), 255, np.uint8)
    for key, image, channels in [
        ("rgb", rgb8, ["r", "g", "b"]),
        ("rgba", np.concatenate([rgb8, opaque]), ["r", "g", "b", "a"]),
        ("uint16", rgb8.astype(np.uint16) * 257, ["r", "g", "b"]),
    ]:
        section.images[key] = Image2DModel.parse(
            image, dims=("c", "y", "x"), c_coords=channels, transformations={"um": Identity()}
        )
        superresolve(section, key, model=model, low_res="low", key_added=f"from_{key}", **QUICK)
    np.testing.assert_allclose(values_of(section, "from_rgba"), values_of(section, "from_rgb"), rtol=1e-5)
    np.testing.assert_allclose(values_of(section, "from_uint16"), values_of(section, "from_rgb"), rtol=1e-3, atol=1e-4)


# ---- store ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_res", ["low", "spot_counts"])
def test_streaming_to_a_store_gives_the_same(section, low_res, tmp_path, caplog):
    model = Local(factor=4 if low_res == "low" else 10)
    options = QUICK | {"model": model, "low_res": low_res, "tile": 32, "keep_samples": True}
    superresolve(section, **options)
    store = tmp_path / "result.zarr"
    with caplog.at_level(logging.INFO, "stgen"):
        superresolve(section, key_added="streamed", store=store, **options)
    assert str(store) in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["result.zarr"]
    stored = read_zarr(store)
    for suffix in ("", "_std", "_samples"):
        image = section.images[f"streamed{suffix}"]
        np.testing.assert_array_equal(
            values_of(stored, f"streamed{suffix}"), values_of(section, f"superresolved{suffix}")
        )
        np.testing.assert_array_equal(np.asarray(image.data), values_of(section, f"superresolved{suffix}"))
        assert list(image.coords["c"].values) == list(section[f"superresolved{suffix}"].coords["c"].values)
        assert image.data.chunksize == (1, N_BINS, N_BINS)
        assert stored.attrs["stgen"][f"streamed{suffix}"] == section.attrs["stgen"][f"streamed{suffix}"]
        matrix = get_transformation(image, "um").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([10, 10, 1]))
    from spatialdata import get_dask_backing_files

    assert any("result.zarr" in file for file in get_dask_backing_files(section.images["streamed"]))


def test_an_earlier_store_is_replaced_only_when_asked(section, model, tmp_path):
    store = tmp_path / "result.zarr"
    options = QUICK | {"model": model, "low_res": "low", "store": store}
    superresolve(section, seed=1, **options)
    before = values_of(section)
    with pytest.raises(ValueError, match="exists already"):
        superresolve(section, key_added="other", **options)
    superresolve(section, seed=2, overwrite=True, **options)
    assert not np.array_equal(values_of(section), before, equal_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == ["result.zarr"]
    with pytest.raises(ValueError, match=r"superresolved.* is read from .*pass another store"):
        superresolve(section, key_added="other", overwrite=True, **options)


def test_a_store_with_other_things_is_never_replaced(section, model, tmp_path):
    store, folder = tmp_path / "section.zarr", tmp_path / "folder"
    SpatialData(images={"he": section["he"]}).write(store)
    folder.mkdir()
    (folder / "thesis.txt").write_text("irreplaceable")
    options = QUICK | {"model": model, "low_res": "low", "overwrite": True}
    with pytest.raises(ValueError, match="also holds he"):
        superresolve(section, store=store, **options)
    with pytest.raises(ValueError, match="no SpatialData store"):
        superresolve(section, store=folder, **options)
    backed = read_zarr(store)
    add_low_res(backed)
    with pytest.raises(ValueError, match="is read from"):
        superresolve(backed, store=store, **options)
    with pytest.raises(FileNotFoundError, match="no folder"):
        superresolve(section, store=tmp_path / "missing" / "result.zarr", **options)
    assert (folder / "thesis.txt").exists()


class Failing(Local):
    """Fails in its second window."""

    calls, error = 0, KeyboardInterrupt

    def sample(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return super().sample(*args, **kwargs)


@pytest.mark.parametrize(("streamed", "error"), [(False, KeyboardInterrupt), (True, RuntimeError)])
def test_nothing_is_left_of_a_run_that_fails(section, model, tmp_path, monkeypatch, streamed, error):
    monkeypatch.setattr(Failing, "error", error)
    store = tmp_path / "result.zarr" if streamed else None
    superresolve(section, model=model, low_res="low", store=store, **QUICK)
    before = values_of(section)
    attrs, elements = dict(section.attrs["stgen"]), {key: element for _, key, element in section.gen_elements()}
    with pytest.raises(error):
        superresolve(section, model=Failing(), low_res="low", store=store, tile=16, overwrite=True, seed=5, **QUICK)
    assert section.attrs["stgen"] == attrs
    assert {key: element for _, key, element in section.gen_elements()}.keys() == elements.keys()
    np.testing.assert_array_equal(values_of(section), before)
    assert [path.name for path in tmp_path.iterdir()] == (["result.zarr"] if streamed else [])


@pytest.mark.parametrize("failing", ["spatialdata.SpatialData.write", "spatialdata.SpatialData.read"])
def test_nothing_is_left_when_the_store_cannot_be_finished(section, model, tmp_path, monkeypatch, failing):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="no space left"):
        superresolve(section, model=model, low_res="low", store=tmp_path / "result.zarr", **QUICK)
    assert not list(tmp_path.iterdir())
    assert "superresolved" not in section.images


# ---- bad input ------------------------------------------------------------------------------------------------------


class Untouchable(Local):
    """Refuses to work: whatever is wrong must be found before."""

    def sample(self, *args, **kwargs):
        raise AssertionError("work began")


def single_channel(sdata):
    sdata.images["gray"] = Image2DModel.parse(
        np.zeros((1, 600, 600), np.uint8), dims=("c", "y", "x"), transformations={"um": Identity()}
    )


def elsewhere(sdata):
    far = Chain([Scale([40, 40], axes=("x", "y")), Translation([9000, 0], axes=("x", "y"))])
    add_low_res(sdata, key="far", transformations={"um": far})


def other_system(sdata):
    add_low_res(sdata, key="unaligned", transformations={"elsewhere": Identity()})


def odd_bins(sdata):
    add_low_res(sdata, key="odd", transformations={"um": Scale([25, 25], axes=("x", "y"))})


def negative(sdata):
    add_low_res(sdata, key="negative", values=-np.ones((3, 15, 15)))


def infinite(sdata):
    add_low_res(sdata, key="infinite", values=np.full((3, 15, 15), np.inf))


def empty(sdata):
    add_low_res(sdata, key="empty", values=np.full((3, 15, 15), np.nan))


def one_gene(sdata):
    write_image(
        sdata, "one_gene", np.ones((1, 15, 15)), channels=["EPCAM"],
        transformations={"um": Scale([40, 40], axes=("x", "y"))},
    )  # fmt: skip


def coarser(sdata):
    add_low_res(sdata, key="coarser", factor=10)


def negative_spots(sdata):
    sdata["spot_counts"].X = sdata["spot_counts"].X * -1.0


def blank(sdata):
    sdata.images["blank"] = Image2DModel.parse(
        np.full((3, 600, 600), 255, np.uint8), dims=("c", "y", "x"), transformations={"um": Identity()}
    )


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "message"),
    [
        (None, {"n_samples": 0}, ValueError, "`n_samples` must be a whole number of at least 1, found 0"),
        (None, {"batch_size": 2.0}, ValueError, "`batch_size`.*found 2.0"),
        (None, {"seed": -1}, ValueError, "`seed`"),
        (None, {"steps": 0}, ValueError, r"`steps` must lie in 1\.\.1000"),
        (None, {"solver": "euler"}, ValueError, "`solver` must be one of"),
        (None, {"device": "abacus"}, ValueError, "unknown or absent device"),
        (None, {"tile": 30}, ValueError, r"multiple of 4 bins.*found 30\. The next that fits is 32"),
        (None, {"tile": 2}, ValueError, r"found 2\. The next that fits is 4"),
        (None, {"tile": 0}, ValueError, r"found 0\. The next that fits is 4"),
        (None, {"genes": ["EPCAM", "NOPE"]}, KeyError, "1 of 2 genes unknown to the .*: NOPE"),
        (None, {"genes": []}, ValueError, "at least one gene"),
        (None, {"genes": ["EPCAM", "EPCAM"]}, ValueError, "each once"),
        (None, {"image_key": "he2"}, KeyError, "'he2'.*found he"),
        (None, {"low_res": None}, ValueError, "pass low_res=.*'low'.*'spot_counts'"),
        (None, {"low_res": "lov"}, KeyError, "'lov'; found the images .*'low'"),
        (None, {"bin_um": 20}, ValueError, "fitted for bins of 10 µm, found bin_um=20"),
        (None, {"factor": 5}, ValueError, "factor=5 does not fit.*40 µm, 4 times"),
        (None, {"factor": 4, "low_res": "spot_counts"}, ValueError, "not a map"),
        (None, {"layer": "counts"}, ValueError, "layer='counts' is for tables, and 'low' is a map: leave it out"),
        (None, {"layer": "counts", "low_res": "spot_counts"}, KeyError, "There is no layer 'counts'"),
        (None, {"layer": "counts", "low_res": None}, ValueError, "of a table of spots, and none was named: pass low_res="),
        (odd_bins, {"low_res": "odd"}, ValueError, r"25 µm, 2\.5 times the model's 10 µm"),
        (coarser, {"low_res": "coarser"}, ValueError, r"sharpen maps 4 times.*are 10\s+times its own"),
        (single_channel, {"image_key": "gray"}, ValueError, "images of 3 channels, and 'gray' has 1"),
        (elsewhere, {"low_res": "far"}, ValueError, "do not overlap in the coordinate system 'um'"),
        (other_system, {"low_res": "unaligned"}, ValueError, "share no coordinate system"),
        (negative, {"low_res": "negative"}, ValueError, "negative values"),
        (infinite, {"low_res": "infinite"}, ValueError, "infinite values"),
        (empty, {"low_res": "empty"}, ValueError, "it holds no values"),
        (negative_spots, {"low_res": "spot_counts"}, ValueError, "negative values"),
        (one_gene, {"low_res": "one_gene"}, KeyError, "COL1A1, ACTB"),
        (None, {"key_added": "he", "overwrite": True}, ValueError, "not replaced"),
        (None, {"key_added": "low", "overwrite": True}, ValueError, "not replaced"),
        (None, {"key_added": "he"}, ValueError, "exists already"),
        (None, {"key_added": "Spots"}, ValueError, "'spots' is taken"),
        (None, {"key_added": "HE"}, ValueError, "'he' is taken"),
        (None, {"key_added": "a/b"}, ValueError, "must be a name that can be stored"),
    ],
)  # fmt: skip
def test_bad_input(section, prepare, arguments, error, message):
    if prepare is not None:
        prepare(section)
    before = {key: element for _, key, element in section.gen_elements()}, dict(section.attrs["stgen"])
    arguments = {"image_key": "he", "model": Untouchable(), "low_res": "low", **QUICK, **arguments}
    with pytest.raises(error, match=message):
        superresolve(section, **arguments)
    after = {key: element for _, key, element in section.gen_elements()}
    assert after.keys() == before[0].keys()
    assert all(after[key] is element for key, element in before[0].items())
    assert section.attrs["stgen"] == before[1]


def test_bad_models(section):
    for model, error, message in [
        (models.TrainingMean(["A"], embedding_dim=1), ValueError, "tl.predict_expression"),
        ("no/such/model/here", FileNotFoundError, "no folder"),
        (3, TypeError, "`model` must be a Model or text"),
    ]:
        with pytest.raises(error, match=message):
            superresolve(section, model=model, low_res="low", **QUICK)
    unfitted = Local()
    unfitted.record = {}
    with pytest.raises(ValueError, match=r"has not been fitted; call stgen\.tl\.fit"):
        superresolve(section, model=unfitted, low_res="low", **QUICK)
    with pytest.raises(TypeError, match="`sdata` must be a SpatialData, found"):
        superresolve(section["spot_counts"], model=Local(), low_res="low", **QUICK)


def test_a_blank_image_has_no_tissue(section):
    blank(section)
    with pytest.raises(ValueError, match="there is no tissue: the image 'blank'"):
        superresolve(section, "blank", model=Local(needs_low_res=False), **QUICK)


def test_existing_results_are_refused(section, model):
    superresolve(section, model=model, low_res="low", **QUICK)
    with pytest.raises(ValueError, match="'superresolved'.*overwrite=True"):
        superresolve(section, model=Untouchable(), low_res="low", **QUICK)


def test_an_image_that_covers_part_of_the_map_is_warned_about(section, model, caplog):
    half = section["he"].data[:, :, :300].compute()
    section.images["half"] = Image2DModel.parse(half, dims=("c", "y", "x"), transformations={"um": Identity()})
    superresolve(section, "half", model=model, low_res="low", **QUICK)
    assert "'half' covers 50 % of the map" in caplog.text


def test_a_turned_image_is_handled(section, model):
    """The grid is that of the low-resolution map, the image is turned by a right angle and mirrored."""
    turned = np.asarray(section["he"].data).transpose(0, 2, 1)
    swap = Affine([[0, 1, 0], [1, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    section.images["turned"] = Image2DModel.parse(turned, dims=("c", "y", "x"), transformations={"um": swap})
    superresolve(section, "he", model=model, low_res="low", **QUICK)
    superresolve(section, "turned", model=model, low_res="low", key_added="from_turned", **QUICK)
    np.testing.assert_allclose(values_of(section, "from_turned"), values_of(section), rtol=1e-4, atol=1e-5)
