"""How results are shown everywhere: the order of metrics, symbols of settings, colours, and the style of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FRECHET = ("fid", "fd")
# Metrics of sample quality. Those of an extractor other than Inception carry its name: fd_random_conv.
QUALITY = (*FRECHET, "kid", "density", "coverage", "precision", "recall")
IS_QUALITY = re.compile(rf"({'|'.join(QUALITY)})(?:_(\w+))?")
# Better when higher; every other metric counts as a loss.
IS_BETTER_HIGHER = re.compile(
    r"(precision|recall|density|coverage)(_.*)?|ess_per_pass(_slowest)?|"
    r".*(elbo|iwae|log_evidence|log_likelihood|_r2|per_spike|effective_samples)"
)
# How a label writes a setting.
SYMBOLS = {"step_size": "γ", "beta": "β", "num_steps": "T", "learning_rate": "α"}
# Where annealed importance sampling starts, `metrics.ais.start`, in words.
STARTS = {"encoder": "the encoder's q", "free": "a free q for each example", "prior": "the prior"}


def base_name(metric: str) -> str:
    """fd of fd_random_conv."""
    return metric.partition("_")[0]


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
