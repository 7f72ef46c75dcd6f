"""Old names of modules that have moved, for users' code: the import works and warns of the new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old name: new name. A module that users' code may import gets a row when it moves.
MOVED = {
    "lpc_runner.base.pictures": "lpc_runner.base.presentation",
    "lpc_runner.base.randomness": "lpc_runner.base.tensors",
    "lpc_runner.base.vocabulary": "lpc_runner.base.presentation",
    "lpc_runner.config.own_files": "lpc_runner.config.sources",
    "lpc_runner.config.variants": "lpc_runner.config.sources",
    "lpc_runner.data.archives": "lpc_runner.data.files",
    "lpc_runner.data.batches": "lpc_runner.data.dataset",
    "lpc_runner.data.binarise": "lpc_runner.data.dataset",
    "lpc_runner.data.chaotic_rnn": "lpc_runner.data.simulated",
    "lpc_runner.data.hdf5": "lpc_runner.data.sequence_files",
    "lpc_runner.data.image_files": "lpc_runner.data.folder",
    "lpc_runner.data.layouts": "lpc_runner.data.spikes",
    "lpc_runner.data.linear_system": "lpc_runner.data.simulated",
    "lpc_runner.data.lorenz": "lpc_runner.data.simulated",
    "lpc_runner.data.stored": "lpc_runner.data.files",
    "lpc_runner.distributions": "lpc_runner.base.distributions",
    "lpc_runner.emissions": "lpc_runner.base.distributions",
    "lpc_runner.errors": "lpc_runner.base.errors",
    "lpc_runner.evaluation.kalman": "lpc_runner.evaluation.linear_gaussian",
    "lpc_runner.evaluation.level_pictures": "lpc_runner.evaluation.samples",
    "lpc_runner.evaluation.posterior": "lpc_runner.evaluation.sequence_posterior",
    "lpc_runner.evaluation.references": "lpc_runner.evaluation.quality",
    "lpc_runner.evaluation.sealed": "lpc_runner.store.checkpoints",
    "lpc_runner.evaluation.spike_metrics": "lpc_runner.evaluation.sequence_posterior",
    "lpc_runner.inference.importance": "lpc_runner.inference.objectives",
    "lpc_runner.likelihoods": "lpc_runner.base.likelihoods",
    "lpc_runner.models.generators": "lpc_runner.models.sequence_networks",
    "lpc_runner.models.linear": "lpc_runner.models.dense",
    "lpc_runner.models.mlp": "lpc_runner.models.dense",
    "lpc_runner.models.sequence_encoders": "lpc_runner.models.sequence_networks",
    "lpc_runner.paper.claim_checks": "lpc_runner.paper.claims",
    "lpc_runner.paper.costs": "lpc_runner.paper.tables",
    "lpc_runner.paper.sweep_figures": "lpc_runner.paper.quality_figures",
    "lpc_runner.paper.table1": "lpc_runner.paper.tables",
    "lpc_runner.paper.tuning": "lpc_runner.paper.tables",
    "lpc_runner.randomness": "lpc_runner.base.tensors",
    "lpc_runner.runner.loading": "lpc_runner.runner.in_python",
    "lpc_runner.runner.planning": "lpc_runner.runner.plan",
    "lpc_runner.runs": "lpc_runner.store.runs",
    "lpc_runner.schema": "lpc_runner.base.schema",
    "lpc_runner.study.grouping": "lpc_runner.study.study",
    "lpc_runner.study.page": "lpc_runner.report",
    "lpc_runner.study.pairs": "lpc_runner.study.estimates",
    "lpc_runner.study.sequence_figures": "lpc_runner.study.estimates",
    "lpc_runner.training.captured": "lpc_runner.training.update",
    "lpc_runner.training.checkpoints": "lpc_runner.store.checkpoints",
    "lpc_runner.training.interrupts": "lpc_runner.training.trainer",
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
        sys.modules[name] = importlib.import_module(MOVED[name])  # both names give one module object, not a copy


def find_moved_modules() -> None:
    """Make imports of old names work. This finder is asked last, so that it costs other imports nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
