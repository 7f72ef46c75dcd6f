"""Simulated sequences: what their recipes promise, the same bits for the same seed, files that are whole or refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from lpc_runner.base.errors import UserError
from lpc_runner.data.simulated import (
    ChaoticRNN,
    LinearSystem,
    Lorenz,
    SampledLinearSystem,
    lorenz_states,
    network_states,
    random_system,
)
from lpc_runner.evaluation.linear_gaussian import LinearGaussian, kalman_filter


def lorenz(folder, **more):
    settings = {"seed": 0, "num_conditions": 12, "num_trials": 10, "num_neurons": 9, "base_rate": 5.0}
    return Lorenz(str(folder), **(settings | {"num_held_out": 0} | more))


def network(folder, **more):
    settings = {"seed": 0, "pulses": True, "gain": 1.5, "num_conditions": 5, "num_trials": 10, "num_neurons": 20}
    return ChaoticRNN(str(folder), **(settings | {"num_held_out": 0} | more))


def linear(folder, **more):
    settings = {"seed": 0, "emission": "gaussian", "num_train": 40, "num_test": 10, "num_bins": 12, "num_neurons": 5}
    return SampledLinearSystem(str(folder), **(settings | {"latent_dim": 3, "num_held_out": 0} | more))


def loaded(dataset):
    dataset.prepare()
    return dataset.load()


@pytest.mark.parametrize("make", [lorenz, network, linear])
class TestEverySimulation:
    def test_it_is_a_function_of_its_settings(self, make, tmp_path):
        first, second = loaded(make(tmp_path / "a")), loaded(make(tmp_path / "b"))
        other = loaded(make(tmp_path / "a", seed=1))
        for one, two, three in zip((first.train, first.test), (second.train, second.test), (other.train, other.test)):
            assert torch.equal(one.values, two.values) and not torch.equal(one.values, three.values)
            assert all(torch.equal(one.extras[name], two.extras[name]) for name in one.extras)
        files = [list((tmp_path / folder / "sequences").glob("*.npz")) for folder in "ab"]
        assert len(files[0]) == 2 and files[1][0].name in [path.name for path in files[0]]

    def test_sizes_are_known_before_anything_is_simulated(self, make, tmp_path):
        dataset = make(tmp_path)
        told = dataset.num_train, dataset.shape, dataset.identity()
        assert not (tmp_path / "sequences").exists()
        data = loaded(dataset)
        assert told == (len(data.train), tuple(data.train.values.shape[1:]), dataset.identity())
        assert data.test.values.shape[1:] == data.train.values.shape[1:]

    def test_a_setting_or_held_out_neurons_make_another_dataset(self, make, tmp_path):
        plain = make(tmp_path).identity()
        assert plain == make(tmp_path / "elsewhere").identity()
        assert plain != make(tmp_path, seed=1).identity() and plain != make(tmp_path, num_held_out=2).identity()

    def test_damage_is_found(self, make, tmp_path):
        dataset = make(tmp_path)
        loaded(dataset)
        (path,) = (tmp_path / "sequences").glob("*.npz")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match="delete this file") as caught:
            dataset.load()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def test_what_cannot_be_written_is_one_line(self, make, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be written") as caught:
            make(tmp_path / "file").prepare()
        assert "\n" not in str(caught.value)

    def test_not_all_neurons_can_be_held_out(self, make, tmp_path):
        with pytest.raises(ValueError, match="num_held_out"):
            make(tmp_path, num_held_out=make(tmp_path).shape[1])


class TestLorenz:
    def test_steps_are_eulers(self):
        start = np.array([[1.0, 2.0, 3.0]])
        moved = lorenz_states(start, 1)[0, 0]
        assert np.allclose(moved, start + 0.006 * np.array([10 * (2 - 1), 1 * (28 - 3) - 2, 1 * 2 - 8 / 3 * 3]))

    def test_its_fixed_points_stay(self):
        """x = y = ±sqrt(β (ρ - 1)), z = ρ - 1, and the origin."""
        far = np.sqrt(8 / 3 * 27)
        points = np.array([[far, far, 27], [-far, -far, 27], [0, 0, 0]])
        assert np.allclose(lorenz_states(points, 200), points[:, None], atol=1e-6)

    def test_log_rates_are_linear_in_the_state_with_weights_between_one_and_two(self, tmp_path):
        """Weights read off the bins in which the state hardly moves, where averages over a bin are values."""
        data = loaded(lorenz(tmp_path, num_conditions=40))
        latents, rates = (data.train.extras[name][::8].double() for name in ("latents", "rates"))
        moved = latents.diff(dim=1).abs().amax(2)
        calm = torch.maximum(moved[:, 1:], moved[:, :-1]) < 0.1
        log_rates = (rates / (5.0 * 0.02)).log()
        weights = torch.linalg.lstsq(latents[:, 1:-1][calm], log_rates[:, 1:-1][calm]).solution
        assert calm.sum() > 100
        assert ((weights.abs() > 0.99) & (weights.abs() < 2.01)).all()
        assert (weights > 0).any() and (weights < 0).any()

    def test_one_scale_per_dimension_for_all_conditions(self, tmp_path):
        data = loaded(lorenz(tmp_path))
        latents = torch.cat([data.train.extras["latents"], data.test.extras["latents"]])
        highest = latents.abs().amax((0, 1))
        assert (highest <= 1).all() and (highest > 0.85).all()  # averaged over bins, so the largest is not quite 1
        per_trial = latents.abs().amax(1)
        assert per_trial.min() < 0.9 * highest.min()  # no trial has a scale of its own

    def test_counts_are_poisson_of_the_rates(self, tmp_path):
        split = loaded(lorenz(tmp_path, num_conditions=40)).train
        counts, rates = split.values.double(), split.extras["rates"].double()
        error = (counts - rates).sum() / rates.sum().sqrt()
        assert abs(error) < 4
        dispersion = ((counts - rates).square() / rates).mean()  # 1 for Poisson
        spread = ((2 + 1 / rates).mean() / rates.numel()).sqrt()
        assert abs(dispersion - 1) < 4 * spread

    def test_rates_lie_around_the_base_rate(self, tmp_path):
        """Log rates are base rate plus a signed sum: their median over neurons is near 5 Hz, no rate reaches 1 kHz."""
        rates = loaded(lorenz(tmp_path, num_conditions=65, num_trials=5, num_neurons=30)).train.extras["rates"] / 0.02
        assert 3 < rates.log().mean().exp() < 8 and rates.max() < 1000

    def test_a_condition_gives_four_fifths_of_its_trials_to_train(self, tmp_path):
        data = loaded(lorenz(tmp_path))
        train, test = data.train.extras["rates"], data.test.extras["rates"]
        assert (len(train), len(test)) == (12 * 8, 12 * 2)
        for condition in range(12):
            own = train[8 * condition]
            assert (train[8 * condition : 8 * condition + 8] == own).all()
            assert (test[2 * condition : 2 * condition + 2] == own).all()
            assert not (train[8 * ((condition + 1) % 12)] == own).all()


class TestChaoticRNN:
    def test_without_weights_and_inputs_the_state_decays(self):
        """y(t) = (1 - dt/τ)^t y(0), dt/τ = 10/25."""
        states = network_states(np.zeros((3, 3)), np.ones(3), np.ones((1, 3)), np.zeros((1, 5)))
        assert np.allclose(states[0, :, 0], 0.6 ** np.arange(1, 6))

    def test_the_pulse_shows_in_the_rates_at_its_bin_and_not_before(self, tmp_path):
        split = loaded(network(tmp_path)).train
        rates, pulse = split.extras["rates"], split.extras["pulse_bin"]
        assert (pulse >= 25).all() and (pulse < 75).all() and len(pulse.unique()) > 10
        assert torch.equal(split.extras["inputs"][..., 0].argmax(1), pulse)
        assert torch.equal(split.extras["inputs"].sum((1, 2)), torch.full((40,), 20.0))
        jump = rates.diff(dim=1).norm(dim=2).argmax(1) + 1
        assert ((jump - pulse).abs() <= 1).float().mean() > 0.95
        own, order = rates[:8], pulse[:8].argsort()  # one condition: the same network from the same state
        first, after = int(pulse[order[0]]), int(pulse[order[1]])
        assert torch.equal(own[order[0], :first], own[order[1], :first]) and after > first
        assert not torch.allclose(own[order[0], first], own[order[1], first])

    def test_without_pulses_trials_of_a_condition_share_their_rates(self, tmp_path):
        split = loaded(network(tmp_path, pulses=False)).train
        assert set(split.extras) == {"rates"}
        assert (split.extras["rates"][:8] == split.extras["rates"][0]).all()
        assert not torch.equal(split.extras["rates"][0], split.extras["rates"][8])

    def test_rates_stay_below_30_hz_and_average_a_half_of_that(self, tmp_path):
        rates = loaded(network(tmp_path)).train.extras["rates"] / 0.01
        assert rates.min() >= 0 and rates.max() <= 30 + 1e-4 and rates.mean().item() == pytest.approx(15, abs=1.5)

    def test_stronger_gain_is_faster_chaos(self, tmp_path):
        def speed(gain):
            rates = loaded(network(tmp_path, gain=gain, pulses=False, num_neurons=50)).train.extras["rates"]
            return rates[:, 50:].diff(dim=1).norm()

        assert speed(2.5) > 1.2 * speed(1.5) > 12 * speed(0.5)  # below 1 every state decays


class TestLinearSystem:
    def test_the_evidence_is_the_kalman_filters(self, tmp_path):
        dataset = linear(tmp_path, num_held_out=2)
        data = loaded(dataset)
        system, held_in = dataset.system().without(2), data.test.values[..., :3]
        as_tensor = lambda array: torch.as_tensor(array, dtype=torch.float64)
        known = LinearGaussian(
            as_tensor(system.m0),
            as_tensor(system.L0 @ system.L0.T),
            as_tensor(system.A),
            as_tensor(system.b),
            as_tensor(system.L @ system.L.T),
            as_tensor(system.C),
            as_tensor(system.d),
            as_tensor(system.scale**2),
        )
        expected = kalman_filter(known, held_in.double()).log_likelihood
        assert np.allclose(dataset.log_evidence(data.test.values.numpy()), expected, atol=1e-6)

    def test_trials_have_the_moments_of_the_system_that_is_kept(self, tmp_path):
        dataset = linear(tmp_path, num_train=6000)
        values = loaded(dataset).train.values.flatten(1).double()
        mean, covariance = map(torch.from_numpy, dataset.system().mean_and_covariance(12))
        scale = covariance.diagonal().sqrt()
        assert ((values.mean(0) - mean).abs() < 5 * scale / 6000**0.5).all()
        error = (values.T.cov() - covariance) / (scale[:, None] * scale)
        assert error.abs().max() < 6 / 6000**0.5

    def test_the_truth_scores_best_on_average(self, tmp_path):
        dataset = linear(tmp_path, num_test=300)
        values, system = loaded(dataset).test.values.numpy(), dataset.system()
        truth = system.log_evidence(values).mean()
        for change in ({"scale": 0.6}, {"A": 0.9 * system.A}, {"C": 1.1 * system.C}):
            assert LinearSystem(**(vars(system) | change)).log_evidence(values).mean() < truth

    def test_it_starts_at_its_stationary_law(self):
        """P = A P Aᵀ + L Lᵀ, also with an odd dimension."""
        for dim in (4, 5):
            system = random_system(np.random.default_rng(3), dim, 6, "gaussian")
            start = system.L0 @ system.L0.T
            assert np.allclose(system.A @ start @ system.A.T + system.L @ system.L.T, start)
            assert np.abs(np.linalg.eigvals(system.A)).max() < 1

    def test_counts_are_poisson_of_the_rates(self, tmp_path):
        dataset = linear(tmp_path, emission="poisson", num_train=2000)
        split = loaded(dataset).train
        counts, rates = split.values.double(), split.extras["rates"].double()
        assert abs((counts - rates).sum() / rates.sum().sqrt()) < 4
        assert dataset.kind == "spike counts" and dataset.log_evidence(split.values.numpy()) is None
        system = dataset.system()
        predictor = split.extras["latents"].double() @ torch.from_numpy(system.C.T) + torch.from_numpy(system.d)
        assert torch.allclose(predictor.exp(), rates, rtol=1e-4)


def test_constructing_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from lpc_runner.data import simulated, spikes;"
        "spikes.Spikes('a.h5', None, 0.02); simulated.Lorenz('data', 0, 5, 5, 3, 5.0, 0);"
        "print([m for m in ('h5py', 'scipy', 'matplotlib', 'sklearn', 'hydra', 'wandb') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert printed.stdout.strip() == "[]" and list(tmp_path.iterdir()) == []
