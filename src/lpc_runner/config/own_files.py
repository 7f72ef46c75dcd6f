"""Options of one's own, from --config-dir: a file that Hydra would not read as it is meant is named with its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lpc_runner.base.errors import UserError
from lpc_runner.config.options import CONF_DIR, OF_SEVERAL, as_dict, groups, owners, root_keys
from lpc_runner.config.variants import KEY, FileConfigSource, file_of, has_option

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
        path = file_of(folder, group, option) or folder / group / f"{option}.yaml"
        if path.is_file() and has_option(CONF_DIR, group, option):
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
