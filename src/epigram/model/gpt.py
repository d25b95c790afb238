"""The model: one forward for training, calibration, scoring and generation.

Legend: B sequences, T positions, V vocabulary, D model width, H query heads, K key/value heads.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epigram.attention.base import Attend, within
from epigram.attention.sdpa import attend as sdpa_attend
from epigram.kernels.base import PLAIN, Kernels
from epigram.kernels.front import smear
from epigram.kernels.head import tied_logits
from epigram.kernels.heads import HeadCounts
from epigram.kernels.lora import Lora
from epigram.kernels.trunk import Layer, Shape
from epigram.model.cache import Cache, Matrices
from epigram.model.config import ModelConfig
from epigram.model.documents import reach as reach_of
from epigram.model.embeddings import BigramEmbedding, Skips, SmearGate, ValueEmbedding
from epigram.model.rope import rotary_tables
from epigram.roles import ParameterRole

Tap = Callable[[str, Tensor], None]
"""Called with the name of a product and its input, shape (B, T, channels)."""

BankTransform = Callable[[str, Tensor], Tensor]
"""Called with a bank's name and its weights; returns what the products use (fake quantization)."""


_FEW = 256  # tokens a call: below, launching kernels takes longer than computing


class Banks(nn.Module):
    """Weight matrices stacked over layers: q, k and v above each other (one product), out, up, down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, d = config.num_layers, config.model_dim
        self.qkv = nn.Parameter(torch.empty(n, config.query_dim + 2 * config.kv_dim, d))
        self.out = nn.Parameter(torch.empty(n, d, config.query_dim))
        self.up = nn.Parameter(torch.empty(n, config.mlp_dim, d))
        self.down = nn.Parameter(torch.empty(n, d, config.mlp_dim))


class GPT(nn.Module):
    """The window-attention, mixed-length transformer of parameter-golf #1212 and its ancestors.

    `compute_dtype` is the precision of activations and products (parameters stay float32); `kernels` computes the
    operations; `attend` and `attend_window` are the attention backends of full and windowed layers. All are set from
    outside.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.kernels: Kernels = PLAIN
        self.attend: Attend = sdpa_attend
        self.attend_window: Attend = sdpa_attend
        n, d = config.num_layers, config.model_dim
        self.embed = nn.Parameter(torch.empty(config.vocab_size, d))
        self.banks = Banks(config)
        self.attn_scale = nn.Parameter(torch.ones(n, d))
        self.mlp_scale = nn.Parameter(torch.ones(n, d))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(n, d), torch.zeros(n, d)], dim=1))
        self.q_gain = nn.Parameter(torch.full((n, config.num_heads), config.qk_gain))
        if config.residual_lambdas:
            self.resid_lambda = nn.Parameter(torch.full((n, 2), math.sqrt(1.1)))
        if config.bigram_buckets:
            self.bigram = BigramEmbedding(config)
        if config.value_embed_layers:
            self.value_embed = ValueEmbedding(config)
        if config.smear:
            self.smear = SmearGate(config)
        if config.num_skips:
            self.skip = Skips(config)
        if config.backout_layer >= 0:
            self.backout = nn.Parameter(torch.tensor(0.1))

    # -- initial values and roles ---------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw the initial values, in float32 on one thread of the CPU so that every machine and rank starts alike.

        Products that read the stream are orthogonal, matrix by matrix; those that write to it are zero.
        """
        with _one_thread():
            self._draw(torch.Generator().manual_seed(seed))

    def _draw(self, generator: torch.Generator) -> None:
        c = self.config
        self.embed.copy_(torch.empty(self.embed.shape).normal_(0, c.embed_std, generator=generator))
        for layer in range(c.num_layers):
            parts = [_orthogonal(rows, c.model_dim, generator) for rows in (c.query_dim, c.kv_dim, c.kv_dim)]
            self.banks.qkv[layer].copy_(torch.cat(parts))
            self.banks.up[layer].copy_(_orthogonal(c.mlp_dim, c.model_dim, generator))
            for bank in (self.banks.out, self.banks.down):
                weight = _orthogonal(bank.shape[1], bank.shape[2], generator) / math.sqrt(2 * c.num_layers)
                bank[layer].copy_(torch.zeros_like(weight) if c.zero_init_out else weight)
        if c.bigram_buckets:
            self.bigram.proj.copy_(_orthogonal(c.model_dim, c.bigram_dim, generator))
        if c.value_embed_layers:
            table = self.value_embed.embed
            table.copy_(torch.empty(table.shape).normal_(0, 0.01, generator=generator))
            self.value_embed.proj.copy_(_orthogonal(c.kv_dim, c.value_embed_dim, generator))

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by name, in the order of `named_parameters`."""
        return {name: self._role(name) for name, _ in self.named_parameters()}

    def _role(self, name: str) -> ParameterRole:
        c, n = self.config, self.config.num_layers
        if name.startswith("banks."):
            bank = name.removeprefix("banks.")
            qkv = (("q", c.query_dim), ("k", c.kv_dim), ("v", c.kv_dim))
            splits = {
                "qkv": qkv,
                "out": (("out", c.model_dim),),
                "up": (("up", c.mlp_dim),),
                "down": (("down", c.model_dim),),
            }
            return ParameterRole(kind="matrix", num_layers=n, bank=bank, splits=splits[bank])
        if name == "embed" or name.endswith(".embed"):
            # The token embedding is also the head's matrix; the others are only looked up.
            return ParameterRole(kind="table", bank="head" if name == "embed" else "")
        layered = name in ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "resid_lambda")
        return ParameterRole(kind="control", num_layers=n if layered else 0)

    # -- the forward ----------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        *,
        rope_len: int | None = None,
        cache: Cache | None = None,
        tap: Tap | None = None,
        transform: BankTransform | None = None,
        last: int | None = None,
        kernels: Kernels | None = None,
        lora: Lora | None = None,
    ) -> Tensor:
        """Tokens (B, T) to normalised final states (B, T, D) in the compute precision.

        rope_len: the window length whose rotary base is used; T when not given. With a cache the tokens continue what
        the cache holds, and its context_len counts. last: only the states of the last positions, (B, last, D); what the
        last layer need not compute for the others, it does not. kernels: instead of the model's own. lora: what each
        row's own adapters add in the layers.
        """
        # The twins show every product's input, and are quicker with the few tokens of a generation.
        few = cache is not None and tokens.shape[1] < _FEW
        kernels = PLAIN if few or tap is not None or lora is not None else kernels or self.kernels
        c, see = self.config, tap or _ignore
        value = self._value(tokens, kernels, see)
        reach = reach_of(tokens, c.bos_id, cache.reach if cache else None) if c.isolated else None
        kept = c.backout_layer if c.backout_layer < c.num_layers - 1 else -1  # the last layer needs no keeping
        x, backed = kernels.trunk(
            self._embed(tokens, kernels, cache, see),
            self._layers(kernels, cache, transform, lora, reach),
            value,
            self._shape(tokens, rope_len, cache),
            kept=kept,
            last=last,
            **({} if tap is None else {"see": tap}),
        )
        if cache is not None:
            cache.advance(tokens, reach)
        x = self._leave(x, backed, last, kernels)
        see("head", x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Soft-capped logits, float32, from the final states: (..., D) -> (..., V)."""
        return tied_logits(x, self.embed.to(x.dtype), self.config.softcap)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        gamma: Tensor | None = None,
        floor: float = 0.0,
        transform: BankTransform | None = None,
        rope_len: int | None = None,
        kernels: Kernels | None = None,
    ) -> Tensor:
        """Training loss over (B, T) tokens and targets; see `epigram.loss.training_loss`.

        rope_len, kernels: as in `forward`.
        """
        kernels = kernels or self.kernels
        x = self(tokens, transform=transform, rope_len=rope_len, kernels=kernels)
        return kernels.head_loss(x, self.embed.to(x.dtype), targets, self.config.softcap, gamma, floor)

    def nll(
        self,
        tokens: Tensor,
        targets: Tensor,
        rope_len: int | None = None,
        last: int | None = None,
        cache: Cache | None = None,
        lora: Lora | None = None,
    ) -> Tensor:
        """Nats of each target, (B, T) float32; of the last ones only, (B, last), when `last` is given.

        With a cache the tokens continue what it holds, see `forward`. lora: what each row's own adapters add.
        """
        x = self(tokens, rope_len=rope_len, last=last, cache=cache, lora=lora)
        targets = targets if last is None else targets[:, -last:]
        if lora is not None:
            return PLAIN.head_nll(x, self.embed.to(x.dtype), targets, self.config.softcap, lora.head)
        return self.kernels.head_nll(x, self.embed.to(x.dtype), targets, self.config.softcap)

    def _shape(self, tokens: Tensor, rope_len: int | None, cache: Cache | None) -> Shape:
        c, length = self.config, tokens.shape[1]
        start = cache.position if cache is not None else 0
        rope_len = cache.context_len if cache is not None else rope_len or length
        rotary = rotary_tables(c, start, length, rope_len, tokens.device, self.compute_dtype)
        return Shape(HeadCounts(c.num_heads, c.num_kv_heads, c.head_dim), rotary, c.mlp_slope)

    def _embed(self, tokens: Tensor, kernels: Kernels, cache: Cache | None, see: Tap) -> Tensor:
        """The stream before the first layer, (B, T, D)."""
        dtype, extra = self.compute_dtype, None
        if self.config.bigram_buckets:
            pair = self.bigram.lookup(tokens, cache.previous_token if cache else None, dtype, kernels)
            see("bigram.proj", pair)
            extra = F.linear(pair, (self.bigram.scale * self.bigram.proj).to(dtype))
        gate = torch.sigmoid(self.smear.gate) if self.config.smear else None
        if cache is None or gate is None:
            return kernels.enter(tokens, self.embed, extra, gate, dtype, self.config.reset_id)
        x = kernels.enter(tokens, self.embed, extra, None, dtype)
        before, cache.previous_embedding = cache.previous_embedding, x[:, -1:]
        return smear(x, gate, before, tokens == self.config.bos_id if self.config.isolated else None)

    def _value(self, tokens: Tensor, kernels: Kernels, see: Tap) -> Tensor | None:
        """(B, T, value_embed_dim): what some layers' values get on top, before their projections."""
        if not self.config.value_embed_layers:
            return None
        value = self.value_embed.lookup(tokens, self.compute_dtype, kernels)
        see("value_embed.proj", value)
        return value

    def _layers(
        self,
        kernels: Kernels,
        cache: Cache | None,
        transform: BankTransform | None,
        lora: Lora | None,
        reach: Tensor | None,
    ) -> list[Layer]:
        """What each layer is made of. reach: of isolated documents."""
        c = self.config
        banks, values = self._matrices(kernels, cache, transform)
        gains = self.q_gain.unbind(0)
        carries = self.resid_lambda.unbind(0) if c.residual_lambdas else None
        full, windowed = self._backends(cache, reach)
        layers = []
        for i, (own, first, skip) in enumerate(self._mixes()):
            window = c.layer_window(i) if cache is None else cache.windows[i]
            attend = windowed if c.layer_window(i) else full
            attend = attend if cache is None else _remembering(attend, cache, i)
            layers.append(
                Layer(
                    own=own,
                    first=first,
                    skip=skip,
                    qkv=banks["qkv"][i],
                    out=banks["out"][i],
                    gain=gains[i],
                    value=values.get(i),
                    up=banks["up"][i],
                    down=banks["down"][i],
                    attend=attend,
                    window=window,
                    exclude=i in c.xsa_layers,
                    carry=carries[i] if carries else None,
                    lora=lora.layers[i] if lora else None,
                )
            )
        return layers

    def _matrices(self, kernels: Kernels, cache: Cache | None, transform: BankTransform | None) -> Matrices:
        """The layers' weights: a bank is converted to the compute precision once, then split.

        The scales of a layer's input and outputs go into the rows of its matrices. A cache keeps them: for a few tokens
        it takes longer to make than to use them.
        """
        keeper = None if transform is not None or torch.is_grad_enabled() else cache
        if keeper is not None and keeper.matrices is not None:
            return keeper.matrices
        depth = self._depth_scale() if self.config.depth_scale else None
        scales = {"qkv": depth, "out": self.attn_scale, "up": depth, "down": self.mlp_scale}
        banks = {}
        for name, bank in self.banks.named_parameters():
            used = transform(name, bank) if transform else bank
            scale = scales[name]
            rows = None if scale is None else scale.expand(bank.shape[:2])
            banks[name] = kernels.scaled(used, rows, self.compute_dtype).unbind(0)
        values = self.value_embed.projections(self.compute_dtype) if self.config.value_embed_layers else {}
        if keeper is not None:
            keeper.matrices = banks, values
        return banks, values

    def _depth_scale(self) -> Tensor:
        """(layers, 1): what each layer's normalised inputs are multiplied with."""
        return torch.arange(1, self.config.num_layers + 1, device=self.embed.device).float().rsqrt()[:, None]

    def _mixes(self) -> list[tuple[Tensor | None, Tensor, tuple[int, Tensor] | None]]:
        """For each layer the coefficients (D,) of the stream that enters it, of the first stream, and of its skip.

        What is one stream gets one coefficient: the first layer reads x0 alone, and the first layer that takes a skip
        takes it from the layer before.
        """
        owns, firsts = self.resid_mix[:, 0], self.resid_mix[:, 1]
        mixes: list[tuple[Tensor | None, Tensor, tuple[int, Tensor] | None]]
        mixes = [(own, first, None) for own, first in zip(owns.unbind(0), firsts.unbind(0), strict=True)]
        mixes[0] = (None, owns[0] + firsts[0], None)
        half = self.config.num_layers // 2
        if self.config.num_skips:
            stream, skipped = self.skip.coefficients()
            taking = owns[half : half + self.config.num_skips]
            for index, (own, skip) in enumerate(zip(taking * stream, taking * skipped, strict=True)):
                if index == 0:
                    mixes[half] = (own + skip, firsts[half], None)
                else:
                    mixes[half + index] = (own, firsts[half + index], (half - 1 - index, skip))
        return mixes

    def _backends(self, cache: Cache | None, reach: Tensor | None) -> tuple[Attend, Attend]:
        """Attention of full and of windowed layers, within documents if `reach` is given."""
        own = None if cache is None else cache.attend
        full, windowed = own or self.attend, own or self.attend_window
        first = within(full, reach)
        # One backend makes of `reach` what it needs once for all layers.
        return first, first if full is windowed else within(windowed, reach)

    def _leave(self, x: Tensor, backed: Tensor | None, last: int | None, kernels: Kernels) -> Tensor:
        """The normalised final states."""
        width = x.shape[-1]
        if self.config.backout_layer < 0:
            return kernels.mix_norm((x,), (None,))
        if backed is None:  # the last layer backs itself out
            return kernels.mix_norm((x,), ((1 - self.backout).expand(width).contiguous(),))
        backed = backed if last is None else backed[:, -last:]
        return kernels.mix_norm((x, backed), (None, (-self.backout).expand(width).contiguous()))


def _remembering(attend: Attend, cache: Cache, layer: int) -> Attend:
    """`attend` over all keys and values that the cache holds, the new ones included."""

    def attend_all(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        if not window:  # the own position alone, which no backend offers; there may be fewer queries than values
            return v[:, -q.shape[1] :].repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return attend(q, *cache.layers[layer].append(k, v), window)

    return attend_all


def _ignore(name: str, x: Tensor) -> None:
    """The tap that nobody looks through."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch with one thread on the CPU.

    How many share a factorization decides its last bits. And small ones gain nothing from threads, but much is lost
    where several processes have as many as the machine has processors: 12 s instead of 1 for two on two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _orthogonal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A (rows, cols) matrix with orthonormal rows or columns, whichever are fewer."""
    weight = torch.empty(rows, cols)
    nn.init.orthogonal_(weight, generator=generator)
    return weight
