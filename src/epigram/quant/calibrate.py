"""Hessians of matrix products, collected through the model's tap, and the record of what they were collected
on."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from epigram.errors import UserError
from epigram.quant.methods.base import full_float32

_SOURCES = ("train", "self")
_HELD_OUT = {"val", "valid", "validation", "dev", "eval", "test"}
_CHUNK_ROWS = 4_096  # rows that are widened to float32 and summed at a time; longer sums lose digits


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What GPTQ's Hessians are measured on.

    source: "train" reads training windows, "self" lets the trained model write its own text (parameter-golf
    #1019), at `temperature`. num_windows windows of seq_len tokens; 0.5 M tokens are plenty (#1626 uses 16
    batches).
    """

    source: str = "train"
    num_windows: int = 256
    seq_len: int = 2048
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.source not in _SOURCES:
            problems.append(
                f"quant.calibration.source must be one of {', '.join(_SOURCES)}, got {self.source!r} "
                "(validation text may not be used)"
            )
        if self.num_windows < 1:
            problems.append(f"quant.calibration.num_windows must be at least 1, got {self.num_windows}")
        if self.seq_len < 2:
            problems.append(f"quant.calibration.seq_len must be at least 2 tokens, got {self.seq_len}")
        if not 0 < self.temperature < math.inf:
            problems.append(f"quant.calibration.temperature must be positive, got {self.temperature}")
        if not 0 <= self.seed < 2**31:
            problems.append(f"quant.calibration.seed must be in 0..2^31-1, got {self.seed}")
        if problems:
            raise UserError("; ".join(problems))

    def provenance(self) -> "CalibrationSource":
        """The record for a calibration that did as this config says."""
        own = self.source == "self"
        return CalibrationSource(
            kind="self-generated" if own else "train",
            split="" if own else "train",
            windows=self.num_windows,
            seq_len=self.seq_len,
            tokens=self.num_windows * self.seq_len,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationSource:
    """Provenance of a calibration, for the artifact's header.

    kind: "train", "self-generated" or "none" (no Hessian was used). Raises UserError for a split that is held
    out: statistics of validation text in the weights are leaked answers (#728).
    """

    kind: str
    split: str = ""
    windows: int = 0
    seq_len: int = 0
    tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("train", "self-generated", "none"):
            raise UserError(f"calibration is train, self-generated or none, not {self.kind!r}")
        if self.kind == "train" and self.split != "train":
            raise UserError(f"calibration may read the training split only, not {self.split!r}")
        if self.kind != "train" and self.split:
            raise UserError(f"calibration of kind {self.kind!r} reads no split, got {self.split!r}")
        if (self.tokens > 0) != (self.kind != "none") or min(self.windows, self.seq_len, self.tokens) < 0:
            raise UserError(f"calibration of kind {self.kind!r} cannot have {self.tokens} tokens")

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def refuse_held_out(paths: Iterable[object]) -> None:
    """Raise UserError if a file that calibration would read looks like validation data by its name, or by its
    folder's name where its own does not say "train"."""
    for path in paths:
        folder, name = ("", *re.split(r"[/\\]", str(path)))[-2:]
        own = _words(name)
        if own & _HELD_OUT or ("train" not in own and _words(folder) & _HELD_OUT):
            raise UserError(f"calibration may not read {path}: it looks like validation data; give it training shards")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


class HessianCollector:
    """Sums XᵀX of the inputs that a model's tap shows, in float32 on `device`.

    taps: tap name -> columns, e.g. from `policy.calibration_taps`; other names are ignored. Memory: cols² * 4
    bytes a tap, allocated at once (151 MB for a #1212 model), and one chunk of inputs.

    Accuracy: bfloat16 inputs are multiplied exactly and added in float32, on CUDA by tensor cores, elsewhere
    after widening; float32 inputs are multiplied without TF32. The sum's relative error is near 1e-6 a batch
    and grows with the number of batches at worst linearly: below 1e-4 for hundreds, against a damping of
    1e-2.
    """

    def __init__(self, device: torch.device | str, taps: Mapping[str, int]) -> None:
        self._sums = {name: torch.zeros(cols, cols, device=device) for name, cols in taps.items()}
        self._rows = dict.fromkeys(taps, 0)

    @torch.no_grad()
    def tap(self, name: str, x: Tensor) -> None:
        """Add the rows of `x` (..., cols), of any float dtype, on the collector's device."""
        total = self._sums.get(name)
        if total is None:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        assert rows.shape[1] == total.shape[0], f"tap {name} shows {rows.shape[1]} columns, expected {total.shape[0]}"
        self._rows[name] += len(rows)
        if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
            total += torch.mm(rows.mT, rows, out_dtype=torch.float32)
            return
        with full_float32():
            for chunk in rows.split(_CHUNK_ROWS):
                wide = chunk.float()
                total += wide.mT @ wide  # a sum of its own: adding into the total one by one loses digits

    def finish(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Mean of xᵀx over all rows by tap, (cols, cols) float32.

        reduce: returns a tensor's sum over ranks (and may work in place); called for the numbers of rows, on the CPU,
        and then for every tap in the order of their names, so all ranks must have asked for the same. Leaves the
        collector as it is. #1212 divides by the number of batches instead; damping is relative to the diagonal, so the
        scale changes nothing.
        """
        names, reduce = sorted(self._sums), reduce or _itself
        counts = reduce(torch.tensor([self._rows[name] for name in names])).tolist()
        unseen = [name for name, count in zip(names, counts, strict=True) if not count]
        assert not unseen, f"calibration never saw an input at tap {', '.join(unseen)}"
        return {n: reduce(self._sums[n].clone()) / count for n, count in zip(names, counts, strict=True)}


def _itself(tensor: Tensor) -> Tensor:
    return tensor
