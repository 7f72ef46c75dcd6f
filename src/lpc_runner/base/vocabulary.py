"""By what runs are compared, said once: metrics in the order in which they are shown, settings and their symbols."""

from __future__ import annotations

import re

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


def base_name(metric: str) -> str:
    """fd of fd_random_conv."""
    return metric.partition("_")[0]
