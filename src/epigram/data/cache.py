"""From whatever a user calls data to an open data folder: text is built once and kept in a cache.

What builds is imported only for text: a submission's single file reads shards and ships without it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from epigram.data.dataset import DataFolder, is_published_layout, open_data
from epigram.data.manifest import MANIFEST
from epigram.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """An open data folder, and sentences that the user should read when it was built just now."""

    data: DataFolder
    notes: tuple[str, ...] = ()


def ensure_built(
    path: str | Path, cache_dir: str | Path, *, tokenizer_file: str | Path | None = None, **settings: Any
) -> Opened:
    """Open `path` when it is a data folder (then only `tokenizer_file` is looked at); else build it into
    `cache_dir`.

    `path` is a file, a folder or "stdlib"; settings: see `epigram.data.text_cache.build_cached`. Raises UserError for
    text where the part that builds was left out.
    """
    path = Path(path)
    if (path / MANIFEST).exists() or is_published_layout(path):
        return Opened(data=open_data(path, tokenizer_file))
    try:
        from epigram.data.text_cache import build_cached
    except ModuleNotFoundError as error:
        if error.name != "epigram.data.text_cache":
            raise
        raise UserError(
            f"{path} is no folder of token shards, and this script does not build any: give a folder with "
            "*_train_*.bin, *_val_*.bin and a tokenizer, or build one with `epigram data build`"
        ) from error
    folder, notes = build_cached(path, Path(cache_dir), tokenizer_file=tokenizer_file, **settings)
    return Opened(data=open_data(folder), notes=notes)
