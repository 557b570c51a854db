"""Tools: fit models, sharpen maps, predict expression, score predictions."""

from .bins.bins_to_table import bins_to_table
from .bins.table_to_map import table_to_map
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
    "bins_to_table",
    "compare",
    "evaluate",
    "find_domains",
    "fit",
    "gene_correlation",
    "localize_cell_types",
    "predict_expression",
    "superresolve",
    "table_to_map",
]
