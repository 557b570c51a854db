"""Pictures: they take axes and return them, and neither show nor save."""

from __future__ import annotations

from ._calibration import calibration
from ._correlation import gene_correlation
from ._domains import domains
from ._gene_scatter import gene_scatter
from ._gene_variation import gene_variation
from ._history import history
from ._local_ssim import local_ssim
from ._maps import maps
from ._report import report
from ._samples import samples
from ._scores import scores

__all__ = [
    "calibration",
    "domains",
    "gene_correlation",
    "gene_scatter",
    "gene_variation",
    "history",
    "local_ssim",
    "maps",
    "report",
    "samples",
    "scores",
]
