"""IWAE, free q and gaps against the linear-Gaussian model, in which all of them are known."""

from __future__ import annotations

import kalman
import pytest
import torch
from sequence_models import FactorModel, Guess
from series import lds

from lpc_runner.base.distributions import DiagonalGaussian, Gaussian
from lpc_runner.evaluation.bounds import FreeFit, fit_free_posterior, importance_bound
from lpc_runner.evaluation.linear_gaussian import log_likelihood
from lpc_runner.models.dense import Linear

FIT = FreeFit(num_steps=600, num_samples=8, learning_rate=0.05)


@pytest.fixture(scope="module")
def linear():
    """A linear model in float64 with orthogonal columns, so that its exact posterior is a diagonal Gaussian."""
    torch.manual_seed(0)
    model = Linear((12,), 3, 1.5, Gaussian("fixed", 0.6, 0.9), 0.3).double()
    with torch.no_grad():
        model.decoder[0].weight.copy_(
            torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64))[0] * torch.tensor([2.0, 1, 0.5])
        )
    x = model.decode(1.5 * torch.randn(6, 3, dtype=torch.float64)) + 0.6 * torch.randn(6, 12, dtype=torch.float64)
    return model.requires_grad_(False), x.detach()


@pytest.fixture(scope="module")
def correlated():
    """A model whose posterior is correlated, with data drawn from it."""
    torch.manual_seed(1)
    model = FactorModel((6, 5)).double().requires_grad_(False)
    z = torch.randn(8, 4, dtype=torch.float64)
    return model, model.decode(z) + 0.7 * torch.randn(8, 6, 5, dtype=torch.float64)


def exact_posterior(model, x):
    posterior = model.posterior(x)
    return DiagonalGaussian(posterior.mean, torch.diagonal(posterior.covariance_matrix, dim1=-2, dim2=-1))


def evidence(model, x):
    """log p(x) of FactorModel: log p(x, z) - log p(z|x) at any z."""
    z = torch.zeros(len(x), model.latent_dim, dtype=x.dtype)
    return model.log_joint(x, z) - model.posterior(x).log_prob(z)


def best_factorised(model, x):
    """The maximiser of the ELBO over diagonal Gaussians: the exact mean, variances 1 / Λ_ii (Bishop 2006, 10.1.2)."""
    precision = model.posterior(x).precision_matrix
    return DiagonalGaussian(
        model.posterior(x).mean, (1 / torch.diagonal(precision, dim1=-2, dim2=-1)).expand(len(x), -1)
    )


def exact_elbo(model, x, q):
    """log p(x) - KL(q ‖ p(z|x)), the KL between Gaussians in closed form."""
    posterior = model.posterior(x)
    own = torch.distributions.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    return evidence(model, x) - torch.distributions.kl_divergence(own, posterior)


class TestImportance:
    def test_with_the_exact_posterior_every_weight_is_the_evidence(self, linear):
        model, x = linear
        for num_samples in (1, 7):
            found = importance_bound(model, x, exact_posterior(model, x), num_samples, seed=0)
            assert torch.allclose(found.iwae, model.log_evidence(x), atol=1e-9)
            assert torch.allclose(found.elbo, model.log_evidence(x), atol=1e-9)
            assert torch.allclose(found.effective_samples, torch.full((6,), float(num_samples)).double(), atol=1e-6)

    def test_it_rises_with_k_and_reaches_the_evidence(self, linear):
        model, x = linear
        x = x[:1].repeat(4000, 1)  # 4,000 independent estimates of one number
        truth = float(model.log_evidence(x[:1]))
        q = DiagonalGaussian(torch.zeros(4000, 3).double(), torch.full((4000, 3), 1.5**2).double())
        means, errors = [], []
        for num_samples in (1, 4, 16, 64):
            found = importance_bound(model, x, q, num_samples, seed=num_samples).iwae
            means.append(float(found.mean()))
            errors.append(float(found.std()) / 4000**0.5)
        for lower, higher, error in zip(means, means[1:], errors):
            assert higher > lower + 4 * error
        assert means[-1] < truth + 4 * errors[-1]
        weights = importance_bound(model, x[:1], DiagonalGaussian(q.mean[:1], q.variance[:1]), 100_000, seed=1)
        assert float(weights.iwae) == pytest.approx(truth, abs=0.1)

    def test_effective_samples_of_known_weights(self, linear):
        """Weights 1, 1, 1, 0: three of four count."""
        model, x = linear
        weights = iter(torch.tensor([[0.0], [0.0], [0.0], [-1e4]], dtype=torch.float64))

        class Known(type(model)):
            def log_joint(self, x, z):
                return torch.cat([next(weights) for _ in range(len(z))]) + q.log_prob(z)

        q = DiagonalGaussian(torch.zeros(1, 3).double(), torch.ones(1, 3).double())
        model = Known((12,), 3, 1.0, Gaussian("fixed", 1.0, 0.9), 0.3).double()
        found = importance_bound(model, x[:1], q, 4, seed=0)
        assert float(found.effective_samples) == pytest.approx(3)
        assert float(found.iwae) == pytest.approx(torch.tensor(0.75).log().item(), abs=1e-6)

    def test_rows_at_once_change_nothing(self, correlated):
        model, x = correlated
        q = Guess(model).double()(_batch(x))
        one, other = (importance_bound(model, x, q, 30, 0, rows=rows) for rows in (8, 1000))
        assert torch.allclose(one.iwae, other.iwae, atol=1e-10) and torch.allclose(one.elbo, other.elbo, atol=1e-10)

    def test_elbo_is_the_closed_form_in_the_mean(self, correlated):
        model, x = correlated
        q = best_factorised(model, x)
        found = importance_bound(model, x, q, 20_000, seed=0)
        assert torch.allclose(found.elbo, exact_elbo(model, x, q), atol=0.05)


def _batch(x):
    from lpc_runner.data.dataset import Batch

    return Batch(x, torch.arange(len(x)))


class TestFreePosterior:
    def test_it_reaches_the_best_factorised_gaussian(self, correlated):
        model, x = correlated
        best = best_factorised(model, x)
        start = DiagonalGaussian(torch.zeros(8, 4).double(), torch.ones(8, 4).double())
        found = fit_free_posterior(model, x, start, 0, FIT)
        assert torch.allclose(found.q.mean, best.mean, atol=0.03)
        assert torch.allclose(found.q.variance, best.variance, rtol=0.1)
        gained = exact_elbo(model, x, best) - exact_elbo(model, x, found.q)
        assert (gained > -1e-9).all() and gained.max() < 0.01
        assert found.drift.abs().max() < 0.05

    def test_the_gaps_are_those_of_the_closed_form(self, correlated):
        model, x = correlated
        q = Guess(model).double().requires_grad_(False)(_batch(x))
        found = fit_free_posterior(model, x, q, 0, FIT)
        free, encoder = (importance_bound(model, x, each, 5000, seed=0) for each in (found.q, q))
        best = best_factorised(model, x)
        # For a Gaussian posterior, log p(x) - max_q ELBO = (Σ log Λ_ii - log |Λ|) / 2 whatever x.
        precision = model.posterior(x).precision_matrix
        approximation = 0.5 * (torch.diagonal(precision, dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))
        assert approximation.min() > 0.1
        assert torch.allclose(evidence(model, x) - free.elbo, approximation, atol=0.06)
        amortisation = exact_elbo(model, x, best) - exact_elbo(model, x, q)
        assert torch.allclose(free.elbo - encoder.elbo, amortisation, rtol=0.05, atol=0.1)
        assert (free.elbo >= encoder.elbo).all()

    def test_drift_tells_a_fit_that_was_stopped_early(self, correlated):
        model, x = correlated
        start = DiagonalGaussian(torch.full((8, 4), 5.0).double(), torch.ones(8, 4).double())
        found = fit_free_posterior(model, x, start, 0, FreeFit(10, 4, 0.02))
        assert found.drift.min() > 0.1

    @pytest.mark.parametrize("linear_gaussian", [True, False])
    def test_without_an_encoder_the_best_q_is_found_from_the_prior(self, linear_gaussian, monkeypatch):
        """A posterior a hundred times narrower than the prior: in closed form, or by a first fit with larger steps;
        one fit from the prior ends nats below."""
        torch.manual_seed(2)
        model = lds(num_steps=12)
        with torch.no_grad():
            model.likelihood.log_scale.fill_(-3)
            x = model.decode(torch.randn(4, model.latent_dim, dtype=torch.float64))
        best = log_likelihood(model, x) - kalman.approximation_gap(model)
        monkeypatch.setattr("lpc_runner.evaluation.linear_gaussian.is_linear_gaussian", lambda model: linear_gaussian)
        ones = torch.ones(4, model.latent_dim, dtype=torch.float64)
        prior = DiagonalGaussian(0 * ones, ones)
        fit = FreeFit(250, 8, 0.02)
        elbo = lambda q: importance_bound(model, x, q, 4000, 0).elbo
        found = elbo(fit(model, x, None, 0).q)
        assert torch.allclose(found, best, atol=0.5 if linear_gaussian else 2)
        if not linear_gaussian:
            assert (elbo(fit(model, x, prior, 0).q) < best - 10).all()

    def test_trials_do_not_disturb_one_another(self, correlated):
        model, x = correlated
        start = DiagonalGaussian(torch.zeros(8, 4).double(), torch.ones(8, 4).double())
        poisoned = x.clone()
        poisoned[1] = 1e3
        one, other = (fit_free_posterior(model, each, start, 0, FreeFit(20, 8, 0.05)) for each in (x, poisoned))
        assert torch.equal(one.q.mean[0], other.q.mean[0]) and not torch.equal(one.q.mean[1], other.q.mean[1])

    def test_the_model_gets_no_gradient(self, correlated):
        model, x = correlated
        model.requires_grad_(True)
        start = DiagonalGaussian(torch.zeros(8, 4).double(), torch.ones(8, 4).double())
        fit_free_posterior(model, x, start, 0, FreeFit(2, 2, 0.02))
        assert all(parameter.grad is None for parameter in model.parameters())
        model.requires_grad_(False)
