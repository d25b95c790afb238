"""Bits per byte against closed forms, and the bytes of a stream against those of its text."""

import io
import math

import numpy as np
import pytest
import sentencepiece as spm

from epigram.byte_tables import ByteTables
from epigram.errors import DataError
from epigram.evaluation import bpb
from epigram.evaluation.bpb import Score, check_bytes, count_bytes

SPACE_MARK = "\u2581"
DOCUMENTS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox runs on.",
    " leading and trailing blanks ",
    "def f(x):\n\treturn x ** 2  # two  blanks",
    "caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f600\U0001f680 \u00df",
    "a",
)


@pytest.fixture(scope="module")
def tokenizer():
    """A small BPE with byte fallback and identity normalisation, trained on the documents."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS * 4),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=0.98,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def tables_of(tokenizer) -> ByteTables:
    """The rule of the published tables, written out piece by piece."""
    vocab_size = tokenizer.vocab_size()
    token_bytes, has_space = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, bool)
    is_edge = np.zeros(vocab_size, bool)
    for i in range(vocab_size):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
            is_edge[i] = True
        elif tokenizer.is_byte(i):
            token_bytes[i] = 1
        else:
            piece = tokenizer.id_to_piece(i)
            has_space[i] = piece.startswith(SPACE_MARK)
            token_bytes[i] = len(piece.removeprefix(SPACE_MARK).encode())
    return ByteTables(token_bytes=token_bytes, has_space=has_space, is_edge=is_edge)


def stream_of(tokenizer, documents) -> np.ndarray:
    ids = [i for text in documents for i in [tokenizer.bos_id(), *tokenizer.encode(text)]]
    return np.array(ids, dtype=np.uint16)


def owed_bytes(text: str) -> int:
    """Bytes of a document as scored: a blank that it begins with is not owed after a control token."""
    return len(text.encode()) - text.startswith(" ")


def test_bytes_of_a_stream_are_those_of_its_text(tokenizer):
    tables = tables_of(tokenizer)
    expected = sum(map(owed_bytes, DOCUMENTS))
    assert count_bytes(stream_of(tokenizer, DOCUMENTS), tables) == expected
    assert check_bytes(stream_of(tokenizer, DOCUMENTS), tables, expected) == expected


def test_parts_add_up_and_chunks_do_not_matter(tokenizer, monkeypatch):
    tables, tokens = tables_of(tokenizer), stream_of(tokenizer, DOCUMENTS)
    whole, middle = count_bytes(tokens, tables), len(tokens) // 3
    assert count_bytes(tokens, tables, 0, middle) + count_bytes(tokens, tables, middle, len(tokens) - 1) == whole
    monkeypatch.setattr(bpb, "_CHUNK", 7)
    assert count_bytes(tokens, tables) == whole
    assert count_bytes(tokens, tables, 5, 5) == 0


def test_a_blank_counted_twice_is_refused(tokenizer):
    """The double count of #1719: the space mark is in the piece's bytes and added once more."""
    tables, tokens = tables_of(tokenizer), stream_of(tokenizer, DOCUMENTS)
    wrong = ByteTables(
        token_bytes=tables.token_bytes + tables.has_space, has_space=tables.has_space, is_edge=tables.is_edge
    )
    with pytest.raises(DataError, match="manifest says"):
        check_bytes(tokens, wrong, sum(map(owed_bytes, DOCUMENTS)))


def test_a_truncated_stream_is_refused(tokenizer):
    tokens = stream_of(tokenizer, DOCUMENTS)[:-2]
    with pytest.raises(DataError, match="epigram data check"):
        check_bytes(tokens, tables_of(tokenizer), sum(map(owed_bytes, DOCUMENTS)))


def test_tokens_of_another_vocabulary_are_refused(tokenizer):
    tokens = np.array([1, tokenizer.vocab_size(), 5], dtype=np.uint16)
    with pytest.raises(DataError, match="belong together"):
        count_bytes(tokens, tables_of(tokenizer))


def test_a_uniform_model_has_the_closed_form():
    """Eight bits per token of two bytes are four bits per byte."""
    part = Score(nats=50 * math.log(256), tokens=50, bytes=100)
    assert part.val_bpb == pytest.approx(4.0, rel=1e-15)
    assert part.val_nats == pytest.approx(math.log(256), rel=1e-15)
    whole = part + Score(nats=50 * math.log(256), tokens=50, bytes=300)
    assert (whole.tokens, whole.bytes) == (100, 400)
    assert whole.val_bpb == pytest.approx(2.0, rel=1e-15)
    assert set(whole.as_dict()) == {"val_bpb", "val_nats", "tokens", "bytes"}


def test_the_published_score_follows_from_its_totals():
    """#1212, seed 2: 1.87306 nats over 62,017,536 tokens of 151,070,902 bytes were logged as 1.109368."""
    score = Score(nats=62_017_536 * 1.87306, tokens=62_017_536, bytes=151_070_902)
    assert score.val_bpb == pytest.approx(1.109368, abs=1e-4)


def test_a_text_without_bytes_has_no_score():
    with pytest.raises(DataError, match="no text"):
        _ = Score(nats=1.0, tokens=3, bytes=0).val_bpb
