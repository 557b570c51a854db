"""HaDM-ST: histology-assisted differential modelling of super-resolved gene maps (Liu et al., CMMCA at MICCAI 2025)."""

from stgen.models.hadmst.model import HaDMST
from stgen.models.hadmst.options import HaDMSTOptions

__all__ = ["HaDMST", "HaDMSTOptions"]
