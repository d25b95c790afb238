import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # artifact_toy is shared by the tests of this folder

TEXT = "\n".join(
    f"line {i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs; größer, ½ ﬁn {chr(0x4E00 + i % 7)}"
    for i in range(200)
)


@pytest.fixture(scope="session")
def tokenizer() -> bytes:
    """A small tokenizer with the identity normaliser."""
    from artifact_toy import train_tokenizer

    return train_tokenizer(TEXT, normalization_rule_name="identity")


@pytest.fixture(scope="session")
def nfkc_tokenizer() -> bytes:
    """A small tokenizer with the normaliser of the published ones."""
    from artifact_toy import train_tokenizer

    return train_tokenizer(TEXT, normalization_rule_name="nmt_nfkc")


@pytest.fixture(scope="session")
def training_text() -> str:
    return TEXT
