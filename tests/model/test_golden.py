"""Our model against the published one: logits, losses and gradients in float32."""

import pytest
import torch
from golden_model import golden, golden_model

RELATIVE = 1e-4  # float32 with another order of additions


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("batch", ["short", "long"])
def test_logits_and_losses(batch: str) -> None:
    expected, model = golden(), golden_model()
    tokens, targets = (expected[f"{batch}.{name}_ids"].long() for name in ("input", "target"))
    logits = model.logits(model(tokens))
    if batch == "short":
        assert relative_error(logits, expected["short.logits"]) < RELATIVE
    else:
        assert relative_error(logits[:, ::32], expected["long.logits_every_32"]) < RELATIVE
    assert float(model.nll(tokens, targets).mean()) == pytest.approx(float(expected[f"{batch}.nll_mean"]), rel=RELATIVE)
    loss = model.loss(tokens, targets, gamma=torch.tensor(0.6), floor=0.2)
    assert float(loss) == pytest.approx(float(expected[f"{batch}.mile_loss"]), rel=RELATIVE)


def test_gradients() -> None:
    expected, model = golden(), golden_model()
    tokens, targets = (expected[f"short.{name}_ids"].long() for name in ("input", "target"))
    model.loss(tokens, targets, gamma=torch.tensor(0.6), floor=0.2).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    for layer, name, bank, rows in ((0, "q", "qkv", slice(0, 64)), (5, "v", "qkv", slice(96, 128))):
        ours[f"layer.{layer}.{name}"] = ours[f"banks.{bank}"][layer, rows]
    for layer, name in ((0, "up"), (5, "down"), (5, "out")):
        ours[f"layer.{layer}.{name}"] = ours[f"banks.{name}"][layer]
    for layer, name in ((0, "q_gain"), (5, "resid_mix")):
        ours[f"layer.{layer}.{name}"] = ours[name][layer]
    checked = [key for key in expected if key.startswith("grad.")]
    assert len(checked) == 15
    for key in checked:
        assert relative_error(ours[key.removeprefix("grad.")], expected[key]) < RELATIVE, key
