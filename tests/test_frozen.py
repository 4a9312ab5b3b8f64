"""Kernels that are computed once while a model is frozen; what changes them in between is noticed."""

import copy
import threading

import pytest
import torch
from models import ConvLSTM
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from orthoconv_param import (
    ConvExponential,
    SplitExponential,
    expm_skew,
    frozen,
    keeping,
    orthogonal,
    retrofit,
    set_orthogonality,
)

close = torch.testing.assert_close


def convolution(**options):
    torch.manual_seed(0)
    return nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", **options)


def plainly(parametrization):
    conv = convolution()
    register_parametrization(conv, "weight", parametrization, unsafe=True)
    return conv


def retrofitted(t=0.5, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return set_orthogonality(retrofit(model, torch.randn(1, 4, 9, 9), **options), t) or model


KINDS = {
    "any": lambda: orthogonal(convolution()),
    "domain": lambda: orthogonal(convolution(), domain=9),
    "zeros": lambda: orthogonal(convolution(), boundary="zeros"),
    "walls": lambda: orthogonal(convolution(), boundary="walls"),
    "walls, base": lambda: orthogonal(convolution(), boundary="walls", base=True),
    "split": lambda: orthogonal(convolution(), method="split"),
    "split, walls": lambda: orthogonal(convolution(), method="split", boundary="walls"),
    "plain": lambda: plainly(ConvExponential()),
    "plain, split": lambda: plainly(SplitExponential()),
    "retrofitted": retrofitted,
    "retrofitted, circular": lambda: retrofitted(method="exponential", boundary="circular"),
    "callable": lambda: orthogonal(convolution(), triv=Counting()),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Counting:
    """A map that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, A):
        self.calls += 1
        return expm_skew(A)


def images(dtype=torch.float32):
    return torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype)


def free_parameters(model):
    return [p for name, p in model.named_parameters() if "parametrizations" in name]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_kind
def test_outputs_are_those_outside_of_the_block(kind, mode):
    model, x = KINDS[kind](), images()
    y = model(x).detach()
    with mode():
        with frozen(model) as same:
            assert same is model
            for _ in range(3):
                close(model(x), y, atol=1e-5, rtol=0)
            close(model(x[:1]), y[:1], atol=1e-5, rtol=0)
        close(model(x), y, atol=1e-5, rtol=0)
    assert not keeping._frozen.stacks
    assert all("forward" not in vars(m) for m in model.modules())


def test_each_kernel_is_computed_once():
    triv = Counting()
    model, x = orthogonal(convolution(), triv=triv), images()
    for _ in range(2):
        model(x)
    with torch.no_grad():
        before = triv.calls
        with frozen(model):
            for size in (20, 24, 20, 24):
                model(torch.randn(2, 4, size, size))
            inside = triv.calls - before
        for size in (20, 24, 20, 24):
            model(torch.randn(2, 4, size, size))
    assert inside == 1  # the kernel, for both sizes
    assert triv.calls - before - inside >= 4


def away_from(p):
    return 0.1 * torch.arange(p.numel()).sin().reshape(p.shape)


def optimizer_step(model):
    loss = sum((p * away_from(p)).sum() for p in model.parameters())
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    torch.optim.SGD(model.parameters(), 10).step()


def in_place(model):
    with torch.no_grad():
        for p in free_parameters(model):
            p.add_(away_from(p))


def through_data(model):
    for p in free_parameters(model):
        p.data.add_(away_from(p))


def by_new_data(model):
    for p in free_parameters(model):
        p.data = p.data + away_from(p)


def loading(model):
    twin = copy.deepcopy(model)
    in_place(twin)
    model.load_state_dict(twin.state_dict())


def through_numpy(model):
    for p in free_parameters(model):
        p.detach().numpy()[:] += away_from(p).numpy()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "change", [optimizer_step, in_place, through_data, by_new_data, loading, through_numpy]
)
@every_kind
def test_a_change_of_the_parameters_is_noticed(kind, change):
    model, x = KINDS[kind](), images()
    with frozen(model):
        before = model(x).detach()
        change(model)
        after = model(x).detach()
    assert not torch.allclose(after, before, atol=1e-3)
    close(model(x), after, atol=1e-5, rtol=0)


def test_assignment_orthogonality_and_moves_are_noticed():
    model, x = KINDS["split"](), images()
    with frozen(model):
        before = model(x).detach()
        model.weight = nn.init.dirac_(torch.empty(4, 4, 3, 3))
        close(model(x), x + model.bias[:, None, None], atol=1e-5, rtol=0)
        assert not torch.allclose(model(x), before, atol=1e-3)
    model = retrofitted(0.0)
    with frozen(model):
        before = model(x).detach()
        set_orthogonality(model, 1)
        after = model(x).detach()
        assert not torch.allclose(after, before, atol=1e-3)
        model.double()
        assert model(x.double()).dtype == torch.float64
        close(model(x.double()).float(), after, atol=1e-4, rtol=0)


@every_kind
def test_weights_are_constants_and_all_else_has_its_gradient(kind):
    model, x = KINDS[kind](), images().requires_grad_()
    biases = [p for p in model.parameters() if all(p is not q for q in free_parameters(model))]
    G = torch.randn(3, 4, 9, 9)
    expected = torch.autograd.grad(model(x), [x, *biases], G)
    with frozen(model):
        for _ in range(2):
            model.zero_grad()
            x.grad = None
            model(x).backward(G)
            close([x.grad, *(b.grad for b in biases)], [*expected], atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in free_parameters(model))
    model(x).backward(G)
    assert all(p.grad is not None for p in free_parameters(model))


def test_a_recurrent_model_and_its_training_in_between():
    torch.manual_seed(0)
    model, video = ConvLSTM("zeros", 2, 4), torch.randn(2, 5, 2, 8, 8)
    retrofit(model, video, blocks="recurrent")
    set_orthogonality(model, 1)
    y = model(video).detach()
    with frozen(model), torch.inference_mode():
        close(model(video), y, atol=1e-5, rtol=0)
        close(model(video), y, atol=1e-5, rtol=0)
    # what was computed under inference_mode does not get into a graph
    with frozen(model):
        with torch.inference_mode():
            model(video)
        video.requires_grad_()
        model(video).sum().backward()
        assert video.grad is not None


def test_blocks_nest_end_with_an_error_and_are_of_one_model():
    model, other, x = KINDS["any"](), KINDS["any"](), images()
    with pytest.raises(ZeroDivisionError), frozen(model):
        _ = 1 / 0
    assert not keeping._frozen.stacks
    with frozen(nn.Sequential(model, nn.ReLU())):
        with frozen(model):
            model(x)
        assert len(keeping._frozen.stacks) == 1
        twin = copy.deepcopy(model)
        assert model.parametrizations.weight not in twin.modules()
        y = twin(x)
        with torch.no_grad():
            twin.parametrizations.weight.original.mul_(0.1)
        assert not torch.allclose(twin(x), y, atol=1e-3)
        assert twin(x).requires_grad
        other(x).sum().backward()
        assert other.parametrizations.weight.original.grad is not None
    assert not keeping._frozen.stacks


def test_a_copy_that_torch_evaluates_is_not_frozen():
    model = KINDS["plain"]()
    with frozen(model):
        twin = copy.deepcopy(model)
        assert twin.weight.requires_grad
    in_place(model)
    assert not torch.allclose(model.weight, twin.weight, atol=1e-3)


def test_another_thread_trains_as_outside():
    model, x, gradients = KINDS["plain"](), images(), []

    def train():
        model(x).sum().backward()
        gradients.append(model.parametrizations.weight.original.grad)
        with frozen(model):
            gradients.append(model(x).detach())

    with frozen(model):
        y = model(x).detach()
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert gradients[0] is not None
        close(gradients[1], y)
        assert "forward" in vars(model.parametrizations.weight)
    assert "forward" not in vars(model.parametrizations.weight)
    assert not keeping._frozen_anywhere


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reentrant", [False, True])
@every_kind
def test_what_is_checkpointed_has_the_gradients_of_outside(kind, reentrant):
    model, x = KINDS[kind](), images().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    with frozen(model):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    loss.backward()
    close(x.grad, expected, atol=1e-4, rtol=1e-4)


class Half(nn.Module):
    """Depends on its mode."""

    def forward(self, W):
        return 0.5 * W if self.training else W


@pytest.mark.parametrize("kind", ["any", "split", "plain", "plain, split"])
def test_a_parametrization_that_is_added_and_its_mode_are_noticed(kind):
    model, x = KINDS[kind](), images()
    bias = model.bias[:, None, None]
    with frozen(model):
        y = model(x)
        register_parametrization(model, "weight", Half(), unsafe=True)
        close(model(x) - bias, 0.5 * (y - bias), atol=1e-5, rtol=1e-4)
        model.eval()
        close(model(x), y, atol=1e-5, rtol=1e-4)


def test_writing_to_a_weight_that_was_read_changes_nothing():
    for kind in ("split", "plain", "any"):
        model, x = KINDS[kind](), images()
        y = model(x).detach()
        with frozen(model):
            model(x)
            model.weight.mul_(0)
            close(model(x), y, atol=1e-5, rtol=0)


def test_transforms_compute_as_outside():
    model, x = KINDS["any"](), images()
    parameters = dict(model.named_parameters())

    def energy(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = torch.func.grad(energy)(parameters)
    with frozen(model):
        close(torch.func.grad(energy)(parameters), expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_compute_as_outside():
    torch.compiler.reset()
    model, x = KINDS["any"](), images()
    compiled, y = torch.compile(model, backend="aot_eager"), model(x).detach()
    with frozen(model), torch.no_grad():
        close(compiled(x), y, atol=1e-5, rtol=0)
        in_place(model)
        after = compiled(x)
    close(model(x), after, atol=1e-5, rtol=0)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (nn.Conv2d(3, 3, 3), ValueError, "Found none in Conv2d"),
        ("a model", TypeError, "should be a module"),
    ],
)
def test_what_cannot_be_frozen(model, kind, message):
    with pytest.raises(kind, match=message), frozen(model):
        pass
