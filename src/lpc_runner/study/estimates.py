"""Tables and pictures of log p(x), of chains and their gaps, and differences of methods paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lpc_runner.base.presentation import COLOURS
from lpc_runner.study.study import Group
from lpc_runner.study.style import MARKERS, Picture, file_name, label_decades, legend_below, new_figure, wrapped
from lpc_runner.study.tables import DASH, DIVERGED, Table, show, spread

# Compared where runs have them, in this order; all in nats per trial. log p(x) is exact where it is known at all;
# IWAE, a bound that is loose where posteriors are correlated, may order methods the other way round.
LIKELIHOODS = ("log_evidence", "free_iwae", "free_elbo", "encoder_elbo")
GAPS = ("amortisation_gap", "approximation_gap")
PAIRED = (*LIKELIHOODS, *GAPS)
TITLE = "paired differences"


def standard_error(values: Sequence[float]) -> float | None:
    """Standard deviation (over n - 1) divided by √n; None of fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """group - base of one number: by_seed, in the order of the seeds; mean; its standard error, None for one pair."""

    by_seed: dict[object, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def standard_error(self) -> float | None:
        """That of the mean over seeds."""
        return standard_error(list(self.by_seed.values()))

    def text(self) -> str:
        """+0.42 ± 0.11, the sign always."""
        if not math.isfinite(self.mean):
            return "not finite"
        error = DASH if self.standard_error is None else show(self.standard_error, 2)
        return f"{self.mean:+,.2f} ± {error}"


def paired_difference(group: Group, base: Group, metric: str) -> Difference | None:
    """The metric of `group` minus that of `base`, seed by seed, where a finished run of both has it; None: nowhere."""
    values = [{run.seed: run.numbers[metric] for run in g.counted if metric in run.numbers} for g in (group, base)]
    by_seed = {seed: value - values[1][seed] for seed, value in values[0].items() if seed in values[1]}
    return Difference(by_seed) if by_seed and not (group.diverged or base.diverged) else None


def paired_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Every group against the first that has IWAE of a free q (the VAE, where there is one); None without pairs."""
    measured = [group for group in groups if any("free_iwae" in run.numbers for run in group.counted)]
    if len(measured) < 2:
        return None
    base, *others = measured
    rows, used = [], []
    for group in others:
        differences = {metric: paired_difference(group, base, metric) for metric in PAIRED}
        if differences["free_iwae"] is not None:
            rows.append((group, differences))
            used += [metric for metric, difference in differences.items() if difference is not None]
    names = [metric for metric in PAIRED if metric in used]
    if not rows:
        return None
    texts = [
        [group.marked_label, str(len(differences["free_iwae"].by_seed))]
        + [DASH if differences[name] is None else differences[name].text() for name in names]
        for group, differences in rows
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


COLUMNS = {
    "likelihood": (
        "log_likelihood",
        "bdmc_gap",
        "ais_effective_samples",
        "iwae",
        "elbo",
        "log_evidence",
        "log_likelihood_bits_per_dim",
        "ais_acceptance",
    ),
    "posterior": (
        "calibration_chi2",
        "calibration_spread",
        "rhat_median",
        "rhat_max",
        "ess_per_pass",
        "ess_per_pass_slowest",
        "chain_acceptance",
        "variance_bias",
        "mean_error",
        "amortisation_gap",
        "approximation_gap",
        "log_likelihood",
    ),
}
TITLES = {"likelihood": "log p(x)", "posterior": "chains and posteriors"}
NOTES = {
    "likelihood": (
        "log_likelihood: annealed importance sampling, nats per example, below log p(x) in expectation; ± standard "
        "deviation over seeds. Error: of one run's mean over its examples, mean over seeds.",
        "bdmc_gap: upper - lower bound on examples simulated from the model. Where it is of the size of a difference "
        "between methods, more temperatures are wanted: metrics.ais.num_temperatures.",
    ),
    "posterior": (
        "calibration_chi2: of the ranks of z in the run's chain, per degree of freedom; 1: it samples the posterior. "
        "calibration_spread under 1: the chain is too wide, over 1: too narrow.",
        "ess_per_pass: effective samples per decoder gradient of long chains, median over coordinates and examples. "
        "Gaps in nats per example, log_likelihood being the truth.",
    ),
}


BIAS = (
    "variance_bias, mean_error: for as many decoder gradients of every sampler, against long Hamiltonian chains with a "
    "Metropolis test; medians over coordinates and examples, relative and in standard deviations, chance included."
)


def estimate_tables(dataset: str, groups: Sequence[Group]) -> list[Table]:
    """One table for each way in which these runs' log p(x) or chains were measured."""
    settings = {estimate.setting for group in groups for run in group.counted for estimate in run.estimates}
    return [_table(dataset, groups, setting) for setting in sorted(settings, key=str)]


def _table(dataset: str, groups: Sequence[Group], setting: tuple[Any, ...]) -> Table:
    kind = setting[0]
    shown = [group for group in groups if any(run.estimate(setting) for run in group.counted)]
    estimates = [
        estimate for group in shown for run in group.counted if (estimate := run.estimate(setting)) is not None
    ]
    present = {name for estimate in estimates for name in estimate.values}
    names = [name for name in COLUMNS[kind] if name in present]
    columns, rows = ["method", "seeds"], []
    for name in names:
        columns += [name, *(["error", "difference"] if _is_main(kind, name) else [])]
    for group in shown:
        cells = []
        for name in names:
            cells.append(spread(_values(group, setting, name).values(), len(group.counted)))
            if _is_main(kind, name):
                errors = _values(group, setting, f"{name}_error").values()
                cells += [
                    show(statistics.fmean(errors)) if errors else DASH,
                    _difference(group, shown[0], setting, name),
                ]
        rows.append([group.marked_label, str(len(group.counted)), *cells])
    facts = estimates[0].facts
    notes = [*NOTES[kind], *[BIAS] * ("variance_bias" in names)]
    if kind == "likelihood":
        if len({estimate.facts.get("start") for estimate in estimates}) > 1:
            priors = [group.label for group in shown if _start(group, setting) == "prior"]
            notes.append(f"Annealed from the encoder's q, and from the prior without one: {', '.join(priors)}.")
        notes.append(f"Difference: to {shown[0].label}, seed by seed, ± standard error of the mean.")
    notes += [DIVERGED] * any(group.diverged for group in shown)
    title = f"{dataset}: {TITLES[kind]}, {facts.get('num_examples')} {facts.get('split')} examples"
    if kind == "likelihood":
        title += f", AIS K = {facts.get('num_chains')}, S = {facts.get('num_temperatures')}"
        title += f", {facts['num_levels']} levels" if facts.get("num_levels") else ""
    else:
        title += f", {facts.get('num_simulated')} simulated"
    return Table(title, columns, rows, notes, frozenset(names[-2:]))


def _is_main(kind: str, name: str) -> bool:
    return kind == "likelihood" and name == "log_likelihood"


def _start(group: Group, setting: tuple[Any, ...]) -> Any:
    estimates = (run.estimate(setting) for run in group.counted)
    return next(estimate.facts.get("start") for estimate in estimates if estimate is not None)


def _values(group: Group, setting: tuple[Any, ...], name: str) -> dict[Any, float]:
    """One number of the group's runs by seed."""
    read = lambda run: (run.estimate(setting).values if run.estimate(setting) else {}).get(name)
    return {run.seed: value for run in group.counted if (value := read(run)) is not None}


def _difference(group: Group, base: Group, setting: tuple[Any, ...], name: str) -> str:
    """group - base over the seeds that both have; nothing of diverged runs, and of the base itself."""
    mine, theirs = (_values(of, setting, name) for of in (group, base))
    by_seed = {seed: value - theirs[seed] for seed, value in mine.items() if seed in theirs}
    if group is base or not by_seed or group.diverged or base.diverged:
        return DASH
    return Difference(by_seed).text()


def estimate_pictures(dataset: str, groups: Sequence[Group]) -> Iterator[Picture]:
    """Bias of the variance against effective samples per decoder gradient, a point for each group: mean and standard
    error over seeds."""
    settings = {estimate.setting for group in groups for run in group.counted for estimate in run.estimates}
    for number, setting in enumerate(sorted(settings, key=str)):
        points = []
        for group in groups:
            by_seed = [_values(group, setting, name) for name in ("ess_per_pass", "variance_bias")]
            seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
            if seeds:
                points.append((group, [[values[seed] for seed in seeds] for values in by_seed]))
        if points:
            suffix = f"-{number}" if len(settings) > 1 else ""
            caption = f"{dataset}: bias and effective samples of chains, mean ± standard error over seeds"
            yield Picture(file_name(dataset, f"chains{suffix}"), caption, _chain_figure(dataset, points))


def _chain_figure(dataset: str, points: Sequence[tuple[Group, list[list[float]]]]) -> Any:
    figure = new_figure(11, 4.6 + 0.3 * -(-len(points) // 2))
    axis = figure.subplots()
    axis.axhline(0, color="black", linewidth=1)
    for index, (group, (sizes, biases)) in enumerate(points):
        errors = list(map(standard_error, (sizes, biases)))
        shape = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        axis.errorbar(
            [statistics.fmean(sizes)],
            [statistics.fmean(biases)],
            xerr=errors[0],
            yerr=errors[1],
            color=COLOURS[index % len(COLOURS)],
            marker=shape,
            linestyle="",
            capsize=3,
            label=wrapped(f"{group.marked_label} ({len(sizes)} seed{'s' * (len(sizes) > 1)})", 48),
        )
    means = [statistics.fmean(sizes) for _, (sizes, _) in points]
    if max(means) > 10 * min(means) > 0:
        axis.set_xscale("log")
        label_decades(axis.xaxis, min(means), max(means))
    axis.set_xlabel("effective samples per decoder gradient (higher is better)")
    axis.set_ylabel("bias of the variance\n(0: none)")
    axis.set_title(dataset, loc="left")
    legend_below(figure, axis)
    return figure
