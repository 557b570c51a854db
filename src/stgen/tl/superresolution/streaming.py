"""A store that is made window by window: by one process at a time, and by the next one if that was killed."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stgen.data import MapInputs
from stgen.models import MapMaker
from stgen.sampling import MapSampler, SamplingOptions
from stgen.windows import Window

__all__ = ["WorkFolder", "settle", "signature_of"]

logger = logging.getLogger("stgen")

LOCK, SIGNATURE, DONE, SWAP, NEW, OLD = "lock", "signature.json", "done", "swap.json", "result.zarr", "old"
BITS_DEPEND_ON = ("stgen", "torch", "numpy", "scipy", "zarr")
HERE, EXCHANGE = -100, 2  # of Linux: paths are relative to the current folder; both of them change places


class WorkFolder:
    """The folder beside a store in which it is made, held by one process at a time.

    It has a fixed name, ``.<store>.part``, and holds the unfinished arrays, what they are made from
    (``signature.json``) and which windows of them are done. A lock, which ends with its process, keeps a second writer
    out. What a killed process left is gone on from, if it was made from the same, else removed.

    Parameters
    ----------
    store
        Path of the store to be made.
    signature
        All that the values of the arrays depend on, see :func:`signature_of`.
    overwrite
        Whether a store that is there is replaced.
    """

    def __init__(self, store: Path, signature: dict[str, Any], *, overwrite: bool) -> None:
        self.store, self.signature, self.overwrite = store, signature, overwrite
        self.path, self.new = _folder_of(store), _folder_of(store) / NEW
        self._lock: int | None = None
        self._done: set[str] = set()
        self._replaced = False

    def open(self) -> None:
        """Take the folder, with the windows that are done.

        Raises
        ------
        ValueError
            If another process makes the store, or has made it, and it may not be replaced.
        """
        self._lock = _locked(self.store)
        _settle(self.store)
        self._check_free()
        self.path.mkdir(exist_ok=True)
        self._done = self._found()
        _remove(self.path, but=("arrays", DONE, SIGNATURE) if self._done else ())
        if self._done:
            logger.info("going on with %s, of which %d windows are done.", self.store, len(self._done))
            return
        _write_json(self.path / SIGNATURE, self.signature)
        (self.path / "arrays").mkdir()

    def _check_free(self) -> None:
        if self.store.exists() and not self.overwrite:
            raise ValueError(
                f"the store {self.store} was made meanwhile and is not replaced. Pass overwrite=True to replace it, or "
                "another store=."
            )

    def _found(self) -> set[str]:
        """The windows that were done by a call that made the same; a line that is not whole is none."""
        try:
            same = json.loads((self.path / SIGNATURE).read_text()) == self.signature
            lines = (self.path / DONE).read_text().split("\n")[:-1]
        except (OSError, ValueError):
            return set()
        return set(lines) if same else set()

    def is_done(self, part: slice, window: Window) -> bool:
        """Whether the maps of some genes in a window are on disk."""
        return _line(part, window) in self._done

    def set_done(self, part: slice, window: Window) -> None:
        """Note that they are."""
        self._done.add(_line(part, window))
        with open(self.path / DONE, "a") as file:
            file.write(_line(part, window) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Move the finished store to its place; at any instant there is the old one or the new one, and what tells which.

        Raises
        ------
        ValueError
            If there is a store that may not be replaced.
        """
        self._check_free()
        _write_json(self.path / SWAP, {"inode": self.new.stat().st_ino})
        self._replaced = self.store.exists()
        if self._replaced:
            _exchange(self.new, self.store, self.path / OLD)
            return
        try:
            self.new.rename(self.store)
        except OSError as error:
            if self.store.exists():
                raise ValueError(
                    f"{self.store} was made meanwhile and is not replaced; pass another store=."
                ) from error
            raise

    def withdraw(self) -> None:
        """Undo :meth:`publish`."""
        if self._replaced:
            _exchange(self.new, self.store, self.path / OLD)
        else:
            self.store.rename(self.new)

    def close(self, error: BaseException | None = None) -> None:
        """Let go of the folder and remove it; after an interrupt, a later call goes on from it."""
        if self._lock is None:
            return
        if error is not None and not isinstance(error, Exception) and self._done:
            _unlock(self._lock)
            logger.warning(
                "interrupted; the %d windows that are done are kept in %s: the same call goes on from them. Delete it "
                "if you do "
                "not want that.", len(self._done), self.path,
            )  # fmt: skip
        else:
            _discard(self.path, self._lock)
        self._lock = None


def settle(store: Path) -> None:
    """Put right what a writer left that was killed in the swap of an old store for a new one.

    Raises
    ------
    ValueError
        If another process makes the store now, or the name of its folder is taken.
    """
    if not _folder_of(store).exists():
        return
    lock = _locked(store)
    try:
        done = _settle(store)
    except BaseException:
        _unlock(lock)
        raise
    if done:
        _discard(_folder_of(store), lock)
    else:
        _unlock(lock)


def _settle(store: Path) -> bool:
    """Bring an old store back to a place that is empty; whether the new one is in its place."""
    folder = _folder_of(store)
    if (folder / OLD).exists() and not store.exists():
        (folder / OLD).rename(store)
    try:
        inode = json.loads((folder / SWAP).read_text())["inode"]
        published = store.stat().st_ino == inode
    except (OSError, ValueError):
        return False
    if published:
        _remove(folder)
    return published


def _exchange(new: Path, store: Path, old: Path) -> None:
    """Let two folders change places: at once where the system can, else by way of ``old``, which :func:`settle` mends."""
    if sys.platform == "linux":
        swap = getattr(ctypes.CDLL(None), "renameat2", None)
        if swap is not None and swap(HERE, os.fsencode(new), HERE, os.fsencode(store), EXCHANGE) == 0:
            return
    store.rename(old)
    try:
        new.rename(store)
    except BaseException:
        old.rename(store)
        raise
    old.rename(new)


# ---- one writer ------------------------------------------------------------------------------------------------------


def _folder_of(store: Path) -> Path:
    return store.parent / f".{store.name}.part"


def _locked(store: Path) -> int:
    """The lock of a store's folder, which is made if need be."""
    folder = _folder_of(store)
    while True:
        if folder.exists() and not (folder / LOCK).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is needed to make {store.name!r}, and is something else; pass another store=.")
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # another process removed the folder meanwhile
            continue
        except OSError:  # no space, say
            with suppress(OSError):
                folder.rmdir()
            raise
        try:
            _lock(lock)
            if os.fstat(lock).st_ino == (folder / LOCK).stat().st_ino:
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(lock)
            raise ValueError(
                f"another process is making the store {store}. Wait until it has finished, or pass another store=."
            ) from error
        os.close(lock)


def _lock(file: int) -> None:
    """Lock a file, until it is closed or the process ends."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks
            logger.warning("this file system has no locks: let only one process at a time write to a store.")


def _unlock(lock: int) -> None:
    os.close(lock)


def _discard(folder: Path, lock: int) -> None:
    """Remove a folder and give back its lock."""
    _remove(folder)
    if sys.platform == "win32":  # an open file cannot be removed
        _unlock(lock)
    with suppress(OSError):
        (folder / LOCK).unlink()
        folder.rmdir()
    if sys.platform != "win32":
        _unlock(lock)
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        logger.warning("%s could not be removed as a whole; delete it.", folder)


def _remove(folder: Path, but: tuple[str, ...] = ()) -> None:
    """Remove what is in a folder, but its lock; what says that windows are done goes first, and the swap's mark last."""
    if DONE not in but:
        (folder / DONE).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == SWAP):
        if path.name in but or path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".tmp")
    with open(part, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _line(part: slice, window: Window) -> str:
    return f"{part.start} {window.core[0]} {window.core[1]}"


# ---- what is made ----------------------------------------------------------------------------------------------------


def signature_of(
    maker: MapMaker[Any], inputs: MapInputs, sampler: MapSampler, options: SamplingOptions
) -> dict[str, Any]:
    """All that the maps of a section depend on, as JSON values: two calls with the same make the same bits."""
    chosen = asdict(options)
    del chosen["progress"]
    signature = {
        "model": f"{type(maker).__module__}.{type(maker).__qualname__}",
        "config": maker.config,
        "weights": maker.weights_sha256(),
        "inputs": _digest_of(inputs, sampler.tiling.windows(inputs.tissue)),
        "genes": sampler.genes,
        "parts": [(part.start, part.stop) for part in sampler.parts],
        "tiling": repr((sampler.tiling.tile, sampler.tiling.margin, sampler.tiling.height, sampler.tiling.width)),
        "options": chosen,
        "versions": {name: version(name) for name in BITS_DEPEND_ON},
    }
    return json.loads(json.dumps(signature, default=str))


def _digest_of(inputs: MapInputs, windows: list[Window]) -> str:
    """A hash of all that is known of a section, the image as it is read in the windows."""
    digest = hashlib.sha256()
    for value in _arrays_of(inputs, windows):
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def _arrays_of(inputs: MapInputs, windows: list[Window]) -> Iterator[np.ndarray]:
    yield inputs.tissue
    yield np.array([inputs.bin_um])
    for value in (inputs.text, inputs.seen):
        yield np.zeros(0) if value is None else np.asarray(value)
    if inputs.measurement is not None:
        measurement, footprints = inputs.measurement, inputs.measurement.footprints
        yield np.frombuffer("\n".join((footprints.shape, *measurement.genes)).encode(), np.uint8)
        yield from (footprints.centers, np.array([footprints.diameter]), footprints.area, measurement.totals)
        counts = measurement.counts
        if isinstance(counts, np.ndarray):
            yield counts
        else:
            yield from (counts.data, counts.indices, counts.indptr)
    for read in (inputs.image, inputs.labels):
        if read is not None:
            yield from (np.asarray(read(*window.outer)) for window in windows)
