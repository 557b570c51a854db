"""Tools: fit models, sharpen maps, predict expression, score predictions."""

from ._cell_types import localize_cell_types
from ._cells import aggregate_cells
from ._compare import compare
from ._correlation import GeneCorrelation, gene_correlation
from ._domains import find_domains
from ._evaluate import Scores, evaluate
from ._fit import fit
from ._predict import predict_expression
from ._superresolve import superresolve

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
