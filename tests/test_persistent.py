"""Persistent chains: one long chain per training example, whatever the order, the engine and the number of updates."""

from __future__ import annotations

import copy

import pytest
import torch

from lpc_runner.base.distributions import Gaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Batch, Batches, Split
from lpc_runner.inference.chain import ChainNoise, run_chain
from lpc_runner.inference.context import PersistentStates
from lpc_runner.inference.engine import Blocked, Eager
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import Fisher, Identity
from lpc_runner.inference.samplers import MALA, Langevin
from lpc_runner.inference.step_sizes import Adapted, Annealed, Constant
from lpc_runner.models.dense import Linear
from lpc_runner.training.learner import AdamOptimizer, Learner

DATA_DIM, LATENT_DIM = 5, 2


def persistent(step_size, metric, num_steps=1, **settings):
    return Langevin(num_steps, "all", step_size, metric, start="persistent", **settings)


def learner_of(sampler, num_train, weights=(0.0, 0.0), engine=None, fixed=False):
    """On probabilistic PCA; fixed: θ does not learn."""
    torch.manual_seed(0)
    model = Linear((DATA_DIM,), LATENT_DIM, 1.3, Gaussian("fixed", 0.5, 0.9), 0.3)
    encoder = model.build_encoder().double() if any(weights) else None
    optimizer = AdamOptimizer(1e-2, [0.9, 0.999], 1e-8)
    engine = engine or Eager()
    learner = Learner(
        model.double(), encoder, sampler, WeightedKL(*weights), optimizer, engine=engine, num_train=num_train
    )
    if fixed:
        learner.theta_optimizer.step = lambda: None
    return learner


def data(num_examples):
    x = torch.randn(num_examples, DATA_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(x, torch.arange(num_examples))


def advance(learner, batch, update, first_epoch=False, from_prior=False):
    gradients = learner.gradients(batch, 3, update, from_prior, first_epoch=first_epoch)
    assert bool(gradients.finite)
    learner.apply(batch, gradients)
    return gradients


@pytest.mark.parametrize("engine", [Eager, Blocked])
def test_one_step_per_visit_is_one_long_chain(engine):
    """Bit for bit, with θ held and the same noise; first visits start at the prior."""
    batch = data(6)
    learner = learner_of(persistent(Constant(0.01), Identity()), 6, engine=engine(), fixed=True)
    for update in range(20):
        advance(learner, batch, update)
    noise = [ChainNoise(3, update, (6, LATENT_DIM), "cpu", torch.float64) for update in range(20)]
    source = generator(3, "prior_start", 0)
    start = 1.3 * torch.randn(6, LATENT_DIM, generator=source, dtype=torch.float64)
    long = run_chain(
        lambda z: learner.model.log_joint(batch.x, z),
        start,
        Langevin(20, "all", Constant(0.01), Identity()),
        lambda t: noise[t - 1](1),
    )
    assert torch.equal(learner.kept.z, long.z)


class Numbers:
    """As much of a dataset as batches need."""

    name = "test"
    to_model = staticmethod(lambda values: values)


@pytest.mark.parametrize("order", ["shuffled", "stored"])
@pytest.mark.parametrize("metric", ["none", "fisher"])
def test_the_states_of_every_example_have_its_posterior(order, metric):
    """θ held: over many epochs the mean is μ(x) and the covariance that of the chain, V = A V Aᵀ + 2γG, A = 1 - γGP.

    For G = 1 that is 2 (P(2 - γP))⁻¹, the posterior's as γ -> 0. Over n = 150 epochs of 600 examples the pooled
    covariance is known to 1 %. The mean of an example's n states has the covariance Σ_st A^|s-t| V / n² about μ(x), for
    its states are one chain: known to 6 % from 600 examples.
    """
    num_examples, step_size = 600, {"none": 0.05, "fisher": 0.3}[metric]
    batch, used = data(num_examples), Fisher(0.9, 1.3) if metric == "fisher" else Identity()
    learner = learner_of(persistent(Constant(step_size), used), num_examples, fixed=True)
    batches = Batches(Split(batch.x), Numbers(), num_examples // 2, 0)
    states, update = [], 0
    for epoch in range(200):
        for position in range(2):
            if order == "stored":
                index = torch.arange(num_examples // 2) + position * (num_examples // 2)
                part = Batch(batch.x[index], index)
            else:
                part = batches.batch(epoch, position)
            advance(learner, part, update)
            update += 1
        if epoch >= 50:
            states.append(learner.kept.z.clone())
    posterior = learner.model.posterior(batch.x)
    away = torch.stack(states) - posterior.mean.detach()
    precision = posterior.precision_matrix[0].detach()
    identity = torch.eye(LATENT_DIM, dtype=torch.float64)
    scale = identity if metric == "none" else used.init(away[0])[0].diag()
    move, want = identity - step_size * scale @ precision, torch.zeros_like(precision)
    for _ in range(1000):
        want = move @ want @ move.T + 2 * step_size * scale
    if metric == "none":
        torch.testing.assert_close(want, 2 * torch.linalg.inv(precision @ (2 * identity - step_size * precision)))
        torch.testing.assert_close(want, torch.linalg.inv(precision), rtol=0.2, atol=0.02)
    rows = away.flatten(0, 1)
    found = rows.T @ rows / len(rows)
    torch.testing.assert_close(found, want, rtol=0.03, atol=0.01 * float(want.diagonal().mean()))
    n = len(states)
    powers = torch.stack([(n - k) * torch.linalg.matrix_power(move, k) for k in range(1, n)]).sum(0) @ want
    of_mean = (n * want + powers + powers.T) / n**2
    torch.testing.assert_close(away.mean(0).square().mean(0), of_mean.diagonal(), rtol=0.25, atol=0)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5)])
def test_every_engine_makes_the_same_persistent_training(weights):
    """With a metric, a step size and states that change between updates, first visits longer than others."""
    found = []
    for engine in (Eager(), Blocked()):
        sampler = persistent(Annealed(0.5, 0.05, 2.0, 4), Fisher(0.9, 1.3), 2, first_steps=5)
        learner = learner_of(sampler, 12, weights, engine)
        for update in range(12):
            rows = torch.randperm(12, generator=torch.Generator().manual_seed(update))[:6]
            if update < 2:
                rows = torch.arange(6) + 6 * update
            batch = Batch(data(12).x[rows], rows)
            gradients = advance(learner, batch, update, first_epoch=update < 2)
            steps = 5 if update < 2 else 2
            assert gradients.num_evaluations == 6 * (steps + (weights[1] > 0))  # log p at z ~ q for reverse KL
        found.append((learner.kept.z, learner.model.state_dict(), gradients.scalars))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)
    assert found[0][0].isfinite().all()


def test_forward_kl_teaches_an_encoder_that_does_not_touch_the_chain():
    """The states and θ are bit for bit those of objective=prior."""
    learners = []
    for weights in ((0.0, 0.0), (1.0, 0.0)):
        sampler = persistent(Constant(0.01), Identity(), first_start="prior")
        learners.append(learner_of(sampler, 6, weights))
        before = [p.clone() for p in learners[-1].encoder.parameters()] if any(weights) else []
        for update in range(5):
            gradients = advance(learners[-1], data(6), update)
            assert gradients.num_evaluations == 6 and "train/elbo" not in gradients.scalars
    plain, taught = learners
    assert torch.equal(plain.kept.z, taught.kept.z)
    assert all(map(torch.equal, plain.model.parameters(), taught.model.parameters()))
    assert not any(map(torch.equal, before, taught.encoder.parameters()))


@pytest.mark.parametrize(
    "first_start, from_prior, prior", [("encoder", False, False), ("prior", False, True), ("encoder", True, True)]
)
def test_first_visits_start_where_they_are_told(first_start, from_prior, prior):
    """z(0) of an example that comes anew is that of a run without memory; of one that was there, its last z."""
    sampler = persistent(Constant(0.01), Identity(), first_start=first_start)
    learner = learner_of(sampler, 6, (0.5, 0.5))
    seen = data(6)
    advance(learner, Batch(seen.x[:3], torch.tensor([0, 1, 2])), 0)
    kept = learner.kept.z.clone()
    assert kept[:3].isfinite().all() and kept[3:].isnan().all()
    starts = []
    observe = lambda state, info: starts.append(state.z)
    mixed = Batch(seen.x[[4, 1, 0]], torch.tensor([4, 1, 0]))
    learner.sampler.step_size.value = 1e-30  # steps that do not move
    learner.gradients(mixed, 3, 1, from_prior, observe)
    assert torch.equal(learner.kept.z.nan_to_num(), kept.nan_to_num())  # only an update that is made counts
    plain = learner_of(
        Langevin(1, "all", Constant(1e-30), Identity(), start="prior" if prior else "encoder"), None, (0.5, 0.5)
    )
    plain.encoder.load_state_dict(learner.encoder.state_dict())
    plain.gradients(mixed, 3, 1, False, observe)
    torch.testing.assert_close(starts[0][0], starts[1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(starts[0][1:], kept[[1, 0]], rtol=1e-12, atol=1e-12)


def test_start_prior_is_the_prior_in_every_update():
    found = []
    for start, from_prior in (("prior", False), ("encoder", True), ("encoder", False)):
        learner = learner_of(Langevin(3, "all", Constant(0.01), Identity(), start=start), None, (0.5, 0.5))
        found.append(advance(learner, data(6), 0, from_prior=from_prior).z)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_states_of_other_data_are_refused_in_one_line():
    like = torch.zeros(1)
    few, many = PersistentStates(4, 2, like), PersistentStates(5, 2, like)
    many.keep(torch.arange(5), torch.ones(5, 2))
    few_again = PersistentStates(5, 2, like)
    few_again.load_state_dict(many.state_dict())
    assert torch.equal(few_again.z, many.z)
    with pytest.raises(
        UserError, match="keeps z of 5 training examples, 2 numbers each, and here are 4 examples with 2"
    ):
        few.load_state_dict(many.state_dict())


def adapting(start, kind=MALA, engine=None):
    """Probabilistic PCA with θ held; G = 1."""
    sampler = kind(4, "all", Adapted(start, {MALA: None, Langevin: 0.8}[kind]), Identity())
    return learner_of(sampler, None, (0.0, 1.0), engine, fixed=True)


def step(learner, update):
    """As the trainer does."""
    gradients = learner.gradients(data(256), 3, update, False)
    if gradients.verdict():
        learner.apply(data(256), gradients)
    else:
        assert learner.pass_over(gradients)
    return gradients


@pytest.mark.parametrize("kind, factor", [(MALA, 0.01), (MALA, 100.0), (Langevin, 100.0)])
def test_an_adapted_step_size_finds_its_acceptance(kind, factor):
    """From a γ a hundred times too small or too large, within 10 % of that whose acceptance is the target.

    Chains that γ throws off teach nothing: until γ is in range no optimiser makes a step.
    """
    step_size, target = {MALA: (0.458, 0.574), Langevin: (0.327, 0.8)}[kind]  # by acceptances of constant γ
    learner, sizes, made = adapting(factor * step_size, kind), [], []
    learner.phi_optimizer.step = lambda: made.append(1)
    for update in range(25):
        gradients = step(learner, update)
        sizes.append(float(gradients.scalars["chain/step_size"]))
        assert update > 0 or bool(made) == (factor < 1)
    assert sizes[0] == pytest.approx(factor * step_size)
    assert sum(sizes[-5:]) / 5 == pytest.approx(step_size, rel=0.1)
    assert gradients.scalars["chain/acceptance"].item() == pytest.approx(target, abs=0.05)
    assert len(made) == 25 if factor < 1 else 15 < len(made) < 25


def test_an_adapted_step_size_is_changed_in_place_and_goes_on_from_a_checkpoint():
    straight, broken, blocks = adapting(5.0), adapting(5.0), adapting(5.0, engine=Blocked())
    held = straight.sampler.step_size(1)
    for update in range(8):
        step(straight, update), step(blocks, update)
        if update == 4:
            resumed = adapting(5.0)
            resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
            broken = resumed
        step(broken, update)
    assert held is straight.sampler.step_size(1) and held != 5
    torch.testing.assert_close(broken.state_dict(), straight.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(blocks.state_dict(), straight.state_dict(), rtol=1e-9, atol=1e-9)


def test_an_adapted_step_size_gives_up():
    """A model whose chains are lost at any γ: the run diverges, after as many updates as it says."""
    sizes, lost = Adapted(1.0, 0.6), {"acceptance": torch.tensor(0.0), "target": torch.tensor(0.6)}
    assert not sizes.usable(lost)
    answers = [sizes.pass_over(lost, torch.tensor(False)) for _ in range(Adapted.MAX_PASSED + 1)]
    assert answers == [True] * Adapted.MAX_PASSED + [False]


def test_an_annealed_step_size_falls_geometrically_and_is_changed_in_place():
    sizes = Annealed(1.0, 0.01, 2.0, 2)
    held, logged = sizes(1), []
    for _ in range(6):
        logged.append(float(held))
        sizes.observe({})
        assert float(sizes.scalars()["chain/step_size"]) == logged[-1]
    assert logged == pytest.approx([1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 0.01])
    other = Annealed(1.0, 0.01, 2.0, 2)
    other.load_state_dict({"made": 2})
    assert float(other(1)) == logged[2]
