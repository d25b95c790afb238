"""Models from files: a packed artifact, or a run's checkpoint in floating point."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cattrs
import torch

from epigram import plugin
from epigram.artifact import tensors as artifact
from epigram.config import Config, load_recipe, parse_model
from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms import base as transforms
from epigram.dist.context import Context, pick_device
from epigram.errors import ArtifactError, UserError
from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT
from epigram.optim.base import restore as restore_floats
from epigram.quant.quantize import Stored, restore
from epigram.run import checkpoint
from epigram.run.api import Model
from epigram.run.choices import attach_attention, pick_precision
from epigram.run.record import CONFIG
from epigram.run.setup import check_documents

ARTIFACT = "model.epigram"
TOKENIZER = "tokenizer.model"


def pack(
    path: Path, config: Config, stored: Stored, tokenizer: Tokenizer, provenance: dict[str, Any], transform: str = ""
) -> artifact.SizeReport:
    """Write the artifact of a quantized model and say what each part takes. transform: of its text, "" for none."""
    named = {"transform": transform} if transform else {}
    contents = artifact.Contents(
        model=_plain(asdict(config.model)) | {"context_len": config.context_len} | named,
        tensors=stored,
        tokenizer_proto=tokenizer.proto if config.artifact.tokenizer else None,
        provenance=provenance,
        recipe=config.recipe,
        cap_bytes=config.artifact.cap_bytes,
    )
    return artifact.save(path, contents, codec=config.artifact.codec)


def load_model(
    path: Path, device: str = "auto", *, tokenizer: Tokenizer | None = None, shown: bool = True, precision: str = ""
) -> Model:
    """The model in an artifact, a run folder or a checkpoint, ready to use on `device`.

    A run folder means its artifact if it has one, else its newest checkpoint. `tokenizer` is used when the file carries
    none. shown: the progress. precision: as in `RunConfig`, by default the run's, and "auto" for a file alone. Raises
    UserError or ArtifactError with what is wrong.
    """
    context = Context(device=pick_device(device))
    if path.is_dir() and (path / ARTIFACT).is_file():
        if not precision and (path / CONFIG).is_file():
            precision = load_recipe(str(path / CONFIG)).run.precision
        path = path / ARTIFACT
    if path.is_file():
        return _from_artifact(path, context, tokenizer, shown, precision or "auto")
    if path.is_dir():
        return _from_checkpoint(path, context, tokenizer, precision)
    raise UserError(f"there is no model at {path}: give a .epigram file, a run folder or a checkpoint folder")


def _from_artifact(path: Path, context: Context, tokenizer: Tokenizer | None, shown: bool, precision: str) -> Model:
    contents = artifact.load(path, shown=shown)
    settings = dict(contents.model)
    try:
        context_len, transform = settings.pop("context_len"), settings.pop("transform", "")
        config = parse_model(settings)
    except (KeyError, UserError) as error:
        raise ArtifactError(f"{path} describes no model that this release knows: {error}") from error
    if type(context_len) is not int or not 1 <= context_len <= 1 << 24:
        raise ArtifactError(f"{path} gives no usable context length, but {context_len!r}")
    if transform != "" and transform not in plugin.names(transforms.PACKAGE):
        raise ArtifactError(f"{path} names a text transform that this release does not know: {transform!r}")
    model = _outline(config, contents.tensors, path)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = restore(contents.tensors, model.roles(), shapes)
    model.load_state_dict(weights, assign=True)
    if contents.tokenizer_proto is not None:
        tokenizer = Tokenizer.from_bytes(contents.tokenizer_proto)
    elif tokenizer is None and (path.parent / TOKENIZER).is_file():  # in its run folder
        tokenizer = Tokenizer.from_file(path.parent / TOKENIZER)
    info = {"recipe": contents.recipe, "provenance": contents.provenance, "path": str(path)}
    return _ready(model, context, _needed(tokenizer, path), context_len, info, transform, precision)


def _outline(config: ModelConfig, stored: Stored, path: Path) -> GPT:
    """The model without memory for its weights. Raises ArtifactError when the file does not hold as many, or has not a
    tensor for each layer: layers of few weights, listed one by one, could take any memory."""
    if config.num_layers > len(stored):
        raise ArtifactError(
            f"{path} describes a model of {config.num_layers:,} layers, but holds {len(stored):,} tensors"
        )
    num_weights = sum(math.prod(tensor.shape) for tensor in stored.values())
    with torch.device("meta"):
        model = GPT(config)
    described = sum(p.numel() for p in model.parameters())
    if described != num_weights:
        raise ArtifactError(f"{path} describes a model of {described:,} weights, but holds {num_weights:,}")
    return model


def _from_checkpoint(path: Path, context: Context, tokenizer: Tokenizer | None, precision: str) -> Model:
    if (run := run_folder(path)) is None:
        raise UserError(f"{path} is neither a run folder nor a checkpoint in one: there is no {CONFIG}")
    config = load_recipe(str(run / CONFIG))
    saved = checkpoint.load(path)
    model = GPT(config.model)
    restore_floats(model.state_dict(), final_weights(saved), "this model")
    if tokenizer is None and (run / TOKENIZER).is_file():
        tokenizer = Tokenizer.from_file(run / TOKENIZER)
    info = {"recipe": config.recipe, "path": str(path), "step": saved.state["step"]}
    transform = saved.state["facts"].get("transform", "")
    precision = precision or config.run.precision
    return _ready(model, context, _needed(tokenizer, path), config.context_len, info, transform, precision)


def run_folder(path: Path) -> Path | None:
    """The run folder that a model lies in: itself, or that of an artifact or a checkpoint; None outside of any."""
    beside = path.resolve().parent
    places = (path, beside.parent) if path.is_dir() else (beside,)
    return next((folder for folder in places if (folder / CONFIG).is_file()), None)


def final_weights(saved: checkpoint.Checkpoint, *, averaged: bool = True) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint, or the plain ones where the run does not average.

    averaged: False for the plain ones in any case.
    """
    return (averaged and saved.part("average.average")) or saved.part("model")


def _needed(tokenizer: Tokenizer | None, path: Path) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            f"{path} carries no tokenizer, and there is no {TOKENIZER} beside it: put that of its run there, or score "
            "it on a data folder, whose own is then used"
        )
    return tokenizer


def _ready(
    model: GPT,
    context: Context,
    tokenizer: Tokenizer,
    context_len: int,
    info: dict[str, Any],
    transform: str,
    precision: str,
) -> Model:
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    check_documents(model.config, tokenizer.bos_id)
    model = model.to(context.device).requires_grad_(False)
    model.compute_dtype, _ = pick_precision(precision, context)
    attach_attention(model, "auto", context, compiled=False)
    return Model(model, tokenizer, context_len, info, transform)


def _plain(value: Any) -> Any:
    return cattrs.Converter().unstructure(value)
