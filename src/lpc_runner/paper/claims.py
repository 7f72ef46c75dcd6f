"""The paper's claims, one by one: what this study says of each, with the numbers behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lpc_runner.paper import numbers as paper
from lpc_runner.paper.claim_checks import CHECKS
from lpc_runner.paper.evidence import CHANCE, FAILS, HOLDS, UNMEASURED, Evidence, Finding
from lpc_runner.paper.tables import papers_cell
from lpc_runner.study.runs import Setting
from lpc_runner.study.study import Group, Study
from lpc_runner.study.tables import DASH, Table


@dataclass(frozen=True)
class Answer:
    """HOLDS, FAILS, CHANCE or UNMEASURED for one dataset; extractor: "" where no features enter; cell: whose it is,
    "" where it is of nobody in particular."""

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
                for found in _said(check(Evidence(dataset, groups, setting))):
                    answers.append(Answer(claim, dataset, extractor, found.cell, found.verdict, found.text))
    return answers


def _said(findings: Sequence[Finding]) -> list[Finding]:
    """The cells that have something to be compared with; where none has, the one that lacks least."""
    matched = [found for found in findings if not found.unlike]
    return matched or [min(findings, key=lambda found: found.unlike)]


def of_images(groups: Sequence[Group]) -> bool:
    """Whether these runs drew images, of which alone the paper speaks; a shape that nobody recorded may be one."""
    return any(len(run.shape) in (0, 3) for group in groups for run in group.runs)


def main_settings(groups: Sequence[Group]) -> list[Setting]:
    """For each extractor the way of measuring that most runs share, the paper's extractor first."""
    counts: Counter[Setting] = Counter()
    for group in groups:
        counts.update({found.setting for run in group.counted for found in run.measurements})
    best: dict[str, Setting] = {}
    for setting in sorted(counts, key=lambda each: (-counts[each], str(each))):
        best.setdefault(setting.extractor, setting)
    return [best[name] for name in sorted(best, key=lambda name: (name != paper.EXTRACTOR, name))]


def claims_table(dataset: str, groups: Sequence[Group], answers: Sequence[Answer]) -> Table | None:
    """One row per claim, extractor and cell, what was measured first; None without an answer."""
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
    return Table(f"{dataset}: the paper's claims", columns, rows, notes, frozenset({"source", "numbers"}))


def _as_in_paper(group: Group) -> bool:
    """Whether a chain has what Table 3 says of its dataset."""
    cell = papers_cell(group.dataset, group.method)
    if cell is None or group.method == "VAE":
        return False
    wanted = paper.COMMON | paper.LPC_COMMON | cell
    return all(paper.same(group.properties.get(key), value) for key, value in wanted.items())
