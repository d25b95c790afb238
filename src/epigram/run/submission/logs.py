"""Reads a training log: ours, or one of the scripts of parameter-golf, whose lines have the same forms.

The last word counts: a log may hold scores of several models, and the final one is the score of the packed file.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from epigram.evaluation.adapt_config import KINDS, adapted
from epigram.run.report.summary import PREFERENCE

_NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_FINAL = re.compile(rf"^(final_\w+|\w+_exact)\b.*?val_loss:\s*{_NUMBER}\s+val_bpb:\s*{_NUMBER}", re.MULTILINE)
_OURS = re.compile(r"^final_(times|bytes|calibration) (.*)$", re.MULTILINE)
_STEP = re.compile(rf"^step:(\d+)/(\d+).*?train_time:{_NUMBER}ms", re.MULTILINE)
_LOSS = re.compile(rf"^step:(\d+)/\d+ train_loss:{_NUMBER}", re.MULTILINE)
_SEED = re.compile(r"\bseed\s*[:= ]\s*(\d+)", re.IGNORECASE)
_TOTAL = re.compile(r"[Tt]otal submission size[^:\n]*:\s*([\d,]+)\s*bytes")
_MODEL = re.compile(r"[Ss]erialized model (?:int|quant)[^:\n]*:\s*([\d,]+)\s*bytes")
_CODE = re.compile(r"[Cc]ode size[^:\n]*:\s*([\d,]+)\s*bytes")
_EVAL_MS = re.compile(rf"eval_time:\s*{_NUMBER}\s*ms")
_NAME = re.compile(r"(?:^|_)seed_?(\d+)")


@dataclass(frozen=True, kw_only=True)
class LogFacts:
    """What a log says; None or empty for what it does not say. Times in seconds.

    scores: nats a token and bits per byte by label. label: of the score that counts. is_ours: made by epigram, so that
    what is missing is missing, and not said in another way.
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
    is_ours: bool = False

    @property
    def val_nats(self) -> float | None:
        return None if self.label is None else self.scores[self.label][0]

    @property
    def val_bpb(self) -> float | None:
        return None if self.label is None else self.scores[self.label][1]

    @property
    def adapted(self) -> str | None:
        """How the model learned while the score that counts was made, "sgd" or "lora"; None where it did not."""
        return next((kind for kind in KINDS if self.label == _label(adapted(kind))), None)

    @property
    def unadapted(self) -> tuple[float, float] | None:
        """Nats a token and bits per byte of the same model that did not learn, by sliding windows."""
        return self.scores.get(_label("sliding"))

    @property
    def spent_s(self) -> float | None:
        """Training, calibration and quantization together."""
        parts = [part for part in (self.train_s, self.calibrate_s, self.quantize_s) if part is not None]
        return sum(parts) if parts else None


def _label(method: str) -> str:
    return f"final_quantized_{method}_exact"


def read_log(path: Path) -> LogFacts:
    """The facts in the log at `path`; whatever is no text is passed over."""
    return parse_log(path.read_text("utf-8", errors="replace"), path.name)


def parse_log(text: str, name: str) -> LogFacts:
    """The facts in a log. name: of its file, which may say the seed."""
    named = _NAME.search(Path(name).stem)
    said = _SEED.search(text)
    found = named or said
    steps = list(_STEP.finditer(text))
    scores = {m[1]: (float(m[2]), float(m[3])) for m in _FINAL.finditer(text)}
    ours = {m[1]: dict(word.partition(":")[::2] for word in m[2].split()) for m in _OURS.finditer(text)}
    facts = _ours(ours) if ours else _theirs(text, steps)
    return LogFacts(
        name=name,
        seed=int(found[1]) if found else None,
        steps=(_int(ours.get("times", {}).get("steps")) or int(steps[-1][1])) if steps else None,
        scores=scores,
        label=_counting(scores),
        losses=tuple(float(m[2]) for m in _LOSS.finditer(text)),
        is_ours=bool(ours),
        **facts,  # type: ignore[arg-type]
    )


def _counting(scores: dict[str, tuple[float, float]]) -> str | None:
    for model, method in PREFERENCE:
        if (label := f"final_{model}_{method}_exact") in scores:
            return label
    return next(reversed(scores), None)


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
    return int(found[-1].replace(",", "")) if found else None


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _int(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
