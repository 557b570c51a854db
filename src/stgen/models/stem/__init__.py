"""Stem: spot expression from histology with a diffusion transformer over gene tokens (Zhu et al., ICLR 2025)."""

from stgen.models.stem.model import Stem
from stgen.models.stem.options import StemOptions

__all__ = ["Stem", "StemOptions"]
