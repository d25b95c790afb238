"""Every transform of the folder: it inverts on any string, and its byte counts are those of the text."""

import itertools

import numpy as np
import pytest
from data_helpers import make_documents, train_with
from hypothesis import given
from hypothesis import strategies as st

from epigram import plugin
from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms import base, caseops

NAMES = plugin.names(base.PACKAGE)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from("abAB .1éÀ日" + caseops.MARKS), max_size=40),
)

_UNEQUAL = "aBßẞ\u0130\u0131\u017f\u01c5\u212a\u0301"  # letters whose small and capital forms are no pairs


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
def test_it_inverts(name: str, text: str) -> None:
    transform = base.load(name)
    transformed = transform.encode(text)
    assert transform.decode(transformed) == text
    silent = transform.silent(transformed.encode())
    assert len(silent) - int(silent.sum()) == len(text.encode())  # what is heard is the text, byte for byte


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(st.one_of(st.characters(), st.characters(categories=["Cs"]), st.sampled_from(_UNEQUAL))))
def test_it_inverts_what_is_no_unicode_too(name: str, text: str) -> None:
    transform = base.load(name)
    assert transform.decode(transform.encode(text)) == text  # half surrogate pairs, letters of unequal case mappings


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", ["acgt", "ACGT", "aB", caseops.ESCAPE])
def test_a_long_run_takes_linear_time(name: str, unit: str) -> None:
    text = unit * (400_000 // len(unit))  # in quadratic time this would be hours
    transform = base.load(name)
    transformed = transform.encode(text)
    assert transform.decode(transformed) == text
    assert int((~transform.silent(transformed.encode())).sum()) == len(text.encode())


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_pieces_are_decoded_like_the_whole(name: str, text: str, cuts: list[int]) -> None:
    """Of any text, such as a model may write: not only of what `encode` gives."""
    transform = base.load(name)
    for whole in (text, transform.encode(text)):
        decoder, places = transform.Decoder(), [0, *sorted(cuts), len(whole) + 40]
        pieces = [decoder.feed(whole[start:end]) for start, end in itertools.pairwise(places)]
        assert "".join(pieces) + decoder.finish() == transform.decode(whole)


@given(text=TEXTS)
def test_caseops_changes_capitals_alone(text: str) -> None:
    transformed = caseops.encode(text).encode()
    heard = np.frombuffer(transformed, np.uint8)[~caseops.silent(transformed)].tobytes()
    assert heard == text.encode().lower()  # of bytes: ASCII alone


T, A, C, E = caseops.MARKS


@pytest.mark.parametrize(
    ("text", "transformed"),
    [
        ("the cat", "the cat"),
        ("The Cat", f"{T}the {T}cat"),
        ("A NASA x", f"{T}a {A}nasa x"),
        ("iPhone McDonald", f"i{C}phone {T}mc{C}donald"),
        ("HELlo", f"{T}h{C}e{C}llo"),
        ("OK1Ab", f"{A}ok1{T}ab"),
        ("ÉCOLE", f"É{A}cole"),
        (f"x{A}Y", f"x{E}{A}{T}y"),
        ("", ""),
    ],
)
def test_caseops_as_published(text: str, transformed: str) -> None:
    assert caseops.encode(text) == transformed
    assert caseops.decode(transformed) == text


@pytest.fixture(scope="module")
def cased() -> tuple[Tokenizer, list[str]]:
    documents = [
        *make_documents(30, seed=4),
        "NASA and McDonald eat iPhones. É 日本 NASA",
        f"a{E}b{T}C",
        " Blank first",
    ]
    proto = train_with(
        [caseops.encode(one) for one in documents],
        user_defined_symbols=list(caseops.MARKS),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return Tokenizer(proto), documents


def test_byte_counts_are_those_of_the_text(cased: tuple[Tokenizer, list[str]]) -> None:
    """Token by token against a slow account: spell up to each token, decode, and take the difference."""
    tokenizer, documents = cased
    for text in documents:
        transformed = caseops.encode(text).encode()
        tokens, _ = tokenizer.encode_document(caseops.encode(text))
        counts = base.count_original(caseops, tokenizer.byte_tables(), tokens, transformed)
        assert counts.dtype == np.uint16 and counts[0] == 0
        heard = [len(one) - int(caseops.silent(one).sum()) for one in spelled_up_to(tokenizer, tokens)]
        assert np.cumsum(counts).tolist() == heard
        assert int(counts.sum()) == len(text.encode())
        marks = [index for index, id in enumerate(tokens.tolist()) if tokenizer.pieces[id] in set(caseops.MARKS)]
        assert E in text or all(counts[index] == 0 for index in marks)


def spelled_up_to(tokenizer: Tokenizer, tokens: np.ndarray) -> list[bytes]:
    return [tokenizer.decode_bytes(tokens[: index + 1]) for index in range(len(tokens))]
