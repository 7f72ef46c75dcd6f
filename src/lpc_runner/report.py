"""lpc-runner report outputs/<study>: tables, curves and samples, the paper's numbers beside ours.

Writes report.md, report.html (the same on one page that needs no other file), report.csv and pictures into
outputs/<study>/report, and prints the main columns.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from lpc_runner.base.files import write_atomically
from lpc_runner.base.presentation import picture_style
from lpc_runner.base.surroundings import one_line_errors
from lpc_runner.paper.chain_figures import chain_pictures, trajectory_pictures
from lpc_runner.paper.claims import claims_table, study_answers
from lpc_runner.paper.quality_figures import grid_pictures, level_pictures, objective_pictures, sweep_pictures
from lpc_runner.paper.tables import divergence_table, paper_table, quality_table, time_table, tuning_tables
from lpc_runner.study.budgets import BUDGETS, budget_table, curve_settings
from lpc_runner.study.curve_figures import compute_pictures, curve_pictures, metric_names
from lpc_runner.study.estimates import estimate_pictures, estimate_tables, paired_table, sequence_pictures
from lpc_runner.study.study import Study, read_study
from lpc_runner.study.style import Picture, png
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
        claims = claims_table(dataset, groups, answers)
        are_asked = claims is not None and claims.num_main
        tables += [
            claims if are_asked else None,
            cost_table(dataset, groups),
            divergence_table(dataset, groups),
            *(quality_table(dataset, groups, setting) for setting in settings_of(groups)),
            paper_table(dataset),
            *tuning_tables(dataset, groups),
            time_table(dataset, groups),
            likelihood_table(dataset, groups),
            paired_table(dataset, groups),
            *estimate_tables(dataset, groups),
        ]
        for setting in curve_settings(groups):
            tables += [budget_table(dataset, groups, setting, budget) for budget in BUDGETS]
        tables.append(None if are_asked else claims)
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


def _troubles(study: Study) -> dict[str, list[str]]:
    troubles = {"Runs that did not finish": state_notes(study), "Warnings": study.warnings}
    return {title: lines for title, lines in troubles.items() if lines}


def markdown(study: Study, tables: Sequence[Table], pictures: Sequence[tuple[str, str, bytes]]) -> str:
    """The whole report as text."""
    parts = [f"# {study.name}\n", f"{len(study.runs)} runs: {count_statuses(study.runs)}.\n"]
    for title, lines in _troubles(study).items():
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
        if table.num_main == 0:
            console.print(Text(f"{table.title}: {table.notes[0]}", style="dim"))
            continue
        console.print(_grid(table, console.width))
        for note in table.notes:
            console.print(Text(note, style="dim"))
        console.print()
    for line in [*state_notes(study), *(f"warning: {line}" for line in study.warnings)]:
        console.print(Text(line), soft_wrap=True)
    console.print("Every column and row is in report.md, every run in report.csv.")
    for path in paths:
        console.print(Text(str(path)), soft_wrap=True)


def _grid(table: Table, width: int) -> Grid:
    """The columns that fit: names are wrapped first, then columns on the right left out."""
    kept = [index for index, name in enumerate(table.columns) if name not in table.hidden]
    headers = [name.removesuffix(f"_{table.extractor}").replace(" ", "\n") for name in table.columns]
    rows = table.rows[: table.num_main]
    widths = [_widest([headers[index], *(row[index] for row in rows)]) for index in kept]
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
    for row in rows:
        grid.add_row(*(Text(row[index]) for index in kept))
    return grid


def _widest(cells: Sequence[str]) -> int:
    return max(len(line) for cell in cells for line in cell.split("\n"))


def study_pictures(study: Study, warnings: list[str]) -> Iterator[Picture]:
    """One by one, dataset by dataset; a figure whose data are not there is left out, damaged files are named."""
    with picture_style():
        for dataset in study.datasets:
            groups = study.of(dataset)
            yield from trajectory_pictures(dataset, groups, warnings)
            yield from objective_pictures(dataset, groups)
            yield from chain_pictures(dataset, groups, warnings)
            yield from sweep_pictures(dataset, groups)
            yield from grid_pictures(dataset, groups, warnings)
            yield from level_pictures(dataset, groups, warnings)
            yield from sequence_pictures(dataset, groups)
            yield from estimate_pictures(dataset, groups)
            settings = curve_settings(groups)
            for setting in settings:
                for metric in metric_names(groups, setting):
                    yield from curve_pictures(dataset, groups, metric, setting)
                yield from compute_pictures(dataset, groups, setting)
            yield from curve_pictures(dataset, groups, "train/elbo", None)


CSS = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de; --band: #f4f6f8;
  --link: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --soft: #9aa5b1; --page: #14181d; --line: #39424d;
  --band: #1c222a; --link: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1rem 4rem; color: var(--text); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; } h2 { font-size: 1.3rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
a { color: var(--link); } nav ul { padding-left: 1.1rem; } .soft, figcaption, .notes { color: var(--soft); }
.notes, figcaption { font-size: 0.9rem; } .notes { padding-left: 1.1rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; overflow-wrap: normal; }
th { background: var(--band); vertical-align: bottom; } tr:last-child > * { border-bottom: 0; }
.text { text-align: left; white-space: normal; min-width: 16rem; }
.text:first-child { min-width: 11rem; }
figure { margin: 1.5rem 0; } figcaption { margin-top: 0.4rem; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: 6px; }
"""


def html_page(study: Study, tables: Sequence[Table], pictures: Sequence[tuple[str, str, bytes]]) -> str:
    """The whole report; pictures: file name, caption, PNG. The same study gives the same text."""
    parts = [
        f"<h1>{escape(study.name)}</h1>",
        f'<p class="soft">{len(study.runs)} runs: {escape(count_statuses(study.runs))}.</p>',
        _contents(tables, pictures),
    ]
    parts += [f"<h2>{title}</h2>\n{_html_list(lines)}" for title, lines in _troubles(study).items()]
    parts += ["<h2>Tables</h2>"] * bool(tables) + [_html_table(table) for table in tables]
    parts += ["<h2>Figures</h2>"] * bool(pictures) + [_html_figure(*picture) for picture in pictures]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study.name)}</title>\n<style>{CSS}</style>"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def anchor(text: str) -> str:
    """A title as the end of a link."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _contents(tables: Sequence[Table], pictures: Sequence[tuple[str, str, bytes]]) -> str:
    links = [(table.title, table.title) for table in tables]
    links += [(name, caption.partition(";")[0]) for name, caption, _ in pictures]
    items = "\n".join(f'<li><a href="#{anchor(target)}">{escape(text)}</a></li>' for target, text in links)
    return f"<nav>\n<details>\n<summary>Contents</summary>\n<ul>\n{items}\n</ul>\n</details>\n</nav>"


def _html_list(lines: Sequence[str]) -> str:
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">\n{items}\n</ul>'


def _html_table(table: Table) -> str:
    kinds = [' class="text"' if index in table.prose else "" for index in range(len(table.columns))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(table.columns, kinds))
    rows = ["".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    notes = _html_list(table.notes) if table.notes else ""
    return (
        f'<h3 id="{anchor(table.title)}">{escape(table.title)}</h3>\n<div class="wide" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n{notes}"
    )


def _html_figure(name: str, caption: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<figure id="{anchor(name)}">\n<img src="data:image/png;base64,{data}" alt="{escape(caption)}">\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


if __name__ == "__main__":
    main()
