"""`metrics=likelihood`: log p(x) of test examples by annealed importance sampling, and how far it may be from it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.presentation import STARTS
from lpc_runner.base.schema import NonNegativeInt, PositiveInt, checked
from lpc_runner.base.tensors import hash_of_tensors
from lpc_runner.evaluation.ais import AnnealedImportance
from lpc_runner.evaluation.bounds import importance_bound, is_probability, prior_of
from lpc_runner.evaluation.evaluator import (
    Evaluator,
    Metrics,
    Setup,
    Trained,
    evenly_spaced,
    finite,
    mean_and_error,
    require_examples,
)
from lpc_runner.evaluation.held_out import EXAMPLES, HeldOut
from lpc_runner.evaluation.linear_gaussian import exact_log_evidence
from lpc_runner.store.checkpoints import read_sealed, write_sealed
from lpc_runner.tracking.progress import Progress, show_duration

VERSION = 2  # of what is kept; raise when what is computed changes

_log = logging.getLogger(__name__)


class LikelihoodMetrics(Metrics):
    """log p(x) of test examples: annealed importance sampling, its distance from an upper bound, IWAE and ELBO.

    ais: how. num_examples: test examples, evenly spaced; None for all. num_simulated: examples drawn from the model on
    which lower and upper bound are compared, 0 for none. num_importance_samples: K of IWAE. every_epochs: measure
    during training too, without the comparison, 0 for only at the end.
    """

    data_kinds = ("images", "spike counts", "real-valued series")

    @checked
    def __init__(
        self,
        *,
        ais: AnnealedImportance,
        num_examples: PositiveInt | None,
        num_simulated: NonNegativeInt,
        num_importance_samples: PositiveInt,
        every_epochs: NonNegativeInt,
    ) -> None:
        self.ais, self.num_examples, self.num_simulated = ais, num_examples, num_simulated
        self.num_importance_samples, self.every_epochs = num_importance_samples, every_epochs

    def evaluator(self, setup: Setup) -> Evaluator:
        require_examples(setup, "likelihood")
        return LikelihoodEvaluator(setup, self)

    def names(self) -> tuple[str, ...]:
        return tuple(NOTES)

    def label(self, facts: dict[str, object]) -> str:
        counts = f"k{facts['num_chains']}-s{facts['num_temperatures']}-n{facts['num_examples']}"
        return f"likelihood-{facts['start']}-{counts}"


NOTES = {
    "log_likelihood": "nats per example; below log p(x) in expectation",
    "log_likelihood_error": "its standard error over examples",
    "log_likelihood_bits_per_dim": "",
    "bdmc_gap": "nats: upper - lower bound on simulated examples",
    "bdmc_gap_error": "its standard error over examples",
    "ais_effective_samples": "of the K weights, median over examples",
    "ais_acceptance": "of the moves, mean",
    "iwae": "nats per example, from the encoder's q",
    "elbo": "nats per example, from the encoder's q",
    "log_evidence": "nats per example, exact log p(x)",
}


class LikelihoodEvaluator(HeldOut):
    """Measures log p(x); chunks of examples that are done are kept in `cache_dir`, so that a measurement goes on.

    Of several ranks, each has a share of the examples.
    """

    def __init__(self, setup: Setup, settings: LikelihoodMetrics) -> None:
        super().__init__(setup, settings.ais)
        self.settings, self.cache_dir = settings, Path(setup.cache_dir)
        self.index = evenly_spaced(len(self.data.test), settings.num_examples)

    def during(self, trained: Trained) -> dict[str, float]:
        with self.measuring(trained):
            rows = self._rows(len(self.index), partial(self._test, trained), None, "AIS")
            return finite(self._test_numbers(trained, rows)) if self.ranks.is_main else {}

    def final(self, trained: Trained) -> tuple[dict[str, float], dict[str, object]]:
        model, num_simulated = trained.model, self.settings.num_simulated
        with self.measuring(trained):
            if num_simulated and self.simulate(model, 1, "bdmc", 0) is None:
                _log.warning("%s draws no samples: no upper bound", type(model.likelihood).__name__)
                num_simulated = 0
            if self.ranks.is_main:
                self._announce(trained, num_simulated)
            rows = self._rows(len(self.index), partial(self._test, trained), self._key(trained, "test"), "AIS")
            gaps = None
            if num_simulated:
                key = self._key(trained, "simulated", num_simulated)
                gaps = self._rows(num_simulated, partial(self._simulated, trained), key, "BDMC")[:, 0]
            if not self.ranks.is_main:
                return {}, {}
            numbers = self._test_numbers(trained, rows)
            if gaps is not None:
                numbers["bdmc_gap"], numbers["bdmc_gap_error"] = mean_and_error(gaps)
        numbers = finite(numbers)
        return numbers, self._facts(trained, numbers, num_simulated)

    # Chunks -------------------------------------------------------------------------------------------------

    def _test(self, trained: Trained, number: int, part: range) -> Tensor:
        """Per test example of a chunk: log p(x), effective samples, acceptance, and of the encoder IWAE and ELBO."""
        settings, index = self.settings, self.index[part.start : part.stop]
        x = self.examples(index)
        q = self.annealed_from(trained, x, index)
        bounds = settings.ais.bounds(trained.model, x, q, self.seed, f"test/{number}")
        columns = [bounds.lower, bounds.effective_samples, bounds.acceptance]
        if (q := self.encoded(trained, x, index)) is not None:
            count, stream = settings.num_importance_samples, f"importance/{number}"
            bound = importance_bound(trained.model, x, q, count, self.seed, stream)
            columns += [bound.iwae, bound.elbo]
        return torch.stack(columns, 1)

    def _simulated(self, trained: Trained, number: int, part: range) -> Tensor:
        """Per simulated example of a chunk: upper - lower bound, and the lower one."""
        drawn = self.simulate(trained.model, len(part), "bdmc", number)
        assert drawn is not None  # else `final` asks for none
        z, x = drawn
        q = self.annealed_from(trained, x, torch.arange(part.start, part.stop))
        bounds = self.settings.ais.bounds(trained.model, x, q, self.seed, f"simulated/{number}", z)
        assert bounds.upper is not None  # as z was given
        return torch.stack([bounds.upper - bounds.lower, bounds.lower], 1)

    def _rows(self, count: int, compute: Callable[[int, range], Tensor], key: str | None, name: str) -> Tensor:
        """Rows of `count` examples on rank 0 (count, columns), chunk by chunk; with a key, what is done is kept."""
        chunks = [range(start, min(start + EXAMPLES, count)) for start in range(0, count, EXAMPLES)]
        shares = np.array_split(np.arange(len(chunks)), self.ranks.size)
        counts = [sum(len(chunks[i]) for i in share) for share in shares]
        mine, total = shares[self.ranks.rank].tolist(), counts[self.ranks.rank]
        path = None if key is None else self.cache_dir / f"likelihood-{key}-{self.ranks.rank}-{self.ranks.size}.npz"
        kept = read_sealed(path, "", "its examples") if path is not None and path.exists() else None
        parts, length = [], 0
        done = 0 if kept is None else -(-len(kept["rows"]) // EXAMPLES)
        if kept is not None and len(kept["rows"]) == sum(len(chunks[i]) for i in mine[:done]):
            parts, length, mine = [kept["rows"]], len(kept["rows"]), mine[done:]
            _log.info("%s: %d of %d examples were done before", name, length, total)
        with Progress(silent=not self.ranks.is_main or key is None, unit=f"{name} example") as progress:
            progress.update(length, total, {})
            for number in mine:
                try:
                    parts.append(compute(number, chunks[number]).cpu())
                except KeyboardInterrupt:
                    if path is not None:
                        _log.info("%s: %d of %d examples are kept; the same command goes on", name, length, total)
                    raise
                length += len(chunks[number])
                if path is not None:
                    write_sealed(path, {"rows": torch.cat(parts)}, "")
                progress.update(length, total, {})
        if self.ranks.size == 1:
            return torch.cat(parts)
        own = parts[0].shape[1] if parts else 1
        width = max(int(width) for width in self.ranks.gather_rows(torch.tensor([own]), [1] * self.ranks.size))
        rows = torch.cat(parts) if parts else torch.empty(0, width, dtype=torch.float64)
        return self.ranks.gather_rows(rows, counts)

    def _key(self, trained: Trained, *what: object) -> str:
        """Names everything that rows depend on: weights, data, settings, seed, device; and a value of the model, since
        the code of a model of one's own may change."""
        x, q = self._first(trained)
        with torch.no_grad():
            probe = float(trained.model.log_joint(x, q.mean).double().sum())
        modules = {"model": trained.model} | ({} if trained.encoder is None else {"encoder": trained.encoder})
        weights = nn.ModuleDict(modules).state_dict()
        settings, ais = self.settings, self.settings.ais
        named = [VERSION, *what, hash_of_tensors(weights), f"{probe:.5g}", self.index.tolist(), self.seed]
        named += [hash_of_tensors({"values": self.data.test.values[self.index]}), self.device.type]
        named += [ais.num_chains, ais.num_temperatures, ais.num_leapfrog, self.start_of(trained)]
        named.append(settings.num_importance_samples)
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:24]

    def _first(self, trained: Trained) -> tuple[Tensor, DiagonalGaussian]:
        """The first chunk of test examples, and a q for each that costs nothing."""
        index = self.index[:EXAMPLES]
        x = self.examples(index)
        return x, self.encoded(trained, x, index) or prior_of(trained.model, len(x))

    # Words and numbers --------------------------------------------------------------------------------------

    def _announce(self, trained: Trained, num_simulated: int) -> None:
        """How much is to be done and for how long at most, before it starts."""
        ais = self.settings.ais
        per_move = ais.seconds_per_move(trained.model, *self._first(trained))
        counts = (len(self.index), False), (num_simulated, True)
        moves = sum(-(-count // EXAMPLES) * ais.num_moves(trained.model, backward) for count, backward in counts)
        _log.info(
            "AIS of %s test%s examples, K = %s chains, S = %s temperatures, %s decoder gradients: "
            "at most %s on %s at the pace just timed%s",
            f"{len(self.index):,}",
            f" and {num_simulated:,} simulated" if num_simulated else "",
            *(f"{value:,}" for value in (ais.num_chains, ais.num_temperatures)),
            f"{self._passes(trained, num_simulated):,}",
            show_duration(per_move * moves),
            self.device,
            f", shared by {self.ranks.size} ranks" if self.ranks.size > 1 else "",
        )

    def _passes(self, trained: Trained, num_simulated: int) -> int:
        fit, num_examples = self.ais.fit_passes(trained.model), len(self.index)
        forward, both = (fit + self.ais.passes_per_example(backward) for backward in (False, True))
        return num_examples * forward + num_simulated * both

    def _test_numbers(self, trained: Trained, rows: Tensor) -> dict[str, float]:
        numbers = {}
        numbers["log_likelihood"], numbers["log_likelihood_error"] = mean_and_error(rows[:, 0])
        if is_probability(self.dataset, trained.model):
            bits = math.prod(self.dataset.shape) * math.log(2)
            numbers["log_likelihood_bits_per_dim"] = -numbers["log_likelihood"] / bits
        numbers["ais_effective_samples"] = float(rows[:, 1].median())
        numbers["ais_acceptance"] = float(rows[:, 2].mean())
        if rows.shape[1] > 3:
            numbers["iwae"], numbers["elbo"] = (float(column.mean()) for column in rows[:, 3:].unbind(1))
        if math.isfinite(numbers["log_likelihood"]):  # else the parameters are not, and closed forms raise
            parts = (exact_log_evidence(trained.model, self.examples(part)) for part in self.index.split(EXAMPLES))
            exact = [part for part in parts if part is not None]
            numbers |= {"log_evidence": float(torch.cat(exact).mean())} if exact else {}
        return numbers

    def _facts(self, trained: Trained, numbers: dict[str, float], num_simulated: int) -> dict[str, object]:
        settings, ais = self.settings, self.settings.ais
        start = self.start_of(trained)
        sources = (
            f"{len(self.index):,} test examples; annealed from {STARTS[start]}: K = {ais.num_chains:,} chains, "
            f"S = {ais.num_temperatures:,} temperatures, {ais.num_leapfrog} leapfrog steps a move"
        )
        sources += f"; gap on {num_simulated:,} simulated examples" if num_simulated else ""
        sources += f"; IWAE with K = {settings.num_importance_samples:,}" if "iwae" in numbers else ""
        exact = getattr(self.dataset, "log_evidence", lambda values: None)(self.data.test.values[self.index].numpy())
        ceilings = {} if exact is None else dict.fromkeys(("log_likelihood", "log_evidence"), float(np.mean(exact)))
        return {
            "kind": "likelihood",
            "split": "test",
            "num_examples": len(self.index),
            "num_chains": ais.num_chains,
            "num_temperatures": ais.num_temperatures,
            "num_leapfrog": ais.num_leapfrog,
            "start": start,
            "num_simulated": num_simulated,
            "num_importance_samples": settings.num_importance_samples,
            "num_levels": trained.model.likelihood.num_levels if is_probability(self.dataset, trained.model) else None,
            "gradient_evaluations": self._passes(trained, num_simulated),
            "ceilings": {name: value for name, value in ceilings.items() if name in numbers},
            "notes": {name: NOTES[name] for name in numbers},
            "sources": sources,
        }
