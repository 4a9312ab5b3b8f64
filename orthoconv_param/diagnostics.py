r"""What a convolution does to the size of its input: singular values and their distance from 1."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan, prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .blocks import Block, Blocks, resolve_blocks
from .conversion import CONVOLUTIONS, convolves, periodic
from .exponential import check_dtype
from .lattice import Lattice, Placement, Size, between_zeros, count, per_axis
from .parametrization import ConvExponential
from .retrofit import Annealed, by_name, convolutions_of, sizes

_LARGEST_DENSE = 2**27  # entries: one gigabyte
_LARGEST_REPORTED = 2**20  # likewise, in a table: a second

_Parametrized: TypeAlias = Literal["yes", "no", "blocks"]


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
    check_dtype("convolution", convolution)
    axes = convolution.ndim - 2
    taps = tuple(convolution.shape[2:])
    per_axis("domain", domain, max(axes, 1))  # not None
    count("groups", groups)
    lattice = Lattice.of_kernel(
        convolution.shape, convolution.is_complex(), domain, stride, groups, folds=True
    )
    return _of_kernel(convolution, lattice, Placement.centred(taps, per_axis("dilation", dilation, axes)))


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
    taps, stride = tuple(module.weight.shape[2:]), module.stride
    if convolves(module) and not _is_hooked(module):
        geometry = periodic(module, size)
        if geometry is None and getattr(module, "_boundary", module.padding_mode) == "zeros":
            dilation = getattr(module, "_dilation", module.dilation)
            placement = Placement.centred(taps, dilation)
            torus = between_zeros(size, placement.extent(taps), stride)
            if getattr(module, "_size", None) is not None:  # its kernel is what it is on that torus
                torus = taps
            geometry = Lattice(torus, stride, module.groups, module.weight.is_complex()), placement
        if geometry is not None:
            lattice, placement = geometry
            kernel = module.weight.detach()
            if block is not None:
                kernel = kernel[block]
                lattice = Lattice(lattice.domain, stride, 1, kernel.is_complex())
            return _of_kernel(kernel, lattice, placement), lattice.domain
    entries = module.in_channels * module.out_channels * prod(size) ** 2 // prod(stride)
    if block is None and entries <= _LARGEST_REPORTED:
        return _of_dense(module, size), size
    return None, size


@torch.no_grad()
def _of_kernel(kernel: Tensor, lattice: Lattice, placement: Placement) -> Tensor:
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError("convolution should be finite. Found nan or inf")
    double = torch.complex128 if kernel.is_complex() else torch.float64
    return torch.linalg.svdvals(lattice.spectrum(kernel.to(double), placement))


def _of_module(module: Any, domain: int | Size) -> Tensor:
    if not any(isinstance(module, convolution) for convolution in CONVOLUTIONS):
        raise TypeError(
            "convolution should be a kernel, an nn.Conv* or an nn.ConvTranspose*. "
            f"Found {type(module).__name__}"
        )
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
    return torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float64)))
