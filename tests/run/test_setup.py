"""What is refused before a run begins, since it could not end."""

from unittest.mock import Mock

import pytest
from run_helpers import short

from epigram.artifact.tokenizer_section import compact
from epigram.data.dataset import DataFolder
from epigram.errors import UserError
from epigram.run.setup import build_session, check_fit
from epigram.wire_format import bytes_field


def test_a_tokenizer_that_no_artifact_can_carry_is_refused_before_training(data: DataFolder) -> None:
    check_fit(short(), data)
    proto = data.tokenizer.proto + bytes_field(1, bytes_field(1, b"x" * 300))
    odd = Mock(tokenizer=Mock(proto=proto, vocab_size=512, bos_id=1))
    with pytest.raises(UserError, match="no artifact can carry the tokenizer .*: a piece of 300 bytes"):
        build_session(short(), odd, Mock())
    check_fit(short("artifact.tokenizer=false"), odd)
    assert compact(data.tokenizer.proto), "the data's own is carried"
