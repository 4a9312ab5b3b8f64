r"""`orthogonal`: a convolution module whose operator is orthogonal at the sizes that it is fed.

`ConvExponential` makes a kernel orthogonal; here the module also applies it as the operator that is
orthogonal.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from . import runtime
from .checks import Size, per_axis
from .matrices.maps import Trivialization
from .module import install, operator_of
from .operators.operator import Action
from .parametrizations import signature
from .parametrizations.exponential import ConvExponential
from .parametrizations.split import SplitExponential
from .parametrizations.walled import WalledGenerator
from .split.chain import Chain
from .torus.boundary import BOUNDARIES, CIRCULAR, Boundary, Walls, Zeros, boundary_named, boundary_of
from .torus.geometry import CONVOLUTIONS, Geometry, torch_class
from .torus.lattice import Lattice, Placement

_Module = TypeVar("_Module", bound=nn.Module)


@runtime.out_of_inference_mode
def orthogonal(
    module: _Module,
    name: str = "weight",
    *,
    method: Literal["exponential", "split"] = "exponential",
    domain: int | Size | Literal["any"] = "any",
    boundary: Literal["circular", "zeros", "walls"] | None = None,
    triv: str | Trivialization = "expm",
    base: bool | None = None,
    tol: float | None = None,
) -> _Module:
    """Make the operator of a convolution orthogonal (complex: unitary) at the sizes that it is fed.

        norm(module(x) - bias) == norm(x)

    for every image ``x``, if the output has at least as many numbers as the input; if it has fewer, the
    operator's adjoint has this property. All singular values of the operator are then 1. The module stays
    the same object and is trained as before: its weight is parametrized. It may be real or complex,
    transposed or not, of any kernel size, stride, groups and dilation.

    **The boundary** decides what happens at the image's edges.

    - ``"circular"``, the default, makes the module periodic, **even if it was zero-padded**.
    - ``"walls"``: nothing leaves the image. The operator is orthogonal on the image itself, at every size,
      one pixel included. It is made of zero-padded convolutions.
    - ``"zeros"``: the image is continued by zeros. That is **not orthogonal**: it never expands (singular
      values at most 1), and loses what crosses the image's edge. For example (16 channels, 16x16 images),
      100 steps leave a tenth of a state's norm with ``domain=16`` (smallest singular value 0.001), and two
      thirds with ``domain="any"`` (0.9).

    **The method** decides which kernels are reached, and what they cost.

    - ``"exponential"``, by `ConvExponential`: the kernel is the exponential of the skew part of a trained
      kernel, the *generator*, and has more taps. A 3x3 weight of ``m`` channels has ``4.5 m^2`` degrees of
      freedom. **Between walls** the operator is ``exp(T)``, with ``T`` the zero-padded convolution with the
      weight's skew part. It is no convolution and has no kernel: ``module.weight`` is the generator, of the
      weight's shape. Any value whose skew part has a spectral norm up to 150 gives an orthogonal operator
      (with ``"cayley"``, whose series is longer, up to 23, in double precision 13). It is applied by its
      Chebyshev series, one convolution per term: 7 in single precision at torch's initial values.
    - ``"split"``, by `SplitExponential`: the kernel is a product of exponentials with finitely many taps.
      It keeps its ``k x k`` taps, and costs little more than the plain one, but has about ``1.5 m^2``
      degrees of freedom. A periodic module of stride 1 that is not transposed stays of torch's
      own class.

    Args:
        module: ``nn.Conv1d``, ``2d``, ``3d`` or ``nn.ConvTranspose1d``, ``2d``, ``3d``, whose padding keeps
            the size (divided by the stride). Its weight should be its own: torch overwrites one that
            another module has too.
        name: ``"weight"``.
        method: ``"exponential"`` or ``"split"``.
        domain: ``"any"``: images of every size; split kernels accept nothing else. With the exponential the
            present weight then becomes the generator, and ``tol`` sets how many taps the kernel has. With
            stride 1 and equal channels the module starts at the exponential of its former operator's skew
            part (circular; between walls: zero-padded). A size: only images of that size (transposed:
            outputs). The module starts at the orthogonal operator nearest to its circular one.
        boundary: ``"circular"``, ``"zeros"`` or ``"walls"``. Default: ``"circular"`` if the padding mode is
            ``"circular"`` or ``"zeros"``; for ``"reflect"`` and ``"replicate"`` it must be given.
        triv: ``"expm"``, ``"cayley"`` or a callable, as of `ConvExponential` and `SplitExponential`.
        base: as of `ConvExponential` and `SplitExponential`. Default: True with a given size and for split
            kernels, else False. With the exponential between walls, True multiplies by an orthogonal matrix
            on each pixel's channels; the module starts as that, the nearest to its former weight.
        tol: bound on the defect, ``max |singular value - 1|``. Only with the exponential and ``"any"``, not
            between walls. Default: 1e-6, in double precision 1e-12, in half precision 1e-4.

    Returns:
        ``module``, parametrized. ``module.weight`` is the kernel. Its taps are: split, ``k x k`` (between
        walls with stride 1 an even ``k`` becomes ``k - 1``); exponential, as many as ``tol`` needs with
        ``"any"``, else the domain's (``"zeros"``: more). Exception: with the exponential between walls
        ``module.weight`` is the generator, unless no tap crosses an edge, as with a single one. A split
        kernel starts near the former weight. ``kernel_size``, ``padding``, ``padding_mode`` and
        ``dilation`` are those of the operator.

    Raises:
        TypeError: if ``module`` is no convolution, or an argument is not of its kind.
        ValueError: if the convolution does not keep the size; if its padding mode is ``"reflect"`` or
            ``"replicate"`` and no boundary is given; if the domain is smaller than the kernel, or not
            divisible by the stride; if no semi-orthogonal operator of that stride and dilation exists; if
            the geometry has no split kernel (one channel in a group; between walls, a stride with dilation,
            or with a padding by which patches cross the edge); if the weight is not finite, or parametrized
            already; between walls, if ``triv`` is no smooth matrix function; if ``tol`` has no use. The
            module is then unchanged.
            When called: if an image is not of the domain's size or not divisible by the stride; with
            ``"any"``, if the spectral norm of the generator's skew part
            has become too large. With ``"expm"`` that is above about 400 (of a 3x3 weight, 1023 taps a
            side), between walls above about 150 (200 terms).

    Within ``parametrize.cached()`` a loop computes the exponential, and the kernel's transform, once.
    ``parametrize.remove_parametrizations(module, "weight")`` leaves a module that computes the same, of
    torch's own class if that can at all sizes called so far. Between walls it is another
    class, into whose weight nothing may be folded. From a split kernel it has the parameters ``weight`` and
    ``edges``; from the exponential, the generator as ``weight``, and stays orthogonal whatever that
    becomes. After removal, and after ``orthogonal(..., method="split")``, make a new optimizer: the
    parameter's shape changes. (``leave_parametrized=False`` leaves the generator itself in the place of the
    weight, where it means nothing.)

    With the exponential and ``"any"``, the kernel's size follows the generator's norm, and between walls
    the number of terms does; under ``vmap`` over generators, the largest norm. In compiled code the
    kernel's size does not (the number of terms does on a CPU). So during training call the module outside
    of it every 20 steps, say. Otherwise the defect grows, between walls exponentially with the norm.

    Cost: the parametrization's. With ``"exponential"`` also, for each image of ``N`` points, the Fourier
    transforms of its channels and ``2 N`` real multiplications per pair of channels. If that is cheaper,
    the kernel is convolved directly, or (few images, many channels) the exponential is applied by its
    series, without a kernel. A split kernel costs a plain convolution; between walls 1.0 to
    2.6 times that, the most with few images. Between walls the exponential costs a convolution per term:
    ``4 * terms - 1`` with the backward pass, where a plain layer costs 3. For the backward pass it
    stores up to three images besides its input.

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

        Between walls, by either method:

        >>> for method in ("exponential", "split"):
        ...     conv = orthogonal(nn.Conv2d(8, 8, 3, padding=1), method=method, boundary="walls")
        ...     print(all(orthogonality_defect(conv, domain=n) < 1e-5 for n in (1, 5, (9, 2))))
        True
        True
    """
    if method not in ("exponential", "split"):
        raise ValueError(f'method should be "exponential" or "split". Found {method!r}')
    owner = repr(module).partition("\n")[0]
    if tol is not None and (method == "split" or boundary == Walls.name):
        where = (
            'with method="split", whose kernels are exact'
            if method == "split"
            else "between walls, where precision is always full"
        )
        raise ValueError(f"tol should be None {where}. Found {tol!r}")
    if method == "split":
        _split(module, name, domain, boundary, owner, triv=triv, base=base)
        return module
    if boundary == Walls.name:
        _between_walls(module, name, domain, owner, triv=triv, base=base)
        return module
    conversion = Conversion.of(module, name, domain, boundary)
    conversion.install(conversion.exponential(owner, triv=triv, base=base, tol=tol))
    return module


def _between_walls(
    module: Any, name: str, domain: Any, owner: str, triv: str | Trivialization, base: bool | None
) -> None:
    """Have a convolution's exponential act between walls.

    Raises:
        TypeError, ValueError: as `orthogonal` does.
    """
    check_module(module, name)
    if domain != "any":
        raise ValueError(
            f'domain should be "any" between walls: all sizes are orthogonal there. Found {domain!r}'
        )
    whole = geometry_of(module)
    whole.check_existence(whole.size, whole.groups)
    if max(whole.placement.reach(whole.taps, whole.stride)) == 0:  # no wall is seen
        torus: Any = whole.stride if base else "any"
        generator = replace(whole, transposed=False)
        conversion = Conversion(module, generator, torus, Action(whole, CIRCULAR, None, whole.dilation))
        conversion.install(conversion.exponential(owner, triv=triv, base=base))
        return
    walls = BOUNDARIES[Walls.name]
    context = {"boundary": walls.name, "images": "any"}
    generator = replace(whole, transposed=False)
    made = WalledGenerator(generator, owner, context, triv=triv, base=base)
    install(module, made, Action(whole, walls, None, whole.dilation))


def _split(module: Any, name: str, domain: Any, boundary: str | None, owner: str, **options: Any) -> None:
    """Give a convolution a split kernel.

    The module keeps torch's own forward where that computes the operator: with circular or zero padding,
    and between walls if the kernel is patches alone, which no wall cuts. With a stride it does not: torch
    takes images that the stride does not divide, on which the operator is not orthogonal.

    Raises:
        TypeError, ValueError: as `orthogonal` does.
    """
    check_module(module, name)
    edges = boundary_by_default(module, boundary)
    if domain != "any":
        raise ValueError(
            'domain should be "any" with method="split", whose kernels are orthogonal at every size. '
            f"Found {domain!r}"
        )
    whole = geometry_of(module)
    whole.check_existence(whole.size, whole.groups)
    chain = Chain.of(whole, edges.has_walls)
    context = {"boundary": edges.name, "images": "any"}
    parametrization = SplitExponential.placed(
        replace(whole, transposed=False), edges.has_walls, owner, context, **options
    )
    geometry = with_taps_of(chain, whole)
    # torch's transposed convolutions know zero padding only
    torchs = not edges.has_walls and not (edges.is_periodic and whole.transposed)
    if checks_size(whole, edges) or not (torchs or chain.is_within_patches(geometry)):
        install(module, parametrization, Action(geometry, edges, None, whole.dilation))
    else:
        install(module, parametrization, None, **padding(module, geometry, edges))


def checks_size(geometry: Geometry, edges: Boundary) -> bool:
    """Return True if a convolution has to refuse images: those that its stride does not divide."""
    return max(geometry.stride) > 1 and not geometry.transposed and edges.name != Zeros.name


def with_taps_of(chain: Chain, whole: Geometry) -> Geometry:
    """Return a geometry with the taps of a split kernel, which may be fewer."""
    taps = zip(chain.taps, whole.taps, whole.dilation, whole.placement.origin, strict=True)
    origin = tuple(o if k == before else r * (k // 2) for k, before, r, o in taps)
    placement = Placement(whole.dilation, origin)
    return replace(whole, size=(*whole.size[:2], *chain.taps), placement=placement)


def padding(module: Any, geometry: Geometry, edges: Boundary) -> dict[str, Any]:
    """Return the attributes by which torch's own module pads at a boundary as it pads now."""
    before, after = geometry.placement.origin, geometry.placement.after(geometry.taps)
    found: dict[str, Any] = {"kernel_size": geometry.taps}
    if geometry.taps != tuple(module.kernel_size):
        found["padding"] = before
    if geometry.transposed:  # torch knows one padding of these
        return found
    if module.padding != "same":
        after = before
    sides = [n for side in zip(before[::-1], after[::-1], strict=True) for n in side]
    return {**found, "padding_mode": edges.padding_mode, runtime.REPEATED_PADDING: sides}


@dataclass(frozen=True)
class Conversion:
    """How a convolution is to be made orthogonal, once everything about it has been checked.

    Args:
        module: the convolution.
        generator: the geometry of what is exponentiated: the weight, or the stacked blocks of it.
        torus: on which it is exponentiated, or ``"any"``.
        action: how the kernel then acts.
    """

    module: Any
    generator: Geometry
    torus: Size | Literal["any"]
    action: Action

    @classmethod
    def of(
        cls,
        module: nn.Module,
        name: str,
        domain: int | Size | Literal["any"],
        boundary: str | None,
        part: tuple[int, int, int] | None = None,
        small: bool = False,
    ) -> "Conversion":
        """Check everything, and change nothing.

        Args:
            module: as of `orthogonal`.
            name: likewise.
            domain: likewise.
            boundary: likewise.
            part: channels out and in, and groups, of the part of the weight that is to be orthogonal.
            small: whether a single tap, which sees no domain, takes every size. And whether the domain may
                be smaller than the kernel where images do not wrap around: the torus holds its taps.

        Raises:
            TypeError, ValueError: as `orthogonal` does.
        """
        check_module(module, name)
        edges = boundary_by_default(module, boundary)
        if domain is None or (isinstance(domain, str) and domain != "any"):
            kind = TypeError if domain is None else ValueError
            raise kind(f'domain should be "any", a size, or a tuple of sizes. Found {domain!r}')
        whole = geometry_of(module)
        taps, stride = whole.taps, whole.stride
        out, cin, groups = part or (*whole.size[:2], whole.groups)
        size = (out, cin, *taps)
        whole.check_existence(size, groups)
        generator = replace(whole, size=size, groups=groups, transposed=False)
        ones = (1,) * len(taps)
        if isinstance(domain, str):
            # A compact kernel of undilated taps costs less than one of dilated taps. Dilated afterwards it
            # is orthogonal too, as long as that only permutes the stride's aliases.
            origin, dilation = whole.placement.origin, whole.dilation
            axes = zip(origin, dilation, stride, strict=True)
            inner = tuple(1 if o % r == 0 and gcd(r, s) == 1 else r for o, r, s in axes)
            outer = tuple(r // i for r, i in zip(dilation, inner, strict=True))
            origin = tuple(o // r for o, r in zip(origin, outer, strict=True))
            generator = replace(generator, placement=Placement(inner, origin))
            return cls(module, generator, "any", Action(whole, edges, None, outer))
        sizes = per_axis("domain", domain, len(taps))
        folds = small and not edges.is_periodic
        Lattice.of_kernel(size, whole.is_complex, sizes, stride, groups, whole.dilation, folds)
        if max(taps) == 1:  # sees one frequency like any other: one coarse point, and no boundary
            found = None if small else sizes
            return cls(module, generator, stride, Action(whole, CIRCULAR, found, whole.dilation))
        torus = edges.torus(sizes, whole.placement.extent(taps), stride)
        return cls(module, generator, torus, Action(whole, edges, sizes, ones))

    def exponential(
        self, owner: str | None, kind: type[ConvExponential] = ConvExponential, **options: Any
    ) -> ConvExponential:
        """Return the parametrization of what is to be orthogonal.

        Args:
            owner: the module, in words, for errors.
            kind: of parametrization.
            options: of its constructor.
        """
        action = self.action
        images = "any" if action.domain is None else signature.by_axis(action.domain)
        context = {"boundary": action.boundary.name, "images": images}
        return kind.placed(self.generator, self.torus, owner, context, **options)

    def install(self, parametrization: nn.Module) -> Callable[[], None]:
        """Register it, and have the module evaluated accordingly; return what undoes that."""
        return install(self.module, parametrization, self.action)


def geometry_of(module: Any) -> Geometry:
    """Return the geometry of a convolution with its present kernel.

    Raises:
        ValueError: if its padding does not keep the size.
    """
    operator = operator_of(module)
    if operator is None:
        return Geometry.of(module)
    taps = operator.weight.taps or tuple(operator.kernel().shape[2:])
    placement = Placement.centred(taps, operator.action.dilation)
    size = (*operator.geometry.size[:2], *taps)
    return replace(operator.geometry, size=size, placement=placement)


def convolves(module: nn.Module) -> bool:
    """Return True if a module does to its weight and input what torch's class, or this package's, does."""
    methods = ("forward", "_conv_forward")
    if any(name in vars(module) for name in methods):  # replaced on this module alone
        return False
    if operator_of(module) is not None:
        return True
    base = torch_class(module)
    found = (getattr(type(module), name, None) for name in methods)
    same = (getattr(method, "computes", method) for method in found)  # of what only checks its input
    return all(method is getattr(base, name, None) for method, name in zip(same, methods, strict=True))


def boundary_by_default(module: Any, name: str | None = None) -> Boundary:
    """Return the boundary that is asked for.

    Raises:
        ValueError: if there is none of that name, or none can be taken for granted.
    """
    if name is not None:
        return boundary_named(name)
    if boundary_of(module) is None:
        raise ValueError(
            f"padding_mode={module.padding_mode!r} counts pixels near the edge several times, so that no "
            "kernel makes it orthogonal: boundary should be given, "
            'boundary="circular" to make the module periodic, "walls" or "zeros". '
            "Found None"
        )
    return CIRCULAR


def check_module(module: Any, name: str) -> None:
    """Raise if a module cannot be made orthogonal, whatever its geometry.

    Raises:
        TypeError, ValueError: then; they name the way out.
    """
    convolution = torch_class(module)
    if convolution is None:
        raise TypeError(f"module should be an nn.Conv* or nn.ConvTranspose*{_way_out(module)}")
    if parametrize.is_parametrized(module):
        found = {
            key: [type(p).__qualname__ for p in stack] for key, stack in module.parametrizations.items()
        }
        removal = ", ".join(f"remove_parametrizations(module, {key!r})" for key in found)
        raise ValueError(
            f"module should not be parametrized yet: torch.nn.utils.parametrize.{removal} keeps the "
            f"present value. Found parametrizations of {found}"
        )
    if not convolves(module):
        raise ValueError(
            f"module should compute what nn.{convolution.__name__} does. "
            f"Found {type(module).__name__}, with a forward of its own"
        )
    if not isinstance(name, str) or runtime.parameters_of(module).get(name) is None:
        why = ""
        if isinstance(name, str) and name in runtime.buffers_of(module):
            why = f", a buffer: del module.{name}, then module.{name} = nn.Parameter(...)"
        elif name == "weight":
            why = ", which hooks compute: remove spectral_norm, weight_norm or prune first"
        elif name in ("exponential", "split"):
            why = f": write method={name!r}"
        raise ValueError(
            f"name should be that of a parameter: {[*runtime.parameters_of(module)]}. Found {name!r}{why}"
        )
    if name != "weight":
        raise ValueError(f'name should be "weight", with which the module convolves. Found {name!r}')
    if nn.parameter.is_lazy(module.weight):
        raise ValueError("module should know its size: call it once before. Found a lazy module")
    if module.weight.is_inference():
        raise ValueError(
            "module should be made outside of torch.inference_mode, in which nothing can be trained. Found "
            "a weight made inside"
        )


def _way_out(module: Any) -> str:
    """Say what is to be done with something that is no convolution."""
    if isinstance(module, type) and issubclass(module, CONVOLUTIONS):
        return f": make one first. Found the class {module.__name__}"
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return f": torch.nn.utils.parametrizations.orthogonal is made for nn.Linear. Found {name}"
    if isinstance(module, nn.Module) and any(isinstance(m, CONVOLUTIONS) for m in module.modules()):
        return (
            ". In a container convert each convolution in a loop over modules(), or all by "
            f"retrofit(container, example, anneal=False). Found {name}"
        )
    return f". Found {name}"
