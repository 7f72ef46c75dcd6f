"""Fig. 2: sample quality by the objective that trains the encoder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lpc_runner.study.grouping import Group
from lpc_runner.study.runs import Measurement, Setting
from lpc_runner.study.style import (
    COLOURS,
    FRECHET,
    OBJECTIVES,
    SHOWN,
    Picture,
    axis_name,
    file_name,
    label_decades,
    new_figure,
    pages,
    short_labels,
    wrapped,
)
from lpc_runner.study.tables import base_name, metric_order, settings_of, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BARS = 14
WIDE = 20  # ratio between bars beyond which the small ones need a logarithmic axis
HATCH = "///"


def objective_pictures(dataset: str, groups: Sequence[Group]) -> Iterator[Picture]:
    """A picture for every way of measuring in which Langevin chains with two objectives or more were measured."""
    chains = [group for group in groups if group.properties.get("sampler") == "langevin"]
    chains = [group for group in chains if group.properties.get("objective") in OBJECTIVES]
    chains.sort(key=lambda group: list(OBJECTIVES).index(group.properties["objective"]))
    for number, setting in enumerate(settings_of(chains)):
        shown = [group for group in chains if _names([group], setting)]
        if len({group.properties["objective"] for group in shown}) < 2:
            continue
        again = f"-{number + 1}" if setting.extractor in [s.extractor for s in settings_of(chains)[:number]] else ""
        for suffix, page in pages(shown, MAX_BARS):
            counted = (
                "number of samples not recorded" if setting.num_samples is None else f"N = {setting.num_samples:,}"
            )
            caption = (
                f"{dataset}: sample quality by objective (Fig. 2), {setting.extractor} features, {counted}; "
                "bars: means, lines: std over seeds, dots: seeds"
            )
            name = file_name(dataset, f"objectives-{setting.extractor}{again}{suffix}")
            yield Picture(name, caption, objective_figure(dataset, page, setting))


def objective_figure(dataset: str, groups: Sequence[Group], setting: Setting) -> Figure:
    """One horizontal bar per group and panel: mean, std over seeds, each seed; hatched: last finite states."""
    found = [[run.measured(setting) for run in group.counted] for group in groups]
    names = _names(groups, setting)
    figure = new_figure(3.0 + 4.2 * len(names), 2.1 + 0.75 * len(groups))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names):
        values = [[m.values[name] for m in runs if m and math.isfinite(m.values.get(name, math.nan))] for runs in found]
        _draw_bars(panel, groups, values, logarithmic=base_name(name) in FRECHET)
        panel.set_xlabel(axis_name(name, setting))
        panel.grid(visible=False, axis="y")
    titles = short_labels(groups, lambda group: OBJECTIVES[group.properties["objective"]])
    marked = [f"{title}{_mark(group, runs, names)}" for title, group, runs in zip(titles, groups, found)]
    panels[0].set_yticks(range(len(groups)), [wrapped(title, 26) for title in marked])
    panels[0].invert_yaxis()
    counted = "" if setting.num_samples is None else f", N = {setting.num_samples:,} samples"
    figure.suptitle(f"{dataset}{counted}", fontsize=14)
    return figure


def _mark(group: Group, runs: Sequence[Measurement | None], names: Sequence[str]) -> str:
    """What became of seeds that have no dot in some panel."""
    odd = sum(any(not math.isfinite(found.values.get(name, 0.0)) for name in names) for found in runs if found)
    words = ["last finite state"] if group.diverged else [group.outcome] * bool(group.outcome)
    words += [f"{odd} of {len(runs)} not finite"] if odd else []
    return f"\n({', '.join(words)})" if words else ""


def _names(groups: Sequence[Group], setting: Setting) -> list[str]:
    """The metrics that have a panel, the Fréchet distance first."""
    found = {name for g in groups for run in g.counted if (m := run.measured(setting)) for name in m.values}
    return sorted((name for name in found if base_name(name) in SHOWN), key=metric_order)


def _draw_bars(panel: Any, groups: Sequence[Group], values: Sequence[Sequence[float]], logarithmic: bool) -> None:
    means = [statistics.fmean(own) if own else None for own in values]
    positive = [value for own in values for value in own if value > 0]
    wide = (
        logarithmic
        and len(positive) == sum(map(len, values))
        and max(positive, default=0) > WIDE * min(positive, default=0)
    )
    start = min(positive) / 2 if wide else 0.0
    for place, (group, mean, own) in enumerate(zip(groups, means, values)):
        if mean is None:
            panel.text(0.01, place, "not measured", transform=panel.get_yaxis_transform(), va="center", color="#555555")
            continue
        colour = COLOURS[list(OBJECTIVES).index(group.properties["objective"])]
        panel.barh(place, mean - start, left=start, color=colour, height=0.62, hatch=HATCH if group.diverged else None)
        if len(own) > 1:
            std = statistics.stdev(own)
            panel.errorbar(mean, place, xerr=std, color="black", capsize=5, linewidth=1.8)
            shifts = [0.16 * (index / (len(own) - 1) - 0.5) for index in range(len(own))]
            panel.scatter(own, [place + s for s in shifts], s=26, color="white", edgecolors="black", zorder=3)
    reach = max((max([*own]) for own in values if own), default=1.0)
    ends = [mean + (statistics.stdev(own) if len(own) > 1 else 0) for mean, own in zip(means, values) if own]
    reach = max(reach, *ends, 0) or 1.0
    if wide:
        panel.set_xscale("log")
        panel.set_xlim(start, reach * (reach / start) ** 0.28)
        label_decades(panel.xaxis, start, reach)
    else:
        panel.set_xlim(0, 1.28 * reach)
        panel.locator_params(axis="x", nbins=4)
    for place, (mean, own) in enumerate(zip(means, values)):
        if mean is not None:  # beside the end of whatever reaches farthest right
            end = max([*own, mean + (statistics.stdev(own) if len(own) > 1 else 0)])
            panel.annotate(show(mean), (end, place), (7, 0), textcoords="offset points", va="center", fontsize=12)
