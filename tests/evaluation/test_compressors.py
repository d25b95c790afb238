"""Baselines: sizes that decompress, priming that helps exactly where it should, samples that say so."""

import lzma
import random

import brotli
import pytest
import zstandard

from epigram.errors import UserError
from epigram.evaluation import compressors
from epigram.evaluation.compressors import compare_compressors


def sentences(seed: int, count: int) -> bytes:
    draw = random.Random(seed)
    words = [f"{a}{b}" for a in ("ma", "te", "li", "no", "sur") for b in ("ra", "ck", "lo", "ves", "ing", "")]
    return " ".join(draw.choice(words) for _ in range(count)).encode()


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def alone(rows):
    return {row.name: row for row in rows if not row.primer_bytes}


def primed(rows):
    return {row.name: row for row in rows if row.primer_bytes}


def test_alone_is_the_size_of_a_file_that_decompresses():
    """Compressed again here, decompressed by the libraries' own readers."""
    text = sentences(0, 3000)
    rows = compare_compressors(text)
    found = alone(rows)
    packed = {
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
        "brotli 11": brotli.compress(text, quality=11, lgwin=24),
    }
    assert lzma.decompress(packed["xz -9e"]) == text == brotli.decompress(packed["brotli 11"])
    for name, data in packed.items():
        assert found[name].bytes == len(data)
        assert found[name].bpb == pytest.approx(8 * len(data) / len(text), rel=1e-15)
    # Frame headers for a large window may differ by some bytes from the plain level.
    plain = len(zstandard.ZstdCompressor(level=19).compress(text))
    assert abs(found["zstd -19"].bytes - plain) <= 16
    assert [row.label for row in rows] == ["xz -9e, alone", "zstd -19, alone", "brotli 11, alone"]
    assert {(row.text_bytes, row.whole_text_bytes) for row in rows} == {(len(text), len(text))}


def test_priming_with_the_same_text_makes_it_almost_free():
    text = noise(1, 60_000)
    rows = compare_compressors(text, text)
    assert [row.label for row in rows[:2]] == ["xz -9e, alone", "xz -9e, primed"]
    assert len(primed(rows)) == len(alone(rows)) == 3
    for row in alone(rows).values():
        assert row.bytes >= len(text)
    for row in primed(rows).values():
        assert row.bytes < 2000
        assert row.bpb == pytest.approx(8 * row.bytes / len(text), rel=1e-15)


def test_priming_with_noise_gains_nothing():
    text = noise(2, 30_000)
    rows = compare_compressors(text, noise(3, 30_000))
    for name, row in primed(rows).items():
        assert row.bytes == pytest.approx(alone(rows)[name].bytes, abs=200)


def test_a_primer_is_seen_whole():
    """The text comes again after the largest primer; with a window of 4 MiB brotli would miss it."""
    text = noise(4, 50_000)
    filler = bytes(compressors.MAX_PRIMER_BYTES - len(text))
    for row in primed(compare_compressors(text, text + filler)).values():
        assert row.bytes < 2_000, row.name
    before, both = text + filler, text + filler + text
    assert len(brotli.compress(both, lgwin=22)) - len(brotli.compress(before, lgwin=22)) > 40_000


def test_large_texts_are_sampled_and_say_so(monkeypatch):
    monkeypatch.setattr(compressors, "MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(compressors, "MAX_PRIMER_BYTES", 2000)
    text, primer = sentences(0, 2000), sentences(1, 2000)
    for row in primed(compare_compressors(text, primer, whole_text_bytes=10**9)).values():
        assert (row.text_bytes, row.primer_bytes, row.whole_text_bytes) == (1000, 2000, 10**9)
    row = primed(compare_compressors(text, primer))["xz -9e"]
    assert row.whole_text_bytes == len(text)
    both = lzma.compress(primer[-2000:] + text[:1000], preset=9 | lzma.PRESET_EXTREME)
    before = lzma.compress(primer[-2000:], preset=9 | lzma.PRESET_EXTREME)
    assert row.bytes == len(both) - len(before)


def test_rows_are_plain_values():
    row = compare_compressors(b"abc" * 50)[0].as_dict()
    assert row["name"] == "xz -9e"
    assert row["text_bytes"] == 150
    assert all(isinstance(value, str | int | float) for value in row.values())


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match="empty"):
        compare_compressors(b"", b"primer")


def test_a_compressor_that_loses_text_is_caught(monkeypatch):
    lossy = compressors._Compressor("lossy", lambda data: data[:-1], lambda data: data)
    monkeypatch.setattr(compressors, "_compressors", lambda: [lossy])
    with pytest.raises(AssertionError, match="lossy"):
        compare_compressors(b"some text")
