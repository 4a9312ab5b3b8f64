from functools import partial

import pytest
import torch
from oracles import dense, periodic, random
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from orthoconv_param import functional
from orthoconv_param.torus import circular
from orthoconv_param.torus.boundary import cut, extend
from orthoconv_param.torus.circular import spectral_conv
from orthoconv_param.torus.lattice import Lattice
from orthoconv_param.torus.shared import Shared

close = torch.testing.assert_close

GEOMETRIES = [  # (out, in/groups, taps), domain, stride, groups
    ((3, 2, 3), (5,), (1,), 1),
    ((2, 3, 4), (6,), (1,), 1),
    ((4, 1, 3), (6,), (2,), 2),
    ((2, 2, 2, 3), (3, 4), (1, 1), 1),
    ((3, 1, 1, 3), (2, 6), (1, 3), 3),
    ((2, 1, 2, 1, 3), (2, 2, 3), (2, 1, 1), 1),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
EACH = pytest.mark.parametrize("geometry", GEOMETRIES)
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True])


def make(geometry, dtype, transposed=False, batch=2):
    size, domain, stride, groups = geometry
    kernel = random(*size, dtype=dtype)
    lattice = Lattice(domain, stride, groups, dtype.is_complex)
    shape = (size[0], *lattice.grid) if transposed else (size[1] * groups, *domain)
    return kernel, lattice, random(batch, *shape, dtype=dtype, seed=1)


@BOTH
@EACH
def test_it_is_the_convolution_and_the_transpose_is_its(geometry, dtype):
    _, domain, stride, groups = geometry
    kernel, lattice, x = make(geometry, dtype)
    y = periodic(x, kernel, stride, groups)
    spectrum = lattice.spectrum(kernel)
    close(spectral_conv(x, spectrum, lattice), y)
    matrix = dense(kernel, domain, stride, groups)
    x = make(geometry, dtype, transposed=True)[2]
    y = (x.flatten(1) @ matrix).reshape(len(x), -1, *domain)
    close(spectral_conv(x, spectrum, lattice, transposed=True), y)


SOME = [pytest.param(g, marks=pytest.mark.slow) if g in GEOMETRIES[2:] else g for g in GEOMETRIES]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.slow)])
@BOTH
@pytest.mark.parametrize("geometry", SOME)
def test_derivatives_of_first_and_second_order(geometry, dtype, transposed):
    kernel, lattice, x = make(geometry, dtype, transposed, batch=1)
    own = lattice.spectrum(kernel)
    for spectrum in (own, random(*own.shape, dtype=torch.complex128, seed=2)):  # also of no real kernel
        inputs = (x.requires_grad_(), spectrum.detach().requires_grad_())

        f = partial(spectral_conv, lattice=lattice, transposed=transposed)
        checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        assert gradcheck(f, inputs, **checks)
        assert gradgradcheck(f, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@TRANSPOSED
@BOTH
@EACH
def test_vmap_over_images_spectra_and_both(geometry, dtype, transposed):
    kernel, lattice, x = make(geometry, dtype, transposed)
    spectrum = lattice.spectrum(kernel)
    xs, spectra = torch.stack([x, 2 * x, -x]), torch.stack([spectrum, 3 * spectrum, spectrum / 2], 1)

    f = partial(spectral_conv, lattice=lattice, transposed=transposed)
    vmap = torch.func.vmap
    y = f(x, spectrum)
    close(vmap(f, (0, None))(xs, spectrum), torch.stack([y, 2 * y, -y]))
    close(vmap(f, (None, 1))(x, spectra), torch.stack([y, 3 * y, y / 2]))
    close(vmap(f, (0, 1))(xs, spectra), torch.stack([y, 6 * y, -y / 2]))

    def loss(x, spectrum):
        return f(x, spectrum).abs().pow(2).sum()

    per_sample = vmap(torch.func.grad(loss, (0, 1)), (0, 1))(xs, spectra)
    alone = [torch.func.grad(loss, (0, 1))(x, s) for x, s in zip(xs, spectra.unbind(1), strict=True)]
    for got, expected in zip(per_sample, zip(*alone, strict=True), strict=True):
        close(got, torch.stack(expected))
    if not dtype.is_complex:  # torch.func takes no complex argument here

        def of_images(x):
            return loss(x, spectrum)

        close(torch.func.hessian(of_images)(x), torch.autograd.functional.hessian(of_images, x))


@pytest.mark.sampled(4)
@BOTH
@EACH
def test_compiled_without_a_graph_break_it_is_the_same(geometry, dtype):
    torch.compiler.reset()
    kernel, lattice, x = make(geometry, dtype)
    spectrum = lattice.spectrum(kernel).requires_grad_()
    x.requires_grad_()
    compiled = torch.compile(spectral_conv, fullgraph=True, backend="aot_eager")
    y = spectral_conv(x, spectrum, lattice)
    close(compiled(x, spectrum, lattice), y)
    G = random(*y.shape, dtype=dtype, seed=3)
    gradients = [
        torch.autograd.grad(f(x, spectrum, lattice), (x, spectrum), G) for f in (compiled, spectral_conv)
    ]
    close(*gradients)


def test_operators_are_well_formed():
    kernel, lattice, x = make(GEOMETRIES[3], torch.float64)
    fields = lattice.domain, lattice.stride, lattice.groups
    operators = torch.ops.orthoconv_param
    torch.library.opcheck(operators.spectral_conv, (x, lattice.spectrum(kernel), *fields, False))
    y = spectral_conv(x, lattice.spectrum(kernel), lattice)
    torch.library.opcheck(operators.spectral_conv_outer, (y, x, None, None, *fields))


@pytest.mark.parametrize("batch", [0, 1, 8, 9, 40])
@TRANSPOSED
def test_batches_in_pieces_and_empty_ones(batch, transposed, monkeypatch):
    kernel, lattice, x = make(GEOMETRIES[3], torch.float64, transposed, batch)
    spectrum = lattice.spectrum(kernel)
    whole = spectral_conv(x, spectrum, lattice, transposed)
    assert len(whole) == batch
    monkeypatch.setattr(circular, "_PIECE_BYTES", 1)
    assert torch.equal(spectral_conv(x, spectrum, lattice, transposed), whole)


@pytest.mark.parametrize("axes", [2, 3])
def test_memory_format_is_kept(axes):
    geometry = ((4, 4, *(3,) * axes), (5,) * axes, (1,) * axes, 1)
    kernel, lattice, x = make(geometry, torch.float64)
    memory_format = (torch.channels_last, torch.channels_last_3d)[axes - 2]
    y = spectral_conv(x.to(memory_format=memory_format), lattice.spectrum(kernel), lattice)
    assert y.is_contiguous(memory_format=memory_format)
    close(y, spectral_conv(x, lattice.spectrum(kernel), lattice), check_stride=False)


CONVOLUTIONS = [  # axes, kernel, stride, groups, dilation, domain
    (1, (3,), (1,), 1, (1,), (8,)),
    (1, (4,), (2,), 2, (3,), (10,)),
    (2, (3, 2), (1, 1), 1, (2, 1), (6, 7)),
    (2, (5, 3), (2, 1), 2, (1, 2), (4, 3)),  # larger than the domain
    (3, (1, 2, 3), (1, 2, 1), 1, (1, 1, 1), (2, 4, 3)),
]


@BOTH
@TRANSPOSED
@pytest.mark.parametrize(("axes", "kernel", "stride", "groups", "dilation", "domain"), CONVOLUTIONS)
def test_public_function_is_torchs_convolution_around_a_torus(
    axes, kernel, stride, groups, dilation, domain, transposed, dtype
):
    w = random(4, 4 // groups, *kernel, dtype=dtype)
    options = {"stride": stride, "groups": groups, "dilation": dilation}
    x = random(2, 4, *domain, dtype=dtype, seed=1)
    if not transposed:
        close(functional.spectral_conv(x, w, **options), periodic(x, w, stride, groups, dilation))
        return
    matrix = dense(w, domain, stride, groups, dilation)
    x = x[(..., *(slice(None, None, s) for s in stride))]
    y = functional.spectral_conv(x, w, transposed=True, **options)
    close(y.flatten(1), x.flatten(1) @ matrix)


def test_public_function_agrees_with_a_circular_module():
    conv = nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False)
    x = torch.randn(2, 3, 9, 8)
    close(functional.spectral_conv(x, conv.weight), conv(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("error", "x", "options", "message"),
    [
        (ValueError, torch.ones(1, 3, 8), {}, "x should have 2 channels"),
        (ValueError, torch.ones(2, 8), {}, "x should have 2 channels, 1 axes"),
        (ValueError, torch.ones(1, 2, 8, dtype=torch.float64), {}, "dtype torch.float32"),
        (ValueError, torch.ones(1, 2, 8), {"stride": 3}, "divisible by the stride"),
        (ValueError, torch.ones(1, 2, 8), {"dilation": 0}, "dilation should be a positive integer"),
        (TypeError, torch.ones(1, 2, 8), {"groups": 1.0}, "groups should be an integer"),
        (TypeError, torch.ones(1, 2, 8, dtype=torch.int64), {}, "x should be a tensor of a floating"),
    ],
)
def test_bad_input_is_named(error, x, options, message):
    with pytest.raises(error, match=message):
        functional.spectral_conv(x, torch.ones(2, 2, 3), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    x, w = random(1, 2, 8).to(dtype), random(2, 2, 3).to(dtype)
    assert torch.equal(
        functional.spectral_conv(x, w), functional.spectral_conv(x.float(), w.float()).to(dtype)
    )


def loop(x, spectrum, lattice, transposed, share):
    """Three uses of one spectrum, the second with as many images again."""
    convolve = Shared(spectrum, lattice).convolve if share else partial(plain, spectrum, lattice)
    y = convolve(x, transposed)
    z = convolve(torch.cat([x.square(), 2 * x]), transposed)
    return y + z[: len(x)] * convolve(x, transposed) + z[len(x) :]


def plain(spectrum, lattice, x, transposed):
    return spectral_conv(x, spectrum, lattice, transposed)


@TRANSPOSED
@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_of_a_shared_spectrum(geometry, dtype, transposed):
    kernel, lattice, x = make(geometry, dtype, transposed)
    x.requires_grad_()
    M = lattice.spectrum(kernel).requires_grad_()
    y, alone = (loop(x, M, lattice, transposed, share) for share in (True, False))
    close(y, alone)
    G = random(*y.shape, dtype=dtype, seed=3)
    expected = torch.autograd.grad(alone, (x, M), G, retain_graph=True)
    for _ in range(2):
        close(torch.autograd.grad(y, (x, M), G, retain_graph=True), expected)
        # a pass that does not ask for the spectrum's gradient leaves nothing to the next
        close(torch.autograd.grad(y, x, G, retain_graph=True)[0], expected[0])
        close(torch.autograd.grad(y, M, G, retain_graph=True)[0], expected[1])
    batch = torch.stack([G, 2 * G])
    both = torch.autograd.grad(y, (x, M), batch, is_grads_batched=True, retain_graph=True)
    close([g[1] for g in both], [2 * g for g in expected])
    second = [
        torch.autograd.grad(torch.autograd.grad(value, M, G, create_graph=True)[0].abs().sum(), (x, M))
        for value in (y, alone)
    ]
    close(*second)
    frozen = loop(x.detach(), M, lattice, transposed, share=True)
    close(torch.autograd.grad(frozen, M, G)[0], expected[1])


def test_a_shared_spectrum_under_transformations():
    kernel, lattice, x = make(GEOMETRIES[3], torch.float64)
    M = lattice.spectrum(kernel)

    def energy(M, share):
        return loop(x, M, lattice, False, share).square().sum()

    alone, together = (partial(energy, share=share) for share in (False, True))
    close(torch.func.grad(together)(M), torch.func.grad(alone)(M))
    tangent = random(*M.shape, dtype=M.dtype, seed=2)
    close(torch.func.jvp(together, (M,), (tangent,)), torch.func.jvp(alone, (M,), (tangent,)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(M.requires_grad_(), tangent)
        tangents = [torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (alone, together)]
    close(*tangents)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_shared_spectrum_within_checkpoints(use_reentrant):
    kernel, lattice, x = make(GEOMETRIES[3], torch.float64)
    W = random(1, 2, 1, 1, seed=4).requires_grad_()
    M = lattice.spectrum(kernel).requires_grad_()
    gradients = []
    for share in (False, True):

        def inner(x, M, share=share):
            return loop(x, M, lattice, False, share)

        y = checkpoint(inner, loop(x * W, M, lattice, False, share), M, use_reentrant=use_reentrant)
        gradients.append(grads(y, W, M))
    close(*gradients)


def grads(y, *inputs):
    """By `backward`, the only way that reentrant checkpoints know."""
    for x in inputs:
        x.grad = None
    y.square().sum().backward()
    return tuple(x.grad for x in inputs)


@pytest.mark.sampled(2)
@TRANSPOSED
@BOTH
@pytest.mark.parametrize("size", [(3,), pytest.param((2, 3), marks=pytest.mark.slow)])
def test_smaller_images_are_continued_by_zeros_and_the_result_is_cut(size, dtype, transposed):
    torus = tuple(n + 1 for n in size)
    lattice = Lattice(torus, (1,) * len(size), 2, dtype.is_complex)
    M = lattice.spectrum(random(2, 2, *(2,) * len(size), dtype=dtype)).requires_grad_()
    x = random(1, 2 if transposed else 4, *size, dtype=dtype, seed=1).requires_grad_()
    y = spectral_conv(x, M, lattice, transposed)
    close(y, cut(spectral_conv(extend(x, torus), M, lattice, transposed), size))
    f = partial(spectral_conv, lattice=lattice, transposed=transposed)
    assert gradcheck(f, (x, M), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x, M))
