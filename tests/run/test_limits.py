"""What is beyond the limits of the artifact's format is refused before it costs time or memory."""

from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import cattrs
import pytest
import torch
from run_helpers import short

from epigram.artifact import container
from epigram.artifact import tensors as artifact
from epigram.data.dataset import DataFolder
from epigram.errors import ArtifactError, UserError
from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT
from epigram.quant import policy
from epigram.run.setup import build_session, check_fit
from epigram.run.weights import load_model


def test_layers_that_the_file_has_no_tensors_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million layers of a few zeros each are a file of 500 bytes, and gigabytes once they are listed."""
    config = ModelConfig(
        vocab_size=300, num_layers=10**6, model_dim=1, num_heads=1, num_kv_heads=1, head_dim=1, mlp_dim=1, rotary_dim=0
    )
    with torch.device("meta"):
        num_weights = sum(p.numel() for p in GPT(config).parameters())
    settings = cattrs.Converter().unstructure(asdict(config)) | {"context_len": 16}
    path = tmp_path / "m.epigram"
    weights = {"x": torch.zeros(num_weights, dtype=torch.float16)}  # as many as the model has
    artifact.save(path, artifact.Contents(model=settings, tensors=weights))
    assert path.stat().st_size < 1000
    monkeypatch.setattr(policy, "_parts", lambda *_: pytest.fail("the layers are listed"))
    with pytest.raises(ArtifactError, match="a model of 1,000,000 layers, but holds 1 tensors"):
        load_model(path, "cpu", shown=False)


def test_a_model_beyond_the_format_is_refused_before_training(
    finished: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the very bytes that its artifact would declare."""
    report = artifact.inspect(finished / "model.epigram").report
    declared = sum(section.raw for section in report.sections)
    monkeypatch.setattr(container, "MAX_DECLARED_BYTES", declared)
    check_fit(short(), data)
    monkeypatch.setattr(container, "MAX_DECLARED_BYTES", declared - 1)
    message = f"no artifact can carry the model, make it smaller: the model has {declared:,} bytes"
    with pytest.raises(UserError, match=message):
        build_session(short(), data, Mock())
    check_fit(short("artifact.tokenizer=false"), data)
    deep = short()
    with pytest.raises(UserError, match="no artifact can carry the model.* 18,0.. tensors, the format allows 16,384"):
        check_fit(replace(deep, model=replace(deep.model, num_layers=3000)), data)
