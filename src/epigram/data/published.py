"""The published token shards: where they lie, and what their validation split must be. The one table of names.

The exports of parameter-golf are FineWeb in the shard format of `data.shards`, the first 50,000 documents being the
validation split. What is known of that split is pinned: its count, and its hash where one was published. The hub states
the SHA-256 of each file; `data.fetch` compares it with what arrived and keeps it beside the shards. Hashes of the
tokenizers are pinned, and tell a folder of published shards from one that was made with another tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epigram.data.files import digest_of
from epigram.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published variant.

    name: what it is called here. repo: dataset repository on the hub. folder: name of the folder of its shards, at
    whatever depth. tokenizer: name of its model file. tokenizer_sha256: in hex. val_tokens: fewest and most tokens that
    its validation split can have, equal where the count is known exactly; None where it is not known. val_md5: MD5 of
    the one shard of the validation split, in hex, where somebody published it. train_shards: full training shards that
    published training scripts use.
    """

    name: str
    repo: str
    folder: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    val_tokens: tuple[int, int] | None
    val_md5: str | None = None
    train_shards: int = 80

    def problem(self, num_tokens: int) -> str | None:
        """Why a validation split of `num_tokens` is not the published one; None when it can be."""
        if self.val_tokens is None or self.val_tokens[0] <= num_tokens <= self.val_tokens[1]:
            return None
        least, most = self.val_tokens
        wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f"the validation split of {self.name} has {wanted} tokens, and this one has {num_tokens:,}"

    def other_contents(self, shards: Sequence[Path]) -> str | None:
        """Why a validation split of as many tokens is not the published one; None when it is, or nothing is known.

        Raises DataError when a shard cannot be read.
        """
        if self.val_md5 is None or (found := [digest_of(path, "md5") for path in shards]) == [self.val_md5]:
            return None
        return (
            f"the validation split of {self.name} is one shard with the MD5 {self.val_md5}, "
            f"and this one has {', '.join(found)}"
        )


def _scored(num_targets: int) -> tuple[int, int]:
    """Token counts of a split of which published scripts scored `num_targets`, a whole number of windows of 2,048."""
    return num_targets + 1, num_targets + 2048


PUBLISHED = {
    variant.name: variant
    for variant in (
        Published(  # the count is that of the export's own manifest
            name="sp1024",
            repo="willdepueoai/parameter-golf",
            folder="fineweb10B_sp1024",
            tokenizer="fineweb_1024_bpe.model",
            tokenizer_sha256="849ea920119b5135ace5016137e82ab397738fc29d723d5f9a6b74c4e31af191",
            vocab_size=1024,
            val_tokens=(62_021_846, 62_021_846),
            val_md5="273215f9cba7c4aa14873e2e8acc14d8",  # of one record's readme; no second source
        ),
        Published(  # listed by the project; whether it is published has changed (parameter-golf #899)
            name="sp2048",
            repo="willdepueoai/parameter-golf",
            folder="fineweb10B_sp2048",
            tokenizer="fineweb_2048_bpe.model",
            tokenizer_sha256="ba9892fc3502b8c5f649e838bbf825cd1b929a092c010854c8784351151d2745",
            vocab_size=2048,
            val_tokens=None,
        ),
        Published(
            name="sp4096",
            repo="kevclark/parameter-golf",
            folder="fineweb10B_sp4096",
            tokenizer="fineweb_4096_bpe.model",
            tokenizer_sha256="d76de35070ed9feb76afe3a7efc3a1a0e91e9aa4978360ecdc7fbc22a9725512",
            vocab_size=4096,
            val_tokens=_scored(45_508_608),
        ),
        Published(
            name="sp8192",
            repo="kevclark/parameter-golf",
            folder="fineweb10B_sp8192",
            tokenizer="fineweb_8192_bpe.model",
            tokenizer_sha256="4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516",
            vocab_size=8192,
            val_tokens=_scored(40_540_160),
        ),
    )
}


def variant(name: str, table: Sequence[Published] | None = None) -> Published:
    """The variant called `name`; UserError with the choices when there is none."""
    for known in PUBLISHED.values() if table is None else table:
        if known.name == name:
            return known
    raise UserError(f"there are no published shards called {name!r}: choose one of {', '.join(PUBLISHED)}")


def made_with(tokenizer_sha256: str) -> Published | None:
    """The variant whose tokenizer has this hash."""
    return next((known for known in PUBLISHED.values() if known.tokenizer_sha256 == tokenizer_sha256), None)
