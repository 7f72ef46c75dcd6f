"""docs/extending.md: its files make parts of a user's own, its commands run, and its snippet reads the run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment, only_run, result_of, rows_of
from omegaconf import OmegaConf

from lpc_runner.evaluate import main as evaluate
from lpc_runner.sample import main as sample

GROUPS = ("dataset", "model", "model.likelihood", "step_size", "objective")
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
SMALL = ("device=cpu", "tracker=none", "num_threads=1", "trainer.max_updates=3", "metrics.num_samples=40")


@pytest.fixture
def page(workplace, monkeypatch):
    """The page, its files written beside the command, as it says."""
    text = PAGE.read_text()
    for name, content in re.findall(
        r"^`([\w/]+\.(?:py|yaml))`[^\n]*(?:\n[^\n`]+)*\n\n```\w+\n(.*?)```", text, re.M | re.S
    ):
        path = workplace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(str(workplace))
    return text


def commands(text: str) -> list[list[str]]:
    return [line.split()[3:] for line in re.findall(r"^python -m lpc_runner .*$", text, re.M)]


def test_the_page_is_a_run_of_ones_own_parts(page, command):
    check, run, sweep = commands(page)
    answer = command(*check, *SMALL)
    assert answer.code == 0 and "1 runs (0 done, 0 resume, 1 new)" in answer.out, answer.err
    answer = command(*run, *SMALL)
    assert answer.code == 0, answer.err
    done = only_run()
    cfg = OmegaConf.load(done / "config.yaml")
    names = [OmegaConf.select(cfg, group)._target_ for group in GROUPS]
    assert names == ["mine.Stripes", "mine.OneLayer", "mine.Laplace", "mine.Halving", "mine.Tilted"]
    result = result_of(done)
    assert result["status"] == "finished" and 0.4 < result["metrics"]["laplace_scale"] < 0.6
    assert not {"sigma", "bits_per_dim"} & set(result["metrics"])
    assert all("train/laplace_scale" in row for row in rows_of(done) if "train/log_joint" in row)
    assert command(str(done), entry=evaluate).code == command(str(done), "--num", "9", entry=sample).code == 0

    answer = command(*check, *SMALL, "model.width=0")
    assert answer.lines == ["lpc_runner: model.width must be an integer of at least 1, got 0"]
    answer = command(*check, *SMALL, "objective.share=1.5")
    assert answer.code == 1 and answer.err.endswith("share must be below 1, got 1.5\n") and len(answer.lines) == 1

    (snippet,) = re.findall(r"```python\n(import lpc_runner.*?)```", page, re.S)
    found: dict = {}
    exec(snippet.replace("outputs/default/RUN", str(done)), found)
    assert found["q"].mean.shape == (4, 8) and found["images"].shape == found["samples"].shape == (4, 1, 16, 16)
    assert found["log_joint"].shape == (4,) and bool(torch.isfinite(found["log_joint"]).all())

    answer = command(*sweep, *SMALL)
    assert answer.code == 0 and "run 1: " in answer.err and "run 2: " in answer.err
    assert len(list(Path("outputs/default").iterdir())) == 3


SQUARED = "class Broken(Independent):\n    density = lambda self, x, predictor: -(x - predictor) ** 2\n"
BROKEN = {
    "no module": ("class Broken:\n    pass", "Broken must be a torch.nn.Module"),
    "lacking": ("class Broken(torch.nn.Module):\n    data_kinds = ('images',)", "Broken lacks num_levels, "),
    "no sum": (
        "class Broken(Independent):\n    def forward(self, x, predictor):\n        return -(x - predictor) ** 2",
        "Broken must give log p(x | η) of shape (2,) for a batch of 2, differentiable, got (2, 1, 16, 16)",
    ),
    "flat means": (
        f"{SQUARED}    mean = lambda self, predictor: predictor.flatten(1)",
        "Broken must give means of shape (2, 1, 16, 16) for η of that shape, got (2, 256)",
    ),
    "raising": ("class Broken(Independent):\n    pass", "Broken cannot be evaluated: NotImplementedError"),
    "observing": (
        f"{SQUARED}    observes = True\n    def observe(self, x):\n        pass",
        "Broken cannot be evaluated: TypeError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_likelihood_that_cannot_work_is_one_line_before_any_work(case, page, command, workplace, monkeypatch):
    source, says = BROKEN[case]
    (workplace / "broken.py").write_text(f"import torch\nfrom lpc_runner.likelihoods import Independent\n\n{source}\n")
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    (workplace / "own" / "model" / "likelihood" / "broken.yaml").write_text("_target_: broken.Broken\n")
    words = [word for word in commands(page)[1] if not word.startswith("model/likelihood")]
    answer = command(*words, *SMALL, "model/likelihood=broken")
    assert answer.code == 1 and len(answer.lines) == 1 and f"model/likelihood=broken: {says}" in answer.err, answer.err
    assert not Path("outputs").exists()


def test_a_model_that_lacks_a_method_is_one_line(page, command, workplace):
    mine = workplace / "mine.py"
    mine.write_text(mine.read_text().replace("def predict", "def decode"))
    sys.modules.pop("mine", None)
    answer = command(*commands(page)[0], *SMALL)
    sys.modules.pop("mine", None)
    assert answer.lines == ["lpc_runner: model._target_=mine.OneLayer lacks predict"]


def test_the_console_script_finds_classes_beside_the_command(page, workplace):
    script = Path(sys.executable).with_name("lpc-runner")
    given = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    words = [script, *commands(page)[0], *SMALL]
    done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 new" in done.stdout, done.stderr


def test_a_class_that_is_not_there_is_one_line_with_the_reason(page, command, workplace):
    (workplace / "own" / "model" / "one_layer.yaml").write_text(
        "defaults:\n  - likelihood: discretised_gaussian\n_target_: not_mine.OneLayer\n_partial_: true\n"
    )
    answer = command(*commands(page)[0], *SMALL)
    assert answer.code == 1 and len(answer.lines) == 1
    assert "model._target_=not_mine.OneLayer cannot be imported" in answer.err
    assert "No module named 'not_mine'" in answer.err
