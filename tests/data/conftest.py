"""Tokenizers that the tests of the data layer share; all of them are made here."""

import sys
from pathlib import Path

import pytest

from epigram.data.tokenizer import Tokenizer
from epigram.data.tokenizer_training import train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # data_helpers

from data_helpers import make_documents, train_with


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_documents(60, seed=1)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    """Identity normalisation, byte pieces."""
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def nfkc_tokenizer(texts: list[str]) -> Tokenizer:
    """The settings of the published tokenizers: white space is collapsed."""
    return train_tokenizer(texts, 400, "nmt_nfkc")


@pytest.fixture(scope="session")
def fallbackless_proto(texts: list[str]) -> bytes:
    """A model without byte pieces, as the published one of 1,024 pieces is."""
    return train_with(texts, byte_fallback=False, vocab_size=200, normalization_rule_name="nmt_nfkc")
