"""Simulated trials: a linear system with known parameters, spikes of a Lorenz attractor and of a chaotic network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lpc_runner.data.sequences import COUNTS, SERIES, SimulatedDataset, smallest_counts

_SYSTEM = "system_"
_NOISE = 0.3  # standard deviation of the process noise in every direction
_BASE = 0.15  # expected count per bin of a Poisson neuron at the origin of the latent space


@dataclass(frozen=True)
class LinearSystem:
    """x_0 = m0 + L0 z_0; x_t = A x_{t-1} + b + L u_t, t = 1..T; mean of y_t is C x_t + d, or exp of it (Poisson).

    z_0, u_t ~ N(0, I) of dimension D; A, L, L0 (D, D); b, m0 (D,); C (N, D); d (N,); scale: σ of Gaussian noise.
    """

    A: np.ndarray
    b: np.ndarray
    L: np.ndarray
    m0: np.ndarray
    L0: np.ndarray
    C: np.ndarray
    d: np.ndarray
    scale: float

    def mean_and_covariance(self, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Moments of a whole trial of Gaussian emission, y_1..y_T as one vector: (T N,), (T N, T N), float64."""
        dim = len(self.b)
        mean = self.m0
        maps = np.concatenate([self.L0, np.zeros((dim, num_bins * dim))], axis=1)  # of (z_0, u_1, ..., u_T) to x_t
        means, rows = [], []
        for step in range(num_bins):
            mean, maps = self.A @ mean + self.b, self.A @ maps
            maps[:, (step + 1) * dim : (step + 2) * dim] = self.L
            means.append(self.C @ mean + self.d)
            rows.append(self.C @ maps)
        joint = np.concatenate(rows)
        return np.concatenate(means), joint @ joint.T + self.scale**2 * np.eye(len(joint))

    def log_evidence(self, y: np.ndarray) -> np.ndarray:
        """log p(y) of trials y (B, T, N) of Gaussian emission in nats, (B,): one dense Gaussian, exact."""
        mean, covariance = self.mean_and_covariance(y.shape[1])
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, (y.reshape(len(y), -1).astype(np.float64) - mean).T)
        return -0.5 * (white**2).sum(0) - np.log(np.diag(factor)).sum() - len(mean) / 2 * np.log(2 * np.pi)

    def without(self, num_held_out: int) -> LinearSystem:
        """The system of the first N - num_held_out neurons."""
        kept = slice(len(self.d) - num_held_out)
        return LinearSystem(self.A, self.b, self.L, self.m0, self.L0, self.C[kept], self.d[kept], self.scale)


class SampledLinearSystem(SimulatedDataset):
    """Trials drawn from a `LinearSystem` of slow, weakly damped rotations with random loadings.

    A: rotations of 0.1 to 0.4 rad per bin, moduli .95 to .99. L = 0.3 I; x_0 starts at the stationary law. C: N(0, 1/D)
    for Gaussian emission with σ = 0.5, half of that for Poisson, whose counts have mean exp(C x + d), d = log .15.
    emission: poisson (spike counts) or gaussian (real-valued series).
    """

    name = "lds"
    bin_seconds = 0.02

    @checked
    def __init__(
        self,
        data_dir: str,
        seed: NonNegativeInt,
        emission: Literal["gaussian", "poisson"],
        num_train: PositiveInt,
        num_test: PositiveInt,
        num_bins: PositiveInt,
        num_neurons: PositiveInt,
        latent_dim: PositiveInt,
        num_held_out: NonNegativeInt,
    ) -> None:
        self.kind = SERIES if emission == "gaussian" else COUNTS
        self.seed, self.emission, self.latent_dim = seed, emission, latent_dim
        super().__init__(data_dir, num_held_out, num_bins, num_neurons, 1, num_train + num_test, num_test)

    def system(self) -> LinearSystem:
        """The parameters that the trials were drawn from. Raises UserError if the file is missing or damaged."""
        arrays = {key.removeprefix(_SYSTEM): value for key, value in self.arrays().items() if key.startswith(_SYSTEM)}
        scale = float(arrays.pop("scale"))
        return LinearSystem(**arrays, scale=scale)

    def log_evidence(self, values: np.ndarray) -> np.ndarray | None:
        """log p of trials (B, T, N) of held-in neurons under the true system in nats, (B,); None for Poisson."""
        if self.emission == "poisson":
            return None
        held_in = self.num_neurons - self.num_held_out
        return self.system().without(self.num_held_out).log_evidence(values[..., :held_in])

    def simulate(self, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """values (trials, T, N), rates: means or expected counts per bin, latents x_t, and the system itself."""
        system = random_system(draw, self.latent_dim, self.num_neurons, self.emission)
        count, dim = self.num_trials, self.latent_dim
        state = system.m0 + draw.standard_normal((count, dim)) @ system.L0.T
        states = np.empty((count, self.num_bins, dim))
        for step in range(self.num_bins):
            state = state @ system.A.T + system.b + draw.standard_normal((count, dim)) @ system.L.T
            states[:, step] = state
        means = states @ system.C.T + system.d
        if self.emission == "poisson":
            means = np.exp(means)
            values = smallest_counts(draw.poisson(means))
        else:
            values = (means + system.scale * draw.standard_normal(means.shape)).astype(np.float32)
        arrays = {"values": values, "rates": means.astype(np.float32), "latents": states.astype(np.float32)}
        kept = {f"{_SYSTEM}{name}": np.asarray(value) for name, value in vars(system).items()}
        return self.split(arrays) | kept


def random_system(draw: np.random.Generator, dim: int, num_neurons: int, emission: str) -> LinearSystem:
    """A stable system of dim // 2 rotations (and one decay where dim is odd) in a random orthogonal basis."""
    blocks = np.zeros((dim, dim))
    for start in range(0, dim - 1, 2):
        angle, modulus = draw.uniform(0.1, 0.4), draw.uniform(0.95, 0.99)
        cos, sin = np.cos(angle), np.sin(angle)
        blocks[start : start + 2, start : start + 2] = modulus * np.array([[cos, -sin], [sin, cos]])
    if dim % 2:
        blocks[-1, -1] = draw.uniform(0.95, 0.99)
    basis = np.linalg.qr(draw.standard_normal((dim, dim)))[0]
    transition = basis @ blocks @ basis.T
    noise = _NOISE * np.eye(dim)
    # Each block is a multiple of a rotation, so that the stationary covariance is _NOISE² / (1 - modulus²) along it.
    moduli = np.sqrt((blocks**2).sum(1))
    stationary = basis @ np.diag(_NOISE / np.sqrt(1 - moduli**2))
    scale = 1.0 if emission == "gaussian" else 0.5
    loadings = scale * draw.standard_normal((num_neurons, dim)) / np.sqrt(dim)
    offsets = np.zeros(num_neurons) if emission == "gaussian" else np.full(num_neurons, np.log(_BASE))
    return LinearSystem(transition, np.zeros(dim), noise, np.zeros(dim), stationary, loadings, offsets, 0.5)


def _fifth(num_trials: int) -> int:
    """Trials of every condition that are the test split."""
    if num_trials < 5:
        raise ValueError(f"num_trials must be at least 5 per condition (a fifth is the test split), got {num_trials}")
    return num_trials // 5


_LORENZ_STEP = 0.006  # time of the attractor per millisecond
_MILLISECONDS = 1000
_BIN = 20  # milliseconds


class Lorenz(SimulatedDataset):
    """Poisson counts whose log rates are linear in a Lorenz state (Sussillo et al. 2016, Pandarinath et al. 2018).

    The state starts at N(0, I) per condition and follows Euler steps of 1 ms for 1 s; each of its three dimensions is
    divided by its largest |.| over all conditions; log rate = W x + log base_rate, |W| ~ 1 + U[0, 1] with random
    signs; counts are Poisson in bins of 20 ms. num_trials per condition, the last fifth of them is the test split.
    """

    name = "lorenz"
    bin_seconds = _BIN / 1000

    @checked
    def __init__(
        self,
        data_dir: str,
        seed: NonNegativeInt,
        num_conditions: PositiveInt,
        num_trials: PositiveInt,
        num_neurons: PositiveInt,
        base_rate: PositiveFloat,
        num_held_out: NonNegativeInt,
    ) -> None:
        self.seed, self.base_rate = seed, base_rate
        num_bins, num_test = _MILLISECONDS // _BIN, _fifth(num_trials)
        super().__init__(data_dir, num_held_out, num_bins, num_neurons, num_conditions, num_trials, num_test)

    def simulate(self, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """values (trials, 50, N), rates in expected counts per bin, latents: the scaled state, averaged over a bin."""
        state = lorenz_states(draw.standard_normal((self.num_conditions, 3)), _MILLISECONDS)
        state /= np.abs(state).max((0, 1))
        signs = draw.choice([-1.0, 1.0], (3, self.num_neurons))
        weights = (1 + draw.random((3, self.num_neurons))) * signs
        binned = lambda x: x.reshape(self.num_conditions, self.num_bins, _BIN, -1)
        rates = binned(self.base_rate / 1000 * np.exp(state @ weights)).sum(2)  # Hz are thousandths per millisecond
        repeated = lambda x: np.repeat(x, self.num_trials, axis=0)
        arrays = {
            "values": smallest_counts(draw.poisson(repeated(rates))),
            "rates": repeated(rates).astype(np.float32),
            "latents": repeated(binned(state).mean(2)).astype(np.float32),
        }
        return self.split(arrays)


def lorenz_states(start: np.ndarray, num_steps: int) -> np.ndarray:
    """Euler steps of σ = 10, ρ = 28, β = 8/3 from start (B, 3): the states after each, (B, num_steps, 3)."""
    states, state = np.empty((len(start), num_steps, 3)), start
    for step in range(num_steps):
        x, y, z = state.T
        state = state + _LORENZ_STEP * np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=1)
        states[:, step] = state
    return states


_RNN_STEP, _TIME_CONSTANT = 0.010, 0.025  # seconds
_NUM_BINS = 100
_PULSE_BINS = (25, 75)
_PULSE = 20.0
_MAX_RATE = 30.0  # Hz


class ChaoticRNN(SimulatedDataset):
    """Poisson counts of a random network (Sussillo et al. 2016): τ dy/dt = -y + J tanh(y) + B u, J ~ g N(0, 1/N).

    τ = 25 ms, Euler steps and bins of 10 ms, 100 of them; y starts at N(0, I) per condition; rates are
    15 Hz (1 + tanh(y)). pulses: u is 20 at one bin per trial, uniform in [25, 75), B ~ N(0, I); without them u = 0.
    The input of bin t drives the state of bin t. num_trials per condition, the last fifth of them is the test split.
    """

    name = "chaotic_rnn"
    bin_seconds = _RNN_STEP

    @checked
    def __init__(
        self,
        data_dir: str,
        seed: NonNegativeInt,
        pulses: bool,
        gain: PositiveFloat,
        num_conditions: PositiveInt,
        num_trials: PositiveInt,
        num_neurons: PositiveInt,
        num_held_out: NonNegativeInt,
    ) -> None:
        self.seed, self.pulses, self.gain = seed, pulses, gain
        num_test = _fifth(num_trials)
        super().__init__(data_dir, num_held_out, _NUM_BINS, num_neurons, num_conditions, num_trials, num_test)

    def simulate(self, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """values (trials, 100, N), rates in expected counts per bin; with pulses also inputs and pulse_bin."""
        size, count = self.num_neurons, self.num_conditions * self.num_trials
        recurrent = self.gain * draw.standard_normal((size, size)) / np.sqrt(size)
        into = draw.standard_normal(size)
        start = np.repeat(draw.standard_normal((self.num_conditions, size)), self.num_trials, axis=0)
        inputs = np.zeros((count, _NUM_BINS))
        pulse_bin = draw.integers(*_PULSE_BINS, count)
        if self.pulses:
            inputs[np.arange(count), pulse_bin] = _PULSE
        states = network_states(recurrent, into, start, inputs)
        rates = _MAX_RATE * _RNN_STEP * (1 + np.tanh(states)) / 2
        arrays = {"values": smallest_counts(draw.poisson(rates)), "rates": rates.astype(np.float32)}
        if self.pulses:
            arrays |= {"inputs": inputs[..., None].astype(np.float32), "pulse_bin": pulse_bin}
        return self.split(arrays)


def network_states(recurrent: np.ndarray, into: np.ndarray, start: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """y(t) = y(t-1) + dt/τ (-y(t-1) + J tanh(y(t-1)) + B u(t)) from start (B, N), inputs (B, T): (B, T, N)."""
    states, state = np.empty((*inputs.shape, len(into))), start
    for step in range(inputs.shape[1]):
        drive = -state + np.tanh(state) @ recurrent.T + inputs[:, step, None] * into
        state = state + _RNN_STEP / _TIME_CONSTANT * drive
        states[:, step] = state
    return states
