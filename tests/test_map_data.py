from __future__ import annotations

from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from stgen.data import MapData, MapInputs, StepSampler, dihedral, low_resolution_input
from stgen.measurement import Measurement

FACTOR, PX = 4, 2


def section(height=24, width=32, n_genes=2, seed=0, unknown=None):
    """A section whose image is its map in full resolution: the mean of a bin's pixels is the bin's count, gene by gene."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (n_genes, height, width)).astype(np.float32)
    rows, columns = -(-height // FACTOR), -(-width // FACTOR)
    padded = np.pad(counts, ((0, 0), (0, rows * FACTOR - height), (0, columns * FACTOR - width)))
    low = padded.reshape(n_genes, rows, FACTOR, columns, FACTOR).sum((2, 4))
    pixels = counts.repeat(PX, 1).repeat(PX, 2)
    texture = np.tile(rng.normal(size=(PX, PX)), (height, width))
    pixels = pixels + texture - texture[:PX, :PX].mean()
    if unknown is not None:
        counts[:, unknown[0], unknown[1]] = np.nan

    def image(y0, x0, height, width):
        y = np.clip(np.arange(y0 * PX, (y0 + height) * PX), 0, pixels.shape[1] - 1)
        x = np.clip(np.arange(x0 * PX, (x0 + width) * PX), 0, pixels.shape[2] - 1)
        return pixels[:, y[:, None], x]

    return MapInputs(np.isfinite(counts[0]), image=image, measurement=Measurement.from_map(low, FACTOR), truth=counts)


def blocks(x, side=FACTOR):
    """Sums over blocks."""
    return F.avg_pool2d(x, side) * side**2


# ---- what moves with what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", range(8))
def test_map_low_resolution_map_and_image_move_together(view):
    data = MapData([section()], tile=16, kernel="nearest", stride=FACTOR)
    for i in (0, 1, len(data) - 1):
        item = data[i, view]
        counts = item["x"].expm1()
        torch.testing.assert_close(F.avg_pool2d(item["h"], PX), counts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(blocks(item["y"].expm1()), blocks(counts), rtol=1e-4, atol=1e-3)
        for name in ("x", "y", "h", "valid", "tissue"):
            assert torch.equal(item[name], dihedral(data[i][name], view))
            assert item[name].is_contiguous()


def test_views_differ():
    data = MapData([section()], tile=16)
    assert len({data[0, view]["x"].numpy().tobytes() for view in range(8)}) == data.n_views == 8
    assert torch.equal(data[0]["x"], data[0, 0]["x"])


def test_shapes_and_scale():
    sections = [section(seed=0), section(seed=1)]
    data = MapData(sections, tile=16, transform="log2p1_raw")
    item = data[len(data) - 1]
    assert {name: tuple(value.shape) for name, value in item.items()} == {
        "index": (), "x": (2, 16, 16), "tissue": (1, 16, 16), "h": (2, 32, 32), "y": (2, 16, 16), "valid": (1, 16, 16),
    }  # fmt: skip
    assert {value.dtype for name, value in item.items() if name != "index"} == {torch.float32}
    number, y, x = data.corners[-1]
    assert number == 1
    np.testing.assert_allclose(item["x"], np.log2(sections[1].truth[:, y : y + 16, x : x + 16] + 1), rtol=1e-6)
    low = low_resolution_input(sections[1].measurement, y, x, 16, 16, "log2p1_raw")
    assert torch.equal(low["y"], item["y"])
    assert torch.equal(low["valid"], item["valid"])


def test_low_resolution_input_is_the_interpolated_density():
    measurement = section().measurement
    density, valid = measurement.interpolate(-2, 3, 10, 12, "linear")
    found = low_resolution_input(measurement, -2, 3, 10, 12, "log1p_raw", "linear")
    np.testing.assert_allclose(found["y"], np.log1p(density), rtol=1e-6)
    np.testing.assert_array_equal(found["valid"], valid)


# ---- which tiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("min_tissue", [0.05, 0.5, 1.0])
def test_tiles_are_all_those_with_enough_tissue(stride, min_tissue):
    part = section(21, 30)
    part.tissue[:] = np.random.default_rng(1).random((3, 5)).repeat(7, 0).repeat(6, 1) < 0.7
    data = MapData([part], tile=8, stride=stride, min_tissue=min_tissue)
    rows, columns = ({*range(0, n - 8 + 1, stride), n - 8} for n in (21, 30))
    expected = {
        (0, y, x) for y in rows for x in columns if part.tissue[y : y + 8, x : x + 8].mean() >= min_tissue
    }  # the last row and column of tiles ends with the section
    assert {tuple(corner) for corner in data.corners.tolist()} == expected
    assert len(data) == len(expected)


def test_tiles_of_several_sections():
    data = MapData([section(16, 16), section(24, 16, seed=1)], tile=16, stride=4)
    assert data.corners.tolist() == [[0, 0, 0], [1, 0, 0], [1, 4, 0], [1, 8, 0]]
    assert [int(data[i]["index"]) for i in range(4)] == [0, 1, 2, 3]
    assert not torch.equal(data[0]["x"], data[1]["x"])


def test_same_tissue_is_seen_at_many_offsets():
    assert len(MapData([section(48, 48)], tile=32)) == 81  # every two bins


def test_no_tissue_no_tiles():
    part = section()
    part.tissue[:] = False
    data = MapData([part], tile=16)
    assert len(data) == 0
    assert data.fingerprint() == []
    assert list(data.some(5)) == []


def test_section_smaller_than_a_tile_is_padded():
    part = section(12, 16)
    data = MapData([part], tile=16)
    assert data.corners.tolist() == [[0, 0, 0]]
    item = data[0]
    assert item["x"].shape == item["y"].shape == (2, 16, 16)
    assert item["h"].shape == (2, 32, 32)
    assert (item["tissue"][:, :12] == 1).all()
    assert (item["tissue"][:, 12:] == 0).all()
    assert (item["x"][:, 12:] == 0).all()
    np.testing.assert_allclose(item["x"][:, :12], np.log1p(part.truth), rtol=1e-6)
    turned = data[0, 1]
    assert (turned["tissue"][:, :, 12:] == 0).all()
    assert turned["tissue"].sum() == 12 * 16


def test_too_little_of_a_tile():
    assert len(MapData([section(7, 16)], tile=16)) == 0  # less than half of a tile
    assert len(MapData([section(7, 16)], tile=16, min_tissue=0.4)) == 1


def test_unknown_bins_are_masked_out():
    part = section(unknown=(slice(4, 9), slice(2, 5)))
    part.truth[1, 12, 12] = np.nan  # one gene is enough
    item = MapData([part], tile=16)[0]
    masked = item["tissue"][0] == 0
    assert masked[4:9, 2:5].all()
    assert masked[12, 12]
    assert masked.sum() == 16
    assert (item["x"][:, masked] == 0).all()
    assert all(torch.isfinite(value).all() for value in item.values())


def test_held_out_bins_are_masked_out():
    part = section()
    part.tissue[:, :5] = False
    item = MapData([part], tile=16)[0]
    assert (item["tissue"][:, :, :5] == 0).all()
    assert (item["x"][:, :, :5] == 0).all()
    assert (item["y"][:, :, :5] > 0).any()  # what was measured there is known all the same


def test_section_without_low_resolution_data():
    part = section()
    without = MapInputs(part.tissue, image=part.image, truth=part.truth)
    data = MapData([part, without], tile=16, stride=8)
    n = len(data) // 2
    one, two = data[1, 3], data[n + 1, 3]
    for name in ("x", "h", "tissue"):
        assert torch.equal(one[name], two[name])
    for name in ("y", "valid"):
        assert one[name].abs().max() > 0
        assert (two[name] == 0).all()
        assert two[name].shape == one[name].shape
    batch = next(iter(DataLoader(data, batch_size=2 * n)))
    assert batch["valid"].flatten(1).any(1).tolist() == [True] * n + [False] * n
    assert MapData([part], tile=16).fingerprint() != MapData([without], tile=16).fingerprint()


def test_lazy_maps_give_the_same():
    part = section(unknown=(slice(4, 9), slice(2, 5)))
    lazy = MapInputs(
        part.tissue, image=part.image, measurement=part.measurement, truth=da.from_array(part.truth, chunks=(1, 8, 8))
    )
    for name, value in MapData([lazy], tile=16)[3, 5].items():
        assert torch.equal(value, MapData([part], tile=16)[3, 5][name])


# ---- order and identity ---------------------------------------------------------------------------------------------


def test_training_order():
    data = MapData([section()], tile=16)
    sampler = StepSampler(len(data), data.n_views, batch_size=3, start=0, stop=4, seed=0)
    batches = list(DataLoader(data, batch_sampler=sampler))
    assert [tuple(batch["x"].shape) for batch in batches] == [(3, 2, 16, 16)] * 4
    for batch, rows in zip(batches, sampler, strict=True):
        assert batch["index"].tolist() == [row for row, _ in rows]
        assert torch.equal(batch["h"][1], data[rows[1]]["h"])


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_some_tiles_are_spread_evenly(n):
    data = MapData([section()], tile=16, stride=1)
    index = [int(batch["index"]) for batch in data.some(n)]
    assert len(index) == min(n, len(data))
    assert index[0] == 0
    assert n == 1 or index[-1] == len(data) - 1
    assert len(index) < 3 or max(np.diff(index)) - min(np.diff(index)) <= 1
    batch = next(data.some(n))
    assert batch["x"].shape == (1, 2, 16, 16)
    assert torch.equal(batch["x"][0], data[0]["x"])


def test_fingerprint_tells_data_apart():
    def of(part, **options):
        return MapData([part], **{"tile": 16, **options}).fingerprint()

    first = of(section())
    assert first == of(section())
    plain = section()
    other = replace(plain, measurement=plain.measurement.with_counts(plain.measurement.counts + 1))
    bright = replace(plain, image=lambda *window: plain.image(*window) + 1)
    masked = section(unknown=(0, slice(0, 3)))
    different = [
        of(section(seed=1)),
        of(other),
        of(bright),
        of(masked),
        of(section(), tile=12),
        of(section(), kernel="nearest"),
    ]
    assert len({tuple(f) for f in [first, *different]}) == 7
    assert all(isinstance(entry, str) for entry in first)
