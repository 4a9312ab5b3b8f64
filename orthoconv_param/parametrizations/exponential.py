r"""`ConvExponential`: a convolution's weight as the exponential of a free skew generator.

On a lattice with spectra ``X`` (generator) and ``B`` (base), padded to ``m x m``,
``m = max(out, in)``,

    weight = B exp(skew(X)),    its first columns if ``out > in``,
    weight = exp(skew(X)) B,    its first rows    if ``out < in``,

at each frequency. ``exp`` may be another map from skew to unitary matrices.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import ceil, isqrt
from typing import Any, Literal

import torch
from geotorch.exceptions import InManifoldError
from torch import Tensor

from .. import runtime
from ..action.generator import Generator
from ..checks import Size, at_least_single, check_dtype, check_finite, per_axis
from ..matrices import maps
from ..matrices.products import product
from ..matrices.unitary import haar, polar, polar_frame, refine, semi_orthogonal
from ..torus.geometry import Geometry
from ..torus.lattice import Lattice, Placement, pack, unpack
from . import signature
from .degree import COMPACT_TOLERANCE, Degree, default_tolerance
from .plan import Family, Plan, make_plan, norm_of
from .registered import Registered
from .truncation import outermost
from .watch import Watch, watched


class ConvExponential(Registered):
    r"""Parametrizes a convolution's weight by the exponential of a skew convolution.

        weight = base * exp(skew(generator)),    W(w)^H W(w) = I at each frequency w of the domain

    (``W W^H = I`` where that is wide). A kernel that is orthogonal on periodic images of one size is **far
    from orthogonal on larger ones**, so choose the domain by what the convolution is fed:

    - ``domain=None``: periodic images of the kernel's own size, ``k x k``, only. The weight keeps its
      shape.
    - ``domain=(H, W)``: periodic images of that size. The weight becomes a kernel of
      ``H x W`` taps, so register it with ``unsafe=True``.
    - ``domain="any"``: periodic images of every size, to ``tol``. The weight becomes a compact
      kernel of ``K x K`` taps, also with ``unsafe=True``; ``K`` follows the generator (see below). The
      existing ``k x k`` weight *is* the generator.

    The generator has the shape and dtype of the weight that it replaces. It may have any values. (With
    ``domain="any"`` and ``"expm"``: up to a spectral norm of its skew part of about 400, where ``K`` is
    about 1000; beyond, calls raise ``ValueError``.) Its ``k x k`` taps are stored as their Fourier
    coefficients (Hartley transform; complex: unitary DFT). It stays the same parameter object, so that
    existing optimizers train it.

    Args:
        domain: None, a size, a tuple of sizes, or ``"any"``.
        stride: of the convolution. A parametrization sees the weight alone, so this and ``groups`` must be
            those of the convolution.
        groups: of the convolution.
        triv: ``"expm"``, ``"cayley"``, or a callable from skew-Hermitian ``(..., m, m)`` to unitary
            matrices, as geotorch's are; it is tried once on small ones. With ``domain="any"`` it must be a
            matrix function, as those with names are.
        base: whether the weight is a fixed orthogonal kernel times the exponential. Then assigning
            ``conv.weight = W`` sets the base, and ``geotorch.utils.update_base`` works. Default: True,
            except for ``"any"``, which has none. ``False`` (``domain=None``, ``out = in * s^d``): the
            weight is the exponential itself; assigning takes the logarithm.
        tol: for ``"any"``: bound on the operator's defect, at every size. Default: 1e-6 (1000 linear
            steps keep the norm to 1e-3); in double precision 1e-12, in half precision 1e-4. A looser
            one is cheaper: ``K`` is smaller. In single precision, part of the work is done in double if
            ``tol < 1e-6``, and all of it at norms above ``1e7 tol``.

    Raises:
        TypeError, ValueError: for arguments that are not as above, or a ``triv`` that does not give unitary
            matrices; on registration, if the weight is not a finite floating or complex convolution kernel
            or is larger than the domain, if ``stride`` does not divide the domain, or ``groups`` the
            channels. The module is then unchanged.
        geotorch.exceptions.InManifoldError: on assignment with ``base=False``, if the map does not reach
            the weight (``"expm"``: if a determinant is -1).

    ``K`` is as small as ``tol`` allows. The generator's norm gives a ``K`` that is enough for every
    generator of that norm. On the CPU, where values can be read without waiting, the smallest ``K`` that
    keeps ``tol`` for the present generator is then measured (not in three dimensions if it is large). ``K``
    is found anew on assignment, when the norm leaves its range (a factor of 1.4), and when the outermost
    taps grow so large that ``tol`` may be exceeded. A checkpoint holds the result. In compiled code ``K``
    is that of the last ordinary call, and what was measured then may not hold for other generators, even
    of the same norm. (On a CPU it warns when it may not.) Under ``vmap`` over generators ``K`` is that of
    the last ordinary call, or larger if one of them needs it. On other devices ``K`` follows from the norm
    alone.

    Half precision is computed in single precision and rounded, which leaves a defect of about 3e-4
    (float16) and 2e-3 (bfloat16).

    A parametrization belongs to one weight. Torch's ``transfer_parametrizations_and_params`` registers the
    same object on a second one, which sets the base of both: copy the source by `copy.deepcopy` before.

    The class's ``__name__`` is ``"Exponential"``: scripts that initialise the weight of every module with
    "Conv" in the name of its class skip it.

    Cost: for ``F`` frequencies, about ``3 F m^3`` complex multiplications forward and ``7 F m^3`` backward
    at norms up to 1 (see `expm_skew`). ``F`` is half of ``k^2``, of ``H W``, or with ``"any"`` of ``K^2``,
    whatever the image. In single precision on the CPU, a generator of a norm below 16 on a large given
    domain may be exponentiated on about ``K^2`` points: only products with the base then grow with the
    domain.

    Source: Magnasco, arXiv:2302.07396; trivializations: Lezcano-Casado, arXiv:1909.09501.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from orthoconv_param import ConvExponential, orthogonality_defect
        >>> conv = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular").double()
        >>> _ = register_parametrization(conv, "weight", ConvExponential())
        >>> conv.weight.shape
        torch.Size([4, 4, 3, 3])
        >>> orthogonality_defect(conv.weight, domain=3) < 1e-12
        True
        >>> orthogonality_defect(conv.weight, domain=32) > 0.1  # larger images: not at all
        True

        At every size:

        >>> conv = nn.Conv2d(4, 4, 3).double()
        >>> _ = register_parametrization(conv, "weight", ConvExponential("any"), unsafe=True)
        >>> all(orthogonality_defect(conv.weight, domain=n) < 1e-11 for n in (3, 32, 97))
        True
    """

    def __init__(
        self,
        domain: int | Size | Literal["any"] | None = None,
        *,
        stride: int | Size = 1,
        groups: int = 1,
        triv: str | maps.Trivialization = "expm",
        base: bool | None = None,
        tol: float | None = None,
    ) -> None:
        super().__init__(stride, groups, triv, base)
        if isinstance(domain, str):
            if domain != "any":
                raise ValueError(f'domain should be None, a size, or "any". Found {domain!r}')
        elif domain is not None:
            sizes = per_axis("domain", domain)
            domain = sizes if isinstance(domain, (tuple, list)) else sizes[0]
        if base and domain == "any":
            raise ValueError('base should be None or False with domain="any", which has no base')
        if base is False and domain not in (None, "any"):
            raise ValueError(
                "base should be None or True with a given domain: the logarithm of a kernel on it "
                "has more taps than the generator"
            )
        if domain is None:
            self.check_inverse()
        if tol is not None and domain != "any":
            raise ValueError('tol should be None unless domain="any": elsewhere nothing is truncated')
        if tol is not None and not (isinstance(tol, float) and 0 < tol < 1):
            raise ValueError(f"tol should be a float between 0 and 1. Found {tol!r}")

        self.domain: int | Size | str | None = domain
        self.tol = tol
        self.has_base = domain != "any" if base is None else base
        self.compact: Degree | None = None  # of the weight with domain="any", once its norm is known
        self._reader = runtime.LateReader()
        self._edge_reader = runtime.LateReader(waits=False)
        self._issued = runtime.LastIssued()
        self._watch = Watch()

    @classmethod
    def placed(
        cls,
        geometry: Geometry,
        domain: Size | Literal["any"],
        owner: str | None,
        context: Mapping[str, str],
        **options: Any,
    ) -> "ConvExponential":
        """Return the parametrization of a convolution whose geometry and owner are known.

        Args:
            geometry: of the generator.
            domain: as of the constructor.
            owner: the module, in words, for errors.
            context: what tells checkpoints of the module apart.
            options: further ones of the constructor.
        """
        self = cls(domain, stride=geometry.stride, groups=geometry.groups, **options)
        self.placement, self.owner, self.context = geometry.placement, owner, dict(context)
        return self

    # What is known once it is registered

    @property
    def degree(self) -> int | None:
        """Degree of the compact kernel; None unless ``domain="any"`` and its norm is known."""
        return None if self.compact is None else self.compact.value

    @property
    def taps(self) -> Size:
        """Taps of the weight: the kernel's own, the domain, or the compact kernel's ``K`` x ``K``.

        Raises:
            RuntimeError: before registration.
        """
        return self._family().lattice(self.compact).taps

    @property
    def effort(self) -> tuple[int, int] | None:
        """Frequencies of the compact kernel, and terms of its generator's series: what either way costs.

        None unless ``domain="any"``, the norm is known, and the series has few enough terms.
        """
        if self.compact is None or not self.compact.coefficients:
            return None
        return self._family().lattice(self.compact).frequencies, len(self.compact.coefficients) - 1

    def reads_more_of(self, images: Size) -> bool:
        """Return True if images are so small that a compact kernel wraps around them."""
        return self._family().reads_more_of(images, self.compact)

    def _family(self) -> Family:
        geometry, reference = self._registered()
        domain = self.domain
        if isinstance(domain, int):
            domain = (domain,) * geometry.axes
        tolerance = self.tol or default_tolerance(reference.dtype, COMPACT_TOLERANCE)
        return Family(geometry, domain, self.triv, tolerance)

    # From the generator to the kernel

    @runtime.in_full_precision
    def forward(self, X: Tensor) -> Tensor:
        """Return the orthogonal kernel of a generator.

        Args:
            X: the generator, ``(out, in/groups, *taps)``.

        Returns:
            ``(out, in/groups, *taps)``, with the generator's, the domain's, or the compact kernel's
            ``K`` x ``K`` taps, in the generator's dtype.

        Raises:
            ValueError: if the generator is not of the registered size, or not finite (on CUDA checked only
                under `torch.autograd.set_detect_anomaly`, since that waits for the device).
            RuntimeError: if the generator is sharded, as under FSDP outside of forward.
        """
        W = self.kernel(X).to(X.dtype).contiguous()
        if self.domain == "any":
            self._issued.note(W)
        return W

    @runtime.in_full_precision
    def kernel(self, X: Tensor) -> Tensor:
        """Return `forward` in the precision in which it is computed.

        Raises:
            ValueError, RuntimeError: as `forward` does.
        """
        lattice, Q = self.spectrum(X)
        W = lattice.kernel(Q)
        if self._is_outgrown_by(W):
            lattice, Q = self.spectrum(X)
            W = lattice.kernel(Q)
            self._is_outgrown_by(W, accepted=True)
        return W

    def _is_outgrown_by(self, W: Tensor, accepted: bool = False) -> bool:
        """Return True if a compact kernel's degree is to be measured anew, before it is used.

        What it leaves out may then exceed the tolerance. (Off the CPU that is known at a later call,
        which takes the degree that is proved to be enough.)

        Args:
            W: the kernel.
            accepted: whether the degree has just been measured. The outermost taps of large kernels may
                consist of rounding.
        """
        compact = self.compact
        if self.domain != "any" or compact is None or compact.edge is None or not runtime.may_read(W):
            return False
        family = self._family()
        edges = outermost(W, family.geometry.groups, family.reach, family.geometry.stride)
        edge = self._edge_reader(runtime.largest(edges))
        if edge is None or edge <= compact.edge:
            return False
        self.compact = replace(compact, edge=1.2 * edge) if accepted else compact.unmeasured()
        return runtime.may_wait(W.device)

    @runtime.in_full_precision
    def spectrum(
        self, X: Tensor, images: Size | None = None, dilation: Size = ()
    ) -> tuple[Lattice, Tensor]:
        """Return the matrices of the orthogonal kernel of a generator, and the lattice on which they are.

        It is the weight's own lattice, or that of images so small that a compact kernel wraps around them.

        Args:
            X: the generator, ``(out, in/groups, *taps)``.
            images: their domain, for ``domain="any"``.
            dilation: with which the compact kernel is applied to them.

        Returns:
            The lattice, and ``(groups, frequencies, out/groups, in/groups * s^d)``, complex, in
            single precision at least.

        Raises:
            ValueError, RuntimeError: as `forward` does.
        """
        if self.geometry is None:  # stacked on another parametrization: nothing was inverted here
            self._adopt(X)
        self.check_generator(X, self._registered()[0].size)
        kernel = unpack(X)
        plan = make_plan(self._family(), kernel, self.compact, self._reader, images, dilation)
        if self.compact is None or plan.norm is not None:
            self.compact = plan.degree
        if not runtime.is_compiling():
            self._watch.fill(self._warn)
        Q = self._matrices(kernel.to(plan.dtype), plan)
        if plan.truncated and runtime.is_compiled_whole() and runtime.may_wait(Q.device):
            Q = watched(Q, kernel.detach(), self._watch.number)
        return plan.lattice, Q

    def _warn(self, kernel: Tensor, Q: Tensor) -> None:
        """Warn if a compact kernel of compiled code is too small for its generator."""
        family, compact = self._family(), self.compact
        if compact is None:
            return
        W = family.lattice(compact).kernel(Q)
        norm = norm_of(family.geometry, kernel, runtime.LateReader())
        edge = outermost(W, family.geometry.groups, family.reach, family.geometry.stride)
        outgrown = compact.edge is not None and float(edge) > compact.edge
        if outgrown or (norm is not None and norm > compact.level * (1 + 1e-6)):
            of = "the weight" if self.owner is None else self.owner
            warnings.warn(
                f"compiled code computes the kernel of {of} with the taps that it had at the last ordinary "
                "call, which its generator has outgrown: the defect may exceed tol. Call the module now "
                "and then outside of torch.compile, which then compiles it anew",
                stacklevel=2,
            )

    @runtime.in_full_precision
    def generator(self, X: Tensor) -> Generator:
        """Return what is exponentiated, with ``domain="any"``.

        Raises:
            ValueError, RuntimeError: as `forward` does.
        """
        if self.geometry is None:  # stacked on another parametrization: nothing was inverted here
            self._adopt(X)
        family, kernel = self._family(), unpack(X)
        self.check_generator(X, family.geometry.size)
        self._follow(kernel)
        if self.compact is None:
            family.lattice(None)  # which raises
        assert self.compact is not None
        compact = self.compact
        return Generator(kernel, family.geometry, compact.level, compact.coefficients, None)

    def _matrices(self, kernel: Tensor, plan: Plan) -> Tensor:
        """Return the matrices of a generator in space, as planned."""
        torus = plan.smaller or plan.lattice
        family = self._family()
        Q = family.unitary(torus.spectrum(kernel, plan.placement), plan.norm)
        if plan.smaller is not None:
            Q = plan.lattice.spectrum(plan.smaller.kernel(Q))
        if self.base is not None:
            base = from_reals(self.base).to(Q.dtype)
            Q = product(base, Q) if Q.shape[-2] >= Q.shape[-1] else product(Q, base)
        return Q if plan.refined is None else refine(Q, plan.refined)

    # From a kernel to the generator

    @torch.no_grad()
    @runtime.in_full_precision
    def right_inverse(self, W: Tensor, check_in_manifold: bool = False) -> Tensor:
        """Return the generator whose kernel is ``W``, or the orthogonal kernel nearest to it.

        With a base, the base becomes that kernel and the generator is zero. Without (``domain=None``), the
        generator is its logarithm. With ``domain="any"``, ``W`` is the generator itself.

        Args:
            W: ``(out, in/groups, *taps)``, with the generator's taps or those of the domain.
            check_in_manifold: True to raise for a kernel that is not orthogonal. Not with ``domain="any"``.

        Returns:
            ``(out, in/groups, *taps)``: the generator, of the dtype of ``W``.

        Raises:
            TypeError: if ``W`` is not of the registered dtype, or not of a floating or complex one.
            ValueError: if it is not finite, or of another size.
            geotorch.exceptions.InManifoldError: if ``check_in_manifold`` and ``W`` is not orthogonal, or if
                no generator gives it.
            RuntimeError: if the generator is sharded (FSDP).
        """
        runtime.refuse_assigning_to_parts()
        if check_in_manifold and self.domain == "any":
            raise ValueError('check_in_manifold should be False with domain="any": W is a generator')
        if check_in_manifold:
            self._check(W)
            if not semi_orthogonal(self._spectrum_of(W)[1], 1e-4):
                raise InManifoldError(W, self)
        generator, buffers = self.preimage(W)
        for name, value in buffers.items():
            old = getattr(self, name)
            setattr(self, name, value if old is None else old.copy_(value))
        self._adopt(generator)
        if self.domain == "any":
            self.compact = None
            self._follow(at_least_single(W))
        return generator

    @torch.no_grad()
    @runtime.in_full_precision
    def preimage(self, W: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator of `right_inverse`, and the buffers that it sets; change nothing.

        Raises:
            TypeError, ValueError, geotorch.exceptions.InManifoldError: as `right_inverse` does.
        """
        self._check(W)
        if self.domain == "any":
            return pack(at_least_single(W)).to(W.dtype), {}
        lattice, spectrum = self._spectrum_of(W)
        if not self.has_base:
            return self._logarithm(W, lattice, lattice.choose(polar, spectrum)), {}
        zero = W.new_zeros(W.shape if self.geometry is None else self.geometry.size)
        return zero, self._buffers_of(lattice, spectrum)

    def loaded(self, generator: Tensor, state: Any) -> None:
        """Take note of a generator that has been loaded: with ``domain="any"`` it sets ``K``.

        Args:
            generator: as it is in the checkpoint.
            state: what `get_extra_state` gave, which is set later; None if the checkpoint has none.
        """
        geometry, reference = self._registered()
        if self.domain == "any" and tuple(generator.shape) == geometry.size:
            self._reader.restart()
            self.compact = None
            generator = generator.detach().to(reference.device, reference.dtype)
            is_measured = "degree" in signature.decode(state)
            self._follow(unpack(at_least_single(generator)), measures=not is_measured)

    def _follow(self, kernel: Tensor, measures: bool = True) -> None:
        self.compact = make_plan(
            self._family(), kernel, self.compact, self._reader, measures=measures
        ).degree

    def _spectrum_of(self, W: Tensor) -> tuple[Lattice, Tensor]:
        """Return the spectrum of a kernel that is assigned."""
        placement = self._placement_for(W)  # a generator's taps stand where it says
        if self.geometry is not None and tuple(W.shape[2:]) == self.taps:
            placement = Placement.centred(self.taps)  # a kernel that was read from the weight is centred
        lattice = self._lattice_for(W)
        return lattice, lattice.spectrum(at_least_single(W), placement)

    def _placement_for(self, W: Tensor) -> Placement:
        return self.placement or Placement.centred(tuple(W.shape[2:]))

    def _lattice_for(self, W: Tensor) -> Lattice:
        """Return the torus of a weight, which may be the first one."""
        if self.geometry is not None:
            return self._family().lattice(self.compact)
        size = tuple(W.shape)
        if isinstance(self.domain, str):  # no torus yet: this one is for the checks of channels and groups
            return Lattice.of_kernel(size, W.is_complex(), groups=self.groups)
        dilation = self._placement_for(W).dilation
        return Lattice.of_kernel(size, W.is_complex(), self.domain, self.stride, self.groups, dilation)

    def _adopt(self, X: Tensor) -> None:
        """Take the size, dtype and device of the first generator."""
        if self.geometry is None:
            size, given = tuple(X.shape), None if isinstance(self.domain, str) else self.domain
            self.geometry = Geometry.of_weight(
                size, X.is_complex(), self.stride, self.groups, self.placement, given
            )
            self._reference = X.new_empty(0)

    def _check(self, W: Tensor, finite: bool = True) -> None:
        """Raise what is wrong with a weight, before anything is changed."""
        check_dtype("the weight", W)
        size = tuple(W.shape) if self.geometry is None else self.geometry.size
        lattice = self._lattice_for(W)
        note, allowed = "", {size}
        if self.domain == "any":
            per_axis("stride", self.stride, len(size) - 2)
            note = (
                ': with domain="any" it is a generator, not the compact kernel. The present generator is '
                "module.parametrizations.weight.original; there is no base for `update_base` to move"
            )
            if self._issued.is_seen_in(W):  # sizes alone do not tell, as of a single tap
                raise ValueError(
                    'with domain="any" the weight should be assigned a generator: the present one is '
                    "module.parametrizations.weight.original. Found the compact kernel that was read from "
                    "it: there is no base for `update_base` to move"
                )
        else:
            allowed.add((*size[:2], *lattice.domain))
        if tuple(W.shape) not in allowed:
            raise ValueError(
                f"the weight should be of size {' or '.join(map(str, sorted(allowed)))}{note}. "
                f"Found {tuple(W.shape)}"
            )
        if self._reference is not None and W.dtype != self._reference.dtype:
            raise TypeError(f"the weight should be of dtype {self._reference.dtype}. Found {W.dtype}")
        if finite:
            check_finite("the weight", W)

    def _buffers_of(self, lattice: Lattice, spectrum: Tensor) -> dict[str, Tensor]:
        return {"base": as_reals(lattice.choose(polar_frame, spectrum))}

    def _logarithm(self, W: Tensor, lattice: Lattice, spectrum: Tensor) -> Tensor:
        rows, columns = spectrum.shape[-2:]
        if rows != columns:
            raise ValueError(
                "base=False should only be used with out/groups = in/groups * prod(stride): only square "
                f"matrices have logarithms. Found {rows} and {columns}"
            )
        inverse = maps.inverse(self.triv)
        assert inverse is not None  # checked by the constructor
        try:
            A = lattice.choose(inverse, spectrum)
        except ValueError as error:
            raise InManifoldError(W, f"the image of {self}: {error}") from error
        return pack(lattice.kernel(A)).to(W.dtype)

    # The other verbs of a manifold

    def in_manifold(self, W: Tensor, eps: float = 1e-4) -> bool:
        """Return True if the kernel ``W`` is orthogonal on the domain: ``W^H W = I`` to ``eps`` per entry.

        With ``domain="any"`` ``W`` is the compact kernel, and every domain counts. (``W^H W`` has
        ``2 K - 1`` taps, so images of that size show all of it.)

        Raises:
            RuntimeError: before registration.
        """
        geometry, _ = self._registered()
        same = tuple(W.shape[:2]) == geometry.size[:2] and W.ndim == len(geometry.size)
        if not same or W.is_complex() != geometry.is_complex:
            return False
        lattice = self._lattice_for(W)
        if self.domain == "any":
            points = [2 * ceil(k / s) + 1 for k, s in zip(W.shape[2:], geometry.stride, strict=True)]
            lattice = lattice.resolution(tuple(points))
        elif tuple(W.shape[2:]) != lattice.domain:
            return False
        return semi_orthogonal(lattice.spectrum(at_least_single(W)), eps)

    @torch.no_grad()
    def sample(self, distribution: str = "uniform", init_: Any = None) -> Tensor:
        r"""Return a random orthogonal kernel on the domain, to be assigned to the weight.

        - ``"uniform"``: Haar's measure at each frequency, of either determinant where matrices are real.
        - ``"torus"``: ``triv`` of skew matrices with angles drawn by ``init_``, on the diagonal, or where
          matrices are real in ``2 x 2`` blocks. Recurrent kernels are started from these.
        - ``"identity"``, or near it: ``triv`` of a generator that ``init_`` draws.

        (For the kernel nearest to a pretrained one, assign the latter.)

        Args:
            distribution: one of these. With ``domain="any"`` only ``"identity"``, returned as
                the generator: random matrices at each frequency have no compact kernel.
            init_: fills a tensor in place: for ``"torus"`` the angles (default: uniform on ``[-pi, pi]``,
                Henaff, Szlam, LeCun, arXiv:1602.06662); for ``"identity"`` the generator's taps,
                ``(out, in/groups, *taps)``: small ones stay near the identity (default: zero).

        Raises:
            RuntimeError: before registration.
            ValueError: if there is no such distribution.
        """
        geometry, reference = self._registered()
        known = ("identity",) if self.domain == "any" else ("uniform", "torus", "identity")
        if distribution not in known:
            raise ValueError(
                f"distribution should be one of {known} with domain={self.domain!r}. Found {distribution!r}"
            )
        if init_ is not None and distribution == "uniform":
            raise ValueError('init_ should be None with distribution="uniform", which does not use it')
        lattice, like = self._family().lattice(self.compact), at_least_single(reference)
        if distribution == "identity":
            generator = like.new_zeros(geometry.size)
            if init_ is not None:
                init_(generator)
            if self.domain == "any":
                return generator.to(reference.dtype)
            spectrum = lattice.spectrum(generator, geometry.placement)
            return lattice.kernel(self._family().unitary(spectrum)).to(reference.dtype)
        rows, columns = lattice.blocks(geometry.size)
        m = max(rows, columns)
        dtype = torch.promote_types(like.dtype, torch.complex64)
        empty = like.new_empty(self.groups, lattice.frequencies, m, m, dtype=dtype)
        if distribution == "uniform":
            Q = lattice.choose(haar, empty)
        else:
            A = lattice.choose(lambda like: maps.skew_of_angles(like, init_), empty)
            Q = self._family().unitary(A)
        return lattice.kernel(Q[..., :rows, :columns]).to(reference.dtype)

    # Being a module

    def extra_repr(self) -> str:
        """Say what ``print(conv)`` says of the parametrization."""
        size = "" if self.geometry is None else f"{self.geometry.size}, "
        taps = f", taps={self.taps}" if self.domain == "any" and self.geometry is not None else ""
        optional = "".join(f", {option}" for option in self.options())
        tol = "" if self.tol is None else f", tol={self.tol}"
        return (
            f"{size}domain={self.domain!r}{taps}{optional}, "
            f"triv={maps.name(self.triv)}, base={self.has_base}{tol}"
        )

    def signature(self) -> dict[str, str]:
        """Return the settings that a checkpoint must match."""
        family = self._family()
        words = {
            "method": "exponential",
            "domain": "any" if family.is_compact else signature.by_axis(family.lattice(None).domain),
            "taps": signature.by_axis(family.geometry.taps),
            **({"triv": self.triv} if isinstance(self.triv, str) else {}),
        }
        return {**words, **self.context}

    def get_extra_state(self) -> Tensor:
        """Return the settings that a checkpoint must match, and the measured degree, to go on with."""
        words = {} if self.geometry is None else self.signature()
        compact = self.compact
        if compact is not None and compact.is_measured:
            words["degree"] = f"{compact.value} {compact.level!r} {compact.edge!r} {compact.tol!r}"
        return signature.encode(words)

    def set_extra_state(self, state: Any) -> None:
        """Restore the degree; `difference` compares the rest."""
        words = signature.decode(state).get("degree")
        if self.compact is not None and words is not None:
            value, level, edge, tol = words.split()
            if float(tol) == self.compact.tol:
                degree = self._family().degree(float(level))
                self.compact = replace(degree, value=int(value), edge=float(edge))

    def _projected(self, buffer: Tensor) -> Tensor:
        return as_reals(self._family().lattice(self.compact).choose(polar_frame, from_reals(buffer)))

    def _loaded_or_moved(self, moved: bool) -> None:
        self._reader.restart(wait=not moved)  # the generator is the parent's
        self._edge_reader.restart(wait=False)
        if moved and self.compact is not None:
            family = self._family()
            if self.compact.tol != family.tolerance:
                self.compact = family.degree(self.compact.level)


# Scripts initialise whatever has "Conv" in the name of its class by its weight, which this has not.
ConvExponential.__name__ = "Exponential"


def as_reals(matrices: Tensor) -> Tensor:
    """Return square matrices at each frequency as real numbers, ``(groups, frequencies, 2 m^2)``."""
    return torch.view_as_real(matrices.resolve_conj().contiguous()).flatten(2)


def from_reals(numbers: Tensor) -> Tensor:
    """Return the matrices of `as_reals`."""
    m = isqrt(numbers.shape[-1] // 2)
    return torch.view_as_complex(numbers.unflatten(-1, (m, m, 2)))
