"""Building from a dataset on the hub: the same bytes as from the files themselves, whatever the connection does."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_helpers import listing, make_documents
from fake_hub import ALTERING, REPO, WRONG_LENGTH, FakeHub

from epigram.data.build import build
from epigram.data.files import held_alone
from epigram.data.tokenizer import Tokenizer
from epigram.errors import DataError, UserError

FILES = 6
pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def local(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """What the hub has, in files."""
    import pyarrow.parquet

    folder = tmp_path / "local" / "sample"
    folder.mkdir(parents=True)
    documents = make_documents(90, seed=2)
    for index in range(FILES):
        table = pyarrow.table({"id": list(range(15)), "text": documents[15 * index : 15 * index + 15]})
        pyarrow.parquet.write_table(table, folder / f"{index:03d}.parquet", row_group_size=7)
    (tmp_path / "given.model").write_bytes(tokenizer.proto)
    return folder


@pytest.fixture
def hub(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    sleep = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr("epigram.data.hub._LONGEST_WAIT_S", 0.01)
    files = {f"sample/{path.name}": path.read_bytes() for path in local.iterdir()}
    files |= {"other/000.jsonl": b'{"text": "other"}\n', "README.md": b"hello"}
    files |= {"tables/000.csv": b"id,body\n" + b"".join(b'%d,"kalo, mi %d"\n' % (i, i) for i in range(40))}
    with FakeHub(files) as server:
        server.stall_s = 0.6
        yield server


def build_remote(hub: FakeHub, tmp_path: Path, source: str = f"hf://{REPO}/sample", **options) -> Path:
    options = {"tokenizer_file": tmp_path / "given.model", "shard_tokens": 3000, "endpoint": hub.endpoint} | options
    return build([source], tmp_path / "out", **options).path


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which names the sources; of it the splits."""
    found = listing(folder)
    manifest = json.loads(found.pop("manifest.json"))
    return {**found, "splits": json.dumps(manifest["splits"]).encode()}


@pytest.mark.parametrize("options", [{}, {"tokenizer_file": None, "vocab_size": 400}], ids=["given", "trained"])
@pytest.mark.parametrize("fault", [None, "cut", "flipped byte", "503"])
def test_the_same_bytes_as_from_files(tmp_path: Path, local: Path, hub: FakeHub, fault: str | None, options) -> None:
    hub.store_faults.extend([fault] * 2 if fault else [])
    out = build_remote(hub, tmp_path, **options)
    assert hub.used == ([fault] * 2 if fault else [])
    given = {"tokenizer_file": tmp_path / "given.model", "shard_tokens": 3000} | options
    assert contents(out) == contents(build([local], tmp_path / "same", **given).path)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [source["file"] for source in manifest["sources"]] == [
        f"{REPO}/sample/{i:03d}.parquet" for i in range(FILES)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"local", "given.model", "out", "same"}  # no spool is left


def test_files_are_fetched_one_ahead_and_removed(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte must pass through a few files' room."""
    from epigram.data.spool import Spool

    most, release = [], Spool.release

    def watched(self: Spool, file) -> None:
        most.append(len(list((tmp_path / ".out.spool").glob("*.parquet"))))
        release(self, file)

    monkeypatch.setattr(Spool, "release", watched)
    monkeypatch.setattr("epigram.data.survey._SMALL_INPUT_BYTES", 0)
    monkeypatch.setattr("epigram.data.survey._TRIAL_BYTES", 1000)
    monkeypatch.setattr("epigram.data.survey._FEW_VAL_DOCUMENTS", 1)
    build_remote(hub, tmp_path)
    assert len(most) == FILES - 1 and max(most) <= 3  # the one that is done, its successor, and one ahead
    fetched = [line for line in hub.requests if line.startswith("GET sample/")]
    assert sorted(fetched) == [f"GET sample/{i:03d}.parquet" for i in range(FILES)]  # each once


def test_a_spool_of_another_commit_is_not_used(tmp_path: Path, local: Path, hub: FakeHub) -> None:
    """What a build left is verified, but the file of that name may have changed since."""
    with pytest.raises(DataError, match="no column 'body'"):
        build_remote(hub, tmp_path, field="body")
    assert list((tmp_path / ".out.spool").glob("*-000.parquet"))
    import pyarrow.parquet

    table = pyarrow.table({"text": make_documents(15, seed=77)})
    pyarrow.parquet.write_table(table, local / "000.parquet", row_group_size=7)
    hub.files["sample/000.parquet"] = (local / "000.parquet").read_bytes()
    given = {"tokenizer_file": tmp_path / "given.model", "shard_tokens": 3000}
    assert contents(build_remote(hub, tmp_path)) == contents(build([local], tmp_path / "same", **given).path)


def test_a_very_long_name(tmp_path: Path, hub: FakeHub) -> None:
    hub.files[f"long/{'x' * 240}.parquet"] = hub.files["sample/000.parquet"]
    out = build_remote(hub, tmp_path, f"hf://{REPO}/long")
    assert json.loads((out / "manifest.json").read_text())["sources"][0]["documents"] == 15


def test_two_builds_do_not_share_a_spool(tmp_path: Path, hub: FakeHub) -> None:
    (tmp_path / ".out.spool").mkdir()
    with held_alone(tmp_path / ".out.spool"), pytest.raises(UserError, match=r"\.spool is in use, another process is"):
        build_remote(hub, tmp_path)
    build_remote(hub, tmp_path)


def test_revisions_and_folders(tmp_path: Path, hub: FakeHub) -> None:
    build_remote(hub, tmp_path, f"hf://datasets/{REPO}@main/sample/000.parquet")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"][0]["documents"] == 15
    tables = build_remote(hub, tmp_path, f"hf://{REPO}/tables", field="body", replace=True)
    assert (
        sum(split["documents"] for split in json.loads((tables / "manifest.json").read_text())["splits"].values()) == 40
    )
    with pytest.raises(UserError, match="names no dataset: write hf://OWNER/NAME"):
        build_remote(hub, tmp_path, "hf://lonely")
    with pytest.raises(DataError, match=r"holds no \.parquet, \.jsonl or \.csv files"):
        build_remote(hub, tmp_path, f"hf://{REPO}/elsewhere")
    with pytest.raises(UserError, match="the hub has no nobody/nothing"):
        build_remote(hub, tmp_path, "hf://nobody/nothing")


def test_a_full_disk_is_seen_first(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match="GB of the dataset are on the disk at a time"):
        build_remote(hub, tmp_path)
    assert not [line for line in hub.requests if line.startswith("GET sample/")]


@pytest.mark.parametrize("fault", sorted(ALTERING - WRONG_LENGTH))
def test_a_connection_that_alters_files_is_an_error(tmp_path: Path, hub: FakeHub, fault: str) -> None:
    hub.store_faults.extend([fault] * 100)
    with pytest.raises(DataError, match="came 3 times with wrong contents"):
        build_remote(hub, tmp_path)
    assert not (tmp_path / "out").exists()
