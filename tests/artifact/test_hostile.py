"""A truncated, altered or hostile file gives ArtifactError: no other error, no hang, no memory beyond its
word."""

import json
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
from artifact_toy import contents, quantized, same_tensors
from test_container import forge

from epigram import plugin
from epigram.artifact.container import MAX_DECLARED_BYTES, Reader, checksum
from epigram.artifact.tensors import Contents, inspect, load, save
from epigram.errors import ArtifactError

CODECS = plugin.names("epigram.artifact.codecs")
SLACK_BYTES = 8_000_000  # tables, codecs' working memory, Python's own objects
LONGEST_S = 2.0  # of processor time, for a file of a few kilobytes; a load takes some milliseconds

Table = dict[str, Any]


class Parts:
    """A file taken apart: its header's table and the stored bytes of its sections."""

    def __init__(self, path: Path) -> None:
        with Reader(path) as reader:
            self.blobs = [reader.stored(i) for i in range(len(reader.header.sections))]
            self.table: Table = {
                "sections": [vars(section) for section in reader.header.sections],
                "contents": reader.header.contents,
            }

    def copy(self) -> Table:
        return json.loads(json.dumps(self.table))

    def join(self, table: Table, blobs: list[bytes] | None = None, seal: bool = True) -> bytes:
        """The file again. seal: make lengths and checksums of the stored bytes right."""
        blobs = self.blobs if blobs is None else blobs
        if seal:
            for row, blob in zip(table["sections"], blobs, strict=False):
                row |= {"stored": len(blob), "stored_sum": checksum(blob).hex()}
        return forge(table) + b"".join(blobs)


def outcome(path: Path, data: bytes) -> Contents | None:
    """The model in `data`, or None if it is refused as it should be; fails on any other error, and on
    slowness."""
    path.write_bytes(data)
    start_s = time.process_time()
    try:
        loaded = load(path)
    except ArtifactError as error:
        loaded, message = None, str(error)
    assert time.process_time() - start_s < LONGEST_S
    assert loaded is not None or str(path) in message
    return loaded


@pytest.fixture(scope="module", params=CODECS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    path = tmp_path_factory.mktemp("hostile") / request.param
    save(path, contents(tokenizer, layers=1, dim=8), request.param)
    return path


def test_every_flipped_byte_is_noticed(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for i in range(len(data)):
        altered = bytearray(data)
        altered[i] ^= 1 << i % 8
        assert outcome(tmp_path / "m", bytes(altered)) is None, i


def test_every_truncation_is_noticed(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for length in range(len(data)):
        assert outcome(tmp_path / "m", data[:length]) is None, length
    for tail in (b"\0", b"x" * 1000, data):
        assert outcome(tmp_path / "m", data + tail) is None


def test_mutated_sections_under_right_checksums(saved: Path, tmp_path: Path) -> None:
    """The attacker knows the format: stored checksums and lengths are right, the codecs see the mutated
    bytes."""
    parts, random, original = Parts(saved), np.random.default_rng(0), load(saved)
    refused = 0
    for _ in range(600):
        blobs = list(parts.blobs)
        which = int(random.choice([i for i, blob in enumerate(blobs) if blob]))
        blobs[which] = mutate(blobs[which], random)
        loaded = outcome(tmp_path / "m", parts.join(parts.copy(), blobs))
        refused += loaded is None
        # What is accepted decodes to the same, since the checksum of the decoded bytes was left alone.
        assert loaded is None or same_tensors(loaded, original)
    assert refused > 540


def mutate(blob: bytes, random: np.random.Generator) -> bytes:
    """Change some bytes, or cut, or insert, or repeat a piece."""
    data, kind, place = bytearray(blob), random.integers(5), int(random.integers(len(blob)))
    if kind <= 1:
        for _ in range(random.integers(1, 5)):
            data[random.integers(len(data))] = random.integers(256)
    elif kind == 2:
        del data[place : place + int(random.integers(1, 9))]
    elif kind == 3:
        data[place:place] = random.bytes(int(random.integers(1, 9)))
    else:
        data[place:place] = data[: place + 1]
    return bytes(data)


def test_mutated_sections_under_no_checksum_at_all(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the checksums of decoded bytes switched off, every decoder alone must bear any bytes."""
    from epigram.artifact import tensors

    monkeypatch.setattr(tensors, "checksum", lambda *parts: _Anything())
    parts, random = Parts(saved), np.random.default_rng(1)
    accepted = 0
    for _ in range(600):
        blobs = list(parts.blobs)
        which = int(random.choice([i for i, blob in enumerate(blobs) if blob]))
        blobs[which] = mutate(blobs[which], random)
        accepted += outcome(tmp_path / "m", parts.join(parts.copy(), blobs)) is not None
    # A codec that keeps a checksum of its own may refuse them all.
    assert accepted > 12 or saved.name not in ("brotli", "entropy", "store")


class _Anything:
    """Equal to every checksum."""

    def hex(self) -> "_Anything":
        return self

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def test_mutated_header_fields_under_right_checksums(saved: Path, tmp_path: Path) -> None:
    parts, random = Parts(saved), np.random.default_rng(2)
    values = [
        None, True, False, -1, 1, 2, 3, 8, 31, 127, 128, 2**31, 2**63, 10**30, 0.5, 1e300, "", "x", "entropy", "store",
        "brotli", "base", "_tables", "../x", "int", "float16", [], [1], [8, 8], [0, 0], [1] * 9, [-1, 8],
        [2**27, 2**27], {}, {"a": 1}, "codes/embed", "scales", "tokenizer", "embed", "00" * 16,
    ]  # fmt: skip
    refused = 0
    for _ in range(800):
        table = parts.copy()
        for _ in range(random.integers(1, 3)):
            holder, key = pick(table, random)
            choice = random.integers(10)
            if choice == 0 and isinstance(holder, dict):
                del holder[key]
            elif choice == 1 and isinstance(holder, list):
                holder.insert(key, holder[key])
            else:
                holder[key] = values[random.integers(len(values))]
        refused += outcome(tmp_path / "m", parts.join(table, seal=False)) is None
    assert refused > 540


def pick(table: Table, random: np.random.Generator) -> tuple[Any, Any]:
    """A random place in nested JSON: the list or table, and the key in it."""
    holder: Any = table
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[random.integers(len(keys))]
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.1:
            return holder, key
        holder = inner


def set_shape(name: str, shape: list[int], raw: int | None = None) -> Callable[[Table], None]:
    """Give tensor `name` another shape, and its sections the lengths that follow from it."""

    def change(table: Table) -> None:
        rows = {row["name"]: row for row in table["contents"]["tensors"]}
        old = rows[name]["shape"]
        rows[name]["shape"] = shape
        for section in table["sections"]:
            if section["name"] == f"codes/{name}":
                section["raw"] = shape[0] * shape[1] if raw is None else raw
            if section["name"] == "scales":
                section["raw"] += 2 * (shape[0] - old[0])

    return change


LARGE = [[40, 2**20], [2**20, 8], [1, 2**27], [2**26, 1], [2**14, 2**14], [2**27, 0]]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_declarations_cost_neither_time_nor_memory(saved: Path, tmp_path: Path, shape: list[int]) -> None:
    """The tensor table and the sections agree on far more data than there is."""
    parts = Parts(saved)
    table = parts.copy()
    set_shape("embed", shape)(table)
    declared = sum(section["raw"] for section in table["sections"])
    tracemalloc.start()
    try:
        assert outcome(tmp_path / "m", parts.join(table)) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * declared + SLACK_BYTES
    if declared > MAX_DECLARED_BYTES:
        assert peak < SLACK_BYTES


def test_a_brotli_bomb_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, contents(layers=1, dim=8), "brotli")
    parts = Parts(path)
    parts.blobs[0] = bytes(2) + brotli.compress(bytes(50_000_000), quality=4)
    declared = sum(section["raw"] for section in parts.table["sections"])
    tracemalloc.start()
    try:
        assert outcome(path, parts.join(parts.copy())) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * declared + SLACK_BYTES


def test_an_honest_file_keeps_to_twice_what_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for codec in CODECS:
        save(path, contents(layers=4, dim=256), codec)
        declared = sum(section.raw for section in inspect(path).report.sections)
        tracemalloc.start()
        try:
            load(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * declared + SLACK_BYTES


def test_many_kinds_of_matrices_share_their_tables(tmp_path: Path) -> None:
    tensors = {f"t{'x' * i}": quantized(3, 3, qmax) for i, qmax in enumerate(range(1, 128))}
    save(tmp_path / "m", Contents(model={}, tensors=dict(tensors)))
    tracemalloc.start()
    try:
        assert same_tensors(load(tmp_path / "m"), Contents(model={}, tensors=dict(tensors)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < SLACK_BYTES


MEASURE = """
import resource, sys
from epigram.artifact.tensors import load
from epigram.errors import ArtifactError
load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        load(path)
    except ArtifactError:
        continue
    sys.exit(f"{path} was accepted")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_the_whole_process_stays_small(saved: Path, tmp_path: Path) -> None:
    """Also what codecs and torch allocate outside Python: the peak of a process that reads the large declarations."""
    parts, paths = Parts(saved), []
    for i, shape in enumerate(LARGE):
        table = parts.copy()
        set_shape("embed", shape)(table)
        paths.append(tmp_path / str(i))
        paths[-1].write_bytes(parts.join(table))
    command = [sys.executable, "-c", MEASURE, str(saved), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * 2**27 + 4 * SLACK_BYTES


def change_section(index: int, **values: Any) -> Callable[[Table], None]:
    return lambda table: table["sections"][index].update(values)


def change_tensor(index: int, **values: Any) -> Callable[[Table], None]:
    return lambda table: table["contents"]["tensors"][index].update(values)


def change_contents(**values: Any) -> Callable[[Table], None]:
    return lambda table: table["contents"].update(values)


def drop(*path: str | int) -> Callable[[Table], None]:
    def change(table: Any) -> None:
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]

    return change


def repeat_tensor(table: Table) -> None:
    table["contents"]["tensors"].append(table["contents"]["tensors"][0])


LIES: dict[str, tuple[Callable[[Table], None], str]] = {
    "unknown codec": (change_contents(codec="zip"), "codec 'zip'"),
    "helper as codec": (change_contents(codec="base"), "codec 'base'"),
    "path as codec": (change_contents(codec="../../x"), "codec"),
    "codec of no type": (change_contents(codec=3), "codec"),
    "another codec": (change_contents(codec="store"), "does not belong"),
    "section with another codec": (change_section(0, codec="entropy"), "does not belong"),
    "section of unknown codec": (change_section(-2, codec="zip"), "does not belong"),
    "section renamed": (change_section(0, name="other"), "do not fit"),
    "section too long": (change_section(0, raw=1000), "do not fit"),
    "section missing": (drop("sections", -1), "appended"),
    "tensor twice": (repeat_tensor, "same name"),
    "tensor too wide": (change_tensor(0, shape=[40, 9]), "do not fit"),
    "negative rows": (change_tensor(0, shape=[-40, -8]), "impossible shape"),
    "float rows": (change_tensor(0, shape=[40.0, 8]), "impossible shape"),
    "three axes": (change_tensor(0, shape=[40, 8, 1]), "unknown format"),
    "nine axes": (change_tensor(0, shape=[1] * 9), "impossible shape"),
    "product overflows": (change_tensor(0, shape=[2**28, 2**28]), "shape"),
    "empty but long": (change_tensor(0, shape=[2**28, 0]), "do not fit"),
    "qmax 0": (change_tensor(0, qmax=0), "unknown format"),
    "qmax 128": (change_tensor(0, qmax=128), "unknown format"),
    "qmax true": (change_tensor(0, qmax=True), "unknown format"),
    "unknown format": (change_tensor(0, format="float64"), "unknown format"),
    "float with qmax": (change_tensor(2, qmax=3), "unknown format"),
    "extra key": (change_tensor(0, offset=3), "unknown keys"),
    "name of no type": (change_tensor(0, name=3), "wrong type"),
    "format of no type": (change_tensor(0, format=[]), "wrong type"),
    "no tensors": (drop("contents", "tensors"), "missing or unknown"),
    "tensors of no type": (change_contents(tensors=3), "missing or unknown"),
    "model of no type": (change_contents(model=[]), "no table"),
    "provenance of no type": (change_contents(provenance="x"), "no table"),
    "recipe of no type": (change_contents(recipe=None), "wrong type"),
    "negative cap": (change_contents(cap_bytes=-1), "wrong type"),
    "many tensors": (lambda table: table["contents"]["tensors"].extend(table["contents"]["tensors"] * 9), "same name"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_in_the_header_are_named(tmp_path: Path, tokenizer: bytes, name: str) -> None:
    change, match = LIES[name]
    path = tmp_path / "m"
    save(path, contents(tokenizer, layers=1, dim=8))
    parts = Parts(path)
    table = parts.copy()
    change(table)
    path.write_bytes(parts.join(table, seal=False))
    for read in (load, inspect):
        with pytest.raises(ArtifactError, match=match):
            read(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 0.0])
@pytest.mark.parametrize("codec", CODECS)
def test_numbers_that_no_model_has_are_refused(tmp_path: Path, value: float, codec: str) -> None:
    """Scales are positive, all numbers finite; under right checksums, since `save` trusts its caller."""
    held = contents(layers=1, dim=8)
    scaled = held.tensors["embed"]
    scaled.scale[3] = value
    save(tmp_path / "m", held, codec)
    with pytest.raises(ArtifactError, match="section 'scales' has numbers out of range"):
        load(tmp_path / "m")
    for name, kind in (("attn_scale.0", "float16"), ("rope", "float32")):
        held = contents(layers=1, dim=8)
        held.tensors[name].view(-1)[2] = value
        save(tmp_path / "m", held, codec)
        if np.isfinite(value):
            assert same_tensors(load(tmp_path / "m"), held)
            continue
        with pytest.raises(ArtifactError, match=f"section '{kind}' has numbers out of range"):
            load(tmp_path / "m")


def test_codes_beyond_qmax_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for codec in ("store", "brotli"):
        save(path, contents(layers=1, dim=8), codec)
        parts = Parts(path)
        table = parts.copy()
        change_tensor(0, qmax=1)(table)
        path.write_bytes(parts.join(table))
        with pytest.raises(ArtifactError, match="beyond 1"):
            load(path)


def test_a_stream_that_decodes_to_something_else_is_refused(tmp_path: Path) -> None:
    """Valid as a stream, but not what was saved: as after a change in a library, or on a machine that
    rounds otherwise."""
    path = tmp_path / "m"
    save(path, contents(layers=1, dim=8))
    parts = Parts(path)
    index = next(i for i, row in enumerate(parts.table["sections"]) if row["name"] == "codes/embed")
    parts.blobs[index] = parts.blobs[index][:-8] + bytes(8)
    path.write_bytes(parts.join(parts.copy()))
    with pytest.raises(ArtifactError, match="does not decode to what was saved"):
        load(path)


def test_header_of_another_compression_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, contents(layers=1, dim=8))
    parts = Parts(path)
    text = json.dumps(parts.copy()).encode()
    raw_deflate = zlib.compress(text)[2:-4]
    assert outcome(path, forge(text, stored=raw_deflate) + b"".join(parts.blobs)) is None
