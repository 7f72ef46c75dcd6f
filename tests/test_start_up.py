"""What a command imports before it names a mistake, and what it settles first (help, --cfg: tests/test_config.py)."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from conftest import TINY, environment, only_run, result_of

from lpc_runner.base.surroundings import VARIABLES, load_average, wait_passively

# As a user's own scripts are called; an import of one of them ends the process.
NAMESAKES = ("random", "logging", "queue", "yaml", "torch", "data")
HEAVY = ["torch", "torch._dynamo", "torchvision", "torch_fidelity", "wandb", "sklearn", "scipy", "matplotlib"]
CODE = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", [name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
from lpc_runner.main import main
main()
"""


@pytest.mark.parametrize(
    "arguments, allowed, says",
    [
        (["objective=jefreys"], [], "jeffreys"),
        (["sampler.stepsize=1"], [], "unknown key sampler.stepsize"),
        (["-m", "objective=jeffreys,jefreys"], [], "jeffreys"),
        (["metrics.k=-3"], ["torch"], "metrics.k must be"),
        pytest.param(
            ["engine=cuda"],
            ["torch"],
            "engine must be one of auto, eager, compiled, cuda_graph",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answers_that_need_no_torch_do_not_import_it(tmp_path, arguments, allowed, says):
    """Errors of composition load nothing heavy; a range is checked by the class it belongs to, which may import torch,
    but not torchvision, torch-fidelity or torch's compiler."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
    loaded = next(line for line in done.stderr.splitlines() if line.startswith("loaded:")).removeprefix("loaded: ")
    assert set(json.loads(loaded.replace("'", '"'))) <= set(allowed)
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize(
    "load, given, shared, sleeps",
    [
        (0.0, {}, False, False),
        (1.9, {}, False, False),
        (2.0, {}, False, True),  # of four cores
        (0.0, {}, True, True),
        (0.0, {"LOCAL_WORLD_SIZE": "2"}, False, True),
        (0.0, {"LOCAL_WORLD_SIZE": "1"}, False, False),
        *((9.0, {name: "1"}, True, False) for name in VARIABLES),
    ],
)
def test_threads_sleep_beside_other_work_unless_the_user_says_otherwise(monkeypatch, load, given, shared, sleeps):
    for name in (*VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr("lpc_runner.base.surroundings.load_average", lambda: load)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert wait_passively(shared) == sleeps
    assert dict(os.environ) == before | ({"OMP_WAIT_POLICY": "PASSIVE"} if sleeps else {})


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="only Linux tells what runs at this moment")
def test_work_that_began_a_moment_ago_counts(monkeypatch):
    """The average over a minute does not know it yet."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    with ExitStack() as stack:
        for _ in range(3):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        assert any(load_average() >= 2 for _ in range(200) if time.sleep(0.02) is None)


def test_runs_of_the_command_s_own_process_are_not_taken_for_work_beside_it(command, monkeypatch):
    asked = []
    monkeypatch.setattr("lpc_runner.main.wait_passively", lambda shared=False: asked.append(shared))
    assert command(*TINY, "check=true").code == command("-m", "seed=0,1", *TINY, "check=true").code == 0
    assert asked and not any(asked)


def test_where_torch_is_loaded_already_the_environment_is_the_caller_s(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert not wait_passively(shared=True) and dict(os.environ) == before


@pytest.fixture
def namesakes(workplace):
    """A working directory whose files have the names of modules that a command imports."""
    for name in NAMESAKES:
        (workplace / f"{name}.py").write_text(f"raise SystemExit('the user's {name}.py')\n")
    for name in ("conf", "wandb", "hydra"):
        (workplace / name).mkdir()
    return workplace


@pytest.mark.parametrize("module, words, says", [("", ["sed=1"], "unknown key sed"), (".ls", ["nowhere"], "nowhere")])
def test_files_beside_the_command_hide_no_module(module, words, says, namesakes):
    command = [sys.executable, "-m", f"lpc_runner{module}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1 and says in done.stderr and "the user's" not in done.stderr, done.stderr


# python -O writes no bytecode that was there before: it compiles torch and what torch imports.
@pytest.mark.parametrize("flags", [("-W", "error"), pytest.param(("-O", "-W", "error"), marks=pytest.mark.slow)])
def test_a_run_in_odd_surroundings(flags, namesakes):
    """No home, no temporary folder, no git, odd values in the environment, warnings as errors, python -O."""
    odd = {"HOME": "/nowhere", "TMPDIR": "/nowhere", "PATH": "/nowhere", "OMP_NUM_THREADS": "many"}
    odd |= {"CUDA_VISIBLE_DEVICES": "none,-1", "HYDRA_FULL_ERROR": "0", "WORLD_SIZE": "1", "GIT_DIR": "/nowhere/.git"}
    command = [sys.executable, *flags, "-m", "lpc_runner", *TINY]
    umask = os.umask(0o077)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**environment(), **odd}, check=False)
    finally:
        os.umask(umask)
    assert done.returncode == 0, done.stderr
    assert result_of(only_run())["status"] == "finished"
    assert (only_run() / "result.json").stat().st_mode & 0o077 == 0
