"""fusedres: residual layers, y = act(norm(x @ weight.T + bias)) + x, in one fused call."""

import sys

from .tools import interrupted

if sys.argv[:1] == ["-m"]:  # `python -m fusedres`, which has not come to its main function
    interrupted.while_importing()

from .activations import register_activation
from .autograd import FusedResidualFunction
from .functional import fused_residual
from .mlp import FusedResidualMLP
from .models.compiled import report
from .models.convert import convert, revert
from .modules import FusedResidual
from .network import FusedSequential
from .reference import Residual
from .spec import ACTIVATIONS, GATES, NORMS, ORDERS, SHORTCUTS, STAGES
from .stack import FusedResidualStack
from .tools.explain import explain

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "NORMS",
    "ORDERS",
    "SHORTCUTS",
    "STAGES",
    "FusedResidual",
    "FusedResidualFunction",
    "FusedResidualMLP",
    "FusedResidualStack",
    "FusedSequential",
    "Residual",
    "convert",
    "explain",
    "fused_residual",
    "register_activation",
    "report",
    "revert",
]
