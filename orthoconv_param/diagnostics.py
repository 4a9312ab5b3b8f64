r"""What a convolution does to the size of its input: singular values and their distance from 1."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan, pi, prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .blocks import Block, Blocks, resolve_blocks
from .conversion import CONVOLUTIONS, convolves, periodic
from .exponential import check_dtype
from .lattice import Lattice, Placement, Size, between_zeros, count, per_axis
from .parametrization import ConvExponential
from .retrofit import Annealed, by_name, call, convolutions_of, sizes, undisturbed

_LARGEST_DENSE = 2**27  # entries: one gigabyte
_LARGEST_REPORTED = 2**20  # likewise, in a table: a second

_Parametrized: TypeAlias = Literal["yes", "no", "blocks"]
Axes: TypeAlias = Any  # matplotlib's, which is imported when it is used


def singular_values(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> Tensor:
    r"""All singular values of a convolution on images of a given size.

    Of a kernel: of the operator that it is on periodic images. Of a module: of the operator that the
    module is, its bias aside. Exact: where the operator is periodic and keeps the size, it is block
    diagonal in frequency, and computed in double precision from the kernel; a kernel larger than the
    domain is folded onto it, which is what it does there. Any other module (with zero padding, or a
    forward of its own) is applied to each unit image, and the dense matrix is decomposed.

    Args:
        convolution: a kernel ``(out, in/groups, *taps)``, or ``(in, out/groups, *taps)`` of a transposed
            convolution; or an ``nn.Conv*`` or ``nn.ConvTranspose*``, orthogonal or not.
        domain: size of the images (of a transposed convolution: of its output), one for each axis or one
            for all.
        stride: of a kernel's convolution; a module has its own.
        groups: likewise.
        dilation: likewise.

    Returns:
        float64. Of a kernel or a periodic module, ``(groups, frequencies, min(out/groups, in/groups *
        s^d))``, in descending order for each frequency; of a real kernel, the half of the frequencies
        that ``rfftn`` keeps. Of any other module all of them, in descending order.

    Raises:
        TypeError, ValueError: for arguments that do not describe a convolution, or are not finite; for a
            module that is not periodic, if its dense matrix has more than ``2^27`` entries.

    Cost: one singular value decomposition for each frequency, or one of the dense matrix.

    Source: Sedghi, Gupta, Long, *The singular values of convolutional layers*, arXiv:1805.10408.

    Example:
        >>> import torch
        >>> from orthoconv_param import singular_values
        >>> singular_values(torch.ones(1, 1, 1, 2), domain=(1, 4)).flatten().tolist()
        [2.0, 1.4142135623730951, 0.0]
    """
    if isinstance(convolution, nn.Module):
        if (stride, groups, dilation) != (1, 1, 1):
            raise ValueError(
                "stride, groups and dilation should not be given with a module, which has its own"
            )
        return _of_module(convolution, domain)
    return _of_kernel(convolution, *_geometry_of_kernel(convolution, domain, stride, groups, dilation))


def orthogonality_defect(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> float:
    r"""How far a convolution is from orthogonal: ``max |singular value - 1|`` on images of a given size.

    Args:
        convolution: a kernel or a module, as in `singular_values`.
        domain: size of the images.
        stride: of a kernel's convolution.
        groups: of a kernel's convolution.
        dilation: of a kernel's convolution.

    Returns:
        0 for an orthogonal convolution, and for a semi-orthogonal one where channels differ.

    Raises:
        TypeError, ValueError: as `singular_values` does.

    Cost: that of `singular_values`.

    Example:
        >>> import torch
        >>> from orthoconv_param import functional, orthogonality_defect
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> w = functional.nearest_orthogonal(torch.randn(8, 8, 3, 3, dtype=torch.float64))
        >>> [f"{orthogonality_defect(w, n):.0e}" for n in (3, 32)]  # its own grid, and a larger one
        ['1e-15', '1e+00']
    """
    values = singular_values(convolution, domain, stride=stride, groups=groups, dilation=dilation)
    return (values - 1).abs().max().item()


@dataclass(frozen=True)
class Row:
    """One convolution of a `Report`, or one block of it, on images of one size.

    Args:
        name: as in ``model.named_modules()``; of a block with its slices.
        geometry: in words.
        domain: size of the images that it is fed (transposed: that it gives); None if the example does not
            reach it.
        torus: on which the singular values are: the domain; or with zero padding the larger one, on which
            the image lies between zeros.
        smallest: singular value there; nan if it is not known.
        largest: likewise.
        defect: ``max |singular value - 1|``.
        parametrized: ``"yes"``, ``"no"``, or ``"blocks"`` if only these of it are orthogonal.
        t: how far annealing is, 1 for orthogonal; None if it is not parametrized.
        parameters: how many numbers the convolution trains, its bias included; a block, its taps.
        share: of the model's.
    """

    name: str
    geometry: str
    domain: Size | None
    torus: Size | None
    smallest: float
    largest: float
    defect: float
    parametrized: _Parametrized
    t: float | None
    parameters: int
    share: float


@dataclass(frozen=True)
class Report:
    """What `report` found: ``rows``, which ``str`` puts in a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        titles = (
            *("name", "convolution", "domain", "smallest", "largest", "defect", "parametrized", "t"),
            "parameters",
        )
        table = [titles, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        if any(row.torus != row.domain for row in self.rows):
            lines.append(
                "(a in b: images of size a, continued by zeros to the torus b, on which the values are.\n"
                "What the module does is a part of that operator: no singular value of it is larger.)"
            )
        return "\n".join(lines)


def report(
    model: nn.Module, example_inputs: Any, *, blocks: Mapping[str, Iterable[Block]] | None = None
) -> Report:
    r"""The singular values of each convolution of a model, on the images that it is fed.

    The model is run once, as `retrofit` runs it. With zero padding, the operator is the part that acts on
    the image of one on a larger torus, and the values are of that one: the exact ones of the part
    are bounded by its largest, and take a dense matrix (`singular_values`).

    Args:
        model: any module.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a dict of keywords.
        blocks: as of `retrofit`: blocks of a weight that get rows of their own, besides those that are
            parametrized.

    Returns:
        A `Report`, whose ``rows`` are numbers, and whose ``str`` is a table: for each convolution
        its geometry, domain, smallest and largest singular value, defect, whether it is parametrized (or
        blocks of it), ``t``, number of parameters. Values are nan ("?") where the operator is not
        periodic for another reason (mirrored images, a forward of its own) and its dense matrix has more
        than ``2^20`` entries. One that sees several sizes has a row for each.

    Raises:
        TypeError, ValueError: if ``blocks`` are not as above, or a weight is not finite.

    Cost: one call of the model, and one singular value decomposition for each frequency.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import report, retrofit
        >>> model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 1, 1))
        >>> _ = nn.init.dirac_(model[0].weight), nn.init.constant_(model[1].weight, 0.5)
        >>> x = torch.randn(1, 2, 8)
        >>> print(report(retrofit(model, x, select="1"), x))
        name  convolution                   domain   smallest  largest   defect  parametrized  t  parameters
        ----------------------------------------------------------------------------------------------------
        0     Conv1d 2 -> 2, 3 taps, zeros  8 in 10         1        1  0.0e+00            no  -  14 (82.4%)
        1     Conv1d 2 -> 1, 1 tap          8          0.7071   0.7071  2.9e-01           yes  0   3 (17.6%)
        (a in b: images of size a, continued by zeros to the torus b, on which the values are.
        What the module does is a part of that operator: no singular value of it is larger.)
    """
    names = convolutions_of(model)
    asked = {names[name]: pairs for name, pairs in by_name(blocks or {}, names).items()}
    seen = sizes(model, example_inputs)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows: list[Row] = []
    for name, module in model.named_modules():  # each once, by its first name
        if name not in names:
            continue
        if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
            raise ValueError(f"the parameters of {name or 'the model'} should be finite. Found nan or inf")
        with torch.no_grad(), parametrize.cached():  # a parametrized weight is computed once
            for size in seen.get(module, [None]):
                rows += _rows(name, module, size, asked.get(module, []), total)
    return Report(tuple(rows))


def plot_spectrum(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    before: Tensor | nn.Module | None = None,
    axes: Sequence[Axes] | None = None,
) -> tuple[Axes, ...]:
    """Draws the eigenvalues of a convolution, and its singular values over frequency.

    Of an orthogonal one the former are on the unit circle, and the latter 1. With zero padding the operator
    is that on the torus on which zeros continue the images, as in `report`.

    Args:
        convolution: a kernel or a module, as of `singular_values`; of a module that is not periodic, one
            whose padding is zeros.
        domain: size of the images.
        before: another to compare it with, such as a copy of the module that was not orthogonal yet.
        axes: of matplotlib, to draw into: two, or for a convolution that changes the number of channels, or
            with a stride, which has no eigenvalues, one. Default: a new figure.

    Returns:
        The axes: eigenvalues, if it has any, and singular values.

    Raises:
        ImportError: if matplotlib is missing (extra ``[plot]``).
        TypeError, ValueError: as `singular_values`; if the operator is neither periodic nor between zeros;
            if the number of axes is another.

    Cost: the singular values and eigenvalues of one matrix for each frequency.

    Example:
        >>> from torch import nn
        >>> from orthoconv_param import orthogonal, plot_spectrum
        >>> conv = orthogonal(nn.Conv2d(4, 4, 3, padding=1))
        >>> eigenvalues, values = plot_spectrum(conv, domain=16)
        >>> values.get_xlabel()
        'frequency (cycles per pixel)'
    """
    shown = [("", convolution)] if before is None else [("before", before), ("after", convolution)]
    drawn = [(label, *_lattice_and_spectrum(one, domain)) for label, one in shown]
    square = all(M.shape[-2] == M.shape[-1] and max(lat.stride) == 1 for _, lat, M in drawn)
    panels = _panels(axes, 2 if square else 1)
    for (label, lattice, M), color in zip(drawn, ["C1", "C0"][-len(drawn) :], strict=True):
        values = torch.linalg.svdvals(M)
        defect = (values - 1).abs().max().item()
        style = {"s": 9, "color": color, "alpha": 0.6, "linewidths": 0, "label": label}
        if square:
            z = torch.linalg.eigvals(M).flatten().cpu()
            if not lattice.is_complex:  # those of the negative frequencies
                z = torch.cat([z, z.conj().resolve_conj()])
            panels[0].scatter(z.real, z.imag, **style)
        frequency = lattice.wavenumbers().norm(dim=-1)
        style["label"] = f"{label}: defect {defect:.1e}".lstrip(": ")
        panels[-1].scatter(
            frequency[:, None].expand(values.shape).flatten(), values.flatten().cpu(), **style
        )
    torus = drawn[-1][1].domain
    unit = ("sample", "pixel", "voxel")[len(torus) - 1]
    on = f"{'x'.join(map(str, torus))} {unit}s"
    largest = max(torch.linalg.matrix_norm(M, 2).max().item() for _, _, M in drawn)
    if square:
        circle = torch.linspace(0, 2 * pi, 361)
        panels[0].plot(circle.cos(), circle.sin(), color="gray", linewidth=0.8, zorder=0)
        panels[0].set(title=f"eigenvalues on {on}", xlabel="real part", ylabel="imaginary part")
        panels[0].set_aspect("equal")
    panels[-1].axhline(1, color="gray", linewidth=0.8, zorder=0)
    panels[-1].set(
        title=f"singular values on {on}", xlabel=f"frequency (cycles per {unit})", ylabel="singular value"
    )
    panels[-1].set_ylim(0, 1.25 * max(largest, 1))  # room for the legend
    panels[-1].legend(loc="upper left")
    return tuple(panels)


def plot_gradient_norms(
    model: nn.Module | Mapping[str, nn.Module],
    inputs: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    time_axis: int = 1,
    axes: Axes | None = None,
) -> Axes:
    r"""Draws how strongly the loss of a recurrent model depends on each of its time steps.

    .. math:: t \mapsto \|\partial\, \mathrm{loss} / \partial x_t\|

    on a logarithmic scale. Where the state's operator is orthogonal it stays of one size; elsewhere it
    vanishes or explodes geometrically towards the first steps.

    Args:
        model: takes a sequence; or several by name, such as an orthogonal and an ordinary one. Run in
            evaluation mode; its parameters' gradients stay as they are.
        inputs: a tensor with an axis of time; or a tuple of arguments of which it is the first, or a
            dict of keyword arguments of which it is the first.
        loss: of what the model returns, a scalar. Default: the mean square; of a sequence as long as
            the input, of its last time step.
        time_axis: of the sequence, and of the output.
        axes: of matplotlib, to draw into. Default: a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is missing (extra ``[plot]``).
        TypeError, ValueError: if the inputs are no floating sequence, or there is no model; if a loss is
            not a scalar, or does not depend on the sequence.

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
        curves[name] = gradient.movedim(time_axis, 0).flatten(1).norm(dim=1).double().cpu()
    panel = _panels(None if axes is None else [axes], 1)[0]
    for name, curve in curves.items():
        panel.semilogy(range(len(curve)), torch.where(curve > 0, curve, nan), label=name)
    panel.set(
        title="gradient of the loss at each time step",
        xlabel="time step",
        ylabel="norm of the gradient at the input",
    )
    panel.legend()
    return panel


def _mean_square(y: Any, x: Tensor, time_axis: int) -> Tensor:
    if not isinstance(y, Tensor):
        raise ValueError(f"loss should be given: the model returns {type(y).__name__}, no tensor")
    if y.ndim == x.ndim and y.shape[time_axis] == x.shape[time_axis]:
        y = y.select(time_axis, -1)
    return y.abs().square().mean()


def _panels(axes: Sequence[Axes] | None, number: int) -> list[Axes]:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install orthoconv_param[plot]") from error
    if axes is None:
        _, made = pyplot.subplots(
            1, number, figsize=(5.2 * number, 4.2), squeeze=False, layout="constrained"
        )
        return list(made[0])
    if len(axes) != number:
        raise ValueError(f"axes should be {number}. Found {len(axes)}")
    return list(axes)


def _rows(name: str, module: Any, size: Size | None, asked: list[Block], total: int) -> list[Row]:
    parts = list(module.modules())
    exponential = next((part for part in parts if isinstance(part, ConvExponential)), None)
    stack = next((part for part in parts if isinstance(part, Blocks)), None)
    t = exponential.progress if isinstance(exponential, Annealed) else 1.0
    constrained = stack.blocks if stack is not None else []

    def row(title: str, geometry: str, block: Block | None, how: _Parametrized, parameters: int) -> Row:
        values, torus = _on_torus(module, size, block)
        extremes = (nan, nan, nan)
        if values is not None:
            extremes = values.min().item(), values.max().item(), (values - 1).abs().max().item()
        share = parameters / max(total, 1)
        now = None if how == "no" else t
        return Row(title, geometry, size, torus, *extremes, how, now, parameters, share)

    whole: _Parametrized = "no" if exponential is None else "yes" if stack is None else "blocks"
    count = sum(parameter.numel() for parameter in module.parameters())
    rows = [row(name, _geometry(module), None, whole, count)]
    for block in constrained + [b for b in _resolved(asked, module) if b not in constrained]:
        r, c = block
        side = r.stop - r.start
        title = f"{name}[{r.start}:{r.stop}, {c.start}:{c.stop}]"
        how: _Parametrized = "yes" if block in constrained else "no"
        rows.append(row(title, f"block {side} x {side}", block, how, side**2 * prod(module.kernel_size)))
    return rows


def _resolved(blocks: list[Block], module: Any) -> list[Block]:
    return resolve_blocks(blocks, module.weight.shape, module.groups) if blocks else []


def _geometry(module: Any) -> str:
    convolution = next(c for c in CONVOLUTIONS if isinstance(module, c)).__name__
    single = max(module.kernel_size) == 1
    taps = "x".join(map(str, module.kernel_size))
    if len(module.kernel_size) == 1:
        taps += " tap" if single else " taps"
    details = [
        taps,
        *(
            f"{key} {max(value) if len(set(value)) == 1 else value}"
            for key, value in (("stride", module.stride), ("dilation", module.dilation))
            if max(value) > 1
        ),
        *([f"groups {module.groups}"] if module.groups > 1 else []),
        *([] if single else [getattr(module, "_boundary", module.padding_mode)]),
    ]
    return f"{convolution} {module.in_channels} -> {module.out_channels}, {', '.join(details)}"


def _cells(row: Row) -> tuple[str, ...]:
    def size(numbers: Size) -> str:
        return "x".join(map(str, numbers))

    domain = "not reached"
    if row.domain is not None:
        domain = size(row.domain)
        if row.torus is not None and row.torus != row.domain:
            domain += f" in {size(row.torus)}"
    smallest, largest = ("?" if x != x else f"{x:.4g}" for x in (row.smallest, row.largest))
    return (
        row.name or "(model)",
        row.geometry,
        domain,
        smallest,
        largest,
        "?" if row.defect != row.defect else f"{row.defect:.1e}",
        row.parametrized,
        "-" if row.t is None else f"{row.t:.3g}",
        f"{row.parameters} ({row.share:.1%})",
    )


def _on_torus(module: Any, size: Size | None, block: Block | None) -> tuple[Tensor | None, Size | None]:
    """Singular values of a module, or of a block of its weight, and the torus on which they are."""
    if size is None:
        return None, None
    geometry = _geometry_between_zeros(module, size)
    if geometry is not None:
        lattice, placement = geometry
        kernel = module.weight.detach()
        if block is not None:
            kernel = kernel[block]
            lattice = Lattice(lattice.domain, module.stride, 1, kernel.is_complex())
        return _of_kernel(kernel, lattice, placement), lattice.domain
    entries = module.in_channels * module.out_channels * prod(size) ** 2 // prod(module.stride)
    if block is None and entries <= _LARGEST_REPORTED:
        return _of_dense(module, size), size
    return None, size


def _geometry_between_zeros(module: Any, size: Size) -> tuple[Lattice, Placement] | None:
    """Where and how a module's kernel acts: between zeros on a larger torus; None if it does otherwise."""
    if not convolves(module) or _is_hooked(module):
        return None
    geometry = periodic(module, size)
    if geometry is None and getattr(module, "_boundary", module.padding_mode) == "zeros":
        taps, stride = tuple(module.weight.shape[2:]), module.stride
        placement = Placement.centred(taps, getattr(module, "_dilation", module.dilation))
        torus = between_zeros(size, placement.extent(taps), stride)
        if getattr(module, "_size", None) is not None:  # its kernel is what it is on that torus
            torus = taps
        geometry = Lattice(torus, stride, module.groups, module.weight.is_complex()), placement
    return geometry


def _check_finite(numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError("convolution should be finite. Found nan or inf")


@torch.no_grad()
def _spectrum(kernel: Tensor, lattice: Lattice, placement: Placement) -> Tensor:
    _check_finite(kernel)
    double = torch.complex128 if kernel.is_complex() else torch.float64
    return lattice.spectrum(kernel.to(double), placement)


def _lattice_and_spectrum(convolution: Tensor | nn.Module, domain: int | Size) -> tuple[Lattice, Tensor]:
    if isinstance(convolution, Tensor):
        lattice, placement = _geometry_of_kernel(convolution, domain)
        return lattice, _spectrum(convolution.detach(), lattice, placement)
    _check_convolution(convolution)
    module: Any = convolution
    geometry = _geometry_between_zeros(module, per_axis("domain", domain, len(module.kernel_size)))
    if geometry is None:
        raise ValueError(
            "convolution should be periodic, or between zeros, and keep the size, so that it has a "
            f"spectrum. Found {module}"
        )
    return geometry[0], _spectrum(module.weight.detach(), *geometry)


def _of_kernel(kernel: Tensor, lattice: Lattice, placement: Placement) -> Tensor:
    return torch.linalg.svdvals(_spectrum(kernel, lattice, placement))


def _geometry_of_kernel(
    kernel: Tensor,
    domain: int | Size,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> tuple[Lattice, Placement]:
    check_dtype("convolution", kernel)
    axes = kernel.ndim - 2
    per_axis("domain", domain, max(axes, 1))  # not None
    count("groups", groups)
    lattice = Lattice.of_kernel(kernel.shape, kernel.is_complex(), domain, stride, groups, folds=True)
    return lattice, Placement.centred(tuple(kernel.shape[2:]), per_axis("dilation", dilation, axes))


def _check_convolution(module: Any) -> None:
    if not isinstance(module, CONVOLUTIONS):
        raise TypeError(
            "convolution should be a kernel, an nn.Conv* or an nn.ConvTranspose*. "
            f"Found {type(module).__name__}"
        )


def _of_module(module: Any, domain: int | Size) -> Tensor:
    _check_convolution(module)
    grid = per_axis("domain", domain, len(module.kernel_size))
    if module.transposed and any(n % s for n, s in zip(grid, module.stride, strict=True)):
        raise ValueError(f"domain should be divisible by the stride {module.stride}. Found {grid}")
    geometry = periodic(module, grid) if convolves(module) and not _is_hooked(module) else None
    return _of_dense(module, grid) if geometry is None else _of_kernel(module.weight, *geometry)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


@torch.no_grad()
def _of_dense(module: Any, domain: Size) -> Tensor:
    size = domain
    if module.transposed:
        size = tuple(n // s for n, s in zip(domain, module.stride, strict=True))
    numbers = module.in_channels * prod(size)
    zero = torch.zeros(1, module.in_channels, *size, dtype=module.weight.dtype, device=module.weight.device)
    bias = module(zero)
    if numbers * bias.numel() > _LARGEST_DENSE:
        raise ValueError(
            f"domain should be smaller: the dense matrix of a module that is not periodic should have at "
            f"most {_LARGEST_DENSE} entries. Found {bias.numel()} x {numbers}. (The periodic operator of "
            "module.weight is cheap.)"
        )
    pieces = (
        torch.eye(numbers, dtype=zero.dtype, device=zero.device).reshape(-1, *zero.shape[1:]).split(256)
    )
    matrix = torch.cat([(module(piece) - bias).flatten(1) for piece in pieces])
    _check_finite(matrix)
    return torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float64)))
