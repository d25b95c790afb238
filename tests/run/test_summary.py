"""What the end of a run says of its rounding."""

from pathlib import Path
from typing import Any

import pytest

from epigram.run.summary import COSTLY_BPB, rounding_warning

RUN = Path("runs/a b")


def row(tensor_class: str, method: str, error: float, weighted: float | None, floor: float = 1.0) -> dict[str, Any]:
    return {"tensor_class": tensor_class, "method": method, "entropy_bits": 1.05, "relative_error": error,
            "hessian_error": weighted, "floor_share": floor}  # fmt: skip


def finished_with(cost: float, *rows: dict[str, Any]) -> dict[str, Any]:
    scores = {"float": {"blocks": {"val_bpb": 1.2298}},
              "quantized": {"blocks": {"val_bpb": 1.2298 + cost}, "sliding": {"val_bpb": 9.0}}}  # fmt: skip
    return {"scores": scores, "quantization": rows}


DOWN, UP = row("down", "gptq", 0.626, 0.230), row("up", "gptq", 0.0916, 0.0320)
OTHERS = (row("control", "float16", 4.5e-8, None, 0.0), row("embed", "rtn", 0.009, None))


def test_a_model_that_its_floor_rounded_away():
    """Figures of pr1212 after 1,135 steps at a quarter of its rates."""
    said = rounding_warning(finished_with(0.2259, *OTHERS, UP, DOWN), RUN)
    assert said is not None
    assert said.startswith(
        "rounding the weights cost 0.2259 bits per byte (blocks: 1.2298 to 1.4557), most of all in class down "
        "(weighted error 2.30e-01, 1.050 bits a weight): in 100 % of its rows quant.grid.floor sets the step"
    )
    assert said.endswith("epigram export 'runs/a b' --set quant.grid.clip=sigma")


def test_the_floor_is_named_only_where_it_sets_most_steps():
    said = rounding_warning(finished_with(0.1, UP, {**DOWN, "floor_share": 0.5}), RUN)
    assert said is not None
    assert "in class down" in said
    assert "floor" not in said


def test_without_hessians_the_plain_error_decides():
    rows = [{**row, "hessian_error": None} for row in (*OTHERS, UP, DOWN)]
    said = rounding_warning(finished_with(0.1, *rows), RUN)
    assert said is not None
    assert "most of all in class down (error 6.26e-01" in said


def test_a_table_that_was_rounded_away_is_named():
    """It has no Hessian, and its plain error says enough: two bits left all of its codes zero."""
    said = rounding_warning(finished_with(1.0145, row("embed", "rtn", 1.0, None), row("q", "gptq", 0.02, 1.06e-3)), RUN)
    assert said is not None
    assert "most of all in class embed (error 1.00e+00" in said


@pytest.mark.parametrize("cost", [-0.05, 0.0146, COSTLY_BPB - 1e-9, float("nan")])
def test_what_rounding_usually_costs_is_no_news(cost: float):
    assert rounding_warning(finished_with(cost, UP, DOWN), RUN) is None
