"""Adjusted, underdamped and averaged chains against closed forms, in float64."""

import math

import pytest
import torch

from lpc_runner.base.distributions import DiagonalGaussian, Gaussian
from lpc_runner.base.errors import UserError
from lpc_runner.inference.chain import ChainNoise, run_chain
from lpc_runner.inference.engine import Blocked, Eager
from lpc_runner.inference.preconditioning import Adam, EncoderVariance, Identity, SharedAdam
from lpc_runner.inference.samplers import (
    HMC,
    MALA,
    Info,
    Langevin,
    State,
    Underdamped,
    leapfrog,
    log_acceptance,
)
from lpc_runner.inference.step_sizes import Constant, Polynomial
from lpc_runner.models.dense import MLP

D = 3
PRECISION = torch.tensor([[4.0, 1.5, 0.0], [1.5, 2.0, -0.4], [0.0, -0.4, 0.7]], dtype=torch.float64)
CURVATURES = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64).diag()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def gaussian(precision):
    return lambda z: -0.5 * (z @ precision * z).sum(1)


def quartic(z):
    """log p up to a constant; E[z²] = 2 Γ(3/4)/Γ(1/4), E[z⁴] = 1."""
    return -0.25 * z.pow(4).sum(1)


def potential_of(log_joint):
    def potential(z):
        z = z.detach().requires_grad_()
        value = log_joint(z)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    return potential


def make(kind, num_steps, step_size, metric=None, theta_states="all", **more):
    return kind(num_steps, theta_states, Constant(step_size), metric or Identity(), **more)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def run(log_joint, z, sampler, seed=0, **more):
    return run_chain(log_joint, z, sampler, ChainNoise(seed, 0, tuple(z.shape), "cpu", z.dtype), **more)


def stationary(sampler, precision, q=None):
    """Covariance of (z, velocity) that a step of an unadjusted sampler keeps, and A, b: it maps s to A s + b ξ.

    On a Gaussian every step is linear, so that the step at unit vectors says all: no sampling error.
    """
    units = torch.eye(3 * D, dtype=torch.float64)
    z, velocity, noise = units.split(D, dim=1)
    metric = sampler.preconditioner.init(z, q and DiagonalGaussian(*(v.expand_as(z) for v in (q.mean, q.variance))))
    state = State(z, metric, 1, (velocity, torch.zeros(len(z), dtype=torch.float64)))
    moved, _ = sampler.step(state, potential_of(gaussian(precision)), noise)
    move = torch.cat([moved.z, moved.memory[0]], dim=1).T
    a, b = move[:, : 2 * D], move[:, 2 * D :]
    covariance, power = b @ b.T, a
    for _ in range(60):  # C = Σ A^k b bᵀ A^kᵀ, twice as many terms each time
        covariance, power = covariance + power @ covariance @ power.T, power @ power
    return covariance


@pytest.mark.parametrize("precision", [CURVATURES, PRECISION], ids=["diagonal", "correlated"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_unadjusted_chains_without_bias_on_gaussians(precision, share):
    """γ from small to the end of stability: the covariance of z is the target's, whatever the (constant) G.

    The velocity at z has variance 1 - h²λ/4, h² = 2γ (G = 1), in the directions of the target's axes.
    """
    q = DiagonalGaussian(torch.zeros(1, D, dtype=torch.float64), torch.tensor([[0.2, 0.9, 1.4]], dtype=torch.float64))
    for metric, scale in ((Identity(), torch.ones(D)), (EncoderVariance(2.0), q.variance[0])):
        root = scale.to(precision).sqrt()
        step_size = share * 2 / torch.linalg.eigvalsh(root[:, None] * precision * root).max().item()
        for sampler in (
            make(Langevin, 9, step_size, metric, noise="averaged"),
            make(Underdamped, 9, step_size, metric, friction=0.7),
            make(Underdamped, 9, step_size, metric, friction=5.0),
        ):
            covariance = stationary(sampler, precision, q)
            torch.testing.assert_close(covariance[:D, :D], torch.linalg.inv(precision), rtol=1e-7, atol=1e-9)
            if isinstance(sampler, Underdamped) and isinstance(metric, Identity):
                close = torch.cat([-((step_size / 2) ** 0.5) * precision, torch.eye(D, dtype=torch.float64)], dim=1)
                velocity = close @ covariance @ close.T  # after the half kick that waits
                want = torch.eye(D, dtype=torch.float64) - step_size / 2 * precision
                torch.testing.assert_close(velocity, want, rtol=1e-7, atol=1e-9)


SAMPLERS = {
    "averaged": lambda steps, size, **more: make(Langevin, steps, size, noise="averaged", **more),
    "underdamped": lambda steps, size, **more: make(Underdamped, steps, size, **more),
    "mala": lambda steps, size, **more: make(MALA, steps, size, **more),
    "hmc": lambda steps, size, **more: make(HMC, steps, size, num_leapfrog=3, **more),
}
# γ with bias well above the error of 40 000 chains for `langevin`: variances 2/(λ(2 - γλ)), a third too large.
NUM_CHAINS, FIVE_SIGMA = 40_000, 5 * math.sqrt(2 / 40_000)


@pytest.mark.parametrize("name", SAMPLERS)
def test_chains_reach_the_variance_of_a_gaussian(name):
    """From z(0) = 0, with the noise of `run_chain` and its first step; 5 standard errors."""
    curvatures = torch.tensor([0.8, 1.5], dtype=torch.float64)
    sampler = SAMPLERS[name](20, 0.2 if name == "hmc" else 0.4)
    chain = run(gaussian(curvatures.diag()), normal(NUM_CHAINS, 2) * 0, sampler)
    torch.testing.assert_close(chain.z.var(0), 1 / curvatures, rtol=FIVE_SIGMA, atol=0)
    assert (chain.z.mean(0).abs() < 5 / (curvatures * NUM_CHAINS).sqrt()).all()


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_adjusted_chains_are_exact_beyond_gaussians(name):
    """They keep p ~ exp(-z⁴/4), of which a third is rejected: moments 2 and 4, and E[min(1, exp(-e))] = 2 P(e < 0)."""
    errors = []
    sampler = SAMPLERS[name](10, 0.6 if name == "mala" else 0.4)
    source = torch.distributions.Gamma(torch.tensor(0.25, dtype=torch.float64), 1.0)
    start = (4 * source.sample((NUM_CHAINS, 1))) ** 0.25 * normal(NUM_CHAINS, 1).sign()
    chain = run(quartic, start, sampler, on_step=lambda _, info: errors.append(info.energy_error))
    assert 0.5 < chain.acceptance.item() < 0.9
    square = 2 * math.gamma(0.75) / math.gamma(0.25)
    assert chain.z.square().mean().item() == pytest.approx(square, abs=5 * math.sqrt((1 - square**2) / NUM_CHAINS))
    fourth_sd = math.sqrt(5 - 1)  # E[z⁸] = 5
    assert chain.z.pow(4).mean().item() == pytest.approx(1, abs=5 * fourth_sd / math.sqrt(NUM_CHAINS))
    balance = errors[-1].neg().exp().clamp(max=1) - 2.0 * (
        errors[-1] < 0
    )  # as a proposal and its way back are as likely
    assert balance.mean().item() == pytest.approx(0, abs=5 * balance.std().item() / math.sqrt(NUM_CHAINS))
    for found, each in ((chain.acceptance, lambda e: e.neg().exp().clamp(max=1)), (chain.energy_error, torch.abs)):
        torch.testing.assert_close(found, torch.stack([each(error).mean() for error in errors]).mean())


@pytest.mark.parametrize("name", ["independent", "underdamped"])
def test_energy_errors_of_unadjusted_steps(name):
    """From equilibrium E[exp(-e)] = 1 for the first step, which the second step's info tells."""

    class Asking(Constant):
        needs_acceptance = True

    sampler = SAMPLERS["underdamped"](2, 0.5)
    if name == "independent":
        sampler = Langevin(2, "all", Asking(0.5), Identity())
    seen, precision = [], torch.tensor([[1.3]], dtype=torch.float64)
    chain = run(gaussian(precision), normal(NUM_CHAINS, 1) / 1.3**0.5, sampler, on_step=lambda *step: seen.append(step))
    error = seen[1][1].energy_error
    weights = error.neg().exp()
    assert weights.mean().item() == pytest.approx(1, abs=5 * weights.std().item() / math.sqrt(NUM_CHAINS))
    assert error.std() > 0.1
    torch.testing.assert_close(chain.acceptance, weights.clamp(max=1).mean())
    assert run(gaussian(precision), normal(5, 1), type(sampler)(1, "all", Asking(0.5), Identity())).acceptance is None


def test_mala_accepts_by_its_log_acceptance_and_keeps_detailed_balance():
    """Between two points, both ways: p(z) q(z'|z) a(z, z') = p(z') q(z|z') a(z', z), a as in `log_acceptance`."""
    one, other = normal(2, 50, D)
    step_size, potential = 0.3, potential_of(lambda z: quartic(z) - 0.3 * z.prod(1).square())
    sampler = make(MALA, 1, step_size)
    (log_one, drift_one), (log_other, drift_other) = potential(one), potential(other)

    def step(start, drift, log_joint, goal, coordinate=0.0):
        xi = (goal - start - step_size * drift) / (2 * step_size) ** 0.5
        state = State(start, None, 0, None, (log_joint, drift))
        moved, info = sampler.step(state, potential, torch.stack([xi, torch.full_like(xi, coordinate)]))
        log_flow = log_joint - xi.square().sum(1) / 2 + info.energy_error.neg().clamp(max=0)
        return moved, info, log_flow

    moved, forth, flow = step(one, drift_one, log_one, other)
    _, back, counterflow = step(other, drift_other, log_other, one)
    torch.testing.assert_close(flow, counterflow)
    want = log_acceptance((one, forth), (other, Info(log_other, drift_other, 2 * step_size)))
    torch.testing.assert_close(-forth.energy_error, want)
    torch.testing.assert_close(back.energy_error, -forth.energy_error)
    accepted = math.log(0.5) < -forth.energy_error  # the normal number 0 is the uniform one ½
    assert 5 < accepted.sum() < 45
    torch.testing.assert_close(moved.z, torch.where(accepted[:, None], other, one))
    torch.testing.assert_close(moved.seen[0], torch.where(accepted, log_other, log_one))
    torch.testing.assert_close(moved.seen[1], torch.where(accepted[:, None], drift_other, drift_one))
    lost, info, _ = step(one, drift_one, log_one, other * torch.nan)  # where there is no density there is no step
    assert torch.equal(lost.z, one) and info.energy_error.isnan().all()


def test_leapfrog_is_reversible_keeps_volumes_and_errs_by_the_square_of_its_step():
    potential = potential_of(lambda z: quartic(z) + gaussian(PRECISION)(z))
    z, p = normal(2, 6, D)
    value, drift = potential(z)
    lengths = torch.tensor([0.1, 0.05, 0.2], dtype=torch.float64)
    far, momentum, _, there = leapfrog(z, p, drift, lengths, potential, 7)
    back, negative, again, _ = leapfrog(far, -momentum, there, lengths, potential, 7)
    torch.testing.assert_close((back, -negative, again), (z, p, value), rtol=1e-11, atol=1e-11)
    errors = []
    for num in (8, 16, 32):
        _, end, log_joint, _ = leapfrog(z, p, drift, 0.8 / num, potential, num)
        errors.append(value - log_joint + (end.square() - p.square()).sum(1) / 2)
    ratios = torch.stack([errors[0] / errors[1], errors[1] / errors[2]]).median(1).values
    torch.testing.assert_close(ratios, torch.full_like(ratios, 4.0), rtol=0.1, atol=0)

    def flow(point):
        q, m, *_ = leapfrog(point[None, :D], point[None, D:], -(point[None, :D] @ PRECISION), lengths, linear, 3)
        return torch.cat([q, m], 1)[0]

    linear = lambda z: (z.sum(1), -(z @ PRECISION))
    jacobian = torch.autograd.functional.jacobian(flow, normal(2 * D))
    assert jacobian.det().item() == pytest.approx(1, abs=1e-10)


def test_limits_in_which_one_sampler_is_another():
    """HMC of one leapfrog step is MALA; MALA that accepts is `langevin`; infinite friction is averaged noise."""
    z = normal(40, D)
    kept = run(quartic, z, make(MALA, 5, 0.4))
    torch.testing.assert_close(run(quartic, z, make(HMC, 5, 0.4, num_leapfrog=1)).z, kept.z, rtol=0, atol=0)
    xi = normal(2, 40, D)
    potential = potential_of(quartic)
    moved, _ = make(MALA, 1, 0.01).step(State(z, None, 0, None, potential(z)), potential, xi)
    plain, _ = make(Langevin, 1, 0.01).step(State(z, None, 0), potential, xi[0])
    same = (moved.z != z).all(1)
    assert same.sum() > 30
    torch.testing.assert_close(moved.z[same], plain.z[same])
    state = State(z, None, 1, (xi[1], torch.zeros(40, dtype=torch.float64)))
    ends = [
        make(kind, 3, 0.1, **more).step(state, potential, xi[0])[0].z
        for kind, more in ((Underdamped, {"friction": 1e4}), (Langevin, {"noise": "averaged"}))
    ]
    torch.testing.assert_close(*ends)
    torch.testing.assert_close(ends[1], z + 0.1 * potential(z)[1] + 0.2**0.5 * (xi[0] + xi[1]) / 2)


@pytest.mark.parametrize("theta_states, every", [("all", 1), ("all", 3), ("last", 1)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_theta_learns_at_states_and_passes_are_counted(name, theta_states, every):
    """θ's gradient at the states that an observer saw, none of them a rejected proposal, with either engine."""
    model = MLP((1, 3, 3), 4, 1.0, Gaussian("learned", 0.5, 0.9), 0.3, [6]).double()
    x, z = normal(5, 1, 3, 3), normal(5, 4)
    theta, states, calls, accepted = list(model.parameters()), [z], [], []

    def log_joint(x, z):
        calls.append(len(z))
        return model.log_joint(x, z)

    def observe(state, info):
        accepted.append((state.z != states[-1]).all(1))
        states.append(state.z)

    sampler = SAMPLERS[name](7, 0.8, theta_states=theta_states, theta_every=every)
    noise = lambda: ChainNoise(2, 0, (5, 4), "cpu", torch.float64)
    chain = Eager().run(log_joint, (x,), z, sampler, noise(), parameters=theta, on_step=observe)
    assert chain.num_evaluations == sum(calls)
    passes = {"mala": 7, "hmc": 21}.get(name, 0) + {("all", 1): 7, ("all", 3): 3, ("last", 1): 2}[theta_states, every]
    if name not in ("mala", "hmc"):
        passes = 8 if theta_states == "last" else 7
    assert sum(calls) == 5 * passes
    share = torch.stack(accepted).double().mean()
    assert 0.2 < share < 0.95 if name in ("mala", "hmc") else share == 1
    used = states[:7][::every] if theta_states == "all" else states[-1:]
    mean = torch.stack([model.log_joint(x, state).mean() for state in used]).mean()
    torch.testing.assert_close(chain.theta_gradient, list(torch.autograd.grad(mean, theta)))
    point = z.clone().requires_grad_()
    torch.testing.assert_close(chain.first[0], model.log_joint(x, z).detach())
    torch.testing.assert_close(chain.first[1], torch.autograd.grad(model.log_joint(x, point).sum(), point)[0])
    blocks = Blocked().run(model.log_joint, (x,), z, sampler, noise(), parameters=theta)
    assert blocks.num_evaluations == sum(calls)
    torch.testing.assert_close(blocks.theta_gradient, chain.theta_gradient)


@pytest.mark.parametrize(
    "far, theta_states, every, made", [(0.0, "all", 1, 32), (40.0, "all", 3, 90), (40.0, "last", 1, 96)]
)
def test_chains_end_where_they_have_settled(far, theta_states, every, made):
    """From equilibrium after one block; from afar log p falls by a factor .81 a step: seen by `made` steps, not before.

    0.81^60 · far²/2 is a two-hundredth of a nat, below the noise of 200 chains. The same with either engine; θ, sums,
    trace and count are of the steps that were made.
    """
    bias = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    log_joint = lambda x, z: -0.5 * (z - x - bias).square().sum(1)
    start, x, states = normal(200, 1) + far, normal(200, 1) * 0, []
    sampler = make(Langevin, 300, 0.1, theta_states=theta_states, theta_every=every, stop="settled")
    noise = lambda: ChainNoise(1, 0, (200, 1), "cpu", torch.float64)
    observe = lambda state, info: states.append(state.z)
    chains = [
        engine().run(log_joint, (x,), start, sampler, noise(), parameters=[bias], on_step=watch)
        for engine, watch in ((Eager, observe), (Blocked, None))
    ]
    used = [start, *states][:-1][::every] if theta_states == "all" else states[-1:]
    for chain in chains:
        assert chain.moments.count == len(states) == len(chain.trace["log_joint"]) == made
        assert chain.num_evaluations == 200 * (made + (theta_states == "last"))
        torch.testing.assert_close(chain.theta_gradient[0], torch.stack(used).mean())
        torch.testing.assert_close(chain.z, states[-1])
    assert sampler.couples_batch  # over ranks there is no such end
    with pytest.raises(UserError, match=r"sampler.stop=settled .* one process"):
        sampler.averaging_by(None)


def test_adjusted_chains_need_a_constant_step():
    for metric in (Adam(0.9, 1e-3, None), SharedAdam(0.9, 1e-3, None), SharedAdam(0.9, 1e-3, 10)):
        with pytest.raises(UserError, match=rf"^sampler: MALA .* {type(metric).__name__} adapts it: precond.*fit"):
            make(MALA, 10, 0.1, metric)
    with pytest.raises(UserError, match=r"^sampler: HMC .* Polynomial changes it: step_size=constant"):
        HMC(10, "all", Polynomial(0.1, 1.0, 0.5), Identity())
    assert make(HMC, 10, 0.1, SharedAdam(0.9, 1e-3, 9)).couples_batch
