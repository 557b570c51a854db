"""Pictures that can be published: cropped, normalized, with samples, on one scale, with names that fit."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata
from spatialdata import SpatialData
from spatialdata.transformations import Scale

from stgen import pl, tl
from stgen._spatial.records import write_image

GENES = ["EPCAM", "CD3E"]
BIN_UM = 10.0
BINS = {"um": Scale([BIN_UM, BIN_UM], ("x", "y"))}


@pytest.fixture(scope="module")
def mapped(simulated) -> SpatialData:
    sdata = spatialdata.deepcopy(simulated)
    tl.superresolve(sdata, "he", GENES, low_res="spot_counts", bin_um=20, keep_samples=True, progress=False)
    return sdata


@pytest.fixture
def lonely() -> SpatialData:
    """A map of 60 x 80 bins with tissue in rows 20 to 39 and columns 10 to 49, and a bright rim around it."""
    values = np.full((2, 60, 80), np.nan, np.float32)
    values[:, 20:40, 10:50] = np.random.default_rng(0).random((2, 20, 40))
    values[1] *= 100
    sdata = SpatialData()
    write_image(sdata, "map", values, channels=["A", "B"], transformations=BINS)
    return sdata


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def drawn(ax) -> np.ndarray:
    return np.ma.filled(np.ma.asarray(ax.images[-1].get_array(), float), np.nan)


def test_panels_end_with_the_tissue(lonely):
    ax = pl.maps(lonely, "A", keys="map")[0, 0]
    left, right, bottom, top = (*ax.get_xlim(), *ax.get_ylim())
    margin = BIN_UM * (0.02 * 39 + 1)
    np.testing.assert_allclose([left, right, top, bottom], [100 - margin, 500 + margin, 200 - margin, 400 + margin])
    whole = pl.maps(lonely, "A", keys="map", bounds_um=(0, 0, 800, 600))[0, 0]
    np.testing.assert_allclose((*whole.get_xlim(), *whole.get_ylim()), (0, 800, 600, 0))


def test_the_rim_does_not_set_the_colors():
    values = np.full((1, 200, 200), 1.0, np.float32) * np.linspace(1, 2, 200)[:, None]
    values[:, :3] = values[:, -3:] = values[:, :, :3] = values[:, :, -3:] = 50
    padded = np.pad(values, ((0, 0), (50, 50), (50, 50)), constant_values=np.nan)
    sdata = SpatialData()
    write_image(sdata, "map", padded, channels=["A"], transformations=BINS)
    low, high = pl.maps(sdata, "A", keys="map")[0, 0].images[-1].get_clim()
    assert 1 <= low < high <= 2


def test_normalized_maps_are_counts_per_10000_of_all_genes(mapped):
    axes = pl.maps(mapped, GENES, keys="superresolved", low_res="spot_counts", normalize=True)
    assert [ax.get_title() for ax in axes[0]] == ["measured\n55 µm spots", "superresolved", "spread"]
    total = mapped["superresolved_total"].values[0]
    table = mapped["spot_counts"]
    shares = 1e4 * table.X.toarray() / np.asarray(table.X.sum(1)).reshape(-1, 1)
    for row, gene in zip(axes, GENES, strict=True):
        np.testing.assert_allclose(
            row[0].collections[0].get_array(), shares[:, table.var_names.get_loc(gene)], rtol=1e-5
        )
        for ax, key in ((row[1], "superresolved"), (row[2], "superresolved_std")):
            expected = 1e4 * mapped[key].sel(c=gene).values / total
            np.testing.assert_allclose(drawn(ax)[np.isfinite(drawn(ax))], expected[np.isfinite(expected)], rtol=1e-4)
    labels = {ax.get_ylabel() for ax in axes[0, 0].figure.axes}
    assert {"counts per 10,000", "SD, counts per 10,000"} <= labels


def test_two_samples_stand_beside_the_mean(mapped):
    axes = pl.maps(mapped, GENES, keys="superresolved", panels=["predicted", "samples"])
    assert [ax.get_title() for ax in axes[0]] == ["superresolved", "sample 1", "sample 2"]
    for row, gene in zip(axes, GENES, strict=True):
        assert len({ax.images[-1].get_clim() for ax in row}) == 1
        for number in (0, 1):
            sample = mapped["superresolved_samples"].sel(c=f"{gene}:{number}").values
            np.testing.assert_allclose(
                drawn(row[1 + number])[np.isfinite(drawn(row[1]))], sample[np.isfinite(sample)], rtol=1e-6
            )


def test_colors_are_shared_on_request(lonely):
    axes = pl.maps(lonely, ["A", "B"], keys="map")
    alone = [ax.images[-1].get_clim() for ax in axes[:, 0]]
    assert alone[1][1] > 50 * alone[0][1]
    assert len(axes[0, 0].figure.axes) == 4  # a bar each
    axes = pl.maps(lonely, ["A", "B"], keys="map", share_colors=True)
    assert len({ax.images[-1].get_clim() for ax in axes[:, 0]}) == 1
    assert len(axes[0, 0].figure.axes) == 3


def test_long_names_fit_and_ids_have_their_symbols(mapped):
    sdata = spatialdata.deepcopy(mapped)
    symbols = pd.Series(sdata["spot_counts"].var_names.to_list(), sdata["spot_counts"].var_names)
    symbols["EPCAM"] = "A gene with a name of fifty letters and no symbol"
    sdata["spot_counts"].var["gene_symbols"] = symbols
    axes = pl.maps(sdata, GENES, keys="superresolved", low_res="spot_counts")
    axes[0, 0].figure.canvas.draw()
    for ax, name in zip(axes[:, 0], symbols[GENES], strict=True):
        assert ax.get_ylabel() == name
        assert ax.yaxis.label.get_window_extent().height <= 1.02 * ax.get_window_extent().height


def test_genes_that_follow_depth_say_so(mapped):
    sdata = spatialdata.deepcopy(mapped)
    sdata["superresolved_out_of_fold"].var["trusted"] = [False, True]
    titles = [ax.get_title() for ax in pl.maps(sdata, GENES, keys="superresolved", panels=["predicted"])[:, 0]]
    assert titles == ["superresolved\nshare not predictable,\ncounts follow depth", ""]


def test_what_cannot_be_drawn_is_said(mapped, lonely):
    with pytest.raises(KeyError, match="map_total"):
        pl.maps(lonely, "A", keys="map", normalize=True)
    with pytest.raises(ValueError, match="no sdata.images\\['map_samples'\\]; pass keep_samples=True"):
        pl.maps(lonely, "A", keys="map", panels=["samples"])
