"""Sequences measured and drawn: bounds and their gaps, rates against spikes and truth, held-out neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, at_least, checked
from lpc_runner.data.dataset import Batch
from lpc_runner.data.sequences import COUNTS, SERIES, SequenceDataset
from lpc_runner.evaluation import linear_gaussian
from lpc_runner.evaluation.bounds import FreeFit, importance_bound
from lpc_runner.evaluation.evaluator import (
    Evaluator,
    Idle,
    Metrics,
    Setup,
    Trained,
    evaluating,
    evenly_spaced,
    finite,
    is_amortised,
    mean_and_error,
    require_examples,
    without_held_out,
)
from lpc_runner.evaluation.samples import draw_data
from lpc_runner.evaluation.sequence_posterior import (
    CHUNK,
    Means,
    bits_per_spike,
    chain_means,
    linear_r_squared,
    poisson_log_likelihood,
    posterior_means,
    pulse_timing,
    r_squared,
)
from lpc_runner.models.latent import LatentVariableModel

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
        self.num_importance_samples, self.num_gap_trials = num_importance_samples, num_gap_trials
        self.fit = FreeFit(free_steps, free_samples, free_learning_rate)
        self.num_posterior_samples, self.every_epochs = num_posterior_samples, every_epochs

    def evaluator(self, setup: Setup) -> Evaluator:
        require_examples(setup, "sequences")
        return SequenceEvaluator(setup, self) if setup.ranks.is_main else Idle()

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
    notes |= {f"chain_{name}": f"{note}; its sampler's chain from q" for name, note in notes.items()}
    return {name: note for name, note in notes.items() if name in numbers}


@dataclass(frozen=True)
class Inferred:
    """Posterior of some test trials. index: (n,) which ones. q: over z. means: averaged over draws of q."""

    index: Tensor
    q: DiagonalGaussian
    means: Means


class SequenceEvaluator(Evaluator):
    """Measures on the test split; seed names every draw, so that runs of one seed share their noise."""

    def __init__(self, setup: Setup, settings: SequenceQuality) -> None:
        dataset: SequenceDataset = setup.dataset
        data, device = setup.data, setup.device
        self.dataset, self.data, self.settings, self.seed = dataset, data, settings, setup.seed
        self.held_out = dataset.num_held_out
        self.held_in = slice(0, dataset.shape[1] - self.held_out)
        self.values = data.test.values.to(device)
        self.extras = {name: values.to(device) for name, values in data.test.extras.items()}
        self.x = without_held_out(dataset.to_model(self.values), self.held_out)
        self.every = torch.arange(len(self.x), device=self.x.device)
        self.gap_index = evenly_spaced(len(self.x), settings.num_gap_trials, device)
        self.true_log_likelihood: Tensor | None = None  # of held-in spikes under the true rates, nats per trial, (B,)
        if dataset.kind == COUNTS and "rates" in self.extras:
            held_in = (values[..., self.held_in] for values in (self.values, self.extras["rates"]))
            self.true_log_likelihood = poisson_log_likelihood(*held_in)
        self.last: Inferred | None = None  # of the last final measurement, for the pictures
        self.gaps: dict[str, float] = {}

    # What the runner asks for -------------------------------------------------------------------------------

    def during(self, trained: Trained) -> dict[str, float]:
        if not is_amortised(trained.encoder):
            return {}
        with evaluating(trained.model, trained.encoder):
            q = self._encoded(trained, self.every)
            numbers = {"elbo": float(importance_bound(trained.model, self.x, q, 1, self.seed).elbo.mean())}
            if "rates" in self.extras:
                count = min(8, self.settings.num_posterior_samples)
                means = posterior_means(trained.model, q, count, self.seed)
                numbers["rates_r2"] = r_squared(means.rates, self.extras["rates"])
            return numbers

    def final(self, trained: Trained) -> tuple[dict[str, float], dict[str, object]]:
        with evaluating(trained.model, trained.encoder):
            numbers, free = self._bounds(trained)
            self.gaps = dict(numbers) if all(map(math.isfinite, numbers.values())) else {}
            # The encoder's posterior of every test trial; without an amortised one, the free q of the gap trials.
            index, q = self.gap_index, free
            if is_amortised(trained.encoder):
                index, q = self.every, self._encoded(trained, self.every)
            inferred = self.last = self._infer(trained, index, q)
            numbers |= self._divergences(trained.model, inferred.q)
            numbers |= self._of_means(inferred.index, inferred.means)
            if trained.sampler.num_steps > 0:
                numbers |= self._of_chain(trained, inferred)
            numbers |= {name: float(value) for name, value in trained.model.likelihood.scalars().items()}
            numbers = finite(numbers)
        return numbers, self._facts(trained, inferred, numbers)

    def draw_data(self, folder: Path) -> None:
        draw_data(self.dataset, self.data, folder)

    def draw(self, trained: Trained, folder: Path, update: int | None) -> dict[str, Path]:
        """Rates of single trials, at the end also factors, inputs and gaps; nothing during training of a free table."""
        from lpc_runner.evaluation import sequence_pictures as pictures

        inferred = self.last if update is None else None
        if inferred is None:
            if not is_amortised(trained.encoder):
                return {}
            with evaluating(trained.model, trained.encoder):
                inferred = self._infer(trained, self.gap_index, self._encoded(trained, self.gap_index))
        trials = pictures.Trials(
            inferred.index.tolist(),
            inferred.means,
            self.dataset.to_model(self.values[inferred.index]),
            {name: values[inferred.index] for name, values in self.extras.items()},
            self.dataset.bin_seconds,
            self.dataset.kind == COUNTS,
        )
        paths = {"rates": folder / ("final.png" if update is None else f"update-{update:09d}.png")}
        pictures.rates_picture(trials, paths["rates"])
        if update is not None:
            return paths
        paths["factors"] = folder / "factors.png"
        pictures.factors_picture(trials, paths["factors"])
        if inferred.means.inputs is not None:
            paths["inputs"] = folder / "inputs.png"
            pictures.inputs_picture(trials, paths["inputs"])
        if self.gaps:
            paths["gaps"] = folder / "gaps.png"
            pictures.gaps_picture(self.gaps, paths["gaps"])
        return paths

    # Posteriors ---------------------------------------------------------------------------------------------

    def _encoded(self, trained: Trained, index: Tensor) -> DiagonalGaussian:
        assert trained.encoder is not None
        with torch.no_grad():
            parts = [trained.encoder(Batch(self.x[rows], rows)) for rows in index.split(CHUNK)]
        return DiagonalGaussian(torch.cat([q.mean for q in parts]), torch.cat([q.variance for q in parts]))

    def _infer(self, trained: Trained, index: Tensor, q: DiagonalGaussian) -> Inferred:
        count = self.settings.num_posterior_samples
        return Inferred(index, q, posterior_means(trained.model, q, count, self.seed))

    # Numbers ------------------------------------------------------------------------------------------------

    def _bounds(self, trained: Trained) -> tuple[dict[str, float], DiagonalGaussian]:
        """Bounds on the gap trials, from the encoder's q where there is one and from a free q; both gaps."""
        model, settings, x = trained.model, self.settings, self.x[self.gap_index]
        numbers, proposals = {}, {}
        if is_amortised(trained.encoder):
            proposals["encoder"] = self._encoded(trained, self.gap_index)
        fitted = self.settings.fit(model, x, proposals.get("encoder"), self.seed)
        proposals["free"] = fitted.q
        for name, q in proposals.items():
            bound = importance_bound(model, x, q, settings.num_importance_samples, self.seed)
            numbers[f"{name}_elbo"] = float(bound.elbo.mean())
            numbers[f"{name}_iwae"] = float(bound.iwae.mean())
            numbers[f"{name}_effective_samples"] = float(bound.effective_samples.median())
            if name == ("encoder" if "encoder" in proposals else "free"):
                numbers |= self._of_reconstruction(bound.elbo + q.kl_per_dimension(model.prior).double().sum(1))
        numbers["free_drift"] = float(fitted.drift.mean())
        best = max(numbers[f"{name}_iwae"] for name in proposals)
        exact = linear_gaussian.exact_log_evidence(model, x[..., self.held_in])
        if exact is not None:
            best = numbers["log_evidence"] = float(exact.mean())
        numbers["approximation_gap"] = best - numbers["free_elbo"]
        if "encoder" in proposals:
            numbers["amortisation_gap"] = numbers["free_elbo"] - numbers["encoder_elbo"]
            whole = importance_bound(model, self.x, self._encoded(trained, self.every), 10, self.seed)
            numbers["elbo"] = float(whole.elbo.mean())
        return numbers, fitted.q

    def _of_reconstruction(self, reconstruction: Tensor) -> dict[str, float]:
        """E_q[log p(x|z)] of the gap trials, (B,), and whether it explains their spikes better than the true rates do.

        A draw from the true model's posterior is distributed as the true z is, so that its rates score as the true
        ones do on average. Rates that score higher, by over two standard errors of the trials' differences, follow the
        spikes.
        """
        numbers = {"reconstruction": float(reconstruction.mean())}
        if self.true_log_likelihood is not None and len(reconstruction) > 1:
            mean, error = mean_and_error(reconstruction - self.true_log_likelihood[self.gap_index])
            numbers["identity_overfit"] = float(mean > 2 * error)
        return numbers

    def _divergences(self, model: LatentVariableModel, q: DiagonalGaussian) -> dict[str, float]:
        """KL(q ‖ p) in all and of every named block, means over trials."""
        kl = q.kl_per_dimension(model.prior).double().mean(0)
        blocks = {f"kl_{name}": float(kl[part].sum()) for name, part in model.blocks.items()}
        return {"kl": float(kl.sum())} | (blocks if len(blocks) > 1 else {})

    def _of_means(self, index: Tensor, means: Means) -> dict[str, float]:
        """What posterior means say of rates, spikes, latents, pulses and behaviour of these trials."""
        numbers, extras = {}, {name: values[index] for name, values in self.extras.items()}
        if "rates" in extras:
            numbers["rates_r2"] = r_squared(means.rates, extras["rates"])
        if self.dataset.kind == COUNTS:
            numbers |= self._of_spikes(index, means.rates)
        for name in ("latents", "behaviour"):
            if name in extras:
                numbers[f"{name}_r2"] = linear_r_squared(means.factors, extras[name])
        if "pulse_bin" in extras and means.inputs is not None:
            numbers["pulse_timing"] = pulse_timing(means.inputs, extras["pulse_bin"])
        return numbers

    def _of_spikes(self, index: Tensor, rates: Tensor) -> dict[str, float]:
        """Bits per spike and log-likelihood of held-in spikes, and bits per spike of held-out ones, under rates."""
        counts, held_in, held_out = self.values[index], self.held_in, slice(self.held_in.stop, None)
        likelihood = poisson_log_likelihood(counts[..., held_in], rates[..., held_in])
        numbers = {
            "bits_per_spike": bits_per_spike(counts[..., held_in], rates[..., held_in]),
            "spike_log_likelihood": float(likelihood.mean()),
        }
        if self.held_out:
            numbers["cosmoothing_bits_per_spike"] = bits_per_spike(counts[..., held_out], rates[..., held_out])
        return numbers

    def _of_chain(self, trained: Trained, inferred: Inferred) -> dict[str, float]:
        """Rates averaged over the run's own chain from q, given held-in neurons."""
        x, count = self.x[inferred.index], self.settings.num_posterior_samples
        means = chain_means(trained.model, x, inferred.q, trained.sampler, count, self.seed)
        numbers = self._of_means(inferred.index, means)
        kept = ("rates_r2", "bits_per_spike", "cosmoothing_bits_per_spike")
        return {f"chain_{name}": numbers[name] for name in kept if name in numbers}

    # Facts --------------------------------------------------------------------------------------------------

    def _facts(self, trained: Trained, inferred: Inferred, numbers: dict[str, float]) -> dict[str, object]:
        """What was measured on what, the true rates' value of every number that has one, and units."""
        settings, num_gap = self.settings, len(self.gap_index)
        ceilings = self._ceilings(inferred.index)
        by = "the encoder" if is_amortised(trained.encoder) else "the free q"
        sources = (
            f"{len(inferred.index):,} validation trials with posteriors from {by}, "
            f"{settings.num_posterior_samples} draws each; free q {settings.fit.way(trained.model)}, IWAE with "
            f"K = {settings.num_importance_samples:,} and gaps on {num_gap:,} of them"
        )
        return {
            "kind": "sequences",
            "split": "test",
            "num_trials": len(inferred.index),
            "num_gap_trials": num_gap,
            "num_importance_samples": settings.num_importance_samples,
            "ceilings": {name: value for name, value in ceilings.items() if name in numbers},
            "notes": notes_on(numbers, settings.num_importance_samples),
            "sources": sources,
        }

    def _ceilings(self, index: Tensor) -> dict[str, float]:
        """The same numbers for the truth: the true system's log p(x) where it is exact, else the true rates'."""
        ceilings: dict[str, float] = {}
        exact = getattr(self.dataset, "log_evidence", lambda values: None)(self.data.test.values.numpy())
        log_p = self.true_log_likelihood if exact is None else torch.from_numpy(exact).to(index.device)
        if log_p is not None:
            names = ("encoder_elbo", "encoder_iwae", "free_elbo", "free_iwae", "log_evidence")
            ceilings |= dict.fromkeys(names, float(log_p[self.gap_index].mean())) | {"elbo": float(log_p.mean())}
        if "rates" in self.extras:
            ceilings["rates_r2"] = 1.0
        if self.true_log_likelihood is not None:
            ceilings["reconstruction"] = float(self.true_log_likelihood[self.gap_index].mean())
            ceilings |= self._of_spikes(index, self.extras["rates"][index])
        ceilings |= {f"chain_{name}": value for name, value in ceilings.items()}
        return {name: value for name, value in ceilings.items() if math.isfinite(value)}
