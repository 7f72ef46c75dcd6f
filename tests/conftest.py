"""Shared by all tests: one thread, no W&B, and the command line run inside this process."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reuse  # before anything composes
import torch

from lpc_runner.base.surroundings import VARIABLES

# A run of seconds: the default's code with small networks, few updates and few samples.
TINY = (
    "device=cpu",
    "tracker=none",
    "num_threads=1",
    "model=mlp",
    "model.hidden=[16]",
    "model.latent_dim=4",
    "sampler.num_steps=3",
    "tuned.method=null",  # digits would choose persistent chains
    "trainer.batch_size=16",
    "trainer.num_prior_batches=2",
    "trainer.max_updates=6",
    "trainer.log_every=1",
    "traces.updates=[2,4]",
    "traces.num_chains=2",
    "traces.grid_points=3",
    "metrics.num_samples=40",
    "metrics.max_references=40",
    "metrics.num_samples_during=20",
)
# The same for what has no chain: the key is not there to be set.
TINY_VAE = tuple(item for item in TINY if not item.startswith("sampler."))


# Run folders that an earlier version left behind (`earlier_run`).
RUNS = Path(__file__).parent / "fixtures" / "runs"

# What the result.json of a run that is done holds besides status and metrics.
ENDED = {
    "measurement": {},
    "num_updates": 20,
    "num_epochs": 2.0,
    "train_seconds": 1.0,
    "gradient_evaluations": 60,
    "diverged_at": None,
    "state_measured": "final state",
    "error": None,
    "device": "cpu",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C counts, here and in what the tests start, though a script may run them in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_numbers():
    """Which tests ran before in this process decides no number."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    """Words stand where they stand without a terminal, whatever CI systems set."""
    for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@dataclass
class Answer:
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(workplace, monkeypatch, capfd):
    """`command("dataset=svhn", ...)` is `python -m lpc_runner dataset=svhn ...` in this process."""
    from lpc_runner.main import main

    def call(*arguments: str, entry=main) -> Answer:
        monkeypatch.setattr(sys, "argv", ["lpc_runner", *arguments])
        loggers = [logging.getLogger(name) for name in (None, "lpc_runner")]
        before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
        capfd.readouterr()
        code = 0
        try:
            entry()
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            for logger, handlers, level in before:  # Hydra configures logging for a process of its own
                logger.handlers[:], logger.level = handlers, level
        return Answer(code, *capfd.readouterr())

    return call


def plan_of(*overrides: str):
    """The plan of a single run."""
    from lpc_runner.runner.plan import plan

    return plan(cell_of(*overrides))


def compose_cells(*arguments: str):
    """Every cell of a command line."""
    from lpc_runner.config.compose import compose_command
    from lpc_runner.config.words import parse_arguments

    return compose_command(parse_arguments(list(arguments))).cells


# The same, of which words without a folder of options are composed once.
cells_of = reuse.once(compose_cells, lambda *words: None if any(word.startswith("--") for word in words) else words)


def cell_of(*overrides: str):
    (cell,) = cells_of(*overrides)
    return cell


def only_run(outputs: Path = Path("outputs"), study: str = "default") -> Path:
    """The directory of the one run of a study."""
    (run,) = (outputs / study).iterdir()
    return run


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def rows_of(run: Path) -> list[dict]:
    """The metric log without what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def weights_of(run: Path) -> dict[str, torch.Tensor | float]:
    """Every number of the newest checkpoint but the seconds: parameters, optimiser states, counters."""
    from lpc_runner.store.checkpoints import load_checkpoint

    flat = {}

    def walk(node, name):
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}/{key}")
        elif isinstance(node, (list, tuple)):
            for number, value in enumerate(node):
                walk(value, f"{name}/{number}")
        else:
            flat[name] = node

    walk(load_checkpoint(run / "checkpoints"), "")
    return {key: value for key, value in flat.items() if not key.endswith(("train_seconds", "log_offset"))}


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit: parameters, optimiser states, counters, metric log, final metrics."""
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key
    assert rows_of(one) == rows_of(other)
    assert result_of(one)["metrics"] == result_of(other)["metrics"]


def earlier_run(state: str) -> tuple[str, ...]:
    """Put a run of an earlier version into outputs/, done or interrupted after 3 of 6 updates; its overrides."""
    seed = {"done": 0, "interrupted": 1}[state]
    (source,) = RUNS.glob(f"*-s{seed}-*")
    shutil.copytree(source, Path("outputs/runs") / source.name)
    return *TINY, "model.hidden=[1]", "model.latent_dim=2", f"seed={seed}"


def write_images(path: Path, count: int = 60, shape=(1, 28, 28), seed: int = 0, **more) -> Path:
    """An .npz for dataset=arrays."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    np.savez(path, images=images, **more)
    return path


def finish(process: subprocess.Popen, code: int | None = 0) -> str:
    """What a process said, once it has ended with `code` (None: any); one that hangs is killed with its children."""
    try:
        out, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
        raise
    assert code is None or process.returncode == code, out
    return out


def environment() -> dict[str, str]:
    """For a subprocess: no W&B, one thread, and nothing said of how threads wait."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


# Has GNU's OpenMP write its settings to standard error when a process loads it.
TELLING = {"OMP_DISPLAY_ENV": "VERBOSE"}


def spin_counts(text: str) -> list[int]:
    """How often a waiting thread looks before it sleeps, in every process that said so (TELLING)."""
    return [int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", text)]
