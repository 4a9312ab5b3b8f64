"""Orthogonal and unitary convolutions, as a parametrization of any existing convolution's weight.

- `orthogonal(conv)` makes a layer orthogonal: an ``nn.Conv*`` or ``nn.ConvTranspose*``.
- `retrofit(model, example)` makes the convolutions of a new or trained model orthogonal, of a recurrent one
  what takes its state to itself (`recurrent_blocks` shows it). `set_orthogonality(model, t)` takes a
  trained model from what it was to orthogonal.
- `generators(model)` are what is trained of orthogonal kernels. Within `frozen(model)` kernels are fixed.
- `report(model, example)`, `singular_values(conv, size)`, `orthogonality_defect(conv, size)`,
  `plot_spectrum` and `plot_gradient_norms` measure a module's own forward.
- `ConvExponential` and `SplitExponential` are the parametrizations that `orthogonal` registers.
- `functional` works on kernels themselves, `expm_skew` on skew matrices, and `manifold` is for geoopt.
"""

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
