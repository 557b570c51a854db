"""C3-Diff: cross-modal cross-content contrastive diffusion for super-resolved gene maps (Wang et al., 2026)."""

from stgen.models.c3diff.model import C3Diff
from stgen.models.c3diff.options import C3DiffOptions

__all__ = ["C3Diff", "C3DiffOptions"]
