"""Fetching from a hub on the loopback: each fault ends in the right file or a clear error, never in a wrong shard."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import listing
from fake_hub import ALTERING, API_FAULTS, COMMIT, REPO, STORE_FAULTS, WRONG_LENGTH, FakeHub

from epigram.cli.data import command
from epigram.data import fetch as fetch_module
from epigram.data import published
from epigram.data.check import check
from epigram.data.dataset import open_data
from epigram.data.fetch import fetch
from epigram.data.files import held_alone
from epigram.data.hub import Hub
from epigram.data.published import PUBLISHED, Published
from epigram.data.shards import header_bytes
from epigram.data.tokenizer import Tokenizer
from epigram.data.validation import FETCHED, read_fetched
from epigram.errors import DataError, UserError

FOLDER = "datasets/datasets/fineweb10B_tiny"
VAL = f"{FOLDER}/fineweb_val_000000.bin"


def shard(num_tokens: int, seed: int, vocab_size: int = 400) -> bytes:
    draw = np.random.default_rng(seed)
    return header_bytes(num_tokens) + draw.integers(0, vocab_size, num_tokens).astype("<u2").tobytes()


@pytest.fixture
def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    return {
        **{f"{FOLDER}/fineweb_train_{i:06d}.bin": shard(20_000, i) for i in range(3)},
        VAL: shard(9_000, 99),
        "datasets/datasets/fineweb10B_other/fineweb_val_000000.bin": shard(50, 7),
        "datasets/tokenizers/tiny.model": tokenizer.proto,
        "README.md": b"shards",
    }


@pytest.fixture
def tiny(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Published:
    variant = Published(
        name="tiny",
        repo=REPO,
        folder="fineweb10B_tiny",
        tokenizer="tiny.model",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        val_tokens=(9_000, 9_000),
        train_shards=2,
    )
    monkeypatch.setitem(published.PUBLISHED, "tiny", variant)
    return variant


@pytest.fixture
def hub(files: dict[str, bytes], tiny: Published, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub for which the library keeps small parts, gives up a silent connection soon and sleeps little."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    sleep = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with FakeHub(files) as server:
        server.stall_s = 0.6
        yield server


def bring(hub: FakeHub, out: Path, **options):
    return fetch("tiny", out, endpoint=hub.endpoint, wait_s=0.01, **options)


def assert_right(out: Path, files: dict[str, bytes], num_train: int = 2) -> None:
    """The folder holds the very files of the hub, nothing else, and can be trained on."""
    expected = {path.rpartition("/")[2]: contents for path, contents in files.items() if FOLDER in path}
    expected = {name: one for name, one in expected.items() if "val" in name or int(name[14:20]) < num_train}
    expected["tiny.model"] = files["datasets/tokenizers/tiny.model"]
    found = listing(out)
    assert found.pop(FETCHED)
    assert found == expected
    data = open_data(out)
    assert data.num_tokens("train") == 20_000 * num_train
    assert data.validation is not None and data.validation.problem is None


def test_what_is_fetched_is_what_the_hub_has(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    result = bring(hub, tmp_path / "out")
    assert_right(tmp_path / "out", files)
    record = read_fetched(tmp_path / "out")
    assert record == result.fetched
    assert (record.repo, record.commit) == (REPO, COMMIT)
    assert record.files["fineweb_train_000001.bin"].tokens == 20_000
    assert record.files["fineweb_val_000000.bin"].sha256 == hashlib.sha256(files[VAL]).hexdigest()
    assert record.validation.text.startswith("published tiny (9,000 tokens, sha256 ")
    assert check(tmp_path / "out") == []


def test_a_second_call_downloads_what_is_missing(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    bring(hub, tmp_path / "out", shards=1)
    hub.requests.clear()
    bring(hub, tmp_path / "out", shards=3)
    assert_right(tmp_path / "out", files, 3)
    fetched = [line for line in hub.requests if "/api/" not in line]
    assert sorted(fetched) == [f"GET {FOLDER}/fineweb_train_00000{i}.bin" for i in (1, 2)]
    hub.requests.clear()
    (tmp_path / "out" / "fineweb_train_000000.bin").write_bytes(shard(20_000, 5))  # right length, wrong contents
    bring(hub, tmp_path / "out", shards=3)
    assert_right(tmp_path / "out", files, 3)
    assert len([line for line in hub.requests if "/api/" not in line]) == 1


@pytest.mark.parametrize("fault", STORE_FAULTS)
def test_every_fault_of_the_store_ends_in_the_right_files(
    tmp_path: Path, hub: FakeHub, files: dict[str, bytes], fault: str
) -> None:
    hub.store_faults.extend([fault] * 2)
    bring(hub, tmp_path / "out", parallel=2)
    assert hub.used == [fault] * 2
    assert_right(tmp_path / "out", files)


@pytest.mark.parametrize("fault", API_FAULTS)
def test_every_fault_of_the_hub_ends_in_the_right_files(
    tmp_path: Path, hub: FakeHub, files: dict[str, bytes], fault: str
) -> None:
    hub.api_faults.extend([fault] * 2)
    bring(hub, tmp_path / "out")
    assert hub.used == [fault] * 2
    assert_right(tmp_path / "out", files)


def test_a_broken_stream_goes_on_where_it_ended(tmp_path: Path, hub: FakeHub) -> None:
    hub.store_faults.extend(["slow", "cut", "cut"])  # the first for the small tokenizer
    bring(hub, tmp_path / "out", shards=1, parallel=1)
    starts = [int(line.split("bytes=")[1].rstrip("-")) for line in hub.requests if "bytes=" in line]
    assert len(starts) == 2 and 4096 <= starts[0] < starts[1]


@pytest.mark.parametrize("fault", ["500", *sorted(ALTERING - WRONG_LENGTH)])
def test_a_hub_that_never_gives_the_file_is_a_clear_error(tmp_path: Path, hub: FakeHub, fault: str) -> None:
    hub.store_faults.extend([fault] * 1000)
    with pytest.raises(DataError, match=r"wrong contents|does not give"):
        bring(hub, tmp_path / "out", parallel=1)
    assert not [name for name in listing(tmp_path) if not name.endswith(".partial")]


def test_waiting_for_the_hub_is_not_silent(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("epigram.data.hub._TOLD_S", 0.0)
    hub.api_faults.extend(["503"] * 5)
    bring(hub, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if "asking again in 0 s" in line]
    assert lines and all("the hub does not give someone/shards now (" in line and "503" in line for line in lines)


def test_a_hash_that_no_file_has_is_a_clear_error(tmp_path: Path, hub: FakeHub) -> None:
    hub.wrong_hashes.add(VAL)
    with pytest.raises(DataError, match="fineweb_val_000000.bin of someone/shards came 3 times with wrong contents"):
        bring(hub, tmp_path / "out")
    assert "out/fineweb_val_000000.bin" not in listing(tmp_path)


def test_an_interrupted_fetch_resumes(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    """The process is killed in the middle of a file; what it had is not asked for again."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[3]); from huggingface_hub import constants\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 4096\n"
        "from epigram.data.hub import Hub; from pathlib import Path\n"
        f"hub = Hub(sys.argv[1]); file = next(f for f in hub.list_files({REPO!r}) if f.path == {VAL!r})\n"
        "hub.download(file, Path(sys.argv[2]) / 'fineweb_val_000000.bin')"
    )
    hub.stall_s = 30
    hub.store_faults.append("stall")
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-c", script, hub.endpoint, str(tmp_path / "out"), str(Path(__file__).parent)]
    process = subprocess.Popen(words)
    try:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and process.poll() is None:
            if any(path.stat().st_size > 0 for path in (tmp_path / "out").glob(".*.partial")):
                break
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (partial,) = (tmp_path / "out").glob(".*.partial")
    have = partial.stat().st_size
    assert 4096 <= have < len(files[VAL])
    hub.requests.clear()
    bring(hub, tmp_path / "out")
    assert f"GET {VAL} bytes={have}-" in hub.requests
    assert_right(tmp_path / "out", files)


def test_names_and_numbers_that_cannot_be(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match="no published shards called 'sp7': choose one of sp1024"):
        fetch("sp7", tmp_path / "out", endpoint=hub.endpoint)
    with pytest.raises(UserError, match="tiny has 3 training shards, not 9"):
        bring(hub, tmp_path / "out", shards=9)
    with pytest.raises(UserError, match="must be at least 1"):
        bring(hub, tmp_path / "out", shards=0)
    hub.token = "secret"
    with pytest.raises(UserError, match="no someone/shards, or it is private"):
        bring(hub, tmp_path / "out")
    hub.token = None
    for path in list(files):
        if "tiny/" in path:
            del files[path]
    with pytest.raises(UserError, match="does not hold fineweb10B_tiny with tiny.model .it has .*fineweb10B_other"):
        bring(hub, tmp_path / "out")
    assert listing(tmp_path) == {}


def test_the_token_reaches_the_hub_and_not_the_store(
    tmp_path: Path, hub: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.token = "secret"
    bring(hub, tmp_path / "out")  # the store refuses whoever shows a token
    assert_right(tmp_path / "out", files)


def test_without_the_hub_a_complete_folder_will_do(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        bring(hub, tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    bring(hub, tmp_path / "out", shards=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    (note,) = bring(hub, tmp_path / "out", shards=2).notes
    assert note.startswith("every file is what was fetched before; the hub has not confirmed it (")
    assert "HF_HUB_OFFLINE" in note
    assert hub.requests == []
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        bring(hub, tmp_path / "out", shards=3)
    (tmp_path / "out" / "fineweb_train_000001.bin").write_bytes(shard(20_000, 5))
    with pytest.raises(DataError, match="fineweb_train_000001.bin is not the file that was fetched"):
        bring(hub, tmp_path / "out", shards=2)


def test_a_full_disk_is_seen_first(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(DataError, match=r"0.00 GB are to be downloaded, and the disk of .* has .* GB free"):
        bring(hub, tmp_path / "out")
    assert not [line for line in hub.requests if "/api/" not in line]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (shard(20_000, 1)[:-2], "cut short or damaged"),
        (b"x" * 5000, "is no token shard"),
        (shard(20_000, 1, vocab_size=60_000), "beyond the vocabulary of 400"),
        (header_bytes(0), "promises 0 tokens"),
    ],
    ids=["short", "no shard", "other vocabulary", "empty"],
)
def test_a_wrong_shard_on_the_hub_itself_is_refused(
    tmp_path: Path, hub: FakeHub, files: dict[str, bytes], contents: bytes, message: str
) -> None:
    files[f"{FOLDER}/fineweb_train_000000.bin"] = contents
    with pytest.raises(DataError, match=message):
        bring(hub, tmp_path / "out")
    assert "out/fineweb_train_000000.bin" not in listing(tmp_path)


def test_another_tokenizer_on_the_hub_is_refused(
    tmp_path: Path, hub: FakeHub, files: dict[str, bytes], nfkc_tokenizer: Tokenizer
) -> None:
    files["datasets/tokenizers/tiny.model"] = nfkc_tokenizer.proto
    with pytest.raises(DataError, match="has another tiny.model than the published one"):
        bring(hub, tmp_path / "out")
    assert "out/tiny.model" not in listing(tmp_path)


def test_another_validation_split_is_an_error_or_a_choice(
    tmp_path: Path, hub: FakeHub, files: dict[str, bytes]
) -> None:
    files[VAL] = shard(4_000, 99)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="of tiny has 9,000 tokens, and this one has 4,000.*--allow-other-validation"):
        bring(hub, out)
    assert not out.exists()  # what is listed says enough
    result = bring(hub, out, allow_other_validation=True)
    assert "every score will say: NOT the published one" in result.notes[0]
    assert open_data(out).validation.text.startswith("NOT the published one, allowed by choice: the validation split")
    files[VAL] = shard(9_000, 99)  # the real one is back
    assert bring(hub, out).fetched.validation.problem is None
    assert_right(out, files)


def test_other_contents_of_the_right_length(
    tmp_path: Path, hub: FakeHub, files: dict[str, bytes], tiny: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the very first fetch, where the hash of the split is published."""
    pinned = replace(tiny, val_md5=hashlib.md5(files[VAL]).hexdigest())
    monkeypatch.setitem(published.PUBLISHED, "tiny", pinned)
    right = files[VAL]
    files[VAL] = shard(9_000, 98)
    out = tmp_path / "out"
    with pytest.raises(
        DataError, match=rf"MD5 {pinned.val_md5}, and this one has {hashlib.md5(files[VAL]).hexdigest()}"
    ):
        bring(hub, out)
    assert not (out / FETCHED).exists()
    assert "NOT the published one" in bring(hub, out, allow_other_validation=True).notes[0]
    files[VAL] = right
    assert bring(hub, out).fetched.validation.problem is None
    assert_right(out, files)


def test_a_validation_split_that_changes_behind_its_name(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    """The count alone would not tell: the hash of the first fetch does. The one that is here stays."""
    bring(hub, tmp_path / "out")
    before = dict(files)
    files[VAL] = shard(9_000, 98)
    with pytest.raises(DataError, match="had other contents when it was fetched"):
        bring(hub, tmp_path / "out")
    assert_right(tmp_path / "out", before)


def test_fewer_shards_than_lie_there(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    """Whoever opens the folder reads all of them, so the record keeps them, or they are an error."""
    bring(hub, tmp_path / "out", shards=3)
    assert sorted(bring(hub, tmp_path / "out", shards=1).fetched.files) == sorted(
        [*(f"fineweb_train_00000{i}.bin" for i in range(3)), "fineweb_val_000000.bin", "tiny.model"]
    )
    assert_right(tmp_path / "out", files, 3)
    files[f"{FOLDER}/fineweb_train_000002.bin"] = shard(20_000, 5)
    with pytest.raises(DataError, match=r"out holds fineweb_train_000002.bin, not as the hub has it now"):
        bring(hub, tmp_path / "out", shards=1)
    bring(hub, tmp_path / "out", shards=3)
    assert_right(tmp_path / "out", files, 3)


def test_a_validation_shard_too_many(tmp_path: Path, hub: FakeHub) -> None:
    bring(hub, tmp_path / "out")
    (tmp_path / "out" / "fineweb_val_000001.bin").write_bytes(shard(100, 8))
    with pytest.raises(DataError, match=r"out holds fineweb_val_000001.bin, not as the hub has it now"):
        bring(hub, tmp_path / "out")


def test_shards_that_the_hub_has_twice(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    first, second = (f"{FOLDER}/fineweb_train_00000{i}.bin" for i in range(2))
    right = files[second]
    for twin in (first, VAL):
        files[second] = files[twin]
        with pytest.raises(DataError, match=r"fineweb_train_000001.bin of someone/shards have the same contents"):
            bring(hub, tmp_path / "out")
    files[second] = right
    files["older/fineweb10B_tiny/fineweb_train_000000.bin"] = shard(20_000, 50)
    with pytest.raises(DataError, match=r"has datasets/.* and older/fineweb10B_tiny/.*, one of which is wrong"):
        bring(hub, tmp_path / "out")
    assert listing(tmp_path) == {}


def test_two_at_a_time_do_not_share_a_folder(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    """A file that one has verified must not be written to by the other, which had it open as a part."""
    (tmp_path / "out").mkdir()
    with (
        held_alone(tmp_path / "out"),
        pytest.raises(UserError, match="out is in use, another process is filling it: wait"),
    ):
        bring(hub, tmp_path / "out")
    bring(hub, tmp_path / "out")
    assert_right(tmp_path / "out", files)


@pytest.mark.parametrize("stated", ["../../../etc/evil", "", "0" * 10])
def test_a_listing_without_a_hash_is_refused(tmp_path: Path, hub: FakeHub, stated: str) -> None:
    hub.stated[VAL] = stated
    with pytest.raises(DataError, match="states no hash of .*fineweb_val_000000.bin"):
        bring(hub, tmp_path / "out")
    assert listing(tmp_path) == {}


def test_names_in_the_listing_stay_inside_the_folder(tmp_path: Path, hub: FakeHub, files: dict[str, bytes]) -> None:
    files[f"../../{FOLDER}/../fineweb10B_tiny/x/../../fineweb_train_000009.bin"] = shard(20_000, 9)
    files["/etc/fineweb10B_tiny/../tiny.model.bin"] = b"x"
    bring(hub, tmp_path / "deep" / "out")
    assert_right(tmp_path / "deep" / "out", files)
    assert {name.split("/")[1] for name in listing(tmp_path)} == {"out"}


def test_a_folder_brought_by_hand_is_held_against_the_table(
    tmp_path: Path, tiny: Published, files: dict[str, bytes], tokenizer: Tokenizer
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "tokenizer.model").write_bytes(tokenizer.proto)
    (out / "fineweb_train_000000.bin").write_bytes(files[f"{FOLDER}/fineweb_train_000000.bin"])
    (out / "fineweb_val_000000.bin").write_bytes(shard(1_000, 99))
    with pytest.raises(DataError, match="9,000 tokens, and this one has 1,000"):
        open_data(out)
    assert any("1,000" in finding.text and finding.is_error for finding in check(out))
    found = check(out, allow_other_validation=True)
    assert any("NOT the published one, allowed by choice" in finding.text for finding in found)
    assert open_data(out).validation.problem is not None
    (out / "fineweb_val_000000.bin").write_bytes(shard(1_001, 99))  # the choice was for the other one
    with pytest.raises(DataError, match="this one has 1,001"):
        open_data(out)


def test_the_command(tmp_path: Path, hub: FakeHub) -> None:
    """As a user calls it, in a process of its own with the library's own settings."""
    script = (
        "import sys\nfrom epigram.data import published\n"
        f"published.PUBLISHED['tiny'] = published.Published(**{vars(PUBLISHED['tiny'])!r})\n"
        "from epigram.cli.data import command; command(sys.argv[1:])"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-c", script, "fetch", "tiny", "--shards", "1", "--json"]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "data/tiny: 1 training shards, 20,000 tokens" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["commit"] == COMMIT


def test_the_table() -> None:
    """Token counts agree with what published scripts scored: whole windows of 2,048 of the sp1024 split."""
    least, most = PUBLISHED["sp1024"].val_tokens
    assert least == most and (least - 1) // 2048 * 2048 == 62_021_632
    assert PUBLISHED["sp1024"].problem(least) is None
    assert "62,021,846 tokens, and this one has 9,662,464" in PUBLISHED["sp1024"].problem(9_662_464)
    low, high = PUBLISHED["sp8192"].val_tokens
    assert {(n - 1) // 2048 * 2048 for n in (low, high)} == {40_540_160}
    assert PUBLISHED["sp2048"].problem(5) is None


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'epigram\[hub\]'"):
        Hub()
    assert "fetch" in command.commands
