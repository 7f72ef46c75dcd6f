"""The paper's claims, one by one: what this study says of each, with the numbers behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lpc_runner.report import paper
from lpc_runner.report.claim_checks import CHECKS, Check
from lpc_runner.report.evidence import Evidence
from lpc_runner.report.grouping import Group
from lpc_runner.report.study import Setting, Study
from lpc_runner.report.tables import DASH, Table

HOLDS, FAILS, UNMEASURED = "holds", "does not hold", "not measured"


@dataclass(frozen=True)
class Answer:
    """HOLDS, FAILS or UNMEASURED for one dataset; extractor: "" where no features enter."""

    claim: paper.Claim
    dataset: str
    extractor: str
    verdict: str
    numbers: str


def study_answers(study: Study) -> list[Answer]:
    """Every claim for every dataset of images, and for every extractor where one enters."""
    answers = []
    for dataset in study.datasets:
        groups = study.of(dataset)
        if not of_images(groups):
            continue
        for claim in paper.CLAIMS:
            check, featured = CHECKS[claim.id]
            for setting in main_settings(groups) or [None] if featured else [None]:
                answers.append(_answer(claim, check, Evidence(dataset, groups, setting, [])))
    return answers


def of_images(groups: Sequence[Group]) -> bool:
    """Whether these runs drew images, of which alone the paper speaks; a shape that nobody recorded may be one."""
    return any(len(run.shape) in (0, 3) for group in groups for run in group.runs)


def _answer(claim: paper.Claim, check: Check, evidence: Evidence) -> Answer:
    holds = check(evidence)
    if holds is None or evidence.missing:
        verdict, lines = UNMEASURED, [f"needs {', '.join(dict.fromkeys(evidence.missing))}", *evidence.numbers]
    else:
        verdict, lines = HOLDS if holds else FAILS, evidence.numbers
    extractor = "" if evidence.setting is None else evidence.setting.extractor
    return Answer(claim, evidence.dataset, extractor, verdict, "; ".join(lines))


def main_settings(groups: Sequence[Group]) -> list[Setting]:
    """For each extractor the way of measuring that most runs share, the paper's extractor first."""
    counts: Counter[Setting] = Counter()
    for group in groups:
        counts.update({found.setting for run in group.counted for found in run.measurements})
    best: dict[str, Setting] = {}
    for setting in sorted(counts, key=lambda each: (-counts[each], str(each))):
        best.setdefault(setting.extractor, setting)
    return [best[name] for name in sorted(best, key=lambda name: (name != paper.EXTRACTOR, name))]


def claims_table(dataset: str, answers: Sequence[Answer]) -> Table | None:
    """One row per claim and extractor, what was measured first; None without an answer."""
    own = [answer for answer in answers if answer.dataset == dataset]
    if not own:
        return None
    own.sort(key=lambda answer: answer.verdict == UNMEASURED)
    rows = [[a.claim.text, a.claim.source, a.extractor or DASH, a.verdict, a.numbers] for a in own]
    counts = Counter(answer.verdict for answer in own)
    notes = ["; ".join(f"{counts[verdict]} {verdict}" for verdict in (HOLDS, FAILS, UNMEASURED)) + "."]
    notes.append("By means over seeds; a difference within two of its standard errors may be chance.")
    if any(answer.extractor not in ("", paper.EXTRACTOR) for answer in own):
        notes.append(f"FID stands for the Fréchet distance in the features named; the paper's are {paper.EXTRACTOR}'s.")
    if dataset not in paper.DATASETS:
        notes.append(f"The paper has no {dataset}: the same questions, asked of these runs.")
    columns = ["claim", "source", "features", "answer", "numbers"]
    return Table(f"{dataset}: the paper's claims", columns, rows, notes, frozenset({"source", "numbers"}))
