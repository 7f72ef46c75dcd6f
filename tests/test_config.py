"""Configurations: every option fits its class, means what the paper says, and gives a run its name."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import reuse
from conftest import RUNS, TINY, cell_of, cells_of, compose_cells, environment, plan_of, result_of, write_images
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image
from series import config_dir

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import PositiveInt, accepted, checked, hints_of, required_by
from lpc_runner.config import classes
from lpc_runner.config.build import GIVEN_LATER, build
from lpc_runner.config.identity import flat_keys, run_hash
from lpc_runner.config.options import CONF_DIR

FILES = {
    (path.parent.relative_to(CONF_DIR).as_posix(), path.stem): OmegaConf.to_container(OmegaConf.load(path))
    for path in CONF_DIR.rglob("*.yaml")
    if path.parent != CONF_DIR and "hydra" not in path.relative_to(CONF_DIR).parts
}
VARIANTS = {(group, name): file for (group, _), file in FILES.items() for name in file.get("variants", ())}
OPTIONS = sorted([*FILES, *VARIANTS])
STUDIES = ("experiment", "method")
# What an option does not go without.
BESIDE = {
    ("sampler", "none"): ("objective=reverse",),
    ("objective", "iwae"): ("sampler=none",),
    ("model/likelihood", "gaussian"): ("model=mlp",),
    ("model/likelihood", "discretised_gaussian"): ("model=mlp",),
    ("model/likelihood", "poisson"): ("model=lfads", "dataset=test_spikes"),
    ("model", "factor_analysis"): ("dataset=test_spikes",),
    ("model", "lds"): ("dataset=test_series",),
    ("model", "lfads"): ("dataset=test_spikes",),
    ("model", "nonlinear"): ("dataset=test_spikes",),
    ("model", "poisson_lds"): ("dataset=test_spikes",),
    ("sampler", "hmc"): ("preconditioning=none",),
    ("sampler", "mala"): ("preconditioning=none",),
    ("step_size", "blocks"): ("model=lfads", "dataset=test_spikes"),
    ("step_size", "levels"): ("model=hierarchical",),
    ("method", "lpc_top_down"): ("model=hierarchical",),
    ("method", "vae_top_down"): ("model=hierarchical",),
    ("metrics", "sequences"): ("model=lfads", "dataset=test_spikes"),
    ("method", "vem"): ("model=lfads", "dataset=test_spikes"),
    ("experiment", "samplers_frozen"): ("trainer.init_from=RUN",),
    ("experiment", "samplers_frozen_small"): ("trainer.init_from=RUN",),
}
# Files of a user that an option does not go without.
NEEDS = {
    ("dataset", "arrays"): ("dataset.train={data}/images.npz",),
    ("dataset", "image_folder"): ("dataset.path={data}/pictures",),
    ("dataset", "spikes"): ("dataset.path={data}/spikes.npz",),
    ("dataset", "series"): ("dataset.path={data}/series.npz",),
}
# Every option's hash since it came: whoever has such a run finds it again. A new option adds its line.
HASHES = json.loads((Path(__file__).parent / "fixtures" / "hashes.json").read_text())
# Given by the run at the start, beside what a partial must wait for.
RUNTIME = {"resume_step", "more_tags"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten images as an .npz and as a folder, sequences of both kinds."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images.npz", count=10)
    counts = np.ones((40, 6, 5), np.uint8)
    np.savez(folder / "spikes.npz", train_spikes=counts, valid_spikes=counts)
    np.savez(folder / "series.npz", train_series=counts, valid_series=counts)
    (folder / "pictures").mkdir()
    for number in range(4):
        Image.fromarray(np.full((70, 80, 3), 60 * number, np.uint8)).save(folder / f"pictures/{number}.png")
    return folder


def beside(group: str, option: str, data: Path) -> tuple[str, ...]:
    needs = [item.format(data=data) for item in NEEDS.get((group, option), ())]
    found = (*BESIDE.get((group, option), ()), *needs)
    return (config_dir(data / "config"), *found) if any("=test_" in item for item in found) else found


@functools.cache
def cells_with(group: str, option: str, data: Path, *more: str):
    # What digits trains without a word on the method is no part of what an option of another group is.
    apart = () if group in (*STUDIES, "dataset") else ("method=none",)
    return compose_cells(*beside(group, option, data), *apart, f"{group}={option}", *more)


def narrowed(group: str, option: str) -> list[str]:
    """The first of a study's seeds, and of its datasets, which are options of their own; of a variant, two methods."""
    if group not in STUDIES:
        return []
    sweep = sweep_of(FILES.get((group, option)))
    words = [f"dataset={sweep['dataset'].split(',')[0]}"] if "dataset" in sweep else []
    if file := VARIANTS.get((group, option)):
        methods = {**sweep_of(file), **sweep_of(file["variants"][option])}.get("method", "").split(",")
        words += [f"method={methods[0]},{methods[-1]}"] if len(methods) > 2 else []
    return ["seed=0", *words]


def sweep_of(file: dict | None) -> dict[str, str]:
    return (file or {}).get("hydra", {}).get("sweeper", {}).get("params", {})


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_composes_and_builds(group, option, data, workplace):
    """With the first seed, and of the cells that choose the same options the first: the others differ in values.

    Of a variant's methods the first and the last: those between are built with the file that it is a variant of.
    """
    cells = cells_with(group, option, data, *narrowed(group, option))
    assert len(cells) == 1 or group in STUDIES
    firsts = {}
    for cell in cells:
        firsts.setdefault(str(cell.choices), cell)
    check_cells(group, option, data, list(firsts.values()))


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "experiment"])
def test_every_cell_of_an_experiment_composes_and_builds(option, data, workplace):
    check_cells("experiment", option, data, cells_with("experiment", option, data))


def check_cells(group: str, option: str, data: Path, cells: list) -> None:
    """Each is a cell of that option, and builds."""
    frozen = f"{group}={option}"
    for cell in cells:
        assert cell.choices[group] == option
        experiment = build(cell.cfg, cell.choices)
        assert experiment.sampler.num_steps == cell.cfg.sampler.get("num_steps", 0)
        blocks = experiment.model.blocks
        sizes = [block.stop - block.start for block in blocks.values()] if blocks else [cell.cfg.model.latent_dim]
        assert experiment.model.latent_dim == sum(sizes)
        if cell is cells[0]:
            # Files of a user have no hash that could be written down here.
            files = (group, option) in NEEDS or any("=test_" in item for item in beside(group, option, data))
            digest = run_hash(cell, {"files": "of the user"} if files else experiment.dataset.identity())
            assert HASHES.get(frozen) == digest, f'tests/fixtures/hashes.json lacks "{frozen}": "{digest}"'


def test_every_option_that_ever_was_is_one_of_a_file_or_a_variant():
    """Users' notes and run.json name them: no word is lost, and none stands in two places."""
    assert {f"{group}={option}" for group, option in OPTIONS} == set(HASHES) and len(set(OPTIONS)) == len(OPTIONS)


@pytest.mark.parametrize("option", [option for group, option in FILES if group == "dataset"])
def test_a_datasets_header_says_what_else_it_chooses(option):
    file = FILES["dataset", option]
    words = [
        f"{key.removeprefix('override /')}={value}" for item in file.get("defaults", ()) for key, value in item.items()
    ]
    others = {group: node for group, node in file.items() if group not in ("defaults", "dataset")}
    words += [f"{group}.{key}" for group, node in others.items() for key in node]
    text = (CONF_DIR / "dataset" / f"{option}.yaml").read_text(encoding="utf-8")
    header = " ".join(line.removeprefix("#").strip() for line in text.partition("\n\n")[0].splitlines())
    assert (f"Also chooses {', '.join(words)}." in header) if words else ("Also chooses" not in header)


@pytest.mark.parametrize("group, option", [pair for pair in OPTIONS if pair[0] not in (*STUDIES, "tuned")])
def test_yaml_keys_are_the_constructors_parameters(group, option, data, workplace):
    from hydra.utils import get_object

    (cell,) = cells_with(group, option, data)

    def compare(node, path):
        later = GIVEN_LATER.get(path, set()) | RUNTIME if node.get("_partial_") else set()
        given = set(node) - {"_target_", "_partial_"}
        hints = set(hints_of(get_object(classes.place_of(node["_target_"]))))
        assert given <= hints and hints - given <= later
        for key in given:
            if isinstance(node[key], dict) and "_target_" in node[key]:
                compare(node[key], f"{path}.{key}")

    path = group.replace("/", ".")
    compare(OmegaConf.to_container(OmegaConf.select(cell.cfg, path)), path)


class Base:
    @checked
    def __init__(self, size: PositiveInt, name: str = "a") -> None:
        self.size, self.name = size, name


class Between(Base):
    """No constructor of its own."""


class Wider(Between):
    @checked
    def __init__(self, *first: Any, width: PositiveInt, **shared: Any) -> None:
        super().__init__(*first, **shared)
        self.width = width


class Widest(Wider):
    def __init__(self, name: str | None, **shared):
        super().__init__(name=name or "b", **shared)


class Open:
    def __init__(self, size: int, **anything: Any) -> None:
        self.anything = anything


def test_a_constructor_that_passes_on_the_rest_has_its_bases_parameters_too():
    offered = {"size": 1, "width": 2, "name": "n", "other": 3}
    known = {name: value for name, value in offered.items() if name != "other"}
    assert hints_of(Wider) == {"size": PositiveInt, "name": str, "width": PositiveInt}
    assert hints_of(Widest) == hints_of(Wider) | {"name": str | None}
    assert required_by(Wider) == ["size", "width"] and required_by(Widest) == ["size", "name", "width"]
    assert accepted(Wider, offered) == accepted(Widest, offered) == known and Wider(1, width=2).size == 1
    with pytest.raises(ValueError, match=r"^size must be an integer of at least 1, got 0$"):
        Wider(size=0, width=1)
    assert accepted(Open, offered) == offered and hints_of(Open) == {"size": int}
    assert accepted(object, offered) == hints_of(object) == {}


def test_every_shipped_class_has_one_name_for_ever():
    """What a hash and a config.yaml say must not change when a file is moved: config/identity.py has a row for each."""
    from hydra.utils import get_object

    of_runs = (path for path in CONF_DIR.rglob("*.yaml") if "hydra" not in path.relative_to(CONF_DIR).parts)
    texts = [path.read_text() for path in of_runs]
    shipped = {target for text in texts for target in re.findall(r"_target_: (lpc_runner\S+)", text)}
    assert shipped and shipped == set(classes.PLACES.values()), "a class without a row, or a row without a class"
    assert len(shipped) == len(classes.PLACES)
    assert all(isinstance(get_object(place), type) for place in shipped)
    # An old path that another class has taken would name two.
    assert not {name for name, place in classes.PLACES.items() if name != place} & shipped
    written = re.findall(r"_target_: (lpc_runner\S+)", "".join(path.read_text() for path in RUNS.glob("*/config.yaml")))
    assert written and set(written) <= set(classes.PLACES)


def test_a_class_that_has_moved_leaves_the_run_what_it_is(tmp_path, workplace, monkeypatch):
    """Its file, its YAML's `_target_` and its row: then hash, config.yaml and what names the old path stay good."""
    old = "lpc_runner.inference.step_sizes.Constant"
    before = plan_of("method=none")
    (tmp_path / "moved.py").write_text(
        "import lpc_runner.inference.step_sizes as old\n\n\nclass Constant(old.Constant):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "step_size").mkdir()
    for name, target in (("new", "moved.Constant"), ("old", old)):
        (tmp_path / "step_size" / f"{name}.yaml").write_text(f"_target_: {target}\nvalue: ${{tuned.step_size}}\n")
    folder = f"--config-dir={tmp_path}"
    assert plan_of(folder, "step_size=new").digest != before.digest  # without a row it is another class
    monkeypatch.setitem(classes.PLACES, old, "moved.Constant")
    for option in ("new", "old"):
        after = plan_of(folder, f"step_size={option}")
        assert after.digest == before.digest and after.directory.path == before.directory.path
        assert after.cell.cfg.step_size == before.cell.cfg.step_size == {"_target_": old, "value": 0.1}
        assert type(after.experiment.sampler.step_size).__module__ == "moved"


def test_an_option_that_lacks_a_value_is_refused(tmp_path, workplace):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "half.yaml").write_text(
        "_target_: lpc_runner.training.learner.AdamOptimizer\nlearning_rate: 1.0e-3\neps: 1.0e-8\n"
    )
    cell = cell_of(f"--config-dir={tmp_path}", "optimizer=half")
    with pytest.raises(UserError, match=r"optimizer\.betas has no value"):
        build(cell.cfg, cell.choices)


def test_the_papers_run_has_the_papers_numbers():
    cell = cell_of("dataset=svhn", "objective=jeffreys")
    cfg = cell.cfg
    assert (cfg.sampler.num_steps, cfg.trainer.batch_size, cfg.trainer.num_epochs) == (300, 64, 15)
    assert (cfg.optimizer.learning_rate, cfg.trainer.num_prior_batches) == (1e-3, 50)
    assert (cfg.step_size.value, cell.choices["preconditioning"]) == (1e-3, "none")
    assert (cfg.metrics.extractor, cfg.metrics.num_samples, cfg.metrics.k) == ("inception", 50_000, 5)
    assert cfg.metrics.max_references is None and cfg.metrics.reference == "train"
    assert (cfg.objective.forward, cfg.objective.reverse) == (0.5, 0.5)


@pytest.mark.parametrize("dataset", ["cifar10", "celeba64"])
def test_the_other_datasets_have_their_tuned_values(dataset):
    cell = cell_of(f"dataset={dataset}")
    assert cell.choices["preconditioning"] == "adam"
    assert (cell.cfg.step_size.value, cell.cfg.preconditioning.beta) == (0.1, 0.25)
    assert (cell.cfg.sampler.num_steps, cell.cfg.optimizer.learning_rate) == (300, 1e-3)


@pytest.mark.parametrize("dataset, rate", [("svhn", 1e-3), ("cifar10", 1e-3), ("celeba64", 8e-4)])
def test_the_vae_has_its_own_tuned_values(dataset, rate):
    cell = cell_of(f"dataset={dataset}", "experiment=vae")
    assert (cell.cfg.optimizer.learning_rate, cell.cfg.trainer.num_epochs) == (rate, 50)
    assert cell.choices["sampler"] == "none" and cell.choices["objective"] == "reverse"
    assert "num_steps" not in cell.cfg.sampler


def test_the_command_line_beats_dataset_and_experiment():
    cell = cell_of("dataset=svhn", "preconditioning=adam_shared", "step_size.value=0.5")
    assert cell.choices["preconditioning"] == "adam_shared" and cell.cfg.step_size.value == 0.5
    assert cell_of("dataset=svhn", "experiment=vae", "trainer.num_epochs=3").cfg.trainer.num_epochs == 3


def test_what_changes_no_result_changes_no_hash(workplace):
    base = plan_of().digest
    for other in (
        "study=other",
        "device=cpu",
        "engine=eager",
        "tracker=none",
        "tracker.project=mine",
        "output_dir=elsewhere",
        "data_dir=elsewhere",
        "num_threads=1",
        "rerun=true",
        "rerun=2",
        "check=true",
        "trainer.checkpoint_seconds=5",
        "metrics.extractor=random_conv",
        "+tuned.unused=1",
    ):
        assert plan_of(other).digest == base, other


def test_what_changes_the_result_changes_the_hash(workplace):
    others = (
        "seed=1",
        "precision=bf16",
        "sampler.num_steps=11",
        "sampler=map",
        "sampler.theta_states=last",
        "step_size.value=0.2",
        "step_size=polynomial",
        "preconditioning=none",
        "preconditioning.beta=0.5",
        "objective=reverse",
        "trainer.max_updates=5",
        "model.likelihood.scale=fixed",
        "metrics.k=6",
        "dataset=mnist",
        "model=mlp",
        "model=mlp model.activation=tanh",
        "model/likelihood=bernoulli",
        "dataset.binarise=static",
        "dataset.binarise=static dataset.binarise_seed=1",
        "dataset.binarise=dynamic",
        "preconditioning=encoder",
        "preconditioning=encoder model.prior_scale=2",
    )
    digests = [plan_of("method=none", *other.split()).digest for other in ("", *others)]
    assert len(set(digests)) == len(digests)
    assert plan_of("method=none", "trainer.init_from=null").digest == digests[0]


# Of runs made before an option had all of its keys: what they computed then is what they compute now.
FIRST_HASHES = {
    "method=none": "4f4dab03b49f441027ba8c9704b88cf63f318e0bb69f7d9cf25d592d66a1659c",
    "method=none model=mlp": "cfeb40338afd148fe6221c7b343c6d46c7839519566f8bc77ff117c957ec205d",
    "preconditioning=encoder": "f35d001eef31ae1462dacd864d9001e441efc9acbd0c610c741fb4fd516027a3",
}


@pytest.mark.parametrize("words", FIRST_HASHES)
def test_keys_that_came_later_change_no_hash(words, workplace):
    assert plan_of(*words.split()).digest == FIRST_HASHES[words]
    assert plan_of(*words.split(), "dataset.binarise_seed=0").digest == FIRST_HASHES[words]


def test_the_encoders_preconditioner_is_capped_by_the_priors_variance(workplace):
    caps = [
        plan_of("preconditioning=encoder", *words).experiment.sampler.preconditioner.cap
        for words in ([], ["model.prior_scale=2.5"], ["model.prior_scale=2.5", "preconditioning.cap=0.5"])
    ]
    assert caps == [1.0, 6.25, 0.5]
    assert plan_of("dataset=lorenz").experiment.sampler.preconditioner.cap == 1.0


def test_data_files_count_by_content_not_by_path(tmp_path, workplace):
    first = write_images(tmp_path / "one.npz", count=12)
    (tmp_path / "sub").mkdir()
    moved = shutil.copy(first, tmp_path / "sub" / "two.npz")
    images = np.load(first)["images"]
    images[5, 0, 3, 4] ^= 1
    np.savez(tmp_path / "pixel.npz", images=images)
    digest = lambda *files: (
        plan_of("dataset=arrays", f"dataset.train=[{','.join(map(str, files))}]", "trainer.batch_size=8").digest
    )
    assert digest(first) == digest(moved)
    assert digest(first) != digest(tmp_path / "pixel.npz")
    assert digest(first, tmp_path / "pixel.npz") != digest(tmp_path / "pixel.npz", first)


def test_run_names_are_readable_and_safe(tmp_path, workplace):
    planned = plan_of("seed=-3", "preconditioning=adam")
    assert planned.directory.name == f"digits-conv-langevin-jeffreys-adam-s-3-{planned.digest[:10]}"
    (tmp_path / "dataset").mkdir()
    shutil.copy(CONF_DIR / "dataset" / "digits.yaml", tmp_path / "dataset" / "my, $(digits).yaml")
    name = plan_of(f"--config-dir={tmp_path}", "dataset='my, $(digits)'").directory.name
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name) and len(name) < 200
    assert plan_of().directory.path == Path("outputs/runs") / plan_of().directory.name


def test_a_sweep_is_the_product_of_its_values():
    cells = cells_of("-m", "seed=0,1,2", "objective=reverse,jeffreys", "step_size.value=0.5")
    found = [(cell.cfg.seed, cell.choices["objective"], cell.cfg.step_size.value) for cell in cells]
    assert found == [(s, o, 0.5) for s in (0, 1, 2) for o in ("reverse", "jeffreys")]
    assert cells[1].overrides == ("seed=0", "objective=jeffreys", "step_size.value=0.5")
    assert [cell.cfg.seed for cell in cells_of("-m", "seed=range(0,3)")] == [0, 1, 2]


@pytest.mark.parametrize(
    "word, values",
    [
        ("objective=glob(rev*)", ["reverse"]),
        ("objective=glob([j*,mine*])", ["jeffreys", "mine"]),
        ("objective=glob(*,exclude=[i*,prior,v*,m*])", ["forward", "jeffreys", "reverse"]),
        ("objective=choice(reverse,forward)", ["reverse", "forward"]),
        ("objective=sort(reverse,forward)", ["forward", "reverse"]),
        ("seed=range(1,7,2)", [1, 3, 5]),
        ("seed=sort(range(1,4),reverse=true)", [3, 2, 1]),
        ("step_size.value=range(0.25,1,0.25)", [0.25, 0.5, 0.75]),
    ],
)
def test_hydras_words_for_sweeps(word, values, workplace):
    """Options of one's own are among those that glob() finds."""
    Path("own/objective").mkdir(parents=True)
    Path("own/objective/mine.yaml").write_text("defaults:\n  - jeffreys\n")
    key = word.partition("=")[0]
    cells = cells_of("-m", word, "--config-dir=own")
    found = [cell.choices[key] if key in cell.choices else OmegaConf.select(cell.cfg, key) for cell in cells]
    assert found == values


def test_a_shuffled_sweep_runs_what_was_planned(command):
    """Hydra shuffles again when it runs the cells."""
    answer = command("-m", "seed=shuffle(range(4))", *TINY, "trainer.max_updates=1")
    assert answer.code == 0, answer.err
    assert {result_of(run)["status"] for run in Path("outputs/default").iterdir()} == {"finished"}
    assert len(list(Path("outputs/default").iterdir())) == 4


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """A user's --config-dir: an experiment that is a sweep, and a step size of his own."""
    folder = tmp_path / "own"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "grid.yaml").write_text(
        "# @package _global_\nstudy: grid\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      seed: 0,1\n      step_size.value: 0.1,0.2,0.4\n"
    )
    (folder / "step_size").mkdir()
    (folder / "step_size" / "halving.yaml").write_text("_target_: own_steps.Halving\nvalue: 0.5\n")
    (tmp_path / "own_steps.py").write_text(
        "from lpc_runner.base.schema import PositiveFloat, checked\n\n\nclass Halving:\n    @checked\n"
        "    def __init__(self, value: PositiveFloat) -> None:\n        self.value = value\n\n"
        "    def __call__(self, step: int) -> float:\n        return self.value / 2**step\n"
    )
    return folder


def test_an_experiment_may_be_a_sweep_and_be_narrowed(own_folder):
    grid = lambda *more: [
        (cell.cfg.seed, cell.cfg.step_size.value, cell.cfg.study)
        for cell in cells_of(f"--config-dir={own_folder}", "experiment=grid", *more)
    ]
    assert grid() == [(s, v, "grid") for s in (0, 1) for v in (0.1, 0.2, 0.4)]
    assert grid("seed=7") == [(7, v, "grid") for v in (0.1, 0.2, 0.4)]
    assert grid("step_size.value=0.3,0.6", "seed=5", "study=mine") == [(5, 0.3, "mine"), (5, 0.6, "mine")]


def test_a_users_own_option_runs(own_folder, tmp_path, command, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = command(f"--config-dir={own_folder}", "step_size=halving", "step_size.value=0.25", *TINY)
    assert answer.code == 0, answer.err
    (run,) = Path("outputs/default").iterdir()
    assert result_of(run)["status"] == "finished"
    assert OmegaConf.load(run / "config.yaml").step_size == {"_target_": "own_steps.Halving", "value": 0.25}
    answer = command(f"--config-dir={own_folder}", "step_size=halving", "step_size.value=-1", *TINY)
    assert answer.lines == ["lpc_runner: step_size.value must be a number above 0, got -1"]


def test_looking_at_the_configuration_loads_no_torch(tmp_path):
    script = (
        "import sys\nfrom lpc_runner.main import main\n"
        "for words in (['--cfg', 'job'], ['--help']):\n"
        "    sys.argv = ['lpc_runner', *words]\n"
        "    try:\n        main()\n"
        "    except SystemExit as leaving:\n        assert not leaving.code, leaving\n"
        "print('loaded:', sorted({'torch', 'wandb', 'torchvision'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("loaded: []\n")
    assert "num_epochs: ${tuned.persistent_num_epochs}" in done.stdout  # --cfg job, of what would run
    assert "objective: forward, iwae, jeffreys, prior, reverse" in done.stdout and "Examples" in done.stdout  # --help
    assert list(tmp_path.iterdir()) == []


def test_draws_of_an_e_step_are_no_importance_samples():
    keys = [flat_keys(cell_of("dataset=lorenz", f"method={method}")) for method in ("vem", "iwae")]
    assert "num_importance_samples" not in keys[0] and keys[1]["num_importance_samples"] == 10


@pytest.mark.parametrize(
    "command",
    [
        ("experiment=tune_small", "seed=0"),
        ("-m", "seed=3,4", "step_size.value=0.1,1e-3", "method=vae,pc", "trainer.max_updates=null,7"),
        ("-m", "preconditioning=none,adam", "tuned.beta=0.5,0.9", "tracker.mode='offline',disabled"),
        ("-m", "optimizer.betas=[0.8,0.9],[0.9,0.99]", "seed=1,2", "dataset=lorenz,lds"),
        ("-m", "seed=1,2", "seed=5", "tuned.num_steps=4,${seed}"),
    ],
)
def test_cells_that_share_a_composition_are_those_composed_alone(command):
    """Values are put into the first cell's composition: the same configuration and choices as Hydra's own."""
    cells = cells_of(*command)
    assert len(cells) > 1
    for cell in cells[:: max(1, len(cells) // 4)]:
        alone = cell_of(*cell.overrides, "hydra.mode=RUN")
        assert OmegaConf.to_container(cell.cfg) == OmegaConf.to_container(alone.cfg)
        assert cell.choices == alone.choices
        assert not cell.cfg._is_interpolation() and OmegaConf.missing_keys(cell.cfg) == set()


@pytest.mark.parametrize("words", [("experiment=fig4_small", "method=adam_25", "seed=3"), ("dataset=lorenz", "seed=1")])
def test_what_tests_make_once_is_what_hydra_composes(words, monkeypatch):
    """Twice with what reuse.py keeps, once without it."""

    def contents():
        return [(OmegaConf.to_container(cell.cfg), cell.choices, cell.overrides) for cell in compose_cells(*words)]

    kept = [contents(), contents()]
    for owner, name, _ in reuse.MADE_ONCE:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    assert kept == [contents()] * 2
    listed = reuse.once(lambda number: [number], lambda number: (number,))
    listed(1).append(2)
    assert listed(1) == [1] and listed(3) == [3]


def test_a_sweep_over_values_composes_once(monkeypatch):
    from lpc_runner.config import compose

    calls, composed = [], compose._compose_raw
    monkeypatch.setattr(compose, "_compose_raw", lambda *given: calls.append(given) or composed(*given))
    cells = compose_cells("-m", "dataset=mnist", "seed=range(20)", "step_size.value=0.1")
    assert [cell.cfg.seed for cell in cells] == list(range(20))
    assert len(calls) == 2  # the question whether it is a sweep, and the cells


def test_a_single_run_is_composed_once_and_keeps_hydras_callbacks(command, workplace, monkeypatch):
    from hydra._internal.hydra import Hydra

    composed, before = Hydra.compose_config, HydraConfig.instance().cfg
    calls = []
    monkeypatch.setattr(Hydra, "compose_config", lambda *given, **more: calls.append(1) or composed(*given, **more))
    seen = "+hydra.callbacks.seen._target_=test_config.Seen"
    answer = command(*TINY, seen, "trainer.max_updates=1")
    assert answer.code == 0, answer.err
    assert len(calls) == 1 and Seen.events == ["run starts", "job starts", "job ends", "run ends"]
    assert HydraConfig.instance().cfg is before


class Seen(Callback):
    events: ClassVar[list[str]] = []

    def on_run_start(self, **_):
        self.events.append("run starts")

    def on_job_start(self, config, **_):
        assert config.hydra.mode == RunMode.RUN and config.hydra.job.chdir is False
        self.events.append("job starts")

    def on_job_end(self, **_):
        self.events.append("job ends")

    def on_run_end(self, job_return, **_):
        assert job_return.status == JobStatus.COMPLETED
        self.events.append("run ends")


def test_a_dataset_says_what_is_trained_where_a_command_says_nothing_of_it(data):
    arrays = f"dataset.train={data}/images.npz"
    for words in (
        (),
        ("model=mlp",),
        ("step_size.value=0.2",),
        ("dataset=arrays", arrays),
        ("tuned.method=lpc_persistent_encoder",),
    ):
        cell = cell_of(*words)
        choices, sampler = cell.choices, cell.cfg.sampler
        assert (choices["method"], choices["objective"]) == ("lpc_persistent_encoder", "reverse")
        assert (sampler.start, sampler.first_start, sampler.num_steps) == ("persistent", "prior", 1)
    for words in (("objective=jeffreys",), ("preconditioning=adam",), ("method=none",), ("experiment=small",)):
        assert cell_of(*words).choices["method"] == "none"
    assert cell_of("dataset=mnist").choices["method"] == "none"
    assert cell_of("method=lpc_jeffreys").cfg.sampler.start == "encoder"
    first, second = cells_of("-m", "seed=0,1")
    assert first.choices["method"] == second.choices["method"] == "lpc_persistent_encoder" and second.cfg.seed == 1
