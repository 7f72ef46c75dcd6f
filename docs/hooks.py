"""Pages of the site that stand elsewhere: README, CONTRIBUTING and CHANGELOG, and one API page per folder of code."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lpc_runner"
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


def on_files(files, config):
    """Add the generated pages; links to files that are no pages become plain words."""
    for page, source in COPIED.items():
        files.append(File.generated(config, page, content=_linked((ROOT / source).read_text(encoding="utf-8"))))
    for name, modules in parts():
        body = "".join(f"\n::: lpc_runner.{module}\n" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n{body}"))
    return files


def on_page_markdown(markdown, page, **_):
    """Links from a page in docs/ to the code, which the site does not hold, become plain words."""
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!docs/)[^)]+\)", r"\1", markdown)


def on_config(config):
    """The list of API pages, which follows from the package's folders."""
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = [f"api/{name}.md" for name, _ in parts()]
    return config


def parts() -> list[tuple[str, list[str]]]:
    """Each folder of the package with its modules, by name."""
    found = []
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
        found.append((folder.name, [f"{folder.name}.{module}" for module in modules]))
    return found


def _linked(text: str) -> str:
    pages = {source: page for page, source in COPIED.items()}

    def target(match: re.Match) -> str:
        path = match[1].removeprefix("docs/")
        known = pages.get(path.partition("#")[0], path)
        return f"]({known})" if (ROOT / "docs" / known.partition("#")[0]).exists() or known in COPIED else "]"

    # A link to what is no page keeps its words.
    text = re.sub(r"\[([^\]]+)\]\(((?:src|tests|scripts|conf|benchmarks|examples)/[^)]*|LICENSE)\)", r"\1", text)
    return _LINK.sub(target, text)
