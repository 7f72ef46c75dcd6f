"""What a study holds for answering a claim: groups by what they are, their values, and what is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lpc_runner.report import paper
from lpc_runner.report.grouping import Group
from lpc_runner.report.study import Run, Setting
from lpc_runner.report.tables import base_name, decimals_of, show
from lpc_runner.report.tuning import papers_cell

LPC_EPOCHS, VAE_EPOCHS = 15, 50


@dataclass
class Evidence:
    """The groups of one dataset in one way of measuring; what a claim found is added to numbers and missing."""

    dataset: str
    groups: Sequence[Group]
    setting: Setting | None
    warnings: list[str]
    numbers: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def strict(self) -> bool:
        """The paper's datasets: a claim about 15 and 50 epochs needs these; elsewhere it is asked of what there is."""
        return self.dataset in paper.DATASETS

    def find(
        self,
        method: str,
        keep: Callable[[Group], bool] = lambda group: True,
        what: str = "",
        like: Group | None = None,
        measured: bool = True,
    ) -> Group | None:
        """The group of this method whose finished runs answer the claim; None, and `missing` says so, without one.

        Of several: the paper's choice (Table 3), then the settings of `like`, then preconditioned, then most seeds.
        """
        candidates = [group for group in self.groups if group.method == method and keep(group) and finished(group)]
        if measured:
            candidates = [group for group in candidates if self.values(group, *FRECHET)]
        if not candidates:
            features = f" measured with {self.setting.extractor} features" if self.setting else " with sample quality"
            features = features if measured else ""
            self.missing.append(f"a finished {method}{what}{features}")
            return None
        return max(candidates, key=lambda group: self._fit(group, like))

    def _fit(self, group: Group, like: Group | None) -> tuple[int, int, int, int]:
        cell = papers_cell(self.dataset, group.method) or {}
        papers = sum(paper.same(group.properties.get(key), value) for key, value in cell.items())
        alike = 0 if like is None else sum(group.properties.get(k) == v for k, v in like.properties.items())
        conditioned = group.properties.get("preconditioning", "none") != "none"
        return papers, alike, conditioned, len(finished(group))

    def longest_vae(self, measured: bool = True) -> Group | None:
        """The VAE after 50 epochs; on a dataset that is not the paper's, the one that trained longest."""
        vaes = [group for group in self.groups if group.method == "VAE" and finished(group)]
        most = max((epochs_of(group) for group in vaes), default=0)
        wanted = VAE_EPOCHS if self.strict else most
        what = f" after {VAE_EPOCHS} epochs" if self.strict else ""
        return self.find("VAE", lambda group: math.isclose(epochs_of(group), wanted, abs_tol=0.5), what, None, measured)

    def longest_trained_vae(self, measured: bool = False) -> Group | None:
        """The VAE that trained longest, whatever its epochs."""
        most = max((epochs_of(group) for group in self.groups if group.method == "VAE" and finished(group)), default=0)
        return self.find("VAE", lambda group: epochs_of(group) == most, measured=measured)

    def trained_lpc(self, method: str, like: Group | None = None, measured: bool = True) -> Group | None:
        """LPC after 15 epochs; on a dataset that is not the paper's, after its own number."""

        def keep(group: Group) -> bool:
            return not self.strict or math.isclose(epochs_of(group), LPC_EPOCHS, abs_tol=0.5)

        what = f" after {LPC_EPOCHS} epochs" if self.strict else ""
        return self.find(method, keep, what, like, measured)

    def values(self, group: Group, *names: str) -> list[float]:
        """A metric, by its name without the extractor's, of every finished seed; the last finite states if none."""
        found = [] if self.setting is None else [run.measured(self.setting) for run in group.counted]
        values = [v for m in found if m for name, v in m.values.items() if base_name(name) in names]
        return [value for value in values if math.isfinite(value)]

    def below(self, first: Group, second: Group, *names: str) -> bool | None:
        """Whether the first's mean is below the second's; None, and `missing` says so, where one has no value."""
        ours, theirs = self.values(first, *names), self.values(second, *names)
        for group, own in ((first, ours), (second, theirs)):
            if not own:
                self.missing.append(f"{names[-1]} of {group.label}")
        if not ours or not theirs:
            return None
        what = names[-1] if names != FRECHET else "Fréchet distance"
        self.numbers.append(f"{what}: {comparison(named(first), ours, named(second), theirs)}")
        return statistics.fmean(ours) < statistics.fmean(theirs)


FRECHET = ("fid", "fd")


def finished(group: Group) -> list[Run]:
    """Runs that reached their end."""
    return [run for run in group.runs if run.status == "finished"]


def epochs_of(group: Group) -> float:
    """Epochs that the finished runs of a group trained; what they were set to where that is not recorded."""
    reached = [run.cost("num_epochs") for run in finished(group)]
    reached = [value for value in reached if value is not None]
    return statistics.fmean(reached) if reached else float(group.properties.get("num_epochs") or 0)


def as_planned(epochs: float, planned: float) -> bool:
    """Whether these epochs, to half a one, are those that a run was set to: max_updates or a divergence may cut it."""
    return math.isclose(epochs, planned, abs_tol=0.5)


def named(group: Group) -> str:
    """A group's label with the epochs that it trained, where it does not say them or they are others."""
    reached = [value for run in group.counted if (value := run.cost("num_epochs")) is not None]
    if not reached:
        return group.marked_label
    mean, planned = statistics.fmean(reached), group.properties.get("num_epochs")
    if "epoch" in group.label and planned is not None and as_planned(mean, planned):
        return group.marked_label
    return f"{group.marked_label} (trained {show(mean, 0 if mean == int(mean) else None)} epochs)"


def summary(values: Sequence[float]) -> str:
    """mean ± standard deviation (number of seeds)."""
    mean = statistics.fmean(values)
    std = f" ± {show(statistics.stdev(values), decimals_of(mean))}" if len(values) > 1 else ""
    return f"{show(mean)}{std} (n = {len(values)})"


def comparison(first: str, ours: Sequence[float], second: str, theirs: Sequence[float]) -> str:
    """Both summaries and the difference of means; with its standard error where both have two seeds or more."""
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    text = f"{first} {summary(ours)}, {second} {summary(theirs)}, difference {show(difference)}"
    error = standard_error(ours, theirs)
    if error is None:
        return text
    chance = ": may be chance" if abs(difference) < 2 * error else ""
    return f"{text} (standard error {show(error)}{chance})"


def standard_error(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Of the difference of two means: sqrt(s²/n + s'²/n'); None with a single seed on either side."""
    if min(len(ours), len(theirs)) < 2:
        return None
    return math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
