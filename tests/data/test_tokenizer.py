"""Token ids, byte tables and decoding, against SentencePiece and against the text itself."""

import io
import itertools
import pickle
import random

import numpy as np
import pytest
import sentencepiece
from data_helpers import make_documents, train_with
from hypothesis import given
from hypothesis import strategies as st

from epigram.data import tokenizer as tokenizer_module
from epigram.data.encode import prove_bytes
from epigram.data.model_proto import normalization, without_normalization
from epigram.data.tokenizer import SPACE, Tokenizer
from epigram.errors import DataError

AWKWARD = [
    "",
    " ",
    "    ",
    " leading",
    "  two leading",
    "trailing ",
    "trailing  ",
    "\n",
    "\n\n\n",
    "\t\ttabs\tinside\t",
    "line\r\nends\r\n",
    "    indented\n        more\n",
    "😀",
    " 😀😀 👩‍👩‍👧 ",
    "日本語のテキスト",
    "é e\u0301 \u00a0 no-break",
    f"a{SPACE}mark",
    f"{SPACE}",
    f" {SPACE} {SPACE}{SPACE} ",
    "nul \0 inside",
    "\ufeffbom",
    "<s></s><0x41><unk>",
    "\u2585 lower five eighths",
    "12345 67",
    "?question",
]
text = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(f" \n\tabeklo.{SPACE}")))


def counted_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    return int(tokenizer.byte_tables().count(ids[:-1], ids[1:]).sum())


def naive_bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Bytes after the first id, from the library's own description of each piece, one id at a time."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    total = 0
    for previous, id in itertools.pairwise(ids):
        silent = [i for i in (previous, id) if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)]
        if id in silent:
            continue
        piece = model.id_to_piece(id)
        if model.is_byte(id):
            total += 1
        elif piece.startswith(SPACE):
            total += len(piece[1:].replace(SPACE, " ").encode()) + (previous not in silent)
        else:
            total += len(piece.encode())
    return total


@pytest.mark.parametrize("sample", AWKWARD, ids=ascii)
def test_identity_keeps_awkward_text(tokenizer: Tokenizer, sample: str) -> None:
    ids, normalized = tokenizer.encode_document(sample)
    assert normalized == sample.encode()
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode_bytes(ids) == sample.encode()
    assert counted_bytes(tokenizer, ids) == naive_bytes(tokenizer, ids.tolist()) == len(sample.encode())
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.can_encode(sample)


@given(text)
def test_identity_keeps_any_text(tokenizer: Tokenizer, sample: str) -> None:
    ids, _ = tokenizer.encode_document(sample)
    assert tokenizer.decode_bytes(ids) == sample.encode()
    assert counted_bytes(tokenizer, ids) == len(sample.encode())


@given(text)
def test_collapsing_normalisation_is_counted_as_normalised(nfkc_tokenizer: Tokenizer, sample: str) -> None:
    ids, normalized = nfkc_tokenizer.encode_document(sample)
    assert normalized.decode() == nfkc_tokenizer.normalize(sample)
    assert nfkc_tokenizer.decode_bytes(ids) == normalized
    assert counted_bytes(nfkc_tokenizer, ids) == len(normalized)


def test_ids_are_those_of_sentencepiece(
    tokenizer: Tokenizer, nfkc_tokenizer: Tokenizer, fallbackless_proto: bytes
) -> None:
    documents = [document for document in make_documents(40, seed=9) if not document.startswith(" ")]
    for candidate in (tokenizer, nfkc_tokenizer, Tokenizer.from_bytes(fallbackless_proto)):
        model = sentencepiece.SentencePieceProcessor(model_proto=candidate.proto)
        encoded = [candidate.encode_document(one)[0] for one in documents]
        assert [ids.tolist() for ids in encoded] == [[candidate.bos_id, *model.encode(one)] for one in documents]
        assert all(ids.dtype == np.uint16 for ids in encoded)


@given(st.text(st.sampled_from(" abklo\n"), max_size=60))
def test_ids_in_runs_of_blanks_are_those_of_sentencepiece(tokenizer: Tokenizer, sample: str) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    sample = "x" + sample  # a leading blank is written differently on purpose
    assert tokenizer.encode(sample) == model.encode(sample)


def test_small_cache_changes_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = make_documents(10, seed=3)
    expected = [tokenizer.encode_document(one)[0] for one in documents]
    monkeypatch.setattr(tokenizer_module, "_CACHED_WORDS", 3)
    fresh = Tokenizer.from_bytes(tokenizer.proto)
    for _ in range(2):
        found = [fresh.encode_document(one)[0] for one in documents]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(fresh._words) <= 3


def test_long_runs_are_cut_where_no_piece_reaches(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(4)
    run = "".join(draw.choices(["kalo", "mi", "9", "Q", "日"], k=400))
    expected = tokenizer.encode(run)
    monkeypatch.setattr(tokenizer_module, "_LONGEST_RUN", 50)
    fresh = Tokenizer.from_bytes(tokenizer.proto)
    calls = []
    encode = fresh._words._encode
    monkeypatch.setattr(fresh._words, "_encode", lambda part: calls.append(part) or encode(part))
    assert fresh.encode(run) == expected
    assert "".join(calls) == run
    assert max(map(len, calls)) <= 50


@pytest.mark.parametrize("sample", ["a" * 1000, "lo" * 700, " " * 900, "日" * 300])
def test_runs_without_a_place_to_cut_keep_their_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, sample: str
) -> None:
    monkeypatch.setattr(tokenizer_module, "_LONGEST_RUN", 64)
    fresh = Tokenizer.from_bytes(tokenizer.proto)
    ids, normalized = fresh.encode_document(sample)
    assert fresh.decode_bytes(ids) == normalized == sample.encode()


def test_byte_tables_have_the_published_form(tokenizer: Tokenizer) -> None:
    tables = tokenizer.byte_tables()
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    byte_ids = [i for i in range(tokenizer.vocab_size) if model.is_byte(i)]
    assert len(byte_ids) == 256
    assert (tables.token_bytes[byte_ids] == 1).all()
    assert not tables.has_space[byte_ids].any()
    assert np.flatnonzero(tables.is_edge).tolist() == [0, 1, 2, 3]
    assert (tables.token_bytes[:4] == 0).all()
    starting = [i for i in range(tokenizer.vocab_size) if model.id_to_piece(i).startswith("\u2581")]
    assert len(starting) > 20
    assert np.flatnonzero(tables.has_space).tolist() == starting
    lone = model.piece_to_id("\u2581")
    assert tables.token_bytes[lone] == 0
    assert tables.has_space[lone]


def test_blank_is_free_only_behind_an_edge(tokenizer: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    piece = next(
        i for i in range(tokenizer.vocab_size) if len(model.id_to_piece(i)) > 2 and tokenizer.byte_tables().has_space[i]
    )
    word = model.id_to_piece(piece)[1:].encode()
    bos = tokenizer.bos_id
    assert counted_bytes(tokenizer, np.array([bos, piece])) == len(word)
    assert counted_bytes(tokenizer, np.array([piece, piece])) == len(word) + 1
    assert tokenizer.decode_bytes([bos, piece, piece]) == word + b" " + word
    assert tokenizer.decode_bytes([piece]) == b" " + word  # in running text
    assert tokenizer.decode_bytes([]) == b""


@given(st.lists(st.integers(0, 399), max_size=30))
def test_any_stream_counts_what_it_spells(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Streams with no BOS, several, a trailing one: tables and bytes agree behind the first id."""
    ids = [id % tokenizer.vocab_size for id in ids]
    spelled = tokenizer.decode_bytes(ids)
    first = len(tokenizer.decode_bytes(ids[:1]))
    assert counted_bytes(tokenizer, np.array(ids, np.int64)) == len(spelled) - first == naive_bytes(tokenizer, ids)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_blocks_change_nothing(tokenizer: Tokenizer, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 500)
    ids[::5] = tokenizer.bos_id
    spelled, counted = tokenizer.decode_bytes(ids), tokenizer.count_bytes(ids)
    assert counted == naive_bytes(tokenizer, ids.tolist()) == counted_bytes(tokenizer, ids)
    monkeypatch.setattr(tokenizer_module, "_BLOCK_IDS", block)
    assert (tokenizer.decode_bytes(ids), tokenizer.count_bytes(ids)) == (spelled, counted)
    assert [tokenizer.count_bytes(ids[:n]) for n in (0, 1)] == [0, 0]


@given(st.lists(st.integers(0, 399), max_size=30))
def test_streamed_text_is_valid_and_complete(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [id % tokenizer.vocab_size for id in ids]
    decoder = tokenizer.stream_decoder()
    streamed = "".join([*map(decoder.feed, ids), decoder.finish()])
    assert streamed == tokenizer.decode([tokenizer.bos_id, *ids])


def test_streamed_text_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    parts = [decoder.feed(id) for id in tokenizer.encode("\U0001f9ea!")]  # four byte pieces and more
    assert parts[:3] == ["", "", ""]
    assert "".join(parts) == "\U0001f9ea!"


def test_unknown_characters_cannot_be_encoded(fallbackless_proto: bytes, tokenizer: Tokenizer) -> None:
    poor = Tokenizer.from_bytes(fallbackless_proto)
    assert poor.can_encode("kalo mi")
    assert not poor.can_encode("kalo ☃")
    assert not poor.lossless
    assert not tokenizer.can_encode("\ud800")  # half a surrogate pair
    assert tokenizer.lossless


def test_a_first_blank_is_unknown_without_byte_pieces(texts: list[str]) -> None:
    """It is missing from the bytes, as any unknown character is; no document may fail for it."""
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    poor = Tokenizer.from_bytes(train_with(texts, byte_fallback=False, vocab_size=200, **settings))
    for sample, missing in (("kalo mi", 0), (" kalo mi", 1), ("  kalo", 2), (" ", 1), ("", 0), (" ☃ mi", 5)):
        ids, normalized = poor.encode_document(sample)
        assert prove_bytes(poor, ids, normalized, "a sample") == missing
        assert counted_bytes(poor, ids) == len(sample.encode()) - missing
        assert poor.can_encode(sample) == (missing == 0)
    assert poor.encode(" kalo mi") == [poor.unk_id, *poor.encode("kalo mi")]


def test_dummy_prefix_is_no_text(texts: list[str]) -> None:
    proto = train_with(texts, add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    prefixed = Tokenizer.from_bytes(proto)
    for sample in ["kalo mi", " kalo", "  x", "😀"]:
        ids, normalized = prefixed.encode_document(sample)
        assert normalized == sample.encode() == prefixed.decode_bytes(ids)
        assert counted_bytes(prefixed, ids) == len(normalized)
        assert prefixed.decode(prefixed.encode(sample)) == sample


def test_pieces_over_words_are_found() -> None:
    phrases = ["in the house of the king of the land", "of the house in the land of a king"]
    proto = train_with(
        phrases * 20,
        split_by_whitespace=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert any(SPACE in piece.lstrip(SPACE) for piece in Tokenizer(proto).pieces)
    for document in [*phrases, "the king  of the  land of the", "x of thex of the "]:
        assert Tokenizer(proto).encode(document) == model.encode(document)
        ids, normalized = Tokenizer(proto).encode_document(document)
        assert counted_bytes(Tokenizer(proto), ids) == len(normalized) == len(document.encode())


def test_refuses_what_cannot_be_used(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no SentencePiece model"):
        Tokenizer.from_bytes(b"no model at all")
    with pytest.raises(DataError, match="no SentencePiece model"):
        Tokenizer.from_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.from_file("/nowhere/tokenizer.model")
    with pytest.raises(DataError, match="no BOS piece"):
        Tokenizer.from_bytes(train_with(texts, bos_id=-1))
    with pytest.raises(DataError, match="lone blank"):
        Tokenizer.from_bytes(train_with(["onewordonly" * 5], vocab_size=275))
    with pytest.raises(DataError, match="end with the blank"):
        Tokenizer.from_bytes(train_with(texts, treat_whitespace_as_suffix=True))


def test_refuses_a_vocabulary_beyond_16_bits(tokenizer: Tokenizer) -> None:
    extra = io.BytesIO()
    for number in range(tokenizer.vocab_size, 65_537):
        name = f"x{number}".encode()
        piece = bytes([0x0A, len(name)]) + name + b"\x15\0\0\0\0"  # field 1 the piece, field 2 its score
        extra.write(bytes([0x0A, len(piece)]) + piece)
    with pytest.raises(DataError, match="65,537 pieces"):
        Tokenizer.from_bytes(tokenizer.proto + extra.getvalue())


def test_survives_pickling(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.sha256 == tokenizer.sha256
    assert copy.encode("kalo mi") == tokenizer.encode("kalo mi")


def test_settings_of_the_model_file(tokenizer: Tokenizer, nfkc_tokenizer: Tokenizer, texts: list[str]) -> None:
    plain = normalization(tokenizer.proto)
    assert (plain.name, plain.identity, plain.dummy_prefix, plain.suffix) == ("identity", True, False, False)
    collapsing = normalization(nfkc_tokenizer.proto)
    assert (collapsing.name, collapsing.identity) == ("nmt_nfkc", False)
    odd = normalization(train_with(texts, treat_whitespace_as_suffix=True, add_dummy_prefix=True))
    assert (odd.dummy_prefix, odd.suffix, odd.identity) == (True, True, False)


def test_normalisation_can_be_taken_out(nfkc_tokenizer: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=without_normalization(nfkc_tokenizer.proto))
    assert model.normalize("  ﬁ  x ") == "  ﬁ  x ".replace(" ", SPACE)
    assert normalization(without_normalization(nfkc_tokenizer.proto)).identity


@given(st.binary(max_size=60))
def test_damaged_model_files_raise_value_errors_only(data: bytes) -> None:
    try:
        normalization(data)
    except ValueError:
        return
    with pytest.raises(DataError):
        Tokenizer.from_bytes(data)
