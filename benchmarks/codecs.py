"""Compare the artifact's codecs on the integer matrices of a model file, or on synthetic ones.

    python benchmarks/codecs.py run/model.epigram
    python benchmarks/codecs.py --synthetic --layers 12
    python benchmarks/codecs.py run/model.epigram --by-class --codec entropy

Columns: stored bytes of all codes (scales and the rest of a file are the same for every codec); bits a
weight; the saving against brotli, and against an ideal fixed table for each matrix (its order-0 entropy); the
distance to the entropy of the codec's own model; seconds to encode and to decode on one core. Every codec's
output is decoded and compared. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from epigram import plugin
from epigram.artifact.codecs.base import Codes, Layout, order0_bits, tensor_class
from epigram.artifact.table import CODECS
from epigram.artifact.tensors import load
from epigram.quantized import QuantizedTensor

Matrices = list[tuple[Layout, Codes]]
Row = dict[str, Any]
SIGMAS = 7.0  # of the synthetic codes: standard deviations that 31 steps reach


def from_file(path: Path) -> Matrices:
    """The integer matrices of a model file, in order."""
    tensors = load(path).tensors
    quantized = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}
    return [
        (layout(name, tensor.codes.numpy(), tensor.qmax, tensor.scale.numpy()), tensor.codes.numpy())
        for name, tensor in quantized.items()
    ]


def layout(name: str, codes: Codes, qmax: int, scale: np.ndarray) -> Layout:
    rows, cols = codes.shape
    return Layout(name=name, rows=rows, cols=cols, qmax=qmax, scale=scale)


def synthetic(num_layers: int, dim: int, seed: int) -> Matrices:
    """Matrices shaped like pr1212's, with what trained ones have: Gaussians whose spread is a product of a
    row's and a column's, neurons that are strong or weak in both `up` and `down`, steps proportional to
    each row's spread."""
    random = np.random.default_rng(seed)
    channel = np.exp(random.normal(0, 0.1, dim))
    result: Matrices = []
    for i in range(num_layers):
        neuron = np.exp(random.normal(0, 0.35, 3 * dim))
        shapes = {"q": dim, "k": dim // 2, "v": dim // 2, "out": dim}
        spreads = {name: (np.exp(random.normal(0, 0.06, rows)), channel) for name, rows in shapes.items()}
        spreads |= {"up": (neuron, channel), "down": (channel, neuron)}
        for name, (row, col) in spreads.items():
            weights = random.standard_normal((len(row), len(col))) * row[:, None] * col * 0.1
            scale = (SIGMAS / 31 * weights.std(axis=1)).astype(np.float16)
            codes = np.rint(weights / scale[:, None]).clip(-31, 31).astype(np.int8)
            result.append((layout(f"layers.{i}.{name}", codes, 31, scale), codes))
    return result


def by_class(matrices: Matrices) -> dict[str, Matrices]:
    groups: dict[str, Matrices] = {}
    for matrix in matrices:
        groups.setdefault(tensor_class(matrix[0].name), []).append(matrix)
    return groups


def num_codes(matrices: Matrices) -> int:
    return sum(codes.size for _, codes in matrices)


def measure(codec: str, groups: dict[str, Matrices]) -> Row:
    """Encode and decode with one codec; raises AssertionError if anything comes back changed."""
    module = plugin.load(CODECS, codec)
    encoder, decoder = module.new_encoder(), module.new_decoder()
    start_s = time.perf_counter()
    encoded = {name: encoder.encode(group) for name, group in groups.items()}
    encode_s = time.perf_counter() - start_s
    decode_s = 0.0
    for name, group in groups.items():
        start_s = time.perf_counter()
        decoded = decoder.decode(encoded[name].stored, [found for found, _ in group])
        decode_s += time.perf_counter() - start_s
        for (found, codes), result in zip(group, decoded, strict=True):
            assert np.array_equal(result, codes), f"{codec} changed {found.name}"
    model_bits = [one.model_bits for one in encoded.values()]
    size = sum(len(one.stored) for one in encoded.values())
    return {
        "codec": codec,
        "bytes": size,
        "bits_per_weight": 8 * size / sum(map(num_codes, groups.values())),
        "over_model": None if None in model_bits else 8 * size / sum(bits or 0.0 for bits in model_bits) - 1,
        "encode_s": encode_s,
        "decode_s": decode_s,
        "class_bytes": {name: len(one.stored) for name, one in encoded.items()},
    }


def print_table(rows: list[Row], order0_bytes: float) -> None:
    brotli = next((row["bytes"] for row in rows if row["codec"] == "brotli"), None)
    print(f"{'codec':10}{'bytes':>13}{'bits':>9}{'vs brotli':>11}{'vs order 0':>12}{'over model':>12}", end="")
    print(f"{'encode s':>10}{'decode s':>10}")
    for row in rows:
        over = "" if row["over_model"] is None else f"{100 * row['over_model']:+.4f} %"
        print(
            f"{row['codec']:10}{row['bytes']:13,}{row['bits_per_weight']:9.4f}{percent(row['bytes'], brotli):>11}"
            f"{percent(row['bytes'], order0_bytes):>12}{over:>12}{row['encode_s']:10.1f}{row['decode_s']:10.1f}"
        )


def percent(size: float, reference: float | None) -> str:
    return "" if not reference else f"{100 * (size / reference - 1):+.2f} %"


def print_classes(rows: list[Row], groups: dict[str, Matrices]) -> None:
    """Bits a weight of each class, by codec, beside the order-0 entropy."""
    print(f"\n{'class':24}{'weights':>12}{'order 0':>9}" + "".join(f"{row['codec']:>9}" for row in rows))
    for name, group in groups.items():
        weights = num_codes(group)
        bits = [sum(order0_bits(codes) for _, codes in group) / weights]
        bits += [8 * row["class_bytes"][name] / weights for row in rows]
        print(f"{name:24}{weights:12,}" + "".join(f"{value:9.4f}" for value in bits))


def parse(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a .epigram file")
    parser.add_argument("--synthetic", action="store_true", help="make matrices instead of reading a file")
    parser.add_argument("--layers", type=int, default=12, help="of the synthetic model")
    parser.add_argument("--dim", type=int, default=512, help="of the synthetic model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", action="append", choices=plugin.names(CODECS), help="default: all of them")
    parser.add_argument("--by-class", action="store_true", help="a second table, by class of matrix")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.synthetic == (options.file is not None):
        parser.error("give a .epigram file, or --synthetic")
    return options


def main(arguments: Iterable[str] | None = None) -> None:
    options = parse(arguments)
    if options.synthetic:
        matrices = synthetic(options.layers, options.dim, options.seed)
    else:
        matrices = from_file(options.file)
    groups = by_class(matrices)
    order0_bytes = sum(order0_bits(codes) for _, codes in matrices) / 8
    print(f"{num_codes(matrices):,} codes, order-0 entropy {8 * order0_bytes / num_codes(matrices):.4f} bits")
    rows = [measure(codec, groups) for codec in options.codec or plugin.names(CODECS)]
    print_table(rows, order0_bytes)
    if options.by_class:
        print_classes(rows, groups)
    print(json.dumps({"codes": num_codes(matrices), "order0_bytes": round(order0_bytes), "codecs": rows}))


if __name__ == "__main__":
    main()
