"""What a study's runs hold, as far as panels need it: which settings vary, which metrics and pictures there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpc_runner.base.errors import UserError
from lpc_runner.store.runs import DONE
from lpc_runner.tracking.publish import rows_of, runs_of, settings_of

# How a label writes a setting.
SYMBOLS = {"step_size": "γ", "beta": "β", "num_steps": "T", "learning_rate": "α"}
# Spread over orders of magnitude in a sweep.
LOGARITHMIC = ("step_size", "learning_rate", "scale")
# Where several settings vary, curves are grouped by the first of these; a seed makes repetitions, never groups.
_GROUP_ORDER = ("beta", "objective", "preconditioning", "sampler", "num_steps", "step_size", "learning_rate")


@dataclass(frozen=True)
class StudyFacts:
    """One study; `settings`: the values of each flat key; `logged`, `final`: keys of W&B's history, summary."""

    name: str
    num_runs: int
    num_done: int
    settings: dict[str, list[Any]]
    logged: list[str]
    final: list[str]
    pictures: list[str]
    trackers: list[dict[str, Any]]

    @property
    def varying(self) -> list[str]:
        """Settings with more than one value, the seed left out; of a run without such a setting the value is None."""
        return [key for key, values in self.settings.items() if len(values) > 1 and key != "seed"]

    @property
    def group_key(self) -> str | None:
        """The setting that curves are grouped by; None: only seeds differ, or there is a single run."""
        rest = [key for key in self.varying if key not in _GROUP_ORDER]
        return next((key for key in (*_GROUP_ORDER, *rest) if key in self.varying), None)

    @property
    def distances(self) -> list[str]:
        """Final Fréchet distances, `final/fid` of Inception first."""
        found = [key for key in self.final if key == "final/fid" or key.startswith("final/fd_")]
        return sorted(found, key=lambda key: key != "final/fid")


def study_facts(study: Path) -> StudyFacts:
    """Read outputs/<study>. Raises UserError (one line) for a folder without runs or with damaged files."""
    runs = runs_of(study)
    settings: dict[str, list[Any]] = {}
    logged: dict[str, None] = {}
    final: dict[str, None] = {}
    pictures: dict[str, None] = {}
    descriptions = [run.description()["keys"] for run in runs]
    for key in dict.fromkeys(key for keys in descriptions for key in keys):
        values = {repr(keys.get(key)): keys.get(key) for keys in descriptions}
        settings[key] = sorted(values.values(), key=lambda value: (value is None, isinstance(value, str), value))
    num_done = 0
    for run in runs:
        result = run.result()
        for row in rows_of(run).values():
            logged |= dict.fromkeys(row.values)
            pictures |= dict.fromkeys(row.pictures)
        if result is not None and result["status"] in DONE:
            num_done += 1
            final |= dict.fromkeys(f"final/{name}" for name in result["metrics"])
    trackers = [settings_of(run)["tracker"] for run in runs]
    if not logged and not final:
        raise UserError(f"{study}: its runs have recorded nothing yet")
    name = Path(study).resolve().name
    return StudyFacts(name, len(runs), num_done, settings, sorted(logged), sorted(final), list(pictures), trackers)
