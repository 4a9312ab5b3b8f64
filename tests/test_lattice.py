from itertools import product

import pytest
import torch
from oracles import dense, hartley, phases_first, random

from orthoconv_param.checks import per_axis
from orthoconv_param.torus import dft
from orthoconv_param.torus.boundary import crop
from orthoconv_param.torus.lattice import Lattice, Placement, centre, pack, sampling, unpack

close = torch.testing.assert_close

GEOMETRIES = [  # channels out, in, taps, domain, stride, groups
    (2, 3, (3,), (8,), (1,), 1),
    (2, 3, (4,), (7,), (1,), 1),
    (4, 4, (2, 3), (4, 5), (1, 1), 2),
    (3, 2, (4, 1), (4, 6), (2, 3), 1),
    (4, 2, (3, 5), (6, 6), (1, 2), 2),
    (2, 2, (1, 2, 3), (2, 3, 4), (1, 1, 1), 1),
    (2, 2, (3, 2, 1), (3, 4, 2), (3, 2, 1), 2),
    (2, 1, (9, 7), (4, 4), (2, 1), 1),  # larger than the domain: folded
]


def make(geometry, dtype):
    out, cin, taps, domain, stride, groups = geometry
    kernel = random(out, cin // groups, *taps, dtype=dtype)
    return kernel, Lattice(domain, stride, groups, kernel.is_complex())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_spectrum_is_the_operator_on_plane_waves(geometry, dtype):
    out, cin, _, domain, stride, groups = geometry
    kernel, lattice = make(geometry, dtype)
    grid = lattice.grid
    spectrum = lattice.spectrum(kernel)
    matrix = dense(kernel, domain, stride, groups).to(torch.complex128)
    matrix = matrix[:, phases_first(cin, domain, stride)]  # coarse inputs: (channel, phase), position
    stored = grid if dtype.is_complex else (*grid[:-1], grid[-1] // 2 + 1)
    positions = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid)).double()
    columns = spectrum.shape[-1]
    for f, w in enumerate(product(*map(range, stored))):
        wave = torch.exp(2j * torch.pi * (positions / torch.tensor(grid) * torch.tensor(w)).sum(-1))
        for g, c in product(range(groups), range(columns)):
            x = torch.zeros(groups * columns, len(wave), dtype=torch.complex128)
            x[g * columns + c] = wave
            y = (matrix @ x.flatten()).reshape(groups, out // groups, len(wave))
            expected = torch.zeros_like(y)
            expected[g] = spectrum[g, f, :, c].unsqueeze(-1) * wave
            torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_kernel_inverts_spectrum(geometry, dtype):
    _, _, _, domain, stride, groups = geometry
    kernel, lattice = make(geometry, dtype)
    spectrum = lattice.spectrum(kernel)
    again = lattice.kernel(spectrum)
    assert again.shape == (*kernel.shape[:2], *domain)
    assert again.shape[2:] == lattice.taps
    assert again.dtype == dtype
    torch.testing.assert_close(dense(again, domain, stride, groups), dense(kernel, domain, stride, groups))
    torch.testing.assert_close(lattice.spectrum(again), spectrum)


def test_a_complex_spectrum_is_not_the_conjugate_of_fftn():
    """``conj(fftn(kernel))`` is right for real kernels only: a complex one is not to be conjugated."""
    kernel = random(1, 1, 3, dtype=torch.complex128)
    rolled = torch.fft.fftn(torch.roll(torch.nn.functional.pad(kernel, (0, 2)), -1, -1)).conj().flatten()
    spectrum = Lattice((5,), (1,), 1, True).spectrum(kernel).flatten()
    assert not torch.allclose(rolled, spectrum)
    # the eigenvalues of the operator settle which of them it is
    eigenvalues = torch.linalg.eigvals(dense(kernel, (5,)))
    distance = (eigenvalues[:, None] - spectrum).abs().amin(1)
    assert distance.max() < 1e-12


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
def test_a_compact_kernel_is_centred_for_every_stride(taps, stride):
    kernel = random(2, 1, taps)
    reach = Placement.centred((taps,)).reach((taps,), (stride,))
    lattice = Lattice.of_degree(1, reach, (stride,), 1, False)
    compact = lattice.kernel(lattice.spectrum(kernel))
    assert compact.shape[2:] == lattice.taps
    assert compact.shape[-1] % 2 == 1
    for n in (stride * 7, stride * 40):
        torch.testing.assert_close(dense(compact, (n,), (stride,)), dense(kernel, (n,), (stride,)))


@pytest.mark.parametrize("taps", [(3,), (4,), (2, 5), (3, 1, 4)])
def test_pack_is_orthonormal_and_of_the_weights_dtype(taps):
    for dtype in (torch.float64, torch.complex128):
        kernel = random(2, 3, *taps, dtype=dtype)
        packed = pack(kernel)
        assert packed.dtype == dtype
        torch.testing.assert_close(unpack(packed), kernel)
        torch.testing.assert_close(packed.norm(), kernel.norm())
    generator = random(2, 3, *taps)
    torch.testing.assert_close(unpack(generator), hartley(generator))


@pytest.mark.parametrize("grid", [(1,), (2,), (5,), (6,), (3, 4), (4, 4), (4, 5), (2, 3, 4)])
def test_choose_is_made_once_for_each_pair_and_is_real_where_it_must(grid):
    lattice = Lattice(grid, (1,) * len(grid))
    like = torch.empty(2, lattice.frequencies, 3, 3, dtype=torch.complex128)
    Q = lattice.choose(lambda X: torch.linalg.qr(torch.randn_like(X)).Q, like)
    kernel = lattice.kernel(Q)
    assert not kernel.is_complex()
    matrix = dense(kernel, grid, groups=2)
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(len(matrix), dtype=torch.float64))


@pytest.mark.parametrize("taps", [(3,), (4, 3), (5, 1, 2)])
def test_sampling_bounds_the_maximum_over_all_frequencies(taps):
    stride = (1,) * len(taps)
    grid, factor = sampling(Placement.centred(taps).reach(taps, stride))
    for seed in range(20):
        kernel = random(1, 1, *taps, seed=seed)
        values = [
            (spectrum - spectrum.mH).abs().max().item()
            for points in (grid, (48,) * len(taps))
            for spectrum in [Lattice(points, stride).spectrum(kernel)]
        ]
        assert values[1] <= values[0] * factor * (1 + 1e-12)
        assert values[0] * factor < 1.3 * values[1]


def test_reach_is_the_larger_side_in_coarse_points():
    assert centre(3) == 1
    assert centre(4) == 1
    for taps, stride, reach in (
        ((1, 2, 3, 4, 5), (1,) * 5, (0, 1, 1, 2, 2)),
        ((1, 2, 3, 4, 7), (2,) * 5, (0, 0, 1, 1, 2)),
    ):
        assert Placement.centred(taps).reach(taps, stride) == reach
    # patches: their first tap at the output's own position, they reach nowhere
    assert Placement((1, 1), (0, 0)).reach((3, 4), (3, 4)) == (0, 0)
    assert Placement((2,), (3,)).reach((4,), (1,)) == (3,)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"domain": (2, 8)}, "domain should be at least the kernel's taps"),
        (ValueError, {"domain": (8, 8, 8)}, "domain should be a positive integer, or one for each"),
        (ValueError, {"domain": 9, "stride": 2}, "should be divisible by the stride"),
        (ValueError, {"stride": 2}, "own size"),
        (ValueError, {"groups": 3}, "groups should divide"),
        (ValueError, {"domain": 0}, "domain should be a positive integer"),
        (TypeError, {"domain": 8.0}, "domain should be an integer"),
        (TypeError, {"stride": True}, "stride should be an integer"),
    ],
)
def test_what_does_not_fit_is_named(error, arguments, message):
    with pytest.raises(error, match=message):
        Lattice.of_kernel((4, 4, 3, 3), False, **arguments)
    with pytest.raises(ValueError, match="a convolution's kernel"):
        Lattice.of_kernel((4, 4), False)
    assert per_axis("stride", 2, 3) == (2, 2, 2)


@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 1)}, {"groups": 3}, {"is_complex": True}])
def test_transforms_by_matrices_are_the_fast_ones(geometry, monkeypatch):
    lattice = Lattice(
        (6, 5), geometry.get("stride", (1, 1)), geometry.get("groups", 1), "is_complex" in geometry
    )
    dtype = torch.complex128 if lattice.is_complex else torch.float64
    kernels, tangent = random(3, 12, 4, 3, 3, dtype=dtype), random(12, 4, 3, 3, dtype=dtype, seed=1)
    outcomes = []
    for taps in (64, 0):
        monkeypatch.setattr(dft, "_MATRIX_TAPS", taps)
        spectrum = lattice.spectrum(kernels[0])
        assert spectrum.is_contiguous()
        jvp = torch.func.jvp(lattice.spectrum, (kernels[0],), (tangent,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(kernels[0], tangent)
            legacy = torch.autograd.forward_ad.unpack_dual(lattice.spectrum(dual)).tangent
        vmap = torch.func.vmap(lattice.spectrum)(kernels)
        kernel = kernels[0].clone().requires_grad_()
        weights = random(*spectrum.shape, dtype=torch.complex128, seed=2)
        value = (lattice.spectrum(kernel).abs().square() * weights.real).sum()
        gradient = torch.autograd.grad(value, kernel)[0]
        M = random(*spectrum.shape, dtype=torch.complex128, seed=3).requires_grad_()
        torus = lattice.kernel(M)
        back = torch.autograd.grad(torus, M, random(*torus.shape, dtype=dtype, seed=4))[0]
        outcomes.append((spectrum, jvp, legacy, vmap, gradient, torus, back))
    for one, other in zip(*outcomes, strict=True):
        close(one, other)


def test_cropping_gives_back_what_was_embedded():
    kernel = random(2, 3, 3, 2)
    for placement in (None, Placement((2, 1), (3, 0)), Placement((1, 3), (0, 3))):
        lattice = Lattice((7, 6), (1, 1))
        torus = lattice.kernel(lattice.spectrum(kernel, placement))
        close(crop(torus, (3, 2), placement), kernel)
