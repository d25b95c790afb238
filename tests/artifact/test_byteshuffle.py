import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigram.artifact.byteshuffle import palette, palette_bytes, shuffle, unpalette, unshuffle


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), np.uint8)


@given(st.binary(max_size=64), st.integers(1, 9))
def test_unshuffle_inverts_shuffle_at_any_length(data: bytes, stride: int) -> None:
    assert unshuffle(array(shuffle(data, stride)), stride).tobytes() == data


@given(st.binary(max_size=64), st.integers(1, 9))
def test_shuffle_is_the_loop_of_its_definition(data: bytes, stride: int) -> None:
    slow = [data[i] for start in range(stride) for i in range(start, len(data), stride)]
    assert shuffle(data, stride) == bytes(slow)


@given(st.lists(st.sampled_from([0, 1, 255, 256, 0x3C00, 0xFFFF]), min_size=1, max_size=50))
def test_unpalette_inverts_palette(items: list[int]) -> None:
    data = np.array(items, "<u2").tobytes()
    packed = palette(data)
    assert packed is not None
    assert len(packed) == palette_bytes(len(set(items)), len(data))
    restored = unpalette(array(packed))
    assert restored is not None
    assert restored.tobytes() == data


@pytest.mark.parametrize("data", [b"", b"abc", np.arange(257, dtype="<u2").tobytes()])
def test_no_palette_where_it_does_not_apply(data: bytes) -> None:
    assert palette(data) is None


def test_unpalette_refuses_an_index_without_an_item() -> None:
    packed = bytearray(palette(np.array([5, 5, 9], "<u2").tobytes()) or b"")
    packed[-1] = 2
    assert unpalette(array(bytes(packed))) is None
