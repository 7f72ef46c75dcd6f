"""The paper's claims, one by one: what this study says of each, with the numbers behind it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lpc_runner.base.presentation import FRECHET
from lpc_runner.paper import numbers as paper
from lpc_runner.paper.evidence import (
    CHANCE,
    EPOCHS,
    FAILS,
    FORWARD,
    HOLDS,
    JEFFREYS,
    METHOD,
    REVERSE,
    UNMEASURED,
    Ask,
    Evidence,
    Finding,
    Sample,
    against,
    against_vaes,
    all_of,
    answer,
    differences,
    judge,
    lacking,
    of_cells,
    out_of_proportion,
    sample,
)
from lpc_runner.paper.quality_figures import line_name, sweeps_of
from lpc_runner.paper.tables import ms_per_batch
from lpc_runner.paper.training_checks import drift_phase, fast, sharp
from lpc_runner.study.estimates import standard_error
from lpc_runner.study.runs import Run, Setting
from lpc_runner.study.study import STEP, Group, Study
from lpc_runner.study.tables import DASH, Table, show


@dataclass(frozen=True)
class Answer:
    """HOLDS, FAILS, CHANCE or UNMEASURED for one dataset; extractor: "" where no features enter; cell: the label of
    its group, "" where it belongs to none."""

    claim: paper.Claim
    dataset: str
    extractor: str
    cell: str
    verdict: str
    numbers: str


def study_answers(study: Study) -> list[Answer]:
    """Every claim for every dataset of images, for every extractor where one enters, and for every cell."""
    answers = []
    for dataset in study.datasets:
        groups = study.of(dataset)
        if not of_images(groups):
            continue
        for claim in paper.CLAIMS:
            check, featured = CHECKS[claim.id]
            for setting in main_settings(groups) or [None] if featured else [None]:
                extractor = "" if setting is None else setting.extractor
                findings = check(Evidence(dataset, groups, setting))
                # The cells that have something to be compared with; where none has, the one that lacks least.
                compared = [finding for finding in findings if not finding.unlike]
                for finding in compared or [min(findings, key=lambda finding: finding.unlike)]:
                    answers.append(Answer(claim, dataset, extractor, finding.cell, finding.verdict, finding.text))
    return answers


def of_images(groups: Sequence[Group]) -> bool:
    """Whether these runs are of images, as all of the paper's are; a shape that is not recorded may be one."""
    return any(len(run.shape) in (0, 3) for group in groups for run in group.runs)


def main_settings(groups: Sequence[Group]) -> list[Setting]:
    """For each extractor the way of measuring that most runs share, the paper's extractor first."""
    counts: Counter[Setting] = Counter()
    for group in groups:
        counts.update({measurement.setting for run in group.counted for measurement in run.measurements})
    best: dict[str, Setting] = {}
    for setting in sorted(counts, key=lambda each: (-counts[each], str(each))):
        best.setdefault(setting.extractor, setting)
    return [best[name] for name in sorted(best, key=lambda name: (name != paper.EXTRACTOR, name))]


def claims_table(dataset: str, groups: Sequence[Group], answers: Sequence[Answer]) -> Table | None:
    """One row per claim, extractor and cell; what was measured first, alone on a terminal. None without an answer."""
    own = [answer for answer in answers if answer.dataset == dataset]
    if not own:
        return None
    own.sort(key=lambda answer: answer.verdict == UNMEASURED)
    papers = {group.label for group in groups if _as_in_paper(group)}
    rows = []
    for a in own:
        several = sum((o.claim, o.extractor) == (a.claim, a.extractor) for o in own) > 1
        mark = ", the paper's setting" if a.cell in papers else ""
        text = f"{a.claim.text} ({a.cell}{mark})" if a.cell and (several or mark) else a.claim.text
        rows.append([text, a.claim.source, a.extractor or DASH, a.verdict, a.numbers])
    counts = Counter(answer.verdict for answer in own)
    verdicts = (HOLDS, FAILS, CHANCE, UNMEASURED)
    notes = ["; ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts) + "."]
    notes.append(
        "Of runs that are equal in all that the claim is not about; within chance: a difference of at most two of its "
        "standard errors, or of one seed. A diverged seed counts as worse than any that finished."
    )
    if any(answer.extractor not in ("", paper.EXTRACTOR) for answer in own):
        notes.append(f"FID stands for the Fréchet distance in the features named; the paper's are {paper.EXTRACTOR}'s.")
    if dataset not in paper.DATASETS:
        notes.append(f"The paper has no {dataset}: the same questions, asked of these runs.")
    columns = ["claim", "source", "features", "answer", "numbers"]
    title, hidden = f"{dataset}: the paper's claims", frozenset({"source", "numbers"})
    return Table(title, columns, rows, notes, hidden, num_main=len(own) - counts[UNMEASURED])


def _as_in_paper(group: Group) -> bool:
    """Whether a chain has what Table 3 says of its dataset."""
    tuned = paper.tuned(group.dataset, group.method)
    if tuned is None or group.method == "VAE":
        return False
    return paper.has(group.properties, paper.COMMON | paper.LPC_COMMON | tuned)


NO_WARM_START = "LPC prior"
TOLERANCE = 0.25  # share of the paper's ratio within which ours repeats it
SMALL_STEP = 0.001
NUM_STEPS = 300  # of the chains whose cost Table 4 states

# Table 1 and Figure 2 -------------------------------------------------------------------------------------


def _table1(e: Evidence, left_out: str, covered: str, ask: Ask) -> list[Finding]:
    if e.dataset == left_out:
        return [lacking(f"{covered}: the claim is not about {paper.DATASETS[left_out]}")]
    return against_vaes(e, ask, lambda lpc, vae: out_of_proportion(e.dataset, lpc, vae))


def _table1_fid(e: Evidence) -> list[Finding]:
    return _table1(e, "celeba64", "SVHN or CIFAR10", e.frechet)


def _table1_density_coverage(e: Evidence) -> list[Finding]:
    def higher(lpc: Group, vae: Group) -> Finding:
        names = ("density", "coverage")
        return all_of([answer(e.quality(lpc, name), e.quality(vae, name), name, higher=True) for name in names])

    return _table1(e, "svhn", "CelebA or CIFAR10", higher)


def _warm_start(e: Evidence) -> list[Finding]:
    """Jeffreys and reverse KL against no warm start, all three equal but for the objective."""
    own = ("objective",)

    def lower(group: Group) -> Finding:
        return against(group, e.of(NO_WARM_START), NO_WARM_START, own, e.frechet)

    def both(jeffreys: Group) -> Finding:
        reverse = against(jeffreys, e.of(REVERSE), REVERSE, own, lambda _, group: lower(group))
        return all_of([reverse, lower(jeffreys)])

    return of_cells(e.of(JEFFREYS), JEFFREYS, both)


def _jeffreys(e: Evidence) -> list[Finding]:
    """Against reverse KL, and against forward KL after as many epochs and after one, where there is either."""
    own = ("objective",)
    once = [group for group in e.of(FORWARD) if group.properties.get("num_epochs") == 1]
    longer = [group for group in e.of(FORWARD) if group.properties.get("num_epochs") != 1]

    def lowest(jeffreys: Group) -> Finding:
        reverse = against(jeffreys, e.of(REVERSE), REVERSE, own, e.frechet)
        after_one = against(jeffreys, once, f"{FORWARD} after one epoch", (*own, EPOCHS), e.frechet)
        after_all = against(jeffreys, longer, FORWARD, own, e.frechet)
        forward = [part for part in (after_one, after_all) if not part.unlike] or [after_one]
        return all_of([reverse, *forward])

    return of_cells(e.of(JEFFREYS), JEFFREYS, lowest)


def _forward(e: Evidence) -> list[Finding]:
    """Every seed of a forward run that was to train longer than one epoch diverged after its first."""

    def late(group: Group) -> Finding:
        verdicts = [_divergence(run) for run in group.runs]
        text = "; ".join(f"{run.name}: {words}" for run, (_, words) in zip(group.runs, verdicts))
        overall = all_of([Finding(verdict, "") for verdict, _ in verdicts]).verdict
        chance = len(group.runs) < 2 and overall != UNMEASURED
        return Finding(CHANCE if chance else overall, f"{text} (one seed)" if chance else text)

    longer = [g for g in e.of(FORWARD) if (g.properties.get("num_epochs") or math.inf) > 1]
    return of_cells(longer, f"{FORWARD} for more than one epoch", late)


def _divergence(run: Run) -> tuple[str, str]:
    """Whether a run diverged after its first epoch, and what is known of it."""
    if run.status == "finished":
        reached = run.cost("num_epochs")
        cut = reached is not None and reached <= 1  # by max_updates: it says nothing of what comes after
        return (UNMEASURED, f"ended after {reached:.3g} epochs") if cut else (FAILS, "finished")
    if run.status != "diverged":
        return UNMEASURED, run.status
    epoch, update = run.diverged_at.get("epoch"), run.diverged_at.get("update")
    if not isinstance(epoch, int | float):
        return UNMEASURED, "diverged, not recorded where"
    at = f", update {update:,}" if isinstance(update, int | float) else ""
    return HOLDS if epoch >= 1 else FAILS, f"diverged at epoch {epoch:.3g}{at}"


# Figure 4 -------------------------------------------------------------------------------------------------


def _unfair(cells: Mapping[str, Group]) -> list[str]:
    """What sets the cells of a sweep apart from its first beyond step size and preconditioning; names: of the cells."""
    (first, group), *others = cells.items()
    compared = [(name, differences(group, other, STEP)) for name, other in others]
    return [f"{first} and {name} cannot be compared: {'; '.join(apart)}" for name, apart in compared if apart]


def _robust(e: Evidence) -> list[Finding]:
    """At the largest step size, the Fréchet distance over the lowest of the same β falls from the smallest β to the
    largest, and rises between no neighbours; step sizes at which every seed of every β was lost are passed over."""
    findings = []
    for sweep in sweeps_of(e.groups):
        for name in dict.fromkeys(line[0] for line in sweep if line[0] != "none"):
            betas = {line[1]: own for line, own in sweep.items() if line[0] == name and line[1] is not None}
            if len(betas) > 1:
                findings.append(replace(_harm(e, dict(sorted(betas.items()))), cell=name))
    return findings or [lacking("a sweep over step sizes with two values of β or more")]


def _harm(e: Evidence, betas: Mapping[float, Mapping[float, Group]]) -> Finding:
    sizes = sorted({size for cells in betas.values() for size in cells})
    absent = [f"β = {beta:g} at γ = {size:g}" for beta, own in betas.items() for size in sizes if size not in own]
    unfair = _unfair({f"β = {b:g}, γ = {s:g}": group for b, own in betas.items() for s, group in own.items()})
    samples = {beta: {s: e.quality(group, *FRECHET) for s, group in own.items()} for beta, own in betas.items()}
    missing = [text for own in samples.values() for each in own.values() for text in each.missing]
    if len(sizes) < 2 or absent or unfair or missing:
        wanted = [*absent, *missing] or ["two step sizes"] * (len(sizes) < 2)
        return Finding(UNMEASURED, "; ".join(unfair)) if unfair else lacking("; ".join(wanted), 0)
    size = max((s for s in sizes if any(own[s].values for own in samples.values())), default=None)
    if size is None:
        return lacking("a step size at which a seed finished", 0)
    harms = [_relative(f"β = {beta:g}", own, size) for beta, own in samples.items()]
    if all(set(harm.by_seed.values()) == {1.0} and not harm.num_lost for harm in harms):
        return lacking(f"a step size that harms: γ = {size:g} has the lowest of every β", 0)
    what = f"Fréchet distance at γ = {size:g} in multiples of the lowest of the same β"
    ends = answer(harms[-1], harms[0], what)
    middle = [f"; {harm.text()}" for harm in harms[1:-1]]
    rises = any(answer(late, early, what).verdict == FAILS for early, late in itertools.pairwise(harms))
    return Finding(FAILS if rises else ends.verdict, ends.text + "".join(middle))


def _relative(name: str, cells: Mapping[float, Sample], size: float) -> Sample:
    """Seed by seed, the value at `size` over that at the step size of the lowest mean, of those without lost seeds."""
    whole = [each for each in cells.values() if each.values and not each.num_lost]
    best = min(whole, key=lambda each: statistics.fmean(each.values), default=None)
    if best is None:
        return Sample(name, {}, {"diverged at every step size": cells[size].num_seeds})
    return replace(cells[size], name=name, by_seed={s: v / best.by_seed[s] for s, v in cells[size].by_seed.items()})


def _small_step(e: Evidence) -> list[Finding]:
    """Without preconditioning as low as with any: lower than each, seeds of the same number."""
    findings = []
    for sweep in sweeps_of(e.groups):
        small = {line: g for line, own in sweep.items() for size, g in own.items() if math.isclose(size, SMALL_STEP)}
        plain = ("none", None)
        if plain not in sweep or len(sweep) < 2 or not small:
            continue
        names = {line: line_name(line, sweep) for line in sweep}
        absent = [f"{name} at γ = {SMALL_STEP:g}" for line, name in names.items() if line not in small]
        unfair = _unfair({names[line]: group for line, group in small.items()})
        if absent:
            findings.append(lacking("; ".join(absent), 0))
        elif unfair:
            findings.append(Finding(UNMEASURED, "; ".join(unfair)))
        else:
            findings.append(all_of([e.frechet(small[plain], group) for line, group in small.items() if line != plain]))
    return findings or [lacking(f"step size {SMALL_STEP:g} without preconditioning and with it, in a sweep")]


# Table 4 --------------------------------------------------------------------------------------------------


def _cost(e: Evidence, end_to_end: bool) -> list[Finding]:
    """Both ratios within TOLERANCE of the paper's, for chains of NUM_STEPS steps on the device of the VAE."""

    def value(run: Run) -> float | str:
        cost = run.cost("train_seconds") if end_to_end else ms_per_batch(run)
        return "its time is not recorded" if cost is None else cost

    def repeats(lpc: Group, vae: Group) -> Finding:
        printed = paper.TABLE_4[lpc.method]
        return ratio(sample(lpc, value), sample(vae, value), printed.end_to_end if end_to_end else printed.per_batch)

    def other(lpc: Group, vae: Group) -> list[str]:
        steps = lpc.properties.get("num_steps")
        wrong = [f"T = {steps} of {lpc.label}, the paper's {NUM_STEPS}"] if steps != NUM_STEPS else []
        return wrong + (out_of_proportion(e.dataset, lpc, vae) if end_to_end else [])

    def cell(lpc: Group) -> Finding:
        return against(lpc, e.of("VAE"), "a VAE", (*METHOD, EPOCHS), repeats, other, times=True)

    def both(jeffreys: Group) -> Finding:
        reverse = against(jeffreys, e.of(REVERSE), REVERSE, ("objective",), lambda _, group: cell(group), times=True)
        return all_of([cell(jeffreys), reverse])

    return of_cells(e.of(JEFFREYS), JEFFREYS, both)


def ratio(ours: Sample, theirs: Sample, printed: float) -> Finding:
    """Whether a ratio of means is within TOLERANCE of the printed one; a diverged seed has no time of a training."""
    missing = [*ours.missing, *theirs.missing]
    missing += [f"every seed of {each.text()} to finish" for each in (ours, theirs) if each.num_lost]
    if missing:
        return lacking("; ".join(missing), 0)
    means = [statistics.fmean(each.values) for each in (ours, theirs)]
    measured = means[0] / means[1]
    errors = [standard_error(each.values) for each in (ours, theirs)]
    relative = [error / mean for error, mean in zip(errors, means) if error is not None]
    error = measured * math.hypot(*relative) / printed if len(relative) == 2 else None
    words = "one seed" if error is None else f"standard error {show(error * printed)}"
    text = f"{ours.name} × {show(measured)} of {theirs.name} ({words}), the paper × {printed:g}"
    return Finding(
        judge(TOLERANCE - abs(measured / printed - 1), error), f"{text}; repeated when within {TOLERANCE:.0%}"
    )


# By the claim's id; whether features enter.
CHECKS: dict[str, tuple[Callable[[Evidence], list[Finding]], bool]] = {
    "table1-fid": (_table1_fid, True),
    "table1-density-coverage": (_table1_density_coverage, True),
    "fig2-warm-start": (_warm_start, True),
    "fig2-jeffreys": (_jeffreys, True),
    "fig2-forward": (_forward, False),
    "fig3-forward": (drift_phase, False),
    "fig4-robust": (_robust, True),
    "fig4-small-step": (_small_step, True),
    "fig5-sharp": (sharp, False),
    "fig5-fast": (fast, True),
    "table4-batch": (lambda e: _cost(e, end_to_end=False), False),
    "table4-end": (lambda e: _cost(e, end_to_end=True), False),
}
