"""Reordering of numbers of two or four bytes, so that a general compressor finds what there is.

Byte shuffle: all first bytes of the items, then all second bytes, and so on. In 16-bit floats the last byte
holds sign and exponent, the first nothing but noise (parameter-golf #1212's "BSHF", here without its prefix:
the header says it all). Palette: where at most 256 different 16-bit numbers occur, as among scales of a
quantizer with a coarse grid, the list of them and one byte an item; the two bytes of an item say the same
thing twice.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def shuffle(data: bytes, stride: int) -> bytes:
    """The bytes at i, i + stride, i + 2 stride, ... for i = 0, then 1, ... stride - 1; any length."""
    values = np.frombuffer(data, np.uint8)
    return b"".join(values[i::stride].tobytes() for i in range(stride))


def unshuffle(data: Bytes, stride: int) -> Bytes:
    """The inverse of `shuffle` with the same stride."""
    if stride == 1:
        return data
    result, start = np.empty_like(data), 0
    for i in range(stride):
        place = result[i::stride]
        place[:] = data[start : start + len(place)]
        start += len(place)
    return result


def palette(data: bytes) -> bytes | None:
    """One byte: how many different items, less one; the items, ascending; an index for each item of `data`.

    None where that does not apply: an odd length, no items, or more than 256 different ones.
    """
    if len(data) % 2 or not data:
        return None
    colours, index = np.unique(np.frombuffer(data, "<u2"), return_inverse=True)
    if len(colours) > 256:
        return None
    return bytes([len(colours) - 1]) + shuffle(colours.tobytes(), 2) + index.astype(np.uint8).tobytes()


def palette_bytes(num_colours: int, raw_bytes: int) -> int:
    """Length of the palette form of `raw_bytes` bytes."""
    return 1 + 2 * num_colours + raw_bytes // 2


def unpalette(data: Bytes) -> Bytes | None:
    """The inverse of `palette`; None if an index has no item."""
    end = 1 + 2 * (int(data[0]) + 1)
    colours, index = unshuffle(data[1:end], 2).view("<u2"), data[end:]
    if len(index) and int(index.max()) >= len(colours):
        return None
    return colours[index].view(np.uint8)
