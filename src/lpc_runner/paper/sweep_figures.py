"""Fig. 4: the Fréchet distance against the step size, one line per preconditioner and β."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lpc_runner.base.presentation import COLOURS, FRECHET, base_name
from lpc_runner.study.runs import Setting
from lpc_runner.study.study import Group
from lpc_runner.study.style import (
    MARKERS,
    Picture,
    axis_name,
    file_name,
    label_decades,
    legend_below,
    log_where_wide,
    new_figure,
    pages,
    plain,
)
from lpc_runner.study.tables import settings_of

VARIED = ("step_size", "preconditioning", "beta")
Cells = dict[float, Group]


def sweeps_of(groups: Sequence[Group]) -> list[dict[tuple[str, float | None], Cells]]:
    """Groups with a chain that differ in step size and preconditioning alone: by (name, β), then by step size.

    Only sweeps in which a line has two step sizes or more.
    """
    found: dict[str, dict[tuple[str, float | None], Cells]] = {}
    for group in groups:
        step_size = group.properties.get("step_size")
        if group.properties.get("sampler") == "none" or not isinstance(step_size, int | float):
            continue
        rest = sorted((key, repr(value)) for key, value in group.properties.items() if key not in VARIED)
        name = group.properties.get("preconditioning", "none")
        line = (name, None if name == "none" else group.properties.get("beta"))
        found.setdefault(repr(rest), {}).setdefault(line, {})[float(step_size)] = group
    sweeps = [dict(sorted(s.items(), key=lambda line: (line[0][0] != "none", str(line[0])))) for s in found.values()]
    return [sweep for sweep in sweeps if any(len(cells) > 1 for cells in sweep.values())]


def sweep_pictures(dataset: str, groups: Sequence[Group]) -> Iterator[Picture]:
    """One picture per sweep and way of measuring."""
    sweeps = sweeps_of(groups)
    for number, sweep in enumerate(sweeps):
        members = [group for cells in sweep.values() for group in cells.values()]
        for place, setting in enumerate(settings_of(members)):
            suffix = (f"-{number + 1}" if len(sweeps) > 1 else "") + (f"-n{setting.num_samples}" if place else "")
            for page_suffix, page in pages(list(sweep.items())):
                picture = _sweep_picture(dataset, dict(page), setting, f"{suffix}{page_suffix}")
                if picture is not None:
                    yield picture


def line_name(line: tuple[str, float | None], sweep: dict[tuple[str, float | None], Cells]) -> str:
    """no preconditioning, or β; the preconditioner's own name only where several are in the picture."""
    name, beta = line
    if name == "none":
        return "no preconditioning"
    several = len({other for other, _ in sweep if other != "none"}) > 1
    symbol = "" if beta is None else f"β = {beta:g}"
    return " ".join(word for word in ((name if several or beta is None else ""), symbol) if word)


def cell_values(group: Group, setting: Setting, metric: str) -> list[float]:
    """The metric of each finished seed, finite values only; none from diverged runs."""
    finished = [run.measured(setting) for run in group.runs if run.status == "finished"]
    values = [found.values.get(metric, math.nan) for found in finished if found]
    return [value for value in values if math.isfinite(value)]


def frechet_name(groups: Sequence[Group], setting: Setting) -> str | None:
    """The name of the Fréchet distance in this setting, None where nobody measured it."""
    names = {name for g in groups for run in g.counted if (m := run.measured(setting)) for name in m.values}
    return next((name for name in sorted(names) if base_name(name) in FRECHET), None)


def _sweep_picture(
    dataset: str, sweep: dict[tuple[str, float | None], Cells], setting: Setting, suffix: str
) -> Picture | None:
    members = [group for cells in sweep.values() for group in cells.values()]
    metric = frechet_name(members, setting)
    if metric is None:
        return None
    objective = members[0].method
    figure = new_figure(9, 6)
    axis = figure.subplots()
    ends = [end for index, line in enumerate(sweep) for end in _draw_line(axis, index, line, sweep, setting, metric)]
    sizes = sorted({size for cells in sweep.values() for size in cells})
    axis.set_xscale("log")
    label_decades(axis.xaxis, sizes[0], sizes[-1])
    axis.set_xticks(sizes, [plain(size) for size in sizes])
    axis.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.35)
    axis.set_xlabel("step size γ")
    axis.set_ylabel(axis_name(metric, setting))
    if ends:
        log_where_wide(axis, min(ends), max(ends))
    diverged = _mark_diverged(axis, sweep)
    legend_below(figure, axis, columns=3, extra=diverged)
    counted = "" if setting.num_samples is None else f", N = {setting.num_samples:,} samples"
    figure.suptitle(f"{dataset}, {objective}{counted}, mean ± std over seeds", fontsize=14)
    crosses = "; crosses on top: a seed diverged there" if diverged else ""
    caption = f"{dataset}: {metric} against the step size γ (Fig. 4), {objective}{crosses}"
    return Picture(file_name(dataset, f"step-sizes-{setting.extractor}{suffix}"), caption, figure)


def _draw_line(
    axis: Any,
    index: int,
    line: tuple[str, float | None],
    sweep: dict[tuple[str, float | None], Cells],
    setting: Setting,
    metric: str,
) -> list[float]:
    """Draws finished cells; the ends of its error bars."""
    values = {size: cell_values(group, setting, metric) for size, group in sorted(sweep[line].items())}
    sizes = [size for size, own in values.items() if own]
    means = [statistics.fmean(values[size]) for size in sizes]
    std = [statistics.stdev(values[size]) if len(values[size]) > 1 else 0.0 for size in sizes]
    dodged = [size * _dodge(index, len(sweep)) for size in sizes]  # so that error bars stand beside one another
    style = {"color": COLOURS[index], "marker": MARKERS[index], "capsize": 5, "label": line_name(line, sweep)}
    axis.errorbar(dodged, means, yerr=std if any(std) else None, **style)
    return [end for mean, s in zip(means, std) for end in (mean - s, mean + s)]


def _dodge(index: int, count: int) -> float:
    return 1 + 0.035 * (index - (count - 1) / 2)


def _mark_diverged(axis: Any, sweep: dict[tuple[str, float | None], Cells]) -> list[Any]:
    """A strip above the panel, a row per line: a cross at every step size at which a seed diverged; its legend."""
    from matplotlib.lines import Line2D

    cross = {"marker": "x", "markersize": 10, "markeredgewidth": 2.6, "linestyle": ""}
    place = {}
    for index, (line, cells) in enumerate(sweep.items()):
        hit = [size for size, group in sorted(cells.items()) if any(run.status == "diverged" for run in group.runs)]
        if hit:
            place[line] = (index, hit)
    for row, (index, hit) in enumerate(place.values()):
        heights = [1.03 + 0.045 * (len(place) - 1 - row)] * len(hit)
        axis.plot(hit, heights, transform=axis.get_xaxis_transform(), clip_on=False, color=COLOURS[index], **cross)
    return [Line2D([], [], color="#555555", label="a seed diverged", **cross)] if place else []
