"""The report of runs in every state: complete, over a limit, stopped, damaged."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from click.testing import CliRunner

from epigram.cli.main import command
from epigram.errors import UserError
from epigram.run.record import RunRecord
from epigram.run.report import build, summary, tables
from epigram.run.report.plots import NUM_COLOURS, Plot, Series, draw, settled_limits, short, thin
from epigram.run.report.reader import read_run
from epigram.run.report.style import page_colours

CONFIG = {
    "recipe": "demo",
    "seed": 7,
    "budget": {"train_s": 60.0, "calibrate_s": 5.0},
    "artifact": {"cap_bytes": 2000, "codec": "entropy"},
}
SCORE = {"val_nats": 2.0, "tokens": 1000, "bytes": 2400, "seq_len": 64, "score_s": 1.25}
RESULT = {
    "recipe": "demo",
    "seed": 7,
    "parameters": 123_456,
    "artifact_bytes": 1500,
    "total_bytes": 1600,
    "cap_bytes": 2000,
    "train_s": 50.0,
    "calibrate_s": 4.0,
    "quantize_s": 2.0,
    "peak_memory_bytes": 1_500_000_000,
    "sizes": [
        {"part": "attention", "bytes": 900, "weights": 1200, "bits_per_weight": 6.0},
        {"part": "header", "bytes": 90},
    ],
    "quantization": [{"tensors": "mlp", "relative_error": 0.0213}],
    "compressors": [
        {"label": "xz -9e, alone", "bpb": 2.5, "text_bytes": 100, "whole_text_bytes": 250, "primer_bytes": 0},
        {"label": "xz -9e, primed", "bpb": 1.8, "primer_bytes": 900},
        {"label": "zstd -19, alone", "bpb": 2.6},
        {"label": "broken", "bpb": None},
    ],
    "calibration": {"source": "training windows", "windows": 64},
}  # fmt: skip


def write_run(folder, steps=30, **changes):
    """A run folder as the recorder writes it; `changes` go into its result."""
    with RunRecord(folder, CONFIG) as run:
        run.environment({"versions": {"torch": "2.13.0"}, "paths": {"attention": "sdpa"}})
        for step in range(1, steps + 1):
            loss = 7 * math.exp(-step / 10) + 2
            phase = "qat" if step > 20 else "train"
            run.step(step=step, elapsed_s=step, train_loss=loss, lr=1 - step / steps, grad_norm=0.3, phase=phase)
            if step % 10 == 0:
                run.validation(step=step, elapsed_s=step, val_nats=loss, val_bpb=loss / 1.7)
        run.score("float", "sliding", {"val_bpb": 1.2000, "stride": 16, **SCORE})
        run.score("quantized", "sliding", {"val_bpb": 1.2345, "stride": 16, **SCORE})
        run.score("quantized", "blocks", {"val_bpb": 1.3000, "stride": 64, **SCORE})
        run.sample("Once", " upon <b>a</b> time & so", temperature=0.8)
        run.update(**{**RESULT, **changes})
    return folder


class Page(HTMLParser):
    """The text of a page, its elements, and everything it would load."""

    def __init__(self, source):
        super().__init__()
        self.words, self.tags, self.loads, self.ids, self.open = [], [], [], [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture
def run_folder(tmp_path, capsys):
    return write_run(tmp_path / "runs" / "first")


def page_of(*folders) -> Page:
    return Page(build.render([read_run(folder) for folder in folders]))


def test_a_page_says_what_matters(run_folder):
    page = page_of(run_folder)
    for words in (
        "Finished within its cap and its time.",
        "1.2345 bits per byte",
        "quantized, sliding, window 64, stride 16",
        "1,600 bytes",
        "80.0 % of the cap of 2,000",
        "93.3 % of 60.0 s: training 50.0 s, calibration 4.0 s, quantization 2.0 s",
        "peak memory 1.50 GB",
        "seed 7",
        "sliding 1.2000 1.2345 0.0345",
        "attention 900 1,200 6.00",
        "mlp 0.0213",
        "xz -9e, primed",
        "the first 100 of its 250 bytes. Primed: after 900 bytes of training text",
        "Once upon <b>a</b> time & so",
        "temperature 0.8",
        "budget.train_s 60.0",
        "versions.torch 2.13.0",
        "training windows",
        "Loss, nats per token",
        "Learning rate",
        "Norm of the gradient",
    ):
        assert words in page.text, words
    assert "End of the log" not in page.text
    assert page.open == []


def test_a_page_loads_nothing(run_folder):
    source = build.render([read_run(run_folder)])
    assert re.findall(r"https?:|//[a-z]", source) == []
    assert "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []
    assert all(target.startswith(("#", "data:,")) for target in Page(source).loads)
    assert "script" not in Page(source).tags
    assert "default-src 'none'" in source


def test_drawings_keep_their_ids_apart(run_folder):
    page = page_of(run_folder, write_run(run_folder.parent / "second"))
    assert len(page.ids) == len(set(page.ids))
    targets = {target[1:] for target in page.loads if target.startswith("#")}
    assert targets <= set(page.ids)


def test_drawings_take_the_colours_of_the_page():
    series = Series(label="<training>", run=1, steps=range(50), values=[50.0 - i for i in range(50)])
    drawing = draw(Plot(title="Loss", series=(series,), marks=((20.0, "qat"),)), 3)
    assert "var(--run-1)" in drawing
    assert "var(--ink)" in drawing
    assert "#0a0b" not in drawing
    assert "&lt;training&gt;" in drawing
    assert "qat" in drawing
    assert drawing.startswith('<svg role="img" aria-label="Loss"')
    # What is left of fixed colours would not follow the colour scheme.
    assert set(re.findall(r"#[0-9a-f]{6}", drawing)) <= {"#000000"}


def test_drawings_in_files_have_the_colours_of_a_light_page():
    css = (files("epigram.run.report") / "page.css").read_text()
    colours = page_colours()
    assert len(colours.series) == NUM_COLOURS
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    for name, colour in {
        "ink": colours.ink,
        "soft": colours.soft,
        "rule": colours.rule,
        "run-5": colours.series[5],
    }.items():
        assert f"--{name}: {colour};" in light
        assert f"--{name}: {colour};" not in dark


def test_a_run_over_its_limits_is_told(tmp_path, capsys):
    folder = write_run(tmp_path / "run", total_bytes=2345, train_s=59.0)
    assert "Finished, but over its cap by 345 bytes and over its time by 5.0 s." in page_of(folder).text


def test_several_runs_are_overlaid(run_folder, capsys):
    second = write_run(run_folder.parent / "second", steps=25)
    (second / "result.json").write_text(
        (second / "result.json").read_text().replace("1.2345", "1.1111").replace('"seed": 7', '"seed": 42')
    )
    source = build.render([read_run(run_folder), read_run(second)])
    page = Page(source)
    assert "2 runs" in page.text
    assert page.tags.count("svg") == 4
    assert "second finished 1.1111 quantized, sliding 1,600 2,000 56.0 42" in page.text
    strong = re.search(r'<tr class="strong">(.*?)</tr>', source, re.S)
    assert "second" in strong.group(1)
    loss = source[source.index("<svg") : source.index("</svg>")]
    assert "var(--run-0)" in loss
    assert "var(--run-1)" in loss


# -- runs that did not end well
# ----------------------------------------------------------------------------------


def stopped_run(folder, error):
    with RunRecord(folder, CONFIG) as run:
        run.step(step=1, elapsed_s=1.0, train_loss=6.0)
        run.validation(step=1, elapsed_s=1.0, val_nats=6.0, val_bpb=3.25)
        raise error


def test_an_interrupted_run(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        stopped_run(tmp_path / "run", KeyboardInterrupt())
    text = page_of(tmp_path / "run").text
    assert "The run was interrupted: stopped by Ctrl-C" in text
    assert "3.2500 bits per byte last validation, step 1" in text
    assert "End of the log step:1/55 train_loss:6.0000" in text


def test_a_run_on_a_full_disk(tmp_path, capsys):
    with pytest.raises(OSError, match="left"):
        stopped_run(tmp_path / "run", OSError(28, "No space left on device"))
    assert "The run failed: OSError: [Errno 28] No space left on device" in page_of(tmp_path / "run").text


def test_only_a_report_is_replaced(run_folder, tmp_path):
    page = tmp_path / "page.html"
    page.touch()
    for _ in range(2):
        build.build([run_folder], page)
    page.write_text("notes about epigram")
    with pytest.raises(UserError, match="page.html is no report, and would be lost"):
        build.build([run_folder], page)
    assert page.read_text() == "notes about epigram"


def test_what_a_run_says_of_its_limits_is_the_verdict(run_folder):
    """Not what its times look like: with counted steps no time is over, and scores have a limit too."""
    path = run_folder / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "train_s": 1e6, "over_budget": []}))
    assert "Finished within its cap and its time." in page_of(run_folder).text
    path.write_text(json.dumps({**result, "over_budget": ["scoring took 2.0 s of 1.0 s"]}))
    assert "Finished, but scoring took 2.0 s of 1.0 s." in page_of(run_folder).text


def test_a_killed_run(run_folder):
    """No result was written at the end, and the last line of the metrics is half a line."""
    (run_folder / "result.json").unlink()
    metrics = run_folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-25])
    run = read_run(run_folder)
    assert run.problems == (
        "result.json is missing",
        "metrics.jsonl has 1 damaged line(s), which are left out",
    )
    assert len(run.rows) == 32
    text = page_of(run_folder).text
    assert "The run has not finished" in text
    assert "metrics.jsonl has 1 damaged line(s)" in text
    assert "Loss, nats per token" in text


@pytest.mark.parametrize("name", ["config.toml", "environment.json", "log.txt", "metrics.jsonl", "result.json"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[1, 2", b"[[[[", b'{"a": NaN}', None])
def test_any_file_may_be_damaged(run_folder, name, content):
    if content is None:
        (run_folder / name).unlink()
    else:
        (run_folder / name).write_bytes(content)
    page = page_of(run_folder)
    assert "first" in page.text
    harmless = name == "log.txt" or (name == "metrics.jsonl" and content == b"")
    valid = name.endswith(("json", "jsonl")) and content == b'{"a": NaN}'
    empty_toml = name == "config.toml" and content == b""
    assert ("could not read" in page.text) == (not (harmless or valid or empty_toml))


WRONG = [
    None,
    3,
    "text",
    [],
    [1, "x"],
    {"sliding": 4},
    {"quantized": {"sliding": {"val_bpb": "low"}}},
    float("nan"),
]


@pytest.mark.parametrize("key", ["scores", "sizes", "compressors", "sample", "train_s", "total_bytes", "calibration"])
def test_values_of_the_wrong_kind_do_no_harm(run_folder, key):
    path = run_folder / "result.json"
    whole = json.loads(path.read_text())
    for value in WRONG:
        path.write_text(json.dumps({**whole, key: value}))
        assert "first" in page_of(run_folder).text


def test_damaged_rows_do_no_harm(run_folder):
    lines = [
        '{"step": "ten", "train_loss": 1}',
        "[]",
        '{"train_loss": 2}',
        '{"step": 40, "train_loss": "low"}',
    ]
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    run = read_run(run_folder)
    assert run.curve("train_loss")[0][-1] == 30
    assert page_of(run_folder).tags.count("svg") == 4


def test_a_resumed_run_counts_its_repeated_steps_once(run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        for step in (21, 22):
            file.write(json.dumps({"step": step, "train_loss": 1.5}) + "\n")
    steps, values = read_run(run_folder).curve("train_loss")
    assert steps == [float(step) for step in range(1, 23)]
    assert values[-2:] == [1.5, 1.5]
    assert read_run(run_folder).curve("val_bpb")[0] == [10.0, 20.0]


def test_a_run_resumed_at_a_validation_keeps_the_step_before_it(run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "val_bpb": 1.25}) + "\n")
    run = read_run(run_folder)
    assert run.curve("train_loss")[0][-1] == 20
    assert run.curve("val_bpb")[1][-1] == 1.25
    assert run.curve("val_bpb")[0] == [10.0, 20.0]


def test_a_run_named_twice_is_refused(run_folder, tmp_path):
    with pytest.raises(UserError, match="comes twice: name each run once"):
        build.build([run_folder, run_folder / "."], tmp_path / "report.html")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run folder"):
        read_run(tmp_path)


# -- parts
# ---------------------------------------------------------------------------------------------------------


def test_thin_keeps_mean_and_range():
    steps, values = list(range(1, 1001)), [float(i % 10) for i in range(1000)]
    at, means, lows, highs = thin(steps, values, most=100)
    assert len(at) == 100
    assert (at[0], at[-1]) == (5.5, 995.5)
    assert set(means) == {4.5}
    assert (set(lows), set(highs)) == ({0.0}, {9.0})
    assert thin(steps, values, most=1000)[1] == values
    assert sum(len(part) for part in (thin(range(7), [1.0] * 7, most=3)[0],)) == 3


def test_axis_limits_leave_the_first_steps_out():
    series = Series(label="", run=0, steps=range(1, 101), values=[1000.0] + [float(i) for i in range(99)])
    low, high = settled_limits([series])
    assert low == pytest.approx(1 - 0.05 * 97)
    assert high == pytest.approx(98 + 0.05 * 97)
    assert settled_limits([Series(label="", run=0, steps=[1, 2], values=[3.0, 3.0])]) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (2e6, "2M"), (3e9, "3G"), (-2000, "-2k")],
)
def test_short(value, expected):
    assert short(value) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("val_bpb", 1.10936812, "1.1094"),
        ("tokens", 62_017_536, "62,017,536"),
        ("score_s", 123.64, "123.6"),
        ("seed", 1337, "1337"),
        ("peak_memory_bytes", 18_500_000_000, "18.50 GB"),
        ("error", 0.000123456, "0.0001235"),
        ("tokens_per_s", 1_150_000.4, "1,150,000"),
        ("anything", None, "\u2013"),
        ("flag", True, "True"),
        ("shape", [1, [2, 3]], "1, 2, 3"),
        ("nested", {"a": 1}, "a 1"),
        ("lanes", [{"a": 1, "b": 2}, {"a": 3}], "a 1, b 2; a 3"),
    ],
)
def test_text_of_values(key, value, expected):
    assert tables.text(key, value) == expected


def test_durations():
    assert [tables.duration(s) for s in (41.23, 586.4, 3785)] == ["41.2 s", "9 min 46 s", "1 h 3 min"]


def test_a_grid_leaves_empty_columns_out():
    grid = tables.grid([{"name": "a", "x": 1, "y": None}, {"name": "b", "x": 4, "z": "w"}], bar="x", strong=[1])
    assert [cell.text for cell in grid.headings] == ["", "x", "z"]
    assert [cell.bar for row in grid.rows for cell in row] == [None, 0.25, None, None, 1.0, None]
    assert [cell.is_number for cell in grid.headings] == [False, True, False]
    assert grid.strong == {1}


def test_the_model_stands_among_the_compressors(run_folder):
    bars, note = summary.compare(read_run(run_folder))
    assert [(bar.label.split(",")[0], bar.value) for bar in bars] == [
        ("zstd -19", "2.600"), ("xz -9e", "2.500"), ("xz -9e", "1.800"), ("this model", "1.234"),
    ]  # fmt: skip
    assert [bar.is_model for bar in bars] == [False, False, False, True]
    assert bars[1].share == pytest.approx(2.5 / 2.6)
    assert "first 100 of its 250 bytes" in note


# -- the command
# ---------------------------------------------------------------------------------------------------


def test_command(run_folder, tmp_path, monkeypatch):
    done = CliRunner().invoke(command, ["report", str(run_folder)])
    assert done.exit_code == 0, done.output
    assert (run_folder / "report.html").read_text().startswith("<!doctype html>")
    out = tmp_path / "new" / "page.html"
    copy = shutil.copytree(run_folder, run_folder.parent / "copy")
    (copy / "config.toml").unlink()
    done = CliRunner().invoke(command, ["report", str(run_folder), str(copy), "--out", str(out), "--json"])
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "report": str(out),
        "runs": ["first", "copy"],
        "problems": {"first": [], "copy": ["config.toml is missing"]},
    }
    assert "copy: config.toml is missing" in done.stderr
    assert out.exists()
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(command, ["report", str(run_folder), str(copy)]).exit_code == 0
    assert (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_the_users_mistake(run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build.build([run_folder], tmp_path / "file" / "page.html")
