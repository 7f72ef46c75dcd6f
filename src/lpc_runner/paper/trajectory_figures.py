"""Fig. 1 and 6: chains on the two directions along which they move most, over contours of -log p(x, z)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpc_runner.study.grouping import Group
from lpc_runner.study.runs import Run
from lpc_runner.study.style import MANY, Picture, file_name, legend_below, new_figure
from lpc_runner.study.traces import read_trajectories

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    found = representative(groups, warnings)
    if found is None:
        return
    group, run, data = found
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
        (group, run)
        for group in groups
        for run in (group.counted or group.runs)[:1]
        if (run.path / "trajectories.npz").exists()
    ]
    candidates.sort(key=lambda pair: (pair[0].properties.get("sampler") == "map", pair[0].diverged, _rank(pair[0])))
    for group, run in candidates:
        data = read_trajectories(run, warnings)
        if data is not None:
            return group, run, data
    return None


def _rank(group: Group) -> int:
    objective = group.properties.get("objective")
    return PREFERRED.index(objective) if objective in PREFERRED else len(PREFERRED)


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
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[number:]:
        panel.set_axis_off()
    for index, panel in zip(range(number), panels.flat):
        draw_chain(panel, data[name], index, small=True)
        panel.set_xticks([])
        panel.set_yticks([])
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
    path = chains["coordinates"][:, index]
    path = path[np.isfinite(path).all(axis=1)]
    panel.grid(visible=False)
    if not len(path):
        return
    shade = LinearSegmentedColormap.from_list("steps", [EARLY, LATE])
    segments = np.stack([path[:-1], path[1:]], axis=1)
    times = np.linspace(0, 1, max(len(segments), 1))
    width, size = (1.0, 20) if small else (1.9, 80)
    panel.add_collection(LineCollection(segments, colors=shade(times), linewidths=width, zorder=2))
    panel.scatter(*path[0], s=size, color=START, edgecolors="black", linewidths=width, zorder=4, label="z(0)")
    panel.scatter(*path[-1], s=size, color=END, edgecolors="white", linewidths=0.6 * width, zorder=4, label="z(T)")
    low, high = path.min(axis=0), path.max(axis=0)
    margin = 0.12 * np.maximum(high - low, 1e-6)
    panel.set_xlim(low[0] - margin[0], high[0] + margin[0])
    panel.set_ylim(low[1] - margin[1], high[1] + margin[1])


def _free_corner(panel: Any, chains: dict[str, np.ndarray], index: int, size: float = 0.3) -> tuple[float, float]:
    """Lower left end, in shares of the panel, of the corner square that the fewest states lie in."""
    path = chains["coordinates"][:, index]
    path = path[np.isfinite(path).all(axis=1)]
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    places = (path - [left, bottom]) / [right - left, top - bottom]
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
    grey = len(picture) == 1
    panel.imshow(picture[0] if grey else np.moveaxis(picture, 0, -1), cmap="gray", vmin=0, vmax=1)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.grid(visible=False)
    for side in panel.spines.values():
        side.set_visible(True)
        side.set_color("#555555")
