"""Orthogonal and unitary convolutions, as a parametrization of any existing convolution's weight."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from . import functional
from .convert import orthogonal
from .diagnostics.plots import plot_gradient_norms, plot_spectrum
from .diagnostics.report import report
from .diagnostics.values import orthogonality_defect, singular_values
from .keeping import frozen
from .matrices.expm import expm_skew
from .models import generators
from .parametrizations.exponential import ConvExponential
from .parametrizations.split import SplitExponential
from .recurrent import recurrent_blocks
from .retrofitting import retrofit, set_orthogonality

__version__ = "0.1.0"

__all__ = [
    "ConvExponential",
    "SplitExponential",
    "__version__",
    "expm_skew",
    "frozen",
    "functional",
    "generators",
    "orthogonal",
    "orthogonality_defect",
    "plot_gradient_norms",
    "plot_spectrum",
    "recurrent_blocks",
    "report",
    "retrofit",
    "set_orthogonality",
    "singular_values",
]

if TYPE_CHECKING:
    from . import manifold as manifold
else:

    def __getattr__(name: str) -> ModuleType:
        """Import `manifold` once it is used: it needs geoopt, whose import takes half a second."""
        if name == "manifold":
            return import_module(".manifold", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
