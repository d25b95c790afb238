"""Save, load, inspect: every bit comes back, the same bytes again, and the sizes add up."""

import json
from pathlib import Path

import pytest
import torch
from artifact_toy import contents, quantized, same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from epigram import plugin
from epigram.artifact.codecs.base import order0_bits
from epigram.artifact.tensors import Contents, inspect, load, save
from epigram.errors import ArtifactError, UserError
from epigram.quantized import QuantizedTensor

CODECS = plugin.names("epigram.artifact.codecs")


@pytest.mark.parametrize("codec", CODECS)
def test_every_bit_comes_back(tmp_path: Path, tokenizer: bytes, codec: str) -> None:
    path, original = tmp_path / "m.epigram", contents(tokenizer)
    save(path, original, codec)
    loaded = load(path)
    assert same_tensors(loaded, original)
    assert loaded.model == original.model
    assert loaded.provenance == original.provenance
    assert (loaded.recipe, loaded.cap_bytes) == ("toy", 16_000_000)
    assert loaded.tokenizer_proto is not None


@pytest.mark.parametrize("codec", CODECS)
def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: Path, tokenizer: bytes, codec: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save(first, contents(tokenizer), codec)
    save(second, load(first), codec)
    assert first.read_bytes() == second.read_bytes()


def test_a_model_without_tensors_or_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "m"
    report = save(path, Contents(model={}, tensors={}))
    loaded = load(path)
    assert (loaded.tensors, loaded.tokenizer_proto, loaded.cap_bytes) == ({}, None, None)
    assert report.total_bytes == path.stat().st_size
    assert report.bits_per_weight == 0.0


def test_loaded_tensors_can_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for codec in CODECS:
        save(path, contents(), codec)
        for tensor in load(path).tensors.values():
            values = tensor.codes if isinstance(tensor, QuantizedTensor) else tensor
            values += 1


@pytest.mark.parametrize("codec", CODECS)
def test_sizes_add_up(tmp_path: Path, tokenizer: bytes, codec: str) -> None:
    path, original = tmp_path / "m", contents(tokenizer)
    report = save(path, original, codec)
    assert report.total_bytes == path.stat().st_size
    rows = report.rows()
    assert sum(row["bytes"] for row in rows) == report.total_bytes
    parts = ["scales", "float16", "float32", "embed", "q", "down", "tokenizer", "header"]
    assert [row["part"] for row in rows] == parts
    assert [row["weights"] for row in rows] == [960 + 1152 + 3456, 2 * 24 + 1, 30, 960, 1152, 3456, 0, 0]
    assert json.loads(json.dumps(rows)) == rows
    tokenizer_bytes = report.sections[-1].stored
    assert sum(tensor.stored_bytes for tensor in report.tensors) == pytest.approx(
        report.total_bytes - report.header_bytes - tokenizer_bytes, rel=0.02, abs=40
    )
    assert [tensor.entry.name for tensor in report.tensors] == list(original.tensors)
    embed = original.tensors["embed"]
    assert isinstance(embed, QuantizedTensor)
    assert report.tensors[0].order0_bits == order0_bits(embed.codes.numpy())
    assert report.tensors[2].order0_bits is None


def test_only_the_entropy_codec_has_a_model(tmp_path: Path) -> None:
    report = save(tmp_path / "m", contents(), "entropy")
    assert report.model_bits is not None
    assert report.over_model == pytest.approx(8 * report.code_bytes / report.model_bits - 1)
    assert 0 <= report.over_model < 0.01
    assert save(tmp_path / "m", contents(), "store").over_model is None


def test_inspection_agrees_with_saving(tmp_path: Path, tokenizer: bytes) -> None:
    path, original = tmp_path / "m", contents(tokenizer)
    report, seen = save(path, original), inspect(path)
    assert seen.report.rows() == report.rows()
    assert seen.report.bits_per_weight == report.bits_per_weight
    assert seen.report.by_class() == report.by_class()
    assert list(seen.report.by_class()) == ["embed", "layers.#.q", "layers.#.down"]
    assert seen.report.by_class()["layers.#.q"].num_tensors == 2
    assert seen.contents["model"] == original.model
    assert seen.contents["codec"] == "entropy"
    assert seen.contents["provenance"]["calibration"] == "training windows"


def test_inspection_decompresses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, contents())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    inspect(path)
    with pytest.raises(ArtifactError, match="altered"):
        load(path)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.epigram"
    for read in (load, inspect):
        with pytest.raises(ArtifactError, match=r"missing\.epigram: cannot be read"):
            read(path)


def test_an_unknown_codec_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of .*brotli.*entropy.*store"):
        save(tmp_path / "m", contents(), "zip")
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_no_contiguous_cpu_storage(tmp_path: Path) -> None:
    table = quantized(30, 20)
    turned = QuantizedTensor(table.codes.T, torch.ones(20, dtype=torch.float16), 31)
    floats = torch.randn(6, 8).half()[::2, ::2].requires_grad_()
    save(tmp_path / "m", Contents(model={}, tensors={"a": turned, "b": floats}))
    assert same_tensors(load(tmp_path / "m"), Contents(model={}, tensors={"a": turned, "b": floats.detach()}))


def test_codes_beyond_qmax_are_a_mistake_of_ours(tmp_path: Path) -> None:
    wrong = QuantizedTensor(torch.tensor([[9]], dtype=torch.int8), torch.ones(1).half(), 8)
    with pytest.raises(AssertionError, match="beyond 8"):
        save(tmp_path / "m", Contents(model={}, tensors={"w": wrong}))


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 127)), max_size=5),
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 1000),
)
def test_any_shapes(tmp_path_factory: pytest.TempPathFactory, shapes: list, codec: str, seed: int) -> None:
    path = tmp_path_factory.mktemp("any") / "m"
    tensors = {f"t.{i}": quantized(rows, cols, qmax, seed=seed + i) for i, (rows, cols, qmax) in enumerate(shapes)}
    original = Contents(model={}, tensors=dict(tensors))
    report = save(path, original, codec)
    assert same_tensors(load(path), original)
    assert report.total_bytes == path.stat().st_size
