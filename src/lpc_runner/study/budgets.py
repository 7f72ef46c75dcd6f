"""Curves during training, and what every group reaches for the same updates, seconds or gradients."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lpc_runner.study.runs import Point, Run, Setting
from lpc_runner.study.study import Group
from lpc_runner.study.tables import (
    DASH,
    DIVERGED,
    Table,
    describe_setting,
    main_metrics,
    metric_order,
    show,
    spread,
)


@dataclass(frozen=True)
class Budget:
    """Something a run spends: `spent` names a Point's field, `total` what result.json calls all of it."""

    name: str
    spent: str
    total: str
    unit: str


BUDGETS = (
    Budget("updates", "update", "num_updates", "updates"),
    Budget("seconds", "seconds", "train_seconds", "s of training"),
    Budget("gradient evaluations", "gradient_evaluations", "gradient_evaluations", "gradient evaluations"),
)


SPENT = ("epoch", "seconds", "gradient_evaluations")


@dataclass(frozen=True)
class BudgetCurve:
    """Mean and standard deviation (0 for one run) over the runs of a group, at the same updates.

    spent: by the name of a Point's field (epoch, seconds, gradient_evaluations) its mean, None: not recorded.
    """

    updates: list[int]
    spent: dict[str, list[float | None]]
    mean: list[float]
    std: list[float]
    num_runs: int


def curve_settings(groups: Sequence[Group]) -> list[Setting]:
    """For each extractor the one setting with most measurements during training, else that of final ones."""
    counts: dict[str, Counter[Setting]] = {}
    for group in groups:
        for run in followed(group):
            during = [point.setting for point in run.points if point.setting is not None]
            final = [measurement.setting for measurement in run.measurements if measurement.source == "result.json"]
            for setting in during or final:
                if setting.num_samples is not None:
                    counts.setdefault(setting.extractor, Counter())[setting] += 1
    best = {name: max(count, key=lambda key: (count[key], str(key))) for name, count in counts.items()}
    return [best[extractor] for extractor in sorted(best)]


def followed(group: Group) -> list[Run]:
    """The runs whose curves are drawn: those that are averaged, or what is under way where none is done."""
    return group.counted or [run for run in group.runs if run.points or run.training]


def mean_curve(runs: Sequence[list[Point]], metric: str) -> BudgetCurve:
    """Averages at the updates that all runs have, so that every mean is over the same seeds; finite values only."""
    by_run = []
    for points in runs:
        by_update = {p.update: p for p in points if math.isfinite(p.values.get(metric, math.nan))}
        by_run += [by_update] if by_update else []
    shared = sorted(set.intersection(*map(set, by_run))) if by_run else []
    values = [[points[update].values[metric] for points in by_run] for update in shared]
    std = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in values]
    spent = {name: [_mean_spent(by_run, update, name) for update in shared] for name in SPENT}
    return BudgetCurve(shared, spent, [statistics.fmean(column) for column in values], std, len(by_run))


def _mean_spent(by_run: Sequence[dict[int, Point]], update: int, name: str) -> float | None:
    spent = [getattr(points[update], name) for points in by_run]
    return None if None in spent else statistics.fmean(spent)


def budget_of(groups: Sequence[Group], budget: Budget) -> tuple[float, str] | None:
    """The smallest total among the finished runs, and the label of its group; None where none is recorded."""
    totals = [
        (total, group.label)
        for group in groups
        for run in group.counted
        if run.status == "finished" and (total := run.cost(budget.total)) is not None
    ]
    return min(totals, default=None)


def last_within(points: Sequence[Point], budget: Budget, limit: float) -> Point | None:
    """The last measurement that had spent no more than `limit`."""
    spent = [(getattr(point, budget.spent), point) for point in points]
    return max(
        ((cost, point) for cost, point in spent if cost is not None and cost <= limit),
        key=lambda pair: pair[0],
        default=(None, None),
    )[1]


def budget_table(dataset: str, groups: Sequence[Group], setting: Setting, budget: Budget) -> Table | None:
    """Every group at the smallest final budget of them all; None where nothing was measured during training."""
    smallest = budget_of(groups, budget)
    measured = {group.label: [run.curve(setting) for run in group.counted] for group in groups}
    shown = [group for group in groups if any(measured[group.label])]
    during = any(point.fits(setting) for group in shown for run in group.counted for point in run.points)
    if smallest is None or not during or len(shown) < 2:
        return None
    limit, owner = smallest
    points = {group.label: [last_within(curve, budget, limit) for curve in measured[group.label]] for group in shown}
    present = [point for reached in points.values() for point in reached if point is not None]
    if not present:
        return None
    names = sorted({name for point in present for name in point.values}, key=metric_order)
    rows = []
    for group in shown:
        reached = [point for point in points[group.label] if point is not None]
        used = [getattr(point, budget.spent) for point in reached]
        cells = [spread((point.values.get(name) for point in reached), len(reached)) for name in names]
        rows.append([group.marked_label, str(len(reached)), _range(used, budget), *cells])
    notes = [
        f"Budget: {_amount(limit, budget)} {budget.unit}, the smallest total of a finished run ({owner}); "
        "each run at its last measurement within it.",
        f"Measured with {describe_setting(setting)}.",
    ]
    finals = {
        measurement.setting.num_samples
        for group in groups
        for run in group.counted
        for measurement in run.measurements
        if measurement.setting.extractor == setting.extractor and not measurement.setting.fits(setting)
    }
    if finals:
        counts = ", ".join(sorted(f"N = {count:,}" if count else "N not recorded" for count in finals))
        notes.append(f"Measurements made otherwise ({counts}) are left out here: they cannot be compared.")
    if any(point is None for reached in points.values() for point in reached):
        notes.append(f"{DASH}: not measured so early; metrics.every_epochs measures during training.")
    notes += [DIVERGED] * any(group.diverged for group in shown)
    title = f"{dataset}: at equal {budget.name}, {setting.extractor}"
    columns = ["method", "seeds", "measured at", *names]
    return Table(title, columns, rows, notes, main_metrics(names), setting.extractor)


def _range(used: Sequence[float], budget: Budget) -> str:
    if not used:
        return DASH
    low, high = _amount(min(used), budget), _amount(max(used), budget)
    return low if low == high else f"{low} to {high}"


def _amount(value: float, budget: Budget) -> str:
    return show(value) if budget.name == "seconds" else f"{value:,.0f}"
