"""The plan of experiments: everything in it can be run, and what cannot is refused with the reason."""

from importlib import resources
from pathlib import Path

import pytest

from benchmarks.evidence.plan import PLAN, Spec, check, load_plan
from epigram.config import load_recipe
from epigram.errors import UserError

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy.toml"


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = TOY.read_text("utf-8")
    assert old in text
    (path := tmp_path / "plan.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", [PLAN, TOY])
def test_every_recipe_resolves(path: Path):
    plan = load_plan(path)
    check(plan)
    assert [cell.priority for cell in plan.cells] == sorted(cell.priority for cell in plan.cells)


def test_data_folders_have_the_vocabulary_of_their_model():
    """Of NAME-N it is N, of others 1,024; a run with another one ends at once, on the machine that was waited for."""
    for cell in load_plan().cells:
        if cell.experiment.kind != "bench" and not cell.experiment.repeats:
            config = load_recipe(cell.recipe, cell.settings)
            assert config.model.vocab_size == int(cell.experiment.data.partition("-")[2] or 1024), cell.name


def test_tuning_comes_before_what_uses_the_tuned_recipe():
    """What is found after that changes nothing any more; experiments on base.toml do not depend on the recipe h100."""
    cells = load_plan().cells
    tuned = [cell.priority for cell in cells if cell.experiment.recipe == "h100"]
    tuning = ("vocabulary", "tuning", "tuning-8192", "long")
    must = [cell for cell in cells if cell.experiment.claim in tuning and cell.priority < 9]
    assert max(cell.priority for cell in must) < min(tuned)


def test_compared_experiments_share_a_kind_of_gpu():
    """Rows of one table that are compared belong to one group."""
    plan = load_plan()
    groups = {experiment.name: experiment.group for experiment in plan.experiments}
    for experiment in plan.experiments:
        rival = experiment.against or plan.claims[experiment.claim].baseline
        if rival not in ("", experiment.name, "published"):
            # Variants of the export are compared with their own training.
            assert groups[experiment.name] == groups[rival] != "", experiment.name


def test_ways_to_score():
    assert Spec.parse("blocks@2048").windows.stride == 2048
    assert Spec.parse("streaming@6144").windows.stride == 1
    assert Spec.parse("sliding@6144/128:1000") == Spec("sliding", 6144, 128, 1000)
    assert Spec.parse("blocks@2048").adapt is None
    sgd, lora = Spec.parse("sgd@2048/64"), Spec.parse("lora@2048/48:1000")
    assert (sgd.windows.name, sgd.windows.stride, sgd.adapt.kind) == ("sliding", 64, "sgd")
    assert (lora.max_tokens, lora.adapt.kind, lora.adapt.lora.chunk_tokens) == (1000, "lora", 48)
    for wrong in ("sliding@2048", "sgd@2048", "blocks", "blocks@2k"):
        with pytest.raises(UserError, match=wrong):
            Spec.parse(wrong)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "again"', 'name = "plain"', "come twice: plain"),
        ('claim = "steps"', 'claim = "stops"', r"no \[claim.stops\]"),
        ('baseline = "plain"', 'baseline = "plane"', "no experiment plane"),
        ("priority = [1, 4]", "priority = [1, 4, 5]", "3 numbers for 2 seeds"),
        ('name = "no-ema"', 'name = "nearest"', "names of their own"),
        ('kind = "whole"', 'kind = "hole"', "train, whole, bench"),
        ("train_s = 5", "trains = 5", "trains"),
    ],
)
def test_refused(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(UserError, match=message):
        load_plan(changed(tmp_path, old, new))


def test_a_setting_that_is_none(tmp_path: Path):
    plan = load_plan(changed(tmp_path, "quant.method", "quant.mothed"))
    with pytest.raises(UserError, match=r"plain-s1: .*unknown key quant.mothed"):
        check(plan)


def test_what_changes_a_result_changes_the_fingerprint(tmp_path: Path):
    def prints(path: Path) -> dict[str, str]:
        return {cell.name: cell.fingerprint for cell in load_plan(path).cells}

    before = prints(TOY)
    assert prints(changed(tmp_path, 'about = "as it is"', 'about = "as it was"')) == before
    after = prints(changed(tmp_path, "train_s = 5", "train_s = 6"))
    assert {name for name in before if after[name] != before[name]} == {"plain-s1", "plain-s2"}


def test_a_changed_recipe_changes_the_fingerprint_and_its_words_do_not(tmp_path: Path):
    recipe = resources.files("epigram") / "recipes" / "smoke.toml"
    prints = []
    for name, old, new in (("a", "", ""), ("b", "summary =", "summary = 'x'  #"), ("c", "softcap", "softcap")):
        text = recipe.read_text("utf-8").replace(old, new, 1) if old else recipe.read_text("utf-8")
        (tmp_path / f"{name}.toml").write_text(text + ("\n[loss]\nmile_floor = 0.1\n" if name == "c" else ""))
        cells = load_plan(changed(tmp_path, 'recipe = "smoke"', f'recipe = "{tmp_path / name}.toml"')).cells
        prints.append(next(cell.fingerprint for cell in cells if cell.name == "plain-s1"))
    assert prints[0] == prints[1] != prints[2]


def test_the_base_of_the_short_experiments_is_a_recipe():
    assert load_recipe(str(ROOT / "benchmarks" / "evidence" / "base.toml")).recipe == "h100"


def test_costs():
    cells = {cell.name: cell for cell in load_plan(TOY).cells}
    assert cells["diverges-s1337"].cost_s == 2 + 5 + 1  # start, training, one export
    # three exports; sliding, for which no cost is given, takes 2; 2,000 tokens hardly anything above the 1 of a start
    assert cells["plain-s1"].cost_s == 2 + 5 + 3 + 2 + 2 + 1
    assert cells["steps-64"].cost_s == 1 + 2 * 1


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").rglob("config.toml")), ids=lambda p: p.parent.name)
def test_configs_of_measured_runs_still_load(path: Path):
    load_recipe(str(path))
