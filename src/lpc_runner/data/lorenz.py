"""Spikes of neurons that follow a Lorenz attractor, the usual first test of latent dynamics."""

from __future__ import annotations

import numpy as np

from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lpc_runner.data.sequences import SimulatedDataset, random_source, smallest_counts, split_trials

_STEP = 0.006  # time of the attractor per millisecond
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
        if num_trials < 5:
            raise ValueError(
                f"num_trials must be at least 5 per condition (a fifth is the test split), got {num_trials}"
            )
        self.seed, self.base_rate = seed, base_rate
        self.num_conditions, self.num_trials, self.num_neurons = num_conditions, num_trials, num_neurons
        names = ("seed", "num_conditions", "num_trials", "num_neurons", "base_rate")
        super().__init__(data_dir, num_held_out, {name: getattr(self, name) for name in names})

    @property
    def shape(self) -> tuple[int, int]:
        """(T, N), 50 bins."""
        return (_MILLISECONDS // _BIN, self.num_neurons)

    @property
    def num_train(self) -> int:
        """Four fifths of the trials of every condition."""
        return self.num_conditions * (self.num_trials - self.num_trials // 5)

    def simulate(self) -> dict[str, np.ndarray]:
        """values (trials, 50, N), rates in expected counts per bin, latents: the scaled state, averaged over a bin."""
        draw = random_source(self.seed, "lorenz")
        state = lorenz_states(draw.standard_normal((self.num_conditions, 3)), _MILLISECONDS)
        state /= np.abs(state).max((0, 1))
        signs = draw.choice([-1.0, 1.0], (3, self.num_neurons))
        weights = (1 + draw.random((3, self.num_neurons))) * signs
        binned = lambda x: x.reshape(self.num_conditions, *self.shape[:1], _BIN, -1)
        rates = binned(self.base_rate / 1000 * np.exp(state @ weights)).sum(2)  # Hz are thousandths per millisecond
        repeated = lambda x: np.repeat(x, self.num_trials, axis=0)
        arrays = {
            "values": smallest_counts(draw.poisson(repeated(rates))),
            "rates": repeated(rates).astype(np.float32),
            "latents": repeated(binned(state).mean(2)).astype(np.float32),
        }
        return split_trials(arrays, self.num_conditions, self.num_trials, self.num_trials // 5)


def lorenz_states(start: np.ndarray, num_steps: int) -> np.ndarray:
    """Euler steps of σ = 10, ρ = 28, β = 8/3 from start (B, 3): the states after each, (B, num_steps, 3)."""
    states, state = np.empty((len(start), num_steps, 3)), start
    for step in range(num_steps):
        x, y, z = state.T
        state = state + _STEP * np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=1)
        states[:, step] = state
    return states
