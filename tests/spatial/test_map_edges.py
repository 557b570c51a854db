"""Maps at the edges: of tissue, of what a network can take, of what an argument may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spatialdata import SpatialData
from spatialdata.transformations import Scale

import stgen.train
from stgen import tl
from stgen._spatial.records import provenance, record, write_image
from stgen.measurement import Consistency, Footprints, Measurement
from stgen.models import DiffST, Interpolate, RegressionUNet
from stgen.pp import degrade

GENES = ["A", "B"]
SMALL = {"width": 8, "widths": [8, 8], "mean_widths": [8, 8], "px_per_bin": 1}
KEYS = {"map_key": "counts", "image_key": "he"}
QUICK = {"steps": 1, "batch_size": 1, "device": "cpu", "progress": False}


def section(height, width):
    sdata, rng = SpatialData(), np.random.default_rng(0)
    system = {"um": Scale([10, 10], ("x", "y"))}
    write_image(
        sdata, "counts", rng.poisson(2.0, (2, height, width)).astype(float), channels=GENES, transformations=system
    )
    record(sdata, "counts", provenance("pp.rasterize", bin_um=10.0, unit="counts per bin"))
    write_image(
        sdata,
        "he",
        rng.random((3, height * 2, width * 2)),
        channels=["r", "g", "b"],
        transformations={"um": Scale([5, 5], ("x", "y"))},
    )
    return sdata


@pytest.mark.parametrize("bin_um", [5.0, 8.0, 10.0, 12.0, 15.0, 16.0, 20.0, 25.0, 30.0, 50.0, 100.0])
def test_bins_of_any_size(bin_um):
    model = DiffST(GENES, bin_um=bin_um, **{**SMALL, "region": 4})
    side = model.align * max(2, 48 // model.align)
    batch = {
        "h": torch.rand(1, 3, side, side),
        "y": torch.rand(1, 2, side, side),
        "valid": torch.ones(1, 1, side, side),
    }
    assert model.sample(batch, 1, 1).shape == (1, 1, 2, side, side)


@pytest.mark.parametrize("bin_um", [8.0, 10.0, 12.0, 20.0])
def test_paper_preset_with_bins_of_any_size(bin_um):
    with torch.device("meta"):
        model = DiffST(GENES, bin_um=bin_um, preset="paper", px_per_bin=1)
        side = model.align
        assert abs(side * bin_um - 2560) < 0.1 * 2560
        batch = {
            "h": torch.rand(1, 3, side, side),
            "y": torch.rand(1, 2, side, side),
            "valid": torch.ones(1, 1, side, side),
        }
        assert model.condition(batch)["features"].shape[2:] == (side, side)


def test_paper_preset_over_a_regression():
    assert DiffST(GENES, preset="paper", residual=True, width=8, widths=[8, 8], region=4, bin_um=160.0).mean is not None


def test_section_smaller_than_a_tile_can_be_fitted():
    model = RegressionUNet(GENES, widths=[8, 8], px_per_bin=1)
    assert tl.fit(model, section(100, 200), **KEYS, tile=168, validation=0, **QUICK).fitted


def test_fitted_model_on_another_device_can_be_fitted_again(monkeypatch):
    monkeypatch.setattr(stgen.train, "fit", lambda *_, **__: {})
    model = DiffST(GENES, **SMALL).to("meta")  # stands in for a GPU
    assert tl.fit(model, section(32, 32), **KEYS, tile=16, **QUICK).fitted


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (512, "takes tiles of 256 x 256 bins and no others, found 512 x 512"),
        (32.0, "`tile` must be a whole number or None, found 32.0"),
    ],
)
def test_tile_is_checked_before_any_work(tile, message, monkeypatch):
    model = DiffST(GENES, preset="paper", graph=False, hierarchy=False, **SMALL)
    monkeypatch.setattr(DiffST, "fit", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        tl.fit(model, section(512, 512), **KEYS, tile=tile, **QUICK)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DiffST, {"scale": "minmax"}, "`scale` must be one of 'std', 'quantile', 'map', found 'minmax'"),
        (DiffST, {"prediction": "eps"}, "`prediction` must be one of 'epsilon', 'x_0', 'v', found 'eps'"),
        (DiffST, {"px_per_bin": 0}, "`px_per_bin` must be a whole number of at least 1, found 0"),
        (Interpolate, {"kernel": "bilinear"}, "`kernel` must be one of .*, found 'bilinear'"),
    ],
)
def test_misspelled_choices(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(GENES, **options)


def test_toward_never_moves_away():
    """A footprint whose estimate sums to less than zero is scaled away from its measurement."""
    agree = Consistency(Measurement.from_map(np.array([[[6.0, 6.0]]]), 2), 0, 0, 2, 4)
    counts = torch.tensor([[[[-1.0, 0.5, 1, 1], [-1.0, 0.5, 1, 1]]]])  # sums: -1 and 4, measured: 6 and 6
    before, after = (x[0, 0].unflatten(1, (2, 2)).sum((0, 2)) for x in (counts, agree.toward(counts)))
    assert ((after - 6).abs() <= (before - 6).abs()).all(), after


def test_blocks_at_the_edge_of_tissue_keep_their_density():
    sdata = section(40, 40)
    counts = np.ones((2, 40, 40))
    counts[:, :, 33:] = np.nan
    write_image(sdata, "ones", counts, channels=GENES, transformations={"um": Scale([10, 10], ("x", "y"))})
    record(sdata, "ones", provenance("pp.rasterize", bin_um=10.0, unit="counts per bin"))
    degrade(sdata, map_key="ones", factor=10)
    for consistency in (True, False):
        model = Interpolate(GENES, kernel="nearest")
        done = tl.superresolve(
            sdata, model=model, low_res="ones_10x", consistency=consistency, copy=True, progress=False
        )
        np.testing.assert_allclose(np.asarray(done.images["superresolved"]), 1, rtol=1e-5)
    scores = tl.evaluate(done, key="superresolved", truth_key="ones", low_res="ones_10x")
    assert scores.summary["residual_max"] < 1e-4


def test_cubic_interpolation_of_spots_with_gaps_stays_in_range():
    rng = np.random.default_rng(0)
    row, column = np.meshgrid(np.arange(12), np.arange(10), indexing="ij")
    centers = np.column_stack([row.ravel() * 8.66 + 5, (column + 0.5 * (row % 2)).ravel() * 10.0 + 5])
    centers = centers[rng.random(len(centers)) > 0.1]
    counts = rng.gamma(5.0, 5.0, (len(centers), 1))
    spots = Measurement(Footprints(centers, 5.5, "disc", np.full(len(centers), np.pi * 2.75**2)), counts)
    density, valid = spots.interpolate(0, 0, 104, 104, "cubic")
    assert density.max() < 2 * spots.density.max()
    assert (density[:, valid[0] > 0] > 0).mean() > 0.99


@pytest.mark.parametrize(("side", "blocks"), [(4.0, 4), (4.0000001, 4), (1.6, None), (0.8, None)])
def test_blocks_are_whole_squares_of_the_grid(side, blocks):
    centers = (np.arange(5)[:, None] + 0.5) * np.array([side, side])
    assert (
        Measurement(Footprints(centers, side, "square", np.full(5, side**2)), np.ones((5, 1))).footprints.blocks
        == blocks
    )
    moved = Measurement(Footprints(centers + 0.5, side, "square", np.full(5, side**2)), np.ones((5, 1)))
    assert moved.footprints.blocks is None
