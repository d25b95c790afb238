"""The commands that repeat what a row says, from the plan."""

import shlex
from collections.abc import Sequence

from benchmarks.evidence.plan import Claim, Experiment, Plan, Spec


def commands_of(plan: Plan, claim: Claim) -> list[str]:
    """What repeats each row, one command a line: training, export, scores."""
    lines = []
    for experiment in plan.experiments:
        if experiment.claim == claim.name:
            lines += command_of(plan, experiment)
    return lines


def command_of(plan: Plan, experiment: Experiment) -> list[str]:
    """The commands of one experiment."""
    if experiment.kind == "bench":
        return [
            f"epigram bench step --recipe {experiment.recipe} {sets((*experiment.set, *variant.set))}".rstrip()
            for variant in experiment.variants
        ]
    cell = next(cell for cell in plan.cells if cell.experiment is experiment)
    own = [setting for setting in cell.settings if setting not in plan.defaults]
    short = ' "${SHORT[@]}"' if experiment.kind == "train" and not experiment.repeats else ""
    recipe = f"docs/results/evidence/{experiment.repeats}/config.toml" if experiment.repeats else experiment.recipe
    seed = str(experiment.seeds[0]) if len(experiment.seeds) == 1 else "SEED"
    run = f"runs/{experiment.name}-{seed}"
    train = f"epigram train {recipe} --data data/{experiment.data} --seed {seed} --out {run} {sets(own)}".rstrip()
    lines = [train + short]
    lines += [f"epigram export {run} --out {run}/{v.name} {sets(v.set)}" for v in experiment.variants]
    scores = dict.fromkeys([*experiment.scores, *experiment.float_scores])
    return [*lines, *(_score(run, experiment.data, text) for text in scores)]


def _score(run: str, data: str, text: str) -> str:
    spec = Spec.parse(text)
    words = f"epigram score {run} --data data/{data} --method {spec.windows.name} --seq-len {spec.seq_len}"
    words += f" --stride {spec.stride}" if spec.windows.name == "sliding" else ""
    words += f" --adapt {spec.method}" if spec.adapt else ""
    words += f" --set score.adapt.lora.chunk_tokens={spec.stride}" if spec.method == "lora" else ""
    return words + (f" --max-tokens {spec.max_tokens}" if spec.max_tokens else "")


def sets(settings: Sequence[str]) -> str:
    """Settings as options of a command."""
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
