"""`plot_spectrum` and `plot_gradient_norms`: pictures of what orthogonality does.

Axes show what is there on a scale that does not magnify rounding: singular values on at least a fifth,
gradients on at least a decade. Limits are given to matplotlib as data. Its autoscaling then keeps them when
more is drawn into the same axes, and leaves alone what the caller has fixed.
"""

from collections.abc import Callable, Mapping, Sequence
from math import nan, pi, sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import Size, per_axis
from ..models import call, undisturbed
from .forward import Forward, domain_of
from .periodic import Periodic, of_kernel, periodic

Axes: TypeAlias = Any  # matplotlib's, which is imported when it is used

_NARROWEST = 0.2  # of the axis of singular values: 1 % is 5 % of it
_LINE = 58  # characters that fit below a panel
_LARGEST_DRAWN = 2**21  # entries of a dense matrix, whose eigenvalues take a few seconds


def plot_spectrum(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    before: Tensor | nn.Module | None = None,
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, ...]:
    """Draw the eigenvalues of a convolution, and its singular values.

    An orthogonal convolution has all eigenvalues on the unit circle, and all singular values 1. The
    singular values of a kernel or a periodic module are drawn over frequency. For any other module (with
    ``boundary="zeros"`` or ``"walls"``, or with a forward of its own) both are those of the dense matrix of
    its own forward, and the singular values are drawn in descending order. If one of two is not periodic,
    both are drawn so.

    Args:
        convolution: a kernel or a module, as of `singular_values`.
        domain: size of the images; of a transposed convolution, of its output.
        before: another to compare it with, such as a copy of the module that was not orthogonal yet.
        axes: of matplotlib, to draw into: two; or one for a convolution without eigenvalues, because it
            changes the number of channels or the size of the images. Default: a new figure. Legends are
            below the axes if the figure has a layout engine, which makes room for them, and else within.

    Returns:
        The axes: eigenvalues, if it has any, and singular values.

    Raises:
        ImportError: if matplotlib is missing (extra ``[plot]``).
        TypeError, ValueError: as `singular_values`; if the dense matrix of a module that is not periodic
            has more than ``2^21`` entries; if ``before`` or ``axes`` do not fit the convolution.

    Cost: the singular values and eigenvalues of one matrix for each frequency, or of the dense matrix.

    Example:
        >>> from torch import nn
        >>> from orthoconv_param import orthogonal, plot_spectrum
        >>> conv = orthogonal(nn.Conv2d(4, 4, 3, padding=1))
        >>> eigenvalues, values = plot_spectrum(conv, domain=16)
        >>> values.get_title()
        'singular values on images of 16x16 pixels'
        >>> values.get_xlabel()
        'frequency (cycles per pixel)'
    """
    both = {"": convolution} if before is None else {"before": before, "after": convolution}
    operators = {label: _operator(one, domain) for label, one in both.items()}
    dimensions = [_axes_of(operator) for operator in operators.values()]
    if len(set(dimensions)) > 1:
        raise ValueError(
            f"before should have as many axes of space as the convolution, {dimensions[1]}. "
            f"Found {dimensions[0]}"
        )
    over_frequency = all(isinstance(operator, Periodic) for operator in operators.values())
    square = all(map(_is_square, operators.values()))
    unit = ("sample", "pixel", "voxel")[dimensions[-1] - 1]
    noun = "outputs" if getattr(convolution, "transposed", False) else "images"
    where = f"on {noun} of {_by(per_axis('domain', domain, dimensions[-1]))} {unit}s"
    if not over_frequency:
        where += "\nof what the module computes there, edges included"

    matrices = {label: _matrices(operator, over_frequency) for label, operator in operators.items()}
    panels = _panels(axes, 2 if square else 1, where.count("\n") + 1)
    if square:
        _draw_eigenvalues(panels[0], matrices, operators)
        panels[0].set_title(f"eigenvalues {where}", fontsize="medium")
    _draw_singular_values(panels[-1], matrices, operators, over_frequency)
    panels[-1].set_title(f"singular values {where}", fontsize="medium")
    frequency, share = f"frequency (cycles per {unit})", "share of the singular values, largest first"
    panels[-1].set_xlabel(frequency if over_frequency else share)
    return tuple(panels)


def plot_gradient_norms(
    model: nn.Module | Mapping[str, nn.Module],
    inputs: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    time_axis: int = 1,
    axes: Axes | None = None,
) -> Axes:
    """Draw how strongly the loss of a recurrent model depends on each of its time steps.

    The curve is ``|| d loss / d x[t] ||`` over ``t``, on a logarithmic axis of at least a decade. If the
    state's operator is orthogonal the norm stays about the same; else it vanishes or explodes geometrically
    towards the first steps. The curve has gaps where it is exactly zero or not finite; the legend counts
    them.

    Args:
        model: one that is called with a sequence; or several by name, such as an orthogonal and an ordinary
            one. Run in evaluation mode; its parameters' gradients stay as they are.
        inputs: a tensor with an axis of time; or a tuple or dict of arguments, whose first one it is.
        loss: of the model's output, a scalar. Default: its mean square; if it is as long as the input, that
            of the last step.
        time_axis: of the sequence, and of the output.
        axes: of matplotlib, to draw into. Default: a new figure. The legend is as in `plot_spectrum`.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is missing (extra ``[plot]``).
        TypeError, ValueError: if the inputs are no floating sequence, or there is no model; if a loss is
            not a scalar, or does not depend on the sequence; if there is nothing to draw, because no
            gradient is finite and not zero.

    Cost: one forward and one backward pass of each model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import plot_gradient_norms
        >>> class Wave(nn.Module):
        ...     def forward(self, x):
        ...         h = 0
        ...         for step in x.unbind(1):
        ...             h = 0.5 * h + step
        ...         return h
        >>> axes = plot_gradient_norms(Wave(), torch.randn(1, 20, 3))
        >>> axes.get_yscale()
        'log'
    """
    models = model if isinstance(model, Mapping) else {type(model).__name__: model}
    if not models or not all(isinstance(m, nn.Module) for m in models.values()):
        raise TypeError(f"model should be a module, or a dict of modules by name. Found {model!r}")
    names: list[Any] = []
    arguments = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    if isinstance(inputs, Mapping):
        names, arguments = list(inputs), list(inputs.values())
    x = arguments[0] if arguments else None
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"inputs should begin with a floating tensor. Found {type(x).__name__}")
    if not -x.ndim <= time_axis < x.ndim or not x.shape[time_axis]:
        raise ValueError(
            f"time_axis should be an axis of the sequence, {tuple(x.shape)}. Found {time_axis}"
        )
    curves = {}
    for name, one in models.items():
        with undisturbed(one), torch.inference_mode(False), torch.enable_grad(), parametrize.cached():
            sequence = x.detach().clone().requires_grad_()
            given = [sequence, *arguments[1:]]
            y = call(one, dict(zip(names, given, strict=True)) if names else given)
            value = _mean_square(y, x, time_axis) if loss is None else loss(y)
            gradient = None
            scalar = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
            if scalar and value.requires_grad:
                (gradient,) = torch.autograd.grad(value.reshape(()), sequence, allow_unused=True)
        if gradient is None:
            found = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"loss should be a real scalar that depends on the sequence. Found {found}")
        double = torch.promote_types(gradient.dtype, torch.float64)  # whose squares do not vanish
        curves[name] = gradient.cpu().to(double).movedim(time_axis, 0).flatten(1).norm(dim=1)
    labels = {name: _counted(name, curve) for name, curve in curves.items()}
    if not any(bool(_drawable(curve).any()) for curve in curves.values()):
        raise ValueError(
            "loss should have a gradient that is finite and not zero, at one time step at least. "
            f"Found {', '.join(labels.values())}"
        )
    rows = -(-len(labels) // _columns([*labels.values()]))
    panel = _panels(None if axes is None else [axes], 1, rows)[0]
    for name, curve in curves.items():
        _draw_curve(panel, curve, labels[name])
    _show_a_decade(panel, x.shape[time_axis])
    panel.set(
        title="gradient of the loss at each time step",
        xlabel="time step",
        ylabel="norm of the gradient at the input",
    )
    _legend(panel)
    return panel


# Spectra


_Operator: TypeAlias = Periodic | Forward


def _operator(convolution: Tensor | nn.Module, domain: int | Size) -> _Operator:
    """Return the operator of a kernel or a module.

    Raises:
        TypeError, ValueError: if there is none, or it is too large to be drawn.
    """
    if isinstance(convolution, Tensor):
        return of_kernel(convolution, domain)
    size = domain_of(convolution, domain)
    found = periodic(convolution, size)
    if found is not None:
        return found
    forward = Forward(convolution, size)
    if forward.rows * forward.columns > _LARGEST_DRAWN:
        raise ValueError(
            f"domain should be smaller: {_LARGEST_DRAWN} entries of a dense matrix are drawn at most, of a "
            f"module that is not periodic. Found {forward.rows} x {forward.columns}. (report measures the "
            "extreme singular values at every size.)"
        )
    return forward


def _axes_of(operator: _Operator) -> int:
    """Count the axes of space."""
    return len(operator.lattice.domain if isinstance(operator, Periodic) else operator.taken[1:])


def _is_square(operator: _Operator) -> bool:
    """Return True if images are mapped to images of the same size and channels."""
    if isinstance(operator, Forward):
        return operator.taken == operator.given
    lattice, kernel = operator.lattice, operator.kernel
    return max(lattice.stride) == 1 and kernel.shape[0] == kernel.shape[1] * lattice.groups


def _matrices(operator: _Operator, over_frequency: bool) -> Tensor:
    """Return the operator's matrix, or its matrices at each frequency.

    Over frequency, those of a real kernel's negative frequencies are left out: they are conjugates.
    """
    if isinstance(operator, Forward):
        return operator.matrix()
    return (operator if over_frequency else operator.at_all_frequencies()).spectrum()


def _by(size: Size) -> str:
    return "x".join(map(str, size))


def _styles(labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return how to draw each: what came before larger, so that it is seen below the same values after."""
    before, after = {"color": "C1", "s": 14}, {"color": "C0", "s": 5}
    return [{**style, "alpha": 0.6, "linewidths": 0} for style in (before, after)[-len(labels) :]]


def _draw_eigenvalues(
    panel: Axes, matrices: Mapping[str, Tensor], operators: Mapping[str, _Operator]
) -> None:
    for (label, M), style in zip(matrices.items(), _styles([*matrices]), strict=True):
        z = torch.linalg.eigvals(M).flatten().cpu()
        operator = operators[label]
        if isinstance(operator, Periodic) and not operator.lattice.is_complex:
            z = torch.cat([z, z.conj().resolve_conj()])  # those of the negative frequencies
        panel.scatter(z.real, z.imag, label=label, **style)
    circle = torch.linspace(0, 2 * pi, 361)
    panel.plot(circle.cos(), circle.sin(), color="gray", linewidth=0.8, zorder=0)
    panel.set(xlabel="real part", ylabel="imaginary part")
    panel.set_aspect("equal")
    if len(matrices) > 1 and _makes_room(panel):  # else the other panel's legend says it for both
        _legend(panel, markerscale=2)


def _draw_singular_values(
    panel: Axes, matrices: Mapping[str, Tensor], operators: Mapping[str, _Operator], over_frequency: bool
) -> None:
    """Draw singular values over frequency, or in descending order over their share of all of them."""
    smallest = largest = 1.0
    for (label, M), style in zip(matrices.items(), _styles([*matrices]), strict=True):
        values = torch.linalg.svdvals(M).cpu()
        smallest, largest = min(smallest, values.min().item()), max(largest, values.max().item())
        defect = f"{label}: defect {(values - 1).abs().max().item():.1e}".lstrip(": ")
        operator = operators[label]
        if over_frequency and isinstance(operator, Periodic):
            places = operator.lattice.wavenumbers().norm(dim=-1)[:, None].expand(values.shape)
        else:
            values = values.flatten().sort(descending=True).values
            places = torch.linspace(0, 1, len(values))
        panel.scatter(places.flatten(), values.flatten(), label=defect, **style)
    panel.axhline(1, color="gray", linewidth=0.8, zorder=0)
    panel.set_ylabel("singular value")
    missing = max(_NARROWEST - (largest - smallest), 0) / 2
    smallest, largest = smallest - missing, largest + missing
    if not _makes_room(panel):
        largest += 0.25 * (largest - smallest)  # for the legend
    panel.update_datalim([(0, smallest), (0, largest)])
    panel.autoscale_view()
    _legend(panel, within="upper left", markerscale=2)


# Gradients


def _mean_square(y: Any, x: Tensor, time_axis: int) -> Tensor:
    if not isinstance(y, Tensor):
        raise ValueError(f"loss should be given: the model returns {type(y).__name__}, no tensor")
    if y.ndim == x.ndim and y.shape[time_axis] == x.shape[time_axis]:
        y = y.select(time_axis, -1)
    return y.abs().square().mean()


def _drawable(curve: Tensor) -> Tensor:
    """Return where a curve has a place on a logarithmic axis."""
    return (curve > 0) & curve.isfinite()


def _counted(name: str, curve: Tensor) -> str:
    """Return a model's name, with the number of steps at which its curve has a gap."""
    gaps = {"zero": int((curve == 0).sum()), "not finite": int((~curve.isfinite()).sum())}
    steps = f"of {len(curve)} steps"
    found = " and ".join(f"{what} at {number} {steps}" for what, number in gaps.items() if number)
    label = f"{name}: {found}" if found else str(name)
    return f" {label}" if label.startswith("_") else label  # matplotlib leaves out what begins with "_"


def _draw_curve(panel: Axes, curve: Tensor, label: str) -> None:
    """Draw a curve with gaps, and a marker at each point whose neighbours are gaps."""
    drawn = _drawable(curve)
    beside = torch.zeros_like(drawn)
    beside[1:] |= drawn[:-1]
    beside[:-1] |= drawn[1:]
    alone = (drawn & ~beside).nonzero().flatten().tolist()
    markers = {"marker": "o", "markersize": 5, "markevery": alone} if alone else {}
    panel.semilogy(range(len(curve)), torch.where(drawn, curve, nan), label=label, **markers)


def _show_a_decade(panel: Axes, steps: int) -> None:
    """Have the axes show all steps and at least a decade, with labels between few powers of ten."""
    from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

    low, high = panel.dataLim.minposy, panel.dataLim.y1
    if high < 10 * low:
        middle = sqrt(low) * sqrt(high)
        low, high = middle / sqrt(10), middle * sqrt(10)
    panel.update_datalim([(0, low), (steps - 1, high)])
    panel.autoscale_view()
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.4)))


# Panels


def _panels(axes: Sequence[Axes] | None, number: int, lines: int) -> list[Axes]:
    """Return the axes to draw into; in a new figure, with room for so many lines of text around them."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install orthoconv_param[plot]") from error
    if axes is None:
        size = (5.2 * number, 4.4 + 0.2 * lines)
        _, made = pyplot.subplots(1, number, figsize=size, squeeze=False, layout="constrained")
        return list(made[0])
    if len(axes) != number:
        raise ValueError(f"axes should be a sequence of {number} matplotlib axes. Found {len(axes)}")
    return list(axes)


def _columns(labels: Sequence[str]) -> int:
    """Return how many columns of these labels fit below a panel."""
    return max(1, min(len(labels), _LINE // (max(map(len, labels)) + 6)))


def _makes_room(panel: Axes) -> bool:
    """Return True if the figure's layout engine makes room for what is beside the axes."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine, TightLayoutEngine

    return isinstance(panel.figure.get_layout_engine(), (ConstrainedLayoutEngine, TightLayoutEngine))


def _legend(panel: Axes, within: str = "best", markerscale: float = 1) -> None:
    """Put the legend below the axes, or where nothing makes room for it there, within them."""
    if not _makes_room(panel):
        panel.legend(loc=within, markerscale=markerscale)
        return
    _, labels = panel.get_legend_handles_labels()
    panel.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4,  # below the label of the axis
        ncols=_columns(labels),
        frameon=False,
        markerscale=markerscale,
    )
