"""Histology embeddings."""

import sys
import types
from enum import Enum

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from anndata import AnnData
from scipy import ndimage, sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity
from torch import nn
from xarray import DataArray

import stgen
from stgen._spatial.image import Histology
from stgen.data import dihedral
from stgen.pp._texture import texture_features

MPP = 2.0


def stained(height=260, width=320, seed=0):
    """Something like tissue: purple blobs of varying density on pink."""
    rng = np.random.default_rng(seed)
    density = ndimage.gaussian_filter(rng.random((height, width)), 25)
    seeds = rng.random((height, width)) < 0.03 * (density > np.median(density)) + 0.004
    nuclei = np.clip(ndimage.gaussian_filter(seeds.astype(float), 2) * 30, 0, 1)
    fibres = ndimage.gaussian_filter(rng.random((height, width)), (1, 5))
    fibres = (fibres - fibres.min()) / np.ptp(fibres)
    density = (
        nuclei * np.array([0.65, 0.7, 0.29])[:, None, None]
        + (0.2 + 0.4 * fibres) * np.array([0.07, 0.99, 0.11])[:, None, None]
    )
    return np.clip(255 * np.exp(-density), 0, 255).astype(np.uint8)


LOCATIONS = np.array([[100.5, 90.0], [160.0, 130.0], [200.25, 110.5], [130.0, 150.75]])


def section(image=None, xy=LOCATIONS, *, lazy=False, **kwargs):
    image = stained() if image is None else image
    n = len(xy)
    table = AnnData(sparse.csr_matrix(np.ones((n, 2), np.float32)), obs=pd.DataFrame(index=[f"s{i}" for i in range(n)]))
    table.obs["region"] = pd.Categorical(["spots"] * n)
    table.obs["id"] = np.arange(n)
    shapes = ShapesModel.parse(xy, geometry=0, radius=10, index=np.arange(n), transformations={"px": Identity()})
    pixels = da.from_array(image, chunks=(3, 64, 64)) if lazy else image
    element = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"px": Identity()}, **kwargs)
    linked = TableModel.parse(table, region="spots", region_key="region", instance_key="id")
    return SpatialData(images={"he": element}, shapes={"spots": shapes}, tables={"t": linked})


def embedding(sdata, key="X_texture", **kwargs):
    stgen.pp.embed(sdata, mpp=MPP, **kwargs)
    return sdata["t"].obsm[key]


def mean_color(x):
    return x.mean((2, 3))


# -- texture ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reference():
    return embedding(section())


def test_texture_describes_each_location(reference):
    assert reference.shape == (4, 142)
    assert reference.dtype == np.float32
    assert np.isfinite(reference).all()
    assert (reference.std(0) > 0).mean() > 0.95


@pytest.mark.parametrize("view", range(1, 8))
def test_texture_does_not_turn_with_the_image(reference, view):
    image = stained()
    height, width = image.shape[1:]
    turned = dihedral(torch.from_numpy(image), view).numpy().copy()
    # where a location goes is found by turning a map of coordinates
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = (dihedral(torch.from_numpy(v), view).numpy() for v in (x, y))
    rows, columns = np.arange(x.shape[0]) + 0.5, np.arange(x.shape[1]) + 0.5
    # each old coordinate is linear in the new ones: solve for the location
    a = np.array([[x[0, 1] - x[0, 0], x[1, 0] - x[0, 0]], [y[0, 1] - y[0, 0], y[1, 0] - y[0, 0]]])
    origin = np.array([x[0, 0], y[0, 0]])
    xy = np.linalg.solve(a, (LOCATIONS - origin).T).T + [columns[0], rows[0]]
    np.testing.assert_allclose(
        embedding(section(turned, xy), patch_um=(128, 256)), reference[:, :76], rtol=2e-3, atol=2e-3
    )


def test_texture_is_invariant_patch_by_patch():
    patches = torch.from_numpy(stained(128, 128)).float()[None] / 255
    expected = texture_features(patches, mpp=1.0)
    for view in range(1, 8):
        np.testing.assert_allclose(texture_features(dihedral(patches, view), mpp=1.0), expected, rtol=1e-3, atol=1e-3)


def test_moving_image_and_locations_together_changes_nothing(reference):
    padded = np.pad(stained(), ((0, 0), (37, 0), (53, 0)), mode="edge")
    moved = embedding(section(padded, LOCATIONS + [53, 37]), patch_um=(128, 256))
    np.testing.assert_allclose(moved, reference[:, :76], rtol=1e-3, atol=1e-3)


def test_lazy_and_multiscale_images(reference):
    np.testing.assert_allclose(embedding(section(lazy=True), patch_um=128), reference[:, :38], rtol=1e-4, atol=1e-4)
    pyramid = embedding(section(scale_factors=[2]))
    np.testing.assert_allclose(pyramid[:, :76], reference[:, :76], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pyramid, reference, rtol=0.02, atol=0.05)  # the coarse level is rounded to integers


@pytest.mark.parametrize("mpp", [1.5, 2.0, 4.0, 7.0])
def test_an_image_reads_the_same_with_a_pyramid_as_without(mpp):
    fine = DataArray(stained(256, 256).astype(np.float32) / 255, dims=("c", "y", "x"))
    levels = [fine]
    for _ in range(2):
        levels.append(levels[-1].coarsen(y=2, x=2).mean())
    alone, pyramid = (Histology(images, mpp=1.0) for images in ([fine], levels))
    for window in ((0, 0, 256, 256), (-20.5, 33.3, 100, 120), (200, 190, 90, 90)):
        np.testing.assert_allclose(alone.read(*window, mpp=mpp), pyramid.read(*window, mpp=mpp), atol=1e-5)


def test_more_nuclei_are_seen_as_more():
    few, many = (torch.from_numpy(x).float()[None] / 255 for x in (np.full((3, 128, 128), 220.0),) * 2)
    y, x = np.mgrid[:128, :128]
    for image, step in ((few, 32), (many, 16)):
        for cy in range(step // 2, 128, step):
            for cx in range(step // 2, 128, step):
                blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 18)
                image *= torch.from_numpy(np.exp(-blob * np.array([0.65, 0.7, 0.29])[:, None, None])).float()
    low, high = (texture_features(image, mpp=1.0)[0, 33:] for image in (few, many))
    # expected: one blob per 32 x 32 and per 16 x 16 µm, averaged over the disc
    assert torch.expm1(low[0]) == pytest.approx(1e4 / 32**2, rel=0.15)
    assert torch.expm1(high[0]) == pytest.approx(1e4 / 16**2, rel=0.15)
    assert high[1] > 3 * low[1]
    assert float(low[2]) == pytest.approx(float(high[2]), abs=0.3)


def test_texture_takes_any_number_of_channels():
    image = np.concatenate([stained(), stained(seed=1)[:1]])
    image[3] //= 2
    assert embedding(section(image), patch_um=128).shape == (4, 14 + 4 * 4 * 2)


# -- any model --------------------------------------------------------------------------------------------------------
def test_a_callable_sees_exactly_the_patch():
    sdata = section()
    image = stained()
    # 16 pixels of 2 µm around a pixel corner: no interpolation
    sdata.shapes["spots"] = ShapesModel.parse(
        np.round(LOCATIONS), geometry=0, radius=10, index=np.arange(4), transformations={"px": Identity()}
    )
    stgen.pp.embed(sdata, model=mean_color, mpp=MPP, patch_um=32, patch_px=16)
    for row, (x, y) in enumerate(np.round(LOCATIONS).astype(int)):
        patch = image[:, y - 8 : y + 8, x - 8 : x + 8] / 255
        np.testing.assert_allclose(sdata["t"].obsm["X_mean_color"][row], patch.mean((1, 2)), rtol=1e-5)


class Corner(nn.Module):
    """Means of the quadrants: turns with the patch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.scale * nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_views_are_the_dihedral_views_of_the_patch():
    sdata = section()
    model = Corner().train()
    stgen.pp.embed(sdata, model=model, mpp=MPP, patch_um=64, patch_px=32, views=8)
    views = sdata["t"].obsm["X_corner_views"]
    assert views.shape == (4, 8, 12)
    np.testing.assert_array_equal(views[:, 0], sdata["t"].obsm["X_corner"])
    quadrants = torch.from_numpy(views[:, 0].reshape(4, 3, 2, 2))
    for view in range(8):
        expected = dihedral(quadrants, view).reshape(4, 12)
        np.testing.assert_allclose(views[:, view], expected, rtol=1e-5)
    assert model.training  # left as it was
    assert sdata["t"].uns["stgen"]["X_corner"]["views"] == 8


class Moved(Corner):
    """Remembers where it was sent and whether it was training when called."""

    def __init__(self):
        super().__init__()
        self.drop.eval()
        self.sent, self.called = [], []

    def to(self, device):
        self.sent.append(str(device))
        return super().to(device)

    def forward(self, x):
        self.called.append(self.training)
        if len(self.called) > 2:
            raise RuntimeError("enough")
        return super().forward(x)


def test_a_module_is_left_as_it_was():
    model = Moved().train(True)
    model.drop.eval()
    stgen.pp.embed(section(), model=model, mpp=MPP, patch_um=(64, 128), device="cpu")
    assert model.sent == ["cpu", "cpu"]  # there and back once, not once per batch
    assert model.called == [False, False]
    assert model.training
    assert not model.drop.training
    with pytest.raises(RuntimeError, match="enough"):
        stgen.pp.embed(section(), model=model, mpp=MPP, device="cpu")
    assert len(model.sent) == 4
    assert model.training


def test_the_record_says_how_to_embed_again():
    sdata = section()
    sizes = (40, 1000 / 24)
    for key, given in {
        "none": {},
        "um": {"patch_um": sizes},
        "px": {"patch_px": 32},
        "both": {"patch_um": 64, "patch_px": 32},
    }.items():
        stgen.pp.embed(sdata, model=[mean_color, "texture"], mpp=MPP, key_added=key, **given)
        entry = sdata["t"].uns["stgen"][key]
        assert entry["default_patches"] is (not given)
        assert ("patch_um_given" in entry, "patch_px_given" in entry) == ("patch_um" in given, "patch_px" in given)
        again = {}
        if "patch_um_given" in entry:
            again["patch_um"] = [float(size) for size in entry["patch_um_given"].split(",")]
        if "patch_px_given" in entry:
            again["patch_px"] = entry["patch_px_given"]
        stgen.pp.embed(sdata, model=[mean_color, "texture"], mpp=MPP, key_added="again", overwrite=True, **again)
        np.testing.assert_array_equal(sdata["t"].obsm["again"], sdata["t"].obsm[key])
    assert sdata["t"].uns["stgen"]["both"]["patch_um_given"] == "64"
    assert sdata["t"].uns["stgen"]["both"]["patch_px_given"] == 32
    assert sdata["t"].uns["stgen"]["um"]["patch_um_given"] == f"40, {1000 / 24!r}"


def test_texture_views_repeat():
    sdata = section()
    stgen.pp.embed(sdata, mpp=MPP, patch_um=128, views=8)
    views = sdata["t"].obsm["X_texture_views"]
    assert (views == views[:, :1]).all()


def test_several_models_keep_their_order():
    sdata = section()
    stgen.pp.embed(sdata, model=[mean_color, "texture"], mpp=MPP, patch_um=128, key_added="X")
    joined = sdata["t"].obsm["X"]
    stgen.pp.embed(sdata, model="texture", mpp=MPP, patch_um=128)
    stgen.pp.embed(sdata, model=mean_color, mpp=MPP, patch_um=128)
    table = sdata["t"]
    np.testing.assert_array_equal(joined, np.concatenate([table.obsm["X_mean_color"], table.obsm["X_texture"]], 1))
    assert table.uns["stgen"]["X"]["model"] == "mean_color+texture"


def test_result_and_record_survive_a_store(tmp_path, caplog):
    sdata = section()
    with caplog.at_level("INFO", logger="stgen"):
        stgen.pp.embed(sdata, model=mean_color, mpp=MPP, views=8)
    assert "obsm['X_mean_color'] and obsm['X_mean_color_views'], 3 features" in caplog.text
    sdata.write(tmp_path / "a.zarr")
    table = sd.read_zarr(tmp_path / "a.zarr")["t"]
    np.testing.assert_array_equal(table.obsm["X_mean_color_views"], sdata["t"].obsm["X_mean_color_views"])
    entry = table.uns["stgen"]["X_mean_color"]
    assert entry["function"] == "pp.embed"
    assert entry["patch_um"] == 112
    assert entry["patch_px"] == 224
    assert entry["image_mpp"] == MPP
    assert entry["n_features"] == 3
    assert entry["version"] == stgen.__version__


def test_anndata_with_the_visium_convention(tmp_path):
    image = stained(600, 600)[:, ::2, ::2].transpose(1, 2, 0)
    row, column = np.divmod(np.arange(36), 6)
    xy = np.column_stack([(column + 0.5 * (row % 2)) * 80 + 50, row * 69.28 + 60])
    adata = AnnData(np.ones((36, 2), np.float32))
    adata.obsm["spatial"] = xy
    factors = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 44.0}
    adata.uns["spatial"] = {"lib": {"images": {"hires": image}, "scalefactors": factors}}
    stgen.pp.embed(adata, model=mean_color, patch_um=50)
    assert adata.uns["stgen"]["X_mean_color"]["image_mpp"] == pytest.approx(2.5, rel=1e-4)
    # 50 µm are 20 pixels of the hires image
    x, y = np.round(xy[14] / 2).astype(int)
    expected = image[y - 10 : y + 10, x - 10 : x + 10].mean((0, 1)) / 255
    np.testing.assert_allclose(adata.obsm["X_mean_color"][14], expected, atol=0.02)
    result = adata.obsm.pop("X_mean_color")
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    copy = stgen.pp.embed(backed, model=mean_color, patch_um=50, copy=True)
    np.testing.assert_array_equal(copy.obsm["X_mean_color"], result)
    assert "X_mean_color" not in backed.obsm


# -- what is refused, and what stays as it was ------------------------------------------------------------------------
def test_copy_leaves_the_object_alone():
    sdata = section()
    copy = stgen.pp.embed(sdata, model=mean_color, mpp=MPP, copy=True)
    assert "X_mean_color" in copy["t"].obsm
    assert not sdata["t"].obsm
    assert "stgen" not in sdata["t"].uns
    assert copy["he"] is sdata["he"]


def test_existing_keys_need_overwrite():
    sdata = section()
    stgen.pp.embed(sdata, model=mean_color, mpp=MPP, views=8)
    before = sdata["t"].obsm["X_mean_color"].copy()
    with pytest.raises(ValueError, match=r"obsm\['X_mean_color'\] exists already. Pass overwrite=True"):
        stgen.pp.embed(sdata, model=mean_color, mpp=MPP)
    np.testing.assert_array_equal(sdata["t"].obsm["X_mean_color"], before)
    stgen.pp.embed(sdata, model=mean_color, mpp=MPP, patch_um=20, overwrite=True)
    assert not np.allclose(sdata["t"].obsm["X_mean_color"], before)
    # views of the earlier embedding would not match
    assert "X_mean_color_views" not in sdata["t"].obsm


def no_vector(x):
    return x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_key": "nope"}, KeyError, "no image 'nope'; found he"),
        ({"mpp": None}, ValueError, "Pass mpp="),
        ({"views": 4}, ValueError, "`views` must be 1 or 8"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"patch_um": -3}, ValueError, "`patch_um` must be positive"),
        ({"patch_px": 2.5}, ValueError, "`patch_px` must be a whole number"),
        ({"model": ""}, ValueError, "`model` must be text that is not empty"),
        ({"model": 3}, TypeError, "`model` must be"),
        ({"device": "warp"}, ValueError, "absent device 'warp'"),
        ({"model": no_vector}, ValueError, r"must return a tensor \(n, d\)"),
        ({"model": lambda x: x.mean((2, 3)) / 0 - x.mean((2, 3)) / 0}, ValueError, "NaN or infinite"),
    ],
)
def test_errors_leave_the_object_alone(arguments, error, message):
    sdata = section()
    with pytest.raises(error, match=message):
        stgen.pp.embed(sdata, **({"mpp": MPP} | arguments))
    assert not sdata["t"].obsm
    assert "stgen" not in sdata["t"].uns


def test_locations_off_the_image():
    sdata = section(xy=LOCATIONS + 1000)
    with pytest.raises(ValueError, match="4 of 4 locations lie outside the image"):
        stgen.pp.embed(sdata, mpp=MPP)
    assert not sdata["t"].obsm


def test_enlarged_patches_are_mentioned(caplog):
    stgen.pp.embed(section(), model=mean_color, mpp=8.0, patch_um=112)
    assert "carry less detail" in caplog.text


# -- encoders of lazyslide-models, behind a stand-in with the same interface ------------------------------------------
class Task(Enum):
    vision = "vision"
    multimodal = "multimodal"
    segmentation = "segmentation"


class TinyEncoder:
    """Has what ImageModel of lazyslide-models has: encode_image, get_transform, to, and what its registry adds."""

    task = Task.vision
    input_constraint = None
    img_size = (32, 32)
    weight = 1.0
    devices: list = []

    def to(self, device):
        self.devices.append(device)
        return self

    def get_transform(self):
        def transform(image):
            assert image.dtype == torch.uint8  # torchvision's ToDtype(scale=True) expects integers
            assert image.shape == (3, *self.img_size)
            return (image.float() / 255 - 0.5) / 0.25

        return transform

    def encode_image(self, image):
        with torch.inference_mode():
            return self.weight * image.mean((2, 3))


class Doubled(TinyEncoder):
    task = Task.multimodal
    weight = 2.0


class Large:
    """Says only in the registry what it needs, like TITAN, and preprocesses by itself, like Phikon."""

    task = [Task.multimodal, Task.segmentation]
    input_constraint = types.SimpleNamespace(min=48, max=None, divisible_by=None)

    def to(self, device):
        return self

    def get_transform(self):
        return None

    def encode_image(self, image):
        assert image.dtype == torch.uint8
        assert image.shape[1:] == (3, 48, 48)
        return (image / 255).mean((2, 3)).numpy()  # as numpy and as tensor: both occur


class Segmenter:
    task = Task.segmentation
    input_constraint = None


@pytest.fixture
def lazyslide(monkeypatch):
    module = types.ModuleType("lazyslide_models")
    module.MODEL_REGISTRY = {"uni": TinyEncoder, "conch": Doubled, "titan": Large, "instanseg": Segmenter}
    module.list_models = lambda task=None: [
        key
        for key, card in module.MODEL_REGISTRY.items()
        if task is None or Task(task) in (card.task if isinstance(card.task, list) else [card.task])
    ]
    monkeypatch.setitem(sys.modules, "lazyslide_models", module)
    return module


def test_encoders_are_concatenated_in_order(lazyslide):
    sdata = section()
    stgen.pp.embed(sdata, model="uni+conch", mpp=MPP, patch_um=64, views=8)
    both = sdata["t"].obsm["X_uni_conch"]
    assert both.shape == (4, 6)
    np.testing.assert_allclose(both[:, 3:], 2 * both[:, :3], rtol=1e-5)
    assert sdata["t"].obsm["X_uni_conch_views"].shape == (4, 8, 6)
    stgen.pp.embed(sdata, model=mean_color, mpp=MPP, patch_um=64, patch_px=32)
    np.testing.assert_allclose(both[:, :3], (sdata["t"].obsm["X_mean_color"] - 0.5) / 0.25, atol=0.01)
    entry = sdata["t"].uns["stgen"]["X_uni_conch"]
    assert entry["model"] == "uni+conch"
    assert entry["patch_px"] == "32, 32"


def test_encoders_without_transform_or_size(lazyslide):
    sdata = section()
    stgen.pp.embed(sdata, model="titan", mpp=MPP, patch_um=64)
    assert sdata["t"].uns["stgen"]["X_titan"]["patch_px"] == 48
    stgen.pp.embed(sdata, model=mean_color, mpp=MPP, patch_um=64, patch_px=48)
    np.testing.assert_allclose(sdata["t"].obsm["X_titan"], sdata["t"].obsm["X_mean_color"], atol=0.003)


def test_unknown_encoders_are_refused_with_similar_names(lazyslide):
    with pytest.raises(ValueError, match="no image encoder 'unni'; similar ones are uni"):
        stgen.pp.embed(section(), model="unni", mpp=MPP)
    with pytest.raises(ValueError, match="no image encoder 'instanseg'"):
        stgen.pp.embed(section(), model="instanseg", mpp=MPP)


def test_encoders_need_rgb(lazyslide):
    stains = np.concatenate([stained(), stained(seed=1)[:1]])
    with pytest.raises(ValueError, match="has 4 channels"):
        stgen.pp.embed(section(stains), model="uni", mpp=MPP)


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lazyslide_models", None)
    with pytest.raises(ImportError, match=r'pip install "stgen\[encoders\]"'):
        stgen.pp.embed(section(), model="uni", mpp=MPP)


def test_the_simulated_section():
    sdata = stgen.datasets.simulated_section(size_um=400)
    stgen.pp.embed(sdata, table_key="spot_counts", patch_um=(128, 256))
    table = sdata["spot_counts"]
    assert table.obsm["X_texture"].shape == (table.n_obs, 76)
    assert table.uns["stgen"]["X_texture"]["image_mpp"] == 1.0
