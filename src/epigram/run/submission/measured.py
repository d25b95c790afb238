"""The figures of submission.json, from the logs and the files: what `submit` writes and `check` compares with."""

from dataclasses import dataclass
from typing import Any

from epigram.run import statistics
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
        if not self.bpb:
            return {}
        return {"val_loss": statistics.summarize(self.nats).mean, "val_bpb": statistics.summarize(self.bpb).mean}

    def spreads(self) -> dict[str, float | None]:
        """Standard deviations of the sample (n - 1); None for a single seed."""
        if not self.bpb:
            return {}
        return {"val_loss_std": statistics.summarize(self.nats).sd, "val_bpb_std": statistics.summarize(self.bpb).sd}

    def bytes(self) -> dict[str, int]:
        found = {"bytes_code": self.code_bytes}
        if self.sizes:
            found |= {"bytes_model": max(self.sizes), "bytes_total": max(self.sizes) + self.code_bytes}
        return found


def measured(record: Record) -> Measured:
    scores = [(log.val_nats, log.val_bpb) for log in record.logs]
    pairs = [(nats, bpb) for nats, bpb in scores if nats is not None and bpb is not None]
    return Measured(
        nats=tuple(nats for nats, _ in pairs),
        bpb=tuple(bpb for _, bpb in pairs),
        sizes=tuple(size for log in record.logs if (size := record.artifact_bytes(log)) is not None),
        code_bytes=record.code_bytes,
    )


def seed_row(log: LogFacts, artifact_bytes: int | None, code_bytes: int) -> dict[str, Any]:
    """A row of `seed_results`; None for what the log does not say."""
    return {
        "val_loss": log.val_nats,
        "val_bpb": log.val_bpb,
        "steps": log.steps,
        "train_s": log.train_s,
        "calibrate_s": log.calibrate_s,
        "quantize_s": log.quantize_s,
        "score_s": log.score_s,
        "bytes_model": artifact_bytes,
        "bytes_total": None if artifact_bytes is None else artifact_bytes + code_bytes,
        "model_sha256": log.sha256,
    }
