"""Langevin predictive coding on the linear model finds probabilistic PCA, as scikit-learn computes it."""

import math

import pytest
import torch
from sklearn.decomposition import PCA

from lpc_runner.base.distributions import Gaussian
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import Fisher, Identity
from lpc_runner.inference.samplers import Langevin
from lpc_runner.inference.step_sizes import Annealed, Constant
from lpc_runner.models.dense import Linear
from lpc_runner.training.learner import AdamOptimizer, Learner

DATA_DIM, LATENT_DIM, NUM_EXAMPLES, NUM_UPDATES = 8, 2, 1000, 300


def observed():
    """x, 1000 of 8 numbers: two factors of variance 4 and 2.25 above a noise of sd .8, about a mean that is not 0."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(DATA_DIM, LATENT_DIM))[0]
    z = torch.randn(NUM_EXAMPLES, LATENT_DIM) * torch.tensor([2.0, 1.5])
    return z @ basis.T + 0.8 * torch.randn(NUM_EXAMPLES, DATA_DIM) + torch.linspace(-0.5, 0.5, DATA_DIM)


def test_persistent_chains_of_one_step_recover_probabilistic_pca():
    """method=lpc_persistent, without an encoder: mean log p(x) within 0.025 nats of the maximum.

    At the end γ' = γλG is under .1, which is 5 % of the chain's variance, and 0.003 nats.
    """
    x = observed()
    best = PCA(LATENT_DIM, svd_solver="full").fit(x.numpy()).score(x.numpy())
    model = Linear((DATA_DIM,), LATENT_DIM, 1.0, Gaussian("learned", 1.5, 0.9), 0.3)
    sampler = Langevin(1, "all", Annealed(1.0, 0.1, 40.0, 10), Fisher(0.99, 1.0), start="persistent")
    optimizer = AdamOptimizer(2e-2, [0.9, 0.999], 1e-8)
    learner = Learner(model, None, sampler, WeightedKL(0.0, 0.0), optimizer, num_train=NUM_EXAMPLES)
    start = model.log_evidence(x).mean().item()
    for update in range(900):
        if update == 600:
            learner.theta_optimizer.param_groups[0]["lr"] = 2e-3
        if update % 4 == 0:
            order = torch.randperm(NUM_EXAMPLES).view(4, -1)
        index = order[update % 4]
        batch = Batch(x[index], index)
        gradients = learner.gradients(batch, 0, update, False)
        assert gradients.finite and gradients.num_evaluations == len(index)
        learner.apply(batch, gradients)
    assert start < best - 1
    assert model.log_evidence(x).mean().item() == pytest.approx(best, abs=0.025)


@pytest.mark.parametrize(
    "forward, reverse",
    [pytest.param(0.5, 0.5, id="jeffreys", marks=pytest.mark.slow), pytest.param(0.0, 1.0, id="reverse")],
)
def test_lpc_recovers_probabilistic_pca(forward, reverse):
    """Mean log p(x) of the training data within 0.025 nats of the maximum; W's span, σ² and b with it.

    The chain's posterior covariance is 2 (P(2I - γP))⁻¹: expectation-maximisation with it in place of P⁻¹
    ends 0.005 nats below the maximum, σ² 3 % above, at γ = .03 (0.047 and 10 % at γ = .1). The rest is
    unfinished training: 0.012 nats in all after these 300 updates of 500 examples.
    """
    x = observed()
    pca = PCA(LATENT_DIM, svd_solver="full").fit(x.numpy())
    best = pca.score(x.numpy())

    model = Linear((DATA_DIM,), LATENT_DIM, 1.0, Gaussian("learned", 1.5, 0.9), 0.3)
    sampler = Langevin(20, "all", Constant(0.03), Identity())
    learner = Learner(
        model, model.build_encoder(), sampler, WeightedKL(forward, reverse), AdamOptimizer(5e-2, [0.9, 0.999], 1e-8)
    )
    start = model.log_evidence(x).mean().item()
    for update in range(NUM_UPDATES):
        if update == 180:
            for optimizer in (learner.theta_optimizer, learner.phi_optimizer):
                optimizer.param_groups[0]["lr"] = 2e-3
        index = torch.randint(NUM_EXAMPLES, (500,))
        batch = Batch(x[index], index)
        gradients = learner.gradients(batch, 0, update, update < 50)
        assert gradients.finite
        learner.apply(batch, gradients)

    assert start < best - 1
    assert model.log_evidence(x).mean().item() == pytest.approx(best, abs=0.025)
    weight = model.decoder[0].weight.detach().double()
    components = torch.from_numpy(pca.components_).double()
    cosines = torch.linalg.svdvals(components @ torch.linalg.qr(weight)[0])
    assert cosines.min() > 0.99  # of the angles between the two planes
    assert math.exp(2 * model.likelihood.log_scale.item()) == pytest.approx(pca.noise_variance_, rel=0.1)
    torch.testing.assert_close(model.decoder[0].bias.detach(), torch.from_numpy(pca.mean_).float(), atol=0.05, rtol=0)
