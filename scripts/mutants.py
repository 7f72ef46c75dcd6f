"""Plant one-line defects in the update, one at a time, and see that the tests catch each.

    python scripts/mutants.py

Exit 1 if a defect survives, if its line is no longer in the code, or if the tests fail without any defect.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LITERAL = ("tests/test_objectives.py", "literal or theta or vae")
NUM_WORKERS = 2


class Mutant(NamedTuple):
    """A defect: `old` in `file` becomes `new`; tests: the file and -k expression that should catch it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str] = LITERAL


def chain(expression: str) -> tuple[str, str]:
    return "tests/test_chain.py", expression


def objectives(expression: str) -> tuple[str, str]:
    return "tests/test_objectives.py", expression


def engine(expression: str) -> tuple[str, str]:
    return "tests/test_engine.py", expression


def distributions(expression: str) -> tuple[str, str]:
    return "tests/test_distributions.py", expression


def samplers(expression: str) -> tuple[str, str]:
    return "tests/test_samplers.py", expression


def persistent(expression: str) -> tuple[str, str]:
    return "tests/test_persistent.py", expression


def ais(expression: str) -> tuple[str, str]:
    return "tests/test_ais.py", expression


KEPT, LEARNER, CONTEXT = "inference/context.py", "training/learner.py", "inference/context.py"
SIZES, TRAINER = "inference/step_sizes.py", "training/trainer.py"
SAMPLERS, CHAIN, METRIC = "inference/samplers.py", "inference/chain.py", "inference/preconditioning.py"
ENGINE = "inference/engine.py"
OBJECTIVES, UPDATE, DENSITY = "inference/objectives.py", "training/update.py", "base/bins.py"

MUTANTS = [
    # The Langevin step, by closed forms
    Mutant("drift has the wrong sign", SAMPLERS,
           "_ahead(state.z, rate, drift)", "_ahead(state.z, -rate, drift)", chain("stationary")),
    Mutant("noise without its factor 2", SAMPLERS,
           "variance = 2 * rate", "variance = rate", chain("stationary")),
    Mutant("z(t-1) is missing", SAMPLERS,
           "_ahead(state.z, rate, drift)", "_ahead(0 * state.z, rate, drift)", chain("stationary or mode")),
    Mutant("noise not preconditioned", SAMPLERS,
           "variance = 2 * rate", "variance = 2 * self.step_size(t)", chain("preconditioner")),
    Mutant("drift not preconditioned", SAMPLERS,
           "_ahead(state.z, rate, drift)", "_ahead(state.z, self.step_size(t), drift)", chain("preconditioner")),
    Mutant("step size of the step before", SAMPLERS,
           "rate = self.step_size(t)", "rate = self.step_size(state.t)", chain("step_sizes")),
    Mutant("same noise in every block", CHAIN,
           "self.update, index", "self.update, 0", chain("noise")),
    Mutant("drift averaged over the batch", CHAIN,
           "torch.ones_like(value)", "torch.ones_like(value) / len(value)", chain("fused")),
    # Preconditioning
    Mutant("bias correction one step late", METRIC,
           "self.beta**last", "self.beta ** (last + 1)", chain("bias")),
    Mutant("β and 1 - β exchanged", METRIC, "state, self.beta)", "state, 1 - self.beta)", chain("bias")),
    Mutant("shared moment is a sum", METRIC,
           "rows.mean(0, keepdim=True)", "rows.sum(0, keepdim=True)", chain("shared")),
    Mutant("frozen one step late", METRIC,
           "_smaller(t, self.freeze_after)", "_smaller(t, self.freeze_after + 1)", chain("bias")),
    Mutant("Fisher: past and present exchanged", METRIC,
           "past, self.memory)", "past, 1 - self.memory)", chain("fisher_by_hand")),
    Mutant("Fisher without the prior's curvature", METRIC, "+ self.prior_scale**-2)", ")", chain("fisher_by_hand")),
    Mutant("Fisher by Adam's power", METRIC,
           "self.second_moment.to(z) +", "self.second_moment.to(z).sqrt() +", chain("fisher_gives")),
    Mutant("g⊙g is a sum over the steps", CHAIN,
           "square / (num_steps * len(z))", "square / len(z)", chain("fisher_by_hand")),
    Mutant("g⊙g of the last block alone", CHAIN,
           "square += drifts.square().sum", "square = drifts.square().sum", engine("blocks and fisher")),
    Mutant("a contribution is not asked whether finite", UPDATE,
           '(scalars.pop("z"), *averaged)', '(scalars.pop("z"),)', ("tests/test_extending.py", "learns_between")),
    # Chains that go on
    Mutant("an example goes on from another's state", KEPT,
           "last = self.z[index]", "last = self.z[index.flip(0)]", persistent("long_chain or posterior")),
    Mutant("every visit is a first one", KEPT, "last.isnan(), first", "last == last, first", persistent("long_chain")),
    Mutant("states of another batch are written over", KEPT,
           "self.z[index] = z", "self.z[: len(z)] = z", persistent("posterior")),
    Mutant("the end of a chain is lost", LEARNER,
           "(batch.index, gradients.chain.z)", "(batch.index, gradients.chain.z * 0)", persistent("long_chain")),
    Mutant("a rank keeps its own rows alone", LEARNER,
           "(self.ranks.gather_rows(rows, counts) for rows", "(rows for rows",
           ("tests/test_distributed.py", "persistent and float64 and two")),
    Mutant("first_start is not read", CONTEXT, 'if place == "persistent" else place', "if False else place",
           persistent("first_visits")),
    Mutant("first visits are as long as others", TRAINER, "first_epoch=epoch == 0", "first_epoch=False",
           ("tests/test_resume.py", "died_ends and persistent")),
    Mutant("an annealed γ falls on", SIZES, "min(made / self.falling, 1.0)", "(made / self.falling)",
           persistent("annealed")),
    Mutant("an annealed γ is another tensor", SIZES, "self.size.fill_(self.after(self.made))",
           "self.size = torch.full_like(self.size, self.after(self.made))", persistent("annealed")),
    # Other samplers
    Mutant("friction adds too little noise", SAMPLERS, "(1 - kept**2)", "(1 - kept)", samplers("without_bias")),
    Mutant("half a kick too many at t = 1", SAMPLERS, "float(t > 1)", "float(t > 0)", samplers("energy_errors")),
    Mutant("a step's last half kick is lost", SAMPLERS,
           "closed = _ahead(waiting, closing * length / 2, drift)", "closed = waiting", samplers("without_bias")),
    Mutant("velocities' energy is left out", SAMPLERS,
           "- closed.square() - velocity.square()", "- closed.square()", samplers("energy_errors")),
    Mutant("a leapfrog step that is not reversible", SAMPLERS,
           "z = _ahead(z, length, momentum)", "z = _ahead(z, length, momentum + drift)", samplers("reversible")),
    Mutant("every proposal is accepted", SAMPLERS, "< -error  #", "< torch.inf - error  #", samplers("detailed")),
    Mutant("momenta's energy is left out", SAMPLERS,
           "value + (p.square() - momentum.square()).sum(1) / 2", "value", samplers("detailed")),
    Mutant("the drift of a rejected proposal is kept", SAMPLERS,
           "torch.where(row, gradient, drift)", "gradient", samplers("detailed")),
    Mutant("θ learns at proposals", CHAIN,
           'if accumulate and declared(sampler, Sampler, "adjusted")', "if False", samplers("theta")),
    Mutant("a step is taken for one evaluation", ENGINE,
           "spent += block.num_evaluations", "spent += length", samplers("theta")),
    Mutant("the next block forgets the velocity", ENGINE,
           '("memory", "seen", "metric", "z")', '("seen", "metric", "z")', engine("memory")),
    Mutant("chains end whatever their trend", CHAIN, "rise.mean().abs() < 2", "rise.mean().abs() < 200",
           samplers("settled")),
    Mutant("θ's mean is over T where chains ended before", CHAIN,
           "self.first, self.moments.count", "self.first, self.sampler.num_steps", samplers("settled")),
    Mutant("γ remembers a wrong start", SIZES, 'kept["side"] * error < 0', 'kept["side"] * error < -9',
           persistent("adapted")),
    Mutant("lost chains teach", SIZES, '>= averaged["target"] / 10', ">= -1", persistent("adapted")),
    Mutant("all draws of a step are one", CHAIN,
           "noise(count * (t - 1) + k)", "noise(t)", samplers("exact_beyond")),
    # What the chain gathers
    Mutant("g_θ not divided by the batch", CHAIN, "(num_states * len(z))", "num_states"),
    Mutant("g_θ from one state of `all`", CHAIN,
           "accumulate = along and (t - 1)", "accumulate = along and t == 1 and (t - 1)"),
    Mutant("g_θ descends", OBJECTIVES,
           "[-gradient for gradient in chain.theta_gradient]", "list(chain.theta_gradient)"),
    Mutant("moments of z(0) only", CHAIN, "gathered.add(state.z[None]", "gathered.add(z[None]"),
    Mutant("moments not about their centre", CHAIN, "difference = states - self.centre", "difference = states"),
    # Blocks on fixed tensors
    Mutant("every block has the first one's noise", ENGINE,
           "range(made + 1, made + length + 1)", "range(1, length + 1)", engine("blocks")),
    Mutant("every block starts its preconditioner anew", ENGINE,
           "block.load(state)", "block.load(state._replace(metric=self.sampler.init(z).metric))", engine("blocks")),
    Mutant("the first batch stays", ENGINE, "zip(self.inputs, inputs)", "zip([], inputs)", engine("blocks")),
    Mutant("g_θ of the batch before is kept", ENGINE, "total.zero_()", "total", engine("blocks")),
    Mutant("every other state for any theta_every", ENGINE,
           "index % self.sampler.theta_every", "index % 2", engine("thinned")),
    # What the encoder learns
    Mutant("forward KL: sign of the shift", OBJECTIVES,
           "second - 2 * shift", "second + 2 * shift", objectives("two_sums")),
    Mutant("forward KL not divided by T", OBJECTIVES,
           ") / moments.count + shift", ") + shift", objectives("two_sums")),
    Mutant("reverse KL keeps the prior's score", OBJECTIVES,
           "(drift - prior.score(point))", "drift", objectives("elbo")),
    Mutant("reverse KL without the pathwise term", OBJECTIVES,
           "(log_likelihood + pathwise)", "log_likelihood"),
    Mutant("reverse KL at the prior's start", OBJECTIVES,
           "if start is not warm and has_elbo:", "if False:"),
    Mutant("prior start ignores its scale", CONTEXT, "self.model.prior.scale * self.noise", "self.noise"),
    Mutant(
        "encoder loss leaks into θ",
        OBJECTIVES,
        "at_warm = chain.first",
        "at_warm = chain.first; theta = [a - b for a, b in zip("
        "theta, torch.autograd.grad(context.log_joint(warm).mean(), context.theta))]",
    ),
    Mutant("encoder not asked whether finite", UPDATE,
           'norms.append(scalars["train/encoder_gradient_norm"])', "pass", objectives("finite")),
    # The likelihood
    Mutant("upper end bin closed", DENSITY,
           "inward > -1 + BIN_HALF_WIDTH", "inward > -2", distributions("sum or end")),
    Mutant("lower end bin closed", DENSITY,
           "inward < 1 - BIN_HALF_WIDTH", "inward < 2", distributions("sum or end")),
    Mutant("no tail in float32", DENSITY,
           "torch.float32: 10.0", "torch.float32: 1e9", distributions("far_tail")),
    Mutant("σ's gradient lacks a term", DENSITY,
           "addcmul_(at_near, near, value=-1)", "addcmul_(at_near, near, value=0)", distributions("gradcheck")),
    Mutant("tail without its exponential", DENSITY,
           "addcmul_(near, near, value=-1)", "addcmul_(near, near, value=0)", distributions("far_tail")),
    Mutant("a device's tail is its core", DENSITY,
           "tail, log_twice), torch", "log_twice, log_twice), torch", ("tests/test_simulated_device.py", "likelihood")),
    Mutant("a GPU's tail is its core", DENSITY,
           "closed_near && tail_start < near", "false", ("tests/test_simulated_device.py", "likelihood")),
    Mutant("a GPU's σ has no gradient at near edges", DENSITY,
           "at_far * far - at_near * near;", "at_far * far;", ("tests/test_simulated_device.py", "likelihood")),
    # Likelihoods
    Mutant("moves of AIS without a Metropolis test", "evaluation/ais.py",
           "self.uniform(count, source) < acceptance", "acceptance >= 0", ais("unbiased")),
    Mutant("a leapfrog that ends with a full kick", "evaluation/ais.py",
           "(size if move < self.num_leapfrog else 0.5 * size)", "size", ais("unbiased")),
    Mutant("the way back at the temperatures of the way there", "evaluation/ais.py",
           "at = s - 1 if backward else s ", "at = min(s, num_increments - 1) ", ais("unbiased")),
    Mutant("an upper bound that is a lower one", "evaluation/ais.py",
           "-mean_weight(-torch.cat", "mean_weight(-torch.cat", ais("enclose")),
    # Layers
    Mutant("columns of a doubling by its rows' weights", "models/upsampling.py",
           "i::2, j::2", "i::2, i::2", ("tests/test_models.py", "doubling")),
]  # fmt: skip


def run_tests(source: Path, tests: tuple[str, str]) -> int:
    """pytest's exit status against the package in `source`: 0 passed, 1 failed, else not run."""
    file, expression = tests
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file, "-k", expression]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode


def judge(mutant: Mutant | None, tests: tuple[str, str], folder: Path) -> str:
    """Copy the package, plant the defect, run the tests: 'caught', 'SURVIVED', or why there is no answer."""
    source = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(ROOT / "src" / "lpc_runner", source / "lpc_runner", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        path = source / "lpc_runner" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return f"NOT PLANTED: {text.count(mutant.old)} lines match"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    status = run_tests(source, tests)
    return {0: "SURVIVED", 1: "caught"}.get(status, f"NOT RUN: pytest exit status {status}")


def main() -> None:
    console, start = Console(), time.perf_counter()
    # Once without any defect: all selected tests of one file together.
    files = {mutant.tests[0]: set() for mutant in MUTANTS}
    for mutant in MUTANTS:
        files[mutant.tests[0]].add(mutant.tests[1])
    selections = [(file, " or ".join(sorted(expressions))) for file, expressions in files.items()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_WORKERS) as pool:
        (Path(folder) / "conf").symlink_to(ROOT / "conf")  # where a package in a checkout looks for it
        sound = list(pool.map(lambda tests: judge(None, tests, Path(folder)), selections))
        broken = [tests for tests, answer in zip(selections, sound) if answer != "SURVIVED"]
        if broken:
            sys.exit(f"without any defect these tests already fail: {broken}")
        answers = list(pool.map(lambda mutant: judge(mutant, mutant.tests, Path(folder)), MUTANTS))
    table = Table("defect", "file", "tests", "result")
    for mutant, answer in zip(MUTANTS, answers):
        table.add_row(mutant.name, mutant.file, f"{mutant.tests[0]} -k '{mutant.tests[1]}'", answer)
    console.print(table)
    num_caught = answers.count("caught")
    console.print(f"{num_caught} of {len(MUTANTS)} caught in {time.perf_counter() - start:.0f} s")
    sys.exit(0 if num_caught == len(MUTANTS) else 1)


if __name__ == "__main__":
    main()
