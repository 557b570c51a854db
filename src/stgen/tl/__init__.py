"""Tools: fit models, predict expression, score predictions."""

from ._evaluate import Scores, evaluate
from ._fit import fit
from ._predict import predict_expression

__all__ = ["Scores", "evaluate", "fit", "predict_expression"]
