"""What the targets of low-rank adapters read and add to, as the model's forward has them."""

from epigram.model.config import ModelConfig


def lora_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Channels in and out of each target; see `epigram.kernels.lora`."""
    width = config.model_dim
    outs = {"q": config.query_dim, "k": config.kv_dim, "v": config.kv_dim, "out": width, "mlp": width}
    return {target: (width, out) for target, out in {**outs, "head": config.vocab_size}.items()}
