"""fusedres: residual layers, y = act(norm(x @ weight.T + bias)) + x, in one kernel launch."""

from .autograd import FusedResidualFunction
from .functional import fused_residual
from .modules import FusedResidual
from .reference import Residual
from .spec import ACTIVATIONS, GATES, NORMS, ORDERS, SHORTCUTS, STAGES

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS", "GATES", "NORMS", "ORDERS", "SHORTCUTS", "STAGES",
    "FusedResidual", "FusedResidualFunction", "Residual", "fused_residual",
]  # fmt: skip
