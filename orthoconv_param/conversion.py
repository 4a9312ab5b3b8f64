r"""`orthogonal`: a convolution module whose operator is orthogonal at the sizes that it is fed.

`ConvExponential` makes a kernel orthogonal; here the module also applies it as the operator that is
orthogonal: periodically, or on a larger torus from which the image is cut out; through the Fourier
transform, or directly where that is faster.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from math import ceil, gcd, log2, prod
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .blocks import Blocks
from .exponential import HALF
from .lattice import (
    Lattice,
    Placement,
    Size,
    between_zeros,
    clip,
    crop,
    cut,
    extend,
    fold,
    per_axis,
    surround,
)
from .parametrization import ConvExponential, no_autocast
from .spectral import Shared, spectral_conv
from .trivializations import Trivialization

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_BOUNDARIES = ("circular", "zeros")
_USUAL_BATCH = 16

_Module = TypeVar("_Module", bound=nn.Module)
_Convolution: TypeAlias = Any  # a module of one of these classes, whose attributes torch does not annotate


def orthogonal(
    module: _Module,
    name: str = "weight",
    *,
    domain: int | Size | Literal["any"] = "any",
    boundary: Literal["circular", "zeros"] = "circular",
    triv: str | Trivialization = "expm",
    base: bool | None = None,
) -> _Module:
    r"""Makes the operator of a convolution orthogonal (complex: unitary) at the sizes that it is fed.

    .. math:: \|\mathrm{module}(x) - \mathrm{bias}\| = \|x\|

    for every image ``x``, if the module gives at least as many numbers as it takes; if it gives fewer, its
    adjoint has this property. In either case all its singular values are 1. The module stays the same
    object, of the same parameters, and is trained as before: its weight is parametrized by
    `ConvExponential`. Kernel size, stride, groups and dilation may be any, real or complex, transposed or
    not.

    With ``boundary="circular"`` the module becomes periodic, whatever its padding mode was. With
    ``"zeros"`` the image is continued by zeros, the orthogonal operator of a larger torus is applied, and
    the image is cut out. That never expands (singular values at most 1), and is orthogonal in the interior.

    Args:
        module: ``nn.Conv1d``, ``2d``, ``3d`` or ``nn.ConvTranspose1d``, ``2d``, ``3d``, whose padding keeps
            the size (divided by the stride).
        name: of the kernel.
        domain: ``"any"``: images of every size, several in turn too. The weight *is* the generator, and
            the kernel has as many taps as its exponential needs in the weight's dtype. For stride 1 and as
            many output as input channels, the operator is the exponential of the skew part of what it was.
            A size: only images of that size (of a transposed convolution: outputs). It starts at the
            orthogonal operator nearest to the periodic one that the weight was before.
        boundary: ``"circular"`` or ``"zeros"``.
        triv: ``"expm"``, ``"cayley"`` or a callable, as of `ConvExponential`.
        base: as of `ConvExponential`. Default: True with a given size, else False.

    Returns:
        ``module``, with ``module.parametrizations.weight``. ``module.weight`` is the kernel, ``K`` x ``K``
        or of the size of the domain.

    Raises:
        TypeError: if ``module`` is no convolution, or an argument is not of its kind.
        ValueError: if the convolution does not keep the size; if the domain is smaller than the kernel, or
            not divisible by the stride; if no semi-orthogonal operator of that stride and dilation
            exists; if the weight is not finite, or parametrized already. Nothing is changed then.
            On use: if an image is not of the domain's size, or not divisible by the stride; with
            ``"any"``, if training takes the generator's norm to where no kernel of 1025 taps holds it.

    ``parametrize.cached()`` makes a loop compute the exponential, and the kernel's transform, once.
    ``parametrize.remove_parametrizations(module, "weight")`` leaves a module that computes the same: one of
    torch's own classes, if torch can compute it at the sizes that the module has been called with. Its
    weight has another shape than the generator had, so it needs a new optimizer.

    With ``"any"`` the kernel's size follows the generator's norm. Under ``torch.compile`` and ``vmap`` it
    cannot, and stays what the last ordinary call made it: call the module once in a while outside of
    them during training, or the defect grows.

    Cost: that of `ConvExponential`, and for each image of ``N`` points the transforms of its channels
    and ``2 N`` real multiplications for each pair of channels. Where a direct convolution costs
    less, it is used.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import orthogonal, orthogonality_defect
        >>> conv = orthogonal(nn.Conv2d(8, 8, 3, padding=1, bias=False))
        >>> x = torch.randn(2, 8, 20, 31)
        >>> torch.allclose(conv(x).norm(), x.norm())
        True
        >>> orthogonality_defect(conv, domain=(20, 31)) < 1e-5
        True
    """
    conversion = Conversion.of(module, name, domain, boundary)
    parametrization = ConvExponential(
        conversion.torus, stride=conversion.stride, groups=conversion.groups, triv=triv, base=base
    )
    parametrization.placement = conversion.placement
    parametrization.owner = repr(module).partition("\n")[0]
    conversion.install(parametrization)
    return module


@dataclass(frozen=True)
class Conversion:
    """How a convolution is to be made orthogonal, once everything about it has been checked.

    Args:
        module: the convolution.
        size: of the images, if it is given.
        boundary: in which it is evaluated.
        torus: on which the exponential is taken.
        placement: of the generator's taps.
        dilation: with which the kernel is applied.
        stride: of the convolution.
        groups: of what is exponentiated: the convolution's, or the blocks of its weight.
    """

    module: _Convolution
    size: Size | None
    boundary: str
    torus: Size | Literal["any"]
    placement: Placement
    dilation: Size
    stride: Size
    groups: int

    @classmethod
    def of(
        cls,
        module: nn.Module,
        name: str,
        domain: int | Size | Literal["any"],
        boundary: str,
        part: tuple[int, int, int] | None = None,
        small: bool = False,
    ) -> "Conversion":
        """Checks everything, and changes nothing.

        Args:
            module: as of `orthogonal`.
            name: likewise.
            domain: likewise.
            boundary: likewise.
            part: channels out and in, and groups, of the part of the weight that is to be orthogonal.
            small: whether between zeros the domain may be smaller than the kernel, whose taps the torus
                holds all the same; and whether a single tap, which sees no domain, takes every size.

        Raises:
            TypeError, ValueError: as `orthogonal` does.
        """
        _check_module(module, name)
        if boundary not in _BOUNDARIES:
            raise ValueError(f"boundary should be one of {_BOUNDARIES}. Found {boundary!r}")
        if domain is None or (isinstance(domain, str) and domain != "any"):
            kind = TypeError if domain is None else ValueError
            raise kind(f'domain should be "any", a size, or a tuple of sizes. Found {domain!r}')
        conv: _Convolution = module
        taps, stride = tuple(conv.weight.shape[2:]), conv.stride
        # the dilation of a single tap says nothing
        dilation = tuple(r if k > 1 else 1 for r, k in zip(conv.dilation, taps, strict=True))
        start = origin(conv, taps, stride, dilation)
        out, cin, groups = part or (*conv.weight.shape[:2], conv.groups)
        shape = (out, cin, *taps)
        _check_existence(shape, stride, dilation, groups)

        if domain != "any":
            size = per_axis("domain", domain, len(taps))
            placement = Placement(dilation, start)
            folds = small and boundary == "zeros"
            Lattice.of_kernel(shape, conv.weight.is_complex(), size, stride, groups, dilation, folds)
            if max(taps) == 1:  # sees one frequency like any other: one coarse point, and no boundary
                found = None if small else size
                return cls(conv, found, "circular", stride, placement, dilation, stride, groups)
            torus = size if boundary == "circular" else between_zeros(size, placement.extent(taps), stride)
            ones = (1,) * len(taps)
            return cls(conv, size, boundary, torus, placement, ones, stride, groups)
        # A compact kernel of undilated taps costs less than one of dilated taps. Dilated afterwards it
        # is orthogonal too, as long as that only permutes the stride's aliases.
        axes = zip(start, dilation, stride, strict=True)
        inner = tuple(1 if o % r == 0 and gcd(r, s) == 1 else r for o, r, s in axes)
        outer = tuple(r // i for r, i in zip(dilation, inner, strict=True))
        placement = Placement(inner, tuple(o // r for o, r in zip(start, outer, strict=True)))
        return cls(conv, None, boundary, "any", placement, outer, stride, groups)

    def install(self, parametrization: nn.Module) -> Callable[[], None]:
        """Registers a parametrization, and has the module evaluated accordingly.

        Returns:
            What makes the module what it was again.
        """
        conv, original, parameters = self.module, self.module.__class__, dict(self.module._parameters)
        value, gradient = conv.weight.detach().clone(), conv.weight.grad

        def undo() -> None:
            conv.__class__ = original
            for attribute in ("_size", "_boundary", "_dilation", "_smallest"):
                conv.__dict__.pop(attribute, None)
            conv._modules.pop("parametrizations", None)
            conv._parameters.clear()
            conv._parameters.update(parameters)
            conv.weight.data = value
            conv.weight.grad = gradient

        conv.weight.grad = None  # not the generator's
        conv.__class__ = _orthogonal_class(original)
        try:
            parametrize.register_parametrization(conv, "weight", parametrization, unsafe=True)
        except BaseException:
            undo()
            raise
        conv._size, conv._boundary = self.size, self.boundary
        conv._dilation, conv._smallest = self.dilation, None
        return undo


def _check_module(module: _Convolution, name: str) -> None:
    """That a module is one that may be made orthogonal.

    Raises:
        TypeError, ValueError: if it is not.
    """
    convolution = next((c for c in CONVOLUTIONS if isinstance(module, c)), None)
    if convolution is None:
        raise TypeError(f"module should be an nn.Conv* or nn.ConvTranspose*. Found {type(module).__name__}")
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"module should not be parametrized yet. Found parametrizations of {[*module.parametrizations]}"
        )
    if not convolves(module):
        raise ValueError(
            f"module should compute what nn.{convolution.__name__} does. "
            f"Found {type(module).__name__}, with a forward of its own"
        )
    if not isinstance(name, str) or module._parameters.get(name) is None:
        computed = ", which hooks compute: remove spectral_norm, weight_norm or prune first"
        raise ValueError(
            f"name should be that of a parameter: {[*module._parameters]}. "
            f"Found {name!r}{computed if name == 'weight' else ''}"
        )
    if name != "weight":
        raise ValueError(f'name should be "weight", with which the module convolves. Found {name!r}')
    if nn.parameter.is_lazy(module.weight):
        raise ValueError("module should know its size: call it once before. Found a lazy module")


def convolves(module: nn.Module) -> bool:
    """Whether a module does to its weight and input what torch's class, or this package's, does."""
    methods = ("forward", "_conv_forward")
    if any(name in vars(module) for name in methods):  # replaced on this module alone
        return False
    if isinstance(module, _Orthogonal):
        return type(module).forward is _Orthogonal.forward
    base = next(c for c in CONVOLUTIONS if isinstance(module, c))
    return all(getattr(type(module), name, None) is getattr(base, name, None) for name in methods)


def origin(module: _Convolution, taps: Size, stride: Size, dilation: Size) -> Size:
    """How far before the output's position the first tap of a module stands, on each axis.

    Raises:
        ValueError: if the module's padding does not keep the size.
    """
    spans = tuple(r * (k - 1) for k, r in zip(taps, dilation, strict=True))
    if isinstance(module, _Orthogonal):
        return Placement.centred(taps, dilation).origin
    if module.padding == "same":
        return tuple(span // 2 for span in spans)
    padding: Size = (0,) * len(taps) if module.padding == "valid" else tuple(module.padding)
    axes = list(zip(spans, padding, stride, module.output_padding, strict=True))
    if module.transposed:
        keeps = all(span - 2 * p == s - 1 - rest for span, p, s, rest in axes)
    else:
        keeps = all(0 <= span - 2 * p <= s - 1 for span, p, s, _ in axes)
    if keeps:
        return padding
    uneven = any(span % 2 and s == 1 for span, _, s, _ in axes)
    right, found = f"padding={tuple(span // 2 for span in spans)}", f"padding={module.padding!r}"
    if module.transposed:
        right += f", output_padding={tuple(s - 1 - span % 2 for span, _, s, _ in axes)}"
        found += f", output_padding={module.output_padding}"
    if uneven:
        possible = not module.transposed and max(stride) == 1
        right = (
            'padding="same"' if possible else "with stride 1 no even kernel does, if its dilation is odd"
        )
    by = "" if max(stride) == 1 else f", but for the stride {stride}"
    raise ValueError(f"padding should keep the size{by}: {right}. Found {found}")


def _check_existence(size: Size, stride: Size, dilation: Size, groups: int) -> None:
    common = tuple(gcd(s, r) for s, r in zip(stride, dilation, strict=True))
    out, seen = size[0] // groups, size[1] * prod(stride) // prod(common)
    if out > seen and max(common) > 1:
        raise ValueError(
            f"stride {stride} and dilation {dilation} leave no semi-orthogonal operator: they see one of "
            f"{prod(common)} samples. They should have no common factor, or, in each group, the {out} "
            f"channels on the coarse side be at most {seen}"
        )


def periodic(module: _Convolution, domain: Size) -> tuple[Lattice, Placement] | None:
    """Where and how a module's kernel acts, if its operator on that domain is periodic; else None."""
    taps, stride = tuple(module.weight.shape[2:]), module.stride
    lattice = Lattice(domain, stride, module.groups, module.weight.is_complex())
    if isinstance(module, _Orthogonal):
        module.check_domain(domain)
        if module._boundary == "circular":
            return lattice, Placement.centred(taps, module._dilation)
        return None
    if any(n % s for n, s in zip(domain, stride, strict=True)):
        return None
    if module.padding_mode != "circular" and max(taps) > 1:
        return None
    try:
        return lattice, Placement(module.dilation, origin(module, taps, stride, module.dilation))
    except ValueError:  # it does not keep the size
        return None


class _Orthogonal(nn.Module):
    """How a convolution with an orthogonal kernel is evaluated: mixed into its torch class."""

    _size: Size | None  # the only one that it takes, or that it gives if it is transposed
    _boundary: str
    _dilation: Size  # with which the kernel is applied
    _smallest: Size | None  # of the domains that it has seen, on each axis

    weight: Tensor
    bias: Any
    in_channels: Any
    out_channels: Any
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    transposed: Any
    output_padding: Any
    groups: Any
    padding_mode: Any
    _reversed_padding_repeated_twice: Any
    parametrizations: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002, it is torch's name
        """The orthogonal operator, and the bias.

        Args:
            input: ``(batch, in, *size)`` or ``(in, *size)``.
            output_size: of a transposed convolution, whose only one it must be.

        Raises:
            TypeError: if the input is not of the weight's dtype.
            ValueError: if it is not of the module's channels, or not of a size that it takes.
        """
        axes = len(self.kernel_size)
        x = input.unsqueeze(0) if input.ndim == axes + 1 else input
        dtype = self._free().dtype
        if x.is_floating_point() and torch.amp.is_autocast_available(x.device.type):
            x = x.to(dtype) if torch.is_autocast_enabled(x.device.type) else x
        domain = self._domain(x, dtype)
        if output_size is not None and tuple(output_size[-axes:]) != domain:
            raise ValueError(f"output_size should be {domain}. Found {tuple(output_size)}")
        if not torch.compiler.is_compiling():
            smallest = domain if self._smallest is None else map(min, domain, self._smallest)
            self._smallest = tuple(smallest)
        with no_autocast(x.device.type):
            # what is compiled is to take batches of any size
            batch = _USUAL_BATCH if torch.compiler.is_compiling() else x.shape[0]
            direct = self._once(("direct", domain, batch), lambda: self._is_direct(domain, batch))
            y = self._direct(x, domain) if direct else self._spectral(x, domain)
            if self.bias is not None:
                y = y + self.bias.reshape(-1, *(1,) * axes)
        return y if input.ndim == x.ndim else y.squeeze(0)

    def extra_repr(self) -> str:
        """What ``print`` says of the module."""
        where = "every domain" if self._size is None else f"domain={self._size}"
        return f"{super().extra_repr()}, orthogonal on {where}, boundary={self._boundary!r}"

    def _free(self) -> Tensor:
        """The parameter: the generator, or once the parametrization is removed the kernel."""
        if not parametrize.is_parametrized(self, "weight"):
            return self.weight
        stack = self.parametrizations.weight
        return stack.original if stack.is_tensor else stack.original0

    def _originals(self) -> Any:
        """What the parametrization's spectrum is of."""
        stack = self.parametrizations.weight
        originals = tuple(getattr(stack, name) for name in self._names())
        return originals[0] if stack.is_tensor else originals

    def _names(self) -> list[str]:
        """How torch calls them; the generator's comes first."""
        stack = self.parametrizations.weight
        return ["original"] if stack.is_tensor else [f"original{i}" for i in range(stack.ntensors)]

    def _exponential(self) -> ConvExponential | Blocks | None:
        """The parametrization, if it alone makes the kernel."""
        if not parametrize.is_parametrized(self, "weight"):
            return None
        stack = self.parametrizations.weight
        return stack[0] if len(stack) == 1 and isinstance(stack[0], (ConvExponential, Blocks)) else None

    def _domain(self, x: Tensor, dtype: torch.dtype) -> Size:
        """The fine grid of this input."""
        axes = len(self.kernel_size)
        if x.ndim != axes + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input should have {self.in_channels} channels and {axes} axes of space. "
                f"Found size {tuple(x.shape)}"
            )
        if x.dtype != dtype:
            raise TypeError(f"input should be of the weight's dtype, {dtype}. Found {x.dtype}")
        if self._size is not None and _is_traced():  # sizes are tensors there
            return self._size
        size = tuple(x.shape[2:])
        domain = tuple(n * s for n, s in zip(size, self.stride, strict=True)) if self.transposed else size
        self.check_domain(domain)
        return domain

    def check_domain(self, domain: Size) -> None:
        """That images of this size (transposed: outputs) are what the module takes.

        Raises:
            ValueError: if not.
        """
        what = "output" if self.transposed else "input"
        if self._size is not None and domain != self._size:
            raise ValueError(f"{what} should be of the domain's size, {self._size}. Found {domain}")
        if min(domain) < 1 or any(n % s for n, s in zip(domain, self.stride, strict=True)):
            raise ValueError(
                f"{what} should be of a size divisible by the stride {self.stride}. Found {domain}"
            )

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What was computed before within `parametrize.cached`, which also forgets it."""
        if not parametrize._cache_enabled or not parametrize.is_parametrized(self, "weight"):
            return compute()
        key = (id(self), key)
        if key not in parametrize._cache:
            parametrize._cache[key] = compute()
        return parametrize._cache[key]

    # Through the Fourier transform

    def _spectral(self, x: Tensor, domain: Size) -> Tensor:
        dtype = x.dtype
        x = x.float() if dtype in HALF else x
        lattice, M = self._once(("spectrum", domain), lambda: self._shared(domain))
        if lattice.domain == domain or max(self.stride) == 1:
            return spectral_conv(x, M, lattice, self.transposed).to(dtype)
        x = extend(x, lattice.grid if self.transposed else lattice.domain)
        size = domain
        if not self.transposed:
            size = tuple(n // s for n, s in zip(domain, self.stride, strict=True))
        return cut(spectral_conv(x, M, lattice, self.transposed), size).to(dtype)

    def _shared(self, domain: Size) -> tuple[Lattice, Tensor | Shared]:
        """The spectrum, of which a loop gathers the gradients."""
        lattice, M = self._spectrum(domain)
        return lattice, Shared(M, lattice) if parametrize._cache_enabled else M

    def _spectrum(self, domain: Size) -> tuple[Lattice, Tensor]:
        """The operator's matrices on the torus on which it is evaluated for images on the domain."""
        exponential, free = self._exponential(), self._free()
        if exponential is not None and (self._size is not None or self._is_small(domain)):
            lattice, M = exponential.spectrum(self._originals(), domain, self._dilation)
            if not lattice.compact:
                return lattice, M.to(torch.promote_types(free.dtype, torch.complex64))
        kernel, torus = self._once("kernel", self._kernel), domain
        if self._boundary == "zeros" and self._size is None:
            kernel, torus = clip(kernel, domain, self.stride, self._dilation)
        elif self._boundary == "zeros":
            torus = tuple(kernel.shape[2:])
        lattice = Lattice(torus, self.stride, self.groups, kernel.is_complex())
        return lattice, lattice.spectrum(kernel, Placement.centred(tuple(kernel.shape[2:]), self._dilation))

    def _is_small(self, domain: Size) -> bool:
        """Whether the exponential is to be taken on so small an image's own grid."""
        exponential = self._exponential()
        if not isinstance(exponential, ConvExponential):
            return False
        if self._size is not None or self._boundary != "circular":
            return False
        return exponential.fits(Lattice(domain, self.stride, self.groups, self._free().is_complex()))

    def _kernel(self) -> Tensor:
        """The kernel, in single precision at least: half precision rounds the weight only."""
        exponential, free = self._exponential(), self._free()
        if exponential is None:
            return self.weight.to(torch.promote_types(free.dtype, torch.float32))
        lattice, M = exponential.spectrum(self._originals())
        return lattice.kernel(M).to(torch.promote_types(free.dtype, torch.float32))

    # Directly

    def _is_direct(self, domain: Size, batch: int) -> bool:
        """Whether a direct convolution is faster, by Note [cost model].

        One with as many taps as the domain has points never is. What is traced for other runtimes is
        direct all the same: they know no Fourier transform, or none of complex numbers.
        """
        exponential = self._exponential()
        exports = torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
        if exponential is None and (exports or _is_traced()):
            return True
        if exponential is None and parametrize.is_parametrized(self, "weight"):
            return False  # nobody knows its taps
        taps = tuple(self.weight.shape[2:]) if exponential is None else exponential.taps
        if self._size is not None:  # a single tap, or its phases
            return any(k < n for k, n in zip(taps, self._size, strict=True))
        if self._is_small(domain):
            return False
        lattice = Lattice(domain, self.stride, self.groups, self._free().is_complex())
        sides = self.out_channels, self.in_channels
        sides = sides[::-1] if self.transposed else sides
        return direct_cost(*sides, taps, lattice, batch) < spectral_cost(*sides, lattice, batch)

    def _direct(self, x: Tensor, domain: Size) -> Tensor:
        kernel, dilation, axes = self.weight, self._dilation, len(domain)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        if self._boundary == "zeros":
            if self._size is not None:
                kernel = crop(kernel, tuple(2 * n - 1 for n in domain))
            padding = tuple(r * (k // 2) for k, r in zip(kernel.shape[2:], dilation, strict=True))
            if not self.transposed:
                return convolve(x, kernel, None, self.stride, padding, dilation, self.groups)
            rest = tuple(s - 1 for s in self.stride)
            return transposed(x, kernel, None, self.stride, padding, rest, self.groups, dilation)
        if any(r * (k - 1) >= n for k, r, n in zip(kernel.shape[2:], dilation, domain, strict=True)):
            kernel, dilation = fold(kernel, domain, dilation), (1,) * axes
        taps = tuple(kernel.shape[2:])
        before = Placement.centred(taps, dilation).origin
        after = Placement.centred(taps, dilation).after(taps)
        if not self.transposed:
            x = surround(x, before, after)
            return convolve(x, kernel, None, self.stride, 0, dilation, self.groups)
        # each output needs the inputs whose taps reach it
        margins = [
            tuple(ceil(n / s) for n, s in zip(side, self.stride, strict=True)) for side in (after, before)
        ]
        y = transposed(surround(x, *margins), kernel, None, self.stride, 0, 0, self.groups, dilation)
        start = tuple(b + s * m for b, s, m in zip(before, self.stride, margins[0], strict=True))
        return cut(y, domain, start)

    # Being a module

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """As of any module. A checkpoint of the plain convolution means: start from these weights."""
        exponential, stack = self._exponential(), prefix + "parametrizations.weight."
        if exponential is not None and prefix + "weight" in state_dict:
            W = state_dict.pop(prefix + "weight")
            # what is not replaced stays
            state_dict |= {stack + k: v for k, v in self.parametrizations.weight.state_dict().items()}
            try:
                X, buffers = exponential.preimage(W.to(self._free()))
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"While starting from {prefix}weight: {error}")
            else:
                originals = (X,) if isinstance(X, Tensor) else X
                state_dict |= {stack + k: v for k, v in zip(self._names(), originals, strict=True)}
                state_dict |= {f"{stack}0.{k}": v for k, v in buffers.items()}
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if exponential is not None:
            generator = state_dict.get(stack + self._names()[0])
            if isinstance(generator, Tensor):
                exponential.loaded(generator)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module. When `remove_parametrizations` puts the kernel here, it settles the rest."""
        super().register_parameter(name, param)
        if name == "weight" and param is not None and "_dilation" in self.__dict__:
            param.grad = None  # it was the generator's
            if "bias" in self._parameters:  # the order that it had
                self._parameters["bias"] = self._parameters.pop("bias")
            self._settle(tuple(param.shape[2:]))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As of any module. Of several frozen parameters `remove_parametrizations` makes a buffer."""
        if name == "weight" and tensor is not None and "_dilation" in self.__dict__:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            super().register_buffer(name, tensor, persistent)

    def _settle(self, taps: Size) -> None:
        """The attributes of a module with this kernel, and torch's own class if that computes the same."""
        if taps == self.kernel_size and taps != self._size:
            # One tap is what it was. Otherwise the free parameter was asked back, without its meaning.
            self._become_plain()
            return
        before = Placement.centred(taps, self._dilation).origin
        after = Placement.centred(taps, self._dilation).after(taps)
        self.kernel_size, self.dilation = taps, self._dilation
        if self.transposed:
            self.output_padding = tuple(s - 1 for s in self.stride)
        else:
            self.padding_mode = self._boundary
            sides = zip(before[::-1], after[::-1], strict=True)
            self._reversed_padding_repeated_twice = [p for side in sides for p in side]
        self.padding = before if before == after else "same"
        if self._boundary == "zeros":
            plain = self._size is None
        else:  # torch pads an image by no more than its size
            smallest = self._size or self._smallest
            fits = smallest is not None and all(a <= n for a, n in zip(after, smallest, strict=True))
            plain = fits and not self.transposed and (before == after or max(self.stride) == 1)
        if plain:
            self._become_plain()

    def _become_plain(self) -> None:
        """Of torch's own class again: the base of the parametrized one, which is this module's alone."""
        del self._size, self._boundary, self._dilation, self._smallest
        type(self).__bases__ = (self._plain_class(),)

    def _plain_class(self) -> Any:
        """The class that the module was of."""
        mro = type(self).__mro__
        return mro[mro.index(_Orthogonal) + 1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if parametrize.is_parametrized(self):  # torch refuses
            return super().__reduce_ex__(protocol)
        return _rebuild, (self._plain_class(),), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Orthogonal":
        # Parametrized copies would share their class, and with it the property that removal deletes.
        cls = type(self)
        if parametrize.is_parametrized(self):
            own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
            cls = type(cls.__name__, cls.__bases__, own)
        replica = cls.__new__(cls)
        memo[id(self)] = replica
        replica.__dict__ = deepcopy(self.__dict__, memo)
        return replica


def _is_traced() -> bool:
    return torch._C._get_tracing_state() is not None


@cache
def _orthogonal_class(cls: Any) -> Any:
    """A subclass of a torch convolution that is evaluated as `_Orthogonal`."""
    if issubclass(cls, _Orthogonal):
        return cls
    return type(f"Orthogonal{cls.__name__}", (_Orthogonal, cls), {})


def _rebuild(cls: Any) -> Any:
    return object.__new__(_orthogonal_class(cls))


# Note [cost model]
# Nanoseconds of one forward pass in single precision, as measured on 2 cores by
# tests/benchmarks/evaluation.py. Only the ratio matters, and a backward pass changes it little.


def direct_cost(out: int, cin: int, taps: Size, lattice: Lattice, batch: int) -> float:
    """Estimated time of a direct convolution."""
    each = 0.015 if cin >= 8 * lattice.groups else 0.025  # a multiplication, with many channels or few
    met = prod([min(k, n) for k, n in zip(taps, lattice.domain, strict=True)])
    return 2e5 + each * batch * prod(lattice.grid) * met * out * cin / lattice.groups


def spectral_cost(out: int, cin: int, lattice: Lattice, batch: int) -> float:
    """Estimated time of a convolution through the Fourier transform.

    That of its kernel included, unless it is to be used again.
    """
    points, kernels = prod(lattice.domain), out * cin / lattice.groups
    images = batch * (cin * points + out * prod(lattice.grid))
    cost = 3e5 + 0.25 * images * log2(2 * points) + 0.1 * batch * kernels * points
    return cost if parametrize._cache_enabled else cost + 1e5 + 0.4 * kernels * points * log2(2 * points)
