"""Annealed importance sampling against closed forms: unbiased weights both ways, bounds that enclose log p(x)."""

import math

import pytest
import torch
from series import lds
from torch import nn

from lpc_runner.base.distributions import LOG_2PI, DiagonalGaussian, Gaussian
from lpc_runner.base.tensors import generator
from lpc_runner.evaluation.ais import AnnealedImportance, Annealing, schedule
from lpc_runner.evaluation.bounds import FreeFit
from lpc_runner.evaluation.linear_gaussian import log_likelihood
from lpc_runner.models.dense import Linear

SCALE = 1.5


def ais(num_chains, num_temperatures, num_leapfrog=3, start="prior"):
    return AnnealedImportance(
        num_chains=num_chains, num_temperatures=num_temperatures, num_leapfrog=num_leapfrog, start=start
    )


def linear(num_examples):
    """A linear model in float64, x drawn from it with its z, and the prior as q."""
    torch.manual_seed(0)
    model = Linear((5,), 2, SCALE, Gaussian("fixed", 0.6, 0.9), 0.3).double().requires_grad_(False)
    z = SCALE * torch.randn(num_examples, 2, dtype=torch.float64)
    x = model.likelihood.sample(model.predict(z), torch.Generator().manual_seed(1))
    return model, x, z, DiagonalGaussian(torch.zeros_like(z), torch.full_like(z, SCALE**2))


def test_the_schedule_rises_from_0_to_1_slowly_at_both_ends():
    assert schedule(1) == [0.0, 1.0]
    steps = torch.tensor(schedule(50)).diff()
    assert len(steps) == 50 and (steps > 0).all() and float(steps.sum()) == pytest.approx(1)
    assert torch.allclose(steps, steps.flip(0), atol=1e-6) and steps[0] < steps[25] / 10


def test_one_temperature_is_importance_sampling():
    model, x, _, q = linear(6)
    found = ais(20, 1).bounds(model, x, q, 0, "t")
    path = Annealing(model, x, q, 3)
    counts = (8, 8, 4)  # chains at once
    u = torch.cat([path.normal(n, generator(0, f"ais/t/forward/{i}")) for i, n in enumerate(counts)])
    z = q.rsample(u)
    log_w = torch.stack([model.log_joint(x, each) - q.log_prob(each) for each in z])
    assert torch.allclose(found.lower, torch.logsumexp(log_w, 0) - math.log(20), atol=1e-10)
    weights = log_w.softmax(0)
    assert torch.allclose(found.effective_samples, 1 / weights.square().sum(0), rtol=1e-9)


@pytest.mark.parametrize("backward", [False, True])
def test_weights_are_unbiased_though_moves_are_often_rejected(backward):
    """E[w] = p(x) forward, E[1/w] = 1/p(x) backward from exact draws, at steps of which a Metropolis test matters."""
    model, x, _, q = linear(1)
    count, temperatures = 30_000, schedule(6)
    path, source = Annealing(model, x, q, 2), generator(0, "test/weights")
    steps = [torch.tensor([1.4 * (1 - 0.8 * b)], dtype=torch.float64) for b in temperatures[1:-1]]
    z = model.posterior(x).sample((count,)) if backward else None
    u = path.whiten(z) if backward else path.normal(count, source)
    log_w, acceptance = path.log_weights(u, temperatures, steps, source, backward=backward)
    ratio = torch.exp((model.log_evidence(x) - log_w) * (1 if backward else -1))
    error = float(ratio.std()) / math.sqrt(count)
    assert error < 0.05 and abs(float(ratio.mean()) - 1) < 4 * error
    assert 0.3 < float(acceptance) < 0.9


def test_bounds_enclose_the_evidence_and_tighten_with_chains_and_temperatures():
    model, x, z, q = linear(200)
    exact = model.log_evidence(x)
    lower, upper = [], []
    for num_chains, num_temperatures in ((1, 1), (1, 10), (8, 10), (8, 30)):
        found = ais(num_chains, num_temperatures).bounds(model, x, q, 0, "t", z)
        lower.append(float((found.lower - exact).mean()))
        upper.append(float((found.upper - exact).mean()))
        assert float((found.lower - exact).mean()) < 3 * float((found.lower - exact).std()) / math.sqrt(200)
        assert found.effective_samples.min() >= 1 - 1e-9 and found.effective_samples.max() <= num_chains + 1e-9
    assert lower == sorted(lower) and upper == sorted(upper, reverse=True)
    assert -0.1 < lower[-1] < 0.03 and -0.03 < upper[-1] < 0.25


class Squared(nn.Module):
    """x = z² + noise of variance 1/4, z ~ N(0, 1): no posterior is Gaussian."""

    def log_joint(self, x, z):
        square = z.square() + 4 * (x - z.square()).square()
        return (-0.5 * square - LOG_2PI + math.log(2)).sum(1)


def test_weights_from_a_free_q_are_unbiased(monkeypatch):
    """The noise of the fit is another than that of the weights; p(x) by quadrature."""
    monkeypatch.setattr("lpc_runner.evaluation.ais.FREE", FreeFit(60, 4, 0.05))
    count, model, free = 10_000, Squared(), ais(1, 4, start="free")
    x = torch.full((count, 1), 0.3, dtype=torch.float64)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    exact = torch.logsumexp(model.log_joint(x[:1], grid), 0) + math.log(12 / 4000)
    q = free.free_q(model, x, DiagonalGaussian(torch.zeros_like(x), torch.ones_like(x)), 0)
    assert len(q.mean.unique()) == count and q.variance.max() < 1  # every example has a q of its own, none is the prior
    ratio = torch.exp(free.bounds(model, x, q, 0, "t").lower - exact)
    error = float(ratio.std()) / math.sqrt(count)
    assert error < 0.02 and abs(float(ratio.mean()) - 1) < 4 * error


def test_the_work_of_a_free_q_is_bounded_beforehand(monkeypatch):
    """Also where every pass takes equally long, however few its chains are, as on a large GPU."""
    monkeypatch.setattr("lpc_runner.evaluation.ais.FREE", FreeFit(10, 8, 0.02))
    model, x, _, q = linear(2)
    free, prior = ais(16, 40, start="free"), ais(16, 40)
    passes, joint = [], model.log_joint
    monkeypatch.setattr(model, "log_joint", lambda *given: passes.append(1) or joint(*given))
    free.free_q(model, x, q, 0)
    more = free.num_moves(model, backward=False) - prior.num_moves(model, backward=False)
    assert 40 * 3 + 10 < len(passes) <= 3 * more


def test_a_linear_system_is_what_the_kalman_filter_says():
    torch.manual_seed(3)
    model = lds().eval().requires_grad_(False)
    z = torch.randn(16, model.latent_dim, dtype=torch.float64)
    x = model.likelihood.sample(model.predict(z), torch.Generator().manual_seed(1))
    prior = DiagonalGaussian(torch.zeros_like(z), torch.ones_like(z))
    exact = log_likelihood(model, x)
    found = ais(8, 30).bounds(model, x, prior, 0, "t", z)
    assert -0.5 < float((found.lower - exact).mean()) < 0.1
    assert -0.1 < float((found.upper - exact).mean()) < 0.8
    assert 0.5 < float(found.acceptance.mean()) < 0.8  # the pilots found steps for TARGET
