"""Hierarchies of latents against closed forms: linear levels, changes of variables, quadrature, one-level models."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import cells_of, only_run, result_of, rows_of
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from lpc_runner.base.distributions import Bernoulli, DiagonalGaussian, DiscretisedGaussian, Gaussian
from lpc_runner.base.errors import UserError
from lpc_runner.config.build import build
from lpc_runner.data.dataset import Batch
from lpc_runner.evaluation.ais import AnnealedImportance
from lpc_runner.evaluation.bounds import importance_bound
from lpc_runner.inference.chain import ChainNoise, run_chain
from lpc_runner.inference.context import Context
from lpc_runner.inference.engine import Blocked, Eager
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import EncoderVariance, Identity
from lpc_runner.inference.samplers import Langevin, NoSteps
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.conv import Conv
from lpc_runner.models.dense import MLP
from lpc_runner.models.hierarchical import UNIT_SCALE, Hierarchical
from lpc_runner.paper.quality_figures import level_pictures
from lpc_runner.store.log import rows_of as rows_with_pictures
from lpc_runner.store.runs import RunDirectory
from lpc_runner.study.study import read_study
from lpc_runner.testing import check_objective
from lpc_runner.training.learner import AdamOptimizer, Learner
from lpc_runner.training.update import UpdateNoise


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def hierarchy(shape=(1, 2, 3), levels=(3, 2), maps=None, likelihood=None, **settings):
    defaults = {"hidden": [5], "between": [4], "activation": "tanh", "skip": True, "encoder": "top_down"}
    maps = None if maps is None else list(maps)
    likelihood = likelihood or Gaussian("learned", 0.5, 0.9)
    return Hierarchical(shape, list(levels), maps, likelihood, 0.3, **(defaults | settings))


def batch_of(model_shape=(1, 2, 3), count=4, dtype=torch.float64):
    return Batch(torch.randn(count, *model_shape, dtype=dtype), torch.arange(count))


def latents_of(model, e):
    """z_1 .. z_L of flat e (B, latent_dim)."""
    parts = model.split(e)
    return model.descend(lambda level, _: parts[level])[0]


# A linear Gaussian model.


def linear(levels, data_dim=5, **settings):
    """Linear maps and constant scales, as x = W e + b + ε; returns the model, W and b."""
    model = hierarchy((data_dim,), levels, hidden=[], between=[], likelihood=Gaussian("fixed", 1.0, 0.9), **settings)
    model = model.double()
    with torch.no_grad():
        for width, layers in zip(levels, model.above):
            layers[0].weight[width:] = 0
        for parameter in model.parameters():
            parameter.mul_(2.0)
    to_latents, offsets, scales = [], [], []
    dim = sum(levels)
    for level in reversed(range(len(levels))):
        own = torch.eye(dim, dtype=torch.float64)[list(model.blocks.values())[level]]
        if level == len(levels) - 1:
            to_latents, offsets = [own], [torch.zeros(levels[-1], dtype=torch.float64)]
            continue
        layer, width = model.above[level][0], levels[level]
        scales = torch.log1p(torch.exp(layer.bias[width:] + UNIT_SCALE))
        above, offset = torch.cat(to_latents), torch.cat(offsets)
        to_latents.insert(0, layer.weight[:width] @ above + scales[:, None] * own)
        offsets.insert(0, layer.weight[:width] @ offset + layer.bias[:width])
    out = model.decoder[0]
    weight = out.weight @ torch.cat(to_latents)
    bias = out.weight @ torch.cat(offsets) + out.bias
    return model, weight.detach(), bias.detach()


def posterior_of(model, weight, bias, x):
    precision = weight.T @ weight + torch.eye(model.latent_dim, dtype=torch.float64)
    mean = torch.linalg.solve(precision, weight.T @ (x - bias).T).T
    return MultivariateNormal(mean, precision_matrix=precision.expand(len(x), -1, -1))


def evidence_of(weight, bias, x):
    covariance = weight @ weight.T + torch.eye(len(bias), dtype=torch.float64)
    return MultivariateNormal(bias, covariance).log_prob(x)


def test_linear_levels_are_one_linear_gaussian_model():
    """log p(x, e) - log p(e|x) = log p(x) for every e, three levels; and IWAE from a wide q finds it."""
    model, weight, bias = linear([2, 2, 1])
    x = torch.randn(4, 5, dtype=torch.float64)
    posterior, evidence = posterior_of(model, weight, bias, x), evidence_of(weight, bias, x)
    for scale in (0.1, 1.0, 4.0):
        e = scale * torch.randn(4, 5, dtype=torch.float64)
        torch.testing.assert_close(model.log_joint(x, e) - posterior.log_prob(e), evidence)
    wide = DiagonalGaussian(posterior.mean, 1.5 * posterior.covariance_matrix.diagonal(dim1=1, dim2=2))
    bound = importance_bound(model, x, wide, 1500, seed=0)
    torch.testing.assert_close(bound.iwae, evidence, atol=0.1, rtol=0)


def test_chain_has_the_posterior_of_all_levels():
    """Mean and covariance of e, and of the z of both levels: exact for unadjusted Langevin, whose width is known."""
    model, weight, bias = linear([2, 1])
    x = torch.randn(1, 5, dtype=torch.float64)
    posterior = posterior_of(model, weight, bias, x)
    precision, step, count = posterior.precision_matrix[0], 0.05, 1500
    exact = torch.linalg.inv(precision @ (torch.eye(3, dtype=torch.float64) - 0.5 * step * precision))
    start = posterior.sample((count,))[:, 0]
    noise, states = ChainNoise(0, 0, (count, 3), "cpu", torch.float64), []
    repeated = x.expand(count, -1)
    run_chain(
        lambda e: model.log_joint(repeated, e),
        start,
        Langevin(150, "last", Constant(step), Identity()),
        noise,
        on_step=lambda state, info: states.append(state.z) if state.t > 50 else None,
    )
    e = torch.cat(states)
    torch.testing.assert_close(e.mean(0), posterior.mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(e.T), exact, atol=0.03, rtol=0)
    jacobian = torch.autograd.functional.jacobian(
        lambda one: torch.cat(latents_of(model, one[None]), 1)[0], torch.zeros(3, dtype=torch.float64)
    )
    latents = torch.cat(latents_of(model, e), 1)
    torch.testing.assert_close(torch.cov(latents.T), jacobian @ exact @ jacobian.T, atol=0.06, rtol=0)


def test_a_top_down_q_that_is_the_posterior_has_constant_weights():
    """Heads set to p(e_2|x) and p(e_1|x, z_2), which a factorised q cannot be: every draw says log p(x)."""
    model, weight, bias = linear([1, 1])
    encoder = model.build_encoder().double()
    precision = weight.T @ weight + torch.eye(2, dtype=torch.float64)
    covariance, lift = torch.linalg.inv(precision), weight.T
    to_mean = covariance @ lift  # E[e|x] = to_mean (x - b)
    ratio = -precision[0, 1] / precision[0, 0]  # E[e_1 | x, e_2] = own (x - b) + ratio e_2
    own = lift[0] / precision[0, 0]
    raw = lambda variance: math.log(math.expm1(0.3 * variance)) / 0.3
    with torch.no_grad():
        low, top = encoder.heads[0][0], encoder.heads[1][0]
        for layer in (low, top):
            layer.weight.zero_()
        top.weight[0], top.bias[:] = to_mean[1], torch.tensor([-to_mean[1] @ bias, raw(covariance[1, 1].item())])
        low.weight[0, :5], low.weight[0, 5] = own, ratio
        low.bias[:] = torch.tensor([-own @ bias, raw(1 / precision[0, 0].item())])
    x = 2 * torch.randn(6, 5, dtype=torch.float64)
    q = encoder(Batch(x, torch.arange(6)))
    e = q.rsample(torch.randn(6, 2, dtype=torch.float64))
    torch.testing.assert_close(model.log_joint(x, e) - q.log_prob(e), evidence_of(weight, bias, x))
    bound = importance_bound(model, x, q, 3, seed=0)
    torch.testing.assert_close(bound.iwae, evidence_of(weight, bias, x))
    torch.testing.assert_close(bound.effective_samples, torch.full_like(bound.iwae, 3))


def test_annealing_from_a_top_down_q_encloses_the_evidence():
    """From the Gaussian along an untrained encoder's path of means; both bounds near log p(x), one alone is not."""
    model, weight, bias = linear([2, 1])
    model.requires_grad_(False)
    encoder, e = model.build_encoder().double().requires_grad_(False), torch.randn(40, 3, dtype=torch.float64)
    x = model.predict(e) + torch.randn(40, 5, dtype=torch.float64)
    q, evidence = encoder(Batch(x, torch.arange(40))), evidence_of(weight, bias, x).mean().item()
    gaps = []
    for num_temperatures in (1, 20):
        ais = AnnealedImportance(num_chains=8, num_temperatures=num_temperatures, num_leapfrog=3, start="encoder")
        found = ais.bounds(model, x, q, 0, "t", e)
        gaps.append((evidence - found.lower.mean().item(), found.upper.mean().item() - evidence))
    assert all(0 < gap < 1 for gap in gaps[1]) and min(gaps[0]) > 2


# Any hierarchy.


def by_hand(model, e):
    """z_1 .. z_L of a dense model with tanh, and m_l, s_l, written out."""
    parts, latents, laws = model.split(e), [], []
    for level in reversed(range(len(parts))):
        if not latents:
            latents, laws = [parts[level]], [(torch.zeros_like(parts[level]), torch.ones_like(parts[level]))]
            continue
        first, _, second = model.above[level]
        read = torch.cat(latents, 1) if model.skip else latents[0]
        out = torch.tanh(read @ first.weight.T + first.bias) @ second.weight.T + second.bias
        width = parts[level].shape[1]
        mean, scale = out[:, :width], torch.log1p(torch.exp(out[:, width:] + math.log(math.e - 1)))
        latents.insert(0, mean + scale * parts[level])
        laws.insert(0, (mean, scale))
    return latents, laws


@pytest.mark.parametrize("skip", [True, False])
def test_centred_and_noncentred_densities_agree(skip):
    """log p(e) = Σ_l log N(z_l; m_l, s_l²) + Σ log s_l, the change of variables; three levels."""
    model = hierarchy(levels=(3, 2, 2), skip=skip).double()
    e = torch.randn(6, 7, dtype=torch.float64)
    latents, laws = by_hand(model, e)
    for ours, theirs in zip(latents_of(model, e), latents):
        torch.testing.assert_close(ours, theirs)
    centred = sum(Normal(*law).log_prob(z).sum(1) for z, law in zip(latents, laws))
    volume = sum(scale.log().sum(1) for _, scale in laws)
    torch.testing.assert_close(model.prior.log_prob(e), centred + volume)


@pytest.mark.parametrize("shape, levels, maps", [((1, 2, 3), (3, 2), None), ((3, 32, 32), (2, 3, 4), (8, 4, 1))])
@pytest.mark.parametrize("skip", [True, False])
@torch.no_grad()
def test_without_skip_the_lowest_level_is_all_that_x_reads(shape, levels, maps, skip):
    """Two e with the same z_1 and different levels above."""
    model = hierarchy(shape, levels, maps, skip=skip).double()
    e, other = (torch.randn(3, model.latent_dim, dtype=torch.float64) for _ in range(2))
    wanted, lowest = latents_of(model, e)[0], model.blocks["level_1"]
    at = []
    for value in (0.0, 1.0):  # z_1 is a straight line in e_1
        other[:, lowest] = value
        at.append(latents_of(model, other)[0])
    other[:, lowest] = ((wanted - at[0]) / (at[1] - at[0])).flatten(1)
    torch.testing.assert_close(latents_of(model, other)[0], wanted)
    same = torch.allclose(model.decode(other), model.decode(e), rtol=1e-8, atol=1e-8)
    assert same == (not skip)


@pytest.mark.parametrize("encoder", ["factorised", "top_down"])
@pytest.mark.parametrize("likelihood", [DiscretisedGaussian("learned", 0.3, 0.9), Bernoulli()])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_one_level_is_mlp_and_conv_bit_for_bit(kind, likelihood, encoder):
    shape = (1, 4, 5) if kind == "mlp" else (3, 28, 28)
    torch.manual_seed(1)
    if kind == "mlp":
        flat = MLP(shape, 4, 1.0, likelihood, 0.3, [6, 7], "relu")
        theirs = flat.build_encoder()
    else:
        flat = Conv(shape, 4, 1.0, likelihood, 0.3)
        theirs = flat.build_encoder()
    torch.manual_seed(1)
    maps = None if kind == "mlp" else [1]
    model = hierarchy(shape, [4], maps, likelihood, hidden=[6, 7], activation="relu", encoder=encoder)
    ours = model.build_encoder()
    for one, other in ((model, flat), (ours, theirs)):
        assert list(one.state_dict()) == list(other.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    batch = Batch(torch.randint(2, (3, *shape)) * 2.0 - 1, torch.arange(3))
    q, other = ours(batch), theirs(batch)
    assert torch.equal(q.mean, other.mean) and torch.equal(q.variance, other.variance)
    z = q.rsample(torch.randn(3, 4))
    assert torch.equal(model.log_joint(batch.x, z), flat.log_joint(batch.x, z))
    assert model.factorised_q and list(model.blocks) == ["level_1"]


@pytest.mark.parametrize("side, maps", itertools.product((28, 32, 64), ((8, 4, 1), (8, 1), (4,))))
def test_levels_of_maps_fit_every_image(side, maps):
    """Values, and gradients with respect to every parameter and every coordinate of e; both encoders."""
    for encoder in ("factorised", "top_down"):
        model = hierarchy((3, side, side), range(2, 2 + len(maps)), maps, encoder=encoder)
        assert model.latent_dim == sum(width * at**2 for width, at in zip(range(2, 9), maps))
        batch, inference = batch_of((3, side, side), 2, torch.float32), model.build_encoder()
        q = inference(batch)
        e = q.rsample(torch.randn(2, model.latent_dim))
        assert q.mean.shape == e.shape == (2, model.latent_dim) and model.decode(e).shape == batch.x.shape
        loss = (model.log_joint(batch.x, e) - q.log_prob(e)).sum()
        found = torch.autograd.grad(loss, [e, *model.parameters(), *inference.parameters()])
        assert all(bool(gradient.any()) for gradient in found)


# The top-down encoder.


def test_log_q_integrates_to_one():
    """By a sum over a grid of two one-dimensional levels; q is not factorised, so that its marginals would not do."""
    model = hierarchy(levels=(1, 1)).double()
    encoder = model.build_encoder().double()
    with torch.no_grad():
        for parameter in encoder.heads.parameters():
            parameter.mul_(4)
    grid, width = torch.linspace(-15, 15, 301, dtype=torch.float64), 0.1
    points = torch.cartesian_prod(grid, grid)
    (x,) = batch_of(count=1).x
    q = encoder(Batch(x[None], torch.arange(1))).repeat(len(points))
    law = q.at(points)
    assert law.mean[:, 0].std() > 0.05 and law.variance[:, 0].std() > 0.01  # e_1 depends on z_2
    assert (q.log_prob(points).exp().sum() * width**2).item() == pytest.approx(1, abs=1e-6)


def test_a_draw_is_from_the_density():
    """log q(z) = log N(noise; 0, I) - Σ log σ_l at z = rsample(noise), by the Jacobian of the draw."""
    model = hierarchy(levels=(3, 2, 1)).double()
    encoder, batch = model.build_encoder().double(), batch_of(count=1)
    q, noise = encoder(batch), torch.randn(1, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda one: q.rsample(one[None])[0], noise[0])
    want = Normal(0.0, 1.0).log_prob(noise).sum() - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(q.log_prob(q.rsample(noise))[0], want)
    assert jacobian[:3, 3:].any() and not jacobian[3:, :3].any()  # the levels above reach those below alone


def langevin(num_steps=6):
    return Langevin(num_steps, "all", Constant(0.02), Identity())


@pytest.mark.parametrize("encoder", ["factorised", "top_down"])
def test_gradients_of_both_encoders_are_those_of_the_definitions(encoder):
    """½ KL(q ‖ p(z|x)) - ½ mean of log q at all six states, by automatic differentiation through the decoder."""
    model = hierarchy(encoder=encoder).double()
    inference, batch = model.build_encoder().double(), batch_of()
    noise = UpdateNoise(0, 3, (4, 5), "cpu", torch.float64)
    states = []
    context = Context(model, inference, langevin(), batch, noise, on_step=lambda state, info: states.append(state.z))
    found = WeightedKL(0.5, 0.5, 6).gradients(context)

    features = inference.trunk[0](batch.x) if encoder == "top_down" else None
    draws, parts = noise.normal("warm_start"), model.split(noise.normal("warm_start"))

    def laws(e):
        """q of e_1 and e_2, given e; the first by the model's z_2 = e_2."""
        if encoder == "factorised":
            mean, raw = inference.body(batch.x).chunk(2, 1)
            scale = torch.nn.functional.softplus(raw, 0.3).sqrt()
            return [Normal(mean[:, block], scale[:, block]) for block in model.blocks.values()]
        outs = inference.heads[0](torch.cat([features, e[1]], 1)), inference.heads[1](features)
        pairs = [out.chunk(2, 1) for out in outs]
        return [Normal(mean, torch.nn.functional.softplus(raw, 0.3).sqrt()) for mean, raw in pairs]

    top = laws([None, torch.zeros(4, 2, dtype=torch.float64)])[1]
    e_2 = top.loc + top.scale * parts[1]
    low = laws([None, e_2])[0]
    e_1 = low.loc + low.scale * parts[0]
    e = torch.cat([e_1, e_2], 1)
    kl = sum(kl_divergence(law, Normal(0.0, 1.0)).sum(1) for law in (low, top))
    reverse = kl - model.likelihood(batch.x, model.predict(e))
    log_q = [sum(law.log_prob(e).sum(1) for law, e in zip(laws(parts), parts)) for parts in map(model.split, states)]
    loss = 0.5 * reverse.mean() - 0.5 * torch.stack(log_q).mean()
    assert found.scalars["train/encoder_loss"].item() == pytest.approx(loss.item())
    assert len(states) == 6 and draws.shape == (4, 5)
    for ours, theirs in zip(found.phi, torch.autograd.grad(loss, list(inference.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs)
    blocks = [found.scalars[f"train/kl_level_{number}"] for number in (1, 2)]
    torch.testing.assert_close(torch.stack(blocks), torch.stack([kl_divergence(law, Normal(0.0, 1.0)).sum(1).mean()
                                                                 for law in (low, top)]))  # fmt: skip


def test_all_states_kept_one_by_one_are_the_two_sums():
    """Of a factorised q; and as many states as asked for, the last with them, in every engine."""
    model = hierarchy(encoder="factorised").double()
    inference, batch = model.build_encoder().double(), batch_of()
    noise = UpdateNoise(0, 3, (4, 5), "cpu", torch.float64)
    for kept in (7, 50):
        found = [
            WeightedKL(1.0, 0.0, count).gradients(Context(model, inference, langevin(7), batch, noise)).phi
            for count in (None, kept)
        ]
        torch.testing.assert_close(*found)
    chains = [
        engine.run(model.log_joint, (batch.x,), inference(batch).mean, langevin(70), noise.chain(), num_kept=4)
        for engine in (Eager(), Blocked())
    ]
    states = []
    run_chain(
        lambda z: model.log_joint(batch.x, z), inference(batch).mean, langevin(70), noise.chain(),
        on_step=lambda state, info: states.append(state.z),
    )  # fmt: skip
    wanted = [states[t - 1] for t in (17, 35, 52, 70)]
    assert all(torch.equal(torch.stack(chain.moments.kept), torch.stack(wanted)) for chain in chains)


def test_a_chain_that_settles_keeps_states_of_all_its_steps():
    """As many as asked for, evenly apart and the last with them, wherever the chain has ended; in every engine."""
    model = linear([2, 1])[0]
    x = torch.randn(8, 5, dtype=torch.float64)
    sampler = Langevin(200, "all", Constant(0.2), Identity(), stop="settled")
    for engine in (Eager(), Blocked()):
        chain = engine.run(
            model.log_joint, (x,), torch.zeros(8, 3, dtype=torch.float64), sampler,
            ChainNoise(0, 0, (8, 3), "cpu", torch.float64), num_kept=4,
        )  # fmt: skip
        assert chain.moments.count in (32, 64, 96, 128, 160, 192) and len(chain.moments.kept) == 4
        assert torch.equal(chain.moments.kept[-1], chain.z)
        assert len({float(z.sum()) for z in chain.moments.kept}) == 4


@pytest.mark.parametrize("objective", [WeightedKL(0.5, 0.5, 3), WeightedKL(0.0, 1.0)], ids=["jeffreys", "reverse"])
@pytest.mark.parametrize("maps", [None, (4, 1)], ids=["dense", "maps"])
def test_a_batch_over_ranks_is_the_batch(objective, maps):
    """The gradients of a batch are the means of its halves', and the parts of an update keep what they promise."""
    shape = (1, 28, 28) if maps else (1, 2, 3)
    check_objective(objective, hierarchy(shape, (2, 3), maps), batch_of(shape, 4, torch.float32))


def learner_of(objective, sampler):
    torch.manual_seed(0)
    model = hierarchy().double()
    return Learner(model, model.build_encoder().double(), sampler, objective, AdamOptimizer(1e-2, [0.9, 0.999], 1e-8))


@pytest.mark.parametrize("objective, sampler", [
    (WeightedKL(0.5, 0.5, 3), Langevin(6, "all", Constant(0.05), EncoderVariance(1.0))),
    (WeightedKL(0.0, 1.0), NoSteps(None, None)),
])  # fmt: skip
def test_training_resumes_bit_for_bit(objective, sampler):
    batch = batch_of(count=8)

    def advance(learner, first, last):
        for update in range(first, last):
            gradients = learner.gradients(batch, 0, update, False)
            assert bool(gradients.finite)
            learner.apply(batch, gradients)

    whole, first, second = (learner_of(objective, sampler) for _ in range(3))
    advance(whole, 0, 6)
    advance(first, 0, 3)
    second.load_state_dict(first.state_dict())
    advance(second, 3, 6)
    for one, other in ((whole.model, second.model), (whole.encoder, second.encoder)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Commands.


@pytest.mark.parametrize("words, message", [
    (("model.levels=[]",), "^model.levels must have a width for at least one level, got \\[\\]"),
    (("model.encoder=top_down", "objective=jeffreys"), "=jeffreys needs a factorised q: .*num_kept_states=10"),
    (("model.encoder=top_down", "objective=iwae", "sampler=none"), "objective=iwae needs a factorised q: .* has none$"),
    (("step_size=levels", "model.levels=[2,2,2]"), "step_size.values must name each block of z .*level_3"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(words, message, workplace):
    (cell,) = cells_of("model=hierarchical", "device=cpu", *words)
    with pytest.raises(UserError, match=message) as error:
        build(cell.cfg, cell.choices)
    assert "\n" not in str(error.value)


def test_levels_and_maps_that_do_not_fit():
    for given, message in (
        ({"levels": (3, 0)}, "levels must be a list, each an integer of at least 1, got"),
        ({"maps": (8, 4, 1)}, "maps must have one side for each level, 2 in all, got .8, 4, 1."),
        ({"maps": (1, 4)}, "maps must be sides of .1, 4, 8. that fall from level 1 up, as .8, 4, 1., got .1, 4."),
        ({"maps": (7, 1)}, "maps must be sides of .1, 4, 8."),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            hierarchy((3, 32, 32), **given)
    with pytest.raises(ValueError, match=r"^num_kept_states is of forward KL, whose weight is 0"):
        WeightedKL(0.0, 1.0, 3)
    for shape in ((3, 30, 30), (1, 28, 32), (64, 64)):
        with pytest.raises(ValueError, match=r"maps are of square images of .28, 32, 64. pixels"):
            hierarchy(shape, (2, 2), (4, 1))


def test_the_experiment_compares_at_equal_parameters_and_passes(workplace):
    for name, data_shape in (("hierarchy", (3, 32, 32)), ("hierarchy_small", (1, 28, 28))):
        cells = cells_of(f"experiment={name}", "method=vae,lpc_top_down", "seed=0")
        facts = {"data_shape": data_shape, "num_train": 1, "num_held_out": 0}
        built = [build(cell.cfg, cell.choices, facts) for cell in cells]
        assert sorted(len(one.model.levels) for one in built) == [1, 1, 2, 2, 3, 3]
        sizes = [sum(part.numel() for part in one.model.parameters()) for one in built]
        assert max(sizes) < 1.01 * min(sizes)
        assert len({max(1, one.sampler.num_steps) * one.trainer.num_epochs for one in built}) == 1


def test_the_page_has_a_hierarchy_of_ones_own():
    """docs/extending.md: its levels are drawn one given the other, and chains, encoder and objective take it."""
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    (imports,) = re.findall(r"`mine.py`:\n\n```python\n(.*?)\n\n\nclass ", page, re.S)
    (text,) = re.findall(r"```python\n(class TwoLevels.*?)```", page, re.S)
    found: dict = {}
    exec(imports + "\n" + text, found)
    model = found["TwoLevels"]((1, 2, 3), Gaussian("learned", 0.5, 0.9), 2)
    low, top = (torch.eye(4)[block] for block in model.blocks.values())
    moved = (
        model.decode(low[:1]) - model.decode(torch.zeros(1, 4)),
        model.decode(low[:1] + top[:1]) - model.decode(top[:1]),
    )
    torch.testing.assert_close(*moved)
    check_objective(WeightedKL(0.5, 0.5), model, batch_of(count=4, dtype=torch.float32))


def test_a_run_says_and_shows_its_levels(command):
    """Numbers and pictures of every level, in the folder, the log and the report."""
    settings = (
        "device=cpu", "tracker=none", "num_threads=1", "model=hierarchical", "model.levels=[3,2]", "model.hidden=[8]",
        "model.between=[4]", "model.encoder=top_down", "objective.num_kept_states=2", "step_size=levels",
        "preconditioning=fisher", "sampler.num_steps=3", "trainer.max_updates=2", "trainer.log_every=1",
        "traces.num_chains=2", "traces.grid_points=2", "metrics.num_samples=20", "metrics.max_references=20",
    )  # fmt: skip
    answer = command(*settings)
    assert answer.code == 0, answer.err
    run = only_run()
    metrics, last = result_of(run)["metrics"], rows_of(run)[-1]
    levels = [f"level_{number}" for number in (1, 2)]
    assert sum(metrics[f"kl_{level}"] for level in levels) == pytest.approx(metrics["kl"])
    assert sum(metrics[f"active_units_{level}"] for level in levels) == metrics["active_units"]
    assert sum(last[f"train/kl_{level}"] for level in levels) == pytest.approx(last["train/kl"], rel=1e-5)
    assert all(f"chain/fisher_{level}" in last for level in levels)
    pictures = {"level-1", "level-reconstructions"}
    assert {path.stem for path in (run / "samples").glob("level*")} == pictures
    assert pictures < set(rows_with_pictures(RunDirectory.open(run))[2].pictures)
    study = read_study(Path("outputs/default"))
    shown = {picture.name for picture in level_pictures("digits", study.of("digits"), study.warnings)}
    assert shown == {f"digits-{name}.png" for name in pictures} and not study.warnings
