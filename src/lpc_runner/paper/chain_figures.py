"""Fig. 3, 7 and 8: what one step of a chain gains, and how large the gradient is, along the chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpc_runner.base.presentation import COLOURS
from lpc_runner.study.curve_figures import legend
from lpc_runner.study.recorded_chains import (
    DRIFT_NORM,
    LOG_JOINT,
    ChainCurve,
    chain_curves,
    read_trajectories,
    traced_updates,
)
from lpc_runner.study.runs import Run
from lpc_runner.study.study import Group
from lpc_runner.study.style import MANY, Picture, file_name, label_decades, legend_below, new_figure, pages, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_PANELS = 4
LONG = 50  # steps from which the first ones need a logarithmic axis
LINES = ("-", "--", "-.", ":")
KINDS = {
    LOG_JOINT: ("delta-log-joint", "Δ log p(x, z) of a step (nats)", "gain of log p(x, z) per step (Fig. 3, 7)"),
    DRIFT_NORM: ("drift-norm", "L2 norm of ∇ log p(x, z)\n(nats per unit of z)", "norm of the gradient (Fig. 8)"),
}


def chain_pictures(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Iterator[Picture]:
    """A picture per quantity with a panel per recorded training batch and a line per group."""
    recorded = {group.label: {u for run in group.followed for u in traced_updates(run)} for group in groups}
    updates = sorted(set().union(*recorded.values()))[-MAX_PANELS:]
    shown = [group for group in groups if recorded[group.label] & set(updates)]
    found = {(update, group.label): chain_curves(group, update, warnings) for update in updates for group in shown}
    for name, (short, _, what) in KINDS.items():
        for suffix, page in pages(shown):
            drawn = {u: [(g, found[u, g.label][name]) for g in page if name in found[u, g.label]] for u in updates}
            curves = {update: lines for update, lines in drawn.items() if lines}
            if curves:
                caption = (
                    f"{dataset}: {what} along the chain at training batch {' and '.join(f'{u:,}' for u in curves)}; "
                    "lines: medians over the chains of all seeds, bands: their middle half"
                )
                yield Picture(file_name(dataset, f"{short}{suffix}"), caption, _chain_figure(dataset, curves, name))


def _chain_figure(dataset: str, curves: dict[int, list[tuple[Group, ChainCurve]]], name: str) -> Figure:
    labels = list(dict.fromkeys(group.label for lines in curves.values() for group, _ in lines))
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(5.5 * columns + (2 if columns == 1 else 0), 4.2 * rows + 0.5 + 0.3 * -(-len(labels) // 2))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    for panel, (update, lines) in zip(panels.flat, curves.items()):
        panel.set_title(f"training batch {update:,}")
        for group, curve in lines:
            index = labels.index(group.label)
            style = {"color": COLOURS[index], "linestyle": LINES[index % len(LINES)]}
            panel.plot(curve.steps, curve.median, label=legend(group, curve.num_runs), **style)
            panel.fill_between(curve.steps, curve.low, curve.high, color=COLOURS[index], alpha=0.16, linewidth=0)
    everything = [curve for lines in curves.values() for _, curve in lines]
    longest = max(int(curve.steps[-1]) for curve in everything)
    for panel in panels[-1]:
        panel.set_xlabel("chain step t" + (" (logarithmic)" if longest >= LONG else ""))
    if longest >= LONG:
        panels[0][0].set_xscale("log")
        label_decades(panels[0][0].xaxis, 1, longest)
    for row in panels:
        row[0].set_ylabel(KINDS[name][1])
    _scale(panels, everything, name)
    fullest = max(zip(panels.flat, curves.values()), key=lambda pair: len(pair[1]))[0]
    legend_below(figure, fullest)
    figure.suptitle(f"{dataset}, median and middle half over chains", fontsize=14)
    return figure


def _scale(panels: Any, curves: Sequence[ChainCurve], name: str) -> None:
    """Logarithmic for norms; for gains linear within the spread of settled chains, logarithmic beyond it."""
    low = min(float(np.min(curve.low)) for curve in curves)
    high = max(float(np.max(curve.high)) for curve in curves)
    axis = panels[0][0]
    if name == DRIFT_NORM:
        positive = min((float(np.min(c.low[c.low > 0])) for c in curves if (c.low > 0).any()), default=1.0)
        axis.set_yscale("log")
        axis.set_ylim(positive / 1.3, max(high, positive) * 1.3)
        label_decades(axis.yaxis, positive, high)
        return
    for panel in panels.flat:
        panel.axhline(0, color="#555555", linewidth=1)
    settled = [np.abs(part[len(part) // 2 :]) for curve in curves for part in (curve.low, curve.high)]
    threshold = 10.0 ** np.ceil(np.log10(max(float(np.median(np.concatenate(settled))), 1e-6)))
    if max(high, -low) > 10 * threshold:
        axis.set_yscale("symlog", linthresh=threshold, linscale=0.7)
        axis.yaxis.set_major_formatter(lambda value, _: plain(value))
        axis.set_ylim(min(1.5 * low, -0.4 * threshold), 1.5 * high)


NUM_LARGE = 3  # observations in Fig. 1
MAX_SMALL = 64  # and in Fig. 6
NUM_LEVELS = 10
TITLES = {"map": "predictive coding", "langevin": "Langevin"}
PREFERRED = ("jeffreys", "reverse", "forward", "prior")
EARLY, LATE = "#F5B27C", "#7A2400"  # of a trajectory: light to dark orange
LOW, HIGH = "#FFFFFF", "#C3D0DB"  # of -log p(x, z): white to a pale blue, so that the trajectory is seen
START, END = "white", "#0072B2"


def trajectory_pictures(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Iterator[Picture]:
    """A few observations large, predictive coding beside Langevin, and all of them small, of one run."""
    chosen = representative(groups, warnings)
    if chosen is None:
        return
    group, run, data = chosen
    names = [name for name in TITLES if name in data]
    who = f"{group.label}, seed {run.seed}"
    how = (
        "z(t) - z(T) on its first two principal directions over contours of -log p(x, z); "
        "light: early steps, ring: start, dot: end"
    )
    sides = " beside ".join(TITLES[name] for name in names)
    caption = f"{dataset}: chains of {sides} (Fig. 1), {who}; {how}"
    yield Picture(file_name(dataset, "trajectories"), caption, large_figure(data, names))
    for name in names:
        caption = f"{dataset}: every recorded chain of {TITLES[name]} (Fig. 6), {who}; {how}"
        yield Picture(file_name(dataset, f"trajectories-{name}"), caption, small_figure(data, name))


def representative(groups: Sequence[Group], warnings: list[str]) -> tuple[Group, Run, dict[str, Any]] | None:
    """The run whose chains are shown: with both samplers and a finished one where there is one, Jeffreys first."""
    candidates = [
        (group, run) for group in groups for run in group.followed[:1] if (run.path / "trajectories.npz").exists()
    ]
    for group, run in sorted(candidates, key=lambda pair: _order(pair[0])):
        data = read_trajectories(run, warnings)
        if data is not None:
            return group, run, data
    return None


def _order(group: Group) -> tuple[bool, bool, int]:
    objective = group.properties.get("objective")
    return group.properties.get("sampler") == "map", group.diverged, [*PREFERRED, objective].index(objective)


def large_figure(data: dict[str, Any], names: Sequence[str]) -> Figure:
    """Rows: observations, columns: the observation and a panel per sampler."""
    number = min(NUM_LARGE, len(data["images"]))
    figure = new_figure(2.2 + 4.9 * len(names), 4.3 * number)
    grid = figure.subplots(number, 1 + len(names), squeeze=False, width_ratios=[0.42] + [1] * len(names))
    for index, row in enumerate(grid):
        _draw_image(row[0], data["images"][index])
        row[0].set_title("observation x" if index == 0 else "", fontsize=13)
        for panel, name in zip(row[1:], names):
            draw_chain(panel, data[name], index)
            panel.set_title(TITLES[name] if index == 0 else "")
            first, second = (f"direction {i + 1} ({data[name]['explained'][index, i]:.0%} of variance)" for i in (0, 1))
            panel.set_xlabel(first, fontsize=12)
            panel.set_ylabel(second, fontsize=12)
            panel.tick_params(labelsize=10)
    legend_below(figure, grid[0][-1])
    return figure


def small_figure(data: dict[str, Any], name: str) -> Figure:
    """A square of small panels, the observation in the corner of each; all axes in units of z, scaled to each chain."""
    number = min(MAX_SMALL, len(data["images"]))
    columns = int(np.ceil(np.sqrt(number)))
    rows = -(-number // columns)
    figure = new_figure(1.7 * columns, 1.7 * rows + 0.5, MANY)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[number:]:
        panel.set_axis_off()
    for index, panel in zip(range(number), panels.flat):
        draw_chain(panel, data[name], index, small=True)
        panel.set(xticks=[], yticks=[])
        _draw_image(panel.inset_axes((*_free_corner(panel, data[name], index), 0.3, 0.3)), data["images"][index])
    figure.supxlabel("direction 1", fontsize=14)
    figure.supylabel("direction 2", fontsize=14)
    figure.suptitle(f"{TITLES[name]}, {number} observations", fontsize=14)
    return figure


def draw_chain(panel: Any, chains: dict[str, np.ndarray], index: int, small: bool = False) -> None:
    """Contours and the trajectory of one chain: light early, dark late, a ring at z(0), a dot at z(T)."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    _draw_surface(panel, chains["grid"][index], chains["potential"][index])
    path = _states(chains, index)
    panel.grid(visible=False)
    if not len(path):
        return
    shade = LinearSegmentedColormap.from_list("steps", [EARLY, LATE])
    segments = np.stack([path[:-1], path[1:]], axis=1)
    times = np.linspace(0, 1, max(len(segments), 1))
    width, size = (1.0, 20) if small else (1.9, 80)
    panel.add_collection(LineCollection(list(segments), colors=shade(times), linewidths=width, zorder=2))
    panel.scatter(*path[0], s=size, color=START, edgecolors="black", linewidths=width, zorder=4, label="z(0)")
    panel.scatter(*path[-1], s=size, color=END, edgecolors="white", linewidths=0.6 * width, zorder=4, label="z(T)")
    low, high = path.min(axis=0), path.max(axis=0)
    margin = 0.12 * np.maximum(high - low, 1e-6)
    xlim, ylim = zip(low - margin, high + margin)
    panel.set(xlim=xlim, ylim=ylim)


def _states(chains: dict[str, np.ndarray], index: int) -> np.ndarray:
    path = chains["coordinates"][:, index]
    return path[np.isfinite(path).all(axis=1)]


def _free_corner(panel: Any, chains: dict[str, np.ndarray], index: int, size: float = 0.3) -> tuple[float, float]:
    """Lower left end, in shares of the panel, of the corner square that the fewest states lie in."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    places = (_states(chains, index) - [left, bottom]) / [right - left, top - bottom]
    corners = [(0.0, 1 - size), (1 - size, 1 - size), (0.0, 0.0), (1 - size, 0.0)]
    return min(corners, key=lambda corner: int(((places >= corner) & (places <= np.add(corner, size))).all(1).sum()))


def _draw_surface(panel: Any, grid: np.ndarray, potential: np.ndarray) -> None:
    """Contours at distances above the lowest point that grow by equal factors; potential [i, j] is at (i, j)."""
    from matplotlib.colors import LinearSegmentedColormap

    above = np.ma.masked_invalid(potential.T)
    if above.count() < 4 or not float(above.max()) > float(above.min()):
        return
    above = above - above.min()
    top = float(above.max())
    levels = np.concatenate([[0], np.geomspace(top / 2**NUM_LEVELS, top, NUM_LEVELS)])
    shades = LinearSegmentedColormap.from_list("depth", [LOW, HIGH])(np.linspace(0, 1, len(levels) - 1))
    panel.contourf(grid[0], grid[1], above, levels=levels, colors=shades)
    panel.contour(grid[0], grid[1], above, levels=levels[1:-1], colors="#93a1ad", linewidths=0.6)


def _draw_image(panel: Any, image: np.ndarray) -> None:
    """An observation (C, H, W) of 8 bits, framed."""
    picture = np.clip(image, 0, 255) / 255
    panel.imshow(np.moveaxis(picture, 0, -1), cmap="gray", vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    panel.spines[:].set(visible=True, color="#555555")
