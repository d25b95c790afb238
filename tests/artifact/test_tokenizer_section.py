"""A tokenizer that went through the artifact encodes and decodes as before."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from artifact_toy import train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from epigram import wire_format as wire
from epigram.artifact import charsmap
from epigram.artifact.codecs import brotli
from epigram.artifact.tokenizer_section import MAX_SETTINGS_BYTES, compact, expand
from epigram.errors import ArtifactError, DataError
from epigram.wire_format import WireError, bytes_field, read_fields

TRICKY = [
    "",
    " ",
    "  two  spaces  ",
    "\t tabs\r\nlines\n\n",
    "ﬁ ½ Å ㈱ ﷺ ｶﾞ Ⅷ é e\u0301 \u1e9b\u0323",
    "한국어 각 \u1100\u1161\u11a8 中文字 ひらがな",
    "emoji 👩‍👩‍👧 \U0001f1e9\U0001f1ea \U0010ffff",
    "\u200b\u200e\ufeff\u061c\ua7f1 zero width",
    "<s> </s> <unk> <pad> ▁",
    "a\0b",
    "x" * 300,
]


def processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def assert_same(before: bytes, after: bytes, texts: list[str]) -> None:
    old, new = processor(before), processor(after)
    assert old.get_piece_size() == new.get_piece_size()
    for i in range(old.get_piece_size()):
        assert (old.id_to_piece(i), old.get_score(i)) == (new.id_to_piece(i), new.get_score(i))
        assert (old.is_control(i), old.is_byte(i), old.is_unknown(i)) == (
            new.is_control(i), new.is_byte(i), new.is_unknown(i)
        )  # fmt: skip
    assert [old.bos_id(), old.eos_id(), old.pad_id(), old.unk_id()] == [
        new.bos_id(), new.eos_id(), new.pad_id(), new.unk_id()
    ]  # fmt: skip
    for text in texts:
        ids = old.encode(text)
        assert new.encode(text) == ids
        assert new.decode(ids) == old.decode(ids)
        assert new.normalize(text) == old.normalize(text)


PLAIN = {"normalization_rule_name": "identity"}
OPTIONS: dict[str, dict[str, object]] = {
    "bpe": {},
    "identity": {**PLAIN, "remove_extra_whitespaces": False},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf"},
    "nfkc": {"normalization_rule_name": "nfkc", "split_digits": True, "add_dummy_prefix": False},
    "unigram": {**PLAIN, "model_type": "unigram", "vocab_size": 330},
    "char": {**PLAIN, "model_type": "char", "byte_fallback": False, "vocab_size": 280, "hard_vocab_limit": False},
    "symbols": {
        **PLAIN, "user_defined_symbols": ["<tool>", "@@"], "control_symbols": ["<doc>"], "pad_id": 3,
        "unk_surface": " ?? ", "bos_piece": "<begin>",
    },
    "suffix": {**PLAIN, "treat_whitespace_as_suffix": True},
    "self_test": {**PLAIN, "self_test_sample_size": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_encodes_and_decodes_as_before(training_text: str, name: str) -> None:
    proto = train_tokenizer(training_text, **{"vocab_size": 400, **OPTIONS[name]})
    packed = compact(proto)
    again = expand(packed)
    assert_same(proto, again, [*TRICKY, *training_text.splitlines()[::20]])
    assert compact(again) == packed
    assert expand(compact(again)) == again


def test_sizes(tokenizer: bytes, nfkc_tokenizer: bytes) -> None:
    """The map of nmt_nfkc, 240 kB of a model file, leaves about 10 kB behind brotli; 320 pieces some
    hundred bytes."""
    small, large = (len(brotli.pack(compact(proto), 1)) for proto in (tokenizer, nfkc_tokenizer))
    assert len(nfkc_tokenizer) > 240_000
    assert small < 900
    assert large < 12_000


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_normalises_any_text_alike(nfkc_pair: tuple, text: str) -> None:
    old, new = nfkc_pair
    assert new.normalize(text) == old.normalize(text)
    assert new.encode(text) == old.encode(text)


@pytest.fixture(scope="module")
def nfkc_pair(nfkc_tokenizer: bytes) -> tuple:
    return processor(nfkc_tokenizer), processor(expand(compact(nfkc_tokenizer)))


def trie(blob: bytes) -> dict[bytes, bytes]:
    """Every key and value of a character map, by an independent walk over the double array."""
    size = int.from_bytes(blob[:4], "little")
    units = np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64)
    texts, found, todo = blob[4 + size :], {}, [(b"", 0)]
    while todo:
        key, place = todo.pop()
        unit = int(units[place])
        base = place ^ (unit >> 10 << ((unit >> 6) & 8))
        if unit >> 8 & 1:
            start = int(units[base]) & 0x7FFFFFFF
            found[key] = texts[start : texts.index(b"\0", start)]
        labels = np.arange(1, 256)
        labels = labels[(base ^ labels) < len(units)]
        for label in labels[units[base ^ labels] & 0x800000FF == labels].tolist():
            todo.append((key + bytes([label]), base ^ label))
    return found


def map_of(proto: bytes) -> bytes:
    for field in read_fields(proto):
        if field.number == 3 and isinstance(field.value, bytes):
            return b"".join(f.value for f in read_fields(field.value) if f.number == 2 and isinstance(f.value, bytes))
    return b""


def test_small_maps_have_the_same_entries(tmp_path: Path, training_text: str) -> None:
    random = np.random.default_rng(4)
    for size in (1, 2, 7, 300):
        entries = {}
        for _ in range(size):
            source, target = (random.integers(0x61, 0x61 + min(size + 1, 20), random.integers(1, 4)) for _ in "st")
            entries[" ".join(f"{c:X}" for c in source)] = " ".join(f"{c:X}" for c in target + 100)
        rules = tmp_path / "rules.tsv"
        rules.write_text("".join(f"{source}\t{target}\n" for source, target in sorted(entries.items())))
        blob = map_of(train_tokenizer(training_text, normalization_rule_tsv=str(rules)))
        again = charsmap.unpack(charsmap.pack(blob))
        assert trie(again) == trie(blob)
        assert len(trie(again)) == len(entries)


def test_the_published_map_is_whole(nfkc_tokenizer: bytes) -> None:
    """Entries of nmt_nfkc; all of them are compared through a digest, 225,000 dictionaries' worth takes
    too long."""
    blob = map_of(nfkc_tokenizer)
    graph, again = charsmap._read(blob), charsmap._read(charsmap.unpack(charsmap.pack(blob)))
    assert graph == again
    assert len(graph.labels) > 18_000


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x0a\xff", bytes(100), b"\x0a\x03\x0a\x01a\x07"])
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="no artifact can carry the tokenizer"):
        compact(data)


def test_a_piece_that_is_too_long_is_named(training_text: str) -> None:
    assert compact(train_tokenizer(training_text, user_defined_symbols=["x" * 255]))
    with pytest.raises(DataError, match=r"artifact.tokenizer=false.*a piece of 300 bytes .* 1 to 255"):
        compact(train_tokenizer(training_text, user_defined_symbols=["x" * 300]))


@pytest.mark.parametrize("limit", ["MAX_STATES", "MAX_EDGES"])
def test_a_map_that_could_not_be_read_again_is_not_written(
    nfkc_tokenizer: bytes, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    packed = compact(nfkc_tokenizer)
    monkeypatch.setattr(charsmap, limit, 1000)
    with pytest.raises(DataError, match="a character map of 18,994 states"):
        compact(nfkc_tokenizer)
    with pytest.raises(ArtifactError, match="a character map of 18,994 states"):
        expand(packed)


def test_a_replacement_that_is_too_long_is_named(tmp_path: Path, training_text: str) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text(f"61\t{' '.join(['62'] * 256)}\n")
    with pytest.raises(DataError, match="a replacement of more than 255 characters"):
        compact(train_tokenizer(training_text, normalization_rule_tsv=str(rules)))


def test_settings_are_bounded(tokenizer: bytes) -> None:
    """A few hundred bytes of brotli can hold millions of fields, each of which is an object when it is read."""
    *streams, settings = wire.split_streams(compact(tokenizer), 9)
    filler = bytes_field(9, bytes(MAX_SETTINGS_BYTES - len(settings) - 4))
    largest = tokenizer + filler
    assert expand(compact(largest))
    match = "its settings take 1,048,578 bytes, the format allows 1,048,576"
    with pytest.raises(DataError, match=match):
        compact(largest + b"\x50\0")
    with pytest.raises(ArtifactError, match=match):
        expand(wire.join_streams([*streams, settings + filler + b"\x50\0"]))


def test_sections_with_lies_are_refused(tokenizer: bytes) -> None:
    packed = compact(tokenizer)
    streams = wire.split_streams(packed, 9)

    def variant(index: int, value: bytes) -> bytes:
        return wire.join_streams([*streams[:index], value, *streams[index + 1 :]])

    wrong = [
        b"", packed[:-1], packed + b"x", variant(0, b""), variant(0, streams[0][:-1]), variant(1, streams[1] + b"1"),
        variant(2, streams[2] + b"x"), variant(0, bytes([255]) * 3), variant(3, b""), variant(8, b"\xff"),
        variant(7, b"garbage"), variant(1, bytes(len(streams[1]))),
        variant(8, streams[8] + bytes_field(1, bytes_field(1, b"more"))),
        variant(8, bytes_field(2, bytes_field(2, b"prefix")) + streams[8]),
    ]  # fmt: skip
    for data in wrong:
        with pytest.raises(ArtifactError):
            expand(data)


def test_mutated_sections_give_one_kind_of_error(nfkc_tokenizer: bytes, tokenizer: bytes) -> None:
    random = np.random.default_rng(0)
    survivors = 0
    for packed, rounds in ((compact(tokenizer), 1000), (compact(nfkc_tokenizer), 10)):
        for _ in range(rounds):
            data = bytearray(packed)
            for _ in range(random.integers(1, 4)):
                data[random.integers(len(data))] = random.integers(256)
            try:
                processor(expand(bytes(data))).encode("some ﬁne text")
                survivors += 1
            except ArtifactError:
                pass
    assert survivors > 0  # the mutations are subtle enough to be a test


def test_hostile_graphs_are_refused() -> None:
    """A map of one entry, with every part wrong in turn.

    Streams: counts of children, flags for texts, labels, text lengths, references (3 planes), characters
    (3 planes).
    """
    good = [b"\1\0", b"\0\1", b"a", b"\1", b"\0", b"\0", b"\0", *characters(ord("b"))]
    assert trie(charsmap.unpack(wire.join_streams(good))) == {b"a": b"b"}
    changes = {
        0: [b"", b"\1", b"\2\0", b"\1\0\0", b"\0\1"], 1: [b"", b"\0\0", b"\0\2", b"\1\1", b"\1\0"],
        2: [b"", b"\0", b"aa"], 3: [b"", b"\2", b"\1\0"], 4: [b"", b"\5", b"\2", b"\0\0"], 5: [b"\1"], 6: [b"\xff"],
        7: [b"", b"\1\1"],
    }  # fmt: skip
    for index, values in changes.items():
        for value in values:
            with pytest.raises(WireError):
                charsmap.unpack(wire.join_streams([*good[:index], value, *good[index + 1 :]]))
    for point in (0, 0xD800, 0xDFFF, 0x110000, -5):
        with pytest.raises(WireError, match="no Unicode"):
            charsmap.unpack(wire.join_streams([*good[:7], *characters(point)]))


def characters(step: int) -> list[bytes]:
    """Three planes of one zigzag number."""
    value = 2 * step + 1 if step >= 0 else -2 * step
    return [bytes([value >> shift & 255]) for shift in (0, 8, 16)]


@given(st.binary(max_size=40))
def test_wire_reader_raises_one_error(data: bytes) -> None:
    with suppress(WireError):
        list(read_fields(data))
    with suppress(WireError):
        wire.split_streams(data, 3)


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_streams_round_trip(streams: list[bytes]) -> None:
    assert wire.split_streams(wire.join_streams(streams), len(streams)) == streams


@given(st.integers(0, 2**64 - 1))
def test_varints_round_trip(value: int) -> None:
    assert wire.read_varint(wire.varint(value), 0) == (value, len(wire.varint(value)))
