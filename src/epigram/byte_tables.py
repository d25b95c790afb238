"""How many bytes of text a token stands for: the denominator of bits per byte, in one place.

The cost of predicting `target` after `previous` is `token_bytes[target]`, plus one for the blank in front of a piece
that begins with the space mark, unless `previous` is a control token: the blank before the first word of a document is
not in the text. The blank is never part of `token_bytes` too; that double count (parameter-golf #1719) made a family of
scores 17 % too good.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ByteTables:
    """Three tables over a vocabulary of V ids.

    token_bytes: (V,) int64, UTF-8 bytes without the leading space mark; 0 for control, unknown and unused ids; 1 for
    byte pieces.
    has_space: (V,) bool, the piece begins with the space mark U+2581.
    is_edge: (V,) bool, control, unknown and unused ids: no blank is owed after them.
    """

    token_bytes: NDArray[np.int64]
    has_space: NDArray[np.bool_]
    is_edge: NDArray[np.bool_]

    def count(self, previous: NDArray[np.integer], targets: NDArray[np.integer]) -> NDArray[np.int64]:
        """Bytes of each target, int64, of the arrays' shape; `previous` holds the id before each target."""
        blank = self.has_space[targets] & ~self.is_edge[previous]
        return self.token_bytes[targets] + blank
