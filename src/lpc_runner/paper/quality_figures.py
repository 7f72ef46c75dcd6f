"""Figures of sample quality: by objective (Fig. 2), by step size (Fig. 4), and grids of samples (Fig. 5A, 9)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpc_runner.base.files import is_refusal
from lpc_runner.base.presentation import COLOURS, FRECHET, base_name
from lpc_runner.paper.evidence import as_planned
from lpc_runner.study.runs import Measurement, Run, Setting
from lpc_runner.study.study import Group
from lpc_runner.study.style import (
    MANY,
    MARKERS,
    OBJECTIVES,
    SHOWN,
    Picture,
    axis_name,
    file_name,
    label_decades,
    legend_below,
    log_where_wide,
    new_figure,
    pages,
    plain,
    short_labels,
    wrapped,
)
from lpc_runner.study.tables import metric_order, settings_of, show

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
    measured = [[run.measured(setting) for run in group.counted] for group in groups]
    names = _names(groups, setting)
    figure = new_figure(3.0 + 4.2 * len(names), 2.1 + 0.75 * len(groups))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names):
        values = [
            [m.values[name] for m in runs if m and math.isfinite(m.values.get(name, math.nan))] for runs in measured
        ]
        _draw_bars(panel, groups, values, logarithmic=base_name(name) in FRECHET)
        panel.set_xlabel(axis_name(name, setting))
        panel.grid(visible=False, axis="y")
    titles = short_labels(groups, lambda group: OBJECTIVES[group.properties["objective"]])
    marked = [f"{title}{_mark(group, runs, names)}" for title, group, runs in zip(titles, groups, measured)]
    panels[0].set_yticks(range(len(groups)), [wrapped(title, 26) for title in marked])
    panels[0].invert_yaxis()
    counted = "" if setting.num_samples is None else f", N = {setting.num_samples:,} samples"
    figure.suptitle(f"{dataset}{counted}", fontsize=14)
    return figure


def _mark(group: Group, runs: Sequence[Measurement | None], names: Sequence[str]) -> str:
    """What became of seeds that have no dot in some panel."""
    odd = sum(
        any(not math.isfinite(measurement.values.get(name, 0.0)) for name in names)
        for measurement in runs
        if measurement
    )
    words = ["last finite state"] if group.diverged else [group.outcome] * bool(group.outcome)
    words += [f"{odd} of {len(runs)} not finite"] if odd else []
    return f"\n({', '.join(words)})" if words else ""


def _names(groups: Sequence[Group], setting: Setting) -> list[str]:
    """The metrics that have a panel, the Fréchet distance first."""
    measured = {name for g in groups for run in g.counted if (m := run.measured(setting)) for name in m.values}
    return sorted((name for name in measured if base_name(name) in SHOWN), key=metric_order)


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
    ends = [
        mean + (statistics.stdev(own) if len(own) > 1 else 0) for mean, own in zip(means, values) if mean is not None
    ]
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


MAX_GRIDS = 12


def grid_pictures(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Iterator[Picture]:
    """The data and the final samples of each group's first run: VAE, then LPC without and with preconditioning."""
    panels = _panels(groups, warnings, "final.png", ("data.png",))
    if all(title == "data" for title, _ in panels):
        return
    caption = f"{dataset}: data and final samples, of each method's first seed (Fig. 5A, 9)"
    yield _grids(file_name(dataset, "samples"), caption, panels)


def level_pictures(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Iterator[Picture]:
    """Of hierarchies, samples and reconstructions level by level, of each group's first run."""
    runs = [group.counted[0] for group in groups if group.counted]
    names = sorted({path.name for run in runs for path in (run.path / "samples").glob("level-*.png")})
    for name in names:
        panels = _panels(groups, warnings, name)
        if panels:
            level = name.removeprefix("level-").removesuffix(".png")
            what = (
                "an image, then its reconstructions from the top level, the top two .. all of them"
                if level == "reconstructions"
                else f"rows have the same levels above {level}; below that, every image draws its own"
            )
            yield _grids(file_name(dataset, name.removesuffix(".png")), f"{dataset}: {what}; first seeds", panels)


def _grids(name: str, caption: str, panels: list[tuple[str, Any]]) -> Picture:
    left_out = len(panels) - MAX_GRIDS
    panels = panels[:MAX_GRIDS]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.4 * columns, 5.2 * rows, MANY)
    figure.set_layout_engine("constrained", h_pad=0.12)
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.set_axis_off()
    for axis, (title, picture) in zip(figure.axes, panels):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(wrapped(title, 34), fontsize=15)
    more = f"; {left_out} more groups are not shown" if left_out > 0 else ""
    return Picture(name, caption + more, figure)


def _panels(
    groups: Sequence[Group], warnings: list[str], picture: str, first: tuple[str, ...] = ()
) -> list[tuple[str, Any]]:
    """Titles and pictures of each group's first run; first: those that stand once before them."""
    import matplotlib.image

    shown = sorted([group for group in groups if group.counted], key=_order)
    wanted: list[tuple[str, Path]] = []
    for group, title in zip(shown, short_labels(shown, panel_title)):
        run = group.counted[0]
        mark = "\nlast finite state" if group.diverged else ""
        wanted += [(Path(name).stem, run.path / "samples" / name) for name in first if not wanted]
        wanted.append((f"{title}{mark}\nseed {run.seed}{_cut(run, group)}", run.path / "samples" / picture))
    panels = []
    for title, path in wanted:
        if path.exists():
            try:
                panels.append((title, matplotlib.image.imread(path)))
            except (OSError, ValueError, SyntaxError) as error:
                what = "is damaged (no picture)"
                if isinstance(error, OSError) and is_refusal(error):
                    what = f"cannot be read ({error.strerror})"
                warnings.append(f"{path.parents[1].name}/samples/{path.name} {what}")
    return panels


def _cut(run: Run, group: Group) -> str:
    """When a run ended that did not train the epochs of its group's label."""
    trained, planned = run.cost("num_epochs"), group.properties.get("num_epochs")
    if trained is None or planned is None or as_planned(trained, planned):
        return ""
    return f", after {trained:.3g} epochs"


def _order(group: Group) -> int:
    """Methods in the order of the study; of the chains those without preconditioning first."""
    return {"none": 0, "langevin": 2}.get(group.properties.get("sampler", ""), 1) + (
        group.properties.get("preconditioning", "none") != "none"
    )


def panel_title(group: Group) -> str:
    """A method's name with its epochs: what Fig. 9 says of its VAE."""
    epochs = group.properties.get("num_epochs")
    named = f"{epochs} epochs" in group.label
    return group.method if epochs is None or named else f"{group.method}, {epochs} epochs"


VARIED = ("step_size", "preconditioning", "beta")
Cells = dict[float, Group]


def sweeps_of(groups: Sequence[Group]) -> list[dict[tuple[str, float | None], Cells]]:
    """Groups with a chain that differ in step size and preconditioning alone: by (name, β), then by step size.

    Only sweeps in which a line has two step sizes or more.
    """
    by_settings: dict[str, dict[tuple[str, float | None], Cells]] = {}
    for group in groups:
        step_size = group.properties.get("step_size")
        if group.properties.get("sampler") == "none" or not isinstance(step_size, int | float):
            continue
        rest = sorted((key, repr(value)) for key, value in group.properties.items() if key not in VARIED)
        name = group.properties.get("preconditioning", "none")
        line = (name, None if name == "none" else group.properties.get("beta"))
        by_settings.setdefault(repr(rest), {}).setdefault(line, {})[float(step_size)] = group
    sweeps = [
        dict(sorted(s.items(), key=lambda line: (line[0][0] != "none", str(line[0])))) for s in by_settings.values()
    ]
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
    values = [measurement.values.get(metric, math.nan) for measurement in finished if measurement]
    return [value for value in values if math.isfinite(value)]


def frechet_name(groups: Sequence[Group], setting: Setting) -> str | None:
    """The name of the Fréchet distance in this setting, None where it was not measured."""
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
