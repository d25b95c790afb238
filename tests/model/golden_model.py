"""The golden model: the published small configuration with its randomised parameters."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT

GOLDEN = Path(__file__).parents[1] / "golden" / "model.safetensors"
NUM_LAYERS = 6
CONFIG = ModelConfig(
    vocab_size=128,
    num_layers=NUM_LAYERS,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=192,
    window=32,
    window_layers=(2, 4),
    xsa_layers=(3, 4, 5),
    rotary_dim=8,
    bigram_buckets=97,
    bigram_dim=16,
    value_embed_layers=(2, 4, 5),
    value_embed_dim=16,
    backout_layer=3,
)


def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def stacked(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Published per-layer names to ours, which stack layers on axis 0; only complete stacks."""
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    ours = {k: v for k, v in found.items() if not k.startswith("layer.")}
    ours["banks.qkv"] = torch.stack(
        [torch.cat([found[f"layer.{i}.{name}"] for name in "qkv"]) for i in range(NUM_LAYERS)]
    )
    for name in ("out", "up", "down", "attn_scale", "mlp_scale", "resid_mix", "q_gain"):
        key = f"banks.{name}" if name in ("out", "up", "down") else name
        ours[key] = torch.stack([found[f"layer.{i}.{name}"] for i in range(NUM_LAYERS)])
    return ours


def golden_model() -> GPT:
    model = GPT(CONFIG)
    model.load_state_dict(stacked(golden(), "param."))
    return model
