"""Which tensor is stored how."""

import pytest
import torch
from quant_toy import LAYERS, Toy

from epigram.quant.config import QuantConfig
from epigram.quant.grid import Grid, GridConfig, SigmaConfig
from epigram.quant.policy import calibration_taps, matrix_grid, method_of, plan, plan_shapes
from epigram.roles import ParameterRole

INT6, INT8 = Grid(31, "search", floor=1.0), Grid(127, "quantile", floor=1.0)


def test_every_weight_is_stored_once(toy: Toy) -> None:
    parts = plan(toy.named, toy.roles, GridConfig())
    formats = {part.name: part.grid for part in parts}
    matrices = {f"layers.{i}.{m}" for i in range(LAYERS) for m in ("q", "k", "v", "out", "up", "down")}
    assert {name for name, grid in formats.items() if grid == INT6} == matrices
    assert {name for name, grid in formats.items() if grid == INT8} == {"embed", "bigram.embed"}
    assert {name for name, grid in formats.items() if grid is None} == {"bigram.proj", "backout", "resid_mix"}
    assert len(formats) == len(parts)
    for part in parts:  # views: a mark set through the part is seen in the parameter
        part.tensor.fill_(1.0)
    assert all((tensor == 1).all() for tensor in toy.named.values())


def test_a_shape_is_enough(toy: Toy) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in toy.named.items()}
    with_data, without = (
        plan(toy.named, toy.roles, GridConfig()),
        plan_shapes(shapes, toy.roles, GridConfig()),
    )
    assert [part[:5] for part in with_data] == [part[:5] for part in without]
    assert [part.tensor.shape for part in with_data] == [part.tensor.shape for part in without]


def test_a_parameter_without_a_role_is_our_mistake(toy: Toy) -> None:
    del toy.roles["backout"]
    with pytest.raises(AssertionError, match="backout"):
        plan(toy.named, toy.roles, GridConfig())


def test_one_name_for_two_tensors_is_our_mistake(toy: Toy) -> None:
    toy.named["layers.0.q"] = torch.zeros(3)
    toy.roles["layers.0.q"] = ParameterRole(kind="control")
    with pytest.raises(AssertionError, match="one name"):
        plan(toy.named, toy.roles, GridConfig())


def test_large_projections_are_stored_like_tables() -> None:
    shapes = {"small": (512, 128), "large": (513, 128), "layered": (4, 20_000), "long": (70_000,)}
    roles = {name: ParameterRole(kind="control", num_layers=4 * (name == "layered")) for name in shapes}
    grids = {part.name: part.grid for part in plan_shapes(shapes, roles, GridConfig())}
    assert grids == {"small": None, "large": INT8, "layered": None, "long": None}


def test_bits_and_sigmas_are_those_of_the_config(toy: Toy) -> None:
    sigma = SigmaConfig(attention=5.0, mlp=6.0, head=4.0, table=9.0)
    config = GridConfig(matrix_bits=5, table_bits=7, clip="sigma", sigma=sigma)
    grids = {part.name: part.grid for part in plan(toy.named, toy.roles, config)}
    assert grids["layers.0.k"] == Grid(15, "sigma", sigma=5.0)
    assert grids["layers.1.down"] == Grid(15, "sigma", sigma=6.0)
    assert grids["embed"] == Grid(63, "sigma", sigma=4.0)
    assert grids["bigram.embed"] == Grid(63, "sigma", sigma=9.0)
    assert matrix_grid("up", GridConfig(clip="max", floor=0.5)) == Grid(31, "max", floor=0.5)


def test_taps_and_methods(toy: Toy) -> None:
    parts = plan(toy.named, toy.roles, GridConfig())
    inputs = {"qkv": 32, "out": 32, "up": 32, "down": 80}
    matrices = {f"layers.{i}.{name}": cols for i in range(LAYERS) for name, cols in inputs.items()}
    assert calibration_taps(parts) == matrices
    assert calibration_taps(parts, tables=True) == matrices | {"head": 32}
    methods = {part.name: method_of(part, QuantConfig(table_method="gptq")) for part in parts}
    assert methods["embed"] == methods["layers.0.up"] == "gptq"
    assert methods["bigram.embed"] == "rtn"  # no product of its own to calibrate on
    assert methods["backout"] == "float16"


def test_only_methods_with_hessians_need_a_calibration() -> None:
    assert QuantConfig().needs_hessians
    assert QuantConfig(method="rtn", table_method="gptq").needs_hessians
    assert not QuantConfig(method="rtn").needs_hessians


def test_all_problems_of_a_config_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"method.*table_method"):
        QuantConfig(method="x", table_method="y")
    with pytest.raises(ValueError, match=r"matrix_bits.*table_bits.*clip.*floor"):
        GridConfig(clip="z", matrix_bits=1, table_bits=9, floor=-1.0)
    with pytest.raises(ValueError, match="gptq, rtn"):
        QuantConfig(method="nearest")
    with pytest.raises(ValueError, match="'mlp': 0"):
        SigmaConfig(mlp=0)


def test_the_published_model_has_the_published_groups() -> None:
    """The parameters of parameter-golf #1212 by format, as its inventory counts them."""

    def bank(name: str, *splits: tuple[str, int]) -> ParameterRole:
        return ParameterRole(kind="matrix", num_layers=12, bank=name, splits=splits)

    table, control = ParameterRole(kind="table"), ParameterRole(kind="control")
    layered = ParameterRole(kind="control", num_layers=12)
    parameters: dict[str, tuple[ParameterRole, tuple[int, ...]]] = {
        "banks.qkv": (bank("qkv", ("q", 512), ("k", 256), ("v", 256)), (12, 1024, 512)),
        "banks.out": (bank("out", ("out", 512)), (12, 512, 512)),
        "banks.up": (bank("up", ("up", 1536)), (12, 1536, 512)),
        "banks.down": (bank("down", ("down", 512)), (12, 512, 1536)),
        "embed": (table, (1024, 512)),
        "bigram.embed": (table, (5120, 128)),
        "value_embed.embed": (table, (1024, 128)),
        "bigram.proj": (control, (512, 128)),
        "value_embed.proj": (control, (256, 128)),
        "value_embed.layer_scale": (control, (3,)),
        "smear.gate": (control, (512,)),
        "skip.weight": (control, (6, 512)),
        "skip.gate": (control, (6, 512)),
        "attn_scale": (layered, (12, 512)),
        "mlp_scale": (layered, (12, 512)),
        "resid_mix": (layered, (12, 2, 512)),
        "q_gain": (layered, (12, 8)),
    } | dict.fromkeys(("backout", "bigram.scale", "value_embed.scale"), (control, ()))
    roles = {name: role for name, (role, _) in parameters.items()}
    parts = plan_shapes({name: shape for name, (_, shape) in parameters.items()}, roles, GridConfig())
    weights = {grid: sum(part.tensor.numel() for part in parts if part.grid == grid) for grid in (INT6, INT8, None)}
    assert weights == {INT6: 28_311_552, INT8: 1_310_720, None: 129_638}
    assert sum(part.is_matrix for part in parts) == 72
