"""One image in many containers gives one result. benchmarks/pixel_values.py prints the figures of a larger section."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pixel_values.py"
spec = importlib.util.spec_from_file_location("pixel_values_benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.fixture(scope="module")
def found():
    """Results by name of the variant, each made once."""
    he, section = benchmark.simulated(size_um=340)
    made = {}

    def results(name):
        if name not in made:
            made[name] = benchmark.results(he, section, benchmark.VARIANTS[name])
        return made[name]

    return results


EXACT = [
    "uint16, 8 bits",
    "uint16, 16 bits",
    "float32, to 1",
    "float32, to 255",
    "float32, to 65,535",
    "opacity, all opaque",
]
PLACED = ["turned", "mirrored"]


@pytest.mark.parametrize("name", EXACT)
def test_the_type_and_range_of_an_image_make_no_difference(found, name):
    new, plain = found(name), found("plain")
    np.testing.assert_allclose(new["map"], plain["map"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(new["embedding"], plain["embedding"], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(new["tiles"], plain["tiles"])
    assert (new["nuclei"] != plain["nuclei"]).mean() < 1e-3


def test_12_of_16_bits_differ_by_their_rounding_only(found):
    """16 x 255 is 15 less than what 12 bits hold: the image is 0.4 % darker."""
    difference = benchmark.differences(found("uint16, 12 bits"), found("plain"))
    assert difference["map_rms"] < 0.01
    assert difference["embedding_rms"] < 0.05
    assert difference["nuclei_iou"] > 0.99
    assert difference["tiles_number"] == 0


def test_a_pyramid_makes_no_difference_but_rounding(found):
    difference = benchmark.differences(found("pyramid"), found("plain"))
    assert difference["map_r"] > 0.98
    assert difference["embedding_rms"] < 0.1
    assert (difference["map_bins"], difference["nuclei_iou"], difference["tiles_number"]) == (0, 1, 0)


@pytest.mark.parametrize("name", PLACED)
def test_turned_and_mirrored_images_give_what_lies_in_their_place(found, name):
    difference = benchmark.differences(found(name), found("plain"))
    assert difference["map_rms"] < 1e-3
    assert difference["map_bins"] < 0.01
    assert difference["embedding_rms"] < 1e-3
    assert difference["nuclei_iou"] > 0.995
    assert difference["tiles_number"] < 0.1
    assert difference["tiles_shared"] > 0.9


@pytest.mark.parametrize("name", ["transparent border", "NaN border"])
def test_what_shows_nothing_is_glass(found, name):
    difference = benchmark.differences(found(name), found("white border"))
    assert difference["map_rms"] < 1e-3
    assert difference["embedding_rms"] < 1e-3
    assert difference["nuclei_iou"] > 0.999
    assert difference["tiles_number"] < 0.05  # those whose middle lies on the border of what is known
    assert difference["tiles_shared"] > 0.95


def test_no_map_where_the_image_is_not_known(found):
    known = np.isfinite(found("NaN border")["map"][0])
    width = round(benchmark.BORDER_UM / 10)
    assert known[width:-width, width:-width].mean() > 0.95
    known[width:-width, width:-width] = False
    assert not known.any()
    assert np.isfinite(found("NaN border")["embedding"]).all()
