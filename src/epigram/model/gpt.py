"""The model: one forward for training, calibration, scoring and generation.

Legend: B sequences, T positions, V vocabulary, D model width, H query heads, K key/value heads.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epigram.attention.base import Attend
from epigram.attention.sdpa import attend as sdpa_attend
from epigram.kernels.base import PLAIN, Kernels
from epigram.kernels.front import smear
from epigram.kernels.heads import AttentionWeights
from epigram.loss import softcap
from epigram.model.block import LayerWeights, Pass, block
from epigram.model.cache import Cache
from epigram.model.config import ModelConfig
from epigram.model.embeddings import BigramEmbedding, Skips, SmearGate, ValueEmbedding
from epigram.model.rope import rotary_tables
from epigram.roles import ParameterRole

Tap = Callable[[str, Tensor], None]
"""Called with the name of a product and its input, shape (B, T, channels)."""

BankTransform = Callable[[str, Tensor], Tensor]
"""Called with a bank's name and its weights; returns what the products use (fake quantization)."""


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

    depth: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.kernels: Kernels = PLAIN
        self.attend: Attend = sdpa_attend
        self.attend_window: Attend = sdpa_attend
        n, d = config.num_layers, config.model_dim
        self.register_buffer("depth", torch.arange(1, n + 1).float().rsqrt()[:, None], persistent=False)
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
        """Draw the initial values, in float32 on the CPU so that every device and rank starts alike.

        Products that read the stream are orthogonal, matrix by matrix; those that write to it are zero.
        """
        generator = torch.Generator().manual_seed(seed)
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
    ) -> Tensor:
        """Tokens (B, T) to normalised final states (B, T, D) in the compute precision.

        rope_len: the window length whose rotary base is used; T when not given. With a cache the tokens continue what
        the cache holds, and its rope_len counts. last: only the states of the last positions, (B, last, D); what the
        last layer need not compute for the others, it does not.
        """
        run = self._prepare(tokens, rope_len, cache, tap)
        x = x0 = self._embed(tokens, run)
        skips: list[Tensor] = []
        kept: Tensor | None = None
        mixes = self._mixes()
        for layer, weights in enumerate(self._layers(run, transform)):
            streams, coefficients = self._entering(layer, x, x0, skips, mixes[layer])
            x, rstd, streams = run.kernels.mix(streams, coefficients)
            x0 = streams[-1]
            if 0 < layer < self._first_skip_layer:
                skips.append(streams[0])
            if layer - 1 == self.config.backout_layer:
                kept = streams[0]
            x = block(x, rstd, weights, run, last if layer == self.config.num_layers - 1 else None)
        if cache is not None:
            cache.advance(tokens)
        x = self._leaving(x, kept, last, run)
        run.see("head", x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Soft-capped logits, float32, from the final states: (..., D) -> (..., V)."""
        return softcap(F.linear(x, self.embed.to(x.dtype)).float(), self.config.softcap)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        gamma: Tensor | None = None,
        floor: float = 0.0,
        transform: BankTransform | None = None,
    ) -> Tensor:
        """Training loss over (B, T) tokens and targets; see `epigram.loss.training_loss`."""
        x = self(tokens, transform=transform)
        return self.kernels.head_loss(x, self.embed.to(x.dtype), targets, self.config.softcap, gamma, floor)

    def nll(self, tokens: Tensor, targets: Tensor, rope_len: int | None = None, last: int | None = None) -> Tensor:
        """Nats of each target, (B, T) float32; of the last ones only, (B, last), when `last` is given."""
        x = self(tokens, rope_len=rope_len, last=last)
        targets = targets if last is None else targets[:, -last:]
        return self.kernels.head_nll(x, self.embed.to(x.dtype), targets, self.config.softcap)

    def _prepare(self, tokens: Tensor, rope_len: int | None, cache: Cache | None, tap: Tap | None) -> Pass:
        length = tokens.shape[1]
        start = cache.position if cache is not None else 0
        rope_len = cache.rope_len if cache is not None else (rope_len or length)
        # The twins show every product's input, and are quicker with the few tokens of a generation.
        kernels = self.kernels if cache is None and tap is None else PLAIN
        run = Pass(
            config=self.config,
            dtype=self.compute_dtype,
            rotary=rotary_tables(self.config, start, length, rope_len, tokens.device, self.compute_dtype),
            attend=self.attend,
            attend_window=self.attend_window,
            kernels=kernels,
            value=self.value_embed.lookup(tokens, self.compute_dtype, kernels) if self._has_value else None,
            cache=cache,
            tap=tap,
        )
        if run.value is not None:
            run.see("value_embed.proj", run.value)
        return run

    def _embed(self, tokens: Tensor, run: Pass) -> Tensor:
        """The stream before the first layer, (B, T, D)."""
        cache, extra = run.cache, None
        if self.config.bigram_buckets:
            pair = self.bigram.lookup(tokens, cache.previous_token if cache else None, run.dtype, run.kernels)
            run.see("bigram.proj", pair)
            extra = F.linear(pair, (self.bigram.scale * self.bigram.proj).to(run.dtype))
        gate = torch.sigmoid(self.smear.gate) if self.config.smear else None
        if cache is None or gate is None:
            return run.kernels.enter(tokens, self.embed, extra, gate, run.dtype)
        x = run.kernels.enter(tokens, self.embed, extra, None, run.dtype)
        before, cache.previous_embedding = cache.previous_embedding, x[:, -1:]
        return smear(x, gate, before)

    @property
    def _has_value(self) -> bool:
        return bool(self.config.value_embed_layers)

    @property
    def _first_skip_layer(self) -> int:
        """The first layer that takes a skip; none does when it is 0."""
        return self.config.num_layers // 2 if self.config.num_skips else 0

    def _mixes(self) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """For each layer the coefficients (D,) of the stream, of its skip if it takes one, and of the first stream."""
        own, first = (part.unbind(0) for part in self.resid_mix.unbind(1))
        mixes: list[tuple[Tensor, Tensor | None, Tensor]] = [(a, None, b) for a, b in zip(own, first, strict=True)]
        if self.config.num_skips:
            for index, (stream, skip) in enumerate(self.skip.coefficients()):
                layer = self._first_skip_layer + index
                mixes[layer] = (own[layer] * stream, own[layer] * skip, first[layer])
        return mixes

    def _entering(
        self, layer: int, x: Tensor, x0: Tensor, skips: list[Tensor], mix: tuple[Tensor, Tensor | None, Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Streams that meet before `layer`, x first and x0 last, each once, and their coefficients."""
        own, skipped, first = mix
        if layer == 0:
            return (x0,), (own + first,)
        if skipped is None:
            return (x, x0), (own, first)
        if layer == self._first_skip_layer:  # whose skip is x itself
            return (x, x0), (own + skipped, first)
        return (x, skips.pop(), x0), (own, skipped, first)

    def _leaving(self, x: Tensor, kept: Tensor | None, last: int | None, run: Pass) -> Tensor:
        """The normalised final states."""
        if self.config.backout_layer < 0:
            return run.kernels.mix_norm((x,), (None,))
        if kept is None:  # the last layer backs itself out
            return run.kernels.mix_norm((x,), ((1 - self.backout).expand(x.shape[-1]).contiguous(),))
        kept = kept if last is None else kept[:, -last:].contiguous()
        return run.kernels.mix_norm((x, kept), (None, (-self.backout).expand(x.shape[-1]).contiguous()))

    def _layers(self, run: Pass, transform: BankTransform | None) -> list[LayerWeights]:
        """Each layer's weights in the compute precision: a bank is converted once, then split.

        The scales of a layer's input and outputs go into the rows of its matrices.
        """
        depth = self.depth if self.config.depth_scale else None
        scales = {"qkv": depth, "out": self.attn_scale, "up": depth, "down": self.mlp_scale}
        banks = {}
        for name, bank in self.banks.named_parameters():
            used = transform(name, bank) if transform else bank
            scale = scales[name]
            rows = None if scale is None else scale.expand(bank.shape[:2])
            banks[name] = run.kernels.scaled(used, rows, run.dtype).unbind(0)
        values = self.value_embed.projections(run.dtype) if self._has_value else {}
        gains = self.q_gain.unbind(0)
        lambdas = self.resid_lambda.unbind(0) if self.config.residual_lambdas else None
        return [
            LayerWeights(
                layer=i,
                attention=AttentionWeights(banks["qkv"][i], banks["out"][i], gains[i], values.get(i)),
                up=banks["up"][i],
                down=banks["down"][i],
                resid_lambda=lambdas[i] if lambdas else None,
            )
            for i in range(self.config.num_layers)
        ]


def _orthogonal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A (rows, cols) matrix with orthonormal rows or columns, whichever are fewer."""
    weight = torch.empty(rows, cols)
    nn.init.orthogonal_(weight, generator=generator)
    return weight
