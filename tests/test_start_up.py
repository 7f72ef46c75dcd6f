"""What a command imports before it names a mistake (help and --cfg: tests/test_config.py)."""

import json
import subprocess
import sys

import pytest
from conftest import environment

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
    but not torchvision or torch-fidelity."""
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
    loaded = next(line for line in done.stderr.splitlines() if line.startswith("loaded:")).removeprefix("loaded: ")
    assert set(json.loads(loaded.replace("'", '"'))) <= set(allowed)
    assert says in done.stdout + done.stderr
