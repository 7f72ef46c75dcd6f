"""What all pictures share: colours, names of axes, how a figure becomes a file."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lpc_runner.base.presentation import COLOURS, FRECHET, base_name
from lpc_runner.study.runs import Setting
from lpc_runner.study.study import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"
MAX_LINES = len(COLOURS)  # more lines in one picture cannot be told apart: the next ones get their own
DPI = 200
MANY = 120  # dots per inch where a picture is a square of many small ones
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
SHOWN = (*FRECHET, "density", "coverage")  # the metrics that the paper reports
HARD = "\N{NO-BREAK SPACE}"
LOGARITHMIC = (*FRECHET, "kid")  # where they span more than a decade
OBJECTIVES = {"forward": "forward KL", "reverse": "reverse KL", "jeffreys": "Jeffreys", "prior": "no warm start"}


class Picture(NamedTuple):
    """A figure, the name of its file, and a sentence that says what is to be seen."""

    name: str
    caption: str
    figure: Figure


def file_name(dataset: str, what: str) -> str:
    """<dataset>-<what>.png, safe as a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{dataset}-{what}.png")


def png(figure: Figure) -> bytes:
    """The picture, byte for byte the same whenever the data are."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure", metadata={"Software": None})
    return buffer.getvalue()


def new_figure(width: float, height: float, dpi: int = DPI) -> Figure:
    """An empty figure of this size in inches that keeps its labels apart."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def pages(items: Sequence[Any], size: int = MAX_LINES) -> list[tuple[str, Sequence[Any]]]:
    """Items in equal shares of at most `size`, each with the ending of its file's name."""
    number = -(-len(items) // size)
    share = -(-len(items) // max(number, 1))
    starts = range(0, len(items), share or 1)
    return [(f"-{page}" if number > 1 else "", items[s : s + share]) for page, s in enumerate(starts, start=1)]


def axis_name(metric: str, setting: Setting | None) -> str:
    """A metric's name and direction, and the features behind it, for the side of a panel."""
    name = NAMES[metric if setting is None else base_name(metric)]
    return name if setting is None else f"{name.replace(' (', chr(10) + '(')}\n{setting.extractor} features"


def _pieces(text: str) -> list[str]:
    """Text at its commas, those between brackets left alone: levels=[24, 16] is one word of a label."""
    return re.split(r", (?![^\[]*\])", text)


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width`, its own line breaks kept; broken after commas where that is possible."""
    lines = []
    for part in text.splitlines():
        pieces = [piece if len(piece) >= width else piece.replace(" ", HARD) for piece in _pieces(part)]
        lines += textwrap.wrap(", ".join(pieces), width)
    return "\n".join(lines).replace(HARD, " ")


def legend_below(figure: Figure, axis: Any, columns: int = 2, extra: Sequence[Any] = ()) -> None:
    """One legend for the whole figure, under it; extra: artists with a label, at its end."""
    handles, labels = axis.get_legend_handles_labels()
    labels += [artist.get_label() for artist in extra]
    figure.legend([*handles, *extra], labels, loc="outside lower center", ncols=min(columns, len(labels)))


def label_decades(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10, ... or, over many decades, 1, 10, 100, ..."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.set_major_formatter(lambda value, _: plain(value))
    axis.set_minor_locator(LogLocator(subs=range(1, 10), numticks=99))
    axis.set_minor_formatter(NullFormatter())


def plain(value: float) -> str:
    """0.001, 25, 3000, 5e4 without a plus sign or padding."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.5g}" if abs(value) < 1e4 else f"{value:.3g}")


def short_labels(groups: Sequence[Group], name: Callable[[Group], str]) -> list[str]:
    """`name` of each group and those words of its label that not all of these groups share."""
    words = [_pieces(group.label)[1:] for group in groups]
    shared = set.intersection(*map(set, words)) if words else set()
    return [", ".join([name(group), *(w for w in own if w not in shared)]) for group, own in zip(groups, words)]


def log_where_wide(panel: Any, which: Literal["x", "y"], low: float, high: float) -> bool:
    """One axis of a panel logarithmic where positive values span more than a decade; whether they do."""
    wide = high > 10 * low > 0
    if wide:
        panel.set(**{f"{which}scale": "log"})
        label_decades(getattr(panel, f"{which}axis"), low, high)
    return wide


def limit_values(panel: Any, low: float, high: float, logarithmic: bool = True) -> None:
    """y with a margin around these values, where they span more than a decade and that is wanted logarithmic."""
    if logarithmic and log_where_wide(panel, "y", low, high):
        panel.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        panel.set_ylim(low - margin, high + margin)


def counted(setting: Setting | None) -> str:
    """The number of samples behind a picture, for the end of its title."""
    return "" if setting is None or setting.num_samples is None else f", N = {setting.num_samples:,} samples"
