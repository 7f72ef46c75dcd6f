"""R-hat, effective sample size and ranks against closed forms and the numbers of ArviZ."""

import numpy as np
import pytest

from lpc_runner.evaluation.diagnostics import effective_sample_size, r_hat, rank_spread, uniformity

# arviz-stats 0.8.0, ess(method="bulk") and rhat(method="rank"), of two chains of `ar1` rounded to .1.
ARVIZ = {
    (0.3, 101): ([242.10028039797558, 200.34489671825492], [1.0149896059781598, 1.007135530364583]),
    (0.9, 100): ([31.475965264156642, 41.4200705125604], [1.1122704287844631, 1.056304445199762]),
}


def ar1(correlation, num_chains, num_states, num_series=1, seed=0):
    """Stationary chains x_t = φ x_{t-1} + sqrt(1 - φ²) ξ, of variance 1."""
    noise = np.random.default_rng(seed).standard_normal((num_states, num_chains, num_series))
    states = [noise[0]]
    for draw in noise[1:]:
        states.append(correlation * states[-1] + np.sqrt(1 - correlation**2) * draw)
    return np.stack(states, 1)


def test_the_numbers_are_those_of_arviz():
    for (correlation, length), (ess, rhat) in ARVIZ.items():
        chains = ar1(correlation, 4, length, 2).round(1)
        assert effective_sample_size(chains) == pytest.approx(ess, rel=1e-9)
        assert r_hat(chains) == pytest.approx(rhat, rel=1e-9)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_effective_samples_of_an_autoregression(correlation):
    chains = ar1(correlation, 8, 2000, 20)
    expected = 8 * 2000 * (1 - correlation) / (1 + correlation)
    assert effective_sample_size(chains).mean() == pytest.approx(expected, rel=0.08)


def test_r_hat_tells_chains_of_another_place_or_width():
    chains = ar1(0.3, 4, 500, 3)
    chains[0, :, 1] += 1
    chains[0, :, 2] *= 2
    found = r_hat(chains)
    assert found[0] < 1.01 and (found[1:] > 1.05).all()


def test_uniform_ranks_have_chi2_1_and_others_are_told():
    exact = np.random.default_rng(0).integers(0, 10, (4000, 50))
    chi2, p = uniformity(exact, 10)
    assert chi2.mean() == pytest.approx(1, abs=0.2) and np.quantile(p, 0.5) == pytest.approx(0.5, abs=0.25)
    assert rank_spread(exact, 10) == pytest.approx(1, abs=0.06)
    narrow = np.clip(np.random.default_rng(0).normal(4.5, 2, (4000, 3)).round(), 0, 9).astype(int)
    assert (uniformity(narrow, 10)[1] < 1e-6).all() and (rank_spread(narrow, 10) < 0.7).all()
