"""Langevin predictive coding: train deep latent Gaussian models by sampling their posterior."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def load(run_dir: Any, *overrides: str, device: str = "auto") -> Any:
    """Model and encoder of a run directory, ready to use; see `lpc_runner.loading.load`."""
    from lpc_runner.loading import load as load_run  # torch is imported only when it is needed

    return load_run(run_dir, overrides, device)
