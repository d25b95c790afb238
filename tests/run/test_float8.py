"""Runs that train with products in float8: what they choose, what they refuse, and what stays as it is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_helpers import losses_of, result_of, short, train_run

from epigram.config import load_recipe
from epigram.data.dataset import DataFolder
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation.scorer import score
from epigram.evaluation.windows import Method
from epigram.kernels.base import FLOAT8, PLAIN
from epigram.run import choices, job, setup
from epigram.run.bench import mlp
from epigram.run.bench.base import Bench, fill_zeros
from epigram.run.describe import describe, print_description
from epigram.run.doctor import explain
from epigram.run.setup import build_engine, build_session
from epigram.run.speed import scoring_work, training_work
from epigram.run.train import plan_step, train_step
from epigram.run.warmup import warm_up
from epigram.run.weights import load_model

ON = "run.float8=true"
PRODUCTS = "products of layers in training"


@pytest.fixture(scope="module")
def run(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float8") / "run"
    train_run(data_path, folder, ON)
    return folder


def test_a_run_learns(run: Path, finished: Path):
    """As one without, and not by the same numbers."""
    found, expected = losses_of(run), losses_of(finished)
    assert found[-1] < found[0] - 0.5
    assert found == pytest.approx(expected, rel=0.02)
    assert found[3:] != expected[3:]
    words = result_of(run)["paths"][PRODUCTS]
    assert words == "float8, rounded to it and multiplied in float32: slower than without"
    assert PRODUCTS not in result_of(finished)["paths"]


def test_the_score_of_the_artifact_does_not_depend_on_it(run: Path, data: DataFolder):
    """The run's own score is that of the file, read by a model that knows nothing of the setting."""
    model = load_model(run / "model.epigram", "cpu")
    found = score(
        model.gpt.nll, data.stream("val"), data.tokenizer.byte_tables(), Method(name="blocks", seq_len=128, stride=128),
        device=torch.device("cpu"), batch_tokens=384, expected_bytes=data.split_bytes("val"),
    )  # fmt: skip
    assert result_of(run)["scores"]["quantized"]["blocks"]["val_nats"] == pytest.approx(found.val_nats, rel=1e-6)


def test_an_export_does_not_depend_on_it(run: Path, tmp_path: Path):
    """Calibration, quantization and scores after training."""
    results = [
        job.export_job(run, out=tmp_path / value, overrides=[f"run.float8={value}"], device="cpu")
        for value in ("true", "false")
    ]
    assert results[0]["artifact_sha256"] == results[1]["artifact_sha256"] == result_of(run)["artifact_sha256"]
    nats = [
        {(model, name): row["val_nats"] for model, rows in result["scores"].items() for name, row in rows.items()}
        for result in (*results, result_of(run))
    ]
    assert nats[0] == nats[1] == nats[2] and len(nats[0]) == 4
    assert PRODUCTS not in results[0]["paths"]


# -- the choice --------------------------------------------------------------------------------------------------------


def test_it_is_off_by_itself():
    engine = build_engine(short(), Context())
    assert PRODUCTS not in engine.paths
    batch = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(0))
    fill_zeros(engine)
    arguments = (batch[:, :-1], batch[:, 1:], torch.tensor(0.5), 0.2, None)
    assert engine.lane_loss(*arguments).equal(engine.model.loss(*arguments))


def test_only_the_loss_of_lanes_is_in_float8():
    """Neither what is scored in the same process nor what learns while it is scored."""
    engine = build_engine(short(ON), Context())
    fill_zeros(engine)
    twin = setup.GPT(engine.model.config)
    twin.load_state_dict(engine.model.state_dict())
    tokens = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(0))
    batch, gamma = (tokens[:, :-1], tokens[:, 1:]), torch.tensor(0.5)
    with torch.no_grad():
        loss = engine.lane_loss(*batch, gamma, 0.2, engine.quantized)
        expected, without = (
            engine.model.loss(*batch, gamma, 0.2, engine.quantized, kernels=k) for k in (FLOAT8, PLAIN)
        )
        assert loss.equal(expected) and not loss.equal(without)
        assert engine.losses.windows(*batch).equal(twin.nll(*batch))
        assert engine.losses.learning(*batch).equal(twin.loss(*batch))


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_training_then_has_plain_kernels_and_scoring_what_it_had(kernels: str, monkeypatch):
    """Where "auto" would be fused."""
    asked = []

    def attach(model, kernels, compile_, context):
        asked.append(kernels)
        return False, {}

    monkeypatch.setattr(setup, "attach_kernels", attach)
    config = short(ON, f"run.kernels={kernels}")
    model, _, paths = setup.build_model(config, Context(), training_work(config))
    assert model.kernels is PLAIN
    assert PRODUCTS in paths
    _, _, paths = setup.build_model(config, Context(), scoring_work(128, 2048))
    assert PRODUCTS not in paths
    assert asked == ["plain", kernels]


def on(device: str, capability: tuple[int, int] | None) -> Context:
    """A device that is not there."""
    return SimpleNamespace(device=torch.device(device), capability=capability)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("device", "capability", "changes", "reason"),
    [
        ("cuda", (8, 0), [], "need compute capability 8.9, this device has 8.0"),
        ("mps", None, [], "Apple GPUs have no float8 formats"),
        ("cuda", (9, 0), ["model.mlp_dim=120"], "multiples of 16, not 120"),
    ],
)
def test_devices_and_models_that_cannot(device: str, capability, changes: list[str], reason: str):
    model = setup.GPT(load_recipe("smoke", changes).model)
    with pytest.raises(UserError, match=f"run.float8 = true cannot be used here: .*{reason}; set run.float8=false"):
        choices.explain_float8(model, on(device, capability))


@pytest.mark.parametrize("recipe", ["pr1212", "pr1130", "h100", "smoke"])
def test_models_of_the_recipes_can(recipe: str):
    with torch.device("meta"):
        model = setup.GPT(load_recipe(recipe).model)
    model.compute_dtype = torch.bfloat16
    for capability in ((8, 9), (9, 0), (12, 0)):
        assert choices.explain_float8(model, on("cuda", capability)) == {PRODUCTS: "float8"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            (ON, "run.kernels=fused"),
            'float8 = true needs the plain kernels: .* "plain" or "auto", or set float8 = false',
        ),
        (("run.float8=yes",), "float8"),
    ],
)
def test_settings_that_cannot_be(settings: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        load_recipe("smoke", settings)


# -- what is said about it ---------------------------------------------------------------------------------------------


def test_describe_says_so(capsys):
    for overrides in ([], [ON]):
        found = describe(load_recipe("smoke", overrides))
        assert found["float8"] == bool(overrides)
        print_description(found)
        said = "products of the layers in float8 (run.float8)" in " ".join(capsys.readouterr().out.split())
        assert said == bool(overrides)


@pytest.mark.parametrize(
    ("device", "capability", "words"),
    [
        ("cpu", None, "off unless run.float8=true, rounded and multiplied in float32: slower than without"),
        ("cuda", (9, 0), "off unless run.float8=true"),
        ("cuda", (8, 0), "off: float8 products need compute capability 8.9, this device has 8.0"),
        ("mps", None, "off: Apple GPUs have no float8 formats"),
    ],
)
def test_doctor_explains_it(device: str, capability, words: str):
    (found,) = (f for f in explain("paths", "it", device, capability) if f.name == "float8 products")
    assert found.value == words


def test_the_benchmark_of_the_mlp(monkeypatch):
    """A variant that computes in float8 what the plain one does; left out where it cannot be."""
    bench = Bench(engine=build_engine(short(), Context()), repeats=1)
    h, up, down, grad = (bench.random(*size) for size in ((32, 64), (128, 64), (64, 128), (32, 64)))
    tensors = (torch.zeros_like(h), h, up, down, grad, 0.5)
    passes = {name: make(*tensors) for name, make in mlp.variants(bench).items()}
    forward, both = passes["float8, eager"]
    plain_forward, plain_both = passes["eager"]
    for found, plain in zip((forward(), *both()), (plain_forward(), *plain_both()), strict=True):
        assert 0.01 < float((found - plain).norm() / plain.norm()) < 0.2
    bench.engine.context = on("cuda", (8, 6))
    monkeypatch.setattr(mlp, "usable_products", lambda *_: {})
    assert "float8, eager" not in mlp.variants(bench)
    assert bench.left_out["float8"].endswith("this device has 8.6")


# -- on a device -------------------------------------------------------------------------------------------------------

SIZES = ("model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=64", "model.model_dim=128", "model.mlp_dim=384")
"""Recipe smoke with sizes that every kernel knows."""


@pytest.mark.gpu
@pytest.mark.parametrize("compile_", ["off", "on"])
def test_training_on_a_device(data: DataFolder, compile_: str):
    """Losses of a few steps, the warm-up before them, near those without."""

    def losses(*overrides: str) -> list[float]:
        context = Context(device=torch.device("cuda", 0))
        config = short(*SIZES, "seed=4", "lanes=[{count=1, seq_len=128, num_seqs=4}]", *overrides)
        session = build_session(config, data, context)
        assert session.compiled == (compile_ == "on")
        assert session.capture is None
        warm_up(session)
        found = []
        for number in range(6):
            found.append(train_step(session, plan_step(session, 1.0 * number))[0].item())
            session.step += 1
        session.loader.close()
        return found

    plain, found = losses("run.kernels=plain", f"run.compile={compile_}"), losses(ON, f"run.compile={compile_}")
    assert found == pytest.approx(plain, rel=0.03)
    assert found != plain
