"""Nuclei outlined by their stain, or by a stand-in for a learned segmenter."""

import importlib.util
import sys
import types
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import torch
from scipy import ndimage
from skimage.measure import label
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation

import stgen
from stgen._spatial.image import Histology
from stgen.pp._nuclei import hematoxylin, outline_nuclei

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "nuclei.py"
spec = importlib.util.spec_from_file_location("nuclei_benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

MPP = 0.5


@pytest.fixture(scope="module")
def tissue():
    """Pixels ``(3, 600, 600)`` of a simulated section at 0.5 µm. Look, don't touch."""
    return np.asarray(stgen.datasets.simulated_section(seed=3, size_um=300, mpp=MPP)["he"].data)


@pytest.fixture(scope="module")
def outlined(tissue):
    """Its nuclei, found with the defaults. Look, don't touch."""
    return nuclei(section(tissue))


def section(pixels, channels=None, transformations=None, **kwargs):
    transformations = transformations or {"um": Scale([MPP, MPP], axes=("x", "y"))}
    channels = channels or (list("rgb") if len(pixels) == 3 else [f"c{i}" for i in range(len(pixels))])
    image = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), c_coords=channels, transformations=transformations, **kwargs
    )
    return SpatialData(images={"he": image})


def nuclei(sdata, **kwargs):
    stgen.pp.segment_nuclei(sdata, progress=False, **kwargs)
    return np.asarray(sdata[kwargs.get("key_added", "nuclei")].data)


def share_identical(a, b):
    """Share of the nuclei of ``a`` that ``b`` has pixel by pixel, under whatever number."""
    (p, q), shared = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1, return_counts=True)
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    return np.mean((shared == size_a[p])[p > 0] & (shared == size_b[q])[p > 0])


# -- against the nuclei that were drawn -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("seed", "mpp", "least"), [(1, 0.5, 0.78), (2, 0.5, 0.87), (2, 1.0, 0.84)])
def test_the_simulated_nuclei_are_found(seed, mpp, least):
    """On 300 µm; seed 1 is mostly glands, whose nuclei overlap. benchmarks/nuclei.py has larger sections."""
    labels = nuclei(stgen.datasets.simulated_section(seed=seed, size_um=300, mpp=mpp))
    true, _ = benchmark.true_nuclei(labels.shape, seed=seed, size_um=300, mpp=mpp)
    assert benchmark.found_of(true, labels)[1] >= least
    area, true_area = (np.median(np.unique(x[x > 0], return_counts=True)[1]) for x in (labels, true))
    assert area == pytest.approx(true_area, rel=0.15)


def test_the_score_is_one_for_the_truth_and_zero_for_nothing():
    true, kinds = benchmark.true_nuclei((300, 300), seed=1, size_um=300, mpp=1.0)
    assert len(kinds) == len(stgen.datasets.simulated_section(seed=1, size_um=300)["cells"])
    found, f1 = benchmark.found_of(true, true)
    assert f1 == 1.0
    np.testing.assert_array_equal(found, np.unique(true[true > 0]))
    assert benchmark.found_of(true, np.zeros_like(true))[1] == 0.0
    assert benchmark.found_of(true, (true > 0).astype(int))[1] < 0.01  # one label for all


# -- what labels are ------------------------------------------------------------------------------------------------------
def test_labels_are_whole_numbered_in_reading_order_and_within_the_bounds(tissue, outlined):
    assert (outlined.shape, outlined.dtype) == ((600, 600), np.int32)
    numbers, first, size = np.unique(outlined, return_index=True, return_counts=True)
    np.testing.assert_array_equal(numbers, np.arange(len(numbers)))
    assert len(numbers) > 200
    assert (np.diff(first[1:]) > 0).all()
    area = size[1:] * MPP**2
    assert area.min() >= 10
    assert area.max() <= 300
    assert all(label(outlined[window] == i + 1).max() == 1 for i, window in enumerate(ndimage.find_objects(outlined)))
    small = nuclei(section(tissue), min_area_um2=20, max_area_um2=60)
    area = np.bincount(small.ravel())[1:] * MPP**2
    assert area.min() >= 20
    assert area.max() <= 60


def test_the_record_and_the_log(tissue, outlined, caplog):
    sdata = section(tissue)
    with caplog.at_level("INFO", logger="stgen"):
        stgen.pp.segment_nuclei(sdata, key_added="cells", progress=False)
    assert f"Outlined {outlined.max()} nuclei of 'he': labels['cells']" in caplog.text
    entry = sdata.attrs["stgen"]["cells"]
    assert 0.2 < entry.pop("threshold") < 0.8
    assert entry == {
        "function": "pp.segment_nuclei", "image_key": "he", "method": "hematoxylin", "min_area_um2": 10.0,
        "max_area_um2": 300.0, "image_mpp": MPP, "n_nuclei": outlined.max(), "version": entry["version"],
    }  # fmt: skip


def test_the_systems_are_those_of_the_image_and_labels_survive_the_disk(tissue, outlined, tmp_path):
    turn = Affine(np.array([[0, -0.5, 80], [0.5, 0, 10], [0, 0, 1]]), ("x", "y"), ("x", "y"))
    systems = {"px": Identity(), "um": turn}
    sdata = section(tissue, transformations=systems, scale_factors=[2], chunks=(3, 256, 256))
    labels = nuclei(sdata)
    np.testing.assert_array_equal(labels, outlined)
    sdata.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    np.testing.assert_array_equal(back["nuclei"], outlined)
    assert back.attrs["stgen"] == sdata.attrs["stgen"]
    for element in (sdata["nuclei"], back["nuclei"]):
        assert set(get_transformation(element, get_all=True)) == {"px", "um"}
        for system in systems:
            np.testing.assert_allclose(
                get_transformation(element, system).to_affine_matrix(("x", "y"), ("x", "y")),
                get_transformation(sdata["he"], system).to_affine_matrix(("x", "y"), ("x", "y")),
            )


# -- tiles ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tile_px", [97, 256])
def test_tiles_make_no_difference(tissue, outlined, tile_px):
    tiled = nuclei(section(tissue), tile_px=tile_px)
    assert tiled.max() == pytest.approx(outlined.max(), rel=0.005)
    assert share_identical(outlined, tiled) > 0.995
    assert np.mean((tiled > 0) == (outlined > 0)) > 0.9995


def test_no_window_is_larger_than_a_tile_with_its_margins(tissue, monkeypatch):
    sizes, read = [], Histology.read
    monkeypatch.setattr(
        Histology, "read", lambda self, x, y, w, h, **kw: sizes.append((w, h)) or read(self, x, y, w, h)
    )
    lazy = da.from_array(np.tile(tissue, (1, 1, 3)), chunks=(3, 256, 256))
    sdata = section(lazy, chunks=(3, 256, 256))
    nuclei(sdata, tile_px=128)
    assert np.max(sizes) <= max(128 + 2 * 48 / MPP, 200 / MPP)
    assert isinstance(sdata["nuclei"].data, da.Array)


def test_labels_far_from_any_seam_follow_the_picture(tissue):
    """Moved, mirrored and turned pictures have moved, mirrored and turned nuclei."""
    stain = hematoxylin(tissue / np.float32(255))
    levels = {"mpp": MPP, "threshold": 0.4, "area_px": (40.0, 1200.0)}
    whole = outline_nuclei(stain, **levels)
    inner = (slice(150, 450), slice(150, 450))
    moved = np.zeros_like(whole)
    moved[37:, 61:] = outline_nuclei(stain[37:, 61:], **levels)
    for other in (moved, outline_nuclei(stain[:, ::-1], **levels)[:, ::-1], outline_nuclei(stain.T, **levels).T):
        np.testing.assert_array_equal(other[inner] > 0, whole[inner] > 0)
        assert share_identical(whole[inner], other[inner]) > 0.97


# -- blank images ---------------------------------------------------------------------------------------------------------
def blank(name):
    rng = np.random.default_rng(0)
    glass, eosin = np.array([243, 243, 243.0]), np.array([230, 150, 190.0])
    shape = (3, 300, 300)
    ramp = np.linspace(-40, 40, 300)
    return {
        "white": np.full(shape, 255.0),
        "glass": glass[:, None, None] + rng.normal(0, 3, shape),
        "eosin": eosin[:, None, None] + rng.normal(0, 5, shape),
        "gradient": eosin[:, None, None] + ramp + rng.normal(0, 3, shape),
        "black": np.zeros(shape),
    }[name]


@pytest.mark.parametrize("name", ["white", "glass", "eosin", "gradient", "black"])
def test_a_blank_image_has_no_nuclei(name, caplog):
    sdata = section(np.clip(blank(name), 0, 255).astype(np.uint8))
    assert nuclei(sdata).max() == 0
    assert "Found no nuclei in 'he'" in caplog.text
    assert sdata.attrs["stgen"]["nuclei"]["n_nuclei"] == 0


@pytest.mark.parametrize("counts", [0, 3, 200])
def test_dark_fluorescence_has_no_nuclei(counts):
    pixels = np.random.default_rng(0).poisson(counts, (1, 300, 300)).astype(np.uint16)
    assert nuclei(section(pixels), channel=0).max() == 0


def test_the_threshold_is_that_of_the_section_also_in_tiles_that_are_nearly_blank(tissue):
    canvas = np.random.default_rng(0).normal(243, 2, (3, 900, 1500)).clip(0, 255).astype(np.uint8)
    canvas[:, 100:300, 700:900] = tissue[:, 200:400, 200:400]
    sdata = section(canvas)
    labels = nuclei(sdata, tile_px=100)
    assert labels.max() > 20
    labels[100:300, 700:900] = 0
    assert labels.max() == 0
    by_hand = nuclei(sdata, threshold=sdata.attrs["stgen"]["nuclei"]["threshold"], overwrite=True)
    assert by_hand.max() == sdata.attrs["stgen"]["nuclei"]["n_nuclei"]


# -- fluorescence ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def glow(tissue):
    """Hematoxylin as light: uint16 ``(2, 600, 600)``, the second channel without meaning."""
    stain = hematoxylin(tissue / np.float32(255)).clip(0, None)
    dapi = np.random.default_rng(0).poisson(20 + 1000 * stain)
    return np.stack([dapi, dapi.T[::-1]]).astype(np.uint16)


def test_a_channel_takes_the_place_of_hematoxylin(glow):
    labels = nuclei(section(glow, ["DAPI", "CD45"]), channel="DAPI")
    true, _ = benchmark.true_nuclei(labels.shape, seed=3, size_um=300, mpp=MPP)
    assert benchmark.found_of(true, labels)[1] > 0.75
    np.testing.assert_array_equal(nuclei(section(glow[::-1]), channel=1), labels)
    rgb = section(np.concatenate([glow, glow[:1]]), ["DAPI", "CD45", "CD3"])
    np.testing.assert_array_equal(nuclei(rgb, channel="DAPI"), labels)
    assert (rgb.attrs["stgen"]["nuclei"]["method"], rgb.attrs["stgen"]["nuclei"]["channel"]) == ("channel", "DAPI")


def test_brightness_makes_no_difference(glow):
    light = (glow[:1] / 4096).astype(np.float32)
    labels = nuclei(section(light), channel=0)
    for factor in (0.25, 0.0625):
        dimmed = section(light * np.float32(factor))
        assert share_identical(labels, nuclei(dimmed, channel=0)) > 0.99
        np.testing.assert_allclose(
            dimmed.attrs["stgen"]["nuclei"]["threshold"] / factor,
            nuclei_threshold(light),
            rtol=0.01,
        )


def nuclei_threshold(pixels):
    sdata = section(pixels)
    nuclei(sdata, channel=0)
    return sdata.attrs["stgen"]["nuclei"]["threshold"]


def test_a_lower_threshold_covers_more(tissue, outlined):
    sdata = section(tissue)
    areas = [np.count_nonzero(nuclei(sdata, threshold=t, overwrite=True)) for t in (0.9, 0.6, 0.3)]
    assert areas == sorted(areas)
    assert sdata.attrs["stgen"]["nuclei"]["threshold"] == 0.3


# -- learned segmenters of lazyslide-models, behind a stand-in with the same interface ------------------------------------
class Blue:
    """Has what SegmentationModel of lazyslide-models has: segment, get_transform, to. Discs are what is blue."""

    input_constraint = None
    sides: list = []

    def to(self, device):
        return self

    def get_transform(self):
        def transform(image):
            assert image.dtype == torch.uint8
            return image.float() / 255

        return transform

    def segment(self, image):
        assert image.ndim == 4
        self.sides.append(image.shape[2:])
        blue = (image[:, 0] < 0.5).numpy()
        return types.SimpleNamespace(instance_map=torch.from_numpy(np.stack([label(x) for x in blue])))


class Constrained(Blue):
    """Says how it wants its windows, like classpose, and preprocesses by itself, like cellpose."""

    input_constraint = types.SimpleNamespace(min=224, max=250, divisible_by=14)
    mpp = 0.25

    def get_transform(self):
        return None

    def segment(self, image):
        assert image.dtype == torch.uint8
        return super().segment(image.float() / 255)


class Semantic(Blue):
    def segment(self, image):
        return types.SimpleNamespace(instance_map=None)


@pytest.fixture
def lazyslide(monkeypatch):
    module = types.ModuleType("lazyslide_models")
    module.MODEL_REGISTRY = {"instanseg": Blue, "classpose": Constrained, "grandqc": Semantic, "uni": object}
    module.list_models = lambda task=None: ["instanseg", "classpose", "grandqc"] if task == "segmentation" else ["uni"]
    monkeypatch.setitem(sys.modules, "lazyslide_models", module)
    monkeypatch.setattr(Blue, "sides", [])
    return module


def discs(mpp, side_um=240.0, radius_um=4.0, seed=0):
    """Blue discs on white, 20 µm apart, and their labels."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(12, side_um - 12, 20)] * 2), -1).reshape(-1, 2)
    centers = grid + rng.uniform(-4, 4, grid.shape)
    at = (np.arange(round(side_um / mpp)) + 0.5) * mpp
    labels = np.zeros((len(at), len(at)), int)
    for i, (x, y) in enumerate(centers):
        labels[(at[:, None] - y) ** 2 + (at - x) ** 2 < radius_um**2] = i + 1
    pixels = np.full((3, *labels.shape), 255, np.uint8)
    pixels[:2, labels > 0] = 20
    return pixels, labels


@pytest.mark.parametrize(("name", "side"), [("instanseg", 512), ("classpose", 238)])
@pytest.mark.parametrize("mpp", [0.5, 0.688, 0.25])
def test_a_learned_segmenter_sees_what_it_wants_and_cuts_no_nucleus(lazyslide, name, side, mpp):
    pixels, true = discs(mpp)
    sdata = section(pixels, transformations={"um": Scale([mpp, mpp], axes=("x", "y"))})
    labels = nuclei(sdata, method=name)
    assert len(Blue.sides) > 1
    assert set(Blue.sides) == {(side, side)}
    assert labels.max() == true.max()
    _, f1 = benchmark.found_of(true, labels, iou=0.85)
    assert f1 == 1.0
    assert sdata.attrs["stgen"]["nuclei"]["method"] == name
    assert "threshold" not in sdata.attrs["stgen"]["nuclei"]


def test_segmenters_that_are_unknown_or_do_not_tell_nuclei_apart(lazyslide):
    sdata = section(discs(1.0)[0])
    for name, message in (
        ("instansegg", "no segmenter 'instansegg'.*instanseg"),
        ("uni", "no segmenter 'uni'"),
        ("grandqc", "'grandqc' of lazyslide-models does not tell nuclei apart"),
    ):
        with pytest.raises(ValueError, match=message):
            nuclei(sdata, method=name)
    with pytest.raises(ValueError, match="'instanseg' finds nuclei in H&E by itself; leave out channel="):
        nuclei(sdata, method="instanseg", channel="r")
    with pytest.raises(ValueError, match="method='instanseg' reads H&E, which has three channels"):
        nuclei(section(discs(1.0)[0][:1]), method="instanseg")
    assert not sdata.labels
    assert not sdata.attrs


def test_missing_extra(monkeypatch, tissue):
    monkeypatch.setitem(sys.modules, "lazyslide_models", None)
    with pytest.raises(ImportError, match=r'pip install "stgen\[encoders\]"'):
        nuclei(section(tissue), method="instanseg")


# -- what is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"image_key": "x"}, KeyError, "found he. Pass image_key="),
        ({"channel": "DAPI"}, KeyError, "no channel 'DAPI'; found r, g, b. Pass channel="),
        ({"channel": 3}, KeyError, "no channel 3"),
        ({"channel": True}, ValueError, "`channel` must be text or a whole number"),
        ({"threshold": 0.0}, ValueError, "`threshold` must be None or a positive number"),
        ({"min_area_um2": 50, "max_area_um2": 20}, ValueError, "must be positive and in this order, found 50 and 20"),
        ({"min_area_um2": 0.5}, ValueError, "At 0.5 µm per pixel, a nucleus of 0.5 µm² covers less than four pixels"),
        ({"mpp": 4.4}, ValueError, "At 4.4 µm per pixel, .*Use a finer image, correct mpp="),
        ({"mpp": -1.0}, ValueError, "must be a positive number"),
        ({"tile_px": 10}, ValueError, "`tile_px` must be a whole number of at least 64"),
        ({"key_added": "taken"}, ValueError, "sdata.labels.'taken'. exists already. Pass overwrite=True"),
        ({"key_added": "he"}, ValueError, "'he' is the name of another element"),
    ],
)
def test_what_is_refused(tissue, kwargs, error, message):
    sdata = section(tissue[:, :100, :100])
    sdata.labels["taken"] = sd.models.Labels2DModel.parse(np.zeros((4, 4), np.int32), dims=("y", "x"))
    with pytest.raises(error, match=message):
        nuclei(sdata, **kwargs)
    assert set(sdata.labels) == {"taken"}
    assert not sdata.attrs


def test_images_that_are_refused(glow, tissue):
    with pytest.raises(ValueError, match="three channels; the image 'he' has 2: DAPI, CD45. .*channel=<one of them>"):
        nuclei(section(glow, ["DAPI", "CD45"]))
    pixels = section(tissue[:, :100, :100], transformations={"global": Identity()})
    with pytest.raises(ValueError, match="µm per pixel of the image 'he' are not known.*Pass mpp="):
        nuclei(pixels)
    assert nuclei(pixels, mpp=MPP).shape == (100, 100)
    with pytest.raises(TypeError, match="`sdata` must be a SpatialData"):
        stgen.pp.segment_nuclei(tissue)


def test_overwrite_replaces(tissue):
    sdata = section(tissue[:, :200, :200])
    first = nuclei(sdata)
    assert nuclei(sdata, min_area_um2=40, overwrite=True).max() < first.max()
    assert sdata.attrs["stgen"]["nuclei"]["min_area_um2"] == 40.0
