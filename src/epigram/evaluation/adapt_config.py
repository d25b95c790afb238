"""How a model learns from a text while it is scored: off, or one of two kinds. Settings only."""

from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("sgd", "lora")
LORA_TARGETS = ("q", "k", "v", "out", "mlp", "head")


def adapted(kind: str) -> str:
    """What the score of a model that adapts is called, in results and logs."""
    return f"adapted_{kind}"


def _below_one(config: object, names: Iterable[str]) -> list[str]:
    return [f"{name} = {getattr(config, name)} must be at least 1" for name in names if getattr(config, name) < 1]


@dataclass(frozen=True, kw_only=True)
class SgdConfig:
    """All weights learn from each chunk, by SGD as parameter-golf #549 does it, over sliding windows.

    chunk_tokens: scored before each update. lr: of the first chunk; it falls to 0 at the last along half a cosine.
    epochs: over the chunk, in rows of the score's seq_len, num_rows of them a step. max_norm: of a step's gradient.
    frozen_layers: so many layers from the first on keep their weights.
    """

    chunk_tokens: int = 32_768
    lr: float = 0.002
    momentum: float = 0.9
    epochs: int = 3
    num_rows: int = 32
    max_norm: float = 1.0
    frozen_layers: int = 0

    def __post_init__(self) -> None:
        bad = _below_one(self, ("chunk_tokens", "epochs", "num_rows"))
        if self.lr <= 0 or self.max_norm <= 0 or not 0 <= self.momentum < 1:
            bad.append(
                f"lr = {self.lr} and max_norm = {self.max_norm} must be positive, momentum = {self.momentum} in [0, 1)"
            )
        if self.frozen_layers < 0:
            bad.append(f"frozen_layers = {self.frozen_layers} must not be negative")
        if bad:
            raise ValueError("; ".join(bad))


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Each document has low-rank adapters of its own, as in parameter-golf #1530; the weights of the file stay.

    targets: of LORA_TARGETS, see `epigram.kernels.lora`; all but head in every layer. rank; alpha: outputs times
    alpha / rank. chunk_tokens: scored before each step of AdamW (lr, betas (beta1, beta2), eps, weight_decay) on them.
    num_documents: read side by side, fewer where a forward may not have as many tokens (speed, not score).
    lr = 0: documents by themselves, and nothing is learned.
    """

    targets: tuple[str, ...] = LORA_TARGETS
    rank: int = 80
    alpha: float = 80.0
    lr: float = 1e-4
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 0.5
    chunk_tokens: int = 48
    num_documents: int = 64

    def __post_init__(self) -> None:
        bad = _below_one(self, ("rank", "chunk_tokens", "num_documents"))
        if not self.targets or len(set(self.targets)) < len(self.targets) or not set(self.targets) <= set(LORA_TARGETS):
            bad.append(f"targets = {list(self.targets)} must be some of {', '.join(LORA_TARGETS)}, each once")
        if self.alpha <= 0 or self.lr < 0 or self.eps <= 0 or self.weight_decay < 0:
            bad.append(
                f"alpha = {self.alpha} and eps = {self.eps} must be positive, lr = {self.lr} and "
                f"weight_decay = {self.weight_decay} not negative"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            bad.append(f"beta1 = {self.beta1} and beta2 = {self.beta2} must be in [0, 1)")
        if bad:
            raise ValueError("; ".join(bad))


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """kind: "none", or one of KINDS, whose settings are under its name. The other methods' scores stay unadapted."""

    kind: str = "none"
    sgd: SgdConfig = SgdConfig()
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        if self.kind not in ("none", *KINDS):
            raise ValueError(f"kind = {self.kind!r} must be one of none, {', '.join(KINDS)}")

    def nothing_learned(self, num_targets: int) -> str | None:
        """Why a text of so many targets teaches nothing before it is over, in a sentence; None when it does."""
        if self.kind == "sgd" and num_targets <= self.sgd.chunk_tokens:
            return (
                f"nothing would be learned: the text has {num_targets:,} tokens, all in the first chunk "
                f"(score.adapt.sgd.chunk_tokens = {self.sgd.chunk_tokens}): score a longer text, or take shorter chunks"
            )
        return None

    def problems(self, seq_len: int) -> list[str]:
        """What does not go with windows of `seq_len`, in sentences."""
        if self.kind == "sgd" and self.sgd.chunk_tokens < seq_len:
            return [f"adapt.sgd.chunk_tokens = {self.sgd.chunk_tokens} is below one window of seq_len = {seq_len}"]
        if self.kind == "lora" and self.lora.chunk_tokens > seq_len:
            return [f"adapt.lora.chunk_tokens = {self.lora.chunk_tokens} is over one window of seq_len = {seq_len}"]
        return []
