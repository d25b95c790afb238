"""What general compressors need for the same text: the baselines that a small language model is held against.

Each compressor is measured twice: alone on the text, and primed, with the training text in front of it, where
only the bytes that the text adds are counted: size(primer + text) - size(primer). Windows are large enough to
see the primer whole, so a primed compressor has read what the model has read. Every result is decompressed
and compared.

xz is `xz -9e`; zstd is `zstd -19 --long=27`; brotli is level 11 with its largest standard window of 16 MiB
(the library's Python interface offers no larger one), which is what bounds the sample sizes below.
"""

import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from epigram.errors import UserError
from epigram.progress import Progress

# At most this much is compressed, so that priming takes about a minute on two cores and fits brotli's window.
MAX_TEXT_BYTES = 2_000_000
MAX_PRIMER_BYTES = 8_000_000

_ZSTD_WINDOW_LOG = 27  # 128 MiB


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What one compressor needs for the first `text_bytes` of a text of `whole_text_bytes`.

    label: for a table, such as "xz -9e, primed". bytes: needed for the text, of which `bpb` are bits per
    byte. primer_bytes: of training text in front, itself not counted; 0 for the compressor alone.
    """

    label: str
    name: str
    bytes: int
    bpb: float
    text_bytes: int
    whole_text_bytes: int
    primer_bytes: int

    def as_dict(self) -> dict[str, str | int | float]:
        """As a row of result.json."""
        return asdict(self)


@dataclass(frozen=True)
class _Compressor:
    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


def compare_compressors(text: bytes, primer: bytes = b"", *, whole_text_bytes: int | None = None) -> list[Baseline]:
    """What xz -9e, zstd -19 and brotli 11 need for `text`, alone and after `primer`.

    text: UTF-8 of the validation text; of a longer one the first `MAX_TEXT_BYTES` are used. primer: UTF-8 of
    training text, of which the last `MAX_PRIMER_BYTES` are used; empty for none. whole_text_bytes: the size
    of the text that `text` is a part of, if the caller has cut it already. Raises UserError for an empty
    text.
    """
    if not text:
        raise UserError("there is no text to compress: the validation split is empty")
    whole_text_bytes = max(whole_text_bytes or 0, len(text))
    text, primer = text[:MAX_TEXT_BYTES], primer[-MAX_PRIMER_BYTES:]
    jobs = [text, primer, primer + text] if primer else [text]
    found = []
    for name, sizes in _sizes(jobs):
        found.append(_baseline(f"{name}, alone", name, sizes[0], len(text), whole_text_bytes, 0))
        if primer:
            added = sizes[2] - sizes[1]
            found.append(_baseline(f"{name}, primed", name, added, len(text), whole_text_bytes, len(primer)))
    return found


def _sizes(jobs: Sequence[bytes]) -> Iterator[tuple[str, list[int]]]:
    """Name of each compressor and the sizes it gives the jobs."""
    compressors = list(_compressors())
    workers = min(4, os.cpu_count() or 1)  # xz takes up to 700 MB each
    # The libraries release the interpreter's lock, so threads run side by side.
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress("compress", len(compressors) * len(jobs), "texts") as bar,
    ):
        running = [(c.name, [pool.submit(_packed_size, c, data) for data in jobs]) for c in compressors]
        for name, futures in running:
            sizes = []
            for future in futures:
                sizes.append(future.result())
                bar.advance()
            yield name, sizes


def _packed_size(compressor: _Compressor, data: bytes) -> int:
    """Bytes of `data` compressed; the result must decompress to `data`."""
    packed = compressor.compress(data)
    assert compressor.decompress(packed) == data, f"{compressor.name} did not give the text back"
    return len(packed)


def _baseline(label: str, name: str, size: int, text_bytes: int, whole_text_bytes: int, primer_bytes: int) -> Baseline:
    return Baseline(
        label=label,
        name=name,
        bytes=size,
        bpb=8 * size / text_bytes,
        text_bytes=text_bytes,
        whole_text_bytes=whole_text_bytes,
        primer_bytes=primer_bytes,
    )


def _compressors() -> Iterator[_Compressor]:
    import brotli
    import zstandard

    yield _Compressor("xz -9e", lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress)

    def zstd(data: bytes) -> bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            19, source_size=len(data), window_log=_ZSTD_WINDOW_LOG, enable_ldm=True
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data)

    def unzstd(data: bytes) -> bytes:
        return zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG).decompress(data)

    yield _Compressor("zstd -19", zstd, unzstd)
    yield _Compressor("brotli 11", lambda data: brotli.compress(data, quality=11, lgwin=24), brotli.decompress)
