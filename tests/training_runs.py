"""Training runs that die, in processes of their own: ``python training_runs.py FOLDER``, used by test_train.py.

Each run is a fork of one process that has only imported things, so that all of them together cost one import. The
parent prints, as JSON, how each of its children ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401
import numpy as np
import torch
from diffusers.training_utils import EMAModel  # noqa: F401
from safetensors.torch import save_file

import stgen.train
from stgen.data import SpotData
from stgen.models import Stem

OPTIONS = {"steps": 24, "batch_size": 6, "evaluate_every": 4, "seed": 3, "ema_decay": 0.9, "progress": False}
DISTRIBUTED = {**OPTIONS, "steps": 8}


def data() -> tuple[SpotData, SpotData]:
    """Training and validation locations with two views each."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(40, 2, 5))
    x = h[:, 0] @ rng.normal(size=(5, 4)) + rng.normal(size=(40, 4))
    whole = SpotData(x, h, np.arange(40) // 5)
    return whole.subset(np.arange(30)), whole.subset(np.arange(30, 40))


def model() -> Stem:
    """A small model whose training draws noise, views and dropout."""
    torch.manual_seed(11)
    return Stem(
        ["A", "B", "C", "D"], embedding_dim=5, transform="none", width=16, depth=1, heads=2, mlp_ratio=2,
        image_hidden=8, image_dropout=0.5, genes_per_token=2, mean="probe",
    )  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_between_checkpoints(folder: Path) -> None:
    """Two steps after the third checkpoint."""
    update = stgen.train._State.update

    def wrapped(state, *args):
        if state.step == 14:
            die()
        update(state, *args)

    stgen.train._State.update = wrapped
    model().fit(*data(), checkpoint=folder, **OPTIONS)


def dies_after_a_checkpoint(folder: Path) -> None:
    """As soon as the third checkpoint is complete."""
    save = stgen.train._State.save

    def wrapped(state, *args):
        save(state, *args)
        if state.step == 12:
            die()

    stgen.train._State.save = wrapped
    model().fit(*data(), checkpoint=folder, **OPTIONS)


def dies_while_writing_weights(folder: Path) -> None:
    """In the third checkpoint, its weights half written."""
    count = 0

    def wrapped(tensors, path):
        nonlocal count
        count += 1
        save_file(tensors, path)
        if count == 3:
            os.truncate(path, path.stat().st_size // 2)
            die()

    stgen._checkpoint.save_file = wrapped
    model().fit(*data(), checkpoint=folder, **OPTIONS)


def dies_in_the_first_checkpoint(folder: Path) -> None:
    """Before there was any checkpoint to go back to."""
    stgen._checkpoint.save_file = lambda tensors, path: die()
    model().fit(*data(), checkpoint=folder, **OPTIONS)


def dies_between_the_two_renames(folder: Path) -> None:
    """In the third checkpoint, the old one moved away and the new one not yet in its place."""
    replace, count = os.replace, 0

    def wrapped(source, target):
        nonlocal count
        count += str(source).endswith(".new")
        if count == 3:
            die()
        replace(source, target)

    stgen._checkpoint.os.replace = wrapped
    model().fit(*data(), checkpoint=folder, **OPTIONS)


def dies_before_clearing_away(folder: Path) -> None:
    """In the third checkpoint, complete but for the removal of the old one."""
    rmtree = stgen._checkpoint.shutil.rmtree
    count = 0

    def wrapped(path, ignore_errors=False):
        nonlocal count
        count += not ignore_errors
        if count == 2:
            die()
        rmtree(path, ignore_errors=ignore_errors)

    stgen._checkpoint.shutil.rmtree = wrapped
    model().fit(*data(), checkpoint=folder, **OPTIONS)


DEATHS = [
    dies_between_checkpoints,
    dies_after_a_checkpoint,
    dies_while_writing_weights,
    dies_in_the_first_checkpoint,
    dies_between_the_two_renames,
    dies_before_clearing_away,
]


def distributed(folder: Path, rank: int, port: int) -> None:
    """One of two processes on the CPU, in the environment that ``torchrun`` makes."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "FORK_LAUNCHED": "1",
    }  # fmt: skip
    fitted = model()
    with torch.no_grad():
        for parameter in fitted.parameters():  # other initial weights: the first process's must win
            parameter += rank
    history = fitted.fit(*data(), checkpoint=folder / "checkpoint", **DISTRIBUTED)
    save_file(fitted.state_dict(), folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(history))


def fork(function, *args) -> int:
    """Process id of a child that runs the function."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
    return pid


def outcome(pid: int) -> int:
    """Exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {death.__name__: outcome(fork(death, folder / death.__name__)) for death in DEATHS}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "distributed").mkdir()
    pids = [fork(distributed, folder / "distributed", rank, port) for rank in range(2)]
    found["distributed"] = [outcome(pid) for pid in pids]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
