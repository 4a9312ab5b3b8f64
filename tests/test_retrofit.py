import copy
import subprocess
import sys
import weakref

import geotorch
import pytest
import torch
from models import ConvGRU, ConvLSTM, Residual, Separable, convolutional, graphs_and_backend, reached_twice
from oracles import defect, dense, operator, random
from torch import nn
from torch.nn.utils import parametrize

import orthoconv_param
from orthoconv_param import functional, generators, optimizers, orthogonal, report, set_orthogonality
from orthoconv_param.functional import gate_blocks
from orthoconv_param.parametrizations.annealed import Annealed
from orthoconv_param.torus.geometry import CONVOLUTIONS

close = torch.testing.assert_close
DOUBLE = torch.float64
TOLERANCE = {torch.float32: 1e-5, DOUBLE: 1e-11}

LSTM_BLOCKS = {"gates": gate_blocks(4, 4, 2)}
GRU_BLOCKS = {"gates": gate_blocks(4, 2, 2), "candidate": gate_blocks(4, 1, 2)}
MODELS = {  # constructor, example, options of retrofit
    "ConvLSTM": (ConvLSTM, (2, 3, 2, 6, 5), {"select": "gates", "blocks": LSTM_BLOCKS}),
    "ConvLSTM, whole": (ConvLSTM, (2, 3, 2, 6, 5), {}),
    "ConvGRU": (ConvGRU, (2, 3, 2, 5, 6), {"select": ["gates", "candidate"], "blocks": GRU_BLOCKS}),
    "residual": (Residual, (2, 3, 8, 8), {}),
    "separable": (Separable, (2, 3, 8, 6), {}),
    "1d": (lambda mode: convolutional(nn.Conv1d, mode), (2, 2, 16), {}),
    "3d": (lambda mode: convolutional(nn.Conv3d, mode), (2, 2, 5, 5, 6), {}),
    "reached twice": (reached_twice, (2, 4, 6, 6), {}),
}


def retrofit(model, x, **options):
    """By polar factors, on images of one size, with the boundaries that the convolutions have."""
    convolutions = [m for m in model.modules() if isinstance(m, CONVOLUTIONS)]
    modes = {conv.padding_mode for conv in convolutions if max(conv.kernel_size) > 1}
    if modes <= {"circular", "zeros"}:
        options.setdefault("boundary", max(modes, default="zeros"))
    return orthoconv_param.retrofit(model, x, method="exponential", **options)


def make(name, dtype=DOUBLE, mode="zeros"):
    torch.manual_seed(0)
    constructor, size, options = MODELS[name]
    return constructor(mode).to(dtype), random(*size, dtype=dtype), options


def train(model, x, steps=5, lr=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    target = random(*model(x).shape, dtype=x.dtype, seed=7)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def selected(model):
    """The convolutions that are parametrized, the size that they see, and the blocks of them."""
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS) and parametrize.is_parametrized(module):
            stack = module.parametrizations.weight[0]
            size = module.operator.action.domain or (6,) * len(
                module.kernel_size
            )  # a single tap takes every size
            yield module, size, stack.partition.blocks if hasattr(stack, "partition") else [None]


def operators(model):
    """The dense matrices of the model's own convolutions, or blocks of them."""
    for module, size, blocks in selected(model):
        M = operator(module, size)
        for block in blocks:
            if block is None:
                yield module, M.double()
                continue
            rows, columns = block
            out = M.shape[0] // module.out_channels
            cin = M.shape[1] // module.in_channels
            pixels = (
                slice(rows.start * out, rows.stop * out),
                slice(columns.start * cin, columns.stop * cin),
            )
            yield module, M[pixels].double()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("ConvLSTM", "residual", "reached twice") else pytest.param(n, marks=pytest.mark.slow)
        for n in MODELS
    ],
)
def test_outputs_stay_and_at_1_operators_are_orthogonal(name, mode, dtype):
    model, x, options = make(name, dtype, mode)
    before = model(x)
    assert retrofit(model, x, **options) is model
    relative = 1e-4 if dtype == torch.float32 else 1e-10
    assert (model(x) - before).norm() < relative * before.norm()
    assert len(list(selected(model))) == (len(options["blocks"]) if "blocks" in options else count(model))

    train(model, x)
    set_orthogonality(model, 1)
    for trained in (False, True):
        if trained:
            train(model, x)
        for module, M in operators(model):
            if module.operator.boundary.name == "circular":
                assert defect(M) < TOLERANCE[dtype]
            else:
                assert torch.linalg.svdvals(M).max() < 1 + TOLERANCE[dtype]
        for module, _, blocks in selected(model):
            if module.operator.boundary.name == "zeros" and len(module.operator.action.domain) < 3:
                # the torus on which zeros continue the image is where it is orthogonal
                W = module.weight.detach().double()
                for block in blocks:
                    part, groups = (W, module.groups) if block is None else (W[block], 1)
                    assert defect(dense(part, tuple(W.shape[2:]), module.stride, groups)) < TOLERANCE[dtype]
    after = model(x)
    set_orthogonality(model, 1, final=True)
    close(model(x), after)
    assert not any(isinstance(m, Annealed) and m.values is not None for m in model.modules())


WAYS = {
    "split": {},
    "exponential": {"method": "exponential"},
    "split, circular": {"boundary": "circular"},
}
SIZES = {1: [(16,), (2,)], 2: [(6, 4), (2, 8), (2, 2)], 3: [(3, 4, 5), (1, 1, 2)]}


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["residual", "separable", "1d", "3d", "reached twice", "transposed"])
def test_whole_convolutions_become_orthogonal_at_every_size(name, way):
    if name == "transposed":
        torch.manual_seed(0)
        up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        model = nn.Sequential(
            nn.Conv2d(4, 4, (1, 4), padding="same"), up, nn.ConvTranspose2d(3, 5, 3, padding=1)
        )
        model, x = model.double(), random(2, 4, 3, 4)
    else:
        model, x, _ = make(name, mode="circular" if "circular" in way else "zeros")
    before = None if name == "transposed" and "circular" in way else model(x)
    orthoconv_param.retrofit(model, x, **WAYS[way])
    if before is not None:
        close(model(x), before)
    model.eval()
    train(model, x)
    set_orthogonality(model, 1)
    train(model, x)
    for module in model.modules():
        if not isinstance(module, CONVOLUTIONS):
            continue
        for size in SIZES[len(module.kernel_size)]:
            axes = zip(size, module.kernel_size, module.dilation, strict=True)
            if "circular" in way and any(r * (k // 2) > n for n, k, r in axes):
                continue  # torch pads none further
            assert defect(operator(module, size)) < 1e-11
    after = model(x)
    set_orthogonality(model, 1, final=True)
    close(model(x), after)
    for module in [*model.modules()]:
        if isinstance(module, CONVOLUTIONS) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    close(model(x), after)
    assert not model._forward_hooks


def count(model):
    return sum(isinstance(module, CONVOLUTIONS) for module in model.modules())


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("name", ["ConvLSTM", "residual", "separable"])
def test_without_annealing_it_starts_at_the_nearest(name, mode):
    model, x, options = make(name, mode=mode)
    twin = copy.deepcopy(model)
    retrofit(model, x, **options, anneal=False)
    retrofit(twin, x, **options)
    set_orthogonality(twin, 1)
    close(model(x), twin(x))
    for module, M in operators(model):
        assert torch.linalg.svdvals(M).max() < 1 + 1e-11
        assert module.operator.boundary.name == "zeros" or defect(M) < 1e-11
    with pytest.raises(ValueError, match=r"being annealed.*Found none"):
        set_orthogonality(model, 0.5)


@pytest.mark.parametrize(("cin", "out", "stride"), [(4, 4, 1), (3, 5, 1), (5, 3, 1), (3, 5, 2), (2, 8, 2)])
def test_between_its_ends_it_is_what_the_formula_says(cin, out, stride):
    """``U exp(A) S^(1-t) V^H``, of the dense matrices."""
    conv = nn.Conv2d(cin, out, 3, stride, padding=1, padding_mode="circular", dtype=DOUBLE)
    x = random(1, cin, 4, 6)
    W = operator(conv, (4, 6))
    retrofit(conv, x)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    with torch.no_grad():
        generators(conv)[0].copy_(0.1 * random(*conv.parametrizations.weight.original.shape))
    set_orthogonality(conv, 1)
    Q = operator(conv, (4, 6))  # U exp(A) V^H, which another test has seen to be orthogonal
    for t in (0, 0.3, 0.9):
        set_orthogonality(conv, t)
        if W.shape[0] >= W.shape[1]:
            expected = Q @ Vh.mT @ torch.diag(S ** (1 - t)) @ Vh
        else:
            expected = U @ torch.diag(S ** (1 - t)) @ U.mT @ Q
        close(operator(conv, (4, 6)), expected)


@pytest.mark.slow
def test_the_generator_is_trained_at_every_t():
    conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", dtype=DOUBLE)
    retrofit(conv, random(1, 3, 4, 5))
    X, x = generators(conv)[0], random(1, 3, 4, 5)
    for t in (0, 0.5, 1):
        set_orthogonality(conv, t)
        for start in (0, 1):
            value = (start * random(*X.shape)).requires_grad_()
            weight = conv.parametrizations.weight[0]
            assert torch.autograd.gradcheck(weight, value)
            with torch.no_grad():
                X.copy_(value)
            conv.zero_grad()
            conv(x).square().sum().backward() if t < 1 else conv(x)[..., 0].square().sum().backward()
            assert X.grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ConvLSTM", "residual", "separable", "1d"])
def test_the_defect_falls_as_t_rises(name):
    model, x, options = make(name, mode="circular")
    retrofit(model, x, **options)
    with torch.no_grad():
        for X in generators(model):
            X.copy_(0.1 * random(*X.shape))
    steps = []
    for t in torch.linspace(0, 1, 9).tolist():
        set_orthogonality(model, t)
        steps.append(torch.tensor([defect(M) for _, M in operators(model)]))
    defects = torch.stack(steps)
    assert (defects.diff(dim=0) < 1e-12).all()
    assert (defects[:-1] > 1e-2).all()
    assert (defects[-1] < 1e-11).all()


def test_rank_deficient_and_zero_weights():
    """Singular values of zero are clamped, so that there is a way to 1."""
    for dtype in TOLERANCE:
        model = nn.Sequential(
            *(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular") for _ in range(2))
        ).to(dtype)
        with torch.no_grad():
            model[0].weight[2:] = 0
            model[1].weight.zero_()
        x = random(1, 4, 5, 6, dtype=dtype)
        before = model(x), model[0](x)
        retrofit(model, x)
        close(model(x), before[0])
        close(model[0](x), before[1], atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
        set_orthogonality(model, 0.999)
        assert all(torch.isfinite(operator(conv, (5, 6))).all() for conv in model)
        set_orthogonality(model, 1)
        assert all(defect(operator(conv, (5, 6)).double()) < TOLERANCE[dtype] for conv in model)


@pytest.mark.parametrize("size", [(2, 1), (1, 1), (3, 6)])
def test_between_zeros_images_may_be_smaller_than_the_kernel(size):
    conv = nn.Conv2d(2, 3, 5, padding=2, dtype=DOUBLE)
    x = random(2, 2, *size)
    before = conv(x)
    retrofit(conv, x)
    close(conv(x), before)
    set_orthogonality(conv, 1)
    assert torch.linalg.svdvals(operator(conv, size)).max() < 1 + 1e-11


# Blocks


def test_only_the_blocks_of_a_circular_copy_are_orthogonal_and_the_rest_trains():
    model, x, options = make("ConvLSTM", torch.float32)
    model.gates.padding_mode, boundary = "zeros", "circular"
    model = retrofit(copy.deepcopy(model), x, **options, boundary=boundary)
    set_orthogonality(model, 1)
    before = model.gates.weight.detach().clone()
    assert all(defect(M) < 2e-5 for _, M in operators(model))
    train(model, x)
    assert len(list(operators(model))) == 4
    assert all(defect(M) < 2e-5 for _, M in operators(model))
    moved = (model.gates.weight.detach() - before).abs()
    assert moved[:, :2].amax((1, 2, 3)).min() > 1e-3  # input to each gate
    assert all(moved[block].max() > 1e-3 for block in LSTM_BLOCKS["gates"])


def test_blocks_are_their_generators_and_the_rest_its_taps():
    model, x, options = make("ConvGRU")
    weight = model.gates.weight.detach().clone()
    numbers = sum(p.numel() for p in model.parameters())
    retrofit(model, x, **options)
    assert sum(p.numel() for p in model.parameters()) == numbers
    stack = model.gates.parametrizations.weight
    assert stack.original0.shape == (8, 4, 3, 3)
    close(stack.original1.squeeze(1), weight[:, :2].flatten(0, 1))
    assert [id(X) for X in generators(model)] == [
        id(model.gates.parametrizations.weight.original0),
        id(model.candidate.parametrizations.weight.original0),
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("geometry", "blocks"),
    [
        ({}, [(slice(0, 2), slice(1, 3)), (slice(2, 4), slice(0, 2))]),
        ({}, [(slice(None), slice(None))]),  # nothing is left
        ({}, [(slice(1, 3), slice(0, 2)), (slice(1, 3), slice(2, 4)), (slice(3, 5), slice(3, 5))]),
        ({"groups": 2, "cin": 8, "out": 4}, [(slice(0, 2), slice(0, 2)), (slice(2, 4), slice(2, 4))]),
        (
            {"stride": 2},
            [(slice(1, 3), slice(1, 3)), (slice(3, 5), slice(1, 3)), (slice(1, 3), slice(3, 5))],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128])
def test_blocks_of_any_geometry(geometry, blocks, dtype, transposed):
    options = {"stride": 1, "groups": 1, "cin": 5, "out": 5} | geometry
    if blocks[0][0] == slice(None):
        options |= {"cin": 4, "out": 4}
    cin, out = options.pop("cin"), options.pop("out")
    if transposed:
        rest = options["stride"] - 1
        conv = nn.ConvTranspose2d(out, cin, 3, padding=1, output_padding=rest, dtype=dtype, **options)
    else:
        conv = nn.Conv2d(cin, out, 3, padding=1, dtype=dtype, **options)
    size = (3, 2) if transposed and options["stride"] == 2 else (6, 4)
    x = random(1, conv.in_channels, *size, dtype=dtype)
    before, W = conv(x), conv.weight.detach().clone()
    retrofit(conv, x, blocks={"": blocks})
    close(conv(x), before)
    set_orthogonality(conv, 1)
    weight = conv.weight.detach()
    for rows, columns in blocks:
        # of a block alone, on its torus
        kernel = weight[rows, columns]
        stride = (options["stride"],) * 2
        assert defect(dense(kernel, tuple(weight.shape[2:]), stride)) < 1e-11
    free = torch.ones(W.shape[:2], dtype=torch.bool)
    for block in blocks:
        free[block] = False
    close(weight[free].flatten(1).norm(dim=1), W[free].flatten(1).norm(dim=1))

    # the weight may be read and assigned; what it cannot hold is refused
    conv.weight = weight
    close(conv.weight, weight)
    conv.weight = W
    if free.any():
        bad = random(*weight.shape, dtype=dtype)
        with pytest.raises(ValueError, match="outside of its blocks"):
            conv.weight = bad
    parametrize.remove_parametrizations(conv, "weight")
    assert isinstance(conv.weight, nn.Parameter)


def test_removal_keeps_what_it_computes_frozen_or_not():
    for frozen in (False, True):
        model, x, options = make("ConvLSTM")
        model.gates.weight.requires_grad_(not frozen)
        retrofit(model, x, **options)
        set_orthogonality(model, 0.5)
        after = model(x)
        keys = set(ConvLSTM("zeros").state_dict())
        parametrize.remove_parametrizations(model.gates, "weight")
        close(model(x), after)
        assert set(model.state_dict()) == keys
        assert model.gates.weight.requires_grad is not frozen
        assert dict(model.named_parameters()).keys() == keys


def test_base_is_updated_under_blocks_and_annealing():
    model, x, options = make("ConvLSTM", mode="circular")
    retrofit(model, x, **options)
    for t, after in ((0.5, 0), (1, 1)):  # what is assigned is where it starts from, until it is orthogonal
        set_orthogonality(model, t)
        train(model, x, steps=2)
        before = model(x)
        geotorch.utils.update_base(model.gates, "weight")
        close(model(x), before)
        assert not generators(model)[0].any()
        assert model.gates.parametrizations.weight[0].exponential.progress == after


# Checkpoints


@pytest.mark.parametrize("final", [False, True])
def test_a_checkpoint_says_whether_annealing_has_ended(final):
    model, x, options = make("residual")
    retrofit(model, x, **options)
    fresh = copy.deepcopy(model)
    train(model, x)
    set_orthogonality(model, 1, final=final)
    other = copy.deepcopy(model)  # ended, into one that has not, and the other way round
    for target in (fresh, other):
        set_orthogonality(target, 1, final=not final) if target is fresh else None
        target.load_state_dict(model.state_dict(), strict=True)
        close(target(x), model(x))
        assert target.state_dict().keys() == model.state_dict().keys()
    assert ("stem.parametrizations.weight.0.t" in model.state_dict()) is not final


@pytest.mark.parametrize("key", ["t", "values", "directions"])
def test_a_checkpoint_that_lacks_a_part_is_refused(key):
    model, x, options = make("1d")
    retrofit(model, x, **options)
    state = model.state_dict()
    del state[f"0.parametrizations.weight.0.{key}"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    model(x)


def test_into_a_model_that_has_not_been_annealed():
    """What has arrived at 1 and ended is what `anneal=False` is."""
    model, x, options = make("1d")
    plain = retrofit(copy.deepcopy(model), x, **options, anneal=False)
    retrofit(model, x, **options)
    train(model, x)
    set_orthogonality(model, 1, final=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    close(plain(x), model(x))


@pytest.mark.parametrize(
    "name", ["ConvLSTM", "residual", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ConvGRU", "3d"))]
)
@pytest.mark.parametrize("t", [0, 0.5, 1])
def test_a_plain_checkpoint_means_start_from_these_weights(name, t):
    model, x, options = make(name)
    torch.manual_seed(1)
    other = MODELS[name][0]("zeros").to(DOUBLE)
    checkpoint = other.state_dict()
    values = {key: value.clone() for key, value in checkpoint.items()}
    retrofit(model, x, **options)
    set_orthogonality(model, t)
    train(model, x, steps=1)
    model.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(checkpoint[key], values[key]) for key in values)
    assert {m.progress for m in model.modules() if isinstance(m, Annealed)} == {0}
    close(model(x), other(x))
    set_orthogonality(model, 1)
    cliff = retrofit(other, x, **options, anneal=False)
    close(model(x), cliff(x))


@pytest.mark.parametrize("final", [False, True])
def test_a_plain_checkpoint_into_what_is_not_annealed_gives_the_nearest(final):
    model, x, options = make("ConvLSTM")
    checkpoint = model.state_dict()
    cliff = retrofit(copy.deepcopy(model), x, **options, anneal=False)
    target = retrofit(ConvLSTM("zeros").to(DOUBLE), x, **options, anneal=final)
    if final:
        set_orthogonality(target, 1, final=True)
    target.load_state_dict(checkpoint, strict=True)
    close(target(x), cliff(x))


@pytest.mark.parametrize("domain", ["any", (6, 5)])
def test_a_plain_checkpoint_into_an_orthogonal_module(domain):
    convs = [nn.Conv2d(3, 3, 3, padding=1, dtype=DOUBLE) for _ in range(2)]
    with torch.no_grad():
        convs[1].weight.mul_(4)  # with "any" K has to follow
    source = copy.deepcopy(convs[1])
    expected = orthogonal(convs[1], domain=domain)
    module = nn.Sequential(orthogonal(convs[0], domain=domain))
    missing = module.load_state_dict({f"0.{k}": v for k, v in source.state_dict().items()}, strict=True)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert module[0].weight.shape == expected.weight.shape
    x = random(2, 3, 6, 5)
    close(module(x), expected(x))


def test_k_follows_a_checkpoint_before_the_next_call():
    large, small = (orthogonal(nn.Conv2d(3, 3, 3, padding=1)) for _ in range(2))
    with torch.no_grad():
        generators(large)[0].mul_(8)
    large(torch.zeros(1, 3, 9, 9))  # K follows
    small.load_state_dict(large.state_dict())
    assert small.parametrizations.weight[0].taps == large.parametrizations.weight[0].taps


def test_a_bad_plain_checkpoint_changes_nothing_of_the_convolution():
    model, x, options = make("ConvLSTM")
    plain = model.state_dict()
    retrofit(model, x, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for bad in (plain["gates.weight"][:, :, :2], plain["gates.weight"] * torch.nan):
        with pytest.raises(
            RuntimeError, match=r"starting from gates\.weight: .*the weight should be"
        ) as caught:
            model.load_state_dict(plain | {"gates.weight": bad})
        assert "key(s)" not in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "weight" in k)


def test_precision_may_rise_halfway():
    model, x, options = make("residual", torch.float32, "circular")
    retrofit(model, x, **options)
    set_orthogonality(model, 0.5)
    before = model(x)
    model.bfloat16().float().double()  # only its parameters are rounded
    for t in (0.5, 1):
        set_orthogonality(model, t)
        if t == 0.5:
            assert (model(x.double()) - before).norm() < 0.05 * before.norm()
    assert all(defect(M) < 1e-11 for _, M in operators(model))


def test_copies_are_independent():
    model, x, options = make("ConvGRU")
    retrofit(model, x, **options)
    twin = copy.deepcopy(model)
    before = model(x)
    set_orthogonality(twin, 1)
    train(twin, x, steps=1)
    close(model(x), before)
    parametrize.remove_parametrizations(twin.gates, "weight")
    close(model(x), before)


@pytest.mark.parametrize("name", ["ConvLSTM", "residual"])
def test_transforms(name):
    model, x, options = make(name)
    model.eval()
    retrofit(model, x, **options)
    set_orthogonality(model, 0.4)
    twins = [copy.deepcopy(model) for _ in range(3)]
    for i, twin in enumerate(twins):
        with torch.no_grad():
            for X in generators(twin):
                X.copy_(0.1 * random(*X.shape, seed=i))
    parameters, buffers = torch.func.stack_module_state(twins)
    call = torch.func.functional_call
    ensemble = torch.func.vmap(lambda p, b: call(model, (p, b), (x,)))(parameters, buffers)
    close(ensemble, torch.stack([twin(x) for twin in twins]))

    one = dict(twins[0].named_parameters())

    def loss(parameters):
        return call(model, parameters, (x,)).square().mean()

    gradient, direction = torch.func.grad(loss)(one), {k: random(*p.shape, seed=5) for k, p in one.items()}
    slope = torch.func.jvp(loss, (one,), (direction,))[1]
    close(slope, sum((gradient[k] * direction[k]).sum() for k in one))


def test_compiled_without_recompiling_as_t_moves():
    torch.compiler.reset()
    model, x, options = make("ConvLSTM", torch.float32)
    retrofit(model, x, **options)
    graphs, backend = graphs_and_backend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for t in (0, 0.3, 1):
        set_orthogonality(model, t)
        close(compiled(x), model(x))
    compiled(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert len(graphs) == 1


# Optimizers


def test_an_optimizer_from_before_trains_on_what_is_orthogonal_as_a_whole():
    model, x, options = make("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    retrofit(model, x, **options)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    optimizer.step()
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


def test_frozen_weights_need_no_optimizer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1e-3)
    retrofit(conv, torch.ones(1, 4, 6, 6), blocks={"": gate_blocks(2, 2)})
    conv(torch.ones(1, 4, 6, 6)).sum().backward()
    optimizer.step()


def test_gradients_of_the_weights_are_not_the_generators():
    model, x, options = make("residual")
    model(x).square().mean().backward()
    retrofit(model, x, **options)
    assert all(X.grad is None for X in generators(model))
    assert model.norm.weight.grad is not None


def test_an_averaged_model_averages_generators():
    model, x, options = make("ConvLSTM", mode="circular")
    retrofit(model, x, **options)
    average = torch.optim.swa_utils.AveragedModel(model)
    for t in (0.5, 1):
        set_orthogonality(model, t)
        train(model, x, steps=1)
        average.update_parameters(model)
    for m in (model, average):
        set_orthogonality(m, 1, final=True)
    average.update_parameters(model)
    assert all(defect(M) < 1e-11 for _, M in operators(average))


def test_an_optimizer_from_before_that_does_not_know_the_blocks_raises():
    model, x, options = make("ConvLSTM")
    weight = weakref.ref(model.gates.weight)
    optimizer = torch.optim.Adam(model.parameters())
    retrofit(model, x, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(x).square().mean().backward()
    with pytest.raises(
        RuntimeError, match=r"made before retrofit, which replaced gates\.weight by 2 param.*add_param"
    ):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.optim.Adam(model.parameters()).step()  # a new one, and others', may
    optimizer.add_param_group({"params": [*model.gates.parametrizations.weight.parameters()]})
    optimizer.step()
    assert all((v != before[k]).any() for k, v in model.named_parameters())
    del optimizer
    assert weight() is None
    ours = {id(p) for p in model.parameters()}
    replaced = [change for change in optimizers._changed if isinstance(change, optimizers.Replaced)]
    assert not any(id(parameter()) in ours for change in replaced for parameter in change.parameters)


@pytest.mark.parametrize("way", ["orthogonal", "retrofit"])
def test_an_optimizer_from_before_that_keeps_averages_of_another_shape_raises(way):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(1, 4, 6, 6)
    old, fresh = (torch.optim.Adam(model.parameters()) for _ in range(2))
    model(x).square().sum().backward()
    old.step()
    old.zero_grad()
    if way == "orthogonal":
        orthogonal(model[0], method="split")
    else:
        orthoconv_param.retrofit(model, x, anneal=False)
    model(x).square().sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"another shape to the weight of .*Conv2d\(4, 4.*Make a new one"
    ):
        old.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fresh.step()  # which keeps nothing yet
    assert all((v != before[k]).any() for k, v in model.named_parameters())
    weight = model[0].parametrizations.weight.original
    assert all(change.weight() is not weight for change in optimizers._changed)


# What it is called with


def test_a_loop_may_run_past_the_end():
    model, x, options = make("1d")
    with pytest.raises(ValueError, match="Found none"):
        set_orthogonality(model, 1)
    retrofit(model, x, **options)
    for step in range(1, 6):
        set_orthogonality(model, min(1, step / 3), final=step >= 3)
    after = model(x)
    with pytest.raises(ValueError, match="Found none"):
        set_orthogonality(model, 0.5)
    close(model(x), after)


def test_nothing_cached_survives():
    model, x, options = make("ConvLSTM")
    retrofit(model, x, **options)
    with torch.no_grad(), parametrize.cached():
        before = model(x)
        set_orthogonality(model, 1)
        measured = report(model, x).rows
        after = model(x)
    assert measured[1].largest < 1 + 1e-11
    assert measured == report(model, x).rows
    assert (after - before).norm() > 1e-3 * before.norm()
    close(model(x), after)


def test_in_inference_mode_it_stays_trainable():
    model, x, options = make("ConvLSTM")
    with torch.inference_mode():
        before = model(x)
        retrofit(model, x, **options)
        close(model(x), before)
    set_orthogonality(model, 0.5)
    assert all(p.requires_grad for p in model.parameters())
    train(model, x, steps=1)


def test_a_single_tap_takes_every_size():
    """Its operator is the same at all of them; with a stride, that of its phases."""
    for stride in (1, 2):
        conv = nn.Conv2d(3, 3 * stride, 1, stride, dtype=DOUBLE)
        other, x = random(1, 3, 8, 2), random(1, 3, 4, 6)
        before = conv(x), conv(other)
        retrofit(conv, x)
        close((conv(x), conv(other)), before)
        set_orthogonality(conv, 1)
        assert all(defect(operator(conv, size)) < 1e-11 for size in ((4, 6), (8, 2)))
        after = conv(other)
        parametrize.remove_parametrizations(conv, "weight")
        close(conv(other), after)


class Head(nn.Module):
    """Convolutions of one kind on images of several sizes, and weights that others take."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.use = (
            nn.Conv2d(2, 2, 1 if use == "pyramid" else 3, padding=0 if use == "pyramid" else 1),
            use,
        )

    def forward(self, x):
        y, weight = self.conv(x), self.conv.weight
        return {
            "pyramid": lambda: self.conv(x[..., ::2, ::2]),
            "tied": lambda: nn.functional.conv_transpose2d(y, weight, padding=1),
            "forward": lambda: self.conv._conv_forward(y, weight, None),
            "statistics": lambda: y / weight.std(),
            "in a list": lambda: y + torch.cat([weight.flatten()]).sum(),
            "dtype": lambda: y.to(weight.dtype),
        }[self.use]()


@pytest.mark.parametrize("use", ["pyramid", "tied", "forward", "statistics", "in a list", "dtype"])
def test_a_weight_is_for_its_own_call(use):
    model, x = Head(use).double(), random(1, 2, 6, 6)
    before = model(x)
    if use in ("pyramid", "dtype"):
        retrofit(model, x)
    else:
        with pytest.raises(
            ValueError, match=r"conv: its weight should only be used by its own call\. Found"
        ):
            retrofit(model, x)
    close(model(x), before)
    assert not model.conv._forward_hooks
    assert not model.conv._forward_pre_hooks


def test_examples_select_and_names():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
            self.right = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, a, b):
            return self.left(a) + self.right(input=b)

    a, b = random(1, 2, 4, 4, dtype=torch.float32), random(1, 2, 4, 4, dtype=torch.float32)
    for example in ((a, b), [a, b], {"a": a, "b": b}):
        model = retrofit(TwoInputs(), example)
        assert len(list(selected(model))) == 2
    for select, names in (
        ("left.0", ["left.0"]),
        ("*.0", ["left.0"]),
        (["ri*", "left.?"], ["left.0", "right"]),
        (lambda name, module: "left" not in name and module.in_channels == 2, ["right"]),
    ):
        model = retrofit(TwoInputs(), (a, b), select=select)
        assert [
            n
            for n, m in model.named_modules()
            if isinstance(m, CONVOLUTIONS) and parametrize.is_parametrized(m)
        ] == names


def test_the_example_leaves_nothing_behind():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model[1].eval()
    model.register_buffer("seen", torch.zeros(()))
    model.register_forward_hook(lambda module, args, output: setattr(module, "seen", module.seen + 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen, random_state = model.seen, torch.get_rng_state()
    report(model, torch.ones(2, 2, 4, 4))
    assert [m.training for m in model] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.seen is seen
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model)


class Reshaping(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, **({"padding": 1} | options))
        self.b = nn.Conv2d(2, 2, 3, padding=1)
        self.other = nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.a(x)) if self.training else self.b(self.a(x)) + self.b(x[..., :3])[..., :1]


def plain(x_options=None, **options):
    return nn.Sequential(nn.Conv2d(2, 2, 3, **({"padding": 1} | options)), nn.Conv2d(2, 2, 1))


def shared():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    model[1].weight = model[0].weight
    return model


def poisoned():
    model = plain()
    with torch.no_grad():
        model[1].weight[0] = torch.inf
    return model


def patched():
    model = plain()
    original = model[0].forward
    model[0].forward = lambda x: 2 * original(x)
    return model


def hooked():
    model = plain()
    nn.utils.spectral_norm(model[0])
    return model


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.used(x)


BLOCK = (slice(0, 1), slice(0, 1))


@pytest.mark.parametrize(
    ("make_model", "options", "error", "message"),
    [
        (Reshaping, {}, ValueError, r"b: its images should be of one size.*Found \(6, 4\), \(6, 3\)"),
        (Unused, {}, ValueError, "unused: the example should call this module"),
        (shared, {}, ValueError, r"0: its weight should not be shared\. Found it as 1\.weight too"),
        (poisoned, {}, ValueError, r"1: the weight should be finite"),
        (
            lambda: plain(padding=0),
            {},
            ValueError,
            r"0: padding should keep the size: use padding=\(1, 1\)",
        ),
        (lambda: plain(padding_mode="reflect"), {}, ValueError, "0: padding_mode='reflect' counts"),
        (lambda: plain(padding_mode="replicate"), {}, ValueError, "0: padding_mode='replicate' counts"),
        (lambda: plain(stride=(4, 1)), {}, ValueError, "0: .*divisible by the stride"),
        (lambda: orthogonal_part(), {}, ValueError, "0: module should not be parametrized yet"),
        (
            plain,
            {"select": "conv*"},
            ValueError,
            r"select should name convolutions: \['0', '1'\]. Found 'conv\*'",
        ),
        (plain, {"select": lambda name, module: False}, ValueError, "at least one of the convolutions"),
        (plain, {"select": [0]}, TypeError, "select should be names or a function"),
        (plain, {"select": True}, TypeError, "select should be names or a function"),
        (plain, {"select": nn.Conv2d}, TypeError, "select should be names or a function"),
        (lambda: patched(), {}, ValueError, "0: module should compute what nn.Conv2d does"),
        (
            lambda: hooked(),
            {},
            ValueError,
            "0: its weight should not be computed by spectral_norm: replace=True",
        ),
        (
            Reshaping,
            {"select": "other"},
            TypeError,
            "select should name convolutions. Found 'other', a Linear",
        ),
        (nn.ReLU, {}, ValueError, "at least one of the convolutions"),
        (plain, {"boundary": "reflect"}, ValueError, "boundary should be None"),
        (plain, {"anneal": 0.5}, TypeError, "anneal should be True or False"),
        (plain, {"blocks": {"2": [BLOCK]}}, ValueError, "blocks should name convolutions"),
        (
            plain,
            {"blocks": {"0": [BLOCK], "*": [BLOCK]}},
            ValueError,
            "blocks should name each convolution once",
        ),
        (
            plain,
            {"select": "0", "blocks": {"1": [BLOCK]}},
            ValueError,
            r"select should name the convolutions of blocks too.*leaves out \['1'\]",
        ),
        (plain, {"blocks": [BLOCK]}, TypeError, "blocks should be a dict"),
        (plain, {"blocks": {"0": []}}, ValueError, "0: blocks should be at least one"),
        (plain, {"blocks": {"0": [(0, 1)]}}, TypeError, "0: blocks should be pairs of slices"),
        (
            plain,
            {"blocks": {"0": [(slice(0, 2), slice(0, 1)), (slice(0, 1), slice(1, 2))]}},
            ValueError,
            "0: blocks should all be of one size",
        ),
        (
            plain,
            {"blocks": {"0": [(slice(0, 4), slice(0, 2))]}},
            ValueError,
            "0: blocks should be within",
        ),
        (plain, {"blocks": {"0": [(slice(1, 1), slice(1, 1))]}}, ValueError, "0: blocks should be within"),
        (plain, {"blocks": {"0": [(slice(0, 2, 2), slice(0, 1))]}}, ValueError, "of step 1"),
        (plain, {"blocks": {"0": [BLOCK, BLOCK]}}, ValueError, "0: blocks should not overlap"),
        (
            plain,
            {"blocks": {"0": [BLOCK, (slice(0, 2), slice(0, 2))]}},
            ValueError,
            "0: blocks should all be of one size",
        ),
        (
            lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
            {"blocks": {"": [(slice(1, 3), slice(0, 2))]}},
            ValueError,
            "the model itself: blocks should each be within one of the 2 groups",
        ),
    ],
)
def test_bad_input_is_named_and_changes_nothing(make_model, options, error, message):
    torch.manual_seed(0)
    model = make_model()
    channels = next((m.in_channels for m in model.modules() if isinstance(m, CONVOLUTIONS)), 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters, text = dict(model.named_parameters()), repr(model)
    with pytest.raises(error, match=f"(?s){message}"):
        retrofit(model, torch.ones(1, channels, 6, 4), **options)
    assert repr(model) == text
    assert all(parameters[k] is p for k, p in model.named_parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, equal_nan=True, rtol=0, atol=0)


def orthogonal_part():
    model = plain()
    orthogonal(model[0])
    return model


def test_boundary_is_changed_if_it_is_said():
    model, x = plain(padding_mode="reflect").double(), random(1, 2, 6, 4)
    retrofit(model, x, boundary="circular")
    set_orthogonality(model, 1)
    assert all(defect(M) < 1e-11 for _, M in operators(model))


def test_whatever_goes_wrong_the_model_is_as_before(monkeypatch):
    model, x, options = make("residual")
    before, parameters, text = model(x), dict(model.named_parameters()), repr(model)
    with pytest.raises(RuntimeError, match="size"):  # the model's own error
        retrofit(model, x[:, :1], **options)
    original, calls = torch.linalg.svd, []

    def fails(*arguments, **keywords):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(KeyboardInterrupt):
        retrofit(model, x, **options)
    monkeypatch.undo()
    assert repr(model) == text
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    close(model(x), before, rtol=0, atol=0)
    retrofit(model, x, **options)
    close(model(x), before)


@pytest.mark.parametrize(
    ("t", "final", "error", "message"),
    [
        (torch.tensor(1.5), False, ValueError, "t should be from 0 to 1. Found 1.5"),
        (1.5, False, ValueError, "t should be from 0 to 1. Found 1.5"),
        (-0.1, False, ValueError, "t should be from 0 to 1"),
        (float("nan"), False, ValueError, "t should be from 0 to 1"),
        ("1", False, TypeError, "t should be a number"),
        (True, False, TypeError, "t should be a number"),
        (0.5, True, ValueError, "t should be 1 with final=True"),
    ],
)
def test_orthogonality_is_a_number(t, final, error, message):
    model, x, options = make("1d")
    retrofit(model, x, **options)
    with pytest.raises(error, match=message):
        set_orthogonality(model, t, final=final)
    assert {m.progress for m in model.modules() if isinstance(m, Annealed)} == {0}
    with pytest.raises(ValueError, match="Found none"):
        set_orthogonality(nn.Conv2d(1, 1, 1), 0.5)


@pytest.mark.parametrize("bad", [(0, 4, 2), (4, 0, 2), (4, 4, -1)])
def test_gate_blocks_takes_numbers_of_channels(bad):
    assert gate_blocks(3, 2) == [(slice(0, 3), slice(0, 3)), (slice(3, 6), slice(0, 3))]
    with pytest.raises(ValueError, match="should be"):
        gate_blocks(*bad)
    with pytest.raises(TypeError, match="hidden should be an integer"):
        gate_blocks(4.0)
    assert functional.gate_blocks is gate_blocks


@pytest.mark.slow
def test_memory_of_several_layers():
    """Of the process, at its peak: below three times the layers' spectra."""
    program = """
import torch
from torch import nn
from functools import partial
from orthoconv_param import retrofit
retrofit = partial(retrofit, method='exponential', boundary='zeros')
def peak():  # of this process: what `resource` tells begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)))
x = torch.randn(1, 64, 32, 32)
retrofit(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), x[:, :4])
with torch.no_grad():
    model(x)
before = peak()
retrofit(model, x)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    spectra = 8 * (36 * 19) * 64 * 64 * 8
    assert spectra < int(run.stdout) < 3 * spectra


@pytest.mark.parametrize("blocks", [None, {"0": [(slice(0, 2), slice(0, 2))]}])
def test_its_repr_says_what_is_orthogonal_yet(blocks):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    retrofit(model, torch.randn(1, 4, 6, 6), blocks=blocks)
    what = "orthogonal" if blocks is None else "blocks orthogonal"
    set_orthogonality(model, 0.4)
    assert f", at t=0.4 on its way to {what} on domain=(6, 6)" in repr(model)
    set_orthogonality(model, 1)
    assert f", {what} on domain=(6, 6)" in repr(model)
    set_orthogonality(model, 1, final=True)
    assert f", {what} on domain=(6, 6)" in repr(model)
