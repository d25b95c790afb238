"""Reads a training log: ours, or one of the scripts of parameter-golf, whose lines have the same forms.

The last word counts: a log may hold scores of several models, and the final one is the score of the packed file. In a
log of ours that is the score which the recipe puts first, and no other stands in for it.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epigram.evaluation.adapt_config import KINDS, adapted
from epigram.run.report.summary import PREFERENCE
from epigram.run.submission.rules.values import is_score

_NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_FINAL = re.compile(rf"^(final_\w+|\w+_exact)\b.*?val_loss:\s*{_NUMBER}\s+val_bpb:\s*{_NUMBER}", re.MULTILINE)
_OURS = re.compile(r"^final_(times|bytes|calibration) (.*)$", re.MULTILINE)
_STEP = re.compile(rf"^step:(\d{{1,18}})/(\d+).*?train_time:{_NUMBER}ms", re.MULTILINE)
_LOSS = re.compile(rf"^step:(\d+)/\d+ train_loss:{_NUMBER}", re.MULTILINE)
_SEED = re.compile(r"\bseed\s*[:= ]\s*(\d{1,18})\b", re.IGNORECASE)
_SEED_LINE = re.compile(r"^seed:\s*(\d{1,18})\s*$|^recipe .*, seed (\d{1,18}): [\d,]+ parameters$", re.MULTILINE)
_RECIPE = re.compile(r"^recipe as resolved:\n(.*?)^log:$", re.MULTILINE | re.DOTALL)
_LINE_OF_OURS = re.compile(
    r"^(?:final_(?:float|quantized)_(?:blocks|sliding|streaming|adapted_\w+)_exact\b|recipe as resolved:$)",
    re.MULTILINE,
)
_NO_NUMBER = re.compile(
    r"\b(?:train_time|eval_time):\s*[-+]?(?:nan|inf)\w*|"
    r"^(?:final_\w+|\w+_exact)\b.*?\b(?:val_loss|val_bpb):\s*[-+]?(?:nan|inf)\w*",
    re.MULTILINE | re.IGNORECASE,
)
_TOTAL = re.compile(r"[Tt]otal submission size[^:\n]*:\s*([\d,]+)\s*bytes")
_MODEL = re.compile(r"[Ss]erialized model (?:int|quant)[^:\n]*:\s*([\d,]+)\s*bytes")
_CODE = re.compile(r"[Cc]ode size[^:\n]*:\s*([\d,]+)\s*bytes")
_EVAL_MS = re.compile(rf"eval_time:\s*{_NUMBER}\s*ms")
_DIGITS = 18
_SAME = 5e-5  # a score computed again on a GPU differs in its last digits
_NAME = re.compile(r"(?:^|_)seed_?(\d{1,18})")


@dataclass(frozen=True, kw_only=True)
class LogFacts:
    """What a log says; None or empty for what it does not say. Times in seconds.

    scores: nats a token and bits per byte by label. label: of the score that counts. said_seeds: what its lines say,
    whatever the file is called. odd: figures that cannot be, as they stand there; none of them is taken for a figure.
    recipe: as resolved, None where it is not said or no TOML. machine: what the lines before the recipe say. is_ours:
    made by epigram, so that what is missing is missing, and not said in another way.
    """

    name: str
    seed: int | None
    steps: int | None
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    label: str | None = None
    train_s: float | None = None
    calibrate_s: float | None = None
    quantize_s: float | None = None
    score_s: float | None = None
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    sha256: str | None = None
    calibration: dict[str, str] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    said_seeds: frozenset[int] = frozenset()
    odd: tuple[str, ...] = ()
    recipe: Mapping[str, Any] | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False

    @property
    def val_nats(self) -> float | None:
        return None if (score := self._score(self.label)) is None else score[0]

    @property
    def val_bpb(self) -> float | None:
        return None if (score := self._score(self.label)) is None else score[1]

    @property
    def adapted(self) -> str | None:
        """How the model learned while the score that counts was made, "sgd" or "lora"; None where it did not."""
        return next((kind for kind in KINDS if self.label == _label(adapted(kind))), None)

    @property
    def unadapted(self) -> tuple[float, float] | None:
        """Nats a token and bits per byte of the same model that did not learn, by sliding windows."""
        return self._score(_label("sliding"))

    def _score(self, label: str | None) -> tuple[float, float] | None:
        """None also for figures that cannot be."""
        score = None if label is None else self.scores.get(label)
        return score if score is not None and all(map(is_score, score)) else None

    @property
    def spent_s(self) -> float | None:
        """Training, calibration and quantization together; None without the first, and in a log of ours without any."""
        if self.train_s is None or (self.is_ours and None in (self.calibrate_s, self.quantize_s)):
            return None
        parts = [part for part in (self.train_s, self.calibrate_s, self.quantize_s) if part is not None]
        return sum(parts)


def _label(method: str) -> str:
    return f"final_quantized_{method}_exact"


def read_log(path: Path) -> LogFacts:
    """The facts in the log at `path`; whatever is no text is passed over."""
    return parse_log(path.read_text("utf-8", errors="replace"), path.name)


def parse_log(text: str, name: str) -> LogFacts:
    """The facts in a log. name: of its file, which may say the seed."""
    named = _NAME.search(Path(name).stem)
    recipe, machine = _head(text)
    said = {int(m[1] or m[2]) for m in _SEED_LINE.finditer(text)} | _seed_of(recipe)
    loose = named or _SEED.search(text)
    steps = list(_STEP.finditer(text))
    scores = {m[1]: (float(m[2]), float(m[3])) for m in _FINAL.finditer(text)}
    ours = {m[1]: dict(word.partition(":")[::2] for word in m[2].split()) for m in _OURS.finditer(text)}
    is_ours = bool(ours) or _LINE_OF_OURS.search(text) is not None
    facts = _ours(ours) if is_ours else _theirs(text, steps)
    label = _counting(scores, recipe) if is_ours else next(reversed(scores), None)
    odd = [*_odd_scores(text, label if is_ours else None), *(_odd_words(ours) if is_ours else _odd_times(facts))]
    return LogFacts(
        name=name,
        seed=min(said) if said and not named else int(loose[1]) if loose else None,
        steps=_num_steps(ours, steps),
        scores=scores,
        label=label,
        losses=tuple(float(m[2]) for m in _LOSS.finditer(text)),
        said_seeds=frozenset(said),
        odd=tuple(odd),
        recipe=recipe,
        machine=machine,
        is_ours=is_ours,
        **facts,  # type: ignore[arg-type]
    )


def _num_steps(ours: Mapping[str, Mapping[str, str]], lines: list[re.Match[str]]) -> int | None:
    """As the last lines say; where they do not, that of the last step told of, which a run need not tell."""
    said = _int(ours.get("times", {}).get("steps"))
    return int(lines[-1][1]) if said is None and lines else said


def _head(text: str) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The recipe as resolved, and the facts of the machine before it, of a log that `epigram submit` wrote."""
    if (found := _RECIPE.search(text)) is None:
        return None, {}
    lines = (line.partition(": ") for line in text[: found.start()].splitlines())
    machine = {key: value for key, colon, value in lines if colon}
    try:
        return tomllib.loads(found[1]), machine
    except (ValueError, RecursionError):  # no TOML, or one that no recipe looks like
        return None, machine


def _seed_of(recipe: Mapping[str, Any] | None) -> set[int]:
    seed = (recipe or {}).get("seed")
    return {seed} if isinstance(seed, int) else set[int]()


def _counting(scores: Mapping[str, tuple[float, float]], recipe: Mapping[str, Any] | None) -> str | None:
    """Label of the score that counts in a log of ours; None if the log does not have it, whatever else it has.

    Only a quantized model counts; of its scores the one that the recipe asks for and prefers, else the preferred one.
    """
    labels = {method: _label(method) for model, method in PREFERENCE if model == "quantized"}
    if methods := _methods(recipe):
        first = next((label for method, label in labels.items() if method in methods), None)
        return first if first in scores else None
    return next((label for label in labels.values() if label in scores), None)


def _methods(recipe: Mapping[str, Any] | None) -> set[str]:
    """How the recipe scores; empty where that is not known."""
    score = (recipe or {}).get("score")
    if not isinstance(score, dict) or not isinstance(score.get("methods"), list):
        return set()
    adapt = score.get("adapt")
    kind = adapt.get("kind") if isinstance(adapt, dict) else None
    return {*map(str, score["methods"]), adapted(str(kind))}


def _odd_scores(text: str, label: str | None) -> list[str]:
    """Final scores that cannot be, and those of `label` that are unlike the first.

    A run that was interrupted and resumed may say others twice, but has one score that counts.
    """
    odd, first = [m[0] for m in _NO_NUMBER.finditer(text)], None
    for m in _FINAL.finditer(text):
        nats, bpb = float(m[2]), float(m[3])
        if not (is_score(nats) and is_score(bpb)):
            odd.append(m[0])
        if m[1] == label:
            first = first or (nats, bpb)
            if max(abs(nats - first[0]), abs(bpb - first[1])) > _SAME:
                odd.append(f"{m[0]} (said before with other figures)")
    return odd


def _odd_words(lines: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Of our lines: times that are no finite number from 0 on, counts that are none, and sums that are not the sum."""
    times, sizes = lines.get("times", {}), lines.get("bytes", {})
    odd = [f"{key}:{value}" for key, value in times.items() if key != "steps" and _float(value) is None]
    counts = [("steps", times["steps"])] if "steps" in times else []
    counts += [(key, value) for key, value in sizes.items() if key != "sha256"]
    odd += [f"{key}:{value}" for key, value in counts if _int(value) is None]
    artifact, code, total = (_int(sizes.get(key)) for key in ("artifact", "code", "total"))
    if artifact is not None and code is not None and total is not None and artifact + code != total:
        odd.append(f"total:{total} of artifact:{artifact} and code:{code}")
    return odd


def _odd_times(facts: dict[str, object]) -> list[str]:
    """Times below 0 of another script's log; they are taken out of `facts`."""
    odd = [key for key in ("train_s", "score_s") if isinstance(value := facts[key], float) and value < 0]
    return [f"{key}:{facts.pop(key)}" for key in odd]


def _ours(lines: dict[str, dict[str, str]]) -> dict[str, object]:
    times, sizes = lines.get("times", {}), lines.get("bytes", {})
    found: dict[str, object] = {
        key: _float(times.get(key)) for key in ("train_s", "calibrate_s", "quantize_s", "score_s")
    }
    found |= {f"{key}_bytes": _int(sizes.get(key)) for key in ("artifact", "code", "total")}
    return found | {"sha256": sizes.get("sha256"), "calibration": lines.get("calibration", {})}


def _theirs(text: str, steps: list[re.Match[str]]) -> dict[str, object]:
    evaluations = _EVAL_MS.findall(text)
    return {
        "train_s": float(steps[-1][3]) / 1000 if steps else None,
        "score_s": float(evaluations[-1]) / 1000 if evaluations else None,
        "total_bytes": _last_int(_TOTAL, text),
        "artifact_bytes": _last_int(_MODEL, text),
        "code_bytes": _last_int(_CODE, text),
    }


def _last_int(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.findall(text)
    return _int(found[-1].replace(",", "")) if found else None


def _float(text: str | None) -> float | None:
    """A finite number from 0 on, else None."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def _int(text: str | None) -> int | None:
    return int(text) if text is not None and is_count(text) else None


def is_count(text: str) -> bool:
    """Whether it is a whole number from 0 on, of up to 18 digits."""
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS
