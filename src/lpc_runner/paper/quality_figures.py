"""Figures of sample quality: by objective (Fig. 2), by step size (Fig. 4), and grids of samples (Fig. 5A, 9)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpc_runner.base.presentation import COLOURS, FRECHET, base_name
from lpc_runner.paper.evidence import as_planned
from lpc_runner.study.runs import Run, Setting, read_file
from lpc_runner.study.study import STEP, Group, equal_but
from lpc_runner.study.style import (
    MANY,
    MARKERS,
    OBJECTIVES,
    SHOWN,
    Picture,
    axis_name,
    counted,
    file_name,
    label_decades,
    legend_below,
    limit_values,
    new_figure,
    pages,
    plain,
    short_labels,
    wrapped,
)
from lpc_runner.study.tables import measured_names, metric_order, settings_of, show

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
    for place, setting in enumerate(settings_of(chains)):
        shown = [group for group in chains if _panel_names([group], setting)]
        if len({group.properties["objective"] for group in shown}) < 2:
            continue
        again = f"-{place + 1}" if setting.extractor in [s.extractor for s in settings_of(chains)[:place]] else ""
        for suffix, page in pages(shown, MAX_BARS):
            number = "number of samples not recorded" if setting.num_samples is None else f"N = {setting.num_samples:,}"
            caption = (
                f"{dataset}: sample quality by objective (Fig. 2), {setting.extractor} features, {number}; "
                "bars: means, lines: std over seeds, dots: seeds"
            )
            name = file_name(dataset, f"objectives-{setting.extractor}{again}{suffix}")
            yield Picture(name, caption, objective_figure(dataset, page, setting))


def objective_figure(dataset: str, groups: Sequence[Group], setting: Setting) -> Figure:
    """One horizontal bar per group and panel: mean, std over seeds, each seed; hatched: last finite states."""
    names = _panel_names(groups, setting)
    figure = new_figure(3.0 + 4.2 * len(names), 2.1 + 0.75 * len(groups))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names):
        values = [list(group.finite(name, setting).values()) for group in groups]
        _draw_bars(panel, groups, values, logarithmic=base_name(name) in FRECHET)
        panel.set_xlabel(axis_name(name, setting))
        panel.grid(visible=False, axis="y")
    titles = short_labels(groups, lambda group: OBJECTIVES[group.properties["objective"]])
    marked = [f"{title}{_mark(group, setting, names)}" for title, group in zip(titles, groups)]
    panels[0].set_yticks(range(len(groups)), [wrapped(title, 26) for title in marked])
    panels[0].invert_yaxis()
    figure.suptitle(f"{dataset}{counted(setting)}", fontsize=14)
    return figure


def _mark(group: Group, setting: Setting, names: Sequence[str]) -> str:
    """What became of seeds that have no dot in some panel."""
    measured = [run.values(setting) for run in group.counted]
    odd = sum(not all(math.isfinite(values.get(name, 0.0)) for name in names) for values in measured)
    words = ["last finite state"] if group.diverged else [group.outcome] * bool(group.outcome)
    words += [f"{odd} of {len(measured)} not finite"] if odd else []
    return f"\n({', '.join(words)})" if words else ""


def _panel_names(groups: Sequence[Group], setting: Setting) -> list[str]:
    return sorted((n for n in measured_names(groups, setting) if base_name(n) in SHOWN), key=metric_order)


def _draw_bars(panel: Any, groups: Sequence[Group], values: Sequence[Sequence[float]], logarithmic: bool) -> None:
    everything = [value for own in values for value in own]
    least, reach = min(everything, default=0.0), max(everything, default=0.0)
    wide = logarithmic and reach > WIDE * least > 0
    start = least / 2 if wide else 0.0
    for place, (group, own) in enumerate(zip(groups, values)):
        if not own:
            panel.text(0.01, place, "not measured", transform=panel.get_yaxis_transform(), va="center", color="#555555")
            continue
        mean, std = statistics.fmean(own), statistics.stdev(own) if len(own) > 1 else 0.0
        colour = COLOURS[list(OBJECTIVES).index(group.properties["objective"])]
        panel.barh(place, mean - start, left=start, color=colour, height=0.62, hatch=HATCH if group.diverged else None)
        if len(own) > 1:
            panel.errorbar(mean, place, xerr=std, color="black", capsize=5, linewidth=1.8)
            shifts = [0.16 * (index / (len(own) - 1) - 0.5) for index in range(len(own))]
            panel.scatter(own, [place + s for s in shifts], s=26, color="white", edgecolors="black", zorder=3)
        end = max(*own, mean + std)  # of whatever reaches farthest right
        reach = max(reach, end)
        panel.annotate(show(mean), (end, place), (7, 0), textcoords="offset points", va="center", fontsize=12)
    if wide:
        panel.set_xscale("log")
        panel.set_xlim(start, reach * (reach / start) ** 0.28)
        label_decades(panel.xaxis, start, reach)
    else:
        panel.set_xlim(0, 1.28 * (reach or 1.0))
        panel.locator_params(axis="x", nbins=4)


MAX_GRIDS = 12


def grid_pictures(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Iterator[Picture]:
    """The data and the final samples of each group's first run: VAE, then LPC without and with preconditioning."""
    panels = _panels(groups, warnings, "final", "data")
    if all(title == "data" for title, _ in panels):
        return
    caption = f"{dataset}: data and final samples, of each method's first seed (Fig. 5A, 9)"
    yield _grids(file_name(dataset, "samples"), caption, panels)


def level_pictures(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Iterator[Picture]:
    """Of hierarchies, samples and reconstructions level by level, of each group's first run."""
    runs = [group.counted[0] for group in groups if group.counted]
    names = sorted({path.stem for run in runs for path in (run.path / "samples").glob("level-*.png")})
    for name in names:
        panels = _panels(groups, warnings, name)
        if panels:
            level = name.removeprefix("level-")
            what = (
                "an image, then its reconstructions from the top level, the top two .. all of them"
                if level == "reconstructions"
                else f"rows have the same levels above {level}; below that, every image draws its own"
            )
            yield _grids(file_name(dataset, name), f"{dataset}: {what}; first seeds", panels)


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


def _panels(groups: Sequence[Group], warnings: list[str], name: str, first: str | None = None) -> list[tuple[str, Any]]:
    """Titles and pictures of this name of each group's first run; first: one that stands once before them."""
    from matplotlib.image import imread

    shown = sorted([group for group in groups if group.counted], key=_order)
    wanted: list[tuple[str, Path, str]] = []
    for group, title in zip(shown, short_labels(shown, panel_title)):
        run = group.counted[0]
        mark = "\nlast finite state" if group.diverged else ""
        if first and not wanted:
            wanted.append((first, run.path, f"samples/{first}.png"))
        wanted.append((f"{title}{mark}\nseed {run.seed}{_cut(run, group)}", run.path, f"samples/{name}.png"))
    pictures = [(title, read_file(run, file, imread, warnings, " (no picture)")) for title, run, file in wanted]
    return [(title, picture) for title, picture in pictures if picture is not None]


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


Sweep = dict[tuple[str, float | None], dict[float, Group]]  # by the name of the preconditioner and β, then step size


def sweeps_of(groups: Sequence[Group]) -> list[Sweep]:
    """Groups with a chain that differ in step size and preconditioning alone.

    Only sweeps in which a line has two step sizes or more.
    """
    chains = [group for group in groups if group.properties.get("sampler") != "none"]
    sweeps: list[Sweep] = []
    for family in equal_but(STEP, [g for g in chains if isinstance(g.properties.get("step_size"), int | float)]):
        sweep: Sweep = {}
        for group in family:
            name = group.properties.get("preconditioning", "none")
            line = (name, None if name == "none" else group.properties.get("beta"))
            sweep.setdefault(line, {})[float(group.properties["step_size"])] = group
        if any(len(cells) > 1 for cells in sweep.values()):
            sweeps.append(dict(sorted(sweep.items(), key=lambda line: (line[0][0] != "none", str(line[0])))))
    return sweeps


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


def line_name(line: tuple[str, float | None], sweep: Sweep) -> str:
    """no preconditioning, or β; the preconditioner's own name only where several are in the picture."""
    name, beta = line
    if name == "none":
        return "no preconditioning"
    several = len({other for other, _ in sweep if other != "none"}) > 1
    symbol = "" if beta is None else f"β = {beta:g}"
    return " ".join(word for word in ((name if several or beta is None else ""), symbol) if word)


def frechet_name(groups: Sequence[Group], setting: Setting) -> str | None:
    """The name of the Fréchet distance in this setting, None where it was not measured."""
    return next((n for n in sorted(measured_names(groups, setting)) if base_name(n) in FRECHET), None)


def _sweep_picture(dataset: str, sweep: Sweep, setting: Setting, suffix: str) -> Picture | None:
    members = [group for cells in sweep.values() for group in cells.values()]
    metric, objective = frechet_name(members, setting), members[0].method
    if metric is None:
        return None
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
        limit_values(axis, min(ends), max(ends))
    diverged = _mark_diverged(axis, sweep)
    legend_below(figure, axis, columns=3, extra=diverged)
    figure.suptitle(f"{dataset}, {objective}{counted(setting)}, mean ± std over seeds", fontsize=14)
    crosses = "; crosses on top: a seed diverged there" if diverged else ""
    caption = f"{dataset}: {metric} against the step size γ (Fig. 4), {objective}{crosses}"
    return Picture(file_name(dataset, f"step-sizes-{setting.extractor}{suffix}"), caption, figure)


def _draw_line(
    axis: Any, index: int, line: tuple[str, float | None], sweep: Sweep, setting: Setting, metric: str
) -> list[float]:
    """Draws finished cells; the ends of its error bars."""
    by_size = {size: group.finite(metric, setting) for size, group in sorted(sweep[line].items()) if not group.diverged}
    values = {size: list(own.values()) for size, own in by_size.items() if own}
    means = [statistics.fmean(own) for own in values.values()]
    std = [statistics.stdev(own) if len(own) > 1 else 0.0 for own in values.values()]
    dodge = 1 + 0.035 * (index - (len(sweep) - 1) / 2)  # so that error bars stand beside one another
    style = {"color": COLOURS[index], "marker": MARKERS[index], "capsize": 5, "label": line_name(line, sweep)}
    axis.errorbar([size * dodge for size in values], means, yerr=std if any(std) else None, **style)
    return [end for mean, s in zip(means, std) for end in (mean - s, mean + s)]


def _mark_diverged(axis: Any, sweep: Sweep) -> list[Any]:
    """A strip above the panel, a row per line: a cross at every step size at which a seed diverged; its legend."""
    from matplotlib.lines import Line2D

    cross = {"marker": "x", "markersize": 10, "markeredgewidth": 2.6, "linestyle": ""}
    by_line = [[size for size, group in sorted(cells.items()) if group.outcome] for cells in sweep.values()]
    rows = [(colour, sizes) for colour, sizes in zip(COLOURS, by_line) if sizes]
    for row, (colour, sizes) in enumerate(rows):
        heights = [1.03 + 0.045 * (len(rows) - 1 - row)] * len(sizes)
        axis.plot(sizes, heights, transform=axis.get_xaxis_transform(), clip_on=False, color=colour, **cross)
    return [Line2D([], [], color="#555555", label="a seed diverged", **cross)] if rows else []
