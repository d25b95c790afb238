"""Time a build: `python benchmarks/build.py SOURCE... --tokenizer FILE [--val SOURCE] [--workers 1 2] [--repeat 1]`.

Builds the sources with each number of workers, compares the folders byte for byte, and measures the tokenizer alone in
one process on text of the same sources just before and after. What counts is the share of workers x that speed which
the build reaches, reading, proof, hashing and writing included. On a machine that others use too, the wall clock
measures them as well: `cpu_share` is the same from processor time, what the text costs one process over what the build
cost all of its processes, and is the share that the build would reach with the machine to itself as long as the main
process keeps up (`main_cpu_share`, of the build's wall clock at that speed, is below 1). Prints a table and a line of
JSON.
"""

import argparse
import hashlib
import itertools
import json
import os
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from epigram.data.build import build
from epigram.data.clean import Cleaning
from epigram.data.encode import EncodeJob, Encoder
from epigram.data.gather import gather
from epigram.data.tokenizer import Tokenizer
from epigram.data.works import Work, works

SAMPLE_PARTS = 24  # of about a MiB, that the single process encodes


def sample(sources: list[str]) -> list[Work]:
    """Parts from the files to train on, read before the clock starts."""
    files = gather(sources).files
    return list(itertools.islice(works(files, sorted({file.split for file in files}), "text"), SAMPLE_PARTS))


def single_speed(parts: list[Work], tokenizer: Tokenizer) -> tuple[float, float]:
    """MB of text that one process encodes in a second of the wall clock, and of processor time; proof and hashes
    included."""
    job = EncodeJob(tokenizer=tokenizer, field="text", cleaning=Cleaning(), transform="", limit=0, seed=0)
    encoder = Encoder(job)
    encoder.encode(parts[0].part, "train")  # fills its caches
    wall_s, cpu_s, num_bytes = time.perf_counter(), time.process_time(), 0
    for part in parts[1:]:
        num_bytes += int(encoder.encode(part.part, "train").original_bytes.sum())
    return num_bytes / 1e6 / (time.perf_counter() - wall_s), num_bytes / 1e6 / (time.process_time() - cpu_s)


def cpu_seconds(who: int) -> float:
    """Processor time so far of this process, or of its ended children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def digest(folder: Path) -> str:
    """Hash of all files of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


class PeakMemory:
    """Peak of the resident memory of this process and its children, in MB, sampled."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self.peak = max(self.peak, sum(map(_resident_mb, [os.getpid(), *_children()])))


def _children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _resident_mb(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--val", action="append", default=[])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    tokenizer, parts = Tokenizer.from_file(arguments.tokenizer), sample(arguments.sources)
    rows: list[dict[str, Any]] = []
    digests = set()
    for workers in arguments.workers:
        before = single_speed(parts, tokenizer)
        main_s, children_s = cpu_seconds(resource.RUSAGE_SELF), cpu_seconds(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as place, PeakMemory() as memory:
            start_s = time.perf_counter()
            out = Path(place) / "out"
            built = build(
                arguments.sources, out, val_sources=arguments.val, tokenizer_file=arguments.tokenizer, workers=workers
            )
            seconds = time.perf_counter() - start_s
            main_s = cpu_seconds(resource.RUSAGE_SELF) - main_s
            children_s = cpu_seconds(resource.RUSAGE_CHILDREN) - children_s
            digests.add(digest(out))
        after = single_speed(parts, tokenizer)
        splits = built.manifest.splits.values()
        megabytes = sum(split.original_bytes for split in splits) / 1e6
        single, single_cpu = (before[0] + after[0]) / 2, (before[1] + after[1]) / 2
        rows.append(
            {
                "workers": workers,
                "seconds": round(seconds, 1),
                "mb": round(megabytes, 1),
                "mb_per_s": round(megabytes / seconds, 2),
                "documents_per_s": round(sum(split.documents for split in splits) / seconds),
                "single_mb_per_s": round(single, 2),
                "share": round(megabytes / seconds / workers / single, 3),
                "single_mb_per_cpu_s": round(single_cpu, 2),
                "main_cpu_s": round(main_s, 1),
                "workers_cpu_s": round(children_s, 1),
                "cpu_share": round(megabytes / single_cpu / (main_s + children_s), 3),
                "main_cpu_share": round(main_s / (megabytes / single_cpu / workers), 3),
                "peak_mb": round(memory.peak),
            }
        )
        print("   ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    assert len(digests) == 1, "the number of workers changed the data"
    print(json.dumps({"rows": rows, "identical": True}))


if __name__ == "__main__":
    main()
