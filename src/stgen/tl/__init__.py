"""Tools: fit models, sharpen maps, predict expression, score predictions."""

from ._evaluate import Scores, evaluate
from ._fit import fit
from ._predict import predict_expression
from ._superresolve import superresolve

__all__ = ["Scores", "evaluate", "fit", "predict_expression", "superresolve"]
