"""lpc-runner report outputs/<study>: tables, curves and samples, the paper's numbers beside ours.

Writes report.md, report.html (the same on one page that needs no other file), report.csv and pictures into
outputs/<study>/report, and prints the main columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from lpc_runner.base.files import write_atomically
from lpc_runner.base.surroundings import one_line_errors
from lpc_runner.paper import numbers as paper
from lpc_runner.paper.claims import claims_table, study_answers
from lpc_runner.paper.figures import study_pictures
from lpc_runner.paper.tables import divergence_table, paper_table, quality_table, time_table, tuning_tables
from lpc_runner.study.budgets import BUDGETS, budget_table, curve_settings
from lpc_runner.study.estimates import estimate_tables, paired_table
from lpc_runner.study.page import html_page
from lpc_runner.study.study import Study, read_study
from lpc_runner.study.style import png
from lpc_runner.study.tables import (
    Table,
    cost_table,
    count_statuses,
    likelihood_table,
    settings_of,
    state_notes,
    study_csv,
)

WIDTH, NARROW = 100, 40  # what is narrower breaks the lines itself: no number is cut
MIN_LABEL = 20
GAP = 2  # between columns


def main(arguments: Sequence[str] | None = None) -> None:
    """Write and print the report of one study; exit code 1 with one line on stderr where that is impossible."""
    parser = argparse.ArgumentParser(prog="lpc-runner report", description=__doc__)
    parser.add_argument("study", type=Path, help="a folder of runs: outputs/<study>")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: <study>/report)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        study = read_study(options.study)
        tables = study_tables(study)
        paths = write_report(study, tables, options.output or options.study / "report")
        print_report(study, tables, paths)


def study_tables(study: Study) -> list[Table]:
    """Every table of the report in reading order, dataset by dataset."""
    tables: list[Table | None] = []
    answers = study_answers(study)
    for dataset in study.datasets:
        groups = study.of(dataset)
        tables += [
            claims_table(dataset, groups, answers),
            cost_table(dataset, groups),
            divergence_table(dataset, groups),
        ]
        tables += [quality_table(dataset, groups, setting) for setting in settings_of(groups)]
        tables += [paper_table(dataset)] if dataset in paper.DATASETS else []
        tables += [*tuning_tables(dataset, groups), time_table(dataset, groups), likelihood_table(dataset, groups)]
        tables += [paired_table(dataset, groups), *estimate_tables(dataset, groups)]
        for setting in curve_settings(groups):
            tables += [budget_table(dataset, groups, setting, budget) for budget in BUDGETS]
    return [table for table in tables if table is not None]


def write_report(study: Study, tables: Sequence[Table], folder: Path) -> list[Path]:
    """Pictures first, then the texts that name them; the same study gives the same bytes. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, caption, figure in study_pictures(study, study.warnings):
        pictures.append((name, caption, png(figure)))
        write_atomically(folder / name, pictures[-1][2])
    write_atomically(folder / "report.csv", study_csv(study))
    write_atomically(folder / "report.html", html_page(study, tables, pictures))
    write_atomically(folder / "report.md", markdown(study, tables, pictures))
    written = ["report.md", "report.html", "report.csv", *(name for name, _, _ in pictures)]
    return [folder / name for name in written]


def markdown(study: Study, tables: Sequence[Table], pictures: Sequence[tuple[str, str, bytes]]) -> str:
    """The whole report as text."""
    parts = [f"# {study.name}\n", f"{len(study.runs)} runs: {count_statuses(study.runs)}.\n"]
    for title, lines in (("Runs that did not finish", state_notes(study)), ("Warnings", study.warnings)):
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    parts += [table.markdown() for table in tables]
    parts += [f"![{caption}]({name})\n\n{caption}\n" for name, caption, _ in pictures]
    return "\n".join(parts)


def print_report(study: Study, tables: Sequence[Table], paths: Sequence[Path]) -> None:
    """The main columns, what went wrong, and where the files are, in at most WIDTH columns and at least NARROW."""
    console = Console(highlight=False)
    console.width = max(NARROW, min(WIDTH, console.width)) if console.is_terminal else WIDTH
    console.print(Text(f"{study.name}: {len(study.runs)} runs, {count_statuses(study.runs)}", style="bold"))
    for table in tables:
        console.print(_grid(table, console.width))
        for note in table.notes:
            console.print(Text(note, style="dim"))
        console.print()
    for line in [*state_notes(study), *(f"warning: {line}" for line in study.warnings)]:
        console.print(Text(line), soft_wrap=True)
    console.print("Every column is in report.md, every run in report.csv.")
    for path in paths:
        console.print(Text(str(path)), soft_wrap=True)


def _grid(table: Table, width: int) -> Grid:
    """The columns that fit: names are wrapped first, then columns on the right left out."""
    kept = [index for index, name in enumerate(table.columns) if name not in table.hidden]
    headers = [name.removesuffix(f"_{table.extractor}").replace(" ", "\n") for name in table.columns]
    widths = [_widest([headers[index], *(row[index] for row in table.rows)]) for index in kept]
    while len(kept) > 2 and MIN_LABEL + sum(widths[1:]) + GAP * len(kept) > width:
        kept.pop()
        widths.pop()
    widths[0] = min(widths[0], width - sum(widths[1:]) - GAP * len(kept))
    height = max(headers[index].count("\n") for index in kept)
    grid = Grid(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    grid.padding = (0, GAP - 1, 0, 0)  # and the line between columns
    for index, size in zip(kept, widths):
        header = "\n" * (height - headers[index].count("\n")) + headers[index]
        grid.add_column(Text(header), justify="right" if index else "left", width=size)
    for row in table.rows:
        grid.add_row(*(Text(row[index]) for index in kept))
    return grid


def _widest(cells: Sequence[str]) -> int:
    return max(len(line) for cell in cells for line in cell.split("\n"))


if __name__ == "__main__":
    main()
