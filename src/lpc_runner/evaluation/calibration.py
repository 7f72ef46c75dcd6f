"""`metrics=posterior`: whether the run's own chain samples p(z|x), how fast it mixes, and what the bounds lose."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.presentation import STARTS
from lpc_runner.base.ranks import SINGLE
from lpc_runner.base.schema import NonNegativeInt, PositiveFloat, PositiveInt, at_least, checked, declared
from lpc_runner.base.tensors import generator
from lpc_runner.evaluation.ais import AnnealedImportance
from lpc_runner.evaluation.bounds import FreeFit, importance_bound
from lpc_runner.evaluation.diagnostics import effective_sample_size, r_hat, rank_spread, uniformity
from lpc_runner.evaluation.evaluator import (
    Evaluator,
    Idle,
    Metrics,
    Setup,
    Trained,
    evenly_spaced,
    finite,
    require_examples,
)
from lpc_runner.evaluation.held_out import EXAMPLES, HeldOut
from lpc_runner.evaluation.linear_gaussian import exact_log_evidence
from lpc_runner.inference.chain import Chain, ChainNoise, run_chain, to_the_end
from lpc_runner.inference.interfaces import Preconditioner, Sampler
from lpc_runner.inference.samplers import Info, State
from lpc_runner.tracking.progress import Progress

Tell = Callable[[int], None]  # that so many examples more are done
KEPT_NUMBERS = 2**25  # of the states of chains that are kept at once; changes no number but by what couples a batch
MIN_STATES = 20  # of a chain that is split in two and ranked
NUM_BOUND_SAMPLES = 100  # z per example in an ELBO

_log = logging.getLogger(__name__)


class PosteriorMetrics(Metrics):
    """Calibration ranks, R-hat and effective samples per pass of the run's own chain, and both gaps of its encoder.

    num_simulated: examples drawn from the model with their z, whose rank is taken among num_states states of a chain
    from the run's own start, evenly spaced over the run's T. num_examples: test examples, evenly spaced, for num_chains
    chains of num_chain_steps steps each, and for the gaps. num_reference_steps: of as many Hamiltonian chains with a
    Metropolis test, from which bias is measured; 0 for none. free_steps, free_samples (even), free_learning_rate: the
    fit of a free q per example. ais: log p(x), the truth in the gaps. Measured at the end only.
    """

    data_kinds = ("images", "spike counts", "real-valued series")
    every_epochs = 0

    @checked
    def __init__(
        self,
        *,
        num_simulated: Annotated[int, at_least(2)],
        num_states: PositiveInt,
        num_examples: PositiveInt,
        num_chains: Annotated[int, at_least(2)],
        num_chain_steps: Annotated[int, at_least(MIN_STATES)],
        free_steps: PositiveInt,
        free_samples: Annotated[int, at_least(2)],
        free_learning_rate: PositiveFloat,
        ais: AnnealedImportance,
        num_reference_steps: NonNegativeInt = 0,
    ) -> None:
        if 0 < num_reference_steps < MIN_STATES:
            raise ValueError(f"num_reference_steps must be 0 or at least {MIN_STATES}, got {num_reference_steps}")
        self.num_simulated, self.num_states, self.num_examples = num_simulated, num_states, num_examples
        self.num_chains, self.num_chain_steps, self.ais = num_chains, num_chain_steps, ais
        self.num_reference_steps = num_reference_steps
        self.fit = FreeFit(free_steps, free_samples, free_learning_rate)

    def evaluator(self, setup: Setup) -> Evaluator:
        require_examples(setup, "posterior")
        return PosteriorEvaluator(setup, self) if setup.ranks.is_main else Idle()

    def names(self) -> tuple[str, ...]:
        return tuple(NOTES)

    def label(self, facts: dict[str, object]) -> str:
        return f"posterior-{facts['start']}-m{facts['num_simulated']}-n{facts['num_examples']}"


NOTES = {
    "calibration_chi2": "χ² of the ranks per degree of freedom, mean over coordinates; 1: calibrated",
    "calibration_p": "the smallest p-value of a coordinate's ranks, times the number of coordinates",
    "calibration_spread": "of the ranks, over uniform ones'; under 1: the chain is too wide, over 1: too narrow",
    "rhat_median": "rank-normalised split R-hat, median over coordinates and examples",
    "rhat_max": "the largest of them; over 1.01: chains of this length do not agree",
    "ess_per_pass": "effective samples per decoder pass, median over coordinates and examples",
    "ess_per_pass_slowest": "the same of each example's slowest coordinate, mean over examples",
    "chain_acceptance": "of steps; of chains without a test, what one would accept",
    "variance_bias": "square distance from the reference's mean over its variance, - 1; median over coordinates",
    "mean_error": "of the posterior's mean in its standard deviations, chance included; median over coordinates",
    "reference_rhat_max": "as rhat_max, of the reference",
    "log_likelihood": "nats per example, exact where it is known, else annealed importance sampling",
    "free_elbo": "nats per example, a free q per example",
    "free_drift": "nats per example gained in the last fifth of the fit",
    "encoder_elbo": "nats per example, q of the encoder",
    "approximation_gap": "nats per example: log_likelihood - ELBO of the free q",
    "amortisation_gap": "nats per example: ELBO of the free q - of the encoder's",
}


class PosteriorEvaluator(HeldOut):
    """Measures the run's sampler on simulated and on test examples."""

    def __init__(self, setup: Setup, settings: PosteriorMetrics) -> None:
        super().__init__(replace(setup, ranks=SINGLE), settings.ais)
        self.settings, self.index = settings, evenly_spaced(len(self.data.test), settings.num_examples)
        self.ranks_found: np.ndarray | None = None  # of the last measurement, for the picture
        self.num_values = settings.num_states + 1

    def during(self, trained: Trained) -> dict[str, float]:
        return {}

    def final(self, trained: Trained) -> tuple[dict[str, float], dict[str, object]]:
        made, has_chain = 0, trained.sampler.num_steps > 0
        total = self.settings.num_simulated + len(self.index) * (2 if has_chain else 1)

        def tell(count: int) -> None:
            nonlocal made
            made += count
            progress.update(made, total, {})

        stages = "ranks, mixing and gaps" if has_chain else "ranks and gaps"
        _log.info("%s of %s examples, simulated and of the test split", stages, f"{total:,}")
        with self.measuring(trained), Progress(unit="example") as progress:
            tell(0)
            numbers, facts = self._calibration(trained, tell)
            if has_chain:
                numbers |= self._mixing(trained, tell)
            numbers |= self._gaps(trained, tell)
        if numbers["approximation_gap"] < -1:  # nat, beyond the noise of an ELBO
            _log.warning("log p(x) was found below an ELBO: more metrics.ais.num_temperatures bring it nearer")
        numbers = finite(numbers)
        return numbers, facts | self._facts(trained, numbers)

    def draw(self, trained: Trained, folder: Path, update: int | None) -> dict[str, Path]:
        pictures = super().draw(trained, folder, update)
        if update is None and self.ranks_found is not None:
            pictures["calibration"] = folder / "calibration.png"
            self.draw_measurement(pictures["calibration"])
        return pictures

    def draw_measurement(self, path: Path) -> None:
        if self.ranks_found is not None:
            ranks_picture(self.ranks_found, self.num_values, path)

    # Chains -------------------------------------------------------------------------------------------------

    def _start(
        self, trained: Trained, x: Tensor, index: Tensor, copies: int, name: tuple[str, int]
    ) -> tuple[Tensor, DiagonalGaussian | None]:
        """z(0) of the run's chains on examples it was not trained on, `copies` of each, one after another, and q."""
        sampler, model = trained.sampler, trained.model
        q = self.encoded(trained, x, index)
        if q is None and declared(getattr(sampler, "preconditioner", None), Preconditioner, "needs_encoder"):
            q = self.settings.fit(model, x, None, self.seed).q  # a table's rows are of training examples
        q = None if q is None else q.repeat(copies)
        place = declared(sampler, Sampler, "start")
        place = declared(sampler, Sampler, "first_start") if place == "persistent" else place
        stream, number = name
        source = generator(self.seed, f"{stream} start", number, device=x.device)
        shape, like = (copies * len(x), model.latent_dim), next(model.parameters())
        noise = torch.randn(shape, generator=source, device=x.device, dtype=like.dtype)
        if q is not None and (place == "encoder" or sampler.num_steps == 0):
            return q.rsample(noise), q
        return model.prior.scale * noise, q

    def _run(
        self,
        trained: Trained,
        sampler: Any,
        x: Tensor,
        index: Tensor,
        copies: int,
        name: tuple[str, int],
        steps: Collection[int],
    ) -> tuple[Chain, Tensor]:
        """`copies` chains for each example, and z after these steps, in the CPU's memory, (steps, copies, B, d)."""
        z, q = self._start(trained, x, index, copies, name)
        stream, number = name
        noise = ChainNoise(self.seed, number, tuple(z.shape), x.device, z.dtype, stream=f"{stream} noise")
        joint = partial(trained.model.log_joint, x.repeat(copies, *[1] * (x.ndim - 1)))
        states, centre = [], None if q is None else q.mean

        def keep(state: State, info: Info) -> None:
            if state.t in steps:
                states.append(state.z.detach().cpu().clone())

        chain = run_chain(joint, z, to_the_end(sampler), noise, centre=centre, q=q, on_step=keep)
        return chain, torch.stack(states).unflatten(1, (copies, len(x)))

    def _calibration(self, trained: Trained, tell: Tell) -> tuple[dict[str, float], dict[str, object]]:
        """Ranks of z* among thinned states of a chain on x ~ p(x|z*), z* ~ p(z) (Talts et al. 2018)."""
        ranks, count = [], self.settings.num_simulated
        for number, first in enumerate(range(0, count, EXAMPLES)):
            size = min(EXAMPLES, count - first)
            drawn = self.simulate(trained.model, size, "calibration", number)
            if drawn is None:
                return {}, {}
            z, x = drawn
            states = self._states(trained, x, number)
            ranks.append((states < z.cpu()).sum(0).numpy())
            self.num_values = len(states) + 1
            tell(size)
        self.ranks_found = np.concatenate(ranks)
        chi2, p = uniformity(self.ranks_found, self.num_values)
        spread = rank_spread(self.ranks_found, self.num_values)
        numbers = {
            "calibration_chi2": float(chi2.mean()),
            "calibration_p": float(min(1, p.min() * len(p))),
            "calibration_spread": float(spread.mean()),
        }
        by_coordinate = {"calibration_chi2": chi2.tolist(), "calibration_p": p.tolist()}
        return numbers, {"num_ranks": self.num_values, "by_coordinate": by_coordinate}

    def _states(self, trained: Trained, x: Tensor, number: int) -> Tensor:
        """Thinned states (L, B, d) of the run's chain on x; without a chain, draws of q."""
        sampler, count = trained.sampler, self.settings.num_states
        index = torch.arange(len(x), device=x.device)
        name = ("calibration", number)
        if sampler.num_steps == 0:
            return self._start(trained, x, index, count, name)[0].view(count, len(x), -1).cpu()
        steps = np.linspace(sampler.num_steps, 0, min(count, sampler.num_steps), endpoint=False).round()
        return self._run(trained, sampler, x, index, 1, name, set(steps.astype(int).tolist()))[1][:, 0]

    def _mixing(self, trained: Trained, tell: Tell) -> dict[str, float]:
        """R-hat, effective samples per pass and bias of several long chains for each test example."""
        settings, sampler = self.settings, copy.copy(trained.sampler)
        sampler.num_steps = settings.num_chain_steps
        per_chain = max(settings.num_chain_steps, settings.num_reference_steps) * trained.model.latent_dim
        per_example = settings.num_chains * per_chain
        every = range(1, sampler.num_steps + 1)
        r_hats, sizes, passes, acceptance, against = [], [], 0.0, [], []
        for number, index in enumerate(self.index.split(max(1, KEPT_NUMBERS // per_example))):
            x = self.examples(index)
            chain, states = self._run(trained, sampler, x, index, settings.num_chains, ("mixing", number), every)
            passes = chain.num_evaluations / (settings.num_chains * len(x))
            chains = states.transpose(0, 1).numpy()
            r_hats.append(r_hat(chains))
            sizes.append(effective_sample_size(chains))
            if chain.acceptance is not None:
                acceptance += [float(chain.acceptance)] * len(index)
            if settings.num_reference_steps:
                # As many passes for every sampler, and of the states made by them the second half.
                count = int(min(1, settings.num_chain_steps / passes) * len(states))
                against.append(self._against_reference(trained, index, number, chains[:, count // 2 : count]))
            tell(len(index))
        agreement, size = np.concatenate(r_hats), np.concatenate(sizes) / (settings.num_chains * passes)
        numbers = {
            "rhat_median": float(np.median(agreement)),
            "rhat_max": float(agreement.max()),
            "ess_per_pass": float(np.median(size)),
            "ess_per_pass_slowest": float(size.min(1).mean()),
        }
        if acceptance:
            numbers["chain_acceptance"] = float(np.mean(acceptance))
        if against:
            variance, square, rhat = (np.concatenate(part) for part in zip(*against))
            numbers["variance_bias"] = float(np.median(variance)) - 1
            numbers["mean_error"] = float(np.sqrt(np.median(square)))
            numbers["reference_rhat_max"] = float(rhat.max())
        return numbers

    def _against_reference(
        self, trained: Trained, index: Tensor, number: int, chains: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of chains (C, L, B, d) and long Hamiltonian ones, (B, d) each: the mean square distance of their states, and
        the square one of their mean, from the mean of the long ones, over the variance of these; R-hat of the latter.
        """
        settings, x = self.settings, self.examples(index)
        q = self.annealed_from(trained, x, index)
        source = generator(self.seed, "reference", number, device=x.device)
        counts = settings.num_chains, settings.num_reference_steps
        exact = settings.ais.posterior_chains(trained.model, x, q, *counts, source).numpy()
        mean, variance = exact.mean((0, 1), dtype=np.float64), exact.var((0, 1), dtype=np.float64)
        distance = (chains - mean) / np.sqrt(variance)
        return (distance**2).mean((0, 1)), distance.mean((0, 1)) ** 2, r_hat(exact)

    # Gaps ---------------------------------------------------------------------------------------------------

    def _gaps(self, trained: Trained, tell: Tell) -> dict[str, float]:
        """log p(x) - ELBO of a free q, and what the encoder's loses beside that (Cremer et al. 2018)."""
        model, rows = trained.model, []
        for number, index in enumerate(self.index.split(EXAMPLES)):
            x = self.examples(index)
            q = self.encoded(trained, x, index)
            fitted = self.settings.fit(model, x, q, self.seed)
            exact = exact_log_evidence(model, x)
            if exact is None:
                begin = self.annealed_from(trained, x, index)
                exact = self.settings.ais.bounds(model, x, begin, self.seed, f"gaps/{number}").lower
            of = partial(importance_bound, num_samples=NUM_BOUND_SAMPLES, seed=self.seed, stream=f"importance/{number}")
            elbos = [of(model, x, each).elbo for each in (fitted.q, q) if each is not None]
            rows.append(torch.stack([exact.to(fitted.drift), fitted.drift, *elbos], 1))
            tell(len(index))
        exact, drift, free, *encoder = torch.cat(rows).mean(0).tolist()
        numbers = {"log_likelihood": exact, "free_elbo": free, "free_drift": drift, "approximation_gap": exact - free}
        if encoder:
            numbers |= {"encoder_elbo": encoder[0], "amortisation_gap": free - encoder[0]}
        return numbers

    def _facts(self, trained: Trained, numbers: dict[str, float]) -> dict[str, object]:
        settings, ais = self.settings, self.settings.ais
        steps = trained.sampler.num_steps
        count = self.num_values - 1
        states = f"{'state' if count == 1 else 'states'} of a chain of T = {steps}"
        among = f"{count} {states if steps else 'draws of q'}"
        mixing = f"R-hat and effective samples of {settings.num_chains} chains of {settings.num_chain_steps:,} steps"
        if steps and settings.num_reference_steps:
            mixing += f", bias against Hamiltonian ones of {settings.num_reference_steps:,}"
        start = self.start_of(trained)
        truth = f"AIS from {STARTS[start]} with K = {ais.num_chains}, S = {ais.num_temperatures}"
        if exact_log_evidence(trained.model, self.examples(self.index[:1])) is not None:
            truth = "exact log p(x)"
        gaps = f"free q {settings.fit.way(trained.model)}, {truth}"
        sources = f"ranks of z on {settings.num_simulated:,} simulated examples among {among}; on "
        sources += f"{len(self.index):,} test examples: {f'{mixing}; ' if steps else ''}gaps, {gaps}"
        return {
            "kind": "posterior",
            "split": "test",
            "num_simulated": settings.num_simulated,
            "num_examples": len(self.index),
            "num_chains": settings.num_chains,
            "num_chain_steps": settings.num_chain_steps,
            **({"num_reference_steps": settings.num_reference_steps} if settings.num_reference_steps else {}),
            "num_temperatures": ais.num_temperatures,
            "start": start,
            "ceilings": {},
            "notes": {name: NOTES[name] for name in numbers},
            "sources": sources,
        }


def ranks_picture(ranks: np.ndarray, num_values: int, path: Path) -> None:
    """How far each coordinate's distribution of ranks is from uniform, in 95 % of which it stays inside the band at any
    one rank; and all ranks together."""
    from lpc_runner.evaluation.sequence_pictures import BLUE, DATA, TRUTH, figure_to

    count = len(ranks)
    values = np.arange(1, num_values + 1)
    with figure_to(path, (12, 4.6)) as figure:
        left, right = figure.subplots(1, 2)
        uniform = values / num_values
        band = 1.96 * np.sqrt(uniform * (1 - uniform) / count)
        left.fill_between(values - 1, -band, band, color=DATA, alpha=0.3, linewidth=0)
        for column in ranks.T:
            below = np.bincount(column, minlength=num_values).cumsum() / count
            left.plot(values - 1, below - uniform, color=BLUE, linewidth=1, alpha=max(0.15, min(1, 8 / ranks.shape[1])))
        left.axhline(0, color=TRUTH, linewidth=1)
        left.set(xlabel=f"rank of z among {num_values - 1} states", ylabel="distribution - uniform")
        left.set_title("every coordinate", loc="left")
        heights = np.bincount(ranks.ravel(), minlength=num_values) * num_values / ranks.size
        right.bar(values - 1, heights, color=BLUE, width=0.9)
        right.axhline(1, color=TRUTH, linewidth=1)
        right.set(xlabel=f"rank of z among {num_values - 1} states", ylabel="share, of what is expected")
        right.set_title("all coordinates (hill: chain too wide, valley: too narrow)", loc="left")
