"""Files that appear when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

__all__ = ["checked_path", "whole_file"]


def checked_path(path: str | os.PathLike, suffixes: Sequence[str], *, overwrite: bool) -> Path:
    """The path of a file to be made.

    Raises
    ------
    ValueError
        If its name does not end as one of ``suffixes``, or it exists and may not be replaced.
    FileNotFoundError
        If its folder does not exist.
    """
    path = Path(path)
    if not path.name.lower().endswith(tuple(suffixes)):
        raise ValueError(f"the name of the file must end in {' or '.join(suffixes)}, found {path.name!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent.absolute()} to write {path.name!r} to.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the path of a file.")
    if path.exists() and not overwrite:
        raise ValueError(f"the file {path} exists already. Pass overwrite=True to replace it, or another path.")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes its place once it is whole; nothing is left of one that fails."""
    folder = Path(mkdtemp(prefix=".stgen-", dir=path.parent))
    part = folder / path.name
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        folder.rmdir()
