"""A family of somebody else: twenty lines here, and nothing elsewhere knows of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stgen import models, pp, tl
from stgen.diffusion import Diffusion
from stgen.models._layers import ImageStem, UNet, timestep_embedding
from stgen.models._maps import GeneScale, ImageScale

GENES = ["EPCAM", "COL1A1", "ACTB"]


class FifthFamily(models.MapDiffusionModel):
    """A U-Net that denoises the map, given image and low-resolution map."""

    def __init__(
        self, genes, *, factor=10, bin_um=10.0, image_channels=3, px_per_bin=2, transform="log1p_raw", width=8
    ):
        super().__init__(
            genes=genes, factor=factor, bin_um=bin_um, image_channels=image_channels, px_per_bin=px_per_bin,
            transform=transform, width=width,
        )  # fmt: skip
        self.place_windows(2)
        self.diffusion, n_genes = Diffusion(prediction="v"), len(self.genes)
        self.image_scale, self.gene_scale = ImageScale(image_channels), GeneScale(n_genes, "std")
        self.stem, self.time = ImageStem(image_channels, width, px_per_bin), nn.Linear(32, 4 * width)
        self.unet = UNet(width + 2 * n_genes + 1, n_genes, [width, width], 4 * width)
        self.initialize()

    def condition(self, batch):
        scale = self.gene_scale.of(batch["y"]).expand(len(batch["y"]), -1, -1, -1)
        seen = [self.stem(self.image_scale(batch["h"])), batch["y"] / scale, batch["valid"]]
        return {"scale": scale, "features": torch.cat(seen, 1)}

    def denoise(self, x_t, t, cond):
        return self.unet(torch.cat([x_t, cond["features"]], 1), self.time(timestep_embedding(t, 32)))


@pytest.fixture(scope="module")
def section(simulated):
    import spatialdata

    sdata = spatialdata.deepcopy(simulated)
    pp.rasterize(sdata, genes=GENES)
    pp.degrade(sdata, map_key="counts", factor=5)
    return sdata


@pytest.fixture(scope="module")
def model(section):
    torch.manual_seed(0)
    options = {"tile": 16, "steps": 20, "batch_size": 4, "lr": 5e-3, "device": "cpu", "progress": False}
    return tl.fit(FifthFamily(GENES, factor=5), section, map_key="counts", image_key="he", **options)


def test_it_trains(model):
    assert model.record["history"]["step"][-1] == 20
    assert float(model.gene_scale.scale.min()) != 1
    assert any(p.abs().max() > 0 for p in model.unet.leave.parameters())  # which begins at zero


def test_it_samples(model):
    batch = {"h": torch.rand(2, 3, 32, 32), "y": torch.rand(2, 3, 16, 16), "valid": torch.ones(2, 1, 16, 16)}
    noise = torch.randn(2, 3, 3, 16, 16)
    drawn = model.sample(batch, 3, 2, noise=lambda: noise)
    assert drawn.shape == (2, 3, 3, 16, 16)
    assert torch.equal(model.sample(batch, 3, 2, noise=lambda: noise), drawn)
    assert drawn.std(1).min() > 0


def test_it_superresolves_and_comes_back_from_the_disk(model, section, tmp_path):
    restored = models.load(model.save(tmp_path))
    assert type(restored) is FifthFamily
    assert restored.config == model.config
    maps = []
    for one in (model, restored, tmp_path):
        sdata = tl.superresolve(
            section, model=one, image_key="he", low_res="counts_5x",
            n_samples=2, steps=2, device="cpu", progress=False, copy=True,
        )  # fmt: skip
        maps.append(np.asarray(sdata["superresolved"].data))
    assert maps[0].shape == (3, *section["counts"].shape[1:])
    assert np.isfinite(maps[0]).any()
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])


def test_two_classes_of_one_name(model, tmp_path):
    """Of the same module, the last defined counts (a cell of a notebook that ran twice); of two modules, neither."""
    model.save(tmp_path)
    again = type("FifthFamily", (FifthFamily,), {"__module__": FifthFamily.__module__})
    assert type(models.load(tmp_path)) is again
    other = type("FifthFamily", (FifthFamily,), {"__module__": "elsewhere"})
    with pytest.raises(
        ValueError, match=r"several modules define a model 'FifthFamily': .*FifthFamily\.load\(folder\)"
    ):
        models.load(tmp_path)
    assert type(other.load(tmp_path)) is other
