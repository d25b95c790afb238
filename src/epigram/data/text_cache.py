"""Text that is built into data once, kept in a cache, and found again as long as it is the same."""

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from epigram.data.build import NORMALIZATION, VAL_FRACTION, VOCAB_SIZE, build
from epigram.data.dataset import DataFolder
from epigram.data.files import sha256_of, unwritable_explained
from epigram.data.gather import BY_HASH, Gathered, gather
from epigram.data.manifest import MANIFEST, VERSION
from epigram.data.sources import text
from epigram.data.sources.base import READING

_REMEDY = (
    "what is built of text is kept there, so work in another folder, or build the text with `epigram data build TEXT "
    "--out DIR` (for a score with --tokenizer RUN/tokenizer.model) and give --data DIR"
)


def build_cached(
    path: Path,
    cache_dir: Path,
    *,
    tokenizer_file: str | Path | None = None,
    vocab_size: int = VOCAB_SIZE,
    normalization: str = NORMALIZATION,
    val_fraction: float = VAL_FRACTION,
    transform: str = "",
    for_score: bool = False,
) -> tuple[Path, tuple[str, ...]]:
    """The data folder of this text, and sentences for the user when it was built just now.

    The name in the cache comes from a hash of the text and of all settings, so a changed text is built anew
    and an unchanged one is found again, wherever it lies. `path` is a file, a folder or "stdlib"; see `build`
    for the rest. A recipe has values for all settings: those that nothing reads, as this text names its splits or the
    tokenizer is given, are passed over. Text that is built `for_score` has a name of its own: which file is of which
    split is in the hash.
    """
    gathered = gather([path], for_score=for_score)
    trains, splits = tokenizer_file is None, any(file.split == BY_HASH for file in gathered.files)
    settings: dict[str, Any] = {
        "tokenizer_file": tokenizer_file,
        "vocab_size": vocab_size if trains else None,
        "normalization": normalization if trains else None,
        "val_fraction": val_fraction if splits else None,
        "transform": transform,
    }
    folder = cache_dir / _name(path, gathered, settings)
    if (folder / MANIFEST).exists():  # also where nothing can be written any more
        return folder, ()
    with _one_at_a_time(folder):
        if (folder / MANIFEST).exists():
            return folder, ()
        built = build([path], folder, **settings, for_score=for_score)
    return folder, built.notes


def num_known(scored: DataFolder, learned: DataFolder) -> int:
    """Documents of val of `scored` that begin like text that a model of `learned` was trained on.

    That is a document of train, or a longer one that begins with one of val: a text file is cut where a part of it is
    held out, and is one document where all of it is scored. DataError where a folder says nothing of its documents.
    """
    starts, wholes = scored.document_hashes("val").T
    train, held_out = learned.document_hashes("train"), learned.document_hashes("val")
    goes_on = np.isin(starts, held_out[:, 0]) & ~np.isin(wholes, held_out[:, 1])
    return int(np.count_nonzero(goes_on | np.isin(starts, train[:, 0])))


def _name(path: Path, gathered: Gathered, settings: dict[str, Any]) -> str:
    """Name in the cache: that of the source, for people, and a hash of all that the result depends on."""
    if settings["tokenizer_file"] is not None:
        settings = settings | {"tokenizer_file": sha256_of(Path(settings["tokenizer_file"]))}
    facts = [VERSION, READING, text.PIECE_BYTES, gathered.content_hash(), settings]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.resolve().name).lstrip(".") or "data"
    return f"{readable}-{key[:16]}"


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let the processes of a run that want the same folder build it once: the others wait, then find it."""
    with contextlib.ExitStack() as stack:
        with unwritable_explained(folder.parent, _REMEDY):
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(folder.with_name(f".{folder.name}.lock").open("w"))
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
