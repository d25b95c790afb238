"""Time a build: `python benchmarks/build.py SOURCE... --tokenizer FILE [--val SOURCE] [--workers 1 2] [--clock]`.

Builds the sources with each number of workers and compares the folders byte for byte. While a build runs, as many bare
processes encode text of the same sources that is in memory already. Whatever else the machine does meets both alike, so
`share`, the speed of the build over that of the bare processes together, tells what reading, passing on, hashing and
writing cost, even on a busy machine. `cpu_share` is the same of processor time: what the text costs a bare process over
what the build cost all of its processes. With `--clock` there are no bare processes: for the time that a build takes.
Prints a table and a line of JSON.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
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

SAMPLE_PARTS = 100  # of about a MiB, that a bare process encodes; fewer would be known by heart


def sample(sources: list[str]) -> list[Work]:
    """Parts from the files to train on, read before the clock starts."""
    files = gather(sources).files
    return list(itertools.islice(works(files, sorted({file.split for file in files}), "text"), SAMPLE_PARTS))


class Bare:
    """Processes that encode text over and over while the block runs; `speed` is that of all together in MB a second,
    `cpu_speed` of one in a second of processor time. Proof and hashes are included."""

    def __init__(self, parts: list[Work], tokenizer: Tokenizer, processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self._results: Any = context.Queue()
        self._ready, self._end = context.Barrier(processes + 1), context.Event()
        arguments = (parts, tokenizer, self._ready, self._end, self._results)
        self._running = [context.Process(target=_encode, args=arguments) for _ in range(processes)]

    def __enter__(self) -> "Bare":
        for process in self._running:
            process.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        found = [self._results.get() for _ in self._running]
        for process in self._running:
            process.join()
        self.speed = sum(speed for speed, _ in found)
        self.cpu_speed = sum(cpu_speed for _, cpu_speed in found) / max(len(found), 1)


def _encode(parts: list[Work], tokenizer: Tokenizer, ready: Any, end: Any, results: Any) -> None:
    job = EncodeJob(tokenizer=tokenizer, field="text", cleaning=Cleaning(), transform="", limit=0, seed=0)
    encoder = Encoder(job)
    encoder.encode(parts[0].part, "train")  # fills its caches
    ready.wait()
    wall_s, cpu_s, num_bytes = time.perf_counter(), time.process_time(), 0
    for part in itertools.cycle(parts):
        if end.is_set():
            break
        num_bytes += int(encoder.encode(part.part, "train").original_bytes.sum())
    results.put((num_bytes / 1e6 / (time.perf_counter() - wall_s), num_bytes / 1e6 / (time.process_time() - cpu_s)))


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
    """Peak of the resident memory of this process and its children (bare ones too), in MB, sampled."""

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
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    tokenizer, parts = Tokenizer.from_file(arguments.tokenizer), sample(arguments.sources)
    rows: list[dict[str, Any]] = []
    digests = set()
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            with Bare(parts, tokenizer, 0 if arguments.clock else workers) as bare, PeakMemory() as memory:
                main_s, children_s = cpu_seconds(resource.RUSAGE_SELF), cpu_seconds(resource.RUSAGE_CHILDREN)
                start_s = time.perf_counter()
                built = build(
                    arguments.sources,
                    out,
                    val_sources=arguments.val,
                    tokenizer_file=arguments.tokenizer,
                    workers=workers,
                )
                seconds = time.perf_counter() - start_s
                main_s = cpu_seconds(resource.RUSAGE_SELF) - main_s
                children_s = cpu_seconds(resource.RUSAGE_CHILDREN) - children_s
            digests.add(digest(out))
        splits = built.manifest.splits.values()
        megabytes = sum(split.original_bytes for split in splits) / 1e6
        row = {
            "workers": workers,
            "seconds": round(seconds, 1),
            "mb": round(megabytes, 1),
            "mb_per_s": round(megabytes / seconds, 2),
            "documents_per_s": round(sum(split.documents for split in splits) / seconds),
            "main_cpu_s": round(main_s, 1),
            "workers_cpu_s": round(children_s, 1),
            "peak_mb": round(memory.peak),
            "load": round(os.getloadavg()[0], 1),
        }
        if not arguments.clock:
            row |= {
                "bare_mb_per_s": round(bare.speed, 2),
                "share": round(megabytes / seconds / bare.speed, 3),
                "cpu_share": round(megabytes / bare.cpu_speed / (main_s + children_s), 3),
            }
        rows.append(row)
        print("   ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    assert len(digests) == 1, "the number of workers changed the data"
    print(json.dumps({"rows": rows, "identical": True}))


if __name__ == "__main__":
    main()
