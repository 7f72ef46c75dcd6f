"""What to measure of sequences, and what its numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from lpc_runner.base.errors import UserError
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, at_least, checked
from lpc_runner.data.dataset import Data, Dataset
from lpc_runner.data.sequences import COUNTS, SERIES
from lpc_runner.evaluation.evaluator import Evaluator, Idle, Metrics

PER_TRIAL = "nats per trial"


class SequenceQuality(Metrics):
    """ELBO, IWAE with a free q per trial, both gaps, rates, held-out neurons, latents, pulses and behaviour.

    num_importance_samples: K of IWAE. num_gap_trials: test trials, evenly spaced, for IWAE, free q and gaps; None for
    all. free_steps, free_samples (even), free_learning_rate: the fit of the free q. num_posterior_samples: draws that
    posterior means average over. every_epochs: measure ELBO and rates during training too, 0 for only at the end.
    """

    data_kinds = (COUNTS, SERIES)

    @checked
    def __init__(
        self,
        *,
        num_importance_samples: PositiveInt,
        num_gap_trials: PositiveInt | None,
        free_steps: PositiveInt,
        free_samples: Annotated[int, at_least(2)],
        free_learning_rate: PositiveFloat,
        num_posterior_samples: PositiveInt,
        every_epochs: NonNegativeInt,
    ) -> None:
        if free_samples % 2:
            raise ValueError(f"free_samples must be even, for they are drawn in antithetic pairs, got {free_samples}")
        self.num_importance_samples, self.num_gap_trials = num_importance_samples, num_gap_trials
        self.free_steps, self.free_samples, self.free_learning_rate = free_steps, free_samples, free_learning_rate
        self.num_posterior_samples, self.every_epochs = num_posterior_samples, every_epochs

    def require(self, dataset: Dataset, cache_dir: Path) -> None:
        """Nothing to fetch."""

    def evaluator(
        self,
        dataset: Dataset,
        data: Data,
        cache_dir: Path,
        device: torch.device | str,
        seed: int,
        ranks: Ranks = SINGLE,
    ) -> Evaluator:
        if len(data.test) < 2:
            raise UserError(f"{dataset.name} has {len(data.test)} validation trial, metrics=sequences needs at least 2")
        if not ranks.is_main:
            return Idle()
        from lpc_runner.evaluation.sequences import SequenceEvaluator

        return SequenceEvaluator(dataset, data, self, device, seed)

    def label(self, facts: dict[str, object]) -> str:
        return f"sequences-k{facts['num_importance_samples']}-n{facts['num_gap_trials']}-{facts['split']}"


def notes_on(numbers: dict[str, float], num_importance_samples: int) -> dict[str, str]:
    """Units and definitions of these numbers, one short line each."""
    bound = "exact log p(x)" if "log_evidence" in numbers else "the better IWAE"
    notes = dict.fromkeys(("elbo", "kl", "log_evidence", "spike_log_likelihood"), PER_TRIAL)
    notes |= dict.fromkeys((name for name in numbers if name.startswith("kl_")), PER_TRIAL)
    for name, words in (("encoder", "q of the encoder"), ("free", "free q per trial")):
        notes[f"{name}_elbo"] = f"{PER_TRIAL}, {words}"
        notes[f"{name}_iwae"] = f"{PER_TRIAL}, K = {num_importance_samples:,}, {words}"
        notes[f"{name}_effective_samples"] = f"median over trials, of {num_importance_samples:,}"
    notes["free_drift"] = f"{PER_TRIAL} gained in the last fifth of the fit (closed form: 0)"
    notes["amortisation_gap"] = f"{PER_TRIAL}: ELBO of the free q - of the encoder's"
    notes["approximation_gap"] = f"{PER_TRIAL}: {bound} - ELBO of the free q"
    notes["rates_r2"] = "R², each neuron against its own mean"
    notes["latents_r2"] = notes["behaviour_r2"] = "R² of a ridge regression from the factors, other half of the trials"
    notes["bits_per_spike"] = "over each neuron's mean rate"
    notes["cosmoothing_bits_per_spike"] = "held-out neurons, from the held-in ones"
    notes["reconstruction"] = f"{PER_TRIAL}: mean of log p(x|z) over draws of q"
    notes["identity_overfit"] = "1: draws of q explain the spikes they saw better than the true rates do"
    notes["pulse_timing"] = "share of trials whose largest input is within one bin of the pulse"
    return notes | {f"chain_{name}": f"{note}; its sampler's chain from q" for name, note in notes.items()}
