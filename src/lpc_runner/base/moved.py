"""Modules that parts of one's own import, under the names they had before: found, with a warning of the new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old name: where its content is today. A module that users' parts may import gets a row when it moves.
MOVED = {
    "lpc_runner.data.batches": "lpc_runner.data.dataset",
    "lpc_runner.data.binarise": "lpc_runner.data.dataset",
    "lpc_runner.data.chaotic_rnn": "lpc_runner.data.simulated",
    "lpc_runner.data.linear_system": "lpc_runner.data.simulated",
    "lpc_runner.data.lorenz": "lpc_runner.data.simulated",
    "lpc_runner.distributions": "lpc_runner.base.distributions",
    "lpc_runner.emissions": "lpc_runner.base.distributions",
    "lpc_runner.errors": "lpc_runner.base.errors",
    "lpc_runner.inference.importance": "lpc_runner.inference.objectives",
    "lpc_runner.likelihoods": "lpc_runner.base.likelihoods",
    "lpc_runner.models.linear": "lpc_runner.models.dense",
    "lpc_runner.models.mlp": "lpc_runner.models.dense",
    "lpc_runner.randomness": "lpc_runner.base.tensors",
    "lpc_runner.runs": "lpc_runner.store.runs",
    "lpc_runner.schema": "lpc_runner.base.schema",
    "lpc_runner.training.checkpoints": "lpc_runner.store.checkpoints",
    "lpc_runner.training.optimizers": "lpc_runner.training.learner",
}


class _Moved(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        warnings.warn(f"{name} is {MOVED[name]} now", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(MOVED[name])  # what an import returns: one module, not a copy


def find_moved_modules() -> None:
    """Have imports of old names succeed; asked last, so that it costs nothing where a module is in its place."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
