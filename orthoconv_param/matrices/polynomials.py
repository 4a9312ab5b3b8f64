r"""Polynomials that are the exponential on an interval of the imaginary axis, in few products.

They have degree 8 in three products (Bader, Blanes, Casas, *Computing the matrix exponential with an
optimized Taylor polynomial approximation*, Mathematics 7 (2019) 1174), in double precision degree 16 in
four (Sastre, *Efficient evaluation of matrix polynomials*, Linear Algebra Appl. 539 (2018) 229). The
coefficients are not Taylor's, but those of the Chebyshev series of the exponential on the interval, where
the spectrum of a skew-Hermitian matrix lies. The derivative is that of these products, one by one.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Factor: TypeAlias = tuple[Tensor, Tensor]  # of a product


class Polynomial(NamedTuple):
    """A polynomial ``p(z)``, near ``exp(z)`` for imaginary ``|z| <= radius``.

    Args:
        radius: of the interval.
        products: pairs of factors, each given by its coefficients of ``I``, ``A``, ``A^2`` and of the
            products before.
        rest: the coefficients of the sum that is added to the last product, likewise.
    """

    radius: float
    products: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    rest: tuple[float, ...]


# Solved in 50 digits from the coefficients of the Chebyshev series of exp(ix), |x| <= radius, of degree 8
# and (but for the power 16, which the others fix) 15. At the radius the errors, 8e-8 and 2e-17, are below
# one unit in the last place; those of the derivative, 5e-6 and 5e-15 there, fall off fast inside.
POLYNOMIALS = {
    torch.float32: Polynomial(
        1.25,
        (
            ((0, 0, 1), (0.12476724388829292073, 0.01938569596317006364, 0.004872977244797974363)),
            (
                (0, 0, 0, 1),
                (2.9208438131949077631, 0.881956701207185371, -0.041930443980911806474, 1),
            ),
        ),
        (0.99999999514806502175, 0.99999944227057861029, 0.13557421213395347867),
    ),
    torch.float64: Polynomial(
        1.25,
        (
            ((0, 0, 1), (0, 0.0029263366787830838205, 0.00039948627431315138242)),
            ((0, 0.40469775974528775564, -0.0078953754696291241518, 1), (0, 0, 0.032482337219295251112, 1)),
            (
                (0, 2.1897013881354623883, 0.26022888911072817756, 5.7094009220490963657, 1),
                (0, -0.027405896015848997569, 0.022605747663850828414, -0.0513502837309801422, 1),
            ),
        ),
        (
            0.99999999999999997691,
            0.99999999999999997461,
            0.5600107285489987949,
            -3.2480258599810098876,
            10.17862815960577983,
        ),
    ),
}


def evaluate(A: Tensor, A2: Tensor, polynomial: Polynomial) -> Tensor:
    """Return ``p(A)`` of matrices ``(count, n, n)``, given their squares."""
    return evaluate_and_keep(A, A2, polynomial)[0]


def evaluate_and_keep(A: Tensor, A2: Tensor, polynomial: Polynomial) -> tuple[Tensor, list[Factor]]:
    """Return ``p(A)``, and the two factors of each product in it."""
    basis, factors = _factors(A, A2, polynomial)
    return _combine(basis, polynomial.rest).baddbmm_(*factors[-1]), factors


def evaluate_vjp(A: Tensor, A2: Tensor, polynomial: Polynomial, G: Tensor) -> Tensor:
    """Return a matrix whose skew part is that of the gradient at ``A`` of `evaluate` with ``A2 = A @ A``.

    ``G``, the gradient at its value, and the result are conjugated: then every adjoint factor is
    a transposed one, which BLAS takes as it lies in memory.
    """
    return evaluate_vjp_of_kept(A, _factors(A, A2, polynomial)[1], polynomial, G)


def evaluate_vjp_of_kept(A: Tensor, factors: list[Factor], polynomial: Polynomial, G: Tensor) -> Tensor:
    """Return `evaluate_vjp`, given the factors of each product."""
    count = 1 + len(factors)  # of the basis: A, its square, and each product but the last
    gradients: dict[int, Tensor] = {}

    def spread(coefficients: tuple[float, ...], G: Tensor) -> None:
        for j, c in enumerate(coefficients[1:]):
            if c:
                gradients[j] = gradients[j].add_(G, alpha=c) if j in gradients else G * c

    spread(polynomial.rest, G)
    for k in reversed(range(len(factors))):
        (left, right), (X, Y) = polynomial.products[k], factors[k]
        spread(left, torch.bmm(G, Y.mT))
        spread(right, torch.bmm(X.mT, G))
        if k > 0:
            G = gradients.pop(count - len(factors) + k)
    G_A, G_A2 = gradients[0], gradients[1]
    # A2 = A @ A adds G_A2 A^H + A^H G_A2. Its skew part is that of A^H (G_A2 + G_A2^H), one product less.
    return G_A.baddbmm_(A.mT, torch.conj_physical(G_A2.mT) + G_A2)


def _factors(A: Tensor, A2: Tensor, polynomial: Polynomial) -> tuple[list[Tensor], list[Factor]]:
    """Return the basis of which the polynomial is made, and the two factors of each product."""
    basis = [A, A2]
    factors: list[tuple[Tensor, Tensor]] = []
    for k, (left, right) in enumerate(polynomial.products, start=1):
        factors.append((_combine(basis, left), _combine(basis, right)))
        if k < len(polynomial.products):
            basis.append(torch.bmm(*factors[-1]))
    return basis, factors


def _combine(basis: list[Tensor], coefficients: tuple[float, ...]) -> Tensor:
    """Return the sum of ``I`` and the matrices of a basis, times their coefficients."""
    first, *others = [j for j, c in enumerate(coefficients[1:]) if c]
    if not others and coefficients[first + 1] == 1:
        return basis[first]
    X = basis[first] * coefficients[first + 1]
    for j in others:
        X.add_(basis[j], alpha=coefficients[j + 1])
    if coefficients[0]:
        X.diagonal(dim1=-2, dim2=-1).add_(coefficients[0])
    return X
