"""Closed-form sizes and operation counts, before anything is computed."""

from epigram.model.config import ModelConfig


def visible_keys(seq_len: int, window: int) -> float:
    """Mean number of keys that a position of a window of `seq_len` tokens sees; `window` 0 is the whole prefix."""
    if not window or window >= seq_len:
        return (seq_len + 1) / 2
    # The first `window` positions see 1..window keys, the others window + 1.
    return (window * (window + 1) / 2 + (seq_len - window) * (window + 1)) / seq_len


def attention_flops_per_token(config: ModelConfig, seq_len: int, window: int) -> float:
    """Operations of one layer's attention: logits and weighted values over the keys that are really visible."""
    return 4.0 * config.query_dim * visible_keys(seq_len, window)


def attention_bytes_per_token(config: ModelConfig, item_bytes: int, *, backward: bool) -> float:
    """Least traffic of one layer's attention, each tensor moved once and no logit ever: q, k, v in, the output out.

    backward: with a backward pass, which reads those four and the output's gradient, and writes three gradients.
    """
    queries, keys = config.query_dim, config.kv_dim
    forward = 2 * queries + 2 * keys
    return item_bytes * float(forward + (forward + queries) + (queries + 2 * keys) if backward else forward)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Floating-point operations of the forward by part, a multiply-add counted as two.

    "matrices": q, k, v, output, MLP. "attention": see `attention_flops_per_token`.
    "head": the tied output product. "projections": bigram and value embeddings. Training costs three times as much.
    """
    c = config
    per_layer = c.model_dim * (c.query_dim + 2 * c.kv_dim) + c.query_dim * c.model_dim + 2 * c.model_dim * c.mlp_dim
    attention = [attention_flops_per_token(c, seq_len, c.layer_window(layer)) for layer in range(c.num_layers)]
    projections = (c.model_dim * c.bigram_dim if c.bigram_buckets else 0) + (
        c.kv_dim * c.value_embed_dim * len(c.value_embed_layers)
    )
    return {
        "matrices": 2.0 * per_layer * c.num_layers,
        "attention": sum(attention),
        "head": 2.0 * c.vocab_size * c.model_dim,
        "projections": 2.0 * projections,
    }


def training_flops(config: ModelConfig, seq_len: int) -> float:
    """Operations of a token's forward and backward, which has twice as many, in windows of `seq_len`."""
    return 3.0 * sum(forward_flops_per_token(config, seq_len).values())
