"""A disk that is full, which is a limit on the size of files here: an error, nothing lost, nothing that cannot be cleaned."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import dask
from kills import JOBS
from small_world import quiet

LIMIT = 200  # bytes: less than any file that is written


def fails_on_a_full_disk(work: Callable[[], None]) -> str:
    """Do the work in a process whose files cannot grow; the name of the error that it ended with."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "no error"
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails as it does on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
            work()
        except BaseException as error:  # noqa: BLE001  that is what is asked for
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:900])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def run_all(names: tuple[str, ...] = ("save", "streaming")) -> dict[str, list[str]]:
    """What went wrong, by job: nothing may."""
    found = {}
    with dask.config.set(scheduler="synchronous"), quiet():  # threads do not survive a fork
        for name in names:
            job, wrong = JOBS[name](), []
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                job.begin(folder)
                before = job.state(folder)
                said = fails_on_a_full_disk(lambda job=job, folder=folder: job.work(folder))
                if said == "no error":
                    wrong.append("a full disk is no error")
                if job.state(folder) != before:
                    wrong.append(f"{job.state(folder)} instead of {before} after: {said}")
                job.work(folder)  # there is space again
                if job.state(folder) in (before, "nothing"):
                    wrong.append(f"the same call does not work afterwards, after: {said}")
            found[name] = wrong
    return found


def main() -> int:
    """Try it, and say what went wrong."""
    found = run_all()
    for name, wrong in found.items():
        print(f"  {name:36}{'; '.join(wrong) or 'as it must be'}")
    return int(any(found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
