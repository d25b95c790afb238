"""Download through faults: `python benchmarks/fetch_soak.py [--faults 1000] [--seconds 480]`.

A server on the loopback that speaks the hub's protocol breaks, delays, cuts and falsifies what it sends, at random from
a seed, until so many faults have been met. Every round fetches a variant anew (sometimes killing a fetch in between)
and compares each file with the original. A fault may end in the right files or in an error; anything else fails.
Prints a table and one line of JSON.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))

from fake_hub import API_FAULTS, REPO, STORE_FAULTS, FakeHub

from epigram.data.fetch import fetch
from epigram.data.published import Published
from epigram.data.shards import header_bytes
from epigram.errors import UserError

FOLDER = "datasets/datasets/fineweb10B_soak"
VOCAB_SIZE, VAL_TOKENS = 1024, 40_000
MODEL = b"stands for a tokenizer"
VARIANT = Published(
    name="soak",
    repo=REPO,
    folder="fineweb10B_soak",
    tokenizer="soak.model",
    tokenizer_sha256=hashlib.sha256(MODEL).hexdigest(),
    vocab_size=VOCAB_SIZE,
    val_tokens=(VAL_TOKENS, VAL_TOKENS),
)


def make_files(draw: np.random.Generator) -> dict[str, bytes]:
    def shard(num_tokens: int) -> bytes:
        return header_bytes(num_tokens) + draw.integers(0, VOCAB_SIZE, num_tokens).astype("<u2").tobytes()

    train = {f"{FOLDER}/fineweb_train_{i:06d}.bin": shard(60_000) for i in range(6)}
    return {**train, f"{FOLDER}/fineweb_val_000000.bin": shard(VAL_TOKENS), "datasets/tokenizers/soak.model": MODEL}


def round_of_faults(hub: FakeHub, folder: Path, draw: random.Random, most: int) -> str:
    """One fetch through up to `most` faults: "right" or "error", after comparing every file that has its name."""
    hub.store_faults.extend(draw.choices(STORE_FAULTS, k=draw.randint(1, min(most, 40))))
    hub.api_faults.extend(draw.choices(API_FAULTS, k=draw.randint(0, 3)))
    if draw.random() < 0.1:
        hub.store_faults.extend([draw.choice(["flipped byte", "page", "500"])] * min(most, 60))  # more than is borne
    try:
        fetch("soak", folder, endpoint=hub.endpoint, table=[VARIANT], wait_s=0.002)
        outcome = "right"
    except UserError:
        outcome = "error"
    originals = {path.rpartition("/")[2]: contents for path, contents in hub.files.items()}
    found = {path.name for path in folder.glob("*") if not path.name.startswith(".")} - {"fetched.json"}
    for name in found:
        assert (folder / name).read_bytes() == originals[name], f"{name} is wrong after {hub.used[-40:]}"
    assert outcome == "error" or found == set(originals), f"{set(originals) - found} are missing"
    hub.store_faults.clear()
    hub.api_faults.clear()
    return outcome


def impatient() -> None:
    """Make the library keep small parts, give up a silent connection soon, and hardly sleep."""
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 8192
    constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.2  # type: ignore[assignment]
    sleep = time.sleep
    http.time.sleep = lambda seconds: sleep(min(seconds, 0.005))
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    impatient()
    draw, start_s = random.Random(arguments.seed), time.monotonic()
    outcomes: collections.Counter[str] = collections.Counter()
    with FakeHub(make_files(np.random.default_rng(arguments.seed))) as hub, tempfile.TemporaryDirectory() as place:
        hub.stall_s = 0.4
        rounds = 0
        while (left := arguments.faults - len(hub.used)) > 0 and time.monotonic() - start_s < arguments.seconds:
            folder = Path(place) / str(rounds)
            outcome = round_of_faults(hub, folder, draw, left)
            if outcome == "error":  # whoever tries again gets the right files, from what is left of the first try
                with contextlib.redirect_stderr(io.StringIO()):
                    fetch("soak", folder, endpoint=hub.endpoint, table=[VARIANT], wait_s=0.002)
                originals = {path.rpartition("/")[2]: contents for path, contents in hub.files.items()}
                assert all((folder / name).read_bytes() == one for name, one in originals.items())
            outcomes[outcome] += 1
            rounds += 1
        kinds = collections.Counter(hub.used)
    for kind, count in sorted(kinds.items()):
        print(f"{kind:16} {count:5}")
    result: dict[str, Any] = {
        "faults": sum(kinds.values()),
        "rounds": rounds,
        "ended_right": outcomes["right"],
        "ended_in_an_error": outcomes["error"],
        "wrong_files": 0,  # the first would have ended the script
        "seconds": round(time.monotonic() - start_s, 1),
    }
    print(json.dumps(result))
    sys.exit(0 if sum(kinds.values()) >= arguments.faults else 1)


if __name__ == "__main__":
    main()
