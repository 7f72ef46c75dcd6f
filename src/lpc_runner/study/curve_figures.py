"""Metrics and the training log as they went during training, and against what was spent on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lpc_runner.base.presentation import COLOURS, base_name
from lpc_runner.study.budgets import BudgetCurve, mean_curve
from lpc_runner.study.runs import Point, Setting
from lpc_runner.study.study import Group
from lpc_runner.study.style import (
    LOGARITHMIC,
    MARKERS,
    SHOWN,
    Picture,
    axis_name,
    counted,
    file_name,
    legend_below,
    limit_values,
    log_where_wide,
    new_figure,
    pages,
    wrapped,
)
from lpc_runner.study.tables import metric_order

NUM_AVERAGED = 60  # points of a training curve, each a mean over neighbouring rows
AXES = {
    "update": "updates",
    "epoch": "epochs of training",
    "seconds": "training time (s)",
    "gradient_evaluations": "gradient evaluations\n(∇ log p(x, z) of one example)",
}
Line = tuple[Group, BudgetCurve]


def metric_names(groups: Sequence[Group], setting: Setting) -> list[str]:
    """What these groups measured in this setting, during training or after it, the Fréchet distance first."""
    curves = [run.curve(setting) for group in groups for run in group.followed]
    return sorted({name for curve in curves for point in curve for name in point.values}, key=metric_order)


def lines_of(groups: Sequence[Group], metric: str, setting: Setting | None) -> list[Line]:
    """The curve of every group that has one, none where no group measured twice; setting None: the training log."""
    lines = []
    for group in groups:
        runs = [_averaged(run.training) if setting is None else run.curve(setting) for run in group.followed]
        curve = mean_curve(runs, metric)
        if curve.updates:
            lines.append((group, curve))
    return lines if any(len(curve.updates) > 1 for _, curve in lines) else []


def _averaged(points: list[Point]) -> list[Point]:
    """A training curve with its noise averaged over neighbouring rows, at the last row of each stretch."""
    size = -(-len(points) // NUM_AVERAGED) or 1
    averaged = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        mean = sum(point.values["train/elbo"] for point in stretch) / len(stretch)
        averaged.append(Point(stretch[-1].spent, None, {"train/elbo": mean}))
    return averaged


def curve_pictures(dataset: str, groups: Sequence[Group], metric: str, setting: Setting | None) -> Iterator[Picture]:
    """Fig. 5B: the metric against epochs (updates where none are recorded) and seconds, on equal axes.

    setting None: not a measurement but the training log.
    """
    lines = lines_of(groups, metric, setting)
    seconds = any(value is not None for _, curve in lines for value in curve.spent["seconds"])
    columns = {"update" if _holes(lines, "epoch") else "epoch": False} | ({"seconds": True} if seconds else {})
    what = "ELBO of the training batches" if setting is None else f"{metric} (Fig. 5B)"
    caption = f"{dataset}: {what} during training{_averaging(lines)}"
    yield from _pictures(dataset, metric, caption, {metric: lines}, columns, setting, height=4.4)


def compute_pictures(dataset: str, groups: Sequence[Group], setting: Setting) -> Iterator[Picture]:
    """The compute-matched view: metrics against gradient evaluations and seconds, both logarithmic."""
    by_metric = {name: lines_of(groups, name, setting) for name in metric_names(groups, setting)}
    by_metric = {name: lines for name, lines in by_metric.items() if lines and base_name(name) in SHOWN}
    lines = [line for own in by_metric.values() for line in own]
    spent = ("gradient_evaluations", "seconds")
    columns = {name: True for name in spent if not all(_holes([line], name) for line in lines)}
    if len({group.label for group, _ in lines}) > 1 and columns:
        caption = f"{dataset}: metrics against what was spent, {setting.extractor} features"
        name, height = f"compute-{setting.extractor}", 1.6 + 3.4 * len(by_metric)
        yield from _pictures(dataset, name, caption, by_metric, columns, setting, height)


def _pictures(
    dataset: str,
    name: str,
    caption: str,
    by_metric: dict[str, list[Line]],
    columns: dict[str, bool],
    setting: Setting | None,
    height: float,
) -> Iterator[Picture]:
    """A row per metric and a column per name among SPENT (whether it may be logarithmic), a few groups a picture."""
    everything = [line for lines in by_metric.values() for line in lines]
    for suffix, page in pages(list(dict.fromkeys(group.label for group, _ in everything))):
        figure = new_figure(11, height + 0.3 * -(-len(page) // 2))
        axes = figure.subplots(len(by_metric), len(columns), sharex="col", sharey="row", squeeze=False)
        for row, (metric, lines) in zip(axes, by_metric.items()):
            for axis, (spent, wide) in zip(row, columns.items()):
                _draw_lines(axis, [line for line in lines if line[0].label in page], spent, page)
                _scale_spent(axis, everything, spent, wide)
                axis.label_outer()
            row[0].set_ylabel(axis_name(metric, setting))
            low, high = _limits([curve for _, curve in lines], cut=setting is None)
            limit_values(row[0], low, high, base_name(metric) in LOGARITHMIC)
        legend_below(figure, axes[0][0])
        figure.suptitle(f"{dataset}{counted(setting)}{_averaging(everything)}", fontsize=14)
        yield Picture(file_name(dataset, f"{name}{suffix}"), caption, figure)


def _averaging(lines: Sequence[Line]) -> str:
    return ", mean ± std over seeds" if any(curve.num_runs > 1 for _, curve in lines) else ""


def _holes(lines: Sequence[Line], name: str) -> bool:
    return any(value is None for _, curve in lines for value in curve.spent[name])


def _draw_lines(axis: Any, lines: Sequence[Line], name: str, order: Sequence[str]) -> None:
    """One line per group, in the colour of its label's place in `order`."""
    for group, curve in lines:
        index = order.index(group.label)
        known = [i for i, value in enumerate(curve.spent[name]) if value is not None]
        x = [curve.spent[name][i] for i in known]
        mean, std = ([column[i] for i in known] for column in (curve.mean, curve.std))
        line = ":" if not group.counted else "-"
        style = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": line}
        axis.plot(x, mean, markevery=max(1, len(x) // 12), label=legend(group, curve.num_runs), **style)
        if curve.num_runs > 1:
            low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
            axis.fill_between(x, low, high, color=COLOURS[index], alpha=0.2, linewidth=0)


def _scale_spent(axis: Any, lines: Sequence[Line], name: str, wide: bool) -> None:
    """Labelled; logarithmic where that is wanted and values span more than a decade."""
    axis.set_xlabel(AXES[name])
    values = [value for _, curve in lines for value in curve.spent[name] if value]
    if wide and values and log_where_wide(axis, "x", min(values), max(values)):
        axis.set_xlabel(AXES[name].replace("(s)", "(s, logarithmic)"))


def _limits(curves: Sequence[BudgetCurve], cut: bool) -> tuple[float, float]:
    """Lowest and highest end of a band; `cut`: without the first tenth, in which an ELBO rises steeply."""
    low, high = [], []
    for curve in curves:
        first = 0.1 * curve.updates[-1] if cut else 0
        kept = [i for i, update in enumerate(curve.updates) if update >= first]
        low += [curve.mean[i] - curve.std[i] for i in kept]
        high += [curve.mean[i] + curve.std[i] for i in kept]
    return min(low), max(high)


def legend(group: Group, num_runs: int) -> str:
    """A group's label, how many seeds are behind its line, and what became of them."""
    seeds = f"{num_runs} seeds" if num_runs > 1 else "1 seed"
    statuses = sorted({run.status for run in group.followed} - {"finished"})
    statuses += [group.outcome] if group.outcome and not group.diverged else []
    return wrapped(f"{group.label} ({', '.join([seeds, *statuses])})", 48)
