"""Sequential models through the runner's own update: every objective, block-wise steps, shadow acceptance, EM."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import cells_of
from series import NUM_TRAIN, config_dir, counts, factor_analysis, lds, lfads
from torch.distributions import Normal

from benchmarks.literal import literal_gradients
from lpc_runner.base.distributions import DiagonalGaussian, Gaussian
from lpc_runner.base.errors import UserError
from lpc_runner.config.build import build
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.chain import ChainNoise, ShadowMetropolis, log_acceptance, run_chain
from lpc_runner.inference.context import Context
from lpc_runner.inference.objectives import VariationalEM, WeightedKL
from lpc_runner.inference.preconditioning import Adam as AdamMetric
from lpc_runner.inference.preconditioning import EncoderVariance, Identity
from lpc_runner.inference.samplers import Info, Langevin, NoSteps, State
from lpc_runner.inference.step_sizes import Blocks, Constant, Polynomial
from lpc_runner.models.sequential import LFADS
from lpc_runner.runner.plan import build_learner
from lpc_runner.training.learner import AdamOptimizer, Learner, RowAdam
from lpc_runner.training.update import UpdateNoise, compute_gradients

F64 = {"dtype": torch.float64}
OPTIMIZER = AdamOptimizer(1e-2, [0.9, 0.999], 1e-8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch_of(num_trials=3):
    return Batch(counts(num_trials), torch.arange(num_trials))


def noise_for(model, num_trials=3, update=0):
    return UpdateNoise(0, update, (num_trials, model.latent_dim), "cpu", torch.float64)


MODELS = {
    "gru": lfads,
    "linear": lambda: lfads(generator="linear", num_factors=None),
    "free": lambda: lfads(encoder="free"),
    "free_block": lambda: lfads(encoder="free_block"),
    "held_out": lambda: lfads(num_held_out=2),
    "factor_analysis": factor_analysis,
    "gaussian": lambda: lfads(Gaussian("learned", 0.8, 0.9)),
}
OBJECTIVES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "jeffreys": (0.5, 0.5), "prior": (0.0, 0.0)}


# The literal form writes KL and log q of a factorised q.
FACTORISED = [name for name in MODELS if name != "free_block"]


@pytest.mark.parametrize("name, objective", itertools.product(FACTORISED, OBJECTIVES))
def test_the_update_is_algorithm_1_for_sequences_too(name, objective):
    """The fused update equals the literal one, θ and φ, with the damped Adam preconditioner."""
    model, batch, weights = MODELS[name](), batch_of(), WeightedKL(*OBJECTIVES[objective])
    encoder = model.build_encoder().double() if weights.uses_encoder else None
    sampler = Langevin(4, "all", Constant(0.03), AdamMetric(0.5, 1.0, None))
    result = compute_gradients(weights, Context(model, encoder, sampler, batch, noise_for(model)))
    want = literal_gradients(
        model, encoder, sampler, weights, batch, noise=noise_for(model), start_from_prior=False
    )  # fmt: skip
    theta, phi = ([p.grad for p in module.parameters()] if module else [] for module in (model, encoder))
    torch.testing.assert_close([*theta, *phi], [*want.theta, *want.phi], rtol=1e-9, atol=1e-11)
    assert result.finite
    assert ("train/sigma" in result.scalars) == (name == "gaussian")
    if encoder is not None:
        blocks = [result.scalars[f"train/kl_{block}"] for block in model.blocks]
        torch.testing.assert_close(sum(blocks), result.scalars["train/kl"])


def vae_gradients(model, encoder, batch, noise):
    q = encoder(batch)
    z = q.rsample(noise.normal("warm_start"))
    loss = (q.kl(model.prior) - model.log_likelihood(batch.x, z, model.held_in)).mean()
    return torch.autograd.grad(loss, [*model.parameters(), *encoder.parameters()])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "held_out"])
def test_reverse_without_steps_is_the_sequential_vae(name):
    """θ and φ descend one and the same -ELBO."""
    model, batch = MODELS[name](), batch_of()
    encoder = model.build_encoder().double()
    want = vae_gradients(model, encoder, batch, noise_for(model))
    compute_gradients(WeightedKL(0.0, 1.0), Context(model, encoder, NoSteps(None, None), batch, noise_for(model)))
    got = [parameter.grad for module in (model, encoder) for parameter in module.parameters()]
    torch.testing.assert_close(got, list(want))


def test_poisson_lds_is_lfads_with_a_linear_generator(tmp_path, workplace):
    """The same class; from the same seed, the same parameters, values and gradients."""
    cells = [
        "model=poisson_lds",
        "model=lfads model.generator=linear model.state_dim=8 model.initial_dim=null model.input_dim=8 "
        "model.num_factors=null",
    ]
    models = []
    for words in cells:
        (cell,) = cells_of(config_dir(tmp_path), "dataset=test_spikes", *words.split())
        models.append(build(cell.cfg, cell.choices).model)
    one, other = models
    assert type(one) is type(other) is LFADS
    x, z = counts().float(), torch.randn(3, one.latent_dim)
    assert torch.equal(one.log_joint(x, z), other.log_joint(x, z))
    pairs = zip(*(torch.autograd.grad(m.log_joint(x, z).sum(), list(m.parameters())) for m in models))
    assert all(torch.equal(*pair) for pair in pairs)
    # And it is the linear dynamical system: y_t ~ Poisson(exp(C x_t + d)), x_t = A x_{t-1} + b + L u_t.
    generator, named = one.generator, one.named(z)
    state, want = one.initial_map(named["initial_condition"]), []
    for t in range(one.num_steps):
        state = generator.transition(state) + named["inputs"][:, t] @ generator.input_map.weight.T
        want.append((state @ one.readout.weight.T + one.readout.bias).exp())
    torch.testing.assert_close(one.decode(z), torch.stack(want, 1))


NO_INPUTS, FREE = ("model.inputs=none",), ("model.encoder=free", "objective=variational_em")
KINDS = ("linear", "additive", "vanilla", "gru", "lstm")
QUICK = {("linear", FREE), ("additive", ()), ("vanilla", NO_INPUTS), ("gru", ()), ("lstm", NO_INPUTS)}


@pytest.mark.parametrize("kind, more", [
    pytest.param(kind, more, marks=[] if (kind, more) in QUICK else pytest.mark.slow)
    for kind in KINDS for more in ((), NO_INPUTS, FREE)
])  # fmt: skip
def test_every_generator_trains_from_the_command_line(kind, more, tmp_path, workplace):
    """Built from conf/, in float32: some updates raise the ELBO's estimate, and everything stays finite."""
    words = (config_dir(tmp_path), "dataset=test_spikes", "model=lfads", f"model.generator={kind}", "device=cpu")
    sizes = ("model.state_dim=6", "model.encoder_dim=8", "optimizer.learning_rate=0.02")
    steps = () if "objective=variational_em" not in more else ("sampler=none",)
    (cell,) = cells_of(*words, *sizes, *more, *steps, *(() if steps else ("preconditioning=encoder",)))
    learner = build_learner(build(cell.cfg, cell.choices))
    if learner.sampler.num_steps:
        learner.sampler.num_steps = 3
    batch = Batch(counts(NUM_TRAIN).float(), torch.arange(NUM_TRAIN))
    elbo = []
    for update in range(60):
        gradients = learner.gradients(batch, 0, update, False)
        assert gradients.finite
        learner.apply(batch, gradients)
        elbo.append(gradients.scalars["train/elbo"].item())
    assert sum(elbo[-5:]) / 5 > sum(elbo[:5]) / 5 + 1


@pytest.mark.parametrize("words, message", [
    (("model=lfads", "preconditioning=encoder", "objective=prior"), "needs an encoder: objective=prior has none"),
    (("model=lfads", "model.encoder=free_block"), "objective=jeffreys needs a factorised q: model.encoder=free_block"),
    (("model=lfads", "model.inputs=none", "step_size=blocks"), r"step_size.values must name each block .*initial_cond"),
    (("model=lfads", "step_size=blocks", "step_size.values.inputs=-1"), "step_size.values must be a mapping of names"),
    (("model=lds",), "model/likelihood=gaussian expects images or real-valued series, .*: model=.*poisson_lds"),
    (("model=mlp",), "model=mlp expects images, dataset=test_spikes holds spike counts"),
    (("model=lfads", "model.generator=elman"), "model.generator must be one of linear, additive, vanilla, gru, lstm"),
    (("model=lfads", "dataset.num_held_out=5"), "num_held_out must be less than the 5 neurons"),
])  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(words, message, tmp_path, workplace):
    (cell,) = cells_of(config_dir(tmp_path), "dataset=test_spikes", *words)
    with pytest.raises(UserError, match=message):
        build(cell.cfg, cell.choices)


def run(model, z, sampler, q=None, on_step=None, log_joint=None):
    log_joint = log_joint or (lambda point: model.log_joint(counts(len(point)), point))
    noise = ChainNoise(0, 0, tuple(z.shape), "cpu", torch.float64)
    return run_chain(log_joint, z, sampler, noise, q=q, on_step=on_step)


def test_encoder_preconditioning_is_plain_langevin_in_scaled_coordinates():
    """With constant G, z = √G z': the chain equals G = 1 on log p(√G z') with the same noise; and G <= cap."""
    model = lfads()
    variance = torch.rand(3, model.latent_dim, **F64) * 3
    scale = variance.clamp(max=0.8)
    assert (variance > 0.8).any() and (variance < 0.8).any()
    start = torch.randn(3, model.latent_dim, **F64)
    q = DiagonalGaussian(torch.zeros_like(variance), variance.requires_grad_())
    chain = run(model, start, Langevin(6, "all", Constant(0.05), EncoderVariance(0.8)), q)
    root = scale.detach().sqrt()
    plain = run(
        model, start / root, Langevin(6, "all", Constant(0.05), Identity()),
        log_joint=lambda point: model.log_joint(counts(), root * point),
    )  # fmt: skip
    torch.testing.assert_close(chain.z, root * plain.z)
    assert not chain.z.requires_grad


def test_damped_adam_keeps_coordinates_that_feel_nothing():
    """G = 1/(sqrt(m̂) + 1) <= 1 where undamped Adam divides by almost nothing."""
    for eps, largest in ((1.0, 1.0), (1e-8, 1e8)):
        _, scale = AdamMetric(0.9, eps, None).update(torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]), 1)
        assert scale[0, 0].item() == pytest.approx(largest)
        assert scale[0, 1].item() == pytest.approx(1 / (3 + eps))


def test_block_steps_are_each_blocks_own_chain():
    """On a density that factorises over blocks, every block moves as under a constant step of its own size."""
    blocks = {"initial_condition": slice(0, 3), "inputs": slice(3, 8)}
    sizes = Blocks({"inputs": 0.07, "initial_condition": 0.01})
    sizes.bind(SimpleNamespace(blocks=blocks), torch.device("cpu"))
    log_joint = lambda z: -(z.square() + 0.1 * z**4).sum(1)
    start = torch.randn(4, 8, **F64)
    both = run(None, start, Langevin(9, "all", sizes, Identity()), log_joint=log_joint).z
    for name, block in blocks.items():
        alone = run(None, start, Langevin(9, "all", Constant(sizes.values[name]), Identity()), log_joint=log_joint).z
        torch.testing.assert_close(both[:, block], alone[:, block], rtol=1e-6, atol=1e-7)  # sizes are float32


@pytest.mark.parametrize("blocks", [{}, {"inputs": slice(0, 8)}, {"a": slice(0, 3), "b": slice(3, 8)}])
def test_block_steps_must_name_the_blocks(blocks):
    with pytest.raises(ValueError, match="values must name each block"):
        Blocks({"inputs": 0.07, "initial_condition": 0.01}).bind(SimpleNamespace(blocks=blocks), torch.device("cpu"))


def test_log_acceptance_is_malas():
    """Against torch's normal densities, for G of both ends; exchanging the ends changes its sign."""
    z, moved = torch.randn(2, 3, 4, **F64)
    ends = [
        Info(torch.randn(3, **F64), torch.randn(3, 4, **F64), torch.rand(3, 4, **F64) + 0.1),
        Info(torch.randn(3, **F64), torch.randn(3, 4, **F64), 0.3),
    ]

    def proposal(origin, info):
        variance = torch.as_tensor(info.noise_variance, **F64).expand(3, 4)
        return Normal(origin + variance / 2 * info.drift, variance.sqrt())

    forward, back = proposal(z, ends[0]).log_prob(moved).sum(1), proposal(moved, ends[1]).log_prob(z).sum(1)
    got = log_acceptance((z, ends[0]), (moved, ends[1]))
    torch.testing.assert_close(got, ends[1].log_joint - ends[0].log_joint + back - forward)
    torch.testing.assert_close(got, -log_acceptance((moved, ends[1]), (z, ends[0])))


@pytest.mark.parametrize("step_size", [Constant(0.05), Polynomial(0.05, 2.0, 0.5)])
def test_shadow_metropolis_judges_every_step_but_the_last(step_size):
    """The mean of min(1, e^r) over T - 1 steps, recomputed from states and densities of their own."""
    model, q = lfads(), None
    start = torch.randn(3, model.latent_dim, **F64)
    shadow, states = ShadowMetropolis(start), [start]

    def observe(state, info):
        shadow(state, info)
        states.append(state.z)

    sampler = Langevin(5, "all", step_size, Identity())
    run(model, start, sampler, q, observe)
    total = 0.0
    for t in range(1, 5):
        ends = []
        for s, z in ((t, states[t - 1]), (t + 1, states[t])):
            point = z.clone().requires_grad_()
            value = model.log_joint(counts(), point)
            ends.append((z, Info(value.detach(), torch.autograd.grad(value.sum(), point)[0], 2 * step_size(s))))
        total += log_acceptance(*ends).clamp(max=0).exp().mean().item()
    assert shadow.means()[0].item() == pytest.approx(total / 4)


def test_small_steps_are_accepted_and_large_ones_are_not():
    """MALA's acceptance tends to 1 as γ → 0 and falls with γ."""
    model, found = lds(), []
    for step_size in (1e-4, 0.05, 0.15):
        start = torch.randn(3, model.latent_dim, **F64)
        shadow = ShadowMetropolis(start)
        run(model, start, Langevin(20, "all", Constant(step_size), Identity()), on_step=shadow)
        found.append(shadow.means()[0].item())
    assert found[0] > 0.99 > found[1] > found[2]


def test_a_diverged_chain_has_no_acceptance():
    """A step to a density of 0 is rejected, a step from NaN to NaN is none."""
    info = lambda value: Info(torch.tensor([value]), torch.zeros(1, 1), 2.0)
    for values, acceptance in (((0.0, -math.inf), 0.0), ((0.0, math.nan), math.nan)):
        shadow = ShadowMetropolis(torch.zeros(1, 1))
        for value in values:
            shadow(State(torch.zeros(1, 1), None, 0), info(value))
        assert shadow.means()[0].item() == pytest.approx(acceptance, nan_ok=True)


def test_the_acceptance_is_logged_when_asked_and_changes_nothing():
    model, batch = lfads(), batch_of()
    encoder = model.build_encoder().double()
    sampler = Langevin(4, "all", Constant(0.03), EncoderVariance(1.0))
    ends = []
    for judge in (False, True):
        result = compute_gradients(
            WeightedKL(0.5, 0.5), Context(model, encoder, sampler, batch, noise_for(model), judge=judge)
        )
        assert ("chain/mala_acceptance" in result.scalars) == judge
        ends.append([result.chain.z, *(p.grad.clone() for p in encoder.parameters())])
    assert 0 < result.scalars["chain/mala_acceptance"] <= 1
    assert all(torch.equal(*pair) for pair in zip(*ends))


def test_row_adam_is_one_adam_per_row():
    """Every row goes the way of torch's Adam that sees its batches alone; a row without a gradient keeps still."""
    table = torch.nn.Parameter(torch.randn(5, 3, **F64))
    alone = [torch.nn.Parameter(row.detach().clone()) for row in table]
    joint = RowAdam([table], 0.1, (0.9, 0.99), 1e-8)
    single = [torch.optim.Adam([row], lr=0.1, betas=(0.9, 0.99), eps=1e-8) for row in alone]
    for rows in ([0, 1], [1, 3], [1], [0, 3], [0, 1, 3]):
        kept = table.detach().clone()
        target = torch.randn(len(rows), 3, **F64)
        table.grad = None
        (table[rows] - target).square().sum().backward()
        joint.step()
        for row, goal in zip(rows, target):
            single[row].zero_grad()
            (alone[row] - goal).square().sum().backward()
            single[row].step()
        others = [row for row in range(5) if row not in rows]
        assert torch.equal(table[others], kept[others])
    torch.testing.assert_close(table.detach(), torch.stack([row.detach() for row in alone]))


def free_learner(**more):
    model = lfads(encoder="free")
    objective = more.get("objective", VariationalEM(3, 2))
    return Learner(model, model.build_encoder().double(), NoSteps(None, None), objective, OPTIMIZER)


def test_only_the_batchs_rows_of_the_table_move():
    learner = free_learner()
    for update, index in enumerate([[0, 1], [2, 3], [0, 2]]):
        before = copy.deepcopy(learner.encoder)
        batch = Batch(counts(2), torch.tensor(index))
        learner.apply(batch, learner.gradients(batch, 0, update, False))
        for old, new in zip(before.parameters(), learner.encoder.parameters()):
            assert (old != new).any(1).nonzero().flatten().tolist() == index


def test_a_restored_table_goes_on_as_if_never_stopped():
    """State of the row optimiser through a checkpoint's state_dict, to the bit."""
    straight, stopped = free_learner(), free_learner()
    stopped.load_state_dict(copy.deepcopy(straight.state_dict()))
    for update, index in enumerate([[0, 1], [1, 2], [0, 2], [1, 3]]):
        batch = Batch(counts(2, seed=update), torch.tensor(index))
        if update == 2:
            resumed = free_learner()
            resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
            stopped = resumed
        for learner in (straight, stopped):
            learner.apply(batch, learner.gradients(batch, 0, update, False))
    pairs = zip(straight.encoder.parameters(), stopped.encoder.parameters())
    assert all(torch.equal(*pair) for pair in pairs)


def test_an_e_step_averages_the_elbos_gradient_over_its_samples():
    """φ's gradient is that of the mean of M single-sample -ELBOs; θ gets none."""
    model, batch = lfads(), batch_of()
    encoder = model.build_encoder().double()
    noise = noise_for(model)
    got, spent = VariationalEM(1, 3).e_step(Context(model, encoder, None, batch, noise))
    assert spent == 9
    assert all(parameter.grad is None for parameter in model.parameters())
    q, loss = encoder(batch), 0.0
    for sample in range(3):
        z = q.rsample(noise.normal(f"encoder_step/{sample}"))
        loss = loss + (q.kl(model.prior) - model.log_likelihood(batch.x, z, model.held_in)).mean() / 3
    torch.testing.assert_close(got, list(torch.autograd.grad(loss, list(encoder.parameters()))))


def test_variational_em_makes_its_e_steps_before_the_update():
    """num_encoder_steps steps of φ with fresh noise, then one update of θ and φ; every evaluation is counted."""
    learner, batch = free_learner(), batch_of()
    theta = [parameter.clone() for parameter in learner.model.parameters()]
    gradients = learner.gradients(batch, 0, 0, False)
    assert gradients.num_evaluations == 3 * 2 * 3 + 3  # steps · samples · trials, and the update's own
    assert all(torch.equal(*pair) for pair in zip(theta, learner.model.parameters()))
    (count,) = {state["count"][0].item() for state in learner.phi_optimizer.state.values()}
    assert count == 3
    learner.apply(batch, gradients)
    assert all((one != other).any() for one, other in zip(theta, learner.model.parameters()))
    plain = free_learner(objective=WeightedKL(0.0, 1.0)).gradients(batch, 0, 0, False)
    assert plain.num_evaluations == 3
    assert gradients.scalars["train/kl"] != plain.scalars["train/kl"]


def test_every_e_step_draws_its_own_noise(monkeypatch):
    """Over steps, samples, updates and apart from the warm start; the same again for the same update."""
    drawn = []

    e_step = VariationalEM.e_step

    def spy(self, context):
        drawn.extend(context.noise.normal(f"encoder_step/{sample}") for sample in range(self.num_samples))
        return e_step(self, context)

    monkeypatch.setattr(VariationalEM, "e_step", spy)
    learner, batch = free_learner(), batch_of()
    for update in (0, 1, 0):
        learner.gradients(batch, 0, update, False)
    first, later, again = drawn[:6], drawn[6:12], drawn[12:]
    assert all(torch.equal(*pair) for pair in zip(first, again))
    draws = [*first, *later, noise_for(learner.model).normal("warm_start")]
    assert all((one != other).all() for one, other in itertools.combinations(draws, 2))


def test_an_e_step_that_is_not_finite_is_not_taken():
    """The table keeps its last finite values and the update says that it diverged."""
    learner, batch = free_learner(), batch_of()
    before = [parameter.clone() for parameter in learner.encoder.parameters()]
    with torch.no_grad():
        learner.model.readout.bias[0] = math.nan
    gradients = learner.gradients(batch, 0, 0, False)
    assert not gradients.finite
    assert all(torch.equal(*pair) for pair in zip(before, learner.encoder.parameters()))
