"""What generation remembers between calls of the forward: keys and values, the last token, the last embedding."""

from torch import Tensor

from epigram.model.config import ModelConfig


class LayerCache:
    """Keys and values of one layer, of which at most `keep` positions stay visible.

    The buffer doubles when it is full and drops what no later position can see, so appending costs amortised O(1).
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._buffer: Tensor | None = None  # (2, B, capacity, K, D)
        self._start = self._end = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, T, K, D) keys and values; returns all that the new positions may see, oldest first."""
        added = k.shape[1]
        buffer = self._room_for(added, k)
        buffer[0, :, self._end : self._end + added] = k
        buffer[1, :, self._end : self._end + added] = v
        self._end += added
        keys, values = buffer[:, :, self._start : self._end]
        self._start = max(self._start, self._end - self.keep)
        return keys, values

    def _room_for(self, added: int, like: Tensor) -> Tensor:
        used = self._end - self._start
        if self._buffer is not None and self._end + added <= self._buffer.shape[2]:
            return self._buffer
        capacity = max(2 * (used + added), 64)
        grown = like.new_empty(2, like.shape[0], capacity, *like.shape[2:])
        if self._buffer is not None:
            grown[:, :, :used] = self._buffer[:, :, self._start : self._end]
        self._buffer, self._start, self._end = grown, 0, used
        return grown


class Cache:
    """The state of a batch of sequences under generation.

    context_len: positions that full-attention layers may look back, their own included; windowed layers keep their
    window. Never look further than training did: the score falls apart beyond. `rope_len` fixes the rotary base.
    """

    def __init__(self, config: ModelConfig, context_len: int, rope_len: int | None = None) -> None:
        self.context_len = context_len
        self.rope_len = rope_len or context_len
        self.position = 0  # of the next token
        self.previous_token: Tensor | None = None  # (B,)
        self.previous_embedding: Tensor | None = None  # (B, 1, D)
        self.windows = [self._window(config, layer) for layer in range(config.num_layers)]
        # A layer that looks `window` back needs that many old keys beside the new ones.
        self.layers = [LayerCache(keep=window) for window in self.windows]

    def _window(self, config: ModelConfig, layer: int) -> int:
        limit = max(self.context_len - 1, 1)
        return min(config.layer_window(layer) or limit, limit)

    def advance(self, tokens: Tensor) -> None:
        """Tokens (B, T) were read."""
        self.position += tokens.shape[1]
        self.previous_token = tokens[:, -1]
