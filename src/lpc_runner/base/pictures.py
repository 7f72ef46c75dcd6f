"""What all pictures share: colours, and settings of matplotlib that no file of the user's changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind eyes and in grey; yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8c8c8c")
STYLE = {
    "font.size": 13,
    "axes.labelsize": 14,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "hatch.color": "white",
}


@contextmanager
def picture_style(**more: Any) -> Iterator[None]:
    """Matplotlib's own defaults with STYLE and `more` (rcParams) on top, whatever a matplotlibrc says of fonts."""
    import matplotlib

    defaults = matplotlib.rcParamsDefault
    style: dict[Any, Any] = {name: defaults[name] for name in defaults if "backend" not in name}
    style.update(STYLE | more)
    with matplotlib.rc_context(style):
        yield
