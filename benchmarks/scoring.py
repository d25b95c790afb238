"""Compare ways to score a model: `python benchmarks/scoring.py RUN --data DATA [--tokens N] [--lengths L ...]`.

For each length: sliding windows on the first N tokens of the split, streaming on the same tokens, with other chunks,
overlaps at the seams and limits of the full-attention layers, and streaming on the whole split. Every row is measured
after a short one of the same kind, which compiles and allocates. Prints a table as it goes, and writes the rows to the
JSON file after each.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epigram.dist.context import open_context
from epigram.evaluation.windows import Method, StreamingConfig
from epigram.run.machine import computing, environment
from epigram.run.score import losses_for_scoring, open_both, score_split
from epigram.run.speed import scoring_work

CHUNKS = (1 / 4, 1 / 2, 1)  # of the tokens of a forward, with as many segments beside each other as fit
OVERLAPS = (0, 1, 4, 12)  # windows; 2 is the default
LIMITS = (3 / 4, 9 / 8, 3 / 2)  # of the length, for the layers with full attention
SEGMENT = 1 << 18
WARM_UP = 1 << 18  # tokens


def streaming(length: int, overlap: int = 2, **settings: Any) -> Method:
    segment = max(SEGMENT, (overlap + 1) * 2 * length)
    config = StreamingConfig(segment_tokens=segment, overlap=overlap, **settings)
    return Method(name="streaming", seq_len=length, stride=1, streaming=config)


def cases(
    lengths: list[int], stride: int, tokens: int, batch_tokens: int, full: list[bool]
) -> Iterator[tuple[str, Method, int]]:
    """What it is called, how it is scored, and on how many tokens (0: all). full: the layers without a window."""
    for length in lengths:
        yield f"sliding {length}/{stride}", Method(name="sliding", seq_len=length, stride=stride), tokens
        yield f"streaming {length}", streaming(length), tokens
        yield f"streaming {length}", streaming(length), 0
        for share in CHUNKS[:-1]:
            chunk = int(share * batch_tokens)
            yield f"streaming {length}, chunks of {chunk}", streaming(length, chunk_tokens=chunk), 0
        for overlap in OVERLAPS:
            yield f"streaming {length}, overlap {overlap}", streaming(length, overlap=overlap), tokens
        for share in LIMITS:
            limits = tuple(int(share * length) if is_full else 0 for is_full in full)
            yield f"streaming {length}, full layers see {int(share * length)}", streaming(length, limits=limits), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("scoring.json"))
    parser.add_argument("--tokens", type=int, default=3_000_000, help="what sliding and most rows score")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 6144])
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=196_608)
    parser.add_argument("--split", default="val")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with open_context(asked.device) as context:
        model, data = open_both(asked.run, asked.data, context)
        facts = {"run": str(asked.run), "machine": environment(**computing(context.device, context.world_size))}
        full = [not model.gpt.config.layer_window(layer) for layer in range(model.gpt.config.num_layers)]
        seq_len = 0
        for name, method, tokens in cases(asked.lengths, asked.stride, asked.tokens, asked.batch_tokens, full):
            if method.seq_len != seq_len:
                seq_len = method.seq_len
                losses = losses_for_scoring(model.gpt, context, scoring_work(seq_len, asked.batch_tokens))
            for most in (min(WARM_UP, tokens or WARM_UP), tokens):
                row = score_split(
                    losses, data, method, context, batch_tokens=asked.batch_tokens, split=asked.split, max_tokens=most
                )
            rows.append({"name": name, **row})
            if context.is_main:
                speed = row["tokens"] / row["score_s"]
                figures = f"{row['tokens']:>12,} tokens {row['val_bpb']:.5f} bpb {row['score_s']:8.2f} s"
                print(f"{name:45} {figures} {speed:>12,.0f}/s", flush=True)
                asked.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
