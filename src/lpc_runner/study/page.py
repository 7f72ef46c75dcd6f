"""The report as one HTML page that needs nothing but itself: no script, no outside resource."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from lpc_runner.study.study import Study
from lpc_runner.study.tables import Table, count_statuses, state_notes

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
    parts = [f"<h1>{escape(study.name)}</h1>"]
    parts.append(f'<p class="soft">{len(study.runs)} runs: {escape(count_statuses(study.runs))}.</p>')
    parts.append(_contents(tables, pictures))
    for title, lines in (("Runs that did not finish", state_notes(study)), ("Warnings", study.warnings)):
        if lines:
            parts.append(f"<h2>{title}</h2>\n{_list(lines)}")
    parts += ["<h2>Tables</h2>"] * bool(tables) + [_table(table) for table in tables]
    parts += ["<h2>Figures</h2>"] * bool(pictures) + [_figure(*picture) for picture in pictures]
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


def _list(lines: Sequence[str]) -> str:
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">\n{items}\n</ul>'


def _table(table: Table) -> str:
    kinds = [' class="text"' if index in table.prose else "" for index in range(len(table.columns))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(table.columns, kinds))
    rows = ["".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    notes = _list(table.notes) if table.notes else ""
    return (
        f'<h3 id="{anchor(table.title)}">{escape(table.title)}</h3>\n<div class="wide" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n{notes}"
    )


def _figure(name: str, caption: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<figure id="{anchor(name)}">\n<img src="data:image/png;base64,{data}" alt="{escape(caption)}">\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )
