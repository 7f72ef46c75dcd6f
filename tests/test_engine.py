"""Every engine against the plain loop: same noise, same parameters, results equal to rounding."""

import copy
import math

import pytest
import torch

from lpc_runner.base.distributions import Bernoulli, DiscretisedGaussian, Gaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.tensors import exact_arithmetic
from lpc_runner.data.dataset import Batch
from lpc_runner.evaluation.bounds import gradients_through_rnns
from lpc_runner.inference.chain import ChainNoise, run_chain
from lpc_runner.inference.engine import Blocked, Captures, Compiled, CompiledCudaGraph, CudaGraph, Eager, make_engine
from lpc_runner.inference.objectives import ImportanceWeighted, WeightedKL
from lpc_runner.inference.preconditioning import Adam, Fisher, Identity, SharedAdam
from lpc_runner.inference.samplers import HMC, MALA, NOISE_BLOCK, Langevin, Map, NoSteps, Underdamped
from lpc_runner.inference.step_sizes import Constant, Polynomial
from lpc_runner.models.conv import Conv
from lpc_runner.models.dense import MLP, Linear
from lpc_runner.training.learner import AdamOptimizer as Optimizer
from lpc_runner.training.learner import Learner


def fisher():
    """With a past: curvatures that it has seen."""
    metric = Fisher(0.9, 1.0)
    metric.observe({"second_moment": torch.tensor([[0.1, 1.0, 10.0, 100.0]], dtype=torch.float64)})
    return metric


METRICS = {
    "none": Identity(),
    "adam": Adam(0.9, 1e-3, None),
    "adam_frozen": Adam(0.9, 1e-3, 20),
    "adam_shared": SharedAdam(0.9, 1e-3, None),
    "adam_shared_frozen": SharedAdam(0.9, 1e-3, 20),
    "fisher": fisher(),
}
SIZES = {"constant": Constant(0.01), "polynomial": Polynomial(0.02, 10.0, 0.6)}
# 40 steps are a whole block and a rest; float64, in which both orders of summation agree to 1e-9.
NUM_STEPS = NOISE_BLOCK + 8
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def models(device="cpu", dtype=torch.float64):
    """One of each family, with its data."""
    torch.manual_seed(0)
    built = {
        "mlp": MLP((1, 3, 3), 4, 1.3, DiscretisedGaussian("learned", 0.3, 0.9), 0.3, [6]),
        "linear": Linear((1, 3, 3), 4, 1.0, Gaussian("learned", 0.7, 0.9), 0.3),
        "bernoulli": MLP((1, 3, 3), 4, 1.3, Bernoulli(), 0.3, [6], "tanh"),
        "conv": Conv((1, 28, 28), 4, 1.0, DiscretisedGaussian("learned", 0.5, 0.9), 0.3),
    }
    batches = {}
    for name in built:
        side = 28 if name == "conv" else 3
        levels = torch.randint(256, (2, 3, 1, side, side))
        batches[name] = (levels / 127.5 - 1).to(device, dtype)
    return {name: model.to(device, dtype) for name, model in built.items()}, batches


def samplers(metric, sizes):
    yield Langevin(NUM_STEPS, "all", sizes, metric)
    yield Langevin(NUM_STEPS, "last", sizes, metric)
    yield Langevin(NUM_STEPS, "all", sizes, metric, theta_every=3)
    yield Map(NUM_STEPS, "last", sizes, metric)


def other_samplers(metric, sizes):
    """Those that keep more than z, or draw more than ξ(t)."""
    yield Langevin(NUM_STEPS, "all", sizes, metric, noise="averaged")
    yield Underdamped(NUM_STEPS, "last", sizes, metric, theta_every=3, friction=0.5)
    yield MALA(NUM_STEPS, "last", sizes, metric)
    yield HMC(NUM_STEPS, "all", sizes, metric, theta_every=3, num_leapfrog=2)


def compare(engine, model, batches, sampler, tolerance, device="cpu"):
    """Two updates, so that whatever an engine keeps meets a second batch, start and noise."""
    theta = list(model.parameters())
    for update, x in enumerate(batches):
        z, centre = torch.randn(2, 3, 4, device=device, dtype=x.dtype)
        noise = lambda update=update, x=x: ChainNoise(5, update, (3, 4), device, x.dtype)
        kept = {"parameters": theta, "centre": centre}
        want = run_chain(lambda z, x=x: model.log_joint(x, z), z, sampler, noise(), **kept)
        got = engine.run(model.log_joint, (x,), z, sampler, noise(), **kept)
        torch.testing.assert_close(got.z, want.z, **tolerance)
        torch.testing.assert_close(got.theta_gradient, want.theta_gradient, **tolerance)
        torch.testing.assert_close(got.first, want.first, **tolerance)
        torch.testing.assert_close(got.trace, want.trace, **tolerance)
        torch.testing.assert_close(got.moments.first, want.moments.first, **tolerance)
        torch.testing.assert_close(got.moments.second, want.moments.second, **tolerance)
        if (square := want.drift_square) is not None:
            torch.testing.assert_close(got.drift_square, square, **tolerance)
        assert (got.drift_square is None) == (square is None) == (not isinstance(sampler.preconditioner, Fisher))
        torch.testing.assert_close(
            (got.acceptance, got.energy_error), (want.acceptance, want.energy_error), **tolerance
        )
        assert (got.moments.count, got.num_evaluations) == (want.moments.count, want.num_evaluations)
        assert want.z.isfinite().all() and sum(float(g.abs().sum()) for g in want.theta_gradient) > 0
        with torch.no_grad():  # an optimiser's step, in place
            for parameter in theta:
                parameter.mul_(0.9)


@pytest.mark.parametrize("metric, sizes", [
    pytest.param(metric, sizes, marks=[] if fast else pytest.mark.slow)
    for metric in METRICS for sizes in SIZES
    for fast in [sizes == "constant" or metric in ("none", "adam_shared")]
])  # fmt: skip
def test_blocks_on_fixed_tensors_equal_the_loop(metric, sizes):
    """The function that a CUDA graph captures, run as it is: every sampler and preconditioner."""
    built, batches = models()
    for sampler in samplers(METRICS[metric], SIZES[sizes]):
        compare(Blocked(), built["mlp"], batches["mlp"], sampler, EXACT)


@pytest.mark.parametrize("metric", ["none", "adam_shared_frozen"])
def test_blocks_equal_the_loop_for_samplers_with_a_memory(metric):
    built, batches = models()
    for sampler in other_samplers(METRICS[metric], Constant(0.3 if metric == "none" else 0.1)):
        compare(Blocked(), built["mlp"], batches["mlp"], sampler, EXACT)


@pytest.mark.parametrize("model", ["mlp", "linear", "bernoulli", "conv"])
def test_blocks_equal_the_loop_for_every_model(model):
    built, batches = models()
    compare(Blocked(), built[model], batches[model], Langevin(5, "all", SIZES["constant"], METRICS["adam"]), EXACT)


def test_one_engine_keeps_chains_apart():
    """Another model, sampler, batch size or set of parameters is another program; going back finds the first."""
    built, batches = models()
    engine, adam = Blocked(), METRICS["adam"]
    short, long = (Langevin(steps, "all", SIZES["constant"], adam) for steps in (3, 4))
    for model, sampler in (("mlp", short), ("linear", short), ("mlp", long), ("mlp", short)):
        compare(engine, built[model], batches[model], sampler, EXACT)
    x = batches["mlp"][0][:2]
    noise = lambda: ChainNoise(0, 0, (2, 4), "cpu", torch.float64)
    z = torch.randn(2, 4, dtype=torch.float64)
    for theta in ([], list(built["mlp"].parameters())[:2]):
        got = engine.run(built["mlp"].log_joint, (x,), z, short, noise(), parameters=theta)
        want = Eager().run(built["mlp"].log_joint, (x,), z, short, noise(), parameters=theta)
        torch.testing.assert_close([got.z, *got.theta_gradient], [want.z, *want.theta_gradient], **EXACT)


def test_results_do_not_change_when_the_next_chain_runs():
    """What a chain left behind is not the engine's working memory."""
    built, batches = models()
    engine, sampler = Blocked(), Langevin(3, "all", SIZES["constant"], METRICS["adam"])
    x, theta = batches["mlp"][0], list(built["mlp"].parameters())

    def chain(update):
        noise = ChainNoise(0, update, (3, 4), "cpu", torch.float64)
        start = torch.full((3, 4), float(update), dtype=torch.float64)
        return engine.run(built["mlp"].log_joint, (x,), start, sampler, noise, parameters=theta)

    def content(chain):
        moments = [chain.moments.first, chain.moments.second]
        return [tensor.clone() for tensor in (chain.z, *chain.theta_gradient, *moments, *chain.first)]

    one = chain(0)
    before = content(one)
    chain(1)
    assert all(map(torch.equal, before, content(one)))


def test_an_observed_chain_runs_step_by_step_and_agrees():
    built, batches = models()
    sampler, seen = Langevin(6, "all", SIZES["constant"], METRICS["adam"]), []
    noise = lambda: ChainNoise(0, 0, (3, 4), "cpu", torch.float64)
    arguments = (built["mlp"].log_joint, (batches["mlp"][0],), torch.ones(3, 4, dtype=torch.float64), sampler)
    engine = Blocked()
    observed = engine.run(*arguments, noise(), on_step=lambda state, info: seen.append(state.t))
    assert seen == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(observed.z, engine.run(*arguments, noise()).z, **EXACT)


@pytest.mark.parametrize("every", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("engine", [Eager, Blocked])
def test_thinned_gradient_is_the_mean_over_the_chosen_states(engine, every):
    """θ's gradient from z(0), z(k), z(2k) .., against autograd at those states; the chain itself is not touched."""
    built, batches = models()
    model, x = built["mlp"], batches["mlp"][0]
    theta, states = list(model.parameters()), []
    noise = lambda: ChainNoise(0, 0, (3, 4), "cpu", torch.float64)
    start = torch.randn(3, 4, dtype=torch.float64)
    plain = Langevin(10, "all", SIZES["constant"], METRICS["adam"])
    observe = lambda state, info: states.append(state.z)
    full = Eager().run(model.log_joint, (x,), start, plain, noise(), parameters=theta, on_step=observe)
    chosen = [start, *states][:10][::every]
    mean = torch.stack([model.log_joint(x, z).mean() for z in chosen]).mean()
    thinned = Langevin(10, "all", SIZES["constant"], METRICS["adam"], theta_every=every)
    got = engine().run(model.log_joint, (x,), start, thinned, noise(), parameters=theta)
    torch.testing.assert_close(got.theta_gradient, list(torch.autograd.grad(mean, theta)), **EXACT)
    torch.testing.assert_close(got.z, full.z, **EXACT)
    assert all(parameter.requires_grad for parameter in theta)


def test_steps_without_a_gradient_of_theta_do_not_compute_one():
    """With theta_every = 4 of 8 steps, two backward passes reach the weights."""
    counted = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            counted.append(1)
            return gradient

    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    log_joint = lambda x, z: -(z + Counting.apply(bias)).square().sum(1)
    sampler = Langevin(8, "all", SIZES["constant"], Identity(), theta_every=4)
    noise = ChainNoise(0, 0, (3, 4), "cpu", torch.float64)
    start = torch.ones(3, 4, dtype=torch.float64)
    Eager().run(log_joint, (start,), start, sampler, noise, parameters=[bias])
    assert len(counted) == 2


def learner(engine, device="cpu", dtype=torch.float64, num_steps=NUM_STEPS, num_samples=None, metric=None):
    torch.manual_seed(0)
    model = MLP((1, 3, 3), 4, 1.3, DiscretisedGaussian("optimal", 0.3, 0.9), 0.3, [6])
    encoder = model.build_encoder()
    settings = (SIZES["polynomial"], metric or METRICS["adam_frozen"])
    chain = Langevin(num_steps, "all", *settings) if num_steps else NoSteps(*settings)
    return Learner(
        model.to(device, dtype),
        encoder.to(device, dtype),
        chain,
        ImportanceWeighted(num_samples) if num_samples else WeightedKL(0.5, 0.5) if num_steps else WeightedKL(0.0, 1.0),
        Optimizer(1e-2, [0.9, 0.999], 1e-8),
        engine=engine,
    )


def train(one, num_updates, device="cpu", dtype=torch.float64, first=0):
    for update in range(first, first + num_updates):
        x = torch.randint(256, (3, 1, 3, 3), generator=torch.Generator().manual_seed(update)) / 127.5 - 1
        batch = Batch(x.to(device, dtype), torch.arange(3, device=device))
        gradients = one.gradients(batch, 0, update, update < 2)
        assert gradients.finite
        one.apply(batch, gradients)
    return gradients


@pytest.mark.parametrize("num_samples", [None, 5])
def test_a_whole_update_on_fixed_tensors_is_the_update(num_samples):
    """Without a chain: the same bits as step by step, from one checkpoint to the next too."""
    kept = {"num_steps": 0, "num_samples": num_samples}
    straight, blocked, resumed = (learner(engine, **kept) for engine in (Eager(), Blocked(), Blocked()))
    train(straight, 6), train(blocked, 3), train(resumed, 2)
    resumed.load_state_dict(copy.deepcopy(blocked.state_dict()))
    scalars = [train(each, 3, first=3).scalars for each in (blocked, resumed)]
    torch.testing.assert_close(*scalars, rtol=0, atol=0)
    for each in (blocked, resumed):
        torch.testing.assert_close(each.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_an_objective_of_one_s_own_is_captured_only_if_it_says_so():
    """A class made from ours may change with Python's own state, as an annealed KL does."""

    class Annealed(WeightedKL):
        pass

    class Declared(Annealed):
        capturable = True

    built = learner(Blocked(), num_steps=0)
    for objective, whole in ((WeightedKL(0.0, 1.0), True), (Annealed(0.0, 1.0), False), (Declared(0.0, 1.0), True)):
        parts = built.model, built.encoder, built.sampler, objective, Optimizer(1e-2, [0.9, 0.999], 1e-8)
        assert (Learner(*parts, engine=Blocked())._whole is not None) == whole


@pytest.mark.parametrize("num_steps, metric", [(NUM_STEPS, None), (NUM_STEPS, Fisher), (0, None)])
def test_training_is_the_same_with_every_engine(num_steps, metric):
    """Six updates, two of them from the prior, with a scale and a Fisher metric that change between updates."""
    one, other = (
        learner(engine, num_steps=num_steps, metric=metric and metric(0.5, 1.3)) for engine in (Eager(), Blocked())
    )
    logged = [train(each, 6).scalars for each in (one, other)]
    torch.testing.assert_close(one.state_dict()["model"], other.state_dict()["model"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(one.state_dict()["encoder"], other.state_dict()["encoder"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(*logged, rtol=1e-6, atol=1e-6)


def test_bf16_rounds_the_model_and_nothing_else():
    """Drift within bfloat16's 2^-8 of the exact one, chain and sums float32, parameters' gradients float32."""
    built, batches = models(dtype=torch.float32)
    model, x = built["conv"], batches["conv"][0]
    z, theta = torch.randn(3, 4), list(model.parameters())
    noise = lambda: ChainNoise(0, 0, (3, 4), "cpu")
    sampler = Langevin(2, "all", SIZES["constant"], METRICS["adam"])
    for kind in (Eager, Blocked):
        chains = [
            kind(precision).run(model.log_joint, (x,), z, sampler, noise(), parameters=theta)
            for precision in ("fp32", "bf16")
        ]
        exact, rounded = (chain.first[1] for chain in chains)
        error = ((rounded - exact).norm() / exact.norm()).item()
        assert 0 < error < 0.05
        everything = [chains[1].z, *chains[1].theta_gradient, *chains[1].first, chains[1].moments.second]
        assert {tensor.dtype for tensor in everything} == {torch.float32}


def test_auto_and_what_a_device_cannot_do():
    cpu = torch.device("cpu")
    assert type(make_engine("auto", "fp32", cpu)) is Eager
    assert type(make_engine("compiled", "fp32", cpu)) is Compiled
    assert callable(make_engine("compiled", "fp32", cpu).potential_of(lambda x, z: z))  # compiled at its first call
    with pytest.raises(UserError, match=r"engine=cuda_graph needs a CUDA device, device is cpu"):
        make_engine("cuda_graph", "fp32", cpu)
    with pytest.raises(UserError, match=r"precision=tf32 is arithmetic of CUDA devices, device is cpu"):
        make_engine("auto", "tf32", cpu)


def test_exact_arithmetic_is_put_back():
    """fp32 is exact on CUDA whatever torch's default, recurrent networks included; outside, settings are as before."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    settings = lambda: [part.fp32_precision for part in parts]
    before = settings()
    for precision, inside in (("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")):
        with Eager(precision).arithmetic(), gradients_through_rnns(torch.nn.Sequential(torch.nn.GRU(2, 2))):
            assert settings() == [inside] * 3 and not torch.backends.cudnn.enabled
        assert settings() == before and torch.backends.cudnn.enabled
    with exact_arithmetic():
        assert settings() == ["ieee"] * 3
    assert settings() == before
    with gradients_through_rnns(torch.nn.Conv2d(1, 1, 3)):
        assert torch.backends.cudnn.enabled  # a convolution's backward pass is there in any mode


class Traced(Compiled):
    """What torch.compile makes of a function before it generates code: no compiler is needed, seconds are enough."""

    backend = "eager"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["mlp", "linear", "conv"])
def test_traced_for_compilation_equals_the_loop(model):
    """States, drifts and gradients of θ, from steps with and without the latter (every third of 5 has them)."""
    built, batches = models()
    sampler = Langevin(5, "all", SIZES["constant"], METRICS["adam"], theta_every=3)
    compare(Traced(), built[model], batches[model], sampler, EXACT)
    if model == "linear":
        for sampler in other_samplers(METRICS["none"], SIZES["constant"]):
            compare(Traced(), built[model], batches[model], sampler, EXACT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["mlp", "bernoulli", "conv"])
def test_compiled_equals_the_loop(model):
    """torch.compile of the potential, with and without gradients of θ."""
    built, batches = models()
    engine = Compiled()
    for every, states in ((1, "all"), (3, "all"), (1, "last")):
        sampler = Langevin(5, states, SIZES["constant"], METRICS["adam"], theta_every=every)
        compare(engine, built[model], batches[model], sampler, EXACT)


@pytest.mark.parametrize("broken_by", ["the block", "the end of the capture", None])
def test_a_capture_that_fails_says_why_and_leaves_its_stream(monkeypatch, broken_by):
    """torch 2.11's `graph` as it is: it ends the capture, which fails where the block did, and so leaves the stream."""
    streams = ["the caller's"]

    class Graph:
        def __init__(self, graph, pool, stream):
            self.stream = stream

        def __enter__(self):
            streams.append(self.stream)

        def __exit__(self, *_):
            if broken_by is not None:
                raise RuntimeError("the end of the capture")
            streams.append("the caller's")

    def block():
        if broken_by == "the block":
            raise RuntimeError("the block")

    class Captured:
        def pool(self):
            return "pool"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    captures = Captures(torch.device("cpu"))
    captures._stream = "the capture's"
    if broken_by is None:
        assert isinstance(captures.captured(block, "the caller's"), Captured) and captures._pool == "pool"
    else:
        with pytest.raises(RuntimeError, match=broken_by):
            captures.captured(block, "the caller's")
    assert streams == ["the caller's", "the capture's", "the caller's"]


def relative_error(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


CUDA_ENGINES = {"cuda_graph": CudaGraph, "compiled": CompiledCudaGraph}


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["mlp", "linear", "bernoulli", "conv"])
@pytest.mark.parametrize("engine", CUDA_ENGINES)
def test_captured_graphs_equal_the_loop(engine, model):
    """Every sampler, preconditioner and model; float64, so that a wrong order of kernels cannot hide in rounding."""
    built, batches = models("cuda")
    one = CUDA_ENGINES[engine]("fp32", torch.device("cuda"))
    for metric in METRICS.values():
        for sampler in samplers(metric, SIZES["polynomial"]):
            tolerance = {"rtol": 1e-7, "atol": 1e-7}
            compare(one, built[model], batches[model], sampler, tolerance, "cuda")
    for sampler in other_samplers(METRICS["fisher"], SIZES["constant"]):
        compare(one, built[model], batches[model], sampler, tolerance, "cuda")


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_steps", [NUM_STEPS, 0])
@pytest.mark.parametrize("engine", CUDA_ENGINES)
def test_training_on_cuda_is_the_same_with_every_engine(engine, num_steps):
    one = learner(Eager("fp32", torch.device("cuda")), "cuda", num_steps=num_steps)
    other = learner(CUDA_ENGINES[engine]("fp32", torch.device("cuda")), "cuda", num_steps=num_steps)
    for each in (one, other):
        train(each, 6, "cuda")
    torch.testing.assert_close(one.state_dict()["model"], other.state_dict()["model"], rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("engine", [Eager, CudaGraph])
def test_a_chain_asks_the_device_nothing(engine):
    """torch raises on any synchronisation inside the chain, after the first, which may capture."""
    built, batches = models("cuda", torch.float32)
    sampler = Langevin(NUM_STEPS, "all", SIZES["constant"], METRICS["adam"])
    one, x, theta = engine("fp32", torch.device("cuda")), batches["conv"][0], list(built["conv"].parameters())
    z = torch.randn(3, 4, device="cuda")

    def chain():
        return one.run(built["conv"].log_joint, (x,), z, sampler, ChainNoise(0, 0, (3, 4), "cuda"), parameters=theta)

    chain()
    try:
        torch.cuda.set_sync_debug_mode("error")
        chain()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("tf32", 5e-3), ("bf16", 5e-2)])
def test_drift_against_float64_on_cuda(precision, bound):
    """One drift of the paper's network: what each precision costs, against float64 on the same device."""
    torch.manual_seed(0)
    model = Conv((3, 32, 32), 40, 1.0, DiscretisedGaussian("learned", 0.1, 0.9), 0.3).cuda()
    exact = Conv((3, 32, 32), 40, 1.0, DiscretisedGaussian("learned", 0.1, 0.9), 0.3).double().cuda()
    exact.load_state_dict(model.state_dict())
    x = (torch.randint(256, (64, 3, 32, 32), device="cuda") / 127.5 - 1).float()
    z = torch.randn(64, 40, device="cuda")
    sampler = Map(1, "last", Constant(1e-3), Identity())
    engine = Eager(precision, torch.device("cuda"))
    with engine.arithmetic():
        drift = engine.run(model.log_joint, (x,), z, sampler, None).first[1]
    want = Eager("fp32", torch.device("cuda")).run(exact.log_joint, (x.double(),), z.double(), sampler, None).first[1]
    assert relative_error(drift, want) < bound


@pytest.mark.cuda
def test_recurrent_networks_are_exact_in_fp32():
    """cuDNN's GRU against float64: TF32, its default, is a thousand times further off."""
    torch.manual_seed(0)
    network, x = torch.nn.GRU(32, 64, batch_first=True).cuda(), torch.randn(16, 50, 32, device="cuda")
    with Eager("fp32", torch.device("cuda")).arithmetic():
        found = network(x)[0]
    assert relative_error(found, network.double()(x.double())[0]) < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_process_captures_on_one_device_and_then_on_another():
    """As a worker of a parallel sweep does, whose next run leases another GPU."""
    for device in ("cuda:0", "cuda:1"):
        built, batches = models(device, torch.float32)
        sampler = Langevin(NUM_STEPS, "all", SIZES["constant"], METRICS["adam"])
        engine = CudaGraph("fp32", torch.device(device))
        compare(engine, built["mlp"], batches["mlp"], sampler, {"rtol": 1e-4, "atol": 1e-4}, device)


@pytest.mark.cuda
def test_fused_adam_is_adam():
    """One kernel for all parameters, the same steps as on the CPU, and the same bits when repeated."""
    results = []
    for device in ("cpu", "cuda", "cuda"):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 50, device=device))
        optimizer = Optimizer(1e-2, [0.9, 0.999], 1e-8).build([weight])
        for step in range(20):
            weight.grad = torch.cos(weight.detach().cpu() * (step + 1)).to(device)
            optimizer.step()
        results.append(weight.detach().cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[1], results[2]) and math.isfinite(results[0].sum())
