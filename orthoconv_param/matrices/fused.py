r"""The exponential of small skew matrices, and its derivative, each in one kernel for the GPU.

One program reads one matrix from memory and writes its result, and nothing between. So the squarings are as
many as that matrix needs, and neither the host nor another matrix waits.

Products are cheap here and registers are not, so the steps are those that keep few matrices at a time:
Taylor's polynomial by powers up to ``A^3`` (Paterson and Stockmeyer), and of the derivative
``phi1(ad_A)(M)``, ``M = skew(Q^H G)``, that in ``ad_A(M) = A M - (A M)^H`` by Horner's rule; then, for each
squaring of ``Q = e^A``, ``phi1(ad_2A)(M) = (X + Q X Q^H) / 2`` with ``X = phi1(ad_A)(M)``.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

IS_SUPPORTED = TorchVersion(triton.__version__) >= TorchVersion("3.5")  # older ones compile none
DTYPES = (torch.float32, torch.complex64, torch.complex128)  # of float64 some make no product in a loop
LARGEST = 32  # of which a few matrices fit into the registers of a block
_SMALLEST_BLOCK = 16  # that tl.dot takes
_TERMS = {torch.float32: (3, 15), torch.float64: (6, 25)}  # of the two series: see the loops

# Note [matrices in a kernel]
# A matrix is a pair of its real and its imaginary part. The latter of a real matrix is never read, and so
# never made.


@triton.jit
def _load(pointer, offsets, mask, COMPLEX: tl.constexpr):
    each: tl.constexpr = 2 if COMPLEX else 1
    re = tl.load(pointer + each * offsets, mask, 0.0)
    im = tl.zeros_like(re)
    if COMPLEX:
        im = tl.load(pointer + 2 * offsets + 1, mask, 0.0)
    return re, im


@triton.jit
def _store(pointer, offsets, mask, A, COMPLEX: tl.constexpr):
    each: tl.constexpr = 2 if COMPLEX else 1
    tl.store(pointer + each * offsets, A[0], mask)
    if COMPLEX:
        tl.store(pointer + 2 * offsets + 1, A[1], mask)


@triton.jit
def _product(A, B, COMPLEX: tl.constexpr):
    re = tl.dot(A[0], B[0], input_precision="ieee", out_dtype=A[0].dtype)
    im = A[1]
    if COMPLEX:
        re -= tl.dot(A[1], B[1], input_precision="ieee", out_dtype=re.dtype)
        im = tl.dot(A[0], B[1], input_precision="ieee", out_dtype=re.dtype)
        im += tl.dot(A[1], B[0], input_precision="ieee", out_dtype=re.dtype)
    return re, im


@triton.jit
def _adjoint(A):
    return tl.trans(A[0]), -tl.trans(A[1])


@triton.jit
def _twice_skew(A):
    return A[0] - tl.trans(A[0]), A[1] + tl.trans(A[1])


@triton.jit
def _squared_norm(A, COMPLEX: tl.constexpr):
    squares = A[0] * A[0]
    if COMPLEX:
        squares += A[1] * A[1]
    return tl.sum(tl.sum(squares, 1), 0)


@triton.jit
def _scaled(A, n, RADIUS: tl.constexpr, COMPLEX: tl.constexpr):
    """Return ``A / 2^s``, its square and ``s``, by the bound of `norms`; NaN where it is not finite."""
    A2 = _product(A, A, COMPLEX)
    mean, root = _squared_norm(A, COMPLEX) / n, tl.sqrt(_squared_norm(A2, COMPLEX) / n)
    deviation = tl.sqrt(tl.maximum(root - mean, 0.0)) * tl.sqrt(root + mean)
    times = 1.0 if COMPLEX else 2.0
    bound = tl.sqrt(mean + deviation * tl.sqrt(tl.maximum(n / times - 1, 0.0)))
    finite = bound < float("inf")
    bound = tl.where(finite, bound, 0.0)
    scale = tl.where(finite, bound * 0 + 1, float("nan"))
    s = 0
    while bound > RADIUS:
        bound *= 0.5
        scale *= 0.5
        s += 1
    return (A[0] * scale, A[1] * scale), (A2[0] * (scale * scale), A2[1] * (scale * scale)), s


@triton.jit
def _series(A, A2, eye, one, TERMS: tl.constexpr, COMPLEX: tl.constexpr):
    """Return Taylor's polynomial of ``exp(A)``, of degree ``3 TERMS + 2``."""
    A3 = _product(A2, A, COMPLEX)
    k = one * (3 * TERMS)
    re = eye + A[0] / (k + 1) + A2[0] / ((k + 1) * (k + 2))
    im = A[1] / (k + 1) + A2[1] / ((k + 1) * (k + 2))
    for _ in range(TERMS):
        k -= 3
        first, second = 1 / (k + 1), 1 / ((k + 1) * (k + 2))
        higher = _product(A3, (re, im), COMPLEX)
        re = eye + first * A[0] + second * A2[0] + second / (k + 3) * higher[0]
        im = first * A[1] + second * A2[1] + second / (k + 3) * higher[1]
    return re, im


@triton.jit
def _polish(Q, eye, COMPLEX: tl.constexpr):
    """Return ``Q (3 I - Q^H Q) / 2``."""
    gram = _product(_adjoint(Q), Q, COMPLEX)
    change = _product(Q, (eye - gram[0], -gram[1]), COMPLEX)
    return Q[0] + 0.5 * change[0], Q[1] + 0.5 * change[1]


@triton.jit
def _square(Q, eye, j, COMPLEX: tl.constexpr):
    """Return the ``j``-th squaring."""
    Q = _product(Q, Q, COMPLEX)
    if j % 6 == 5:  # see _POLISH_EVERY in squaring.py
        Q = _polish(Q, eye, COMPLEX)
    return Q


@triton.jit
def _begin(
    A, n: tl.constexpr, N: tl.constexpr, RADIUS: tl.constexpr, TERMS: tl.constexpr, COMPLEX: tl.constexpr
):
    """Return ``A / 2^s`` of this program, its exponential and ``s``; where it lies; the identity and 1."""
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    offsets = tl.program_id(0).to(tl.int64) * (n * n) + rows * n + columns
    mask = (rows < n) & (columns < n)
    re, im = _twice_skew(_load(A, offsets, mask, COMPLEX))
    eye = (rows == columns).to(re.dtype)
    one = tl.max(tl.max(eye, 1), 0)  # in the precision of the matrix
    a, a2, s = _scaled((0.5 * re, 0.5 * im), one * n, RADIUS, COMPLEX)
    return a, _series(a, a2, eye, one, TERMS, COMPLEX), s, offsets, mask, eye, one


@triton.jit
def expm_kernel(
    A, Q, n: tl.constexpr, N: tl.constexpr, RADIUS: tl.constexpr, TERMS: tl.constexpr, COMPLEX: tl.constexpr
):
    """Compute ``Q = exp(skew(A))``."""
    _, q, s, offsets, mask, eye, _ = _begin(A, n, N, RADIUS, TERMS, COMPLEX)
    for j in range(s):
        q = _square(q, eye, j, COMPLEX)
    _store(Q, offsets, mask, _polish(q, eye, COMPLEX), COMPLEX)


@triton.jit
def expm_vjp_kernel(
    A,
    G,
    D,
    n: tl.constexpr,
    N: tl.constexpr,
    RADIUS: tl.constexpr,
    TERMS: tl.constexpr,
    AD_TERMS: tl.constexpr,
    COMPLEX: tl.constexpr,
):
    """Compute ``D = phi1(ad_A)(skew(exp(A)^H G))``, with ``skew(A)`` for ``A``."""
    a, first, s, offsets, mask, eye, one = _begin(A, n, N, RADIUS, TERMS, COMPLEX)
    q = first
    for j in range(s):
        q = _square(q, eye, j, COMPLEX)
    re, im = _twice_skew(_product(_adjoint(q), _load(G, offsets, mask, COMPLEX), COMPLEX))
    m_re, m_im = 0.5 * re, 0.5 * im
    re, im = m_re, m_im
    k = one * (AD_TERMS + 1)
    for _ in range(AD_TERMS):  # phi1(z) = 1 + z/2 (1 + z/3 (1 + ...
        re, im = _twice_skew(_product(a, (re, im), COMPLEX))
        re = m_re + re / k
        im = m_im + im / k
        k -= 1
    q = first
    for j in range(s):
        across = _product(_product(q, (re, im), COMPLEX), _adjoint(q), COMPLEX)
        re = 0.5 * (re + across[0])
        im = 0.5 * (im + across[1])
        q = _square(q, eye, j, COMPLEX)
    re, im = _twice_skew((re, im))
    _store(D, offsets, mask, (0.5 * re, 0.5 * im), COMPLEX)


def launch(kernel: Any, n: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a kernel's constants and options, for matrices of a size and dtype."""
    N = max(_SMALLEST_BLOCK, triton.next_power_of_2(n))
    terms, ad_terms = _TERMS[dtype.to_real()]
    constants = {"n": n, "N": N, "RADIUS": 1.25, "TERMS": terms, "COMPLEX": dtype.is_complex}
    if kernel is expm_vjp_kernel:
        constants["AD_TERMS"] = ad_terms
    return constants, {"num_warps": N * N // 128}


def _run(kernel: Any, *matrices: Tensor) -> Tensor:
    result = torch.empty_like(matrices[0], memory_format=torch.contiguous_format)
    n = result.shape[-1]
    if result.numel():
        arguments = [x.resolve_conj().contiguous() for x in (*matrices, result)]
        real = [torch.view_as_real(x) if x.is_complex() else x for x in arguments]
        constants, options = launch(kernel, n, result.dtype)
        with torch.cuda.device(result.device) if result.is_cuda else nullcontext():
            kernel[(result.numel() // n**2,)](*real, **constants, **options)
    return result


def expm(A: Tensor) -> Tensor:
    """Return ``exp(skew(A))`` of matrices ``(..., n, n)``, ``n <= LARGEST``, of one of `DTYPES`."""
    return _run(expm_kernel, A)


def expm_vjp(A: Tensor, G: Tensor) -> Tensor:
    """Return the skew part of the gradient at ``A`` of `expm`, given the gradient ``G`` at its value."""
    return _run(expm_vjp_kernel, A, G)
