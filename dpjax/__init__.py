"""dpjax: train language models on private data, and prove how private the result is."""

from dpjax import accounting, auditing, clipping, data, models
from dpjax.accounting import calibrate_noise_multiplier, epsilon
from dpjax.adaptive import AdaptiveClipping
from dpjax.clipping import clipped_grad
from dpjax.correlated_noise import CorrelatedNoise, matrix_factorization_privatizer
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.noise import gaussian_privatizer
from dpjax.optimizers import dp_adam, dp_aggregate, dp_sgd
from dpjax.training import StepInfo, TrainState, fit, init_state, train_step
from dpjax.types import NeighboringRelation

__all__ = [
    "DPSGD",
    "AdaptiveClipping",
    "CorrelatedNoise",
    "DpjaxError",
    "Ledger",
    "NeighboringRelation",
    "StepInfo",
    "TrainState",
    "accounting",
    "auditing",
    "calibrate_noise_multiplier",
    "clipped_grad",
    "clipping",
    "data",
    "dp_adam",
    "dp_aggregate",
    "dp_sgd",
    "epsilon",
    "fit",
    "gaussian_privatizer",
    "generate",
    "init_state",
    "matrix_factorization_privatizer",
    "models",
    "train_step",
]
