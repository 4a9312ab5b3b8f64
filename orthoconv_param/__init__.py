"""Orthogonal and unitary convolutions, as a parametrization of any existing convolution's weight."""

from . import functional
from .conversion import orthogonal
from .diagnostics import orthogonality_defect, singular_values
from .exponential import expm_skew
from .parametrization import ConvExponential, generators

__all__ = [
    "ConvExponential",
    "expm_skew",
    "functional",
    "generators",
    "orthogonal",
    "orthogonality_defect",
    "singular_values",
]
