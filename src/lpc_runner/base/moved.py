"""Old names of modules that have moved, for users' code: the import works and warns of the new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# New name: old ones. A module that users' code may import gets a row, or a place in one, when it moves.
_NAMES = {
    "base.distributions": "distributions emissions",
    "base.errors": "errors",
    "base.likelihoods": "likelihoods",
    "base.presentation": "base.pictures base.vocabulary",
    "base.schema": "schema",
    "base.tensors": "base.randomness randomness",
    "config.sources": "config.own_files config.variants",
    "data.dataset": "data.batches data.binarise",
    "data.files": "data.archives data.stored",
    "data.folder": "data.image_files",
    "data.sequence_files": "data.hdf5",
    "data.simulated": "data.chaotic_rnn data.linear_system data.lorenz",
    "data.spikes": "data.layouts",
    "evaluation.linear_gaussian": "evaluation.kalman",
    "evaluation.quality": "evaluation.references",
    "evaluation.samples": "evaluation.level_pictures",
    "evaluation.sequence_posterior": "evaluation.posterior evaluation.spike_metrics",
    "inference.objectives": "inference.importance",
    "models.dense": "models.linear models.mlp",
    "models.sequence_networks": "models.generators models.sequence_encoders",
    "paper.claims": "paper.claim_checks",
    "paper.quality_figures": "paper.sweep_figures",
    "paper.tables": "paper.costs paper.table1 paper.tuning",
    "report": "study.page",
    "runner.in_python": "runner.loading",
    "runner.plan": "runner.planning",
    "store.checkpoints": "evaluation.sealed training.checkpoints",
    "store.runs": "runs",
    "study.estimates": "study.pairs study.sequence_figures",
    "study.study": "study.grouping",
    "training.learner": "training.optimizers",
    "training.trainer": "training.interrupts",
    "training.update": "training.captured",
}
MOVED = {f"lpc_runner.{old}": f"lpc_runner.{new}" for new, names in _NAMES.items() for old in names.split()}


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
