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

from lpc_runner.config.options import OF_SEVERAL, as_dict

KEY = "variants"


def file_of(folder: Path, group: str, option: str) -> Path | None:
    """The file of a group that has this option below `variants:`; None if there is none."""
    if group in OF_SEVERAL:
        entry = re.compile(rf"^\s+['\"]?{re.escape(option)}['\"]?\s*:", re.M)
        for path in sorted((folder / group).glob("*.yaml")):
            # Only a file that has such a line is parsed: no mistake in another one is in the way.
            if entry.search(path.read_text(encoding="utf-8", errors="replace")) and option in _variants(path):
                return path
    return None


def has_option(folder: Path, group: str, option: str) -> bool:
    """Whether a folder of groups has this option, as a file or as a variant."""
    return (folder / group / f"{option}.yaml").is_file() or file_of(folder, group, option) is not None


def _variants(path: Path) -> dict[str, Any]:
    """The variants in a file by name; none in one that YAML does not read, which says so where it is asked for."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        return {}
    found = content.get(KEY) if isinstance(content, dict) else None
    return {str(name): section for name, section in found.items()} if isinstance(found, dict) else {}


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder of groups as Hydra reads it, with the variants.

    It has the name of Hydra's class, for which it stands: a worker registers that one again, and a second class of
    another name would be refused there.
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
        if super().is_config(config_path):
            return None
        group, _, option = self._normalize_file_name(config_path).removesuffix(".yaml").rpartition("/")
        return file_of(Path(self.path), group, option)


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
