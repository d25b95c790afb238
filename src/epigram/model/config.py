"""The model's settings. Every technique has an empty value that turns it off, so that each can be ablated alone."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes in channels, counts, token positions; layers count from 0.

    vocab_size: tokens of the vocabulary. The output matrix is the token embedding (tied).
    num_layers, model_dim, num_heads, num_kv_heads, head_dim: the transformer; grouped attention with fewer kv heads.
    mlp_dim: hidden channels; mlp_slope: f(p) = p^2 for p > 0, (mlp_slope * p)^2 otherwise (parameter-golf #493).
    window, window_layers: those layers see `window` positions back besides their own; 0 or no layers: full attention.
    xsa_layers: attention output without its part along the token's own value vector (parameter-golf #287).
    rotary_dim: rotated channels of each head, 0 for none; rotary_base at windows of up to rotary_reference_len tokens,
        rescaled beyond (`rotary_scaling` "ntk"), or the same for all lengths ("none").
    qk_gain: initial gain of each query head after q and k were normalised.
    depth_scale: layer i's normalised inputs are divided by sqrt(i + 1) (parameter-golf #315).
    bigram_buckets, bigram_dim: hashed embedding of token pairs; 0 buckets: none (parameter-golf #162).
    value_embed_layers, value_embed_dim: a shared token embedding added to the values there (parameter-golf #374).
    smear: a gate mixes each embedding with the one before it (parameter-golf #162).
    skips: "none", "plain" (x + w * skip), or "gated" (sigmoid gate between x and w * skip, parameter-golf #1089).
    backout_layer: this layer's output times a scalar is subtracted before the head; -1: none (modded-nanogpt #140).
    residual_lambdas: learned factors on the stream entering each sublayer's sum (parameter-golf #1130).
    softcap: logits are softcap * tanh(logits / softcap); 0: none.
    documents: "joined" lets a token see over the start of its document, "isolated" lets neither attention nor the smear
        gate nor the bigram table (parameter-golf #1530, #1851, #1855). bos_id: the token that every document begins
        with, that of the data's tokenizer; only read where documents are isolated.
    embed_std, zero_init_out: initial values; output projections start at zero, or orthogonal and scaled by depth.

    Raises ValueError with every conflict at once.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    mlp_slope: float = 0.5
    window: int = 0
    window_layers: tuple[int, ...] = ()
    xsa_layers: tuple[int, ...] = ()
    rotary_dim: int = 16
    rotary_base: float = 10000.0
    rotary_reference_len: int = 1024
    rotary_scaling: str = "ntk"
    qk_gain: float = 2.5
    depth_scale: bool = True
    bigram_buckets: int = 0
    bigram_dim: int = 128
    value_embed_layers: tuple[int, ...] = ()
    value_embed_dim: int = 128
    smear: bool = True
    skips: str = "gated"
    backout_layer: int = -1
    residual_lambdas: bool = False
    softcap: float = 30.0
    documents: str = "joined"
    bos_id: int = 1
    embed_std: float = 0.005
    zero_init_out: bool = True

    def __post_init__(self) -> None:
        problems = [*self._size_problems(), *self._choice_problems(), *self._layer_problems()]
        if problems:
            raise ValueError("; ".join(problems))

    def _size_problems(self) -> list[str]:
        counts = ["vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"]
        counts.append("rotary_reference_len")
        if self.bigram_buckets:
            counts.append("bigram_dim")
        if self.value_embed_layers:
            counts.append("value_embed_dim")
        found = [f"{name} = {getattr(self, name)} must be positive" for name in counts if getattr(self, name) < 1]
        width = max(self.model_dim, self.bigram_dim, self.value_embed_dim)
        rows = self.vocab_size + self.bigram_buckets + self.num_layers * (self.query_dim + self.kv_dim + self.mlp_dim)
        if (rows + width) * width > 2**40:  # no tensor has twice as many numbers
            found.append(f"model_dim and the other sizes make about {rows * width:,} weights: at most 2^40")
        if self.vocab_size > 59_000 and self.bigram_buckets:
            found.append(
                f"vocab_size = {self.vocab_size} overflows the bigram hash: at most 59000, or bigram_buckets = 0"
            )
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            found.append(f"num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            found.append(f"rotary_dim = {self.rotary_dim} must be even and at most head_dim = {self.head_dim}")
        if self.rotary_dim == 2 and self.rotary_scaling == "ntk":
            found.append('rotary_dim = 2 has one frequency, which rotary_scaling = "ntk" cannot rescale: use "none"')
        if self.bigram_buckets == 1 or self.bigram_buckets < 0:
            found.append(f"bigram_buckets = {self.bigram_buckets} must be 0 (off) or at least 2")
        for name in ("rotary_base", "embed_std"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"{name} = {getattr(self, name)} must be a positive number")
        for name in ("softcap", "mlp_slope"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name} = {getattr(self, name)} must be 0 or a positive number")
        if not math.isfinite(self.qk_gain) or self.qk_gain == 0:  # from 0 fused kernels would never learn
            found.append(f"qk_gain = {self.qk_gain} must be a number other than 0")
        if self.isolated and not 0 <= self.bos_id < self.vocab_size:
            found.append(
                f'documents = "isolated" needs the token that documents begin with, and bos_id = {self.bos_id} is none '
                f'of the {self.vocab_size}: a tokenizer without BOS needs documents = "joined"'
            )
        return found

    def _choice_problems(self) -> list[str]:
        choices = {
            "skips": ("none", "plain", "gated"),
            "rotary_scaling": ("ntk", "none"),
            "documents": ("joined", "isolated"),
        }
        return [
            f"{name} = {getattr(self, name)!r} must be one of {', '.join(allowed)}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]

    def _layer_problems(self) -> list[str]:
        found = []
        for name in ("window_layers", "xsa_layers", "value_embed_layers"):
            layers = getattr(self, name)
            if sorted(set(layers)) != list(layers) or any(not 0 <= i < self.num_layers for i in layers):
                found.append(f"{name} = {list(layers)} must be increasing layers from 0 to {self.num_layers - 1}")
        if self.window_layers and self.window < 1:
            found.append(f"window_layers = {list(self.window_layers)} need window >= 1, not {self.window}")
        if not -1 <= self.backout_layer < self.num_layers:
            found.append(f"backout_layer = {self.backout_layer} must be -1 (off) or a layer below {self.num_layers}")
        return found

    @property
    def isolated(self) -> bool:
        """Whether nothing crosses the start of a document."""
        return self.documents == "isolated"

    @property
    def reset_id(self) -> int:
        """The token that begins documents where they are isolated, else -1: no token."""
        return self.bos_id if self.isolated else -1

    @property
    def query_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_skips(self) -> int:
        """Layers of the second half that take a skip from the first."""
        return 0 if self.skips == "none" else self.num_layers // 2

    def layer_window(self, layer: int) -> int:
        """The attention window of `layer`, 0 for the whole prefix."""
        return self.window if layer in self.window_layers else 0
