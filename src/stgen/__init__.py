"""Sharpen spatial transcriptomics with histology, and predict expression from histology alone.

The namespaces follow scanpy: :mod:`stgen.pp` prepares, :mod:`stgen.tl` fits and predicts, :mod:`stgen.pl` draws,
:mod:`stgen.io` exports, :mod:`stgen.models` holds the models and :mod:`stgen.datasets` the data. They are imported when
first used, so that ``import stgen`` is fast and :mod:`stgen.models` needs torch and numpy only.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import datasets, io, models, pl, pp, tl

__all__ = ["datasets", "io", "models", "pl", "pp", "tl"]
__version__ = version("stgen")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
