"""What a command imports before it names a mistake, and what it settles first (help, --cfg: tests/test_config.py)."""

import json
import os
import platform
import subprocess
import sys

import pytest
from conftest import TELLING, TINY, environment, only_run, result_of, spin_counts

from lpc_runner.base.surroundings import VARIABLES, wait_passively

# As a user's own scripts are called; an import of one of them ends the process.
NAMESAKES = ("random", "logging", "queue", "yaml", "torch", "data")
HEAVY = ["torch", "torchvision", "torch_fidelity", "wandb", "sklearn", "scipy", "matplotlib"]
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
        (["sampler.num_steps=-3"], ["torch"], "sampler.num_steps must be"),
        (["engine=cuda"], ["torch"], "engine must be one of auto, eager, compiled, cuda_graph"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answers_that_need_no_torch_do_not_import_it(tmp_path, arguments, allowed, says):
    """Errors of composition load nothing heavy; a range is checked by the class it belongs to, which may import torch,
    but not torchvision or torch-fidelity. Where torch is loaded, its threads sleep when they wait."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment() | TELLING, check=False
    )
    loaded = next(line for line in done.stderr.splitlines() if line.startswith("loaded:")).removeprefix("loaded: ")
    assert set(json.loads(loaded.replace("'", '"'))) <= set(allowed)
    assert says in done.stdout + done.stderr
    if platform.system() == "Linux":
        assert set(spin_counts(done.stderr)) == ({0} if "torch" in loaded else set())


@pytest.mark.parametrize("variable", [None, *VARIABLES])
def test_threads_sleep_unless_the_user_says_otherwise(monkeypatch, variable):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    before = dict(os.environ)
    assert wait_passively() == (variable is None)
    assert dict(os.environ) == before | ({} if variable else {"OMP_WAIT_POLICY": "PASSIVE"})


def test_where_torch_is_loaded_already_the_environment_is_the_caller_s(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert not wait_passively() and dict(os.environ) == before


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


def test_a_run_in_odd_surroundings(namesakes):
    """No home, no temporary folder, no git, odd values in the environment, warnings as errors, python -O."""
    odd = {"HOME": "/nowhere", "TMPDIR": "/nowhere", "PATH": "/nowhere", "OMP_NUM_THREADS": "many"}
    odd |= {"CUDA_VISIBLE_DEVICES": "none,-1", "HYDRA_FULL_ERROR": "0", "WORLD_SIZE": "1", "GIT_DIR": "/nowhere/.git"}
    command = [sys.executable, "-O", "-W", "error", "-m", "lpc_runner", *TINY]
    umask = os.umask(0o077)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**environment(), **odd}, check=False)
    finally:
        os.umask(umask)
    assert done.returncode == 0, done.stderr
    assert result_of(only_run())["status"] == "finished"
    assert (only_run() / "result.json").stat().st_mode & 0o077 == 0
