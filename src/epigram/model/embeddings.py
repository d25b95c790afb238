"""What enters the stream besides the token embedding: token pairs, the previous position, and value embeddings.

Legend: B sequences, T positions, D model width.
"""

import torch
from torch import Tensor, nn

from epigram.model.config import ModelConfig


class BigramEmbedding(nn.Module):
    """A hashed embedding of (previous token, token), projected to the model width. Source: parameter-golf #162.

    The last bucket is kept for positions without a previous token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(config.bigram_buckets, config.bigram_dim))
        self.proj = nn.Parameter(torch.empty(config.model_dim, config.bigram_dim))
        self.scale = nn.Parameter(torch.tensor(0.05))

    def buckets(self, tokens: Tensor, previous: Tensor | None) -> Tensor:
        """(B, T) int32 buckets; `previous` (B,) are the tokens before the first position, None at a window's start."""
        usable = self.embed.shape[0] - 1
        ids = tokens.to(torch.int32)
        mixed = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % usable
        if previous is None:
            first = torch.full_like(ids[:, :1], usable)
        else:
            first = torch.bitwise_xor(36313 * ids[:, :1], 27191 * previous.to(torch.int32)[:, None]) % usable
        return torch.cat([first, mixed], dim=1)

    def lookup(self, tokens: Tensor, previous: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, T, bigram_dim): the input of the projection."""
        return nn.functional.embedding(self.buckets(tokens, previous), self.embed).to(dtype)


class SmearGate(nn.Module):
    """x_t <- (1 - g) x_t + g x_{t-1} with a learned gate per channel. Source: parameter-golf #162."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        """x (B, T, D); `before` (B, 1, D) is the input at the position before the first, None (zeros) at a start."""
        gate = torch.sigmoid(self.gate).to(x.dtype)
        before = torch.zeros_like(x[:, :1]) if before is None else before
        return (1 - gate) * x + gate * torch.cat([before, x[:, :-1]], dim=1)


class ValueEmbedding(nn.Module):
    """One token embedding shared by several layers, added to their values. Source: parameter-golf #374."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.value_embed_dim))
        self.proj = nn.Parameter(torch.empty(config.kv_dim, config.value_embed_dim))
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scale = nn.Parameter(torch.ones(len(config.value_embed_layers)))

    def lookup(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, value_embed_dim): the input of the projection."""
        return nn.functional.embedding(tokens, self.embed).to(dtype)


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

    def merge(self, index: int, x: Tensor, skip: Tensor) -> Tensor:
        """x and skip (B, T, D); `index` counts the layers of the second half."""
        weighted = self.weight[index].to(x.dtype) * skip
        if not self.gated:
            return x + weighted
        gate = torch.sigmoid(self.gate[index]).to(x.dtype)
        return gate * x + (1 - gate) * weighted
