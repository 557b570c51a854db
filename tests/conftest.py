from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network

import numpy as np
import pytest
import torch

from stgen.data import SpotData

torch.set_num_threads(1)  # the models of the tests are so small that a second thread costs more than it brings


@pytest.fixture(autouse=True)
def one_thread():
    """Takes back the number of threads that numba, where a test runs it, sets for torch too."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def simulated():
    """A small simulated section (600 µm, 32 spots). Shared by all tests: look, don't touch."""
    from stgen import datasets

    return datasets.simulated_section(seed=3, size_um=600)


@pytest.fixture
def sdata(simulated):
    """A copy of ``simulated`` that the test may change."""
    import spatialdata

    return spatialdata.deepcopy(simulated)


@pytest.fixture
def normalized(sdata):
    """As ``sdata``, but X of the spots is normalized and their counts are the layer "counts"."""
    table = sdata["spot_counts"]
    table.layers["counts"] = table.X.copy()
    table.X = table.X.log1p()
    return sdata


@pytest.fixture(scope="session")
def spots():
    """72 locations in 6 groups: 5 features, 4 genes that depend linearly on them, and noise of known size."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(72, 5))
    x = 1 + h @ rng.normal(size=(5, 4)) + 0.3 * rng.normal(size=(72, 4))
    return SpotData(x, h, np.repeat(np.arange(6), 12))


@pytest.fixture
def untouched_rng():
    """Fails the test if it moved the global random states of torch or numpy."""
    before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1][1], np.random.get_state()[1])  # noqa: NPY002
