"""What members and minima look like: ensembles, flatness, texts scored byte by byte."""

from ..core.ensemble import (
    EnsemblePrediction,
    MemberTable,
    combine_predictions,
    ensemble_log_probs,
    evaluation_mode,
    negative_log_likelihood,
    predict_with_dropout,
    predict_with_members,
)
from .flatness import hessian_eigenvalues, loss_along_directions
from .scoring import Forward, TextScore, is_recurrent, mean_forward, model_forward, score_bytes


__all__ = [
    "EnsemblePrediction",
    "Forward",
    "MemberTable",
    "TextScore",
    "combine_predictions",
    "ensemble_log_probs",
    "evaluation_mode",
    "hessian_eigenvalues",
    "is_recurrent",
    "loss_along_directions",
    "mean_forward",
    "model_forward",
    "negative_log_likelihood",
    "predict_with_dropout",
    "predict_with_members",
    "score_bytes",
]
