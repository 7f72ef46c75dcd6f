"""The house keeps its shape: who may import whom, and where configuration, output and heavy packages stay."""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lpc_runner"
# Rooms by floor, from the ground up: a room imports itself and what lies on floors below it.
FLOORS = (
    ("base",),
    ("data", "inference", "store"),
    ("models", "tracking", "study"),
    ("config", "training", "evaluation", "paper"),
    ("runner",),
    ("testing",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What a reader of one update must know: everything between a checked configuration and result.json.
INNER_HOUSE = (
    "base",
    "inference",
    "models",
    "training",
    "config",
    "runner",
    "store",
    "data/dataset.py",
    "data/images.py",
)
INNER_LINES = 6_134  # of code; who makes it smaller lowers this
# Commands: each a file at the top, so that `python -m lpc_runner.ls` runs it. They put the rooms together.
COMMANDS = ("__init__", "__main__", "main", "evaluate", "sample", "fetch", "publish", "dashboard", "ls", "report")
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: its folder, or its own name at the top level."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module a file imports, wherever in it: a.b for `from a import b` too, relative ones absolute."""
    package = ["lpc_runner", *path.relative_to(SOURCE).parent.parts]
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return frozenset(found)


def parts_imported(path: Path) -> set[str]:
    ours = (name.split(".") for name in imports_of(path) if name.startswith("lpc_runner."))
    return {words[1] for words in ours if words[1] in (*FLOOR_OF, *COMMANDS)}


def importers_of(package: str) -> set[str]:
    """Files that import a package or something in it."""
    return {name for path, name in zip(FILES, NAMES) if package in {word.split(".")[0] for word in imports_of(path)}}


def functions_of(path: Path):
    return [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.Lambda)]


def test_every_part_of_the_package_has_its_place():
    assert {part_of(path) for path in FILES} <= {*FLOOR_OF, *COMMANDS}


@each_file
def test_imports_point_downwards_only(path):
    room = part_of(path)
    if room in FLOOR_OF:
        assert parts_imported(path) <= {room, *(other for other, floor in FLOOR_OF.items() if floor < FLOOR_OF[room])}


def test_no_files_import_each_other_in_a_circle():
    """An import for annotations alone, or inside a function, ties two files as any other does."""
    module_of = {".".join(("lpc_runner", *Path(name).with_suffix("").parts)): path for path, name in zip(FILES, NAMES)}
    left = {module: (imports_of(path) & module_of.keys()) - {module} for module, path in module_of.items()}
    while leaves := {module for module, names in left.items() if not names}:
        left = {module: names - leaves for module, names in left.items() if module not in leaves}
    assert not left


def lines_of_code(path: Path) -> int:
    """Lines with a token of the program: docstrings, comments and empty lines cost nothing."""
    text = path.read_text(encoding="utf-8")
    nodes = [node for node in nodes_of(path) if isinstance(node, ast.Expr)]
    strings = [node for node in nodes if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    prose = {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    passed = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in passed]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - prose)


def test_the_inner_house_stays_small():
    inner = [path for path, name in zip(FILES, NAMES) if name.startswith(INNER_HOUSE)]
    assert 0.9 * INNER_LINES < sum(map(lines_of_code, inner)) <= INNER_LINES


@each_file
def test_a_name_at_the_top_of_a_file_means_one_thing(path):
    """The second of two constants of one name would change what stands above it, and no linter says so."""
    names = []
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
            names += [part.id for part in stored]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    assert sorted(names) == sorted(set(names))


def test_commands_alone_change_how_threads_wait():
    """A caller of `lpc_runner.load` keeps the environment that he has."""
    calls = set()
    for path, name in zip(FILES, NAMES):
        for function in nodes_of(path):
            if isinstance(function, ast.FunctionDef):
                inner = (node for node in ast.walk(function) if isinstance(node, ast.Call))
                named = {node.func.id for node in inner if isinstance(node.func, ast.Name)}
                calls |= {f"{name}:{function.name}"} if "wait_passively" in named else set()
    assert calls == {"main.py:main", "main.py:_run", "main.py:job", "evaluate.py:main", "sample.py:main"}


def test_run_directories_need_no_torch():
    for name in ("store/runs", "base/files", "base/errors"):
        assert "torch" not in imports_of(SOURCE / f"{name}.py")


def test_heavy_packages_have_one_door():
    assert all(part_of(SOURCE / name) in ("main", "config") for name in importers_of("hydra"))
    omegaconf = {"main", "config", "runner", "evaluate"}
    assert {part_of(SOURCE / name) for name in importers_of("omegaconf")} <= omegaconf
    assert {part_of(SOURCE / name) for name in importers_of("wandb")} == {"tracking"}
    assert {part_of(SOURCE / name) for name in importers_of("wandb_workspaces")} == {"tracking"}
    assert importers_of("torch_fidelity") == {"evaluation/features.py"}


def test_wandb_and_torch_fidelity_are_imported_late():
    late = ("wandb", "wandb_workspaces", "torch_fidelity")
    for name in set().union(*map(importers_of, late)):
        for node in tree_of(SOURCE / name).body:
            assert not isinstance(node, ast.Import) or node.names[0].name not in late
            assert not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in late


def test_every_text_file_is_read_and_written_in_a_named_encoding():
    """A terminal's encoding is no business of a file's."""
    texts = ("read_text", "write_text", "open", "fdopen", "NamedTemporaryFile")
    for path in (*FILES, *(SOURCE.parents[1] / "scripts").glob("*.py")):
        for call in (node for node in nodes_of(path) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = [word.value for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            binary = any(len(word) <= 3 and "b" in word for word in given)
            plain = isinstance(call.func, ast.Name) or (name != "open" or (bool(given) and given[0] in ("r", "w", "a")))
            if name in texts and plain and not binary:
                assert "encoding" in {word.arg for word in call.keywords}, f"{path.name}, line {call.lineno}"


@each_file
def test_only_commands_print(path):
    calls = (node for node in nodes_of(path) if isinstance(node, ast.Call))
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    if prints:
        name = str(path.relative_to(SOURCE))
        commands = ("main", "evaluate", "sample", "ls", "report", "publish", "dashboard")
        assert name.removesuffix(".py") in commands


@each_file
def test_the_configuration_does_not_travel_below_the_root(path):
    if part_of(path) in ("main", "config", "runner", "evaluate"):
        return
    for function in functions_of(path):
        arguments = function.args
        names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        assert "cfg" not in names, f"line {function.lineno}"


def test_every_name_of_the_user_is_really_public():
    import lpc_runner

    assert lpc_runner.__all__ == ["load", "run"] and callable(lpc_runner.load) and callable(lpc_runner.run)


@pytest.mark.parametrize("page", ["algorithm", "flow"])
def test_a_page_s_files_functions_and_lines_of_code_are_there(page):
    """Rows of `file` | `function` | `code`; what is shown as code of Algorithm 1 stands in that function."""
    text = (SOURCE.parents[1] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w/]+\.py)` \| `([\w.]+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len([line for line in text.splitlines() if line.startswith("| ")]) - text.count("| file |")
    for path, function, code in rows:
        source = (SOURCE / path).read_text(encoding="utf-8")
        node = tree_of(SOURCE / path)
        for name in function.split("."):
            (node,) = [inner for inner in node.body if getattr(inner, "name", None) == name]
        body = " ".join(ast.get_source_segment(source, node).split())
        assert page != "algorithm" or code.strip("`") in body, f"{path}, {function}: {code}"


def outside(*names: str) -> set[str]:
    """The packages of others that some files import at any time, and every file of ours that they import."""
    module_of = {".".join(("lpc_runner", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in FILES}
    left, seen, found = [SOURCE / name for name in names], set(), set()
    while left:
        seen.add(path := left.pop())
        imported = imports_of(path)
        left += [module_of[name] for name in imported if name in module_of and module_of[name] not in seen]
        found |= {name.split(".")[0] for name in imported}
    return found - {"lpc_runner", *sys.stdlib_module_names}


def test_an_update_imports_torch_numpy_and_pydantic_alone():
    """What a training loop of one's own is made of; the contract checks know the tracker's files, too."""
    parts = [name for name in NAMES if name.startswith(("inference/", "models/"))]
    assert {"torch"} < outside(*parts, "training/learner.py") <= {"torch", "numpy", "pydantic"}
    assert outside("testing.py") <= {"torch", "numpy", "pydantic", "filelock"}
    assert "hydra" in outside("config/compose.py")
