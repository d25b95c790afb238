"""Train a tokenizer on a bounded sample of the text."""

import contextlib
import heapq
import io
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from epigram.data.tokenizer import MAX_VOCAB_SIZE, SPACE, Tokenizer
from epigram.errors import DataError, UserError
from epigram.progress import Progress

NORMALIZATIONS = ("identity", "nmt_nfkc")
SPECIAL_IDS = 4  # pad, bos, eos, unk
MIN_VOCAB_SIZE = SPECIAL_IDS + 256 + 1  # and the byte pieces and a lone blank
# More text gains little: on English prose 8 and 16 MiB gave 2.580 bytes a token at 1,024 pieces, 3.891 and 3.898 at
# 8,192. Training takes up to 60 bytes of memory for each byte of the sample (on random words).
SAMPLE_BYTES = 8 << 20
_CHUNK_CHARS = 4096  # training holds positions inside a sentence in 16 bits
_RESERVED = str.maketrans("", "", f"{SPACE}\u2585\0")  # sentences with these are left out by the trainer
_SHORTAGE = re.compile(r"smaller than required_chars\. (\d+) vs (\d+)")


class TextSample:
    """A uniform sample of a stream of text, of at most `limit_bytes`, in chunks of about 4,000 characters.

    Each chunk draws a random key; those with the smallest keys stay (a reservoir whose size is counted in
    bytes). The sample depends on the texts, their order and the seed.
    """

    def __init__(self, limit_bytes: int = SAMPLE_BYTES, seed: int = 0) -> None:
        self.num_bytes = 0  # in the sample
        self.seen_bytes = 0  # in the stream
        self._limit_bytes = limit_bytes
        self._random = random.Random(seed)
        self._kept: list[tuple[float, int, str]] = []  # heap of (minus key, place in the stream, chunk)
        self._chunks = 0

    def add(self, text: str) -> None:
        """Offer one document."""
        for start in range(0, len(text), _CHUNK_CHARS):
            chunk = text[start : start + _CHUNK_CHARS]
            size, key = len(chunk.encode("utf-8")), self._random.random()
            self._chunks += 1
            self.seen_bytes += size
            if self.num_bytes + size > self._limit_bytes and self._kept and key >= -self._kept[0][0]:
                continue
            heapq.heappush(self._kept, (-key, self._chunks, chunk))
            self.num_bytes += size
            while self.num_bytes > self._limit_bytes:
                self.num_bytes -= len(heapq.heappop(self._kept)[2].encode("utf-8"))

    def texts(self) -> list[str]:
        """The chunks, in the order of the stream."""
        return [chunk for _, _, chunk in sorted(self._kept, key=lambda entry: entry[1])]


def check_vocab_size(vocab_size: int) -> list[str]:
    """Problems with the requested number of pieces."""
    if MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        return []
    return [
        f"vocab_size = {vocab_size} must lie between {MIN_VOCAB_SIZE} (256 bytes, four special ids and the "
        f"blank) and {MAX_VOCAB_SIZE} (what 16 bits can number)"
    ]


def check_normalization(name: str) -> list[str]:
    """Problems with the requested normalisation."""
    if name in NORMALIZATIONS:
        return []
    return [f"normalization = {name!r} is unknown: choose one of {', '.join(NORMALIZATIONS)}"]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    normalization: str = "identity",
    *,
    seed: int = 0,
    sample_bytes: int = SAMPLE_BYTES,
    marks: str = "",
) -> Tokenizer:
    """A BPE tokenizer with byte fallback, learned from at most `sample_bytes` of the texts.

    The settings are those of the published tokenizers (techniques of parameter-golf #1212: coverage 0.999,
    digits split, no dummy prefix, soft vocabulary limit, ids pad 0, bos 1, eos 2, unk 3), with byte pieces,
    so that every character can be written. With "identity" nothing about white space is lost, and runs of
    blanks can become pieces. Text with little variety gives fewer pieces than asked for. Each of `marks` becomes a
    piece of its own that no other contains.

    Raises UserError for a size or normalisation that cannot be, DataError when there is no text, or when the
    vocabulary has no room for the characters of the text.
    """
    if problems := [*check_vocab_size(vocab_size), *check_normalization(normalization)]:
        raise UserError("; ".join(problems))
    sample = TextSample(sample_bytes, seed)
    for text in texts:
        sample.add(text)
    sentences = [kept for text in sample.texts() if (kept := text.translate(_RESERVED)).strip("\r\n")]
    if not any(sentence.strip() for sentence in sentences):
        raise DataError("there is no text to learn a tokenizer from: give text, or a tokenizer file")
    return Tokenizer.from_bytes(_train(iter(sentences), vocab_size, normalization, marks))


def _train(sentences: Iterator[str], vocab_size: int, normalization: str, marks: str) -> bytes:
    import sentencepiece

    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "hard_vocab_limit": False,
        "character_coverage": 0.999,
        "required_chars": SPACE,  # a lone blank, even where the sample has none
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": normalization,
        "remove_extra_whitespaces": normalization != "identity",
        "add_dummy_prefix": False,
        "max_sentence_length": 1 << 20,  # bytes; longer ones would be left out, and chunks are shorter
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "user_defined_symbols": list(marks),
        "num_threads": 1,  # written into the model file: the same on every machine
        "minloglevel": 2,
    }
    model = io.BytesIO()
    try:
        with _ticking("learning a tokenizer"):
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **settings)
    except RuntimeError as error:
        if shortage := _SHORTAGE.search(str(error)):
            raise DataError(
                f"vocab_size = {vocab_size} is too small for this text: its characters, 256 bytes and four "
                f"special ids need {shortage[2]}"
            ) from error
        raise DataError(f"no tokenizer could be learned from this text ({error}): give a tokenizer file") from error
    return model.getvalue()


@contextlib.contextmanager
def _ticking(description: str) -> Iterator[None]:
    """Show that work goes on whose progress cannot be known."""
    done = threading.Event()
    start_s = time.monotonic()

    def tick() -> None:
        while not done.wait(0.5):
            progress.update(time.monotonic() - start_s)

    with Progress(description, unit="s") as progress:
        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
