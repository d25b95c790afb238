"""A model with every weight away from its initial value, so that nothing is zero or one by chance."""

import torch

from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT


def stirred(config: ModelConfig, generator: torch.Generator, alpha: float = 0.05) -> GPT:
    """On the CPU, in float32; alpha: standard deviation of what is added to each weight."""
    model = GPT(config)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=alpha)
    return model
