"""Numbers about rates, and the evaluator that gathers them, on a model whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sequence_models import Exact, FactorModel

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.data.dataset import Data, Split
from lpc_runner.data.sequences import COUNTS, SERIES, SequenceDataset
from lpc_runner.evaluation import sequence_posterior as posterior
from lpc_runner.evaluation.evaluator import Setup
from lpc_runner.evaluation.sequence_metrics import SequenceQuality
from lpc_runner.inference.preconditioning import Identity
from lpc_runner.inference.samplers import Langevin, NoSteps
from lpc_runner.inference.step_sizes import Constant

SETTINGS = {
    "num_importance_samples": 50,
    "num_gap_trials": 6,
    "free_steps": 200,
    "free_samples": 4,
    "free_learning_rate": 0.05,
    "num_posterior_samples": 20,
    "every_epochs": 1,
}
SHAPE = (6, 8)


class Made(SequenceDataset):
    """Trials drawn from a FactorModel."""

    name, bin_seconds, shape, num_train = "made", 0.02, SHAPE, 20

    def __init__(self, model, num_held_out=0, num_test=10):
        source = torch.Generator().manual_seed(7)
        z = torch.randn(20 + num_test, model.latent_dim, generator=source)
        with torch.no_grad():
            rates, run = model.decode(z), model.run(z)
        self.kind, self.num_held_out = (COUNTS if model.counts else SERIES), num_held_out
        noise = 0.7 * torch.randn(rates.shape, generator=source)
        values = torch.poisson(rates, generator=source) if model.counts else rates + noise
        values = values.to(torch.uint8 if model.counts else torch.float32)
        extras = {"rates": rates, "latents": run.factors @ torch.ones(3, 2), "behaviour": 2 * run.factors[..., :1] + 1}
        extras["pulse_bin"] = run.factors[..., 0].abs().argmax(1)
        parts = [
            Split(values[rows], extras={name: value[rows] for name, value in extras.items()})
            for rows in (slice(20), slice(20, None))
        ]
        self.data = Data(*parts)

    def identity(self):
        return {"name": self.name}

    def prepare(self):
        pass

    def load(self):
        return self.data


def evaluator_of(dataset, seed=0, **settings):
    return SequenceQuality(**(SETTINGS | settings)).evaluator(Setup(dataset, dataset.data, None, "cpu", seed))


def langevin(num_steps=10):
    return Langevin(num_steps, "all", Constant(0.01), Identity())


@torch.enable_grad()
def most_likely(model, x):
    """A narrow q around the z that maximises log p(x|z)."""
    z = torch.zeros(len(x), model.latent_dim, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(300):
        loss = model.prior.log_prob(z).sum() - model.log_joint(x, z).sum()
        (z.grad,) = torch.autograd.grad(loss, [z])
        optimizer.step()
    return DiagonalGaussian(z.detach(), torch.full_like(z, 1e-4))


NO_STEPS = NoSteps(None, None)


class TestRSquared:
    def test_truth_has_one_and_mean_rates_have_zero(self):
        truth = torch.rand(5, 7, 3)
        assert posterior.r_squared(truth, truth) == 1
        mean = truth.double().mean((0, 1)).expand(truth.shape)
        assert posterior.r_squared(mean, truth) == pytest.approx(0, abs=1e-12)

    def test_known_value(self):
        """Truth 0, 2 and estimate 0, 1: error 1, scatter 2."""
        truth, estimate = torch.tensor([0.0, 2.0]).view(1, 2, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1)
        assert posterior.r_squared(estimate, truth) == pytest.approx(0.5)

    def test_knowing_how_active_a_neuron_is_earns_nothing(self):
        truth = torch.rand(5, 7, 3) + 100 * torch.arange(3)
        assert abs(posterior.r_squared(truth.double().mean((0, 1)).expand(truth.shape), truth)) < 1e-9

    def test_a_linear_map_is_found_and_an_unrelated_one_is_not(self):
        features = torch.randn(40, 10, 4)
        target = features @ torch.randn(4, 2) + 5
        assert posterior.linear_r_squared(features, target) > 0.999
        assert posterior.linear_r_squared(features, torch.randn(40, 10, 2)) < 0.05

    def test_the_predicted_half_is_not_the_fitted_one(self):
        """Features that name the trial fit anything: the held half must not profit."""
        features = torch.eye(40).unsqueeze(1).expand(40, 10, 40)
        assert posterior.linear_r_squared(features, torch.randn(40, 1, 1).expand(40, 10, 1)) < 0.1


class TestSpikes:
    def test_density_is_torchs(self):
        counts, rates = torch.poisson(torch.full((3, 4, 5), 2.0)), torch.rand(3, 4, 5) * 3
        expected = torch.distributions.Poisson(rates.double()).log_prob(counts.double()).sum((1, 2))
        assert torch.allclose(posterior.poisson_log_likelihood(counts, rates), expected)

    def test_a_rate_of_zero_explains_no_spikes_and_only_those(self):
        rates = torch.zeros(1, 1, 1)
        assert float(posterior.poisson_log_likelihood(torch.zeros(1, 1, 1), rates)) == 0
        assert float(posterior.poisson_log_likelihood(torch.ones(1, 1, 1), rates)) == -math.inf

    def test_mean_rates_have_zero_bits(self):
        counts = torch.poisson(torch.rand(10, 20, 3) * 2)
        mean = counts.double().mean((0, 1)).expand(counts.shape)
        assert posterior.bits_per_spike(counts, mean) == pytest.approx(0, abs=1e-12)

    def test_one_bit_where_a_neuron_fires_in_half_of_the_bins_it_could(self):
        """One spike in every second bin, rates 1 and 0 known: log 2 per spike over the mean rate of a half."""
        counts = torch.tensor([1.0, 0.0]).repeat(50).view(1, 100, 1)
        assert posterior.bits_per_spike(counts, counts) == pytest.approx(1)

    def test_pulses_within_one_bin(self):
        inputs = torch.zeros(4, 10, 2)
        for trial, peak in enumerate((3, 4, 5, 6)):
            inputs[trial, peak] = torch.tensor([0.0, -1.0])
        assert posterior.pulse_timing(inputs, torch.tensor([4, 4, 4, 4])) == 0.75


class TestEvaluator:
    def trained(self, model, sampler=NO_STEPS, encoder=True):
        return SimpleNamespace(model=model, encoder=model.build_encoder() if encoder else None, sampler=sampler)

    def test_a_gaussian_model_with_known_evidence(self):
        model = Exact(SHAPE)
        dataset = Made(model)
        numbers, facts = evaluator_of(dataset).final(self.trained(model))
        index = torch.linspace(0, 9, 6).round().long()
        x = dataset.data.test.values[index]
        assert numbers["log_evidence"] == pytest.approx(model.log_evidence(x).mean().item())
        precision = model.precision()
        gap = 0.5 * (torch.diagonal(precision).log().sum() - torch.logdet(precision)).item()
        assert numbers["approximation_gap"] == pytest.approx(gap, abs=0.25)
        assert numbers["amortisation_gap"] == pytest.approx(numbers["free_elbo"] - numbers["encoder_elbo"])
        assert numbers["encoder_elbo"] < numbers["encoder_iwae"] < numbers["log_evidence"] + 0.1
        assert numbers["free_elbo"] < numbers["free_iwae"] < numbers["log_evidence"] + 0.1
        assert numbers["kl"] == pytest.approx(numbers["kl_first"] + numbers["kl_rest"])
        assert numbers["sigma"] == pytest.approx(0.7)
        assert facts["num_trials"] == 10 and facts["num_gap_trials"] == 6
        assert set(facts["notes"]) <= set(numbers) and set(facts["ceilings"]) <= set(numbers)
        assert not any(name in numbers for name in ("bits_per_spike", "identity_overfit"))

    def test_bounds_without_known_evidence_use_the_better_iwae(self):
        model = FactorModel(SHAPE)
        numbers, _ = evaluator_of(Made(model)).final(self.trained(model))
        best = max(numbers["free_iwae"], numbers["encoder_iwae"])
        assert numbers["approximation_gap"] == pytest.approx(best - numbers["free_elbo"])

    def test_the_ceiling_is_what_the_true_rates_score(self):
        model = FactorModel(SHAPE, counts=True, num_held_out=2)
        dataset = Made(model, num_held_out=2)
        _, facts = evaluator_of(dataset).final(self.trained(model, langevin()))
        test = dataset.data.test
        truth = posterior.bits_per_spike(test.values[..., :6], test.extras["rates"][..., :6])
        assert facts["ceilings"]["bits_per_spike"] == facts["ceilings"]["chain_bits_per_spike"] == truth
        held_out = posterior.bits_per_spike(test.values[..., 6:], test.extras["rates"][..., 6:])
        assert facts["ceilings"]["cosmoothing_bits_per_spike"] == held_out
        log_p = posterior.poisson_log_likelihood(test.values[..., :6], test.extras["rates"][..., :6])
        index = torch.linspace(0, 9, 6).round().long()
        assert facts["ceilings"]["free_iwae"] == pytest.approx(float(log_p[index].mean()))
        assert facts["ceilings"]["elbo"] == pytest.approx(float(log_p.mean()))
        assert facts["ceilings"]["rates_r2"] == 1
        assert facts["ceilings"]["reconstruction"] == pytest.approx(float(log_p[index].mean()))

    def test_only_rates_that_follow_the_spikes_overfit(self):
        """The true model's own posterior scores as the true rates do, though its means score higher; a q that
        maximises the likelihood of the spikes alone, without the prior, is found out."""
        model = FactorModel(SHAPE, counts=True)
        dataset = Made(model, num_test=40)
        evaluator = evaluator_of(dataset, num_gap_trials=None)
        sound, facts = evaluator.final(self.trained(model, encoder=False))
        assert sound["spike_log_likelihood"] > facts["ceilings"]["spike_log_likelihood"]
        assert sound["identity_overfit"] == 0
        assert sound["reconstruction"] == pytest.approx(sound["free_elbo"] + sound["kl"], abs=0.05)

        greedy = self.trained(model)
        greedy.encoder.forward = lambda batch: most_likely(model, batch.x)
        assert evaluator.final(greedy)[0]["identity_overfit"] == 1

    @pytest.mark.parametrize("counts", [True, False])
    def test_held_out_neurons_are_never_seen(self, counts):
        """Other held-out values, even none at all, change no posterior: the encoder's, q's or a chain's."""
        model = FactorModel(SHAPE, counts=counts, num_held_out=2)
        means = []
        for poison in (False, True):
            dataset = Made(model, num_held_out=2)
            if poison:
                dataset.data.test.values[..., 6:] = 200 if counts else torch.nan
            evaluator = evaluator_of(dataset)
            numbers, _ = evaluator.final(self.trained(model, langevin()))
            kept = ("free_elbo", "free_iwae", "encoder_iwae", "elbo", "kl", "rates_r2", "chain_rates_r2")
            means.append((evaluator.last.means.rates, [numbers[name] for name in kept]))
        assert torch.equal(means[0][0], means[1][0])
        assert means[0][1] == means[1][1] and all(map(math.isfinite, means[0][1]))

    def test_a_model_that_reads_held_out_neurons_is_found_out(self, caplog):
        """It gets no number at all: they are NaN, and left out by name."""
        model = FactorModel(SHAPE, num_held_out=0)  # reads all
        numbers, _ = evaluator_of(Made(model, num_held_out=2)).final(self.trained(model))
        assert "free_elbo" not in numbers and "encoder_iwae" not in numbers
        assert "not finite and left out" in caplog.text and "free_elbo" in caplog.text

    def test_the_exact_posterior_decodes_what_there_is_to_decode(self):
        """The chain of the true model recovers rates, latents, behaviour and pulses as well as the posterior can."""
        model = FactorModel(SHAPE, scale=0.7)
        trained = self.trained(model, langevin(100), encoder=False)
        numbers, facts = evaluator_of(Made(model), num_gap_trials=None, num_posterior_samples=200).final(trained)
        assert "encoder_elbo" not in numbers and "amortisation_gap" not in numbers
        assert "the free q" in facts["sources"]
        assert numbers["rates_r2"] > 0.9 and numbers["chain_rates_r2"] == pytest.approx(numbers["rates_r2"], abs=0.03)
        assert numbers["behaviour_r2"] > 0.8 and numbers["latents_r2"] > 0.8
        assert numbers["pulse_timing"] > 0.6

    def test_poor_posteriors_show(self):
        """An encoder that knows nothing has the prior's mean rates: no R², no bits, and all of the gap amortised."""
        model = FactorModel(SHAPE, counts=True)
        trained = self.trained(model)
        with torch.no_grad():
            for parameter in trained.encoder.parameters():
                parameter.zero_()
        numbers, _ = evaluator_of(Made(model)).final(trained)
        assert numbers["rates_r2"] < 0.05 and numbers["bits_per_spike"] < 0.02
        assert numbers["amortisation_gap"] > 1

    def test_equal_seeds_give_equal_numbers_and_others_do_not(self):
        model = FactorModel(SHAPE, counts=True)
        trained = self.trained(model, langevin())
        first, second, other = (evaluator_of(Made(model), seed).final(trained)[0] for seed in (3, 3, 4))
        assert first == second and first["free_iwae"] != other["free_iwae"]

    def test_modes_are_put_back(self):
        model = FactorModel(SHAPE)
        trained = self.trained(model)
        model.train(), trained.encoder.eval()
        evaluator_of(Made(model)).during(trained)
        assert model.training and not trained.encoder.training

    def test_during_agrees_with_the_end(self):
        model = FactorModel(SHAPE, counts=True)
        trained = self.trained(model)
        evaluator = evaluator_of(Made(model), num_posterior_samples=8)
        numbers, final = evaluator.during(trained), evaluator.final(trained)[0]
        assert numbers["rates_r2"] == final["rates_r2"]
        assert numbers["elbo"] == pytest.approx(final["elbo"], abs=1.5)
        assert evaluator.during(self.trained(model, encoder=False)) == {}

    def test_pictures_differ_with_what_is_known(self, tmp_path):
        from PIL import Image

        model = FactorModel(SHAPE, counts=True)
        dataset = Made(model)
        evaluator = evaluator_of(dataset)
        trained = self.trained(model)
        evaluator.draw_data(tmp_path)
        assert evaluator.draw(trained, tmp_path, 5) == {"rates": tmp_path / "update-000000005.png"}
        evaluator.final(trained)
        paths = evaluator.draw(trained, tmp_path, None)
        assert set(paths) == {"rates", "factors", "inputs", "gaps"}
        for path in [tmp_path / "data.png", *paths.values()]:
            assert np.asarray(Image.open(path).convert("L")).std() > 5  # something is drawn


def test_wrong_settings():
    with pytest.raises(ValueError, match="free_samples must be even"):
        SequenceQuality(**(SETTINGS | {"free_samples": 3}))
    with pytest.raises(ValueError, match="num_importance_samples"):
        SequenceQuality(**(SETTINGS | {"num_importance_samples": 0}))


def test_the_label_is_safe_in_a_file_name():
    facts = {"num_importance_samples": 50, "num_gap_trials": 6, "split": "test"}
    assert SequenceQuality(**SETTINGS).label(facts) == "sequences-k50-n6-test"
