"""Sequential models: recursion, blocks of z, priors of inputs, held-out neurons, encoders, emissions."""

import math

import pytest
import torch
from series import NUM_NEURONS, NUM_STEPS, NUM_TRAIN, counts, factor_analysis, lfads
from torch.distributions import Normal, kl_divergence
from torch.distributions import Poisson as TorchPoisson
from torch.nn.functional import linear

from lpc_runner.base.distributions import DiagonalGaussian, Gaussian, Poisson
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.chain import ChainNoise, run_chain
from lpc_runner.inference.objectives import reverse_kl
from lpc_runner.inference.preconditioning import EncoderVariance
from lpc_runner.inference.samplers import Langevin
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.sequence_networks import build_generator

GENERATORS = ("linear", "additive", "vanilla", "gru", "lstm")
F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(model, num_trials=3):
    return torch.randn(num_trials, model.latent_dim, **F64)


def step(generator, kind, nonlinearity, state, inputs):
    """One step of a generator's recursion in elementary operations; an lstm's state is hidden state and cell."""
    activation = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]
    if kind in ("linear", "additive"):
        moved = 0 if inputs is None else generator.input_map(inputs)
        if kind == "linear":
            return generator.transition(state) + moved
        return state + generator.outer(activation(generator.inner(state))) + moved
    inputs = state.new_zeros(len(state), 1) if inputs is None else inputs
    hidden = state[:, :4]
    input_weight, state_weight, input_bias, state_bias = generator.network.parameters()
    of_input = linear(inputs, input_weight, input_bias)
    of_state = linear(hidden, state_weight, state_bias)
    if kind == "vanilla":
        return activation(of_input + of_state)
    if kind == "gru":
        (r_input, z_input, n_input), (r_state, z_state, n_state) = of_input.chunk(3, -1), of_state.chunk(3, -1)
        reset, keep = torch.sigmoid(r_input + r_state), torch.sigmoid(z_input + z_state)
        return (1 - keep) * torch.tanh(n_input + reset * n_state) + keep * hidden
    enter, forget, candidate, leave = (of_input + of_state).chunk(4, -1)
    cell = torch.sigmoid(forget) * state[:, 4:] + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.cat([torch.sigmoid(leave) * torch.tanh(cell), cell], -1)


@pytest.mark.parametrize("input_dim", [0, 3])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_over_all_inputs_is_its_recursion(kind, nonlinearity, input_dim):
    """x_1 .. x_T from one call equal T steps written in elementary operations, value and gradient."""
    generator = build_generator(kind, 4, input_dim, 7, nonlinearity).double()
    initial = torch.randn(2, generator.initial_size, **F64, requires_grad=True)
    inputs = torch.randn(2, 9, input_dim, **F64) if input_dim else None
    at_once = generator(initial, inputs, 9)
    state, slow = initial, []
    for t in range(9):
        state = step(generator, kind, nonlinearity, state, None if inputs is None else inputs[:, t])
        slow.append(state[:, :4])
    slow = torch.stack(slow, 1)
    torch.testing.assert_close(at_once, slow)
    weights = torch.randn(2, 9, 4, **F64)
    both = [torch.autograd.grad((weights * states).sum(), initial)[0] for states in (at_once, slow)]
    torch.testing.assert_close(*both)


def test_recurrent_networks_stay_in_training_mode():
    """cuDNN refuses to differentiate them otherwise, and chains run in evaluation mode too."""
    model = lfads(num_held_out=1).eval()
    assert not model.training and not model.generator.training and model.generator.network.training


def test_the_gated_unit_applies_its_reset_gate_after_the_recurrent_product():
    """With the reset gate at 0 the candidate is tanh(W u + b + 0 · (U x + c)): U plays no part in it."""
    generator = build_generator("gru", 4, 3, 7, "tanh").double()
    network = generator.network
    with torch.no_grad():
        network.bias_ih_l0[:4], network.bias_ih_l0[4:8] = -1e3, -1e3  # reset = 0, keep = 0
    state, inputs = torch.randn(2, 4, **F64), torch.randn(2, 1, 3, **F64)
    want = torch.tanh(inputs[:, 0] @ network.weight_ih_l0[8:].T + network.bias_ih_l0[8:])
    torch.testing.assert_close(generator(state, inputs, 1)[:, 0], want)


@pytest.mark.parametrize("kind", GENERATORS)
def test_named_blocks_are_views_and_inputs_act_forward_in_time(kind):
    """Coordinate D0 + t Du + k of z is input k at time t, and it moves the states from t on and no earlier one."""
    model = lfads(generator=kind)
    z = draw(model)
    named = model.named(z)
    size = model.shapes["initial_condition"][0]
    assert model.latent_dim == size + NUM_STEPS * 2 == max(block.stop for block in model.blocks.values())
    t, k = 3, 1
    named["inputs"][:, t, k] = 7.5
    assert (z[:, size + 2 * t + k] == 7.5).all()
    before = model.run(z)
    named["inputs"][:, t, k] = -7.5
    after = model.run(z)
    changed = (before.states != after.states).any(0).any(-1)
    assert changed.tolist() == [False] * t + [True] * (NUM_STEPS - t)
    assert torch.equal(after.inputs[:, t, k], torch.full((3,), -7.5, **F64))
    named["initial_condition"] += 1.0
    assert (model.run(z).states[:, 0] != after.states[:, 0]).any()


def test_ar1_inputs_have_their_stationary_covariance():
    """u = K z with K Kᵀ = s² ρ^|t - t'| for every input, and inputs do not mix."""
    model = lfads(input_prior="ar1")
    with torch.no_grad():
        model.input_prior.logit.copy_(torch.tensor([0.3, 2.0]))
        model.input_prior.log_scale.copy_(torch.tensor([-0.5, 0.4]))
    zero = torch.zeros(1, NUM_STEPS, 2, **F64)
    jacobian = torch.autograd.functional.jacobian(lambda z: model.input_prior(z)[0], zero)[:, :, 0]
    times = torch.arange(NUM_STEPS)
    for i in (0, 1):
        own, other = jacobian[:, i, :, i], jacobian[:, i, :, 1 - i]
        rho, scale = torch.sigmoid(model.input_prior.logit[i]), model.input_prior.log_scale[i].exp()
        torch.testing.assert_close(own @ own.T, scale**2 * rho ** (times[:, None] - times).abs())
        assert other.abs().max() == 0


MODELS = {
    "factor_analysis": factor_analysis,
    "linear_factor_analysis": lambda: factor_analysis(hidden=[]),
    **{kind: lambda kind=kind: lfads(generator=kind) for kind in GENERATORS},
    "no_inputs": lambda: lfads(inputs="none", num_factors=None),
    "ar1": lambda: lfads(input_prior="ar1"),
    "gaussian": lambda: lfads(Gaussian("learned", 0.7, 0.9)),
}


@pytest.mark.parametrize("name", MODELS)
def test_log_joint_is_the_full_density(name):
    """Σ_t Σ_n of torch's normalised densities of x at `decode`, and of N(z; 0, 1)."""
    model, x = MODELS[name](), counts()
    z = draw(model)
    mean = model.decode(z)
    emission = Normal(mean, 0.7) if name == "gaussian" else TorchPoisson(mean)
    want = emission.log_prob(x).sum((1, 2)) + Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model.log_joint(x, z), want)
    parts = model.log_likelihood(x, z, slice(0, 2)) + model.log_likelihood(x, z, slice(2, NUM_NEURONS))
    torch.testing.assert_close(parts, want - model.prior.log_prob(z))


def sigma_points(q: DiagonalGaussian):
    """2d points whose mean of any quadratic function is its expectation under q: μ ± √d σ_i e_i; (2d, B, d)."""
    d = q.mean.shape[1]
    shift = torch.diag_embed((d * q.variance).sqrt()).transpose(0, 1)
    return torch.cat([q.mean + shift, q.mean - shift])


@pytest.mark.parametrize("name", ["lfads", "gaussian"])
def test_the_slides_forms_of_the_elbo_agree(name):
    """E[log p(x, z) - log q] = E[log p(x|z)] - KL = Σ_t E log p(x_t | x_0, u) - KL(x_0) - Σ_t KL(u_t), to rounding."""
    model = lfads(Gaussian("fixed", 0.7, 0.9)) if name == "gaussian" else lfads()
    x, prior = counts(), Normal(torch.zeros((), **F64), 1.0)
    with torch.no_grad():
        q = model.build_encoder().double()(Batch(x, torch.arange(3)))
        points = sigma_points(q)
        joint = torch.stack([model.log_joint(x, z) - q.log_prob(z) for z in points]).mean(0)
        fit = torch.stack([model.likelihood(x, model.predictor(model.run(z).factors)) for z in points]).mean(0)
        torch.testing.assert_close(joint, fit - q.kl(model.prior))

        named = model.named(q.mean), model.named(q.variance.sqrt())
        kl_initial, kl_inputs = (
            kl_divergence(Normal(named[0][block], named[1][block]), prior) for block in ("initial_condition", "inputs")
        )
        means = torch.stack([model.decode(z) for z in points])
        if name == "gaussian":  # -|y - ŷ|²/2σ² - (N/2) log 2πσ²
            error = (x - means).square().sum(-1)
            per_bin = -error / (2 * 0.49) - NUM_NEURONS / 2 * math.log(2 * math.pi * 0.49)
        else:
            per_bin = TorchPoisson(means).log_prob(x).sum(-1)
        slides = per_bin.mean(0).sum(1) - kl_initial.sum(1) - kl_inputs.sum(2).sum(1)
        torch.testing.assert_close(joint, slides)


def test_the_updates_reverse_kl_is_the_slides_elbo():
    """At one draw z ~ q: log p(x|z) - KL, summed over blocks."""
    model, x = lfads(), counts()
    q = model.build_encoder().double()(Batch(x, torch.arange(3)))
    z = q.rsample(torch.randn(3, model.latent_dim, **F64))
    got = -reverse_kl(q, model.prior, z, model.log_joint(x, z), torch.zeros_like(z))
    kl = q.kl_per_dimension(model.prior)
    by_block = sum(kl[:, block].sum(1) for block in model.blocks.values())
    torch.testing.assert_close(got, TorchPoisson(model.decode(z)).log_prob(x).sum((1, 2)) - by_block)


HELD_OUT = {
    "lfads": lambda: lfads(num_held_out=2),
    "gaussian": lambda: lfads(Gaussian("learned", 0.7, 0.9), num_held_out=2),
    "factor_analysis": lambda: factor_analysis(num_held_out=2),
    "per_bin": lambda: factor_analysis(num_held_out=2, encoder="birnn"),
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_poisoned_held_out_neurons_change_nothing_in_evaluation(name):
    """Encoder, chain and log p to the bit, with NaN where the held-out neurons are."""
    model, x = HELD_OUT[name]().eval(), counts()
    encoder = model.build_encoder().double()
    sampler = Langevin(5, "all", Constant(0.05), EncoderVariance(1.0))
    poisoned = x.clone()
    poisoned[..., -2:] = math.nan
    ends = []
    for data in (x, poisoned):
        q = encoder(Batch(data, torch.arange(3)))
        noise = ChainNoise(0, 0, tuple(q.mean.shape), "cpu", torch.float64)
        chain = run_chain(
            lambda z, data=data: model.log_joint(data, z), q.mean, sampler, noise,
            parameters=list(model.parameters()), q=q,
        )  # fmt: skip
        ends.append([chain.z, chain.trace["log_joint"], *chain.theta_gradient, model.log_joint(data, chain.z)])
    assert all(value.isfinite().all() for value in ends[1])
    assert all(torch.equal(*pair) for pair in zip(*ends))


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_neurons_train_their_readout_alone(name):
    """In training, value and all other gradients are those without them; their rows ascend their own likelihood."""
    model, x = HELD_OUT[name](), counts()
    z = draw(model).requires_grad_()
    wanted = [z, *model.parameters()]
    model.train()
    value = model.log_joint(x, z)
    with_them = torch.autograd.grad(value.sum(), wanted)
    model.eval()
    torch.testing.assert_close(value, model.log_joint(x, z))
    without = torch.autograd.grad(model.log_joint(x, z).sum(), wanted)
    own = torch.autograd.grad(model.log_likelihood(x, z, model.held_out).sum(), list(model.readout.parameters()))
    names = ["z", *(name for name, _ in model.named_parameters())]
    for part, one, other in zip(names, with_them, without):
        if part.startswith("readout."):
            assert (other[-2:] == 0).all()
            torch.testing.assert_close(one[:-2], other[:-2])
            torch.testing.assert_close(one[-2:], own[part == "readout.bias"][-2:])
            assert (one[-2:] != 0).any()
        else:
            torch.testing.assert_close(one, other)


def test_the_optimal_scale_is_the_held_in_neurons_error():
    model, x = lfads(Gaussian("optimal", 1.0, 0.9), num_held_out=2), counts()
    z = draw(model)
    x[..., -2:] = math.nan
    model.observe(x, z)
    error = (x - model.decode(z))[..., :-2].square().mean()
    torch.testing.assert_close(model.likelihood.log_scale.exp().square(), error)
    lfads().observe(x, z[:, :15])  # counts have no scale to estimate


def test_birnn_reads_all_bins_and_per_bin_one():
    """A spike at t moves q(u) at every time under the bidirectional network, under the other q(z_t) alone."""
    x = counts()
    more = x.clone()
    more[:, 3, 0] += 2
    index = torch.arange(3)
    for model, want in ((lfads(), None), (factor_analysis(), [3]), (factor_analysis(encoder="birnn"), None)):
        encoder = model.build_encoder().double()
        block = list(model.blocks.values())[-1]
        difference = (encoder(Batch(x, index)).mean - encoder(Batch(more, index)).mean)[:, block]
        moved = difference.unflatten(1, (NUM_STEPS, 2)).abs().sum((0, 2)).nonzero().flatten().tolist()
        assert moved == (list(range(NUM_STEPS)) if want is None else want)


def test_blocks_of_q_come_in_the_order_of_z():
    """The head of the initial condition moves its coordinates alone; mean first, then raw variance."""
    model = lfads()
    encoder = model.build_encoder().double()
    batch = Batch(counts(), torch.arange(3))
    before = encoder(batch)
    with torch.no_grad():
        encoder.heads[0].bias[1] += 5.0  # mean of the second coordinate of z_0
        encoder.heads[1].bias[2] += 1.0  # raw variance of the first input
    after = encoder(batch)
    assert (after.mean != before.mean).any(0).nonzero().flatten().tolist() == [1]
    torch.testing.assert_close(after.mean[:, 1], before.mean[:, 1] + 5)
    first_inputs = [3 + 2 * t for t in range(NUM_STEPS)]
    assert (after.variance != before.variance).any(0).nonzero().flatten().tolist() == first_inputs


@pytest.mark.parametrize("beta, initial", [(1.0, 0.1), (0.3, 0.1), (1.0, 2.0)])
def test_the_tables_variance_starts_where_it_says(beta, initial):
    table = lfads(encoder="free", variance_beta=beta, initial_variance=initial).build_encoder().double()
    assert table.mean.shape == (NUM_TRAIN, 15)
    q = table(Batch(counts(), torch.tensor([7, 0, 7])))
    torch.testing.assert_close(q.variance, torch.full((3, 15), initial, **F64), rtol=1e-6, atol=0)
    with torch.no_grad():
        table.mean[7] = 2.0
    assert table(Batch(counts(), torch.tensor([7, 0, 7]))).mean[:, 0].tolist() == [2, 0, 2]


@pytest.mark.parametrize("link", ["exp", "softplus"])
def test_poisson_is_normalised_and_starts_at_its_rate(link):
    emission = Poisson(link, 1.0, 0.3)
    assert emission.mean(torch.tensor(emission.initial_predictor)).item() == pytest.approx(0.3)
    predictor = torch.tensor([-3.0, 0.2, 1.0, 4.0], **F64)
    levels = torch.arange(200.0, **F64)[:, None].expand(-1, 4)
    total = emission.density(levels, predictor.expand(200, 4)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(4, **F64))
    mean = (levels * emission.density(levels, predictor.expand(200, 4)).exp()).sum(0)
    torch.testing.assert_close(mean, emission.mean(predictor))


@pytest.mark.parametrize("link", ["exp", "softplus"])
def test_rates_are_float32_where_the_network_is_bfloat16(link):
    """precision=bf16 rounds what the network does, not the likelihood."""
    emission, predictor = Poisson(link, 1.0, 0.3), torch.linspace(-20, 3, 24).bfloat16()
    levels = torch.arange(24.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = emission.density(levels, predictor)
    torch.testing.assert_close(got, emission.density(levels, predictor.float()), rtol=0, atol=0)


def test_the_exp_links_tail_is_its_tangent():
    """Below c it is exp; from c on e^c (1 + η - c): value and slope agree at c, and the gradient never vanishes."""
    emission, c = Poisson("exp", 2.0, 0.3), 2.0
    predictor = torch.tensor([-4.0, 1.9, c - 1e-9, c, c + 1e-9, 7.0, 500.0], **F64, requires_grad=True)
    rate = emission.mean(predictor)
    want = torch.where(predictor < c, predictor.exp(), math.exp(c) * (1 + predictor - c))
    torch.testing.assert_close(rate, want)
    slope = torch.autograd.grad(rate.sum(), predictor, retain_graph=True)[0]
    torch.testing.assert_close(slope, predictor.exp().clamp(max=math.exp(c)).detach())
    x = torch.full_like(predictor, 3.0)
    pull = torch.autograd.grad(emission.density(x, predictor).sum(), predictor)[0]
    # d/dη (x log rate - rate) = (x/rate - 1) rate'
    torch.testing.assert_close(pull, (x / want - 1).detach() * slope)
    assert (pull[-2:] < -1).all()


def test_softplus_keeps_its_logarithm_far_below_zero():
    """log log(1 + e^η) = η - e^η/2 + O(e^2η): float32 at η = -200, where the rate itself is 0."""
    emission = Poisson("softplus", 1.0, 0.3)
    predictor = torch.tensor([-200.0, -30.0, -15.0, -2.0, 40.0], requires_grad=True)
    got = emission.log_rate(predictor)
    exact = predictor.detach().double()
    want = torch.where(exact < -100, exact, torch.log(torch.log1p(exact.exp())))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    slope = torch.autograd.grad(got.sum(), predictor)[0]
    assert slope.isfinite().all() and slope[0] == 1.0
    assert slope[2].item() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(slope[3].item(), 1 / (1 + math.exp(2)) / math.log1p(math.exp(-2)), rtol=1e-5, atol=0)
    exact = torch.tensor([-40.0, -16.0, -14.9], **F64)  # either side of where the series takes over, in float64
    torch.testing.assert_close(emission.log_rate(exact), exact.exp().log1p().log(), rtol=1e-13, atol=0)
