"""The contract of evaluators: each computes what an operator's dense matrix says, where its cost is finite.

A new evaluator takes part by its entry in `evaluate.EVALUATORS`; `CANNOT` says where its cost is infinite.
A new boundary takes part by its entry in `boundary.BOUNDARIES`; `ORACLES` says what its matrix is. A new
parametrization, or stack of them, is an entry in `KINDS`.
"""

import copy
import operator
from functools import cache, partial
from math import inf, prod

import pytest
import torch
import torch.nn.functional as F
from models import evaluated
from oracles import between_walls, dense, exponential_between_walls, fed, random
from oracles import operator as matrix
from test_conversion import make
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

from orthoconv_param import orthogonal, retrofit, set_orthogonality
from orthoconv_param.convert import geometry_of
from orthoconv_param.module import operator_of
from orthoconv_param.operators import evaluate
from orthoconv_param.operators.blended import orthogonal_part
from orthoconv_param.operators.operator import Action, Operator
from orthoconv_param.operators.weight import Fixed, Parametrized
from orthoconv_param.torus.boundary import BOUNDARIES, boundary_named

# torch's own convolution says so, before it is made orthogonal
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

close = torch.testing.assert_close

COMPLEX = torch.complex128

# kernel, options of `make`, a domain, and further ones: for operators that take every one
GEOMETRIES = {
    "1d": ((3,), {}, (6,), [(1,), (2,), (40,)]),
    "1d, even": ((4,), {}, (7,), [(3,), (1,)]),
    "1d, even, dilated": ((2,), {"dilation": 3, "out": 3}, (5,), [(2,)]),
    "1d, tall, strided": ((3,), {"stride": 3, "cin": 2, "out": 7}, (9,), [(3,)]),
    "1d, strided and dilated alike": ((3,), {"stride": 2, "dilation": 2}, (6,), [(2,), (14,)]),
    "1d, complex, transposed": ((3,), {"stride": 2, "transposed": True, "dtype": COMPLEX}, (6,), [(2,)]),
    "2d": ((3, 3), {"cin": 2, "out": 2}, (5, 4), [(1, 1), (2, 9)]),
    "2d, one tap": ((1, 1), {"cin": 2, "out": 3}, (3, 2), [(1, 1)]),
    "2d, one tap, strided": ((1, 1), {"stride": 2, "cin": 2, "out": 3}, (4, 2), [(2, 2)]),
    "2d, wide, even": ((2, 5), {"cin": 5, "out": 2}, (3, 6), [(4, 1)]),
    "2d, groups": ((3, 1), {"cin": 4, "out": 6, "groups": 2}, (4, 3), [(2, 2)]),
    "2d, depthwise": ((3, 3), {"cin": 3, "out": 3, "groups": 3}, (3, 3), [(6, 1)]),
    "2d, strided": ((3, 2), {"cin": 2, "out": 4, "stride": 2}, (6, 4), [(2, 2)]),
    "2d, dilated": ((3, 3), {"cin": 2, "out": 2, "dilation": (1, 2)}, (4, 7), [(5, 3)]),
    "2d, complex": ((3, 2), {"cin": 2, "out": 2, "dtype": COMPLEX}, (4, 5), [(2, 1)]),
    "2d, transposed": ((3, 5), {"cin": 2, "out": 3, "transposed": True}, (4, 5), [(1, 2)]),
    "2d, transposed, strided, groups": (
        (3, 2), {"cin": 4, "out": 4, "stride": 2, "groups": 2, "transposed": True}, (4, 6), [(2, 2)],
    ),
    "3d": ((2, 1, 3), {"cin": 2, "out": 2}, (2, 3, 4), [(1, 1, 1)]),
    "3d, transposed": (
        (3, 1, 2), {"cin": 2, "out": 2, "stride": (1, 1, 2), "transposed": True}, (3, 2, 4), [(1, 2, 2)],
    ),
}  # fmt: skip
SOME = ["1d, even", "1d, strided and dilated alike", "2d", "2d, transposed, strided, groups", "2d, complex"]


# What is evaluated


class Scaled(nn.Module):
    def forward(self, X):
        return 0.7 * X


def stacked(module):
    parametrize.register_parametrization(module, "weight", Scaled())
    return module


def removed(module):
    parametrize.remove_parametrizations(module, "weight")
    return module


def annealed(conv, x, boundary, method="exponential", blocks=None):
    set_orthogonality(retrofit(conv, x, method=method, boundary=boundary, blocks=blocks), 0.5)
    return conv


def blocks_of(conv):
    """One block of channels in each group."""
    rows, columns = conv.weight.shape[0] // conv.groups, conv.weight.shape[1]
    side = min(rows, columns)
    side -= side > 2
    return {"": [(slice(g * rows, g * rows + side), slice(0, side)) for g in range(conv.groups)]}


def in_blocks(conv, x, boundary, method="exponential"):
    """Orthogonal at once."""
    return retrofit(conv, x, method=method, boundary=boundary, blocks=blocks_of(conv), anneal=False)


KINDS = {  # of a convolution, its domain, images of that and a boundary
    "any": lambda conv, domain, x, boundary: orthogonal(conv, boundary=boundary),
    "given": lambda conv, domain, x, boundary: orthogonal(conv, domain=domain, boundary=boundary),
    "annealed": lambda conv, domain, x, boundary: annealed(conv, x, boundary),
    "blocks": lambda conv, domain, x, boundary: in_blocks(conv, x, boundary),
    "any, stacked": lambda conv, domain, x, boundary: stacked(orthogonal(conv, boundary=boundary)),
    "given, stacked": lambda conv, domain, x, boundary: stacked(
        orthogonal(conv, domain=domain, boundary=boundary)
    ),
    "any, removed": lambda conv, domain, x, boundary: removed(orthogonal(conv, boundary=boundary)),
    "given, removed": lambda conv, domain, x, boundary: removed(
        orthogonal(conv, domain=domain, boundary=boundary)
    ),
    "split": lambda conv, domain, x, boundary: orthogonal(conv, method="split", boundary=boundary),
    "split, removed": lambda conv, domain, x, boundary: removed(
        orthogonal(conv, method="split", boundary=boundary)
    ),
}


for method in ("split", "exponential"):  # on the general way, (1 - t) W + t Q
    KINDS |= {
        f"way, {method}": lambda conv, domain, x, boundary, m=method: annealed(conv, x, boundary, m),
        f"way, {method}, blocks": lambda conv, domain, x, boundary, m=method: annealed(
            conv, x, boundary, m, blocks_of(conv)
        ),
        f"blocks, {method}": lambda conv, domain, x, boundary, m=method: in_blocks(conv, x, boundary, m),
    }


class Evaluated(nn.Module):
    """An orthogonal convolution, or what its removal left, evaluated in one way whatever that costs."""

    def __init__(self, module, action, evaluator=None, plain=None):
        super().__init__()
        self.module, self.action, self.evaluator = module, action, evaluator
        self.plain = [plain]  # what it was: of no concern to those who look for parameters

    @property
    def operator(self):
        found = operator_of(self.module)
        if found is not None:
            return found
        # of torch's own class, which has none
        if parametrize.is_parametrized(self.module):
            return Operator(self.action, Parametrized(self.module.parametrizations["weight"]))
        return Operator(self.action, Fixed(self.module.weight))

    def domain(self, x):
        return self.action.geometry.domain(tuple(x.shape[2:]))

    def prepare(self, domain):
        return self.evaluator.prepare(self.operator, domain)

    def forward(self, x):
        return self.evaluator.apply(self.prepare(self.domain(x)), x)

    def by(self, evaluator):
        return Evaluated(self.module, self.action, evaluator, *self.plain)

    def can(self, domain, batch=2):
        return self.evaluator.cost(self.operator, domain, batch) < inf


@cache
def fixture(kind, boundary, geometry, dtype=None):
    """An operator away from where it started, and the domains that it is tried on; not to be changed."""
    kernel, options, domain, others = GEOMETRIES[geometry]
    conv = make(kernel, **{"cin": 3, "out": 3, **options} | ({} if dtype is None else {"dtype": dtype}))
    with torch.no_grad():  # few taps, where they depend on the norm
        conv.weight.mul_(0.4)
    images = [n // s for n, s in zip(domain, conv.stride, strict=True)] if conv.transposed else domain
    x = torch.zeros(1, conv.in_channels, *images, dtype=conv.weight.dtype)
    action, plain = [], copy.deepcopy(conv)

    def noted(module, *_):
        found = operator_of(module)
        plain = Action(geometry_of(module), boundary_named(boundary), None, tuple(module.dilation))
        action.append(plain if found is None else found.action)

    def move(module):
        with torch.no_grad():
            for i, X in enumerate(module.parameters()):
                X.add_(0.05 * random(*X.shape, dtype=X.dtype, seed=i))

    if "split" in kind:
        try:
            orthogonal(copy.deepcopy(conv), method="split", boundary=boundary)
        except ValueError as refused:  # one channel in a group, or a wall that cuts patches
            pytest.skip(str(refused))
        if kind.endswith(", removed") and boundary == "walls":
            pytest.skip("is no operator any more: see test_split.py")
    if kind.endswith(", removed"):  # after a step, and with the kernel that this leaves
        module = KINDS[kind.removesuffix(", removed")](conv, domain, x, boundary)
        noted(module)
        move(module)
        removed(module)
    else:
        module = KINDS[kind](conv, domain, x, boundary)
        if boundary == "walls" and operator_of(module) is None:
            pytest.skip("patches alone, which no wall cuts: torch's own convolution")
        if boundary == "walls" and not operator_of(module).boundary.has_walls:
            pytest.skip("sees no wall")
        if "split" in kind and operator_of(module) is not None and operator_of(module).weight.has_generator:
            pytest.skip("one channel in a group: the exponential")
        noted(module)
        move(module)
    every = action[0].domain is None
    if "split" in kind and boundary == "circular":  # torch pads no image by more than its size
        others = [
            n
            for n in others
            if all(
                map(
                    operator.ge,
                    n,
                    (k // 2 * r for k, r in zip(conv.kernel_size, conv.dilation, strict=True)),
                )
            )
        ]
    return Evaluated(module, action[0], plain=plain), [domain, *others] if every else [domain]


def images(subject, domain, batch=2, seed=0):
    geometry = subject.action.geometry
    dtype = next(subject.parameters()).dtype
    return random(batch, geometry.taken, *fed(geometry, domain), dtype=dtype, seed=seed)


def leaves(subject):
    """The free parameters by name, the bias aside: an evaluator does not see it."""
    return {name: X for name, X in subject.named_parameters() if not name.endswith("bias")}


# What it is to be


def around(kernel, domain, stride, groups, dilation, on_torus):
    return dense(kernel, domain, stride, groups, dilation)


def between_zeros(kernel, domain, stride, groups, dilation, on_torus):
    """Zero padding; or the part of a torus's matrix that images on the domain meet."""
    if on_torus:
        torus = tuple(kernel.shape[2:])
        coarse = tuple(n // s for n, s in zip(torus, stride, strict=True))
        M = dense(kernel, torus, stride, groups).reshape(-1, *coarse, kernel.shape[1] * groups, *torus)
        rows = tuple(slice(n // s) for n, s in zip(domain, stride, strict=True))
        M = M[(slice(None), *rows, slice(None), *map(slice, domain))]
        return M.reshape(kernel.shape[0] * prod(r.stop for r in rows), -1)
    columns = kernel.shape[1] * groups * prod(domain)
    eye = torch.eye(columns, dtype=kernel.dtype).reshape(columns, -1, *domain)
    sides = []
    for k, r in zip(kernel.shape[:1:-1], dilation[::-1], strict=True):
        before = r * ((k - 1) // 2)
        sides += [before, r * (k - 1) - before]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(domain) - 1]
    y = convolve(F.pad(eye, sides), kernel, stride=stride, dilation=dilation, groups=groups)
    return y.reshape(columns, -1).mT


ORACLES = {"circular": around, "zeros": between_zeros, "walls": between_walls}


def exact(subject, domain, kernel=None):
    """The matrix of an operator by its kernel alone, between walls by its factors."""
    action = subject.action
    geometry = action.geometry
    weight = subject.operator.weight
    if weight.is_blended and (action.boundary.has_walls or not weight.has_kernel):
        return blended(subject, domain)
    if action.boundary.has_walls and subject.operator.weight.has_generator:
        (plain,) = subject.plain
        generator = subject.operator.weight.generator().kernel.detach()
        dtype = COMPLEX if generator.is_complex() else torch.float64
        cls = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[generator.ndim]
        out, cin = generator.shape[0], generator.shape[1] * plain.groups
        options = (plain.kernel_size, plain.stride, plain.padding, plain.dilation, plain.groups)
        acting = cls(cin, out, *options, bias=False, dtype=dtype)
        acting.weight.data = generator.to(dtype)
        coin = subject.operator.weight.generator().coin
        M = exponential_between_walls(acting, domain, None if coin is None else coin.detach().to(dtype))
        return M.mT if geometry.transposed else M
    if action.boundary.has_walls:
        dtype = torch.float64 if kernel is None else kernel.dtype
        M = between_walls(subject.operator, domain, dtype)
        return M.mT if geometry.transposed else M
    kernel = subject.module.weight.detach() if kernel is None else kernel
    oracle = ORACLES[action.boundary.name]
    M = oracle(kernel, domain, geometry.stride, geometry.groups, action.dilation, action.domain is not None)
    return M.mT if geometry.transposed else M


def blended(subject, domain):
    """The sum of an ordinary convolution, as torch's own module computes it, and of a share of blocks."""
    weight, action, (plain,) = subject.operator.weight, subject.action, subject.plain
    blend = weight.blend()
    dtype = COMPLEX if plain.weight.is_complex() else torch.float64
    acting = copy.deepcopy(plain).to(dtype)
    acting.padding_mode = "circular" if action.boundary.is_periodic else "zeros"
    kernel = torch.zeros_like(acting.weight) if blend.kernel is None else blend.kernel
    acting.weight.data = kernel.detach().to(dtype)
    M = pushed_through(acting, domain)
    inner, taken, given = orthogonal_part(subject.operator, blend.partition, blend.orthogonal)
    if weight.has_generator:
        generator = weight.generator()
        w = generator.kernel.detach().to(dtype)
        cls = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[w.ndim]
        groups = generator.geometry.groups
        options = (plain.kernel_size, plain.stride, plain.padding, plain.dilation, groups)
        conv = cls(w.shape[1] * groups, w.shape[0], *options, bias=False, dtype=dtype)
        conv.weight.data = w
        Q = exponential_between_walls(conv, domain, generator.coin.detach().to(dtype))
    else:
        Q = between_walls(inner, domain, dtype)
    Q = Q.mT if action.geometry.transposed else Q
    Q = Q if blend.share is None else blend.share.item() * Q
    if blend.partition is None:
        return M + Q
    fine, size = prod(domain), prod(action.geometry.coarse(domain))
    rows, columns = (fine, size) if action.geometry.transposed else (size, fine)
    M = M.reshape(-1, rows, M.shape[1]).clone()
    Q = Q.reshape(len(given), rows, len(taken), columns)
    for i, j in enumerate(given.tolist()):
        for k, c in enumerate(taken.tolist()):
            M[j, :, c * columns : (c + 1) * columns] += Q[i, :, k]
    return M.flatten(0, 1)


def pushed_through(module, domain):
    """The matrix of one of torch's own modules, its bias aside."""
    with torch.no_grad():
        module.bias.zero_()
    return matrix(module, domain)


def pushed(function, subject, domain):
    """The matrix of a function of images: the identity pushed through it."""
    geometry = subject.action.geometry
    size = fed(geometry, domain)
    columns = geometry.taken * prod(size)
    eye = torch.eye(columns, dtype=next(subject.parameters()).dtype)
    with torch.no_grad():
        y = function(eye.reshape(columns, -1, *size))
    out = geometry.domain(size) if geometry.transposed else geometry.coarse(domain)
    assert y.shape == (columns, subject.module.out_channels, *out)
    assert y.dtype == eye.dtype
    return y.flatten(1).mT


def ways(*kinds):
    """Boundaries, and kinds of operators that there are with them.

    Between zeros split kernels are torch's own zero-padded ones. Between walls there are split kernels, and
    the exponential on images of every size.
    """

    def exists(boundary, kind):
        if boundary == "walls":
            return kind == "any" or kind.startswith(("split", "way", "blocks, "))
        if kind.startswith(("way, exponential", "blocks, exponential")):
            return False  # by polar factors: see "annealed" and "blocks"
        return boundary == "circular" or "split" not in kind

    return [(b, k) for b in BOUNDARIES for k in kinds if exists(b, k)]


def slow_if(condition, *values):
    return pytest.param(*values, marks=pytest.mark.slow if condition else ())


def able(boundary, kind):
    """Evaluators of the operators of a kind with a boundary, whatever their cost: see `CANNOT`."""
    if boundary == "walls":
        on_general_way = kind.startswith(("way", "blocks"))
        names = {"series"} if kind == "any" else {"chained"}
        if on_general_way:
            names = {"chained", "blended", "mended"} if "split" in kind else {"series", "blended"}
    else:
        names = {"direct", "spectral"} | ({"series"} if (boundary, kind) == ("circular", "any") else set())
    return [e for e in evaluate.EVALUATORS if e.name in names]


def skip_unless_able(evaluator, subject, domain):
    if evaluator.name not in ALWAYS_ABLE and not subject.by(evaluator).can(domain):
        pytest.skip("another kind of geometry, as dilation that permutes the phases of a stride")


OFTEN = ("any", "given", "split")
OPERATORS = [*ways(*KINDS)]
EVALUATIONS = [(e, b, k) for b, k in OPERATORS for e in able(b, k)]


def every(names, cases, geometries=None):
    """Each case; with geometries, those of the kinds that are not run often with every third, in turn."""
    if geometries is not None:
        names = (*names, "geometry")
        cases = [
            (*case, geometry)
            for i, case in enumerate(cases)
            for geometry in (geometries if case[-1] in OFTEN else [*geometries][i % 3 :: 3])
        ]
    marked = [slow_if(case[names.index("kind")] not in OFTEN, *case) for case in cases]
    return pytest.mark.parametrize(names, marked, ids=lambda value: getattr(value, "name", value))


every_operator = partial(every, ("boundary", "kind"), OPERATORS)
every_way = partial(every, ("evaluator", "boundary", "kind"), EVALUATIONS)


# The contract


@pytest.mark.sampled(3)
@every_way(GEOMETRIES)
def test_it_computes_what_the_dense_matrix_says(evaluator, boundary, kind, geometry):
    subject, domains = fixture(kind, boundary, geometry)
    for domain in domains:
        if evaluator.name in ALWAYS_ABLE or subject.by(evaluator).can(domain):
            close(pushed(subject.by(evaluator), subject, domain), exact(subject, domain))


@pytest.mark.sampled(3)
@every_operator(GEOMETRIES)
def test_the_module_computes_it_too_and_the_one_that_costs_least_is_chosen(boundary, kind, geometry):
    subject, domains = fixture(kind, boundary, geometry)
    module, acting = subject.module, subject.operator
    for domain in domains:
        costs = {e.name: e.cost(acting, domain, 2) for e in evaluate.EVALUATORS}
        assert all(cost >= 0 for cost in costs.values())
        least = min(costs.values())
        assert least < inf
        assert costs[evaluate.choose(acting, domain, 2).name] == least
        M = pushed(lambda x, n=domain: evaluate.evaluate(acting, x, n), subject, domain)
        close(M, exact(subject, domain))
        if operator_of(module) is None and "split" in kind:
            continue  # torch's own, whose taps may stand elsewhere
        x = images(subject, domain)
        bias = module.bias.reshape(-1, *(1,) * len(domain))
        close(module(x), evaluate.evaluate(acting, x, domain) + bias)


# What these cannot they never pay for, or cannot be exported: what they compute is right there too.
ALWAYS_ABLE = {"direct", "spectral"}
BETWEEN_WALLS = {"chained", "blended", "mended"}
# Situations, and the evaluators whose cost is infinite there: of every other it is finite.
CANNOT = {
    ("any", "2d", (30, 30)): set(),
    ("any", "2d", (5, 4)): {("direct", "circular")},  # its kernel wraps around: truncated, it is not exact
    ("any", "2d, one tap", (1, 1)): set(),
    ("any, stacked", "2d", (30, 30)): {("direct", "circular"), ("direct", "zeros")},  # taps are not known
    ("any, removed", "2d", (5, 4)): set(),
    **{  # as many taps as points, or more
        (kind, "2d", (5, 4)): {("direct", "circular"), ("direct", "zeros")}
        for kind in ("given", "given, removed", "given, stacked", "annealed", "blocks")
    },
    ("given", "2d, one tap", (3, 2)): set(),
    ("given", "2d, one tap, strided", (4, 2)): set(),
}


@pytest.mark.parametrize(("kind", "geometry", "domain"), CANNOT)
@pytest.mark.parametrize("boundary", ["circular", "zeros"])
@pytest.mark.parametrize("evaluator", evaluate.EVALUATORS, ids=lambda e: e.name)
def test_its_cost_is_infinite_exactly_where_it_cannot(evaluator, boundary, kind, geometry, domain):
    subject, _ = fixture(kind, boundary, geometry)
    cannot = (evaluator.name, boundary) in CANNOT[kind, geometry, domain] or evaluator.name in BETWEEN_WALLS
    if evaluator.name == "series":
        cannot = (kind, boundary) != ("any", "circular")
    for batch in (0, 1, 1000):
        assert subject.by(evaluator).can(domain, batch) != cannot


@pytest.mark.parametrize("evaluator", evaluate.EVALUATORS, ids=lambda e: e.name)
@pytest.mark.parametrize("kind", ["split", "any"])
def test_between_walls_one_alone_can(evaluator, kind):
    subject, domains = fixture(kind, "walls", "2d")
    for domain in domains:
        for batch in (0, 1, 1000):
            assert subject.by(evaluator).can(domain, batch) == (evaluator in able("walls", kind))


def test_the_contract_is_that_of_all_there_is():
    assert ORACLES.keys() == BOUNDARIES.keys()
    names = [evaluator.name for evaluator in evaluate.EVALUATORS]
    assert len(set(names)) == len(names)


# Derivatives


TINY = {  # geometry: domain
    "1d, tiny": (3,),
    "1d, tiny, strided, transposed": (4,),
    "1d, tiny, complex": (3,),
}
GEOMETRIES |= {
    "1d, tiny": ((3,), {"cin": 2, "out": 1}, (3,), []),
    "1d, tiny, strided, transposed": (
        (2,),
        {"cin": 2, "out": 1, "stride": 2, "transposed": True},
        (4,),
        [],
    ),
    "1d, tiny, complex": ((3,), {"cin": 1, "out": 1, "dtype": COMPLEX}, (3,), []),
}


def of_everything(subject):
    """A function of images and free parameters, and the latter."""
    parameters = leaves(subject)

    def f(x, *values):
        return torch.func.functional_call(subject, dict(zip(parameters, values, strict=True)), (x,))

    return f, [X.detach().clone().requires_grad_() for X in parameters.values()]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("geometry", TINY)
@pytest.mark.parametrize(
    ("evaluator", "boundary", "kind"),
    [
        slow_if(k not in OFTEN or (b, k) == ("zeros", "given"), e, b, k)
        for b, k in ways("any", "given", "annealed", "blocks", "any, stacked", "any, removed", "split")
        for e in able(b, k)
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_derivatives_of_both_orders_and_modes(evaluator, boundary, kind, geometry):
    """By images, generator and rest."""
    subject, domains = fixture(kind, boundary, geometry)
    skip_unless_able(evaluator, subject, domains[0])
    subject = subject.by(evaluator)
    f, parameters = of_everything(subject)
    x = images(subject, TINY[geometry], batch=1).requires_grad_()
    fast = kind != "given"
    assert gradcheck(f, (x, *parameters), check_forward_ad=True, check_batched_grad=True, fast_mode=fast)
    assert gradgradcheck(f, (x, *parameters), fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.sampled(3)
@every_way(SOME)
def test_prepared_once_and_used_often_its_gradients_are_the_same(evaluator, boundary, kind, geometry):
    subject, (domain, *_) = fixture(kind, boundary, geometry)
    skip_unless_able(evaluator, subject, domain)
    subject = subject.by(evaluator)
    inputs = [*leaves(subject).values()]
    batches = [
        images(subject, domain, batch, seed).requires_grad_() for seed, batch in enumerate((2, 1, 3, 0, 2))
    ]

    def gradients(apply):
        y = torch.cat([apply(x) for x in batches])
        y = torch.view_as_real(y) if y.is_complex() else y
        first = torch.autograd.grad(y.sin().sum(), [*batches, *inputs], create_graph=True)
        squares = sum((g.abs() ** 2).sum() for g in first)
        second = torch.autograd.grad(squares, [*batches, *inputs])
        return [y, *first, *second]

    expected = gradients(subject)
    with parametrize.cached():
        state = subject.prepare(domain)
        found = gradients(lambda x: evaluator.apply(state, x))
    close(found, expected)


@pytest.mark.sampled(3)
@every_operator(GEOMETRIES)
def test_evaluators_agree_and_so_do_their_gradients(boundary, kind, geometry):
    """In single precision, in which decisions are others."""
    if geometry in TINY:
        pytest.skip("has been checked against differences")
    dtype = torch.complex64 if "complex" in geometry else torch.float32
    subject, domains = fixture(kind, boundary, geometry, dtype)
    domain = tuple(3 * n for n in domains[0]) if len(domains) > 1 else domains[0]
    x = images(subject, domain).requires_grad_()
    outcomes = []
    for evaluator in able(boundary, kind):
        if evaluator.name not in ALWAYS_ABLE and not subject.by(evaluator).can(domain):
            continue
        y = subject.by(evaluator)(x)
        real = torch.view_as_real(y) if y.is_complex() else y
        outcomes.append([y, *torch.autograd.grad(real.sin().sum(), [x, *leaves(subject).values()])])
    for others in outcomes[1:]:
        for one, other in zip(outcomes[0], others, strict=True):
            close(other, one, atol=1e-5 * max(1, one.abs().max().item()), rtol=0)


# Images


@pytest.mark.sampled(2)
@every_way(SOME)
def test_images_in_batches_of_any_size_and_mapped(evaluator, boundary, kind, geometry):
    subject, domains = fixture(kind, boundary, geometry)
    skip_unless_able(evaluator, subject, domains[0])
    for domain in domains:
        if evaluator.name not in ALWAYS_ABLE and not subject.by(evaluator).can(domain):
            continue
        x = images(subject, domain, batch=3)
        state = subject.by(evaluator).prepare(domain)
        y = evaluator.apply(state, x)
        empty = evaluator.apply(state, x[:0])
        assert empty.shape == (0, *y.shape[1:])
        close(evaluator.apply(state, x[1:2]), y[1:2])
        mapped = torch.vmap(partial(evaluator.apply, state))
        close(mapped(torch.stack([x, x.flip(0)])), torch.stack([y, y.flip(0)]))
        parallel = x.transpose(0, 1).contiguous().transpose(0, 1)  # strides of its own
        close(evaluator.apply(state, parallel), y)


@pytest.mark.sampled(3)
@every_way([*SOME, "3d"])
def test_the_modules_images_are_those_of_torch(evaluator, boundary, kind, geometry, monkeypatch):
    """Batches, single images, none at all; in the memory format that they had, and the weight's dtype."""
    evaluated(monkeypatch, evaluator.name)
    subject, (domain, *_) = fixture(kind, boundary, geometry)
    skip_unless_able(evaluator, subject, domain)
    module, axes = subject.module, len(domain)
    x = images(subject, domain, batch=3)
    y = module(x)
    assert y.dtype == x.dtype
    assert y.is_contiguous() or operator_of(module) is None  # torch's own class
    close(y - module.bias.reshape(-1, *(1,) * axes), subject.by(evaluator)(x))
    close(module(x[1]), y[1])
    assert module(x[:0]).shape == (0, *y.shape[1:])
    if axes > 1:
        last = (torch.channels_last, torch.channels_last_3d)[axes - 2]
        z = module(x.contiguous(memory_format=last))
        close(z, y, check_stride=False)
        assert z.is_contiguous(memory_format=last) or operator_of(module) is None  # torch's own class


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", ["1d, even", "2d", "2d, transposed, strided, groups"])
@every_way()
def test_half_precision_is_as_exact_as_its_rounding(evaluator, boundary, kind, geometry, dtype):
    subject, domains = fixture(kind, boundary, geometry, torch.float32)
    skip_unless_able(evaluator, subject, domains[0])
    subject = copy.deepcopy(subject).to(dtype).by(evaluator)
    for domain in domains:
        if evaluator.name not in ALWAYS_ABLE and not subject.can(domain):
            continue
        x = images(subject, domain)
        y = subject(x)
        assert y.dtype == dtype
        M = exact(subject, domain, subject.module.weight.detach().double())
        expected = (x.double().flatten(1) @ M.mT).reshape(y.shape)
        close(y.double(), expected, atol=8 * torch.finfo(dtype).eps, rtol=0)


BLOCKS = {
    "alike": [(slice(2 * i, 2 * i + 2), slice(1, 3)) for i in range(4)],
    "apart": [(slice(4, 6), slice(1, 3)), (slice(0, 2), slice(4, 6)), (slice(6, 8), slice(1, 3))],
    "several in a row": [
        (slice(4, 6), slice(1, 3)),
        (slice(4, 6), slice(4, 6)),
        (slice(1, 3), slice(2, 4)),
    ],
    "frames": [(slice(0, 2), slice(0, 4)), (slice(5, 7), slice(0, 4))],
    "whole": None,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("t", [0.4, 1])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    "kernel", [(3, 3), (5, 3), (1, 5), slow_if(True, (5, 5)), slow_if(True, (7, 3)), slow_if(True, (3, 1))]
)
def test_one_convolution_is_what_two_parts_are(kernel, blocks, t):
    """On images of any shape: wide ones, tall ones, and so small that walls are near each other."""
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    conv = nn.Conv2d(6, 8, kernel, padding=padding, dtype=torch.float64)
    pairs = BLOCKS[blocks]
    retrofit(conv, random(1, 6, 6, 5), blocks=None if pairs is None else {"": pairs})
    set_orthogonality(conv, t, final=t == 1 and pairs is not None)
    with torch.no_grad():
        for X in conv.parameters():
            X.add_(0.2 * torch.randn_like(X))
    one, two = (e for name in ("mended", "blended") for e in evaluate.EVALUATORS if e.name == name)
    tried = 0
    for domain in ((6, 5), (4, 9), (6, 6), (2, 3), (1, 7)):
        if one.cost(conv.operator, domain, 2) == inf:
            continue
        x, tried = random(2, 6, *domain).requires_grad_(), tried + 1
        found = []
        for evaluator in (one, two):
            y = evaluator.apply(evaluator.prepare(conv.operator, domain), x, conv.bias)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *conv.parameters()])])
        close(*found)
    assert tried > 1
