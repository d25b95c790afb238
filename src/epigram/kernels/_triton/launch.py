"""What the launches share: how many programs fill a device, and how large their tiles are."""

import functools

import torch
import triton

_PROGRAMS_INTERPRETED = 3  # without a GPU: few, but more than one, so that tests see partial sums


@functools.cache
def _num_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(device: torch.device, per_processor: int, most: int) -> int:
    """How many programs to start when each takes many tiles in turn; `most` is the number of tiles."""
    if device.type != "cuda":
        return min(_PROGRAMS_INTERPRETED, most)
    return min(per_processor * _num_processors(device.index or 0), most)


def padded(width: int) -> int:
    """The power of two that a row of `width` is loaded as."""
    return triton.next_power_of_2(width)


def tile(width: int) -> tuple[int, int]:
    """Rows and padded width of a tile of about 2048 elements: enough loads in flight without spilling."""
    wide = padded(width)
    return max(1, 2048 // wide), wide
