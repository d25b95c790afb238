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
from epigram.loss import softcap, token_nll, training_loss
from epigram.model.block import LayerWeights, Pass, block
from epigram.model.cache import Cache
from epigram.model.config import NORM_EPS, ModelConfig
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

    `compute_dtype` is the precision of activations and products (parameters stay float32); `attend` and
    `attend_window` are the attention backends of full and windowed layers. All three are set from outside.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
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
    ) -> Tensor:
        """Tokens (B, T) to normalised final states (B, T, D) in the compute precision.

        rope_len: the window length whose rotary base is used; T when not given. With a cache the tokens continue what
        the cache holds, and its rope_len counts.
        """
        run = self._prepare(tokens, rope_len, cache, tap, transform)
        x0 = self._embed(tokens, run)
        value = self._value_embedding(tokens, run)
        x, kept = x0, None
        skips: list[Tensor] = []
        first_decoder = self.config.num_layers // 2
        for layer, weights in enumerate(self._layers(run)):
            if self.config.num_skips and first_decoder <= layer < first_decoder + self.config.num_skips:
                x = self.skip.merge(layer - first_decoder, x, skips.pop())
            x = block(x, x0, weights, self._layer_value(layer, value), run)
            if layer < first_decoder:
                skips.append(x)
            if layer == self.config.backout_layer:
                kept = x
        if cache is not None:
            cache.advance(tokens)
        if kept is not None:
            x = x - self.backout.to(x.dtype) * kept
        x = norm(x)
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
        return training_loss(self.logits(x), targets, gamma, floor)

    def nll(self, tokens: Tensor, targets: Tensor, rope_len: int | None = None) -> Tensor:
        """Nats of each target, (B, T) float32."""
        return token_nll(self.logits(self(tokens, rope_len=rope_len)), targets)

    def _prepare(
        self,
        tokens: Tensor,
        rope_len: int | None,
        cache: Cache | None,
        tap: Tap | None,
        transform: BankTransform | None,
    ) -> Pass:
        length = tokens.shape[1]
        start = cache.position if cache is not None else 0
        rope_len = cache.rope_len if cache is not None else (rope_len or length)
        tables = rotary_tables(self.config, start, length, rope_len, tokens.device, self.compute_dtype)
        return Pass(
            config=self.config,
            dtype=self.compute_dtype,
            rotary=tables,
            attend=self.attend,
            attend_window=self.attend_window,
            cache=cache,
            tap=tap,
            transform=transform,
        )

    def _embed(self, tokens: Tensor, run: Pass) -> Tensor:
        cache = run.cache
        x = F.embedding(tokens, self.embed).to(run.dtype)
        if self.config.bigram_buckets:
            pair = self.bigram.lookup(tokens, cache.previous_token if cache else None, run.dtype)
            run.see("bigram.proj", pair)
            x = x + self.bigram.scale.to(x.dtype) * F.linear(pair, self.bigram.proj.to(x.dtype))
        x = norm(x)
        if self.config.smear:
            before = cache.previous_embedding if cache else None
            if cache is not None:
                cache.previous_embedding = x[:, -1:]
            x = self.smear(x, before)
        return x

    def _value_embedding(self, tokens: Tensor, run: Pass) -> Tensor | None:
        """(B, T, K * head_dim), before the layers' scales."""
        if not self.config.value_embed_layers:
            return None
        found = self.value_embed.lookup(tokens, run.dtype)
        run.see("value_embed.proj", found)
        return self.value_embed.scale.to(run.dtype) * F.linear(found, self.value_embed.proj.to(run.dtype))

    def _layer_value(self, layer: int, value: Tensor | None) -> Tensor | None:
        if value is None or layer not in self.config.value_embed_layers:
            return None
        return self.value_embed.layer_scale[self.config.value_embed_layers.index(layer)].to(value.dtype) * value

    def _layers(self, run: Pass) -> list[LayerWeights]:
        """Each layer's weights in the compute precision: a bank is converted once, then split."""
        banks = {}
        for name, bank in self.banks.named_parameters():
            used = run.transform(name, bank) if run.transform else bank
            banks[name] = used.to(run.dtype).unbind(0)
        controls = {name: getattr(self, name).unbind(0) for name in ("attn_scale", "mlp_scale", "resid_mix", "q_gain")}
        lambdas = self.resid_lambda.unbind(0) if self.config.residual_lambdas else None
        return [
            LayerWeights(
                layer=i,
                **{name: bank[i] for name, bank in banks.items()},
                **{name: control[i].to(run.dtype) for name, control in controls.items()},
                resid_lambda=lambdas[i].to(run.dtype) if lambdas else None,
            )
            for i in range(self.config.num_layers)
        ]


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; no weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def _orthogonal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A (rows, cols) matrix with orthonormal rows or columns, whichever are fewer."""
    weight = torch.empty(rows, cols)
    nn.init.orthogonal_(weight, generator=generator)
    return weight
