"""Orthogonal and unitary convolutions, as a parametrization of any existing convolution's weight."""

from importlib import import_module
from types import ModuleType

from . import functional
from .conversion import orthogonal
from .diagnostics import (
    orthogonality_defect,
    plot_gradient_norms,
    plot_spectrum,
    report,
    singular_values,
)
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
    "plot_gradient_norms",
    "plot_spectrum",
    "report",
    "retrofit",
    "set_orthogonality",
    "singular_values",
]


def __getattr__(name: str) -> ModuleType:
    """`manifold`, once it is used: it needs geoopt, whose import takes half a second."""
    if name == "manifold":
        return import_module(".manifold", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
