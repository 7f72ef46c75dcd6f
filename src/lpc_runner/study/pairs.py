"""Paired differences: the same seed under two methods has the same data, batches, start and noise of measuring."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lpc_runner.study.study import Group
from lpc_runner.study.tables import DASH, Table, show

# Compared where runs have them, in this order; all in nats per trial. log p(x) is exact where it is known at all;
# IWAE, a bound that is loose where posteriors are correlated, may order methods the other way round.
LIKELIHOODS = ("log_evidence", "free_iwae", "free_elbo", "encoder_elbo")
GAPS = ("amortisation_gap", "approximation_gap")
PAIRED = (*LIKELIHOODS, *GAPS)
TITLE = "paired differences"


@dataclass(frozen=True)
class Difference:
    """group - base of one number: by_seed, in the order of the seeds; mean; its standard error, None for one pair."""

    by_seed: dict[object, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def standard_error(self) -> float | None:
        """Standard deviation of the differences (over n - 1) divided by √n."""
        if len(self.by_seed) < 2:
            return None
        return statistics.stdev(self.by_seed.values()) / math.sqrt(len(self.by_seed))

    def text(self) -> str:
        """+0.42 ± 0.11, the sign always."""
        if not math.isfinite(self.mean):
            return "not finite"
        error = DASH if self.standard_error is None else show(self.standard_error, 2)
        return f"{self.mean:+,.2f} ± {error}"


def paired_difference(group: Group, base: Group, metric: str) -> Difference | None:
    """The metric of `group` minus that of `base`, seed by seed, where a finished run of both has it; None: nowhere."""
    found = [{run.seed: run.numbers[metric] for run in g.counted if metric in run.numbers} for g in (group, base)]
    by_seed = {seed: value - found[1][seed] for seed, value in found[0].items() if seed in found[1]}
    return Difference(by_seed) if by_seed and not (group.diverged or base.diverged) else None


def paired_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Every group against the first that has IWAE of a free q (the VAE, where there is one); None without pairs."""
    measured = [group for group in groups if any("free_iwae" in run.numbers for run in group.counted)]
    if len(measured) < 2:
        return None
    base, *others = measured
    rows, used = [], []
    for group in others:
        found = {metric: paired_difference(group, base, metric) for metric in PAIRED}
        if found["free_iwae"] is not None:
            rows.append((group, found))
            used += [metric for metric, difference in found.items() if difference is not None]
    names = [metric for metric in PAIRED if metric in used]
    if not rows:
        return None
    texts = [
        [group.marked_label, str(len(found["free_iwae"].by_seed))]
        + [DASH if found[name] is None else found[name].text() for name in names]
        for group, found in rows
    ]
    ways = ((LIKELIHOODS, "higher is better"), (GAPS, "smaller means a tighter bound, not a better model"))
    words = [f"{', '.join(own)}: {way}" for group, way in ways if (own := [name for name in names if name in group])]
    notes = [
        f"Each method minus {base.marked_label}, seed by seed: mean ± standard error of the mean, in nats per trial.",
        f"{'; '.join(words)}.",
        "log_evidence: exact log p(x). " * ("log_evidence" in names) + "free_iwae, free_elbo: bounds on log p(x) from "
        "a q fitted per validation trial, alike for every method.",
    ]
    return Table(f"{dataset}: {TITLE} to {base.label}", ["method", "pairs", *names], texts, notes)
