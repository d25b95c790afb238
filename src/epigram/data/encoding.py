"""The second reading of a build: every document into its split, in order, with a journal to go on from."""

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epigram.data.clean import NEAR, PERMUTATIONS, Cleaning, HashSet, is_member, signature
from epigram.data.encode import EncodedBatch, EncodeJob, encode_all
from epigram.data.gather import BY_HASH, SourceFile
from epigram.data.journal import Entry, Journal, read_entry
from epigram.data.manifest import SPLITS, Settings, SplitEntry
from epigram.data.split_writer import SplitWriter, count_shared
from epigram.data.spool import Spool
from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms.base import load as load_transform
from epigram.data.works import START, Place, Work, works
from epigram.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides every byte of a data folder. limit: see `survey.val_limit`, 0 where files name their splits."""

    files: tuple[SourceFile, ...]
    tokenizer: Tokenizer
    settings: Settings
    cleaning: Cleaning
    limit: int


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One pass over the files of some splits; `keep` says whose documents are taken."""

    splits: tuple[str, ...]
    keep: str


class Encoding:
    """Encodes all documents of a plan into `folder`, going on where its journal says.

    documents: read of each file, after the end.
    """

    def __init__(self, plan: Plan, folder: Path, fingerprint: str, workers: int, spool: Spool) -> None:
        self._plan, self._folder, self._workers, self._spool = plan, folder, workers, spool
        self._journal, self._fingerprint = Journal(folder), fingerprint
        self._entry = read_entry(folder)
        assert self._entry is None or self._entry.fingerprint == fingerprint, "the folder belongs to another build"
        self.documents = self._entry.documents if self._entry else [0] * len(plan.files)
        self._duplicates = self._entry.duplicates if self._entry else 0
        self._repeated = dict(self._entry.repeated) if self._entry else dict.fromkeys(SPLITS, 0)
        self._met = HashSet()
        self._in_val: NDArray[np.uint64] | None = None  # sorted hashes, once the files of val are through

    def run(self, total_input_bytes: int) -> dict[str, SplitEntry]:
        """Everything; returns the splits as the manifest describes them."""
        state = self._entry.writers if self._entry else dict.fromkeys(SPLITS)
        passes = self._passes()
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    SplitWriter(
                        self._folder,
                        split,
                        self._plan.settings.shard_tokens,
                        byte_counts=split == "val" and bool(self._plan.settings.transform),
                        state=state[split],
                    )
                )
                for split in SPLITS
            }
            if self._plan.cleaning.dedup != "none":
                self._met = HashSet(np.concatenate([writer.hashes_so_far() for writer in writers.values()]))
            first, place = (self._entry.phase, self._entry.place) if self._entry else (0, START)
            total = total_input_bytes * len([one for one in passes if BY_HASH in one.splits] or [0])
            with Progress("encoding", total=total / 1e6, unit="MB of files") as progress:
                for phase in range(first, len(passes)):
                    self._run_pass(phase, passes[phase], place if phase == first else START, writers, progress)
        splits = {split: replace(writer.entry(), repeated=self._repeated[split]) for split, writer in writers.items()}
        shared = count_shared(self._folder, splits, 0)
        splits["train"] = replace(splits["train"], duplicates=self._duplicates, shared_starts=shared)
        return splits

    def _passes(self) -> list[_Pass]:
        """One over all files, those of val first. What is like a validation document can only be told when all of these
        are known: then files without a split are read twice."""
        if self._plan.cleaning.dedup == "near":
            return [_Pass(splits=("val", BY_HASH), keep="val"), _Pass(splits=("train", BY_HASH), keep="train")]
        return [_Pass(splits=("val", "train", BY_HASH), keep="both")]

    def _run_pass(
        self, phase: int, one: _Pass, start: Place, writers: dict[str, SplitWriter], progress: Progress
    ) -> None:
        near = self._signatures(writers["val"]) if phase and self._plan.cleaning.dedup == "near" else None
        job = EncodeJob(
            tokenizer=self._plan.tokenizer,
            field=self._plan.settings.field,
            cleaning=self._plan.cleaning,
            transform=self._plan.settings.transform,
            limit=self._plan.limit,
            seed=self._plan.settings.seed,
            keep=one.keep,
            near=near,
        )
        todo = works(self._plan.files, one.splits, self._plan.settings.field, start, self._spool.local)
        with contextlib.closing(encode_all(job, todo, self._workers)) as batches:
            file = start[0]
            for work, batch in batches:
                self._write(work, batch, writers, count=one.keep != "train" or work.split == "train")
                progress.advance((batch.rest is None) * work.part.input_bytes / 1e6)
                if batch.rest is not None:
                    continue
                for done in self._plan.files[file : work.file]:
                    self._spool.release(done)
                file = work.file
                if self._journal.is_due():
                    self._note(phase, work.after, writers)
        if self._journal.has_written:
            self._note(phase + 1, START, writers)

    def _write(self, work: Work, batch: EncodedBatch, writers: dict[str, SplitWriter], count: bool) -> None:
        """Deal the documents of a batch to the splits."""
        if count:
            for index, number in work.documents or ((work.file, batch.num_read),):
                self.documents[index] += number
        kept, whole = batch.reasons == 0, batch.hashes[:, 1]
        if self._in_val is None and work.split != "val":
            self._in_val = np.unique(writers["val"].hashes_so_far())
        known = np.zeros(len(kept), np.bool_)
        if self._in_val is not None:
            known = ~batch.is_val & (kept | (batch.reasons == NEAR)) & is_member(whole, self._in_val)
        self._duplicates += int(np.count_nonzero(known))
        repeated = np.zeros(len(kept), np.bool_)
        if self._plan.cleaning.dedup != "none":
            candidates = kept & ~known
            repeated = candidates & ~self._met.add_new(whole, candidates)
            for split, of_split in (("val", batch.is_val), ("train", ~batch.is_val)):
                self._repeated[split] += int(np.count_nonzero(repeated & of_split))
        writers["val"].add(batch, batch.is_val & ~repeated)
        writers["train"].add(batch, ~batch.is_val & ~known & ~repeated)

    def _note(self, phase: int, place: Place, writers: dict[str, SplitWriter]) -> None:
        self._journal.write(
            Entry(
                fingerprint=self._fingerprint,
                phase=phase,
                place=place,
                documents=self.documents,
                duplicates=self._duplicates,
                repeated=self._repeated,
                writers={split: writer.state() for split, writer in writers.items()},
            )
        )

    def _signatures(self, writer: SplitWriter) -> NDArray[np.uint32]:
        """Of all validation documents, (N, PERMUTATIONS), taken from their tokens: whoever resumes has nothing else."""
        tokenizer, name = self._plan.tokenizer, self._plan.settings.transform
        decode = load_transform(name).decode if name else str
        texts = (decode(tokenizer.decode(document)) for document in writer.documents_so_far(tokenizer.bos_id))
        signatures = np.empty((writer.documents, PERMUTATIONS), np.uint32)
        for row, text in zip(signatures, _shown(texts, writer.documents), strict=True):
            row[:] = signature(text)
        return signatures


def _shown(texts: Iterable[str], count: int) -> Generator[str]:
    with Progress("signatures of validation documents", total=count, unit="documents") as progress:
        for text in texts:
            yield text
            progress.advance()
