"""At home in PyTorch: compile, transforms, mixed precision, distributed, checkpoints, export, devices."""

import copy
import io
import socket
import subprocess
import sys

import pytest
import torch
from models import KINDS, constrained, loss_of, network, steps
from oracles import defect, dense, operator, random
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from orthoconv_param import (
    ConvExponential,
    expm_skew,
    generators,
    orthogonal,
    set_orthogonality,
)

close = torch.testing.assert_close
pytestmark = [
    # inductor's, of complex operators; and torch's own decorators
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def moved(model):
    """A copy with other parameters."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return twin


def gradients(model, x):
    return torch.autograd.grad(loss_of(model(x)), list(model.parameters()))


# Compilation


def count_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dynamic", "backend"),
    [
        ("any", False, "inductor"),
        ("any", True, "aot_eager"),
        ("walls", False, "inductor"),
        ("retrofitted", False, "inductor"),
        ("retrofitted", True, "aot_eager"),
        # inductor takes half a minute for each
        *((kind, False, "aot_eager") for kind in KINDS if kind not in ("any", "walls", "retrofitted")),
    ],
)
def test_compiled_training_is_the_same_and_compiles_once(kind, dynamic, backend):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, x = network(kind)
    model(x)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic or None, backend=backend)
    batches = [x, torch.cat([x, x[:1]]), torch.cat([x, x])] if dynamic else [x, x + 1]
    steps(compiled, batches[:2])
    before = count_graphs()
    steps(compiled, 2 * batches)
    assert count_graphs() == before
    steps(eager, batches[:2])
    steps(eager, 2 * batches)
    close(compiled(x), eager(x), atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(compiled, x), gradients(eager, x), strict=True):
        close(one, other, atol=1e-5, rtol=1e-5)


def test_a_compiled_loop_pays_for_the_exponential_once():
    torch.compiler.reset()
    calls = []

    def count(graph, example):
        calls.append(sum("expm_skew" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, e: make_boxed_func(count(g, e)))
    conv = orthogonal(nn.Conv2d(3, 3, 3, padding=1), domain=6)
    x = torch.randn(2, 3, 6, 6)

    def loop(x):
        with parametrize.cached():
            for _ in range(4):
                x = torch.tanh(conv(x))
        return x

    y = torch.compile(loop, fullgraph=True, backend=backend)(x)
    loss_of(y).backward()
    compiled = [p.grad for p in conv.parameters()]
    assert calls == [1, 1]  # forward, and its derivative
    assert not parametrize._cache_enabled
    assert not parametrize._cache
    close(y, loop(x))
    for one, other in zip(compiled, torch.autograd.grad(loss_of(loop(x)), conv.parameters()), strict=True):
        close(one, other, atol=1e-6, rtol=1e-4)


# torch.func


@pytest.mark.parametrize("kind", KINDS)
def test_func_transforms(kind):
    from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp

    model, x = network(kind, torch.float64)
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def call(parameters):
        return functional_call(model, (parameters, buffers), (x,))

    def loss(parameters):
        return loss_of(call(parameters))

    close(call(parameters), model(x))
    expected = gradients(model, x)
    of_vjp = vjp(loss, parameters)[1](torch.ones((), dtype=x.dtype))[0]
    for found in (grad(loss)(parameters), of_vjp, jacrev(loss)(parameters)):
        for one, other in zip(found.values(), expected, strict=True):
            close(one, other)
    tangents = {k: torch.randn_like(p) for k, p in parameters.items()}
    along = sum((g * t).sum() for g, t in zip(expected, tangents.values(), strict=True))
    close(jvp(loss, (parameters,), (tangents,))[1], along)
    key = next(k for k in parameters if "original" in k)

    def few(generator):
        return call({**parameters, key: generator})[:1, ..., :1, :2]

    close(jacrev(few)(parameters[key]), jacfwd(few)(parameters[key]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_of_generators(kind):
    from torch.func import functional_call, grad, stack_module_state, vmap

    model, x = network(kind, torch.float64)
    members = [moved(model) for _ in range(3)]
    parameters, buffers = stack_module_state(members)

    def loss(parameters, buffers):
        return loss_of(functional_call(model, (parameters, buffers), (x,)))

    losses, found = vmap(loss)(parameters, buffers), vmap(grad(loss))(parameters, buffers)
    for i, member in enumerate(members):
        close(losses[i], loss_of(member(x)))
        for one, other in zip(found.values(), gradients(member, x), strict=True):
            close(one[i], other)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("boundary", ["circular", "walls"])
@pytest.mark.parametrize("kind", ["1d", "2d", "transposed"])
def test_an_ensemble_of_generators_of_norms_far_apart(kind, boundary, called):
    """The first of which, whose module serves all, has the smallest."""
    from torch.func import functional_call, stack_module_state, vmap

    make = {
        "1d": lambda: nn.Conv1d(4, 4, 5, padding=2, bias=False),
        "2d": lambda: nn.Conv2d(3, 3, 3, padding=1, bias=False),
        "transposed": lambda: nn.ConvTranspose2d(4, 4, 4, 2, 1, bias=False),
    }[kind]
    members = [nn.Sequential(orthogonal(make().double(), boundary=boundary)) for _ in range(3)]
    x = random(1, members[0][0].in_channels, *(40,) * (1 if kind == "1d" else 2))
    for i, member in enumerate(members):
        with torch.no_grad():
            member[0].parametrizations.weight.original.mul_(1 + 3 * i)
        if called:
            member(x)
    parameters, buffers = stack_module_state(members)
    found = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(parameters, buffers)
    for y, member in zip(found, members, strict=True):
        assert abs(y.norm() / member(x).norm() - 1) < 1e-11
        close(y, member(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("domain", [None, 4, "any"])
def test_hessian_of_a_tiny_generator(domain):
    parametrization = ConvExponential(domain)
    X = random(1, 1, 3, 2)
    weight = parametrization.spectrum(X)[1].real.sum()  # adopts the generator
    assert weight.isfinite()

    def f(X):
        return (parametrization(X) ** 3).sum()

    exact = torch.autograd.functional.hessian(f, X)
    close(torch.func.hessian(f)(X), exact)
    assert exact.abs().max() > 1e-3


# Mixed precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_touch_what_makes_the_kernel(kind, half):
    model, x = network(kind)
    if kind == "retrofitted":
        set_orthogonality(model, 1)
    plain, kernel = model(x), constrained(model).weight.detach()
    with torch.autocast("cpu", half):
        y = model(x)
        again = nn.Identity()(constrained(model).weight)
        fed = constrained(model)(x.to(half)) if kind != "retrofitted" else None
    assert y.dtype == half  # of the ordinary convolution at the end
    assert again.dtype == torch.float32
    assert torch.equal(again, kernel)  # so its defect is what it was
    if kind not in ("retrofitted", "zeros", "walls, exponential"):  # there the weight is no kernel
        side = 3 if kind == "own grid" else 6
        assert defect(dense(kernel.double(), (side, side))) < 1e-5
    close(y.float(), plain, atol=0.1, rtol=0)
    if fed is not None:
        close(fed.float(), constrained(model)(x.to(half).float()), atol=0.05, rtol=0)
    scaler, optimizer = (
        torch.amp.GradScaler("cpu", init_scale=128.0),
        torch.optim.SGD(model.parameters(), 0.1),
    )
    scaler.scale(loss_of(y)).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("half", "most"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize("kind", ["own grid", "any", "domain", "split", "walls"])
def test_half_precision_modules_are_as_orthogonal_as_rounding_leaves(kind, half, most):
    model, x = network(kind)
    model.to(half)
    y = model(x.to(half))
    assert y.dtype == half
    loss_of(y).backward()
    assert all(p.grad.dtype == half for p in model.parameters())
    kernel = constrained(model).weight.detach()
    assert kernel.dtype == half
    side = 3 if kind == "own grid" else 6
    assert 1e-6 < defect(dense(kernel.double(), (side, side))) < most


# Several processes


WORKER = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from models import KINDS, constrained, network, steps
from orthoconv_param import frozen

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
init = f"tcp://127.0.0.1:{port}"
dist.init_process_group("gloo", init, rank=rank, world_size=2, timeout=timedelta(seconds=120))


def raised(function, kind, message):
    try:
        function()
    except kind as error:
        assert message in str(error), error
        return
    raise AssertionError(f"no {kind.__name__}")


for kind in KINDS:
    model, x = network(kind)
    whole = network(kind)[0]
    joined = torch.cat([x, -x])
    steps(whole, 3 * [joined])
    steps(DistributedDataParallel(model), 3 * [joined[2 * rank : 2 * rank + 2]])
    for one, other in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    for buffer in model.buffers():
        theirs = [torch.empty_like(buffer) for _ in range(2)]
        dist.all_gather(theirs, buffer)
        assert torch.equal(*theirs)

    model = network(kind)[0]
    fully_shard(model)
    steps(model, 3 * [joined[2 * rank : 2 * rank + 2]])
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other, atol=1e-6, rtol=1e-5)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/{kind}")
    conv = constrained(model)
    model.reshard()
    raised(lambda: conv.weight, RuntimeError, "should be whole")
    W = network(kind)[0].state_dict() if kind == "any" else constrained(whole).weight.detach()
    W = next(v for k, v in W.items() if "original" in k) if kind == "any" else W
    buffers = [b.clone() for b in conv.buffers()]
    raised(lambda: setattr(conv, "weight", W), RuntimeError, "assigned before `fully_shard`")
    assert all(torch.equal(*pair) for pair in zip(buffers, conv.buffers(), strict=True))
    model.unshard()
    torch.testing.assert_close(conv.weight, constrained(whole).weight, atol=1e-5, rtol=1e-5)
    model.reshard()
    torch.testing.assert_close(model(x), whole(x), atol=1e-5, rtol=1e-5)
    with frozen(model), frozen(whole):
        for _ in range(2):
            torch.testing.assert_close(model(x).detach(), whole(x).detach(), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            for one, other in zip(model.parameters(), whole.parameters(), strict=True):
                one.mul_(0.7)
                other.mul_(0.7)
        torch.testing.assert_close(model(x).detach(), whole(x).detach(), atol=1e-5, rtol=1e-5)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_data_parallel_and_sharded_training_is_that_of_one_process(tmp_path):
    import torch.distributed.checkpoint as dcp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    here = {"cwd": __file__.rpartition("/")[0], "text": True, "stderr": subprocess.PIPE}
    ranks = [subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], **here) for rank in (0, 1)]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    for kind in KINDS:  # saved by two, loaded by one
        whole, x = network(kind)
        steps(whole, 3 * [torch.cat([x, -x])])
        model = moved(network(kind)[0])
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=tmp_path / kind, no_dist=True)
        model.load_state_dict(state["model"])
        close(model(x), whole(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lightning's own
def test_lightning_trains_it(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, _ = network("any")

        def training_step(self, batch, _):
            return loss_of(self.model(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.3)

    module, x = Module(), network("any")[1]
    loader = torch.utils.data.DataLoader(torch.cat([x, -x]), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, loader)
    alone, _ = network("any")
    steps(alone, 2 * [x, -x])
    close(module.model(x), alone(x), atol=1e-6, rtol=1e-5)
    fresh = Module()
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    fresh.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
    close(fresh.model(x), alone(x), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # accelerate's own
def test_accelerate_trains_it(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, x = network("domain")
    alone = copy.deepcopy(model)
    steps(alone, [x, -x])
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.3))
    for batch in (x, -x):
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared(batch)))
        optimizer.step()
    close(prepared(x), alone(x), atol=1e-6, rtol=1e-5)
    accelerator.save_model(prepared, tmp_path)
    fresh = moved(alone)
    accelerate.load_checkpoint_in_model(fresh, tmp_path)
    close(fresh(x), alone(x), atol=1e-6, rtol=1e-5)


# Checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_every_kind(kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = network(kind)
    steps(model, [x, x])
    states = [model.state_dict()]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    states.append(torch.load(buffer, weights_only=True))
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    states.append(safetensors.load_file(tmp_path / "model.safetensors"))
    for state in states:
        fresh = moved(network(kind)[0])
        assert not torch.allclose(fresh(x), model(x))
        fresh.load_state_dict(state, strict=True)
        assert torch.equal(fresh(x), model(x))
    safetensors.save_model(model, tmp_path / "whole.safetensors")
    safetensors.load_model(fresh := moved(model), tmp_path / "whole.safetensors")
    assert torch.equal(fresh(x), model(x))
    twin = copy.deepcopy(model)
    steps(twin, [x])
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", ["own grid", "any", "domain", "split", "walls"])
def test_the_average_of_generators_is_orthogonal(kind):
    model, x = network(kind)
    averaged = AveragedModel(model, use_buffers=False)
    for _ in range(3):
        steps(model, [x], lr=1.0)
        averaged.update_parameters(model)
    key = next(name for name, _ in model.named_parameters() if "original" in name)
    assert not torch.equal(averaged.module.get_parameter(key), model.get_parameter(key))
    side = 3 if kind == "own grid" else 6
    assert defect(operator(constrained(averaged.module), (side, side))) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_generators_have_a_learning_rate_of_their_own(kind):
    model, x = network(kind)
    slow = generators(model)
    rest = [p for p in model.parameters() if all(p is not g for g in slow)]
    assert len(slow) == 1
    assert len(slow) + len(rest) == len(list(model.parameters()))
    optimizer = torch.optim.SGD([{"params": slow, "lr": 0.0}, {"params": rest}], lr=0.1)
    before = [p.detach().clone() for p in (*slow, *rest)]
    loss_of(model(x)).backward()
    optimizer.step()
    assert torch.equal(slow[0], before[0])
    assert all(not torch.equal(p, q) for p, q in zip(rest, before[1:], strict=True))


# Export


@pytest.fixture(params=[*KINDS, "any, not called yet"])
def removed(request):
    model, x = network(request.param.partition(",")[0])
    if request.param in KINDS:
        steps(model, [x])
    if request.param == "retrofitted":
        set_orthogonality(model, 1, final=True)
    y = copy.deepcopy(model)(x).detach()
    if request.param == "split":  # torch keeps the gradient, which is of another size
        model.zero_grad()
    parametrize.remove_parametrizations(constrained(model), "weight")
    close(model(x), y, atol=1e-5, rtol=1e-5)
    return model.eval(), x, y


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch 2.7's
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants then, as it says
@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?`:FutureWarning")
def test_exported_it_is_made_of_torchs_operators(removed):
    torch.compiler.reset()
    model, x, y = removed
    program = torch.export.export(model, (x,))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in")) for target in targets)
    close(program.module()(x), y, atol=1e-5, rtol=1e-5)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=batch)
    more = torch.cat([x, x, x])
    close(program.module()(more), model(more), atol=1e-5, rtol=1e-5)
    traced = torch.jit.trace(model, (x,))
    close(traced(2 * x), model(2 * x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_another_runtime_gives_the_same(removed, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, y = removed
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=batch)
    exported.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(found), y, atol=1e-4, rtol=1e-4)
    more = torch.cat([x, -x, x])
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    close(torch.from_numpy(found), model(more).detach(), atol=1e-4, rtol=1e-4)


# Devices and dtypes


@pytest.mark.parametrize("kind", KINDS)
def test_deferred_initialisation(kind):
    source, x = network(kind)
    steps(source, [x])
    model = network(kind)[0].to("meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(x.to("meta")).is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(model(x), source(x))


def test_made_on_the_meta_device():
    source = orthogonal(nn.Conv2d(3, 3, 3, padding=1))
    with torch.device("meta"):
        model = orthogonal(nn.Conv2d(3, 3, 3, padding=1))
    model.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 3, 20, 20)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("kind", ["own grid", "any", "domain", "split", "walls"])
def test_double_precision_after_registration(kind):
    model, x = network(kind)
    model.double()
    steps(model, [x.double()])
    side = 3 if kind == "own grid" else 6
    assert defect(operator(constrained(model), (side, side))) < 1e-11


@pytest.mark.parametrize("domain", [None, 6, "any"])
def test_complex_modules(domain):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", dtype=torch.complex64)
    if domain is None:
        parametrize.register_parametrization(conv, "weight", ConvExponential())
    else:
        orthogonal(conv, domain=domain)
    side = 3 if domain is None else 6
    x = random(2, 2, side, side, dtype=torch.complex64)
    conv(x).abs().pow(3).mean().backward()
    conv.to(torch.complex128)
    assert conv(x.to(torch.complex128)).dtype == torch.complex128
    assert defect(operator(conv, (side, side))) < 1e-11


def test_the_operator_is_registered():
    A = random(2, 3, 3, dtype=torch.complex64).requires_grad_()
    torch.library.opcheck(torch.ops.orthoconv_param.expm_skew, (A,))
    assert expm_skew(A.to("meta")).is_meta


IMPORT = """
import sys, threading
import geotorch, torch
torch.set_num_threads(1)
def settings():
    numbers = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    return (*numbers, torch.random.get_rng_state().tolist(), threading.active_count())
before = settings()
audited = []
def hook(event, args):
    writes = event == "open" and args[1] is not None and set(args[1]) & set("wax+")
    if event.startswith("socket.") or writes:
        audited.append((event, args))
sys.dont_write_bytecode = True
sys.addaudithook(hook)
import orthoconv_param
assert settings() == before
assert not audited, audited
assert not {"geoopt", "matplotlib", "triton", "scipy"} & set(sys.modules)  # each takes a while
from orthoconv_param import manifold
assert "geoopt" in sys.modules
"""


def test_importing_it_does_nothing_else(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir())
