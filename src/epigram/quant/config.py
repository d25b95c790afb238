"""Everything that a recipe may say about quantization, under `[quant]`."""

from dataclasses import dataclass, field

from epigram import plugin
from epigram.errors import UserError
from epigram.quant.calibrate import CalibrationConfig
from epigram.quant.grid import GridConfig
from epigram.quant.methods.gptq import GptqConfig

METHODS = "epigram.quant.methods"


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """method, table_method: files of quant/methods, for matrices and for tables. With "gptq", tables whose
    product has a tap (the tied head) use it, other tables are rounded to nearest."""

    method: str = "gptq"
    table_method: str = "rtn"
    grid: GridConfig = field(default_factory=GridConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        choices = plugin.names(METHODS)
        problems = [
            f"quant.{key} must be one of {', '.join(choices)}, got {value!r}"
            for key, value in (("method", self.method), ("table_method", self.table_method))
            if value not in choices
        ]
        if problems:
            raise UserError("; ".join(problems))

    @property
    def needs_hessians(self) -> bool:
        """Whether a calibration has to run before `quantize_model`."""
        return needs_hessians(self.method) or needs_hessians(self.table_method)


def needs_hessians(method: str) -> bool:
    """Whether this file of quant/methods works from Hessians."""
    needs: bool = plugin.load(METHODS, method).NEEDS_HESSIANS
    return needs
