"""Pictures of a study: metrics during training, sample grids side by side."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpc_runner.report.budgets import Curve, curve_settings, followed, mean_curve
from lpc_runner.report.grouping import Group
from lpc_runner.report.study import Point, Setting, Study
from lpc_runner.report.tables import base_name, metric_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes and in grey; yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8c8c8c")
MARKERS = "osD^vP*X"
MAX_LINES = len(COLOURS)  # more lines in one picture cannot be told apart: the next ones get their own
MAX_GRIDS = 12
DPI = 200
STYLE = {
    "font.size": 13,
    "axes.labelsize": 14,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
}
NAMES = {
    "fid": "FID (lower is better)",
    "fd": "Fréchet distance (lower is better)",
    "kid": "KID (lower is better)",
    "density": "density (1 for a perfect model)",
    "coverage": "coverage (higher is better)",
    "precision": "precision (higher is better)",
    "recall": "recall (higher is better)",
    "train/elbo": "ELBO of training batches\n(nats per example)",
}
LOGARITHMIC = ("fid", "fd", "kid")  # where they span more than a decade
NUM_AVERAGED = 60  # points of a training curve, each a mean over neighbouring rows


def study_figures(study: Study, warnings: list[str]) -> Iterator[tuple[str, Figure]]:
    """File name and figure, one by one; only what was measured more than once during training has a curve."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        for dataset in study.datasets:
            groups = study.of(dataset)
            for setting in curve_settings(groups):
                curves = [run.curve(setting) for group in groups for run in followed(group)]
                names = {name for curve in curves for point in curve for name in point.values}
                for metric in sorted(names, key=metric_order):
                    yield from curve_figures(dataset, groups, metric, setting)
            yield from curve_figures(dataset, groups, "train/elbo", None)
            grids = sample_figure(dataset, groups, warnings)
            if grids is not None:
                yield file_name(dataset, "samples"), grids


def file_name(dataset: str, what: str) -> str:
    """<dataset>-<what>.png, safe as a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{dataset}-{what}.png")


def png(figure: Figure) -> bytes:
    """The picture, byte for byte the same whenever the data are."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


# Curves ---------------------------------------------------------------------------------------------------


def _averaged(points: list[Point]) -> list[Point]:
    """A training curve with its noise averaged over neighbouring rows, at the last row of each stretch."""
    size = -(-len(points) // NUM_AVERAGED) or 1
    averaged = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        mean = sum(point.values["train/elbo"] for point in stretch) / len(stretch)
        last = stretch[-1]
        averaged.append(Point(last.update, last.seconds, last.gradient_evaluations, None, {"train/elbo": mean}))
    return averaged


def curve_figures(
    dataset: str, groups: Sequence[Group], metric: str, setting: Setting | None
) -> Iterator[tuple[str, Figure]]:
    """The metric against updates and against seconds, at most MAX_LINES groups a picture, on equal axes.

    setting None: not a measurement but the training log.
    """
    lines: list[tuple[Group, Curve]] = []
    for group in groups:
        runs = followed(group)
        points = [_averaged(run.training) if setting is None else run.curve(setting) for run in runs]
        curve = mean_curve(points, metric)
        if curve.updates:
            lines.append((group, curve))
    if not any(len(curve.updates) > 1 for _, curve in lines):
        return
    number_of_pages = -(-len(lines) // MAX_LINES)
    size = -(-len(lines) // number_of_pages)
    pages = [lines[start : start + size] for start in range(0, len(lines), size)]
    for number, page in enumerate(pages, start=1):
        suffix = f"-{number}" if len(pages) > 1 else ""
        name = file_name(dataset, f"{metric}{suffix}")
        yield name, _curve_figure(dataset, page, lines, metric, setting)


def _curve_figure(
    dataset: str,
    page: Sequence[tuple[Group, Curve]],
    everything: Sequence[tuple[Group, Curve]],
    metric: str,
    setting: Setting | None,
) -> Figure:
    from matplotlib.figure import Figure

    timed = any(seconds is not None for _, curve in everything for seconds in curve.seconds)
    rows = -(-len(page) // 2)
    figure = Figure(figsize=(11, 4.4 + 0.3 * rows), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    for index, (group, curve) in enumerate(page):
        style = {"color": COLOURS[index], "marker": MARKERS[index], "label": _legend(group, curve)}
        if not group.counted:
            style["linestyle"] = ":"
        _draw(axes[0], curve.updates, curve, style)
        if timed:
            _draw(axes[1], curve.seconds, curve, style)
    axes[0].set_xlabel("updates")
    axes[0].set_ylabel(_axis_name(metric, setting))
    low, high = _limits([curve for _, curve in everything], cut=setting is None)
    if setting is not None and base_name(metric) in LOGARITHMIC and low > 0 and high > 10 * low:
        axes[0].set_yscale("log")
        axes[0].set_ylim(low / 1.2, high * 1.2)
        _label_decades(axes[0].yaxis, low, high)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes[0].set_ylim(low - margin, high + margin)
    if timed:
        seconds = [value for _, curve in everything for value in curve.seconds if value]
        axes[1].set_xlabel("training time (s)")
        if max(seconds) > 10 * min(seconds):
            axes[1].set_xscale("log")
            _label_decades(axes[1].xaxis, min(seconds), max(seconds))
            axes[1].set_xlabel("training time (s, logarithmic)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(page) > 1 else 1)
    counted = "" if setting is None else f", N = {setting.num_samples:,} samples"
    averaged = ", mean ± std over seeds" if any(curve.num_runs > 1 for _, curve in page) else ""
    figure.suptitle(f"{dataset}{counted}{averaged}", fontsize=14)
    return figure


def _draw(axis: Any, x: Sequence[float | None], curve: Curve, style: dict[str, Any]) -> None:
    known = [index for index, value in enumerate(x) if value is not None]
    x, mean, std = ([column[index] for index in known] for column in (x, curve.mean, curve.std))
    axis.plot(x, mean, markevery=max(1, len(x) // 12), **style)
    if curve.num_runs > 1:
        low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _label_decades(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10, ... or, over many decades, 1, 10, 100, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(LogLocator(subs=range(1, 10), numticks=99))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _limits(curves: Sequence[Curve], cut: bool) -> tuple[float, float]:
    """Lowest and highest end of a band; `cut`: without the first tenth, in which an ELBO rises steeply."""
    low, high = [], []
    for curve in curves:
        first = 0.1 * curve.updates[-1] if cut else 0
        kept = [i for i, update in enumerate(curve.updates) if update >= first]
        low += [curve.mean[i] - curve.std[i] for i in kept]
        high += [curve.mean[i] + curve.std[i] for i in kept]
    return min(low), max(high)


def _axis_name(metric: str, setting: Setting | None) -> str:
    name = NAMES[metric if setting is None else base_name(metric)]
    return name if setting is None else f"{name.replace(' (', chr(10) + '(')}\n{setting.extractor} features"


def _legend(group: Group, curve: Curve) -> str:
    seeds = f"{curve.num_runs} seeds" if curve.num_runs > 1 else "1 seed"
    statuses = sorted({run.status for run in followed(group)} - {"finished"})
    return "\n".join(textwrap.wrap(f"{group.label} ({', '.join([seeds, *statuses])})", 48))


# Sample grids ---------------------------------------------------------------------------------------------


def sample_figure(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Figure | None:
    """The data and the final samples of each group's first run, side by side; None where none has any."""
    import matplotlib.image
    from matplotlib.figure import Figure

    panels: list[tuple[str, Any]] = []
    with_grids = [(group, run) for group in groups for run in group.counted[:1]]
    wanted: list[tuple[str, Path]] = [("data", run.path / "samples" / "data.png") for _, run in with_grids[:1]]
    for group, run in with_grids:
        wanted.append((f"{group.marked_label}\nseed {run.seed}", run.path / "samples" / "final.png"))
    for title, path in wanted:
        if path.exists():
            try:
                panels.append((title, matplotlib.image.imread(path)))
            except (OSError, ValueError, SyntaxError):
                warnings.append(f"{path.parents[1].name}/samples/{path.name} is damaged (no picture)")
    if all(title == "data" for title, _ in panels):
        return None
    left_out = len(panels) - MAX_GRIDS
    panels = panels[:MAX_GRIDS]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 4.8 * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.set_axis_off()
    for axis, (title, picture) in zip(figure.axes, panels):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        lines = [line for part in title.splitlines() for line in textwrap.wrap(part, 34)]
        axis.set_title("\n".join(lines), fontsize=14)
    if left_out > 0:
        figure.supxlabel(f"{left_out} more groups are not shown", fontsize=13)
    return figure
