"""Options that stand in another option's file, below `variants:`; Hydra reads them as if each had a file of its own.

An experiment or method that is another one with a few values changed is a section of that one's file:

    variants:
      fig4_small:
        defaults: [small]
        hydra: {sweeper: {params: {dataset: digits}}}

`experiment=fig4_small` is then `experiment=fig4`, with what the section says behind it, under a study of its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lpc_runner.base.errors import UserError
from lpc_runner.config.options import CONF_DIR, OF_SEVERAL, as_dict, groups, owners, root_keys

KEY = "variants"


def file_of(folder: Path, group: str, option: str) -> Path | None:
    """The file of a group that has this option, one of its own or one with it below `variants:`; None if none has."""
    own = folder / group / f"{option}.yaml"
    if own.is_file():
        return own
    if group in OF_SEVERAL:
        entry = re.compile(rf"^\s+['\"]?{re.escape(option)}['\"]?\s*:", re.M)
        for path in sorted((folder / group).glob("*.yaml")):
            # Only a file that has such a line is parsed: no mistake in another one is in the way.
            if entry.search(path.read_text(encoding="utf-8", errors="replace")) and option in _variants(path):
                return path
    return None


def _variants(path: Path) -> dict[str, Any]:
    """The variants in a file by name; none in one that YAML does not read, which says so where it is asked for."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        return {}
    variants = content.get(KEY) if isinstance(content, dict) else None
    return {str(name): section for name, section in variants.items()} if isinstance(variants, dict) else {}


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder of groups as Hydra reads it, with the variants.

    It has the name of Hydra's class, which it replaces: a worker registers Hydra's again, and would refuse a class of
    another name beside it.
    """

    def is_config(self, config_path: str) -> bool:
        return super().is_config(config_path) or self.variant(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        names = super().list(config_path, results_filter)
        if config_path.strip("/") in OF_SEVERAL and results_filter != ObjectType.GROUP:
            names += [name for path in (Path(self.path) / config_path).glob("*.yaml") for name in _variants(path)]
        return sorted(set(names))

    def load_config(self, config_path: str) -> ConfigResult:
        base = self.variant(config_path)
        group, _, option = self._normalize_file_name(config_path).removesuffix(".yaml").rpartition("/")
        result = super().load_config(config_path if base is None else f"{group}/{base.stem}")
        if group in OF_SEVERAL:
            content = as_dict(result.config)
            sections = content.pop(KEY, None) or {}
            if base is not None:
                section = {str(name): section for name, section in sections.items()}[option] or {}
                content = _variant(base.stem, option, section, own_study="study" in content)
            result.config = OmegaConf.create(content)
        return result

    def variant(self, config_path: str) -> Path | None:
        """The file that this path is a variant in; None for what has a file of its own, or none at all."""
        group, _, option = self._normalize_file_name(config_path).removesuffix(".yaml").rpartition("/")
        path = file_of(Path(self.path), group, option)
        return None if path is None or path.stem == option else path


def _variant(base: str, name: str, section: dict[str, Any], own_study: bool) -> dict[str, Any]:
    """What a file of the variant's own would say."""
    entries = section.get("defaults", [])
    last = [entry for entry in entries if isinstance(entry, dict) and next(iter(entry)).startswith("override ")]
    first = [entry for entry in entries if entry not in last and entry != "_self_"]
    study = {"study": name} if own_study else {}
    return study | section | {"defaults": [base, *first, "_self_", *last]}


@contextmanager
def variants_read() -> Iterator[None]:
    """Within it, what Hydra starts reads the variants of conf/ and of a user's folder, here and in its workers."""
    Plugins.instance()  # registers Hydra's own, once
    types = SourcesRegistry.instance().types
    before = types[FileConfigSource.scheme()]
    types[FileConfigSource.scheme()] = FileConfigSource
    try:
        yield
    finally:
        types[FileConfigSource.scheme()] = before


_PACKAGE_LINE = "# @package _global_"


class OwnFiles(FileConfigSource):
    """A user's folder as Hydra reads it, every file checked when it is read. Raises UserError (one line)."""

    @staticmethod
    def scheme() -> str:
        return "own"

    def load_config(self, config_path: str) -> ConfigResult:
        path = self.variant(config_path) or Path(self.path) / self._normalize_file_name(config_path)
        _check(path, config_path.rpartition("/")[0])
        return super().load_config(config_path)


SourcesRegistry.instance().register(OwnFiles)


def require_own_names(folder: Path, choices: dict[str, str]) -> None:
    """Raises UserError for an option chosen that stands in a user's folder and in conf/, where it is taken from."""
    for group, option in choices.items():
        path = file_of(folder, group, option)
        if path is not None and file_of(CONF_DIR, group, option) is not None:
            raise UserError(f"{path}: {group}={option} is an option of the package, which is taken: rename the file")


def _check(path: Path, group: str) -> None:
    """Raises UserError for a file that Hydra would refuse without its name, or read as something else."""
    text = _text(path)
    entries = _entries(path, text)
    try:
        package = OwnFiles._get_header_dict(text[:512])["package"]
    except ValueError as error:
        raise UserError(f"{path}, line 1: {error}; it is `{_PACKAGE_LINE}`") from None
    late = re.search(r"^\s*#\s*@package\b", text, re.M)
    if package is None and late:
        raise UserError(f"{path}, line {_line(text, late.end())}: `# @package` counts in the first line only")
    if package is None and (group in OF_SEVERAL or group in entries):
        raise UserError(f"{path}, line 1: the first line must be `{_PACKAGE_LINE}`: the file names groups")
    if package == "_global_":
        for key, (value, line) in entries.items():
            if key == KEY and group in OF_SEVERAL:
                _check_variants(f"{path}, line {line}", value)
            else:
                _check_root_entry(f"{path}, line {line}", key, value)


def _text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}, line 1: begins with a byte order mark; save it as UTF-8 without one")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _entries(path: Path, text: str) -> dict[str, tuple[Any, int]]:
    """Key, value and line of what stands at the beginning of a line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}, line {root.start_mark.line + 1}: no mapping (key: value)")
        content = as_dict(OmegaConf.load(path))
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark.line + 1 if error.problem_mark else 1
        tab = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{path}, line {where}: {error.problem}{tab}") from None
    except yaml.reader.ReaderError as error:
        where = _line(text, error.position)
        raise UserError(
            f"{path}, line {where}: a character that YAML does not allow (U+{error.character:04X})"
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value} if root else {}
    return {str(key): (value, lines.get(str(key), 1)) for key, value in content.items()}


def _check_variants(where: str, variants: Any) -> None:
    if not isinstance(variants, dict):
        raise UserError(f"{where}: below {KEY} stand names, and below each what it changes")
    for name, section in variants.items():
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} holds nothing: what it changes is indented below it")
        for key, value in section.items():
            _check_root_entry(f"{where}: {name}", str(key), value)


def _check_root_entry(where: str, key: str, value: Any) -> None:
    if key not in root_keys():
        having = [f"{group}.{key}" for group in groups() if owners(group, key)]
        below = f" ({', '.join(having)})" if having else ""
        raise UserError(f"{where}: unknown key {key}; what belongs to a group is indented below its name{below}")
    if key in groups() and not isinstance(value, dict):
        if value is None:
            raise UserError(f"{where}: {key} holds nothing: what belongs to it is indented below it")
        raise UserError(f"{where}: an option is chosen below `defaults:`, as `- override /{key}: {value}`")


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
