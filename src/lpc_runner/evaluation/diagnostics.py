"""What several chains say of their own convergence (Vehtari et al. 2021), and ranks of whether they are right.

Chains are arrays (num_chains, num_states, ...); what comes after these two axes is kept, one number per entry.
"""

from __future__ import annotations

import numpy as np
from scipy import fft, special, stats


def r_hat(chains: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat, the larger of bulk and tail: near 1 where the chains agree; at least 4 states."""
    halves = _split(chains)
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.maximum(_r_hat(_normal_scores(halves)), _r_hat(_normal_scores(folded)))


def effective_sample_size(chains: np.ndarray) -> np.ndarray:
    """Bulk effective sample size of all states together: of rank-normalised split chains, by Geyer's initial monotone
    sequence; at least 8 states."""
    values = _normal_scores(_split(chains))
    num_chains, num_states = values.shape[:2]
    total = num_chains * num_states
    centred = values - values.mean(1, keepdims=True)
    length = fft.next_fast_len(2 * num_states, real=True)
    spectrum = np.asarray(fft.rfft(centred, length, axis=1))
    products = np.asarray(fft.irfft(spectrum * spectrum.conj(), length, axis=1))
    covariance = products[:, :num_states].mean(0) / num_states
    within = covariance[0] * num_states / (num_states - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = 1 - (within - covariance) / (covariance[0] + values.mean(1).var(0, ddof=1))
    correlation[0] = 1
    num_pairs = 1 + max(0, -(-(num_states - 4) // 2))
    even, odd = (correlation[first : 2 * num_pairs : 2] for first in (0, 1))
    pairs = even + odd
    negative = pairs < 0
    end = np.where(negative.any(0), negative.argmax(0), num_pairs - 1)  # the first pair that is left out
    kept = np.arange(num_pairs).reshape(-1, *[1] * (pairs.ndim - 1)) < end
    time = -1 + 2 * np.where(kept, np.minimum.accumulate(pairs, 0), 0).sum(0)
    time += np.maximum(np.take_along_axis(even, end[None], 0)[0], 0)
    return total / np.maximum(time, 1 / np.log10(total))


def _split(chains: np.ndarray) -> np.ndarray:
    """Each chain as two of half its length, in float64: a chain that drifts disagrees with itself."""
    half = chains.shape[1] // 2
    return np.concatenate([chains[:, :half], chains[:, -half:]]).astype(np.float64)


def _normal_scores(chains: np.ndarray) -> np.ndarray:
    """Normal quantiles of the ranks over all states, so that heavy tails do no harm."""
    flat = chains.reshape(-1, *chains.shape[2:])
    ranks = stats.rankdata(flat, axis=0)
    return special.ndtri((ranks - 3 / 8) / (len(flat) + 1 / 4)).reshape(chains.shape)


def _r_hat(chains: np.ndarray) -> np.ndarray:
    num_states = chains.shape[1]
    between, within = chains.mean(1).var(0, ddof=1), chains.var(1, ddof=1).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(between / within + (num_states - 1) / num_states)


def uniformity(ranks: np.ndarray, num_values: int) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's χ² of ranks (n, d) over its degrees of freedom and its p-value, each (d,).

    ranks: integers in 0 .. num_values - 1, uniform where the sampler is right (Talts et al. 2018); 1 is then expected
    of χ². Its law is known for some five ranks or more per value.
    """
    counts = np.stack([np.bincount(column, minlength=num_values) for column in ranks.T], 1)
    chi2, p = stats.chisquare(counts)
    return chi2 / (num_values - 1), p


def rank_spread(ranks: np.ndarray, num_values: int) -> np.ndarray:
    """Mean square of ranks about the middle over that of uniform ones, (d,): under 1 the chain is too wide, over 1 too
    narrow or off its place."""
    middle = (num_values - 1) / 2
    return ((ranks - middle) ** 2).mean(0) / ((num_values**2 - 1) / 12)
