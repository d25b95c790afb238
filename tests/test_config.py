"""Recipes and settings: what parses, what is refused, and that all problems are told at once."""

import re
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from epigram.config import load_recipe, override, parse_config, recipe_names, to_tree
from epigram.errors import UserError
from epigram.model.gpt import GPT

ROOT = Path(__file__).parents[1]
PUBLISHED_PARAMETERS = {"pr1212": 29_751_910, "pr1130": 27_605_108, "pr1019": 27_067_484, "pr549": 26_928_220}


def smoke_tree() -> dict:
    return to_tree(load_recipe("smoke"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    assert config.recipe == name
    path = tmp_path / "config.toml"
    path.write_bytes(tomli_w.dumps(to_tree(config)).encode())
    assert load_recipe(str(path)) == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_line_of_a_recipe_says_why(name: str) -> None:
    text = (resources.files("epigram") / "recipes" / f"{name}.toml").read_text("utf-8")
    bare = [
        line for line in text.splitlines()
        if "=" in line and "#" not in line and not line.startswith(("recipe", "summary", "parameter"))
    ]  # fmt: skip
    assert not bare


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_systems_have_the_published_size(name: str) -> None:
    model = GPT(load_recipe(name).model)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[name]


def test_pr1212_has_the_published_lanes() -> None:
    config = load_recipe("pr1212")
    assert config.tokens_per_step == 552_960
    assert [lane.seq_len for lane in config.flat_lanes] == [2048] * 5 + [6144] * 3


def test_pr1130_has_the_published_tokens() -> None:
    assert load_recipe("pr1130").tokens_per_step == 548_864


def test_overrides() -> None:
    config = load_recipe("smoke", ["seed=7", "lanes.1.num_seqs=3", "model.xsa_layers=[3]", "artifact.codec=brotli"])
    assert (config.seed, config.lanes[1].num_seqs, config.model.xsa_layers) == (7, 3, (3,))
    assert config.artifact.codec == "brotli"
    assert load_recipe("smoke", ["budget.train_s=90"]).budget.train_s == 90.0


def test_override_leaves_its_input_alone() -> None:
    tree = smoke_tree()
    override(tree, ["model.num_layers=6", "lanes.0.seq_len=32"])
    assert tree == smoke_tree()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "not of the form"),
        ("model.num_layer=3", "unknown key model.num_layer (did you mean model.num_layers?)"),
        ("train_s=3", "unknown key train_s (did you mean budget.train_s?)"),
        ("optim.muon.lr=3", "unknown key optim.muon.lr (did you mean optim.muon.lr_early or optim.muon.lr_late?)"),
        ("modle.num_layers=3", "unknown key modle (did you mean model?)"),
        ("nonsense.a=3", "unknown key nonsense$"),
        ("lanes.7.seq_len=3", "no place in an array"),
        ("lanes.²=1", "'²' is no section and no place in an array"),
        ("lanes.-1.seq_len=3", "no place in an array"),
        ("data.val_frac=0.5\nx=3", r"data.val_frac: expected a number, not '0.5\\nx=3'"),
        ("data.val_frac=0.5\n[x]", "data.val_frac: expected a number"),
        ("seed=" + "9" * 5000, "seed: expected an integer, not '9999"),
        ("model.num_layers=3.5", "model.num_layers: expected an integer, not 3.5"),
        ("model.smear=1", "model.smear: expected true or false, not 1"),
        ("model.window_layers=2", "model.window_layers: expected an array"),
        ("artifact.codec=7", "artifact.codec: expected text"),
        ("quant.calibration.source=val", "validation text may not be used"),
    ],
)
def test_bad_overrides_say_what_is_wrong(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=re.sub(r"([\[()?])", r"\\\1", message)):
        load_recipe("smoke", [assignment])


def test_all_problems_in_one_message() -> None:
    with pytest.raises(UserError) as error:
        load_recipe(
            "smoke",
            [
                "model.num_kv_heads=3",
                "budget.clock=sun",
                "run.precision=int3",
                "model.colour=1",
                "lanes.0.seq_len=0",
            ],
        )
    for part in ("num_kv_heads = 3", "clock = 'sun'", "precision = 'int3'", "model.colour", "seq_len = 0"):
        assert part in str(error.value), part


def test_missing_keys_are_named() -> None:
    tree = smoke_tree()
    del tree["model"]["num_layers"], tree["optim"]["muon"]["lr_early"]
    with pytest.raises(UserError, match="model.num_layers is missing.*optim.muon.lr_early is missing|"
                                        "optim.muon.lr_early is missing.*model.num_layers is missing"):  # fmt: skip
        parse_config(tree)


def test_combinations_across_parts() -> None:
    with pytest.raises(UserError, match="longer than any lane"):
        load_recipe("smoke", ["quant.calibration.seq_len=256"])
    with pytest.raises(UserError, match="lanes is empty"):
        load_recipe("smoke", ["lanes=[]"])


def test_unknown_recipe_names_the_choices() -> None:
    with pytest.raises(UserError, match="choose one of demo.*pr1212"):
        load_recipe("pr9999")


def test_broken_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[model\n")
    with pytest.raises(UserError, match="no valid TOML"):
        load_recipe(str(path))


def test_a_file_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b'recipe = "\xff"\n')
    with pytest.raises(UserError, match="x.toml is no valid TOML: .*utf-8"):
        load_recipe(str(path))


def numbers(tree: object, path: str = "") -> Iterator[tuple[str, type]]:
    """Every setting that is a number, and its type."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, f"{path}.{key}".lstrip("."))
    elif type(tree) in (int, float):
        yield path, type(tree)


@pytest.mark.parametrize(
    ("kind", "word"),
    [(int, "9223372036854775808"), (int, "-9223372036854775808"), (int, "1" + 400 * "0"), (float, "1" + 400 * "0")]
    + [(float, word) for word in ("nan", "inf", "-inf", "1e+39")],
)
def test_no_number_is_infinite_or_enormous(kind: type, word: str) -> None:
    """Of every setting there is, also those whose own checks only compare, which lets NaN pass."""
    paths = [path for path, found in numbers(smoke_tree()) if found is kind]
    assert len(paths) > 30
    with pytest.raises(UserError) as error:
        load_recipe("smoke", [f"{path}={word}" for path in paths])
    for path in paths:
        named = re.sub(r"\.\d+", "", path)  # places in arrays are not told
        assert f"{named}: {word} is out of range" in str(error.value)


PLAIN = st.one_of(st.booleans(), st.integers(-9, 9), st.text(max_size=3), st.floats(-2, 2))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)
PLACES = ["seed", "model", "model.num_layers", "lanes", "lanes.0", "optim.adamw.overrides", "budget.clock"]


@given(VALUES, st.sampled_from(PLACES))
def test_any_value_anywhere_gives_a_config_or_a_user_error(value: object, path: str) -> None:
    tree = smoke_tree()
    target = tree
    *parents, last = path.split(".")
    for key in parents:
        target = target[int(key)] if key.isdigit() else target[key]
    target[int(last) if last.isdigit() else last] = value
    try:
        config = parse_config(tree)
    except UserError:
        return
    assert parse_config(tomllib.loads(tomli_w.dumps(to_tree(config)))) == config


def test_the_table_of_techniques_names_what_is_there() -> None:
    """Its settings are settings, its files are files, and what is in parentheses is a word of one of the row's."""
    section = (
        (ROOT / "docs" / "architecture.md").read_text().split("\n## Where each technique is\n")[1].split("\n## ")[0]
    )
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    tree = to_tree(load_recipe("pr1212"))
    package = ROOT / "src" / "epigram"
    for technique, settings, places in rows:
        for path in re.findall(r"`([a-z0-9_.]+)`", settings):
            part = tree
            for key in path.split("."):
                assert key in part, f"{technique}: there is no setting {path}"
                part = part[key]
        files = [package / path for path in re.findall(r"`([a-z0-9_/]+\.py)`", places)]
        assert files and all(file.is_file() for file in files), (technique, files)
        text = "".join(file.read_text() for file in files)
        assert all(word in text for word in re.findall(r"\(`(\w+)`\)", places)), (technique, places)
    sizes = {"vocab_size", "num_layers", "model_dim", "num_heads", "head_dim"}  # of any transformer
    assert set(re.findall(r"`model\.(\w+)`", section)) == set(tree["model"]) - sizes
    for name in re.findall(r"`(\w+Config)`", section):
        assert any(f"class {name}" in file.read_text() for file in package.rglob("*.py")), name
