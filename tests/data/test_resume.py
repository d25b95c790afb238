"""A build that was interrupted, by whatever, gives the very bytes of one that was not."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import listing, make_documents
from hypothesis import given
from hypothesis import strategies as st

from epigram.data import encoding, journal
from epigram.data.build import build
from epigram.data.clean import Cleaning
from epigram.data.encode import encode_all
from epigram.data.split_writer import cut_documents
from epigram.data.tokenizer import Tokenizer
from epigram.errors import DataError

SETTINGS = {"shard_tokens": 3000, "val_fraction": 0.1}


@pytest.fixture
def sources(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records and plain text in one folder each, cut into many small parts."""
    monkeypatch.setattr("epigram.data.sources.jsonl._PART_BYTES", 1500)
    monkeypatch.setattr("epigram.data.works.PART_BYTES", 1500)
    documents = make_documents(120, seed=3)
    documents[70] = documents[5]
    folder = tmp_path / "records"
    folder.mkdir()
    for name, some in (("a", documents[:50]), ("b", documents[50:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in some))
    plain = tmp_path / "plain"
    plain.mkdir()
    for index, one in enumerate(make_documents(40, seed=9)):
        (plain / f"{index:02d}.txt").write_text(one)
    (tmp_path / "given.model").write_bytes(tokenizer.proto)
    return tmp_path


def build_all(sources: Path, out: Path, cleaning: Cleaning | None = None, **options) -> Path:
    given = [sources / "records", sources / "plain"]
    tokenizer_file = sources / "given.model"
    return build(given, out, tokenizer_file=tokenizer_file, cleaning=cleaning, **SETTINGS, **options).path


class Interrupted(BaseException):
    """Stands for Ctrl-C, or for a machine that is taken away."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, parts: int, error: BaseException) -> None:
    """Let encoding raise `error` after so many parts of a pass."""

    def some(*arguments):
        for index, item in enumerate(encode_all(*arguments)):
            if index == parts:
                raise error
            yield item

    monkeypatch.setattr(encoding, "encode_all", some)


@pytest.mark.parametrize("cleaning", [None, Cleaning(dedup="near", near_threshold=0.8)], ids=["plain", "near"])
@pytest.mark.parametrize(("every", "shard_tokens"), [(1, 3000), (4, 300)], ids=["each part", "shards since"])
def test_any_number_of_interruptions_changes_nothing(
    sources: Path, monkeypatch: pytest.MonkeyPatch, cleaning: Cleaning | None, every: int, shard_tokens: int
) -> None:
    """The journal is written behind each part, or so seldom that whole shards are finished after the last entry."""
    monkeypatch.setitem(SETTINGS, "shard_tokens", shard_tokens)
    expected = listing(build_all(sources, sources / "whole", cleaning))
    asked = itertools.count(1)
    monkeypatch.setattr(journal.Journal, "is_due", lambda self: next(asked) % every == 0)
    interruptions = 0
    while True:
        interrupt_after(monkeypatch, 9, Interrupted())
        try:
            build_all(sources, sources / "out", cleaning)
            break
        except Interrupted:
            interruptions += 1
            assert not (sources / "out").exists()
            (left,) = sources.glob(".out.building-*")
            (left / f".build.json.{interruptions}.partial").write_bytes(b"{")  # as a kill leaves it
    assert interruptions >= 5
    assert listing(sources / "out") == expected
    assert not list(sources.glob(".*"))


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9))
def test_documents_of_a_stream_in_pieces(values: list[int], size: int) -> None:
    """Against a plain loop; 1 is BOS."""
    expected: list[list[int]] = []
    for value in [1, *values]:
        expected += [[]] if value == 1 else []
        expected[-1].append(value)
    stream = np.array([1, *values], np.uint16)
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert [document.tolist() for document in cut_documents(pieces, 1)] == expected
    assert not list(cut_documents([], 1))


def test_a_full_disk_is_no_end(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = listing(build_all(sources, sources / "whole"))
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    fsync, calls = os.fsync, []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 60:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match="is full"):
        build_all(sources, sources / "out")
    assert list(sources.glob(".out.building-*"))
    assert listing(build_all(sources, sources / "out")) == expected


@pytest.mark.parametrize("change", ["text", "setting", "tokenizer"])
def test_other_text_or_settings_begin_anew(
    sources: Path, monkeypatch: pytest.MonkeyPatch, change: str, nfkc_tokenizer: Tokenizer
) -> None:
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9, Interrupted())
        with pytest.raises(Interrupted):
            build_all(sources, sources / "out")
    seed = 0
    if change == "text":
        (sources / "records" / "a.jsonl").write_text(json.dumps({"text": "something else"}) + "\n")
    elif change == "setting":
        seed = 1
    else:
        (sources / "given.model").write_bytes(nfkc_tokenizer.proto)
    resumed = listing(build_all(sources, sources / "out", seed=seed))
    assert resumed == listing(build_all(sources, sources / "whole", seed=seed))
    assert not list(sources.glob(".*"))


def test_a_mistake_that_comes_to_light_leaves_nothing(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    interrupt_after(monkeypatch, 9, DataError("a document is wrong"))
    with pytest.raises(DataError, match="is wrong"):
        build_all(sources, sources / "out")
    assert not list(sources.glob(".out*"))


def test_only_what_nobody_works_on_is_taken_over(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of another machine that wrote its journal lately may be alive, one that fell silent is not."""
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9, Interrupted())
        with pytest.raises(Interrupted):
            build_all(sources, sources / "out")
    (left,) = sources.glob(".out.building-*")
    foreign = left.rename(left.with_name(f".out.building-elsewhere-{os.getpid()}"))
    build_all(sources, sources / "out")
    assert foreign.exists()
    long_ago_s = time.time() - 10_000
    os.utime(foreign / "build.json", (long_ago_s, long_ago_s))
    build_all(sources, sources / "out")
    assert not foreign.exists()
    assert socket.gethostname() != "elsewhere"


def test_killed_and_gone_on_with(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Real processes with workers: SIGKILL in the middle, then the same command again."""
    (tmp_path / "given.model").write_bytes(tokenizer.proto)
    lines = "".join(json.dumps({"text": one}) + "\n" for one in make_documents(300, seed=8) * 40)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "script.py").write_text(
        "import sys\nfrom epigram.data import build as b, journal\n"
        "from epigram.data.sources import jsonl\n"
        "b._SMALL_BYTES = 0; journal.EVERY_S = 0.0; jsonl._PART_BYTES = 1 << 17\n"
        "if __name__ == '__main__':\n"
        "    b.build([sys.argv[1]], sys.argv[2], tokenizer_file=sys.argv[3], workers=int(sys.argv[4]))\n"
    )
    given = [tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "given.model"]
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", *given, "2"], start_new_session=True)
    deadline_s = time.monotonic() + 60
    while not list(tmp_path.glob(".out.building*/build.json")) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert process.poll() is None, "the build ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.glob(".out.building-*")
    assert journal.read_entry(left).place > (0, 0)
    subprocess.run([sys.executable, tmp_path / "script.py", *given, "1"], check=True)
    whole = [tmp_path / "a.jsonl", tmp_path / "whole", tmp_path / "given.model"]
    subprocess.run([sys.executable, tmp_path / "script.py", *whole, "1"], check=True)
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
