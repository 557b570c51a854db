"""Diff-ST: cross-modal diffusion for super-resolved gene maps (Wang et al., MICCAI 2024)."""

from stgen.models.diffst.model import DiffST
from stgen.models.diffst.options import DiffSTOptions

__all__ = ["DiffST", "DiffSTOptions"]
