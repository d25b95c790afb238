"""Which part of the text each length group reads in a pass: pure plan, the same on every machine.

The shards of a pass are laid on a circle in an order drawn from the seed, and the circle is cut into sectors,
each divided among the groups in proportion to the tokens that they take a step. So groups share no text
within a pass, each sees text from everywhere, and all end their pass at about the same step. From pass to
pass the shards are laid anew and the cuts turn by the golden ratio, so that in time every group sees all
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epigram.data.lanes import LengthGroup
from epigram.errors import DataError

_MOST_SECTORS = 16
_SECTOR_WINDOWS = 64  # at least, in each group's part of a sector: cutting wastes up to a window
_GOLDEN = 0.6180339887498949
_LAYING = 1  # name of a random stream, next to the others that come from the run's seed


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Inputs of windows lie in [start, stop) of a shard; the target of the last is the token at `stop`."""

    shard: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Inputs, which are as many as targets."""
        return self.stop - self.start


def segments_of_pass(
    shard_tokens: Sequence[int], groups: Sequence[LengthGroup], seed: int, index: int
) -> list[list[Segment]]:
    """For each group the segments that it reads in pass `index` (from 0), each long enough for a window.

    Groups share nothing, unless the text is so short that a group would get no window: such a group reads all
    of it. Raises DataError when no window fits into any shard.
    """
    whole = [Segment(shard=i, start=0, stop=n - 1) for i, n in enumerate(shard_tokens) if n > 1]
    divided = [whole] if len(groups) == 1 else _divide(shard_tokens, groups, seed, index)
    return [_usable(own, group) or _all(whole, group) for own, group in zip(divided, groups, strict=True)]


def _usable(segments: list[Segment], group: LengthGroup) -> list[Segment]:
    return [segment for segment in segments if segment.num_tokens >= group.seq_len]


def _all(whole: list[Segment], group: LengthGroup) -> list[Segment]:
    if usable := _usable(whole, group):
        return usable
    longest = max((segment.num_tokens + 1 for segment in whole), default=0)
    raise DataError(
        f"no window of {group.seq_len:,} tokens fits: it needs {group.seq_len + 1:,} in one shard, and the "
        f"longest has {longest:,}: give more text, or a smaller seq_len"
    )


def _divide(shard_tokens: Sequence[int], groups: Sequence[LengthGroup], seed: int, index: int) -> list[list[Segment]]:
    """Cut the circle of shards into sectors and each sector into the groups' parts."""
    order = np.random.Generator(np.random.PCG64([seed, _LAYING, index])).permutation(len(shard_tokens)).tolist()
    total = sum(shard_tokens)
    step_tokens = sum(group.num_tokens for group in groups)
    fewest = min(total * group.num_tokens // (step_tokens * group.seq_len) for group in groups)  # windows of a group
    sectors = min(max(fewest // _SECTOR_WINDOWS, 1), _MOST_SECTORS)
    turned = int(total * ((index * _GOLDEN) % 1.0))
    ends = np.cumsum([group.num_tokens for group in groups]).tolist()
    divided: list[list[Segment]] = [[] for _ in groups]
    place = 0
    for sector in range(sectors):
        for group, end in enumerate(ends):
            stop = (sector * step_tokens + end) * total // (sectors * step_tokens)
            divided[group] += _arc(shard_tokens, order, place + turned, stop + turned)
            place = stop
    assert place == total
    return divided


def _arc(shard_tokens: Sequence[int], order: list[int], start: int, stop: int) -> list[Segment]:
    """The shards' parts under [start, stop) of the circle, where `start` may lie a full turn ahead."""
    found, begin = [], 0
    for shard in order + order:
        end = begin + shard_tokens[shard]
        first, last = max(start, begin) - begin, min(stop, end) - begin
        last = min(last, shard_tokens[shard] - 1)  # the last token of a shard is a target only
        if first < last:
            found.append(Segment(shard=shard, start=first, stop=last))
        begin = end
    return found
