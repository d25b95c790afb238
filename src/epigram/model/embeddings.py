"""What enters the stream besides the token embedding: token pairs, the previous position, and value embeddings.

Legend: B sequences, T positions, D model width.
"""

import torch
from torch import Tensor, nn

from epigram.kernels.base import Kernels
from epigram.model.config import ModelConfig


class BigramEmbedding(nn.Module):
    """A hashed embedding of (previous token, token), projected to the model width. Source: parameter-golf #162.

    The last bucket is kept for positions without a previous token: a window's first, and the BOS of documents that are
    isolated.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(config.bigram_buckets, config.bigram_dim))
        self.proj = nn.Parameter(torch.empty(config.model_dim, config.bigram_dim))
        self.scale = nn.Parameter(torch.tensor(0.05))
        self._reset_id = config.reset_id

    def buckets(self, tokens: Tensor, previous: Tensor | None) -> Tensor:
        """(B, T) int32 buckets; `previous` (B,) are the tokens before the first position, None at a window's start."""
        usable = self.embed.shape[0] - 1
        ids = tokens.to(torch.int32)
        mixed = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % usable
        if previous is None:
            first = torch.full_like(ids[:, :1], usable)
        else:
            first = torch.bitwise_xor(36313 * ids[:, :1], 27191 * previous.to(torch.int32)[:, None]) % usable
        buckets = torch.cat([first, mixed], dim=1)
        return buckets if self._reset_id < 0 else buckets.masked_fill(tokens == self._reset_id, usable)

    def lookup(self, tokens: Tensor, previous: Tensor | None, dtype: torch.dtype, kernels: Kernels) -> Tensor:
        """(B, T, bigram_dim): the input of the projection."""
        return kernels.look_up(self.buckets(tokens, previous), self.embed, dtype)


class SmearGate(nn.Module):
    """The gate of `epigram.kernels.front.smear`, before its sigmoid: a learned share of the previous position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))


class ValueEmbedding(nn.Module):
    """One token embedding shared by several layers, added to their values. Source: parameter-golf #374."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.value_embed_dim))
        self.proj = nn.Parameter(torch.empty(config.kv_dim, config.value_embed_dim))
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scale = nn.Parameter(torch.ones(len(config.value_embed_layers)))

        self.layers = config.value_embed_layers

    def lookup(self, tokens: Tensor, dtype: torch.dtype, kernels: Kernels) -> Tensor:
        """(B, T, value_embed_dim): the input of the projections."""
        return kernels.look_up(tokens, self.embed, dtype)

    def projections(self, dtype: torch.dtype) -> dict[int, Tensor]:
        """For each layer that gets it, the projection with its scales in it: (K * head_dim, value_embed_dim)."""
        scales = (self.scale * self.layer_scale).unbind(0)
        return {layer: (scale * self.proj).to(dtype) for layer, scale in zip(self.layers, scales, strict=True)}


class Skips(nn.Module):
    """Outputs of the first half, given to the second half in reverse order (a U-Net).

    "plain": x + w * skip (parameter-golf #549). "gated": g * x + (1 - g) * w * skip with g = sigmoid(gate), an
    interpolation (parameter-golf #1089); at the start the first one changes nothing, since its skip is x itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.num_skips, config.model_dim))
        if config.skips == "gated":
            self.gate = nn.Parameter(torch.zeros(config.num_skips, config.model_dim))
        self.gated = config.skips == "gated"

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Factors (layers of the second half, D) of the stream and of its skip."""
        if not self.gated:
            return torch.ones_like(self.weight), self.weight
        gate = torch.sigmoid(self.gate)
        return gate, (1 - gate) * self.weight
