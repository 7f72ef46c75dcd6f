"""Spikes of a chaotic recurrent network, with or without a pulse that no initial state explains."""

from __future__ import annotations

import numpy as np

from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lpc_runner.data.sequences import SimulatedDataset, random_source, smallest_counts, split_trials

_STEP, _TIME_CONSTANT = 0.010, 0.025  # seconds
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
    bin_seconds = _STEP

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
        if num_trials < 5:
            raise ValueError(
                f"num_trials must be at least 5 per condition (a fifth is the test split), got {num_trials}"
            )
        self.seed, self.pulses, self.gain = seed, pulses, gain
        self.num_conditions, self.num_trials, self.num_neurons = num_conditions, num_trials, num_neurons
        names = ("seed", "pulses", "gain", "num_conditions", "num_trials", "num_neurons")
        super().__init__(data_dir, num_held_out, {name: getattr(self, name) for name in names})

    @property
    def shape(self) -> tuple[int, int]:
        """(T, N), 100 bins."""
        return (_NUM_BINS, self.num_neurons)

    @property
    def num_train(self) -> int:
        """Four fifths of the trials of every condition."""
        return self.num_conditions * (self.num_trials - self.num_trials // 5)

    def simulate(self) -> dict[str, np.ndarray]:
        """values (trials, 100, N), rates in expected counts per bin; with pulses also inputs and pulse_bin."""
        draw = random_source(self.seed, "chaotic_rnn")
        size, count = self.num_neurons, self.num_conditions * self.num_trials
        recurrent = self.gain * draw.standard_normal((size, size)) / np.sqrt(size)
        into = draw.standard_normal(size)
        start = np.repeat(draw.standard_normal((self.num_conditions, size)), self.num_trials, axis=0)
        inputs = np.zeros((count, _NUM_BINS))
        pulse_bin = draw.integers(*_PULSE_BINS, count)
        if self.pulses:
            inputs[np.arange(count), pulse_bin] = _PULSE
        states = network_states(recurrent, into, start, inputs)
        rates = _MAX_RATE * _STEP * (1 + np.tanh(states)) / 2
        arrays = {"values": smallest_counts(draw.poisson(rates)), "rates": rates.astype(np.float32)}
        if self.pulses:
            arrays |= {"inputs": inputs[..., None].astype(np.float32), "pulse_bin": pulse_bin}
        return split_trials(arrays, self.num_conditions, self.num_trials, self.num_trials // 5)


def network_states(recurrent: np.ndarray, into: np.ndarray, start: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """y(t) = y(t-1) + dt/τ (-y(t-1) + J tanh(y(t-1)) + B u(t)) from start (B, N), inputs (B, T): (B, T, N)."""
    states, state = np.empty((*inputs.shape, len(into))), start
    for step in range(inputs.shape[1]):
        drive = -state + np.tanh(state) @ recurrent.T + inputs[:, step, None] * into
        state = state + _STEP / _TIME_CONSTANT * drive
        states[:, step] = state
    return states
