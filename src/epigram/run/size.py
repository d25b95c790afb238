"""The artifact's size before anything is trained: shapes and formats, at a codec's usual bits per weight."""

from epigram import plugin
from epigram.artifact.size import FLOAT16_BITS, TensorFormat, forecast
from epigram.artifact.table import CODECS
from epigram.config import Config
from epigram.model.gpt import GPT
from epigram.quant.grid import Grid, gaussian_bits
from epigram.quant.policy import Part, plan_shapes

# Where a floor decides the step, the size follows the spread of the weights, which weight decay governs: 4.17 bits is
# what the published entry needed (parameter-golf #1212).
_FLOOR_BITS = 4.17
_ROW_MAXIMUM_SIGMAS = 4.0  # the largest weight of a row, where it sets the step
_TOKENIZER_BYTES_PER_PIECE = 6.0  # a piece of an English vocabulary, compacted


def forecast_bytes(config: Config, model: GPT) -> int:
    """Bytes of the artifact; `model` may be on the meta device."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parts = plan_shapes(shapes, model.roles(), config.quant.grid)
    tokenizer = int(_TOKENIZER_BYTES_PER_PIECE * config.model.vocab_size) if config.artifact.tokenizer else 0
    return forecast((_format(part, config.artifact.codec) for part in parts), tokenizer_bytes=tokenizer)


def _format(part: Part, codec: str) -> TensorFormat:
    shape = tuple(part.tensor.shape)
    if part.grid is None:
        return TensorFormat(shape=shape, bits_per_weight=FLOAT16_BITS)
    bits = plugin.load(CODECS, codec).forecast_bits(_order0_bits(part.grid))
    # Equal scales, as a floor makes them, take next to nothing.
    return TensorFormat(shape=shape, bits_per_weight=bits, num_scales=0 if part.grid.floor else shape[0])


def _order0_bits(grid: Grid) -> float:
    if grid.clip == "sigma":
        return gaussian_bits(grid.sigma / grid.qmax, grid.qmax)
    return _FLOOR_BITS if grid.floor else gaussian_bits(_ROW_MAXIMUM_SIGMAS / grid.qmax, grid.qmax)
