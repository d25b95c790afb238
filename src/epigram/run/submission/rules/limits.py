"""What a record is measured by."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the challenge: bytes of code and artifact, seconds of training and of scoring."""

    cap_bytes: int = 16_000_000
    train_s: float = 600.0
    score_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Against:
    """A record to beat: val_loss in nats a token, of each of its seeds where they are known, else the mean alone."""

    name: str
    nats: tuple[float, ...]
