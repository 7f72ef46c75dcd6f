"""A study: the runs of a folder, and groups of those that are repetitions of one another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lpc_runner.base.errors import UserError
from lpc_runner.store.runs import follow
from lpc_runner.study.grouping import Group, group_runs
from lpc_runner.study.runs import Run, read_runs


@dataclass
class Study:
    """Everything a report shows; warnings are one line each and name their file."""

    name: str
    path: Path
    runs: list[Run]
    groups: list[Group]
    warnings: list[str]

    @property
    def datasets(self) -> list[str]:
        return sorted({group.dataset for group in self.groups})

    def of(self, dataset: str) -> list[Group]:
        """The groups of one dataset: only these are compared with one another."""
        return [group for group in self.groups if group.dataset == dataset]


def read_study(folder: Path) -> Study:
    """Read outputs/<study>, or one run; UserError when there is no such folder or no run in it."""
    folder = follow(Path(folder))
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder{_studies_in(folder.parent)}")
    warnings: list[str] = []
    runs = list(read_runs(folder, warnings))
    if not runs:
        cause = f" ({warnings[0]})" if warnings else ""
        where = _studies_in(folder) if (folder / "runs").is_dir() else ""
        raise UserError(f"{folder} holds no runs: folders with a run.json, or links to such{where or cause}")
    groups = group_runs(runs, warnings)
    return Study(folder.resolve().name, folder, runs, groups, warnings)


def _studies_in(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("[!.]*/") if path.name != "runs")
    return f"; studies there: {', '.join(found)}" if found else ""
