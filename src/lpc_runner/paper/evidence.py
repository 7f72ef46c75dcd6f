"""What an answer rests on: measured cells, whether two of them can be compared, and what their difference says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lpc_runner.base.presentation import FRECHET, SYMBOLS, base_name
from lpc_runner.paper import numbers as paper
from lpc_runner.study.runs import Run, Setting
from lpc_runner.study.study import Group, compared_config, show_value
from lpc_runner.study.tables import describe_setting, mean_and_spread, mean_of, show

HOLDS, FAILS, CHANCE, UNMEASURED = "holds", "does not hold", "within chance", "not measured"
JEFFREYS, REVERSE, FORWARD = "LPC jeffreys", "LPC reverse", "LPC forward"
ENDED = ("finished", "diverged")
LPC_EPOCHS, VAE_EPOCHS = 15, 50
# A method's own settings, and those that the paper tunes for each method by itself.
METHOD = ("sampler", "objective", "preconditioning", "step_size", "beta", "learning_rate")
EPOCHS = "num_epochs"
# Sections of config.yaml that say how a run is measured: a Setting compares that.
_MEASURING = ("metrics", "traces", "extractor")


@dataclass(frozen=True)
class Finding:
    """An answer (HOLDS, FAILS, CHANCE, UNMEASURED) with the numbers behind it; cell: the label of its group.

    unlike: how much sets the cell apart from all that it could be compared with, 0 where there is something to compare.
    """

    verdict: str
    text: str
    cell: str = ""
    unlike: int = 0


NOTHING = 1000  # unlike, where there is nothing to compare with


def lacking(what: str, unlike: int = NOTHING) -> Finding:
    """UNMEASURED for want of something."""
    return Finding(UNMEASURED, f"needs {what}", unlike=unlike)


def all_of(findings: Sequence[Finding]) -> Finding:
    """Holds where every part holds; one part that does not hold decides, then one not measured, then one of chance."""
    verdicts = {finding.verdict for finding in findings}
    verdict = next((v for v in (FAILS, UNMEASURED, CHANCE) if v in verdicts), HOLDS if findings else UNMEASURED)
    texts = dict.fromkeys(finding.text for finding in findings)
    unlike = max((finding.unlike for finding in findings), default=NOTHING)
    return Finding(verdict, "; ".join(texts), unlike=unlike)


# Whether cells can be compared ----------------------------------------------------------------------------


def differences(first: Group, second: Group, own: Collection[str], times: bool = False) -> list[str]:
    """What differs between two groups beyond a claim's `own` variables, in words; empty: they can be compared.

    own: names of settings, each with the section of config.yaml of that name. A setting that only one of them has (a
    VAE has no step size) belongs to its method. Seeds must be the same, and the epochs and updates trained, unless
    EPOCHS is the claim's own; times: and so must the device, which must be recorded.
    """
    ours, theirs = first.properties, second.properties
    differing = [
        f"{SYMBOLS.get(key, key)} {show_value(ours[key])} against {show_value(theirs[key])}"
        for key in ours
        if key in theirs and not paper.same(ours[key], theirs[key]) and not _is_own(key, own)
    ]
    differing += _differing_configs(first, second, own)
    if EPOCHS not in own:
        for name, tolerance in (("num_epochs", 0.5), ("num_updates", 0.0)):
            # A diverged run's end is its result, not its plan.
            known = [[c for run in g.finished if (c := run.cost(name)) is not None] for g in (first, second)]
            spans = [(min(costs), max(costs)) for costs in known if costs]
            if len(spans) == 2 and any(abs(a - b) > tolerance for a, b in zip(*spans)):
                words = [" to ".join(dict.fromkeys(show(v, 0 if v == int(v) else None) for v in s)) for s in spans]
                differing.append(f"{name.removeprefix('num_')} trained {words[0]} against {words[1]}")
    seeds = [", ".join(sorted(str(run.seed) for run in group.runs)) for group in (first, second)]
    differing += [f"seeds {seeds[0]} against {seeds[1]}"] * (seeds[0] != seeds[1])
    if times:
        devices = [devices_of(group) for group in (first, second)]
        if len(devices[0] | devices[1]) != 1 or UNKNOWN in devices[0]:
            differing.append(f"device {' against '.join(', '.join(sorted(each)) for each in devices)}")
    return differing


def _is_own(key: str, own: Collection[str]) -> bool:
    """Whether a setting, or the path of one in config.yaml, is among a claim's own variables or one of measuring."""
    section = key.split(".", maxsplit=1)[0]
    return section in _MEASURING or section in own or (key == "trainer.max_updates" and EPOCHS in own)


def _differing_configs(first: Group, second: Group, own: Collection[str]) -> list[str]:
    """Settings of config.yaml that both have and that no property of the groups says already."""
    ours, theirs = (compared_config(group.runs[0]) for group in (first, second))
    said = {key.rpartition(".")[2] for group in (first, second) for key in group.properties} | {"value"}
    return [
        f"{path} {show_value(ours[path])} against {show_value(theirs[path])}"
        for path in sorted(set(ours) & set(theirs))
        if repr(ours[path]) != repr(theirs[path]) and not _is_own(path, own) and path.rpartition(".")[2] not in said
    ]


UNKNOWN = "not recorded"


def devices_of(group: Group) -> set[str]:
    """Names of the processors behind the times of a group's finished runs."""
    return {device for run in group.finished for device in run.devices or (UNKNOWN,)}


def out_of_proportion(dataset: str, lpc: Group, vae: Group) -> list[str]:
    """In words, where these did not train 15 and 50 epochs; on datasets that the paper has not: in that proportion."""
    ours, theirs = epochs_of(lpc), epochs_of(vae)
    if dataset in paper.DATASETS:
        wanted = ((lpc, ours, LPC_EPOCHS), (vae, theirs, VAE_EPOCHS))
        return [f"{g.label} trained {show(n, 1)} epochs, not {w}" for g, n, w in wanted if not as_planned(n, w)]
    if as_planned(ours, theirs * LPC_EPOCHS / VAE_EPOCHS):
        return []
    return [f"epochs {show(ours, 1)} against {show(theirs, 1)}, the paper's are {LPC_EPOCHS} against {VAE_EPOCHS}"]


# What was measured ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One quantity of a group by seed; a diverged seed, or one whose number is not finite, has none and is `lost`.

    lost: number of seeds by what became of them; missing: what the answer still needs, empty where nothing is missing.
    """

    name: str
    by_seed: Mapping[Any, float]
    lost: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def values(self) -> list[float]:
        return list(self.by_seed.values())

    @property
    def num_lost(self) -> int:
        return sum(self.lost.values())

    @property
    def num_seeds(self) -> int:
        return len(self.by_seed) + self.num_lost

    def text(self) -> str:
        """mean ± standard deviation (number of seeds; 2 of 3 diverged)."""
        lost = [f"{number} of {self.num_seeds} {word}" for word, number in self.lost.items() if number]
        count = "; ".join(([f"n = {len(self.by_seed)}"] if self.by_seed else []) + lost)
        return f"{self.name} {mean_and_spread(self.values, alone='')} ({count})".replace("  ", " ")


def sample(group: Group, value: Callable[[Run], float | str], ended: Collection[str] = ("finished",)) -> Sample:
    """The value of every seed; a text instead of a number says what a run lacks."""
    by_seed: dict[Any, float] = {}
    lost = {"diverged": 0, "not finite": 0}
    missing: dict[str, list[str]] = {}
    for run in group.runs:
        if run.status not in ENDED:
            missing.setdefault(run.status, []).append(str(run.seed))
        elif run.status not in ended:
            lost["diverged"] += 1
        elif isinstance(measured := value(run), str):
            missing.setdefault(measured, []).append(str(run.seed))
        elif math.isfinite(measured):
            by_seed[run.seed] = measured
        else:
            lost["not finite"] += 1
    words = tuple(f"seed {', '.join(seeds)} of {group.label}: {reason}" for reason, seeds in missing.items())
    return Sample(named(group), by_seed, lost, words)


def standard_error(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Of the difference of two means: sqrt(s²/n + s'²/n'); None with a single seed on either side."""
    if min(len(ours), len(theirs)) < 2:
        return None
    return math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))


def judge(margin: float, error: float | None) -> str:
    """HOLDS for a positive margin, FAILS for a negative one; CHANCE within two standard errors, or without any."""
    if error is None or abs(margin) <= 2 * error * (1 + 1e-9):
        return CHANCE
    return HOLDS if margin > 0 else FAILS


def answer(first: Sample, second: Sample, what: str, higher: bool = False) -> Finding:
    """Whether the first is lower than the second; higher: whether it is higher.

    A lost seed is worse than any number: where there is one, shares of lost seeds are compared, by the same rule.
    """
    missing = [*first.missing, *second.missing]
    if missing:
        return lacking("; ".join(missing), 0)
    if not first.values and not second.values:
        return lacking(f"a finite {what} of {first.text()} or {second.text()}", 0)
    text = f"{what}: {first.text()}, {second.text()}"
    if first.num_lost or second.num_lost:
        shares = [[1.0] * each.num_lost + [0.0] * len(each.by_seed) for each in (first, second)]
        margin = statistics.fmean(shares[1]) - statistics.fmean(shares[0])
        return Finding(judge(margin, standard_error(*shares)), text)
    difference = statistics.fmean(first.values) - statistics.fmean(second.values)
    error = standard_error(first.values, second.values)
    verdict = judge(difference if higher else -difference, error)
    words = "one seed" if error is None else f"standard error {show(error)}"
    return Finding(verdict, f"{text}, difference {show(difference)} ({words})")


# The groups of a dataset ----------------------------------------------------------------------------------

Ask = Callable[[Group, Group], Finding]


@dataclass(frozen=True)
class Evidence:
    """The groups of one dataset in one way of measuring (None: sample quality was not measured)."""

    dataset: str
    groups: Sequence[Group]
    setting: Setting | None

    def of(self, method: str) -> list[Group]:
        """Every group of a method, whatever became of its runs."""
        return [group for group in self.groups if group.method == method]

    def quality(self, group: Group, *names: str) -> Sample:
        """A metric, by its name without the extractor's, of every seed."""

        def value(run: Run) -> float | str:
            values = [v for name, v in run.values(self.setting).items() if base_name(name) in names]
            others = [describe_setting(each.setting) for each in run.measurements if each.setting != self.setting]
            if values or self.setting is None or not others:
                return values[0] if values else f"{names[-1]} not measured"
            words = " and with ".join(dict.fromkeys(others))
            return f"measured with {words}, not with {describe_setting(self.setting)}"

        return sample(group, value)

    def frechet(self, first: Group, second: Group) -> Finding:
        """Whether the first's Fréchet distance is lower."""
        return answer(self.quality(first, *FRECHET), self.quality(second, *FRECHET), "Fréchet distance")


def against(
    first: Group,
    others: Sequence[Group],
    what: str,
    own: Collection[str],
    ask: Ask,
    more: Callable[[Group, Group], list[str]] = lambda first, other: [],
    times: bool = False,
) -> Finding:
    """`ask` of `first` against each of the others that it can be compared with, all of which must hold.

    UNMEASURED where there is none: without any, what is needed; else what sets the nearest apart. more: what else must
    be as the claim says, in words where it is not.
    """
    apart = [(group, differences(first, group, own, times) + more(first, group)) for group in others]
    comparable = [group for group, words in apart if not words]
    if comparable:
        return all_of([ask(first, group) for group in comparable])
    if not apart:
        return lacking(what)
    nearest, words = min(apart, key=lambda pair: len(pair[1]))
    text = f"{named(first)} and {named(nearest)} cannot be compared: {'; '.join(words)}"
    return Finding(UNMEASURED, text, unlike=len(words))


def of_cells(cells: Sequence[Group], what: str, ask: Callable[[Group], Finding]) -> list[Finding]:
    """The answer of every cell; UNMEASURED once where there is no cell."""
    return [replace(ask(cell), cell=cell.label) for cell in cells] or [lacking(what)]


def against_vaes(e: Evidence, ask: Ask, more: Callable[[Group, Group], list[str]]) -> list[Finding]:
    """The answer of every cell of Jeffreys' LPC against VAEs, each with its own settings and epochs."""
    own = (*METHOD, EPOCHS)
    return of_cells(e.of(JEFFREYS), JEFFREYS, lambda lpc: against(lpc, e.of("VAE"), "a VAE", own, ask, more))


def epochs_of(group: Group) -> float:
    """Mean of the epochs that the finished runs of a group trained; what they were set to where none is recorded."""
    reached = mean_of(run.cost("num_epochs") for run in group.finished)
    return float(group.properties.get("num_epochs") or 0) if reached is None else reached


def as_planned(epochs: float, planned: float) -> bool:
    """Whether these epochs, to half a one, are those that a run was set to: max_updates or a divergence may cut it."""
    return math.isclose(epochs, planned, abs_tol=0.5)


def named(group: Group) -> str:
    """A group's label with the epochs that it trained, where it does not say them or they are others."""
    mean, planned = mean_of(run.cost("num_epochs") for run in group.counted), group.properties.get("num_epochs")
    if mean is None or ("epoch" in group.label and planned is not None and as_planned(mean, planned)):
        return group.label
    return f"{group.label} (trained {show(mean, 0 if mean == int(mean) else None)} epochs)"
