"""Fig. 5A and 9: what every method draws, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lpc_runner.base.files import is_refusal
from lpc_runner.paper.evidence import as_planned
from lpc_runner.study.grouping import Group
from lpc_runner.study.runs import Run
from lpc_runner.study.style import MANY, Picture, file_name, new_figure, short_labels, wrapped

MAX_GRIDS = 12


def grid_pictures(dataset: str, groups: Sequence[Group], warnings: list[str]) -> Iterator[Picture]:
    """The data and the final samples of each group's first run: VAE, then LPC without and with preconditioning."""
    panels = _panels(groups, warnings)
    if all(title == "data" for title, _ in panels):
        return
    left_out = len(panels) - MAX_GRIDS
    panels = panels[:MAX_GRIDS]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.4 * columns, 5.2 * rows, MANY)
    figure.get_layout_engine().set(h_pad=0.12)
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.set_axis_off()
    for axis, (title, picture) in zip(figure.axes, panels):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(wrapped(title, 34), fontsize=15)
    more = f"; {left_out} more groups are not shown" if left_out > 0 else ""
    caption = f"{dataset}: data and final samples, of each method's first seed (Fig. 5A, 9){more}"
    yield Picture(file_name(dataset, "samples"), caption, figure)


def _panels(groups: Sequence[Group], warnings: list[str]) -> list[tuple[str, Any]]:
    import matplotlib.image

    shown = sorted([group for group in groups if group.counted], key=_order)
    wanted: list[tuple[str, Path]] = []
    for group, title in zip(shown, short_labels(shown, panel_title)):
        run = group.counted[0]
        mark = "\nlast finite state" if group.diverged else ""
        wanted += [("data", run.path / "samples" / "data.png")] * (not wanted)
        wanted.append((f"{title}{mark}\nseed {run.seed}{_cut(run, group)}", run.path / "samples" / "final.png"))
    panels = []
    for title, path in wanted:
        if path.exists():
            try:
                panels.append((title, matplotlib.image.imread(path)))
            except (OSError, ValueError, SyntaxError) as error:
                what = f"cannot be read ({error.strerror})" if is_refusal(error) else "is damaged (no picture)"
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
    return {"none": 0, "langevin": 2}.get(group.properties.get("sampler"), 1) + (
        group.properties.get("preconditioning", "none") != "none"
    )


def panel_title(group: Group) -> str:
    """A method's name with its epochs: what Fig. 9 says of its VAE."""
    epochs = group.properties.get("num_epochs")
    named = f"{epochs} epochs" in group.label
    return group.method if epochs is None or named else f"{group.method}, {epochs} epochs"
