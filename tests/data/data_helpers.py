"""What the tests of the data layer share: made-up text, odd tokenizers, folders of files."""

import io
import random
from pathlib import Path

import numpy as np
import sentencepiece

from epigram.data.shards import Shard, write_shard

_SYLLABLES = ["ka", "lo", "mi", "te", "ru", "sa", "no", "vi", "be", "dor", "an", "el", "ist", "um", "ple"]


def make_documents(count: int, seed: int, words: int = 120) -> list[str]:
    """Documents of made-up words in sentences, with paragraphs, indented lines, digits and some other scripts."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(400)]
    documents = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(words // 2, words)):
            word = draw.choice(lexicon)
            ending = draw.choices([" ", ". ", ",\n", "\n\n", "\n    ", "  ", "\t"], [40, 4, 2, 1, 2, 1, 1])[0]
            parts.append((word.capitalize() if ending == ". " else word) + ending)
        extra = draw.choice(["", " é", " 日本", " 😀", f" {draw.randint(0, 99999)}"])
        documents.append("".join(parts) + extra)
    return documents


def train_with(texts: list[str], **settings: object) -> bytes:
    """A model with arbitrary settings of the trainer, for what `train_tokenizer` would never make."""
    model = io.BytesIO()
    chosen = {
        "model_type": "bpe",
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "minloglevel": 2,
        "num_threads": 1,
    } | settings
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **chosen)
    return model.getvalue()


def write_shards(folder: Path, lengths: list[int], *, split: str = "train", vocab_size: int = 1000) -> list[Shard]:
    """Shards whose tokens tell where they come from: token t of shard s is (1009 s + t) mod `vocab_size`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_shard(
            folder / f"x_{split}_{i:06d}.bin",
            ((1009 * i + np.arange(n)) % vocab_size).astype(np.uint16),
            split,
        )
        for i, n in enumerate(lengths)
    ]


def listing(folder: Path) -> dict[str, bytes]:
    """All files under a folder with their contents, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
