"""docs/extending.md: its files make parts of a user's own, its commands run, and its snippet reads the run."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot
import pytest
import torch
from conftest import TINY, cell_of, cells_of, environment, only_run, result_of, rows_of
from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydrasFiles
from hydra._internal.sources_registry import SourcesRegistry
from omegaconf import OmegaConf

import lpc_runner
from lpc_runner import testing
from lpc_runner.base.distributions import Gaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.moved import MOVED
from lpc_runner.base.ranks import Ranks
from lpc_runner.base.schema import accepted, declared
from lpc_runner.config.build import build, instantiate
from lpc_runner.config.compose import recompose_group
from lpc_runner.config.options import options_of
from lpc_runner.config.sources import FileConfigSource, variants_read
from lpc_runner.data.dataset import Batch
from lpc_runner.evaluate import main as evaluate
from lpc_runner.inference.context import Context
from lpc_runner.inference.interfaces import Part
from lpc_runner.inference.objectives import ImportanceWeighted, WeightedKL
from lpc_runner.inference.preconditioning import Identity
from lpc_runner.inference.samplers import Langevin, NoSteps
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.dense import MLP
from lpc_runner.runner.plan import plan
from lpc_runner.sample import main as sample
from lpc_runner.training.learner import AdamOptimizer, Learner
from lpc_runner.training.update import UpdateNoise

OWN = ("dataset", "model", "model.likelihood", "step_size", "objective")
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
EXAMPLES = Path(__file__).parents[1] / "examples"
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
    check, run, sweep, renyi = commands(page)
    answer = command(*check, *SMALL)
    assert answer.code == 0 and "1 runs (0 done, 0 resume, 1 new)" in answer.out, answer.err
    answer = command(*run, *SMALL)
    assert answer.code == 0, answer.err
    done = only_run()
    cfg = OmegaConf.load(done / "config.yaml")
    names = [OmegaConf.select(cfg, group)._target_ for group in OWN]
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

    answer = command(*renyi, *SMALL)
    assert answer.code == 0 and "1 new" in answer.out, answer.err
    answer = command(*renyi, *SMALL, "objective.alpha=1.0")
    assert answer.lines == ["lpc_runner: objective.alpha must not be 1: the limit is objective=reverse"]


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
    (workplace / "broken.py").write_text(
        f"import torch\nfrom lpc_runner.base.likelihoods import Independent\n\n{source}\n"
    )
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
    assert answer.lines == ["lpc_runner: model._target_=mine.OneLayer lacks what its base class asks for: predict"]


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


def test_the_pages_parts_keep_their_contracts(page):
    import mine

    testing.check_step_size(mine.Halving(0.1, 5))
    for objective in (mine.Tilted(0.25), mine.Renyi(0.5, 3), mine.Renyi(2.0, 3)):
        testing.check_objective(objective)
    (text,) = re.findall(r"```python\n(class Common:.*?)```", page, re.S)
    found: dict = {}
    exec(text, found)
    testing.check_preconditioner(found["Common"](0.1))


def gradients_of(objective):
    """θ's and φ's, of a small model and a batch of four."""
    torch.manual_seed(0)
    model = MLP((1, 2, 3), 4, 1.0, Gaussian("learned", 0.5, 0.9), 0.3, [5]).double()
    batch = Batch(torch.randn(4, 1, 2, 3).double(), torch.arange(4))
    noise = UpdateNoise(0, 0, (4, 4), "cpu", torch.float64)
    found = objective.gradients(Context(model, model.build_encoder().double(), NoSteps(None, None), batch, noise))
    return [*found.theta, *found.phi]


def test_the_pages_renyi_bound_is_the_importance_bound_at_alpha_0(page):
    """And at K = 1 that of any α: w^(1-α) to the power 1/(1-α)."""
    import mine

    torch.testing.assert_close(gradients_of(mine.Renyi(0.0, 5)), gradients_of(ImportanceWeighted(5)))
    torch.testing.assert_close(gradients_of(mine.Renyi(0.7, 1)), gradients_of(ImportanceWeighted(1)))
    other = gradients_of(mine.Renyi(0.7, 5))
    assert max(float((a - b).abs().max()) for a, b in zip(other, gradients_of(ImportanceWeighted(5)))) > 1e-3


# Contracts ------------------------------------------------------------------------------------------------

GROUPS = ("step_size", "preconditioning", "sampler", "objective")
OPTIONS = [(group, name) for group in GROUPS for name in options_of(group)]


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_keeps_its_groups_contract(group, option):
    part = instantiate(OmegaConf.to_container(recompose_group(group, option), resolve=True), group, [])
    if group == "sampler":
        part = part(step_size=Constant(0.01), preconditioner=Identity())
    if group == "step_size":
        part = part(**accepted(part.func, {"updates_per_epoch": 10}))
    names = getattr(part, "values", ("first", "second"))
    blocks = dict(zip(names, (slice(0, 2), slice(2, 6)), strict=True))
    declared(part, Part, "bind")(SimpleNamespace(blocks=blocks), torch.device("cpu"))
    check = {"preconditioning": testing.check_preconditioner}.get(group) or getattr(testing, f"check_{group}")
    check(part)


@pytest.mark.parametrize("option", options_of("tracker"))
def test_every_tracker_keeps_its_contract(option, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    part = instantiate(OmegaConf.to_container(recompose_group("tracker", option), resolve=True), "tracker", [])
    testing.check_tracker(part.func, **part.keywords)


class Own:
    """As little as each protocol asks for, with what is wrong about it."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, t):
        return self.function(t)

    def init(self, z, q=None):
        return None

    def update(self, state, drift, t):
        self.calls += 1
        return state, self.function(drift)

    def gradients(self, context):
        return self.function(context)


def wrong_objective(change):
    """Reverse KL without a chain, its result changed."""

    def gradients(context):
        found = WeightedKL(0.0, 1.0).gradients(context)
        change(context, found)
        return found

    return Own(gradients)


def add_batch_size(context, found):
    found.theta = [gradient * len(context.batch.x) for gradient in found.theta]


def set_grad(context, found):
    context.phi[0].grad = found.phi[0]


def lose_one(context, found):
    found.phi = found.phi[1:]


def name_a_float(context, found):
    found.scalars["train/mine"] = 1.0


def said_constant(part):
    part.constant_along_chain = True
    return part


WRONG = [
    ("step_size", Own(lambda t: 0.1 - t), "γ\\(1\\) is -0.9"),
    ("step_size", Own(lambda t: torch.ones(6, 1)), "has the shape"),
    ("step_size", Own(lambda t: 0.1 if isinstance(t, int) else 0.2), "of an integer and of a tensor differ"),
    ("step_size", object(), "no __call__"),
    ("step_size", said_constant(Own(lambda t: 0.1 / t)), "not γ\\(1\\), constant_along_chain"),
    ("preconditioner", said_constant(Own(lambda drift: 1 / (drift.abs() + 1))), "not that of step 1, constant_along"),
    ("preconditioner", Own(lambda drift: -1.0), "not positive"),
    ("preconditioner", Own(lambda drift: drift.square().mean(0)), "depend on one another"),
    ("preconditioner", Own(lambda drift: 1 + torch.arange(len(drift))[:, None]), "depend on one another"),
    ("preconditioner", object(), "no init and no update"),
    ("objective", wrong_objective(add_batch_size), "mean of its halves"),
    ("objective", wrong_objective(set_grad), "learner's to do"),
    ("objective", wrong_objective(lose_one), "one tensor for every parameter"),
    ("objective", wrong_objective(name_a_float), "not a 0-d tensor"),
    ("objective", object(), "no gradients"),
    ("tracker", object, "no log"),
]


@pytest.mark.parametrize("what, part, says", WRONG)
def test_a_broken_contract_is_named(what, part, says):
    with pytest.raises((AssertionError, UserError), match=says):
        getattr(testing, f"check_{what}")(part)


def test_a_part_that_keeps_a_state_of_its_own_is_found():
    part = Own(lambda drift: 1.0 + part.calls)
    with pytest.raises(AssertionError, match="of step 1"):
        testing.check_preconditioner(part)


# What is refused, and what need not be written -------------------------------------------------------------


def write_own(workplace, monkeypatch, code: str, **options: str) -> None:
    """own_parts.py, and own/<group>/mine.yaml of every group."""
    (workplace / "own_parts.py").write_text(code)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    for group, text in options.items():
        path = workplace / "own" / group / "mine.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)


TRACKER = """
class Mine:
    def __init__(self, file, folder, name):
        self.path, self.name = folder / file, name

    def log(self, update, epoch, values):
        with self.path.open("a") as out:
            print(self.name, update, file=out)
"""


@pytest.mark.parametrize("partial", ["", "_partial_: true\n", "_partial_: false\n"])
def test_a_tracker_of_ones_own_works_whatever_its_file_says_of_partial(partial, workplace, command, monkeypatch):
    """It has `log` alone, and takes of the run's facts what it names."""
    write_own(workplace, monkeypatch, TRACKER, tracker=f"_target_: own_parts.Mine\nfile: mine.txt\n{partial}")
    words = [word for word in TINY if not word.startswith("tracker=")]
    if partial:
        answer = command("--config-dir", "own", *words, "tracker=mine", "check=true")
        assert answer.code == 0, answer.err
        return
    answer = command("--config-dir", "own", *words, "tracker=mine")
    assert answer.code == 0 and "failed" not in answer.err, answer.err
    run = only_run()
    assert (run / "mine.txt").read_text().startswith(f"{run.name} 1\n{run.name} 2\n")


PARTS = """
from lpc_runner.models.dense import MLP
from lpc_runner.inference.interfaces import Preconditioner

class Deep(MLP):
    pass

class Silent:
    def __init__(self):
        pass
    def init(self, z, q=None):
        return None
    def update(self, state, drift, t):
        return state, 1 / (drift.abs().mean(0) + 1)

class Half(Preconditioner):
    def init(self, z, q=None):
        return None

class Neither:
    def __init__(self):
        pass

class Alone:
    def __init__(self, num_steps):
        self.num_steps = num_steps
    init = step = lambda self, *rest: None
"""
DEEP = (
    "defaults:\n  - likelihood: discretised_gaussian\n  - _self_\n_target_: own_parts.Deep\nlatent_dim: 4\n"
    "prior_scale: 1.0\nvariance_beta: 0.3\nhidden: [8]\n"
)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"model": DEEP}, None),
        (
            {"model": DEEP.replace("latent_dim: 4\n", "")},
            "model.latent_dim has no value: the option's YAML",
        ),
        ({"model": DEEP + "data_shape: [1, 8, 8]\n"}, "model.data_shape is given when a run is built"),
        ({"preconditioning": "_target_: own_parts.Silent\n_partial_: true\n"}, None),
        (
            {"preconditioning": "_target_: own_parts.Half\n"},
            "lacks what its base class asks for: update",
        ),
        ({"preconditioning": "_target_: own_parts.Neither\n"}, "preconditioning=mine has no init and no update"),
        ({"objective": "_target_: own_parts.Neither\n"}, "objective=mine has no gradients"),
        ({"tracker": "_target_: own_parts.Neither\n"}, "tracker=mine has no log"),
        ({"sampler": "_target_: own_parts.Alone\nnum_steps: 3\n"}, "must take step_size and preconditioner"),
    ],
)
def test_a_class_that_does_not_fit_is_one_true_line(options, says, workplace, monkeypatch):
    write_own(workplace, monkeypatch, PARTS, **options)
    words = "device=cpu", "tracker=none", *(f"{group}=mine" for group in options)
    cell = cell_of("--config-dir", "own", *words)
    if says is None:
        build(cell.cfg, cell.choices)
    else:
        with pytest.raises(UserError, match=says):
            build(cell.cfg, cell.choices)


def test_a_silent_coupling_is_refused_on_several_ranks_alone(workplace, monkeypatch):
    write_own(workplace, monkeypatch, PARTS)
    cell = cell_of(*TINY, "preconditioning=none", "preconditioning._target_=own_parts.Silent")
    plan(cell)
    with pytest.raises(UserError, match="depend on one another in Langevin with Silent"):
        plan(cell, Ranks(0, 2, 0))
    for option in options_of("preconditioning"):
        plan(cell_of(*TINY, f"preconditioning={option}"), Ranks(0, 2, 0))


class Counting(Constant):
    """A step size that counts updates, and takes a mean from the chain."""

    seen, heard = 0, None

    def contribution(self, chain):
        return {"first": chain.first[0].mean(), "vector": chain.z.mean(0)}

    def observe(self, averaged):
        self.seen, self.heard = self.seen + 1, averaged

    def scalars(self):
        return {"chain/mine": self.heard["first"]}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_part_of_the_chain_learns_between_updates_once_each():
    """What it takes is averaged with the gradients; an update that is not finite is not told."""
    sizes = Counting(0.01)
    learner = learner_of(Langevin(3, "all", sizes, Identity()))
    batch = Batch(torch.randn(4, 1, 2, 3), torch.arange(4))
    for update in range(2):
        gradients = learner.gradients(batch, 0, update, False)
        assert sizes.seen == update
        learner.apply(batch, gradients)
    assert sizes.seen == 2 and set(learner.state_dict()) == {"model", "theta_optimizer", "step_size"}
    torch.testing.assert_close(gradients.scalars["chain/mine"], gradients.scalars["train/log_joint"])
    torch.testing.assert_close(sizes.heard["vector"], gradients.z.mean(0))
    sizes.contribution = lambda chain: {"first": torch.tensor(torch.inf), "vector": chain.z.mean(0)}
    assert not learner.gradients(batch, 0, 2, False).finite
    other = learner_of(Langevin(3, "all", Counting(0.01), Identity()))
    other.load_state_dict(learner.state_dict())
    assert other.sampler.step_size.seen == 2


def learner_of(sampler):
    model = MLP((1, 2, 3), 4, 1.0, Gaussian("learned", 0.5, 0.9), 0.3, [5])
    return Learner(model, None, sampler, WeightedKL(0.0, 0.0), AdamOptimizer(1e-3, [0.9, 0.999], 1e-8))


class Learning(NoSteps):
    """A sampler with a state of its own."""

    seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_samplers_state_is_in_the_checkpoint():
    learners = [learner_of(sampler) for sampler in (Learning(None, None), Learning(None, None), NoSteps(None, None))]
    learners[0].sampler.seen = 7
    learners[1].load_state_dict(learners[0].state_dict())
    assert learners[1].sampler.seen == 7
    assert set(learners[2].state_dict()) == {"model", "theta_optimizer"}  # as before: old checkpoints load


HEADER = b"# @package _global_\n"
# What lies in own/experiment/mine.yaml, and what the line says besides its name.
MISREAD = {
    "byte order mark": (b"\xef\xbb\xbf" + HEADER + b"seed: 1\n", "line 1: begins with a byte order mark"),
    "UTF-16": ("# @package _global_\nseed: 1\n".encode("utf-16"), "line 1: begins with a byte order mark"),
    "Latin-1": (HEADER + b"# f\xfcr mich\nseed: 1\n", "line 2: not UTF-8 (byte 0xfc)"),
    "tab": (HEADER + b"trainer:\n\tmax_updates: 2\n", "line 3: found character '\\t'"),
    "key twice": (
        HEADER + b"trainer:\n  max_updates: 2\n  max_updates: 3\n",
        "line 4: found duplicate key max_updates",
    ),
    "control character": (HEADER + b"seed: 1\nstudy: a\x07\n", "line 3: a character that YAML does not allow (U+0007)"),
    "indentation": (
        HEADER + b"trainer:\n  max_updates: 2\n   log_every: 3\n",
        "line 4: mapping values",
    ),
    "too little indentation": (HEADER + b"seed: 1\ntrainer:\nmax_updates: 2\n", "line 3: trainer holds nothing"),
    "no indentation": (HEADER + b"seed: 1\nmax_updates: 2\n", "line 3: unknown key max_updates", "trainer.max_updates"),
    "unclosed": (HEADER + b"optimizer:\n  betas: [0.9, 0.99\n", "line 4: expected ',' or ']'"),
    "empty": (b"", "is empty"),
    "blank": (b"\r\n \n", "is empty"),
    "a word": (HEADER + b"seed 1\n", "line 2: no mapping (key: value)"),
    "a list": (b"- seed: 1\n", "line 1: no mapping (key: value)"),
    "no package": (b"trainer:\n  max_updates: 2\n", "line 1: the first line must be `# @package _global_`"),
    "package second": (b"# mine\n" + HEADER + b"seed: 1\n", "line 2: `# @package` counts in the first line only"),
    "package with a word too many": (b"# @package _global_ mine\nseed: 1\n", "line 1: Too many components"),
    "variants without names": (HEADER + b"variants: fig4\n", "line 2: below variants stand names"),
    "a variant of nothing": (HEADER + b"seed: 1\nvariants:\n  mine_2:\n", "line 3: mine_2 holds nothing"),
    "an unknown key of a variant": (
        HEADER + b"variants:\n  mine_2:\n    max_updates: 2\n",
        "line 2: mine_2: unknown key max_updates",
    ),
    "an option as a value": (HEADER + b"dataset: lds\n", "line 2:", "`- override /dataset: lds`"),
}


@pytest.mark.parametrize("content, says", [(row[0], row[1:]) for row in MISREAD.values()], ids=MISREAD)
def test_a_file_that_hydra_would_misread_is_named_with_its_line(content, says, workplace, command):
    path = own_file("experiment/mine", content)
    answer = command("--config-dir=own", "experiment=mine", "tracker=none")
    assert answer.code == 1 and len(answer.lines) == 1, answer.err
    for fragment in (str(path), *says):
        assert fragment in answer.err
    assert [path.name for path in workplace.iterdir()] == ["own"]


def own_file(name: str, content: bytes) -> Path:
    path = Path(f"own/{name}.yaml").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_files_as_other_editors_leave_them_are_read(workplace):
    own_file("experiment/crlf", b"# @package _global_\r\nseed: 3\r\ntrainer:\r\n  max_updates: 2\r\n")
    own_file("experiment/plain", "# @package _global_\n# für γ\nstudy: 実験\nhydra:\n  mode: RUN".encode())
    own_file("experiment/nothing", b"# @package _global_\n# the groups as they stand\n")
    own_file("objective/mine", b"defaults:\n  - jeffreys\n")
    own_file("experiment/broken", b"\t")  # nobody asked for it
    cells = [cell_of("--config-dir=own", f"experiment={name}") for name in ("crlf", "plain", "nothing")]
    assert [cell.cfg.seed for cell in cells] == [3, 0, 0] and cells[0].cfg.trainer.max_updates == 2
    assert cells[1].cfg.study == "実験"
    assert cell_of("--config-dir=own", "objective=mine").choices["objective"] == "mine"


def test_a_group_s_file_that_names_its_group_must_be_global(workplace):
    own_file("dataset/mine", b"dataset:\n  _target_: lpc_runner.data.digits.Digits\n")
    with pytest.raises(UserError, match=r"mine.yaml, line 1: the first line must be `# @package _global_`"):
        cell_of("--config-dir=own", "dataset=mine")


def test_an_option_of_the_package_is_not_replaced_in_silence(workplace):
    own_file("dataset/digits", b"# @package _global_\ndataset:\n  _target_: mine.Digits\n")
    with pytest.raises(UserError, match=r"digits.yaml: dataset=digits is an option of the package"):
        cell_of("--config-dir=own")


SWEEP = b"hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\n"
SECTION = b"""
    defaults: [small, override /objective: reverse]
    dataset:
      binarise: static
    hydra: {sweeper: {params: {seed: '3,4'}}}
"""
TWIN = b"defaults:\n  - mine\n  - small\n  - _self_\n  - override /objective: reverse\nstudy: mine_small\ndataset:\n"
TWIN += b"  binarise: static\nhydra:\n  sweeper:\n    params:\n      seed: 3,4\n"


def test_a_variant_is_what_a_file_of_its_own_would_be(workplace, command):
    own_file("experiment/mine", HEADER + b"study: mine\n" + SWEEP + b"variants:\n  mine_small:" + SECTION)
    own_file("method/short", HEADER + b"trainer:\n  max_updates: 7\nvariants:\n  short_7:\n    rerun: 1\n")
    own_file("experiment/built_on", HEADER + b"defaults:\n  - fig4_small\n  - _self_\nstudy: built_on\n")
    words = ("--config-dir=own", "experiment=mine_small", "method=short")
    variants = cells_of(*words)
    assert [cell.cfg.seed for cell in variants] == [3, 4] and variants[0].cfg.study == "mine_small"
    assert [cell.cfg.seed for cell in cells_of("--config-dir=own", "experiment=mine")] == [0, 1]
    assert cell_of("--config-dir=own", "method=short_7").cfg.rerun == 1
    one = cell_of("--config-dir=own", "experiment=built_on", "method=vae", "step_size.value=0.1")
    assert one.cfg.study == "built_on" and one.choices["model"] == "mlp"
    matched = cells_of("-m", "experiment=glob([fig1*])", "dataset=digits", "seed=0")
    assert [cell.cfg.study for cell in matched] == ["fig1", "fig1_small"]
    answer = command("--config-dir=own", "method=short_7", "--cfg=job")  # composed by Hydra, as a run's job is
    assert answer.code == 0 and "max_updates: 7" in answer.out and "rerun: 1" in answer.out
    own_file("experiment/mine_small", HEADER + TWIN)  # a file goes before a variant
    assert cells_of(*words) == variants


def test_a_worker_may_register_hydras_own_class_where_variants_are_read():
    """A launcher's worker takes this registry over, and then registers Hydra's plugins."""
    with variants_read():
        SourcesRegistry.instance().register(HydrasFiles)
        assert SourcesRegistry.instance().resolve("file") is FileConfigSource
    assert SourcesRegistry.instance().resolve("file") is not FileConfigSource


@pytest.mark.parametrize("name", ["experiment/fig4_small", "method/vae_lr_1e-3"])
def test_a_variant_of_the_package_is_not_replaced_in_silence(name, workplace):
    own_file(name, HEADER + b"seed: 3\n")
    with pytest.raises(UserError, match="is an option of the package, which is taken"):
        cells_of("--config-dir=own", name.replace("/", "="))


@pytest.mark.parametrize("folder", ["own 'quoted' (1)", "ö=[x],{y}", "a${b}"])
def test_the_folder_s_own_name_may_have_any_characters(folder, workplace):
    own_file("experiment/mine", HEADER + b"seed: 3\n").parents[1].rename(folder)
    assert cell_of("--config-dir", folder, "experiment=mine").cfg.seed == 3


@pytest.mark.parametrize("old, new", MOVED.items())
def test_a_module_that_moved_is_found_under_its_old_name(old, new, monkeypatch):
    """One module under both names, so that classes are the same and `isinstance` holds."""
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(new) and found.__name__ == new


def with_values(text: str, **values: object) -> str:
    """An example with its variables given other values, to be short: A, B = 1, 2."""
    for name, value in values.items():
        line = re.search(rf"^[A-Z_, ]*\b{name}\b[A-Z_, ]* = .*$", text, re.MULTILINE)[0]
        names, old = line.split(" = ")
        new = list(ast.literal_eval(f"[{old}]"))
        new[names.split(", ").index(name)] = value
        text = text.replace(line, f"{names} = {', '.join(map(repr, new))}")
    return text


def test_a_loop_of_ones_own_trains_the_weights_of_the_run(workplace):
    found: dict = {}
    text = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8")
    exec(with_values(text, NUM_EPOCHS=1, NUM_STEPS=2, LATENT_DIM=3, HIDDEN=[8]), found)
    small = [word for word in TINY if word.startswith(("device", "tracker", "num_threads", "metrics.", "model="))]
    own = [
        "method=lpc_jeffreys",
        "model.hidden=[8]",
        "model.latent_dim=3",
        "sampler.num_steps=2",
        "trainer.num_epochs=1",
    ]
    run = lpc_runner.run([*small, *own, "traces.updates=[]", "traces.num_chains=0"]).load()
    assert run.update == found["update"] + 1 == 22
    for part, trained in ((run.model, found["model"]), (run.encoder, found["encoder"])):
        assert all(torch.equal(part.state_dict()[name], value) for name, value in trained.state_dict().items())


def test_the_notebook_runs(workplace, monkeypatch, capsys):
    """From install to figures, with fewer updates and samples; its cells are kept without results."""
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    plt = matplotlib.pyplot
    plt.close("all")
    cells = [
        cell for cell in json.loads((EXAMPLES / "digits.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    names: dict = {}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        text = "".join(cell["source"])
        exec(with_values(text, UPDATES=3, SAMPLES=40) if number == 0 else text, names)
    assert len(plt.get_fignums()) == 2 + len([path for path in names["paths"] if path.suffix == ".png"]) > 4
    plt.close("all")
    assert [run.result["num_updates"] for run in names["runs"]] == [3, 3] and names["runs"][0] == names["run"]
    assert "Shared by all: model mlp" in capsys.readouterr().out
