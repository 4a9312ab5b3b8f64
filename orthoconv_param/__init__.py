"""Orthogonal and unitary convolutions, as a parametrization of any existing convolution's weight."""

from . import functional
from .conversion import orthogonal
from .diagnostics import orthogonality_defect, report, singular_values
from .exponential import expm_skew
from .parametrization import ConvExponential, generators
from .retrofit import retrofit, set_orthogonality

__all__ = [
    "ConvExponential",
    "expm_skew",
    "functional",
    "generators",
    "orthogonal",
    "orthogonality_defect",
    "report",
    "retrofit",
    "set_orthogonality",
    "singular_values",
]
