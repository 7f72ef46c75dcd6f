"""Tables and pictures of log p(x), of chains, of gaps, and of differences between methods paired by seed."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lpc_runner.base.presentation import COLOURS, STARTS
from lpc_runner.study.study import Group
from lpc_runner.study.style import MARKERS, Picture, file_name, legend_below, log_where_wide, new_figure, wrapped
from lpc_runner.study.tables import DASH, Table, group_table, mean_of, show, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Compared where runs have them, in this order; all in nats per trial. log p(x) is exact where it is known at all;
# IWAE, a bound that is loose where posteriors are correlated, may order methods the other way round.
LIKELIHOODS = ("log_evidence", "free_iwae", "free_elbo", "encoder_elbo")
GAPS = ("approximation_gap", "amortisation_gap")
PAIRED = (*LIKELIHOODS, *reversed(GAPS))
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


def paired_difference(
    group: Group, base: Group, metric: str, setting: tuple[Any, ...] | None = None
) -> Difference | None:
    """The metric of `group` minus that of `base`, seed by seed, where a finished run of both has it; None: nowhere."""
    ours, theirs = group.values(metric, setting), base.values(metric, setting)
    by_seed = {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}
    return Difference(by_seed) if by_seed and not (group.diverged or base.diverged) else None


def paired_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Every group against the first that has IWAE of a free q (the VAE, where there is one); None without pairs."""
    measured = [group for group in groups if group.values("free_iwae")]
    pairs = [(group, paired_difference(group, measured[0], "free_iwae")) for group in measured[1:]]
    others = [group for group, pair in pairs if pair is not None]
    if not others:
        return None
    base = measured[0]
    columns = {"pairs": [str(len(pair.by_seed)) for _, pair in pairs if pair is not None]}
    for name in PAIRED:
        differences = [paired_difference(group, base, name) for group in others]
        if any(differences):
            columns[name] = [DASH if pair is None else pair.text() for pair in differences]
    ways = ((LIKELIHOODS, "higher is better"), (GAPS, "smaller means a tighter bound, not a better model"))
    words = [f"{', '.join(own)}: {way}" for group, way in ways if (own := [name for name in columns if name in group])]
    notes = [
        f"Each method minus {base.marked_label}, seed by seed: mean ± standard error of the mean, in nats per trial.",
        f"{'; '.join(words)}.",
        "log_evidence: exact log p(x). " * ("log_evidence" in columns) + "free_iwae, free_elbo: bounds on log p(x) "
        "from a q fitted per validation trial, alike for every method.",
    ]
    return group_table(f"{dataset}: {TITLE} to {base.label}", others, columns, notes)


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
        "between methods, more temperatures are wanted: metrics.ais.num_temperatures. Of several measurements of a "
        "run, that of the smallest gap is shown.",
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


def _settings(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    return sorted({each.setting for group in groups for run in group.counted for each in run.estimates}, key=str)


def estimate_tables(dataset: str, groups: Sequence[Group]) -> list[Table]:
    """One table for each way in which these runs' log p(x) or chains were measured."""
    return [_table(dataset, groups, setting) for setting in _settings(groups)]


def _table(dataset: str, groups: Sequence[Group], setting: tuple[Any, ...]) -> Table:
    kind = setting[0]
    facts = {g.label: [m.facts for run in g.counted if (m := run.measured(setting)) is not None] for g in groups}
    shown = [group for group in groups if facts[group.label]]
    present = {name for group in shown for run in group.counted for name in run.values(setting)}
    names = [name for name in COLUMNS[kind] if name in present]
    columns = {"seeds": [str(len(group.counted)) for group in shown]}
    for name in names:
        columns[name] = [spread(group.values(name, setting).values(), len(group.counted)) for group in shown]
        if (kind, name) == ("likelihood", "log_likelihood"):
            errors = [mean_of(group.values("log_likelihood_error", setting).values()) for group in shown]
            columns["error"] = [show(error) for error in errors]
            pairs = [paired_difference(group, shown[0], name, setting) for group in shown[1:]]
            columns["difference"] = [DASH, *(DASH if pair is None else pair.text() for pair in pairs)]
    notes = [*NOTES[kind], *[BIAS] * ("variance_bias" in names)]
    of_one = facts[shown[0].label][0]
    title = f"{dataset}: {TITLES[kind]}, {of_one.get('num_examples')} {of_one.get('split')} examples"
    starts = {group.label: {each.get("start") for each in facts[group.label]} for group in shown}
    if len(set().union(*starts.values()) - {None}) > 1:
        of = {start: "; ".join(label for label, own in starts.items() if start in own) for start in STARTS}
        notes += [f"Annealed from {words}: {of[start]}." for start, words in STARTS.items() if of[start]]
    if kind == "likelihood":
        notes.append(f"Difference: to {shown[0].label}, seed by seed, ± standard error of the mean.")
        title += f", AIS K = {of_one.get('num_chains')}, S = {of_one.get('num_temperatures')}"
        title += f", {of_one['num_levels']} levels" if of_one.get("num_levels") else ""
    else:
        title += f", {of_one.get('num_simulated')} simulated"
    return group_table(title, shown, columns, notes, names[-2:])


def estimate_pictures(dataset: str, groups: Sequence[Group]) -> Iterator[Picture]:
    """Bias of the variance against effective samples per decoder gradient, a point for each group: mean and standard
    error over seeds."""
    settings = _settings(groups)
    for number, setting in enumerate(settings):
        points = []
        for group in groups:
            sizes, biases = (group.values(name, setting) for name in ("ess_per_pass", "variance_bias"))
            seeds = [seed for seed in sizes if seed in biases]
            if seeds:
                points.append((group, [[values[seed] for seed in seeds] for values in (sizes, biases)]))
        if points:
            suffix = f"-{number}" if len(settings) > 1 else ""
            caption = f"{dataset}: bias and effective samples of chains, mean ± standard error over seeds"
            yield Picture(file_name(dataset, f"chains{suffix}"), caption, _chain_figure(dataset, points))


def _chain_figure(dataset: str, points: Sequence[tuple[Group, list[list[float]]]]) -> Figure:
    figure = new_figure(11, 4.6 + 0.3 * -(-len(points) // 2))
    axis = figure.subplots()
    axis.axhline(0, color="black", linewidth=1)
    for index, (group, (sizes, biases)) in enumerate(points):
        shape = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        axis.errorbar(
            [statistics.fmean(sizes)],
            [statistics.fmean(biases)],
            xerr=standard_error(sizes),
            yerr=standard_error(biases),
            color=COLOURS[index % len(COLOURS)],
            marker=shape,
            linestyle="",
            capsize=3,
            label=wrapped(f"{group.marked_label} ({len(sizes)} seed{'s' * (len(sizes) > 1)})", 48),
        )
    means = [statistics.fmean(sizes) for _, (sizes, _) in points]
    log_where_wide(axis, "x", min(means), max(means))
    axis.set_xlabel("effective samples per decoder gradient (higher is better)")
    axis.set_ylabel("bias of the variance\n(0: none)")
    axis.set_title(dataset, loc="left")
    legend_below(figure, axis)
    return figure


BEST_KNOWN = {"log_evidence": "exact log p(x)", "free_iwae": "IWAE with a free q"}  # the first that is known counts


def sequence_pictures(dataset: str, groups: Sequence[Group]) -> Iterator[Picture]:
    """Gaps and paired differences of one dataset; nothing where no gaps were measured."""
    measured = [group for group in groups if group.values("approximation_gap")]
    if measured:
        caption = (
            f"{dataset}: approximation and amortisation gap of every method, nats per trial, mean ± std over seeds"
        )
        yield Picture(file_name(dataset, "gaps"), caption, gaps_figure(dataset, measured))
    for metric, words in BEST_KNOWN.items():
        differences = [(group, paired_difference(group, measured[0], metric)) for group in measured[1:]]
        paired = [(group, difference) for group, difference in differences if difference is not None]
        if paired:
            caption = f"{dataset}: {words}, each method against {measured[0].label} seed by seed, nats per trial"
            yield Picture(file_name(dataset, "paired"), caption, paired_figure(dataset, measured[0], paired, words))
            return


def gaps_figure(dataset: str, groups: Sequence[Group]) -> Figure:
    """Means over seeds of both gaps as stacked bars; whiskers: standard deviation of the whole over seeds."""
    figure = new_figure(10, 2 + 0.75 * len(groups))
    axis = figure.subplots()
    places = range(len(groups))
    left = [0.0] * len(groups)
    for name, colour in zip(GAPS, COLOURS):
        widths = [mean_of(group.finite(name).values()) or 0.0 for group in groups]
        axis.barh(places, widths, left=left, color=colour, height=0.6, label=name.replace("_", " "))
        left = [start + width for start, width in zip(left, widths)]
    for place, group in zip(places, groups):
        totals = [sum(run.numbers.get(name, 0.0) for name in GAPS) for run in group.counted]
        text, std = f"{left[place]:.2f}", 0.0
        if len(totals) > 1:
            std = statistics.stdev(totals)
            axis.errorbar(left[place], place, xerr=std, color="black", capsize=4, linewidth=1.6)
            text += f" ± {std:.2f}"
        axis.annotate(text, (left[place] + std, place), (8, 0), textcoords="offset points", va="center")
    _name_rows(axis, groups)
    axis.set_xlabel("nats per trial between the best bound and the ELBO")
    axis.margins(x=0.2)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    seeds = max(len(group.counted) for group in groups)
    figure.suptitle(f"{dataset}: variational gaps" + (f", mean ± std over {seeds} seeds" if seeds > 1 else ""))
    return figure


def paired_figure(dataset: str, base: Group, paired: Sequence[tuple[Group, Difference]], words: str) -> Figure:
    """Every pair of seeds as a dot, their mean with its standard error as a whisker, zero as a line."""
    figure = new_figure(10, 1.8 + 0.75 * len(paired))
    axis = figure.subplots()
    axis.axvline(0, color="black", linewidth=1.2)
    for place, (_, difference) in enumerate(paired):
        values = list(difference.by_seed.values())
        axis.plot(values, [place + 0.18] * len(values), "o", color=COLOURS[4], markersize=7)
        error = difference.standard_error or 0.0
        axis.errorbar(difference.mean, place - 0.08, xerr=error, fmt="D", color=COLOURS[0], capsize=5)
        axis.annotate(
            difference.text(), (difference.mean, place - 0.08), (0, 9), textcoords="offset points", ha="center"
        )
    _name_rows(axis, [group for group, _ in paired])
    axis.margins(x=0.15)
    axis.set_xlabel(f"{words}, difference to {base.label} (nats per trial, right is better)")
    figure.suptitle(f"{dataset}: dots are pairs of equal seeds, diamonds their mean ± standard error")
    return figure


def _name_rows(axis: Any, groups: Sequence[Group]) -> None:
    labels = ["\n".join(textwrap.wrap(group.marked_label, 34)) for group in groups]
    axis.set_yticks(range(len(groups)), labels)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.grid(False, axis="y")
