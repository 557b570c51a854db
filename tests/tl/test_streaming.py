"""A result that is streamed to a store: killed, interrupted, made twice at once, and on a full disk."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from spatialdata import SpatialData, read_zarr

import stgen
from stgen.models import Interpolate
from stgen.tl.superresolution import streaming
from stgen.tl.superresolution.result import MapResult
from stgen.tl.superresolution.streaming import WorkFolder

GENES = ["EPCAM", "COL1A1"]
SUFFIXES = {"model": ("",), "section": ("", "_std", "_total")}
WINDOWS = 4
KILLED = -signal.SIGKILL

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is killed like that")


def section():
    sdata = stgen.datasets.simulated_section(seed=1, size_um=600, mpp=4.0, n_genes=6)
    stgen.pp.rasterize(sdata, genes=GENES, bin_um=10, bounds_um=(0, 0, 600, 600))
    stgen.pp.degrade(sdata, map_key="counts", factor=5)
    return sdata


def stream(sdata, store, kind="model", **options):
    """Maps in four windows, of a model or from the section alone."""
    chosen = {"progress": False, "device": "cpu", "tile": 30, "store": store}
    if kind == "model":
        chosen |= {"model": Interpolate(GENES, factor=5), "low_res": "counts_5x"}
    else:
        chosen |= {"image_key": "he", "genes": GENES, "low_res": "spot_counts", "n_samples": 2}
    stgen.tl.superresolve(sdata, **chosen | options)
    return sdata


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(owner, name, n):
    """Die after the n-th call."""
    call, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        result = call(*args, **kwargs)
        calls.append(name)
        if len(calls) == n:
            kill()
        return result

    setattr(owner, name, counted)


def no_exchange():
    """As where folders cannot change places at once."""
    streaming.ctypes.CDLL = lambda _: None


MOMENTS = {
    "second window": lambda: kill_after(MapResult, "set_done", 2),
    "last window": lambda: kill_after(MapResult, "set_done", WINDOWS),
    "within a window": lambda: kill_after(MapResult, "put", 3),
    "arrays": lambda: kill_after(MapResult, "_array", 1),
    "store is written": lambda: kill_after(SpatialData, "write", 1),
    "before the swap": lambda: kill_after(streaming, "_write_json", 2),
    "after the swap": lambda: kill_after(WorkFolder, "publish", 1),
    "within the swap": lambda: (no_exchange(), kill_after(Path, "rename", 1)),
    "late in the swap": lambda: (no_exchange(), kill_after(Path, "rename", 2)),
}


def in_child(moment, kind, store, **options):
    """Stream in a process that dies at that moment; return how it ended."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_streaming as t; s = t.section(); "
        f"t.MOMENTS.get({moment!r}, lambda: None)(); t.stream(s, {str(store)!r}, {kind!r}, **{options!r})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def values_of(sdata, kind):
    return [np.asarray(sdata.images[f"superresolved{suffix}"].data) for suffix in SUFFIXES[kind]]


def check_same(sdata, expected, kind="model"):
    for found, value in zip(values_of(sdata, kind), values_of(expected, kind), strict=True):
        np.testing.assert_array_equal(found, value)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {kind: stream(section(), folder / f"{kind}.zarr", kind) for kind in ("model", "section")}


@pytest.fixture
def made(monkeypatch):
    """How many windows are made."""
    windows, put = [], MapResult.put

    def counted(self, maps, kept, y, x, genes=slice(None)):
        windows.append((y, x))
        put(self, maps, kept, y, x, genes)

    monkeypatch.setattr(MapResult, "put", counted)
    return windows


@pytest.mark.parametrize(
    ("moment", "kind", "left"),
    [
        ("second window", "model", 2), ("within a window", "model", 2), ("arrays", "model", 4), ("second window", "section", 2),
        ("last window", "section", 0), ("store is written", "model", 0), ("before the swap", "model", 0),
    ],
)  # fmt: skip
def test_a_killed_call_goes_on_to_the_same_bits(uninterrupted, made, tmp_path, caplog, moment, kind, left):
    store = tmp_path / "maps.zarr"
    assert in_child(moment, kind, store).returncode == KILLED
    assert names_in(tmp_path) == [".maps.zarr.part"]
    with caplog.at_level(logging.INFO, "stgen"):
        again = stream(section(), store, kind)
    assert len(made) == left
    assert ("going on with" in caplog.text) == (left < WINDOWS)
    check_same(again, uninterrupted[kind], kind)
    check_same(read_zarr(store), uninterrupted[kind], kind)
    if kind == "section":
        table, whole = again["superresolved_out_of_fold"], uninterrupted[kind]["superresolved_out_of_fold"]
        np.testing.assert_array_equal(table.X, whole.X)
        assert table.var.equals(whole.var)
    assert again.attrs["stgen"]["superresolved"] == uninterrupted[kind].attrs["stgen"]["superresolved"]
    assert names_in(tmp_path) == ["maps.zarr"]


@pytest.mark.parametrize("moment", ["before the swap", "within the swap", "late in the swap", "after the swap"])
def test_an_old_result_is_there_until_the_new_one_is(uninterrupted, tmp_path, moment):
    store = tmp_path / "maps.zarr"
    sdata = section()
    sdata["counts_5x"].data[:] = sdata["counts_5x"].data * 2
    old = values_of(stream(sdata, store), "model")[0]
    assert in_child(moment, "model", store, overwrite=True).returncode == KILLED
    if moment == "within the swap":  # only where folders cannot change places: the next call brings it back
        assert not store.exists()
    with pytest.raises(ValueError, match="exists already"):
        stream(section(), store)
    found = values_of(read_zarr(store), "model")[0]
    new = "late" in moment or "after" in moment
    np.testing.assert_array_equal(found, values_of(uninterrupted["model"], "model")[0] if new else old)
    assert names_in(tmp_path) == (["maps.zarr"] if new else [".maps.zarr.part", "maps.zarr"])
    check_same(stream(section(), store, overwrite=True), uninterrupted["model"])
    assert names_in(tmp_path) == ["maps.zarr"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places at once on Linux")
def test_a_store_is_replaced_at_once(tmp_path):
    new, store, old = (tmp_path / name for name in ("new", "store", "old"))
    for path in (new, store):
        path.mkdir()
        (path / path.name).touch()
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("an old C library")
    old.touch()  # is in the way of three renames
    streaming._exchange(new, store, old)
    assert (names_in(store), names_in(new)) == (["new"], ["store"])


@pytest.mark.parametrize("change", ["counts", "genes", "seed", "tile", "a torn line"])
def test_only_the_same_call_goes_on(made, tmp_path, monkeypatch, change):
    store, sdata = tmp_path / "maps.zarr", section()
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            stream(sdata, store)
    done = tmp_path / ".maps.zarr.part" / "done"
    assert len(done.read_text().splitlines()) == 2
    made.clear()
    options = {"genes": {"genes": GENES[:1]}, "seed": {"seed": 7}, "tile": {"tile": 15}}.get(change, {})
    if change == "counts":
        sdata["counts_5x"].data[0, 0, 0] += 1
    if change == "a torn line":
        done.write_text(done.read_text()[:-1])
    stream(sdata, store, **options)
    assert len(made) == {"tile": 16, "a torn line": 3}.get(change, 4)
    del sdata.images["superresolved"]
    np.testing.assert_array_equal(
        np.asarray(read_zarr(store)["superresolved"].data), values_of(stream(sdata, None, **options), "model")[0]
    )
    assert names_in(tmp_path) == ["maps.zarr"]


def interrupt_after(monkeypatch, n, error=KeyboardInterrupt):
    set_done = MapResult.set_done

    def interrupted(self, part, window):
        set_done(self, part, window)
        if len(self._work._done) == n:
            raise error

    monkeypatch.setattr(MapResult, "set_done", interrupted)


def test_an_interrupt_keeps_what_is_done_and_says_so(uninterrupted, made, tmp_path, monkeypatch, caplog):
    store = tmp_path / "maps.zarr"
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            stream(section(), store)
    assert "3 windows that are done are kept" in caplog.text
    assert str(tmp_path / ".maps.zarr.part") in caplog.text
    made.clear()
    check_same(stream(section(), store), uninterrupted["model"])
    assert len(made) == 1


def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2, RuntimeError("on the way"))
    with pytest.raises(RuntimeError, match="on the way"):
        stream(section(), tmp_path / "maps.zarr")
    assert names_in(tmp_path) == []


def test_a_second_writer_is_refused_and_the_first_goes_on(uninterrupted, tmp_path, monkeypatch):
    store, refused, set_done = tmp_path / "maps.zarr", [], MapResult.set_done

    def meanwhile(self, part, window):
        set_done(self, part, window)
        if not refused:
            refused.append(in_child("", "model", store, overwrite=True))

    monkeypatch.setattr(MapResult, "set_done", meanwhile)
    check_same(stream(section(), store), uninterrupted["model"])
    assert refused[0].returncode == 1
    assert f"another process is making the store {store}" in refused[0].stderr
    assert names_in(tmp_path) == ["maps.zarr"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_put_there_meanwhile_stays(tmp_path, monkeypatch, overwrite):
    store, set_done = tmp_path / "maps.zarr", MapResult.set_done

    def meanwhile(self, part, window):
        set_done(self, part, window)
        store.mkdir(exist_ok=True)
        (store / "notes.txt").write_text("mine")

    monkeypatch.setattr(MapResult, "set_done", meanwhile)
    with pytest.raises(ValueError, match=r"maps\.zarr.* is not replaced"):
        stream(section(), store, overwrite=overwrite)
    assert (store / "notes.txt").read_text() == "mine"
    assert names_in(tmp_path) == ["maps.zarr"]


def test_a_folder_of_another_kind_is_left_alone(tmp_path):
    other = tmp_path / ".maps.zarr.part"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is something else"):
        stream(section(), tmp_path / "maps.zarr")
    assert names_in(other) == ["notes.txt"]


@pytest.mark.parametrize("failing", ["put", "set_done", "write"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, failing):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "put":
        monkeypatch.setattr(zarr.Array, "__setitem__", full)
    else:
        monkeypatch.setattr(*((SpatialData, "write") if failing == "write" else (WorkFolder, "set_done")), full)
    sdata = section()
    with pytest.raises(OSError, match=r"no space left to make the store .*maps\.zarr") as caught:
        stream(sdata, tmp_path / "maps.zarr")
    assert caught.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []
    assert "superresolved" not in sdata.images
