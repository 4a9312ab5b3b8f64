"""The contract of parametrizations: what each does to a weight, whatever makes its kernel.

A new parametrization takes part by an entry in `KINDS`.
"""

import copy
import functools
import io
import random as numbers
from dataclasses import dataclass

import geotorch
import pytest
import torch
from geotorch.exceptions import InManifoldError
from oracles import dense, random, skew
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from orthoconv_param import ConvExponential, SplitExponential
from orthoconv_param.parametrizations.annealed import Annealed
from orthoconv_param.parametrizations.blocks import Blocks
from orthoconv_param.parametrizations.partition import Partition
from orthoconv_param.parametrizations.registered import Registered

close = torch.testing.assert_close

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
HALF = [torch.float16, torch.bfloat16]
TOLERANCE = {
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float64: 1e-11,
    torch.complex128: 1e-11,
}

GEOMETRIES = {  # size of the weight, stride, groups
    "square": ((3, 3, 3, 3), 1, 1),
    "tall": ((4, 2, 3, 2), 1, 1),
    "wide": ((2, 4, 2, 3), 1, 1),
    "groups": ((4, 2, 3, 3), 1, 2),
    "stride": ((4, 2, 4, 2), 2, 1),
    "1d": ((3, 3, 4), 1, 1),
    "3d": ((2, 3, 1, 2, 3), 1, 1),
}
DOMAINS = {1: (6,), 2: (6, 4), 3: (2, 4, 3)}
OTHER_DOMAINS = {1: (9,), 2: (8, 6), 3: (3, 4, 5)}  # of kernels that are orthogonal on every one


def domain_of(size):
    return DOMAINS[len(size) - 2]


def blocks_of(size, groups):
    """One block of channels in each group, or two, and some channels left."""
    rows, columns = size[0] // groups, size[1]
    side = max(1, min(rows, columns) - 1)
    starts = [g * rows for g in range(groups)] if groups > 1 else range(0, rows - side + 1, side)
    return [(slice(start, start + side), slice(0, side)) for start in starts]


def in_blocks(exponential):
    def make(size, stride, groups):
        blocks = blocks_of(size, groups)
        made = exponential(domain_of(size), stride=stride, groups=len(blocks))
        return Blocks(made, Partition(blocks, size, groups))

    return make


def alone(exponential, domain):
    return lambda size, stride, groups: exponential(domain(size), stride=stride, groups=groups)


ON_DOMAIN = alone(Annealed, domain_of)
KINDS = {  # what makes it, and t: its operator's singular values are (those that were assigned)^(1 - t)
    "own grid": (alone(ConvExponential, lambda size: None), 1.0),
    "domain": (alone(ConvExponential, domain_of), 1.0),
    "any": (alone(ConvExponential, lambda size: "any"), 1.0),
    "annealed, t=0": (ON_DOMAIN, 0.0),
    "annealed, t=0.5": (ON_DOMAIN, 0.5),
    "annealed, t=1": (ON_DOMAIN, 1.0),
    "blocks": (in_blocks(ConvExponential), 1.0),
    "blocks, annealed, t=0.5": (in_blocks(Annealed), 0.5),
    "split": (lambda size, stride, groups: SplitExponential(stride=stride, groups=groups), 1.0),
}


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass
class Subject:
    """A parametrized weight, and what is known of it from elsewhere."""

    kind: str
    holder: nn.Module
    size: tuple
    stride: int
    groups: int
    dtype: torch.dtype
    t: float
    assigned: torch.Tensor  # the last value that was given to it

    @property
    def parametrization(self):
        return self.holder.parametrizations.weight[0]

    @property
    def weight(self):
        return self.holder.weight.detach()

    @property
    def originals(self):
        return [*self.holder.parametrizations.weight.parameters(recurse=False)]

    @property
    def exponentials(self):
        return [p for p in self.parametrization.modules() if isinstance(p, Registered)]

    @property
    def is_compact(self):
        return self.kind == "any"

    @property
    def is_split(self):
        return self.kind == "split"

    @property
    def scale(self):
        """Of weights and steps: where taps depend on the norm there are to be few."""
        return 0.3 if self.is_compact else 1.0

    def parts(self, kernel, domain=None):
        """The matrices that are constrained: of the operator, or of each block of it."""
        axes = len(self.size) - 2
        own = self.size[2:] if self.kind == "own grid" else domain_of(self.size)
        domain, stride, groups = domain or own, (self.stride,) * axes, self.groups
        kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float64))
        if not isinstance(self.parametrization, Blocks):
            return [dense(kernel, domain, stride, groups)]
        return [dense(kernel[block], domain, stride) for block in blocks_of(self.size, groups)]

    def move(self, by=0.2):
        """Change the free parameters, as training does; return what the weight was before."""
        before, by = self.weight.clone(), by * self.scale
        with torch.no_grad():
            for i, X in enumerate(self.originals):
                step = by * random(*X.shape, dtype=torch.promote_types(X.dtype, torch.float32), seed=10 + i)
                X.add_(step.to(X.dtype))
        return before

    def check(self, tolerance=None):
        """Check the singular values."""
        tolerance = tolerance or TOLERANCE[self.dtype]
        everywhere = self.is_compact or self.is_split
        domains = [None, OTHER_DOMAINS[len(self.size) - 2]] if everywhere else [None]
        for domain in domains:
            for now, first in zip(
                self.parts(self.weight, domain), self.parts(self.assigned, domain), strict=True
            ):
                S = torch.linalg.svdvals(first) ** (1 - self.t)
                close(torch.linalg.svdvals(now), S, atol=tolerance * max(1, S.max().item()), rtol=0)

    def state(self):
        return {key: value.clone() for key, value in self.holder.state_dict().items()}


def subject(kind, geometry="square", dtype=torch.float64, seed=0):
    return copy.deepcopy(_subject(kind, geometry, dtype, seed))


@functools.cache  # split kernels are searched for
def _subject(kind, geometry, dtype, seed):
    make, t = KINDS[kind]
    size, stride, groups = GEOMETRIES[geometry]
    single = torch.promote_types(dtype, torch.float32)
    W = (0.5 * random(*size, dtype=single, seed=seed)).to(dtype) * (0.3 if kind == "any" else 1)
    holder = Holder(W.clone())
    register_parametrization(holder, "weight", make(size, stride, groups), unsafe=True)
    for p in holder.modules():
        if isinstance(p, Annealed):
            p.t.fill_(t)
    return Subject(kind, holder, size, stride, groups, dtype, t, W)


def by_default(chosen, among):
    """All of them, of which the others are slow."""
    return [x if x in chosen else pytest.param(x, marks=pytest.mark.slow) for x in among]


every_kind = pytest.mark.parametrize("kind", KINDS)
every_geometry = pytest.mark.parametrize("geometry", by_default(["tall", "groups", "stride"], GEOMETRIES))
every_dtype = pytest.mark.parametrize("dtype", by_default([torch.float64, torch.complex64], DTYPES))


def geometries_and(dtypes, *often):
    """Every geometry in double precision, and three of them in every one; by default, three in some."""
    some = ("tall", "groups", "stride")
    chosen = [(g, d) for g in GEOMETRIES for d in dtypes if g in some or d == torch.float64]
    default = [(g, d) for g, d in chosen if g in some and d in often]
    pairs = [pair if pair in default else pytest.param(*pair, marks=pytest.mark.slow) for pair in chosen]
    return pytest.mark.parametrize(("geometry", "dtype"), pairs)


def polar(M):
    """The nearest isometry, and how much of an error in ``M`` there is in it."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh, (S[0] / S[-1]).item()


# From the free parameters to the kernel


@pytest.mark.sampled(3)
@geometries_and([*DTYPES, *HALF], torch.bfloat16, torch.float64, torch.complex64)
@every_kind
def test_forward(kind, geometry, dtype):
    it = subject(kind, geometry, dtype)
    for moved in (False, True):
        if moved:
            before = it.move()
        weight = it.holder.weight
        assert weight.shape == (*it.size[:2], *it.parametrization.taps)
        assert weight.dtype == dtype
        assert weight.requires_grad
        assert torch.equal(it.parametrization(*it.originals), weight)
        it.check()
    assert weight.shape != before.shape or (weight - before).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", by_default([torch.float64], [torch.float64, torch.complex128]))
@pytest.mark.parametrize("geometry", by_default(["groups"], ["wide", "groups", "stride", "1d"]))
@every_kind
def test_its_derivatives(kind, geometry, dtype):
    it = subject(kind, geometry, dtype)
    X = [X.detach().clone().requires_grad_() for X in it.originals]
    assert gradcheck(it.parametrization, X, check_forward_ad=True, fast_mode=geometry != "1d")
    it.move()
    X = [X.detach().clone().requires_grad_() for X in it.originals]
    assert gradgradcheck(it.parametrization, X, fast_mode=True, check_fwd_over_rev=True)


@every_dtype
@every_kind
def test_autocast_does_not_reach_it(kind, dtype):
    it = subject(kind, dtype=dtype)
    it.move()
    exact = it.weight
    X = it.originals
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(it.weight, exact)
        (gradient,) = torch.autograd.grad(it.holder.weight.abs().pow(3).sum(), X[0])
    assert gradient.dtype == dtype
    assert torch.equal(gradient, torch.autograd.grad(it.holder.weight.abs().pow(3).sum(), X[0])[0])


# From a kernel to the free parameters


@pytest.mark.sampled(2)
@geometries_and(DTYPES, torch.float64)
@every_kind
def test_what_is_assigned_is_read_back_if_it_is_one_and_projected_if_not(kind, geometry, dtype):
    it = subject(kind, geometry, dtype)
    sizes = [it.size]
    if not it.is_compact:
        it.move()
        K = it.weight
        it.holder.weight = K
        close(it.weight, K, atol=TOLERANCE[dtype], rtol=0)
        if not isinstance(it.parametrization, Blocks):  # the rest of which has the generator's taps only
            sizes.append((*it.size[:2], *it.parametrization.taps))
    for seed, size in enumerate(sizes, start=1):
        it = subject(kind, geometry, dtype)
        W = 0.5 * it.scale * random(*size, dtype=dtype, seed=seed)
        it.holder.weight = it.assigned = W
        it.t = it.t if it.t == 1 else 0.0  # that is where annealing starts again
        it.check()
        if it.is_split:  # no farther than others, of which the nearest is not known
            others = [it.parametrization.sample("uniform") for _ in range(20)]
            assert (it.weight - W).norm() < min((other - W).norm() for other in others)
            continue
        for M, first in zip(it.parts(it.weight), it.parts(W), strict=True):
            if it.is_compact:  # W is the generator
                if M.shape[0] == M.shape[1] and it.stride == 1:
                    close(M, torch.linalg.matrix_exp(skew(first)), atol=TOLERANCE[dtype], rtol=0)
                continue
            U, condition = polar(first)
            expected = U if it.t == 1 else first
            close(M, expected, atol=TOLERANCE[dtype] * condition, rtol=0)
        if isinstance(it.parametrization, Blocks):
            whole = dense(it.weight, domain_of(it.size), (it.stride,) * (len(size) - 2), it.groups)
            whole -= dense(W, domain_of(it.size), (it.stride,) * (len(size) - 2), it.groups)
            free = torch.ones(size[0], size[1] * it.groups, dtype=torch.bool)
            for rows, columns in blocks_of(size, it.groups):
                start = rows.start // (size[0] // it.groups) * size[1]
                free[rows, start : start + columns.stop] = False
            pairs = whole.reshape(size[0], -1, size[1] * it.groups, whole.shape[1] // (size[1] * it.groups))
            assert pairs.permute(0, 2, 1, 3)[free].abs().max() < TOLERANCE[dtype]


@pytest.mark.sampled(2)
@every_geometry
@every_kind
def test_a_preimage_is_what_assigning_sets_and_changes_nothing(kind, geometry):
    it = subject(kind, geometry)
    it.move()
    before, degrees = it.state(), [getattr(p, "degree", None) for p in it.exponentials]
    W = it.scale * random(*it.size, seed=1)
    preimage, buffers = it.parametrization.preimage(W)
    assert it.state().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in it.state().items())
    assert [getattr(p, "degree", None) for p in it.exponentials] == degrees
    it.holder.weight = W
    preimage = (preimage,) if isinstance(preimage, torch.Tensor) else preimage
    for X, original in zip(preimage, it.originals, strict=True):
        assert torch.equal(X, original)
    if kind == "annealed, t=1":  # a checkpoint of a plain weight starts again, an assignment is the nearest
        assert buffers.pop("t") == 0
        assert it.parametrization.progress == 1
    state = it.parametrization.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in buffers.items())


@geometries_and(DTYPES, torch.float64)
@every_kind
def test_updating_the_base_keeps_the_weight(kind, geometry, dtype):
    it = subject(kind, geometry, dtype)
    it.move()
    K, before = it.weight, it.state()
    if it.is_compact:  # which has none
        with pytest.raises(ValueError, match="no base"):
            geotorch.utils.update_base(it.holder, "weight")
        assert all(torch.equal(value, before[key]) for key, value in it.state().items())
        return
    originals, bases = it.originals, [p.base for p in it.exponentials]
    geotorch.utils.update_base(it.holder, "weight")
    close(it.weight, K, atol=TOLERANCE[dtype], rtol=0)
    if it.is_split:  # pairs have no base
        assert not any(X.any() for X in it.parametrization.chain.split(originals[0])[0])
    else:
        assert not originals[0].any()
    assert all(a is b for a, b in zip(it.originals, originals, strict=True))
    assert all(p.base is base for p, base in zip(it.exponentials, bases, strict=True))
    it.assigned, it.t = K, it.t if it.t == 1 else 0.0
    it.move()
    it.check()


# geotorch's verbs


@pytest.mark.sampled(2)
@geometries_and(DTYPES, torch.float64)
@every_kind
def test_samples_are_in_the_manifold_and_other_kernels_are_not(kind, geometry, dtype):
    it = subject(kind, geometry, dtype)
    manifold = it.parametrization
    if not hasattr(manifold, "sample"):
        pytest.skip("has no verbs of a manifold: some of the weight is free")
    it.move()
    assert manifold.in_manifold(it.weight) == (it.t == 1)
    W = random(*it.size[:2], *manifold.taps, dtype=dtype)
    assert not manifold.in_manifold(W)
    for distribution in ("identity",) if it.is_compact else ("identity", "uniform", "torus"):
        Q = manifold.sample(distribution)
        assert Q.dtype == dtype
        it.holder.weight = it.assigned = Q
        it.check()
        if not it.is_compact:  # else it is a generator
            assert manifold.in_manifold(Q)
            close(it.weight, Q, atol=TOLERANCE[dtype], rtol=0)
            manifold.right_inverse(Q, check_in_manifold=True)
    before = it.state()
    if not it.is_compact:
        with pytest.raises(InManifoldError):
            manifold.right_inverse(W, check_in_manifold=True)
    assert all(torch.equal(value, before[key]) for key, value in it.state().items())


# Being a module


@pytest.mark.sampled(2)
@geometries_and(DTYPES, torch.float64, torch.complex64)
@every_kind
def test_saved_and_loaded_into_a_fresh_one(kind, geometry, dtype):
    it, fresh = subject(kind, geometry, dtype), subject(kind, geometry, dtype, seed=7)
    it.move(by=0.5)
    weight = it.weight  # with "any" its taps have changed
    buffer = io.BytesIO()
    torch.save(it.holder.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert any(key.endswith("_extra_state") for key in state)
    fresh.holder.load_state_dict(state, strict=True)
    assert torch.equal(fresh.weight, weight)
    assert fresh.parametrization.taps == it.parametrization.taps
    assert fresh.state().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in fresh.state().items())


@every_kind
def test_a_checkpoint_of_another_kind_or_domain_is_refused(kind):
    it = subject(kind)
    it.move()
    # of the same tensors, but for what it says of itself
    state = it.holder.state_dict()
    (key,) = (key for key in state if key.endswith("_extra_state"))
    other = subject("any" if kind == "own grid" else "own grid")
    state[key] = other.holder.state_dict()["parametrizations.weight.0._extra_state"]
    fresh = subject(kind, seed=7)
    with pytest.raises(RuntimeError, match="the checkpoint should be of a convolution with"):
        fresh.holder.load_state_dict(state)


@pytest.mark.sampled(3)
@every_geometry
@every_kind
def test_copies_are_of_their_own(kind, geometry):
    it = subject(kind, geometry)
    it.move()
    weight = it.weight.clone()
    twin = copy.deepcopy(it)
    assert torch.equal(twin.weight, weight)
    for changed, other in ((twin, it), (it, copy.deepcopy(it))):
        changed.move()
        changed.holder.weight = it.scale * random(*it.size, seed=5)
        assert not any(p.t.copy_(1 - p.t) is None for p in changed.exponentials if isinstance(p, Annealed))
        assert changed.weight.shape != weight.shape or not torch.allclose(changed.weight, weight)
        assert torch.equal(other.weight, weight)


@pytest.mark.sampled(2)
@every_geometry
@every_kind
@pytest.mark.parametrize(
    ("low", "high", "half"),
    [
        (torch.float32, torch.float64, torch.float16),
        pytest.param(torch.float32, torch.float64, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.complex64, torch.complex128, None, marks=pytest.mark.slow),
    ],
)
def test_it_is_as_orthogonal_as_the_dtype_that_it_moves_to(kind, geometry, low, high, half):
    it = subject(kind, geometry, low)
    it.move()
    before = it.weight
    for dtype in [high, low, half, low, high] if half else [high, low, high]:
        it.holder.to(dtype)
        it.dtype = dtype
        assert it.weight.dtype == dtype
        # the singular values that are annealed are those that were rounded once
        it.check(max(TOLERANCE[dtype], 1e-5) if it.t < 1 else None)
        if dtype != half:
            buffers = [
                b for name, b in it.parametrization.named_buffers() if not name.endswith("_reference")
            ]
            assert {b.dtype for b in buffers} <= {dtype.to_real(), torch.float32}
        if dtype == low and before.shape == it.weight.shape and half is None:
            close(it.weight, before, atol=1e-5, rtol=0)


def test_float_half_and_double_are_verbs_of_the_module_too():
    for kind in KINDS:
        it = subject(kind)
        for verb, dtype in (("float", torch.float32), ("half", torch.half), ("double", torch.double)):
            getattr(it.holder, verb)()
            assert it.weight.dtype == dtype
            it.check(max(TOLERANCE[dtype], 1e-5) if it.t < 1 else TOLERANCE[dtype])


@pytest.mark.sampled(2)
@every_geometry
@every_kind
@pytest.mark.parametrize("dtype", by_default([torch.float32], [torch.float32, torch.complex128]))
def test_to_the_meta_device_and_back(kind, geometry, dtype):
    it = subject(kind, geometry, dtype)
    it.move()
    weight, state = it.weight, it.state()
    it.holder.to("meta")
    assert it.weight.is_meta
    assert it.weight.dtype == dtype
    assert it.weight.shape[:2] == weight.shape[:2]
    assert type(it.parametrization).__name__ in repr(it.holder)
    it.holder.to_empty(device="cpu").load_state_dict(state, strict=True)
    assert torch.equal(it.weight, weight)
    it.move()
    it.check()


@every_kind
def test_it_says_what_it_is(kind):
    size, stride, groups = GEOMETRIES["stride"]
    assert repr(KINDS[kind][0](size, stride, groups))  # before it is registered too
    it = subject(kind, "stride")
    text = repr(it.holder)
    assert "stride=2" in text
    assert ("t=0.5" in text) == (it.t == 0.5)
    if isinstance(it.parametrization, Blocks):
        assert "[0:1, 0:1], [1:2, 0:1]" in text
    else:
        assert str(it.size) in text


@every_dtype
@every_kind
def test_removal_leaves_the_weight(kind, dtype):
    it = subject(kind, dtype=dtype)
    it.move()
    weight = it.weight
    remove_parametrizations(it.holder, "weight")
    assert type(it.holder) is Holder
    assert [*it.holder.state_dict()] == ["weight"]
    assert isinstance(it.holder.weight, nn.Parameter)
    assert torch.equal(it.holder.weight, weight)


def blocks_anywhere(draw):
    """Blocks of one size anywhere in the groups of a weight, and the weight's size and groups."""
    groups = draw.choice([1, 2])
    height, width = draw.randint(1, 6), draw.randint(1, 6)
    rows, columns = draw.randint(1, height), draw.randint(1, width)
    taken, blocks = torch.zeros(groups * height, width, dtype=torch.bool), []
    for _ in range(6):
        group, top, left = (
            draw.randrange(groups),
            draw.randint(0, height - rows),
            draw.randint(0, width - columns),
        )
        block = slice(group * height + top, group * height + top + rows), slice(left, left + columns)
        if not taken[block].any():
            taken[block] = True
            blocks.append(block)
    return blocks, (groups * height, width, 2), groups


@pytest.mark.parametrize("seed", range(20))
def test_blocks_and_the_rest_are_the_weight_that_they_were_read_from(seed):
    blocks, size, groups = blocks_anywhere(numbers.Random(seed))
    partition = Partition(blocks, size, groups)
    W = torch.randn(size, dtype=torch.float64)
    stacked, rest = partition.stacked(W).requires_grad_(), partition.rest(W).requires_grad_()
    assert torch.equal(partition.assembled(stacked, rest), W)
    partition.assembled(stacked, rest).backward(W)
    assert torch.equal(stacked.grad, stacked)
    assert partition.is_all or torch.equal(rest.grad, rest)
    for rows, columns in blocks:
        W[rows, columns] = 0
    assert torch.equal(partition.assembled(torch.zeros_like(stacked), rest), W)
    assert torch.equal(partition.assembled(stacked, None), partition.assembled(stacked, 0 * rest))
