"""Langevin predictive coding: train deep latent Gaussian models by sampling their posterior."""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # python -m puts the working directory first:
    sys.path.append(sys.path.pop(0))  # a user's random.py or logging.py there would be taken for Python's own

from typing import Any

from lpc_runner.base.moved import find_moved_modules

__version__ = "0.1.0"
__all__ = ["load", "run"]
find_moved_modules()


def run(words: Any) -> Any:
    """What `python -m lpc_runner WORDS` would run, made here; see `lpc_runner.runner.in_python.run`."""
    from lpc_runner.runner.in_python import run as run_words  # torch is imported only when it is needed

    return run_words(words)


def load(run_dir: Any, *overrides: str, device: str = "auto") -> Any:
    """Model and encoder of a run directory, ready to use; see `lpc_runner.runner.in_python.load`."""
    from lpc_runner.runner.in_python import load as load_run

    return load_run(run_dir, overrides, device)
