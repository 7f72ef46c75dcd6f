"""Pictures of a study of sequences: the two gaps of every method, and paired differences seed by seed."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lpc_runner.base.presentation import COLOURS
from lpc_runner.study.estimates import Difference, paired_difference
from lpc_runner.study.study import Group
from lpc_runner.study.style import Picture, file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIKELIHOODS = {"log_evidence": "exact log p(x)", "free_iwae": "IWAE with a free q"}  # the first that is known counts
GAPS = (("approximation_gap", "approximation gap"), ("amortisation_gap", "amortisation gap"))
LABEL_WIDTH = 34


def sequence_pictures(dataset: str, groups: Sequence[Group]) -> Iterator[Picture]:
    """Gaps and paired differences of one dataset; nothing where no gaps were measured."""
    measured = [group for group in groups if any("approximation_gap" in run.numbers for run in group.counted)]
    if measured:
        caption = (
            f"{dataset}: approximation and amortisation gap of every method, nats per trial, mean ± std over seeds"
        )
        yield Picture(file_name(dataset, "gaps"), caption, gaps_figure(dataset, measured))
    for metric, words in LIKELIHOODS.items():
        differences = [(group, paired_difference(group, measured[0], metric)) for group in measured[1:]]
        paired = [(group, difference) for group, difference in differences if difference is not None]
        if paired:
            caption = f"{dataset}: {words}, each method against {measured[0].label} seed by seed, nats per trial"
            yield Picture(file_name(dataset, "paired"), caption, paired_figure(dataset, measured[0], paired, words))
            return


def gaps_figure(dataset: str, groups: Sequence[Group]) -> Figure:
    """Means over seeds of both gaps as stacked bars; whiskers: standard deviation of the whole over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2 + 0.75 * len(groups)), layout="constrained")
    axis = figure.subplots()
    places = range(len(groups))
    left = [0.0] * len(groups)
    for (name, label), colour in zip(GAPS, COLOURS):
        widths = [_mean([run.numbers.get(name) for run in group.counted]) for group in groups]
        axis.barh(places, widths, left=left, color=colour, height=0.6, label=label)
        left = [start + width for start, width in zip(left, widths)]
    for place, group in zip(places, groups):
        totals = [sum(run.numbers.get(name, 0.0) for name, _ in GAPS) for run in group.counted]
        spread = statistics.stdev(totals) if len(totals) > 1 else None
        if spread is not None:
            axis.errorbar(left[place], place, xerr=spread, color="black", capsize=4, linewidth=1.6)
        text = f"{left[place]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        axis.annotate(text, (left[place] + (spread or 0), place), (8, 0), textcoords="offset points", va="center")
    _name_rows(axis, groups)
    axis.set_xlabel("nats per trial between the best bound and the ELBO")
    axis.margins(x=0.2)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    seeds = max(len(group.counted) for group in groups)
    figure.suptitle(f"{dataset}: variational gaps" + (f", mean ± std over {seeds} seeds" if seeds > 1 else ""))
    return figure


def paired_figure(dataset: str, base: Group, paired: Sequence[tuple[Group, Difference]], words: str) -> Figure:
    """Every pair of seeds as a dot, their mean with its standard error as a whisker, zero as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.8 + 0.75 * len(paired)), layout="constrained")
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
    axis.set_ylim(len(paired) - 0.4, -0.6)
    axis.margins(x=0.15)
    axis.set_xlabel(f"{words}, difference to {base.label} (nats per trial, right is better)")
    figure.suptitle(f"{dataset}: dots are pairs of equal seeds, diamonds their mean ± standard error")
    return figure


def _name_rows(axis, groups: Sequence[Group]) -> None:
    labels = ["\n".join(textwrap.wrap(group.marked_label, LABEL_WIDTH)) for group in groups]
    axis.set_yticks(range(len(groups)), labels)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.grid(False, axis="y")


def _mean(values: Sequence[float | None]) -> float:
    present = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(present) if present else 0.0
