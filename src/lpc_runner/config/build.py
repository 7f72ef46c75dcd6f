"""Configurations to objects. The constructor that `_target_` names is the schema: keys, types and ranges are its."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from hydra.utils import get_object
from omegaconf import DictConfig

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import (
    NonNegativeInt,
    PositiveInt,
    accepted,
    check_value,
    declared,
    hints_of,
    missing,
    required_by,
)
from lpc_runner.config.classes import place_of
from lpc_runner.config.compose import options_composed
from lpc_runner.config.options import as_dict, dotted, unknown_key

# Keys of the root that belong to no group, with their types.
ROOT = {
    "seed": int,
    "device": str,
    "engine": Literal["auto", "eager", "compiled", "cuda_graph"],
    "precision": Literal["fp32", "tf32", "bf16"],
    "deterministic": bool,
    "num_threads": PositiveInt | None,  # pyright: ignore[reportOperatorIssue]  # Annotated has `|`
    "runs_per_gpu": PositiveInt,
    "optimized_metric": str | None,
    "study": str,
    "output_dir": str,
    "data_dir": str,
    "check": bool,
    "rerun": bool | NonNegativeInt,
}
# Arguments that the class of a group gets when the run is built, never from a file. Until then the group's object is a
# functools.partial, whatever `_partial_` in the file says.
GIVEN_LATER = {
    "model": {"data_shape", "num_train", "num_held_out"},
    "step_size": {"updates_per_epoch"},
    "sampler": {"step_size", "preconditioner"},
    "tracker": {"run_id", "name", "group", "config", "folder", "resume_step", "more_tags"},
}


@dataclass
class Parts:
    """An object of every group; model and sampler are complete, the tracker still waits for its run."""

    dataset: Any
    model: Any
    sampler: Any
    step_size: Any
    preconditioning: Any
    objective: Any
    optimizer: Any
    trainer: Any
    traces: Any
    metrics: Any
    tracker: Callable[..., Any]


GROUPS = tuple(field.name for field in fields(Parts))


@dataclass
class Experiment(Parts):
    """The checked objects of one run.

    facts: what a model may ask to know of the data, as run.json keeps it: data_shape, num_train, num_held_out.
    """

    facts: dict[str, Any]
    seed: int
    device: Any
    engine: Any
    deterministic: bool
    num_threads: int | None

    def bind(self, device: Any) -> None:
        """Tell the parts of an update their model and device. Raises UserError (one line) if they do not fit."""
        from lpc_runner.inference.interfaces import Part

        for group in ("step_size", "preconditioning", "sampler", "objective"):
            _call_for_key(group, declared(getattr(self, group), Part, "bind"), self.model, device)


def build(cfg: DictConfig, choices: dict[str, str], facts: dict[str, Any] | None = None) -> Experiment:
    """All objects of a resolved configuration, nothing heavy loaded.

    facts: of the data, where they are known; else the dataset is asked, whose files must be there then.
    Raises UserError, one line that names the key, for an unknown key, a wrong type, a value out of range, or options
    that do not go together.
    """
    values = as_dict(cfg, resolve=True)
    _check_root(values)
    known = list(dotted(values))
    parts = {group: instantiate(values[group], group, known) for group in GROUPS}
    # These import torch, which a mistake above need not wait for.
    import torch

    from lpc_runner.base.likelihoods import fault_of, lacking
    from lpc_runner.base.tensors import seeded_layers
    from lpc_runner.inference.engine import make_engine
    from lpc_runner.inference.interfaces import Objective, Preconditioner

    _require_methods(parts, choices)
    dataset, objective = parts["dataset"], parts["objective"]
    target = parts["model"].func
    users = {"model": target, "metrics": parts["metrics"]}
    if (likelihood := parts["model"].keywords.get("likelihood")) is not None:
        users["model.likelihood"] = likelihood
        _require_likelihood(likelihood, choices, lacking(likelihood))
    for group, user in users.items():
        if dataset.kind not in user.data_kinds:
            name = choices.get(group.replace(".", "/"), "")
            raise UserError(
                f"{group.replace('.', '/')}={name} expects {' or '.join(user.data_kinds)}, "
                f"dataset={choices['dataset']} holds {dataset.kind}: {_fitting(group.split('.')[0], dataset.kind)}"
            )
    if facts is None:
        facts = {
            "data_shape": tuple(dataset.shape),
            "num_train": dataset.num_train,
            "num_held_out": dataset.num_held_out,
        }
    of_run = {"updates_per_epoch": facts["num_train"] // parts["trainer"].batch_size}
    of_run = accepted(parts["step_size"].func, of_run)
    step_size = _call_for_key("step_size", parts["step_size"], **of_run)
    beside = {"step_size": step_size, "preconditioner": parts["preconditioning"]}
    if len(accepted(parts["sampler"].func, beside)) < len(beside):
        raise UserError(f"sampler={choices['sampler']}: its constructor must take {' and '.join(beside)}")
    sampler = _call_for_key("sampler", parts["sampler"], **beside)
    asks = partial(declared, objective, Objective)
    if sampler.num_steps == 0 and asks("needs_chain"):
        raise UserError(f"objective={choices['objective']} needs a chain, and sampler=none has none")
    if sampler.num_steps > 0 and not asks("allows_chain"):
        raise UserError(f"objective={choices['objective']} has no chain: it goes with sampler=none only")
    if sampler.num_steps == 0 and parts["trainer"].frozen:
        raise UserError(f"trainer.frozen=true: sampler={choices['sampler']} has no chain to learn from")
    device = resolve_device(values["device"])
    asked = {name: facts[name] for name in GIVEN_LATER["model"] & hints_of(target).keys()}
    with seeded_layers(values["seed"], "initialisation"):
        model = _call_for_key("model", parts["model"], **asked)
    _require_likelihood(model.likelihood, choices, lacking(model.likelihood))
    _require_likelihood(model.likelihood, choices, fault_of(model.likelihood, tuple(facts["data_shape"])))
    if declared(parts["preconditioning"], Preconditioner, "needs_encoder") and not asks("uses_encoder"):
        raise UserError(
            f"preconditioning={choices['preconditioning']} needs an encoder: objective={choices['objective']} has "
            "none, preconditioning=none, adam or adam_shared would fit"
        )
    _require_acceptance(sampler, choices)
    if asks("needs_factorised_q") and not model.factorised_q:
        remedy = " (objective.num_kept_states=10 would fit)" if hasattr(objective, "num_kept_states") else ""
        raise UserError(
            f"objective={choices['objective']} needs a factorised q: model.encoder={model.encoder} has none{remedy}"
        )
    experiment = Experiment(
        **(parts | {"model": model, "sampler": sampler, "step_size": step_size}),
        facts=facts,
        seed=values["seed"],
        device=device,
        engine=make_engine(values["engine"], values["precision"], device),
        deterministic=values["deterministic"],
        num_threads=values["num_threads"],
    )
    experiment.bind(torch.device("cpu"))
    return experiment


def _require_methods(parts: dict[str, Any], choices: dict[str, str]) -> None:
    """Raises UserError for a class of one's own that lacks what its group must offer."""
    from lpc_runner.inference import interfaces
    from lpc_runner.tracking.tracker import Sink

    protocols = {
        "sampler": interfaces.Sampler,
        "step_size": interfaces.StepSize,
        "preconditioning": interfaces.Preconditioner,
        "objective": interfaces.Objective,
        "tracker": Sink,
    }
    for group, protocol in protocols.items():
        part = parts[group].func if group in GIVEN_LATER else parts[group]
        if lacking := missing(part, protocol):
            raise UserError(f"{group}={choices[group]} has {lacking}")


def _require_acceptance(sampler: Any, choices: dict[str, str]) -> None:
    """Raises UserError where the step size goes by the acceptance of steps that have none."""
    from lpc_runner.inference.interfaces import Sampler, StepSize

    if sampler.num_steps == 0 or not declared(getattr(sampler, "step_size", None), StepSize, "needs_acceptance"):
        return
    judged, first_steps = declared(sampler, Sampler, "energy_error_of"), declared(sampler, Sampler, "first_steps")
    option = f"step_size={choices['step_size']} goes by the acceptance of steps"
    if judged is None:
        raise UserError(
            f"{option}, and those of sampler={choices['sampler']} have none: langevin, mala or hmc would fit"
        )
    if judged == "before" and min(sampler.num_steps, first_steps or sampler.num_steps) < 2:
        raise UserError(
            f"{option}, and sampler={choices['sampler']} knows that of a step one step later: chains need two steps at "
            "least, sampler=mala or hmc one"
        )


def _require_likelihood(likelihood: Any, choices: dict[str, str], fault: str | None) -> None:
    if fault is not None:
        option = choices.get("model/likelihood")
        where = f"model/likelihood={option}" if option else f"the likelihood of model={choices['model']}"
        raise UserError(f"{where}: {type(likelihood).__name__} {fault}")


def _fitting(group: str, kind: str) -> str:
    """The options of a group that take data of this kind, with all that they bring along, in words."""
    fitting = []
    for option, values in options_composed(group).items():
        node = as_dict(values)
        parts = [node, *filter(_is_object, node.values())]
        if all(kind in getattr(_locate(part["_target_"], group), "data_kinds", [kind]) for part in parts):
            fitting.append(option)
    return f"{group}={', '.join(fitting)} would fit"


def instantiate(node: dict[str, Any], path: str, known: list[str]) -> Any:
    """The object (of a group in GIVEN_LATER, the functools.partial that waits for the rest) that a YAML node describes.

    known: all keys of the configuration, to name the nearest when one is wrong. Raises UserError (one line).
    """
    if not _is_object(node):
        got = "null" if node is None else repr(node)
        raise UserError(f"{path} must be one of its options ({path}=...), got {got}")
    target = _locate(node["_target_"], path)
    hints = hints_of(target)
    given = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    later = GIVEN_LATER.get(path, set())
    for key in given:
        if key in later:
            raise UserError(f"{path}.{key} is given when a run is built: the option's YAML file must not give it")
        if key not in hints:
            raise UserError(unknown_key(f"{path}.{key}", known))
    arguments = {
        key: instantiate(value, f"{path}.{key}", known) if _is_object(value) else value for key, value in given.items()
    }
    for key, value in arguments.items():
        if not _is_object(given[key]):
            _call_for_key(path, check_value, key, value, hints[key])
    for name in required_by(target):
        if name not in arguments and name not in later:
            raise UserError(f"{path}.{name} has no value: the option's YAML file must give one")
    if abstract := sorted(getattr(target, "__abstractmethods__", ())):
        raise UserError(f"{path}._target_={node['_target_']} lacks what its base class asks for: {', '.join(abstract)}")
    if path in GIVEN_LATER:
        return partial(target, **arguments)
    return _call_for_key(path, target, **arguments)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _locate(target: str, path: str) -> Any:
    hydra_logger = logging.getLogger("hydra.utils")
    before = hydra_logger.level
    hydra_logger.setLevel(logging.CRITICAL)  # it would report the same in three lines of its own
    try:
        located = get_object(place_of(target))
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise UserError(
            f"{path}._target_={target} cannot be imported: {reason} (looked for here and in PYTHONPATH)"
        ) from None
    finally:
        hydra_logger.setLevel(before)
    # Else a run folder from elsewhere could have any function called, as os.system.
    if not inspect.isclass(located) or located.__module__.split(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{path}._target_={target} must name a class, and none of Python's own")
    return located


def _call_for_key(path: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call, and put the group's name before a constructor's message about its argument."""
    try:
        return function(*args, **kwargs)
    except UserError:
        raise
    except ValueError as error:
        message = str(error).splitlines()[0]
        first = message.split(" ", 1)[0]
        raise UserError(f"{path}.{message}" if first.isidentifier() and "=" not in first else message) from None


def _check_root(values: dict[str, Any]) -> None:
    for key in values:
        if key not in ROOT and key not in GROUPS and key != "tuned":
            raise UserError(unknown_key(key, [*ROOT, *GROUPS]))
    for key in (*ROOT, *GROUPS):
        if key not in values:
            raise UserError(f"{key} was deleted from the configuration: every run needs it")
    for key, hint in ROOT.items():
        try:
            check_value(key, values[key], hint)
        except ValueError as error:
            raise UserError(str(error)) from None
    for key in ("output_dir", "data_dir"):
        if not values[key] or values[key].startswith("~"):  # no shell expands the ~ behind a =
            raise UserError(f"{key} must be a folder's path, got {values[key]!r}: $HOME/... is yours, . is this one")
    study = values["study"]
    plain = (
        study.isprintable() and not set(study) & set("/\\") and not study.startswith(".") and len(study.encode()) <= 240
    )
    if not study or not plain or study == "runs":
        raise UserError(f"study must be a plain folder name of at most 240 bytes, other than 'runs', got {study!r}")


def resolve_device(name: str) -> Any:
    """The torch device: `auto` is CUDA where there is one. Raises UserError if the one asked for is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            available = f"{count} CUDA device(s)" if count else "no CUDA device, only the CPU"
            raise UserError(f"device={name}: found {available} (device=auto takes what is there)")
    elif device.type != "cpu":
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device
