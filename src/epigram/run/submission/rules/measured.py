"""The figures of submission.json as the logs and the files have them."""

import math
import statistics as plain
from dataclasses import dataclass
from typing import Any

from epigram.run.submission.logs import LogFacts
from epigram.run.submission.record import Record


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of the logs that have a final score. nats, bpb: by log. sizes: bytes of the artifacts that are known."""

    nats: tuple[float, ...]
    bpb: tuple[float, ...]
    sizes: tuple[int, ...]
    code_bytes: int

    def means(self) -> dict[str, float]:
        return {"val_loss": plain.fmean(self.nats), "val_bpb": plain.fmean(self.bpb)} if self.bpb else {}

    def spreads(self) -> dict[str, float]:
        """Standard deviations of the sample (n - 1); none of a single seed."""
        if len(self.bpb) < 2:
            return {}
        return {"val_loss_std": plain.stdev(self.nats), "val_bpb_std": plain.stdev(self.bpb)}

    def bytes(self) -> dict[str, int]:
        found = {"bytes_code": self.code_bytes}
        if self.sizes:
            found |= {"bytes_model": max(self.sizes), "bytes_total": max(self.sizes) + self.code_bytes}
        return found


def measured(record: Record) -> Measured:
    scores = [(log.val_nats, log.val_bpb) for log in record.logs]
    pairs = [(nats, bpb) for nats, bpb in scores if nats is not None and bpb is not None and math.isfinite(nats + bpb)]
    return Measured(
        nats=tuple(nats for nats, _ in pairs),
        bpb=tuple(bpb for _, bpb in pairs),
        sizes=tuple(size for log in record.logs if (size := record.artifact_bytes(log)) is not None),
        code_bytes=record.code_bytes,
    )


def seed_row(record: Record, log: LogFacts) -> dict[str, Any]:
    """A row of `seed_results`: what the log says, without what it does not say."""
    size = record.artifact_bytes(log)
    row = {
        "val_loss": log.val_nats,
        "val_bpb": log.val_bpb,
        "steps": log.steps,
        "train_s": log.train_s,
        "calibrate_s": log.calibrate_s,
        "quantize_s": log.quantize_s,
        "score_s": log.score_s,
        "bytes_model": size,
        "bytes_total": None if size is None else size + record.code_bytes,
        "model_sha256": log.sha256,
    }
    return {key: value for key, value in row.items() if value is not None}
