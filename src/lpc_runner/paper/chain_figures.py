"""Fig. 3, 7 and 8: what one step of a chain gains, and how large the gradient is, along the chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpc_runner.study.curve_figures import legend
from lpc_runner.study.grouping import Group
from lpc_runner.study.style import COLOURS, Picture, file_name, label_decades, legend_below, new_figure, pages, plain
from lpc_runner.study.traces import DRIFT_NORM, LOG_JOINT, Curve, chain_curve, traced_runs, traced_updates

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
    recorded = {group.label: {u for run in traced_runs(group) for u in traced_updates(run)} for group in groups}
    updates = sorted(set().union(*recorded.values()))[-MAX_PANELS:]
    shown = [group for group in groups if recorded[group.label] & set(updates)]
    for name, (short, _, what) in KINDS.items():
        for suffix, page in pages(shown):
            found: list[str] = []
            curves = {
                update: [(g, curve) for g in page if (curve := chain_curve(g, update, name, found)) is not None]
                for update in updates
            }
            warnings += found if name == LOG_JOINT else []  # the other quantity reads the same files
            curves = {update: lines for update, lines in curves.items() if lines}
            if curves:
                caption = (
                    f"{dataset}: {what} along the chain at training batch {' and '.join(f'{u:,}' for u in curves)}; "
                    "lines: medians over the chains of all seeds, bands: their middle half"
                )
                yield Picture(file_name(dataset, f"{short}{suffix}"), caption, _chain_figure(dataset, curves, name))


def _chain_figure(dataset: str, curves: dict[int, list[tuple[Group, Curve]]], name: str) -> Figure:
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


def _scale(panels: Any, curves: Sequence[Curve], name: str) -> None:
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
        from matplotlib.ticker import FuncFormatter, NullLocator, SymmetricalLogLocator

        axis.set_yscale("symlog", linthresh=threshold, linscale=0.7)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylim(min(1.5 * low, -0.4 * threshold), 1.5 * high)
