"""`epigram data fetch`: published token shards into a folder that can be trained on, every byte verified.

Each file is downloaded beside its place (`data.hub`), compared with the length and hash that the hub states, looked
into (header, token count, ids), and only then gets its name. `fetched.json` keeps what was verified: repository,
commit, and for each file bytes, tokens and hash. A second call downloads what is missing, and hashes again only what
was touched since.
"""

import concurrent.futures
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epigram.data.files import held_alone, sha256_of
from epigram.data.hub import Hub, HubFile, mismatch, partial_path
from epigram.data.published import Published, variant
from epigram.data.shards import HEADER_BYTES, SHARD_TOKENS, TOKEN_BYTES, open_shard
from epigram.data.validation import Fetched, FetchedFile, Validation, look_at, read_fetched, write_fetched
from epigram.errors import DataError, UserError
from epigram.progress import Progress

_SHARD = re.compile(r"fineweb_(train|val)_(\d{6})\.bin")
_SPARE_BYTES = 256 << 20  # left free on the disk
_PIECE_TOKENS = 1 << 24  # looked at at once
PARALLEL = 4  # files at a time


@dataclass(frozen=True, kw_only=True)
class Result:
    """What lies in the folder now, and sentences that the user should read."""

    path: Path
    fetched: Fetched
    notes: tuple[str, ...]


def fetch(
    name: str,
    out: str | Path,
    *,
    shards: int | None = None,
    allow_other_validation: bool = False,
    endpoint: str | None = None,
    revision: str | None = None,
    parallel: int = PARALLEL,
    wait_s: float = 1.0,
    table: Sequence[Published] | None = None,
) -> Result:
    """Bring the tokenizer, the validation split and the first `shards` training shards of variant `name` to `out`.

    shards: by default as many as published scripts use, or all where there are fewer. allow_other_validation: accept a
    validation split that is not the published one, and have every score say so. revision: of the repository, its
    newest by default. parallel: files downloaded at a time. table: of variants, instead of the published ones.
    endpoint, wait_s: see `data.hub.Hub`.

    A folder that is complete already needs no hub. Raises UserError for a name, a number of shards or a folder that
    cannot be, DataError for what cannot be downloaded or is not what it should be; whatever arrived is kept.
    """
    wanted, out = variant(name, table), Path(out)
    if shards is not None and shards < 1:
        raise UserError(f"shards = {shards} must be at least 1")
    record = _check_place(out, wanted)
    hub = Hub(endpoint, wait_s)
    try:
        listed = hub.list_files(wanted.repo, revision)
    except UserError as error:
        if record is None or record.commit is None or revision is not None or _count(record) < (shards or 1):
            raise
        return _without_hub(out, record, wanted, shards, str(error))
    files, others = _choose(listed, wanted, shards)
    _check_listed(files, wanted, record, allow_other_validation)
    out.mkdir(parents=True, exist_ok=True)
    with held_alone(out):
        kept = _kept(out, files, others, record)
        todo = [file for file in files if not _is_here(out, file, record)]
        _check_disk(out, todo)
        _bring(hub, todo, out, wanted, parallel)
        entries = {file.name: _entry(out / file.name, file) for file in [*files, *kept]}
        validation = _validation(out, wanted, files, record, allow_other_validation)
        fetched = Fetched(
            name=wanted.name,
            repo=wanted.repo,
            commit=files[0].commit,
            files=dict(sorted(entries.items())),
            validation=validation,
        )
        write_fetched(out, fetched)
    return Result(path=out, fetched=fetched, notes=tuple(_notes(validation, wanted, shards, _count(fetched))))


def _notes(validation: Validation, wanted: Published, shards: int | None, count: int) -> list[str]:
    notes = [] if validation.problem is None else [f"every score will say: {validation.text}"]
    if wanted.val_tokens is None:
        notes.append(f"nothing is known of the validation split of {wanted.name} but what the hub says")
    if shards is None and count < wanted.train_shards:
        notes.append(f"the hub has {count} training shards, fewer than the usual {wanted.train_shards}")
    return notes


def _check_place(out: Path, wanted: Published) -> Fetched | None:
    """The record in `out`, if there is one; UserError when `out` holds something else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file: name a folder")
    record = read_fetched(out)
    if record is not None and record.name != wanted.name:
        raise UserError(f"{out} holds {record.name} already: name another folder for {wanted.name}")
    if (out / "manifest.json").exists():
        raise UserError(f"{out} is a data folder that was built here: name another")
    return record


def _choose(files: list[HubFile], wanted: Published, shards: int | None) -> tuple[list[HubFile], list[HubFile]]:
    """The files of the variant, tokenizer and validation first, and the training shards that are not asked for."""
    found: dict[str, dict[int, HubFile]] = {"train": {}, "val": {}}
    tokenizers = [file for file in files if file.name == wanted.tokenizer]
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match and file.path.split("/")[-2:-1] == [wanted.folder]:
            if twin := found[match[1]].get(int(match[2])):
                raise DataError(f"{wanted.repo} has {twin.path} and {file.path}, one of which is wrong: tell its owner")
            found[match[1]][int(match[2])] = file
    if not found["val"] or not found["train"] or not tokenizers:
        folders = sorted({file.path.rpartition("/")[0] for file in files if _SHARD.fullmatch(file.name)})
        raise UserError(
            f"{wanted.repo} does not hold {wanted.folder} with {wanted.tokenizer} (it has "
            f"{', '.join(folders) or 'no shards'}): it is not published there now, so build it from text with "
            "`epigram data build`"
        )
    for split, numbered in found.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise DataError(f"{wanted.repo} has gaps in the {split} shards of {wanted.folder}: tell its owner")
    val, train = ([found[split][index] for index in sorted(found[split])] for split in ("val", "train"))
    if shards is not None and shards > len(train):
        raise UserError(f"{wanted.name} has {len(train)} training shards, not {shards}: ask for fewer")
    count = shards or min(len(train), wanted.train_shards)
    return [tokenizers[0], *val, *train[:count]], train[count:]


def _check_listed(files: list[HubFile], wanted: Published, record: Fetched | None, allowed: bool) -> None:
    """DataError for what the hub's own listing shows to be wrong, before anything is downloaded or replaced."""
    met: dict[str, HubFile] = {}
    for file in files:
        if twin := met.get(file.stated_hash):
            raise DataError(f"{twin.path} and {file.name} of {file.repo} have the same contents: tell its owner")
        met[file.stated_hash] = file
    val = [file for file in files if file.name.startswith("fineweb_val")]
    problem = wanted.problem(sum((file.num_bytes - HEADER_BYTES) // TOKEN_BYTES for file in val))
    if problem is None and record is not None and all(file.sha256 for file in val):
        problem = record.validation.differs(tuple(file.stated_hash for file in val))
    _refuse_validation(problem, wanted, allowed)


def _kept(out: Path, files: list[HubFile], others: list[HubFile], record: Fetched | None) -> list[HubFile]:
    """Training shards that lie in the folder beyond those asked for; DataError for one that the hub does not have."""
    asked, further = {file.name for file in files}, {file.name: file for file in others}
    lying = [path for path in sorted(out.iterdir()) if _SHARD.fullmatch(path.name) and path.name not in asked]
    strange = [p.name for p in lying if p.name not in further or not _is_here(out, further[p.name], record)]
    if strange:
        raise DataError(
            f"{out} holds {', '.join(strange[:3])}{' and others' * (len(strange) > 3)}, not as the hub has it now, and "
            "whoever uses the folder would read it: remove it, fetch as many shards anew, or fetch to another folder"
        )
    return [further[path.name] for path in lying]


def _count(record: Fetched) -> int:
    return sum(name.startswith("fineweb_train_") for name in record.files)


def _is_here(out: Path, file: HubFile, record: Fetched | None) -> bool:
    """Whether the very file is in the folder; what the record does not vouch for is hashed."""
    path = out / file.name
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    known = record.files.get(file.name) if record else None
    if known is not None and file.sha256 is not None and known.mtime_ns == path.stat().st_mtime_ns:
        return known.sha256 == file.sha256
    return mismatch(path, file) is None


def _check_disk(out: Path, todo: list[HubFile]) -> None:
    partials = [partial_path(out / file.name, file) for file in todo]
    needed = sum(file.num_bytes for file in todo) - sum(path.stat().st_size for path in partials if path.exists())
    free = shutil.disk_usage(out).free
    if todo and needed + _SPARE_BYTES > free:
        raise DataError(
            f"{needed / 1e9:,.2f} GB are to be downloaded, and the disk of {out} has {free / 1e9:,.2f} GB free: free "
            "some space, ask for fewer shards, or write to another disk"
        )


def _bring(hub: Hub, todo: list[HubFile], out: Path, wanted: Published, parallel: int) -> None:
    """Download and verify the files, several at a time; the first error ends all, and keeps what has arrived."""
    lock, arrived = threading.Lock(), 0
    with Progress("fetching", total=sum(file.num_bytes for file in todo) / 1e6, unit="MB") as progress:

        def on_bytes(num_bytes: int) -> None:
            nonlocal arrived
            with lock:
                arrived += num_bytes
                progress.update(arrived / 1e6)

        pool = concurrent.futures.ThreadPoolExecutor(parallel, thread_name_prefix="fetch")
        try:
            running = [pool.submit(_bring_one, hub, file, out, wanted, on_bytes) for file in todo]
            for future in concurrent.futures.as_completed(running):
                future.result()
        finally:
            hub.stop()  # no effect after a good end
            pool.shutdown(wait=True, cancel_futures=True)


def _bring_one(hub: Hub, file: HubFile, out: Path, wanted: Published, on_bytes: Callable[[int], None]) -> None:
    def verify(path: Path) -> None:
        if _SHARD.fullmatch(file.name):
            _check_shard(path, file, wanted)
        else:
            _check_tokenizer(path, wanted)

    hub.download(file, out / file.name, on_bytes, verify)


def _check_tokenizer(path: Path, wanted: Published) -> None:
    if (found := sha256_of(path)) != wanted.tokenizer_sha256:
        raise DataError(
            f"{wanted.repo} has another {wanted.tokenizer} than the published one (sha256 {found[:16]}... instead of "
            f"{wanted.tokenizer_sha256[:16]}...), with which its shards would be scored wrongly: tell its owner"
        )


def _check_shard(path: Path, file: HubFile, wanted: Published) -> None:
    """DataError for a shard that cannot be one of the variant, though it is what the hub has."""
    shard = open_shard(path, "train")  # checks header and length
    if not 0 < shard.num_tokens <= SHARD_TOKENS:
        raise DataError(f"{file.path} of {file.repo} promises {shard.num_tokens:,} tokens: a shard has up to 10^8")
    tokens = shard.tokens
    for start in range(0, len(tokens), _PIECE_TOKENS):
        if (largest := int(tokens[start : start + _PIECE_TOKENS].max())) >= wanted.vocab_size:
            raise DataError(
                f"{file.path} of {file.repo} holds the id {largest}, beyond the vocabulary of {wanted.vocab_size:,}: "
                "it belongs to another tokenizer"
            )


def _entry(path: Path, file: HubFile) -> FetchedFile:
    tokens = open_shard(path, "train").num_tokens if _SHARD.fullmatch(file.name) else 0
    stat = path.stat()
    return FetchedFile(
        bytes=stat.st_size, tokens=tokens, sha256=file.sha256 or sha256_of(path), mtime_ns=stat.st_mtime_ns
    )


def _validation(
    out: Path, wanted: Published, files: list[HubFile], record: Fetched | None, allowed: bool
) -> Validation:
    """The validation split that was fetched; DataError when it is not the published one and may not be another."""
    shards = [open_shard(out / file.name, "val") for file in files if file.name.startswith("fineweb_val")]
    found = look_at(wanted, shards, record.validation if record else None)
    _refuse_validation(found.problem, wanted, allowed)
    return found


def _refuse_validation(problem: str | None, wanted: Published, allowed: bool) -> None:
    if problem is not None and not allowed:
        raise DataError(
            f"{problem}: what {wanted.repo} has now is not the canonical split, and scores on it could not be "
            "compared with any other; fetch again with --allow-other-validation if it is meant"
        )


def _without_hub(out: Path, record: Fetched, wanted: Published, shards: int | None, why: str) -> Result:
    """Accept a folder as it is, each file verified against the record. why: the hub is not asked."""
    for name, known in record.files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != known.bytes or sha256_of(path) != known.sha256:
            raise DataError(
                f"{path} is not the file that was fetched, and the hub cannot be asked: fetch again with a connection"
            )
    notes = [f"every file is what was fetched before; the hub has not confirmed it ({why})"]
    return Result(path=out, fetched=record, notes=tuple(notes + _notes(record.validation, wanted, shards or 1, 0)))
