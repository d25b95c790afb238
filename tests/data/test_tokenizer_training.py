"""Training: what is kept, what is refused, how the sample behaves."""

import pytest
from data_helpers import make_documents

from epigram.data.tokenizer_training import TextSample, train_tokenizer
from epigram.errors import DataError, UserError


def test_has_the_published_special_ids(tokenizer, nfkc_tokenizer) -> None:
    for trained in (tokenizer, nfkc_tokenizer):
        assert trained.pieces[:4] == ["<pad>", "<s>", "</s>", "<unk>"]
        assert (trained.bos_id, trained.unk_id) == (1, 3)
        assert trained.pieces[4:260] == [f"<0x{byte:02X}>" for byte in range(256)]
        assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in trained.pieces[260:])
    assert (tokenizer.normalization, nfkc_tokenizer.normalization) == ("identity", "nmt_nfkc")


def test_white_space_becomes_pieces(tokenizer) -> None:
    """Newlines stay inside the sentences that the trainer sees, and runs of blanks are learned."""
    assert any("\n" in piece for piece in tokenizer.pieces)
    assert len(tokenizer.encode("x\n    y")) < len("x\n    y")


def test_documents_beyond_the_trainers_sentence_limit_are_learned_from() -> None:
    """SentencePiece passes over sentences above 4,192 bytes by default, and fails at words above 65,535."""
    (document,) = make_documents(1, seed=2, words=4000)
    assert len(document) > 10_000
    assert train_tokenizer([document], 350).vocab_size == 350
    assert train_tokenizer(["kalomi" * 40_000], 280).encode("kalomi" * 4) != []


def test_same_text_same_bytes(texts) -> None:
    assert train_tokenizer(texts, 350).proto == train_tokenizer(list(texts), 350).proto


def test_little_text_gives_fewer_pieces() -> None:
    small = train_tokenizer(["hello hello world"], 4096)
    assert 261 < small.vocab_size < 300
    assert small.decode(small.encode("anything ☃")) == "anything ☃"


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        (([], 300), DataError, "no text"),
        ((["\n\r\n"], 300), DataError, "no text"),
        ((["  "], 300), DataError, "no text"),
        ((["the quick brown fox"], 265), DataError, r"vocab_size = 265 is too small .* need 27\d"),
        ((["x"], 100), UserError, "between 261"),
        ((["x"], 65_537), UserError, "65536"),
        ((["x"], 300, "nfd"), UserError, "choose one of identity, nmt_nfkc"),
    ],
)
def test_what_cannot_be_trained(arguments, kind, match) -> None:
    with pytest.raises(kind, match=match):
        train_tokenizer(*arguments)


def test_reserved_characters_do_not_spoil_the_training() -> None:
    trained = train_tokenizer(["kalo \u2581 mi \u2585 te \0 ru " * 20], 300)
    assert "kalo" in "".join(trained.pieces)
    assert trained.can_encode("\u2581\u2585\0")


def test_sample_keeps_all_of_a_small_text_in_order() -> None:
    sample = TextSample(1000)
    for word in ("one", "two", "three" * 3):
        sample.add(word)
    assert sample.texts() == ["one", "two", "three" * 3]
    assert sample.num_bytes == sample.seen_bytes == 21


def test_sample_is_bounded_uniform_and_seeded() -> None:
    def positions(seed: int) -> list[int]:
        sample = TextSample(4000, seed)
        for index in range(10_000):
            sample.add(f"{index:08d}")
            assert sample.num_bytes <= 4000
        assert sample.seen_bytes == 80_000
        return [int(text) for text in sample.texts()]

    chosen = positions(0)
    assert len(chosen) == 500
    assert chosen == sorted(chosen) == positions(0)
    assert chosen != positions(1)
    quarters = [sum(2500 * q <= place < 2500 * (q + 1) for place in chosen) for q in range(4)]
    assert all(80 < count < 175 for count in quarters)  # 125 expected, 5 standard deviations of 9.7


def test_sample_counts_bytes_of_other_scripts() -> None:
    sample = TextSample(30)
    for _ in range(20):
        sample.add("日本")
    assert sample.num_bytes == 30
    assert len(sample.texts()) == 5
