"""What a run was made with: settings, versions, commit, device, host."""

from __future__ import annotations

import logging
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lpc_runner import __version__
from lpc_runner.base.errors import UserError
from lpc_runner.store.runs import RunDirectory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
_PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "wandb", "torch-fidelity", "scikit-learn")


def settings_of(run: RunDirectory) -> dict[str, Any]:
    """config.yaml of a run. Raises UserError if it is missing or damaged."""
    path = run.path / "config.yaml"
    try:
        content = yaml.safe_load(path.read_bytes())
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is missing or damaged; without it, the run's own command writes it anew")
    return content


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Facts to keep beside a result; nothing secret: no environment variables."""
    import torch

    on_cuda = device.type == "cuda"
    return {
        "lpc_runner": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device)
        if on_cuda
        else f"cpu ({platform.processor() or platform.machine()})",
        "device_kind": device.type,
        "num_threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _version(name: str) -> str | None:
    """Of an installed package; None where it came without metadata."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def warn_of_other_code(last: dict[str, Any]) -> None:
    """Say so when a run goes on with other code than its latest session had."""
    now = (__version__, git_commit())
    before = (last.get("lpc_runner"), last.get("git_commit"))
    if last and before != now:
        words = [f"{version} ({commit or 'no commit'})" for version, commit in (before, now)]
        logger.warning("the code changed under this run: begun with lpc_runner %s, going on with %s", *words)


def warn_of_another_device(last: dict[str, Any], device: torch.device) -> None:
    """Say so when a run goes on with the random numbers of another kind of device than its latest session had."""
    before = last.get("device_kind")
    if before not in (None, device.type):
        logger.warning(
            "begun on %s, now on %s, which draws other random numbers: neither device alone makes this run again",
            before,
            device.type,
        )


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with '+' when files differ from it; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    # A git hook or `git rebase --exec` names its own repository; status would lock the user's index.
    given = {name: value for name, value in os.environ.items() if name not in _REPOSITORY}
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(
        command, cwd=root, env=given, capture_output=True, check=True, encoding="utf-8", errors="replace"
    )
    return done.stdout.strip()
