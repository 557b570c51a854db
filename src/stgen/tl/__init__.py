"""Tools: fit models, sharpen maps, predict expression, score predictions."""

from .cells.aggregate import aggregate_cells
from .cells.cell_types import localize_cell_types
from .cells.domains import find_domains
from .comparison.compare import compare
from .evaluation.correlation import GeneCorrelation, gene_correlation
from .evaluation.evaluate import Scores, evaluate
from .fitting.fit import fit
from .prediction.predict import predict_expression
from .superresolution.superresolve import superresolve

__all__ = [
    "GeneCorrelation",
    "Scores",
    "aggregate_cells",
    "compare",
    "evaluate",
    "find_domains",
    "fit",
    "gene_correlation",
    "localize_cell_types",
    "predict_expression",
    "superresolve",
]
