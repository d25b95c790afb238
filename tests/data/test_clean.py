"""Cleaning: what is left out, and that it is counted; a planted validation document is always caught."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rensa
from data_helpers import make_documents
from hypothesis import given
from hypothesis import strategies as st

from epigram.data.build import Built, build
from epigram.data.check import check
from epigram.data.clean import NEAR_THRESHOLD, Cleaner, Cleaning, HashSet, num_bands, signature
from epigram.data.dataset import open_data
from epigram.data.tokenizer import Tokenizer
from epigram.errors import UserError

GERMAN = (
    "Der Hund lief über die Straße, und niemand wusste, warum er es so eilig hatte. Am Ende kam er nach Hause und "
    "legte sich in die Sonne, die schon tief über den Dächern stand. "
)
ENGLISH = (
    "The dog ran across the street, and nobody knew why it was in such a hurry. In the end it came home and lay "
    "down in the sun, which stood low above the roofs by then. "
)


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    (tmp_path / "given.model").write_bytes(tokenizer.proto)
    return tmp_path / "given.model"


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return path


def built_from(tmp_path: Path, model: Path, train: list[str], val: list[str], **cleaning) -> Built:
    return build(
        [write(tmp_path / "train.jsonl", train)],
        tmp_path / "out",
        val_sources=[write(tmp_path / "val.jsonl", val)],
        tokenizer_file=model,
        cleaning=Cleaning(**cleaning),
        replace=True,
    )


def documents_of(built: Built, split: str) -> list[str]:
    data = open_data(built.path)
    stream = data.stream(split)
    return [data.tokenizer.decode(one) for one in np.split(stream, np.flatnonzero(stream == data.tokenizer.bos_id))[1:]]


def altered(text: str, share: float, seed: int) -> str:
    """The text with some of its words exchanged."""
    draw = random.Random(seed)
    return " ".join(f"other{i}" if draw.random() < share else word for i, word in enumerate(text.split(" ")))


def similarity(one: str, two: str) -> float:
    """Share of common word sequences, by the signatures."""
    return float(np.mean(signature(one) == signature(two)))


def cleaner(known: list[str], threshold: float = NEAR_THRESHOLD) -> Cleaner:
    cleaning = Cleaning(dedup="near", near_threshold=threshold)
    return Cleaner(cleaning, np.array([signature(text) for text in known]))


def by_library(text: str) -> rensa.RMinHash:
    """The signature of a text of words without capitals, as the library keeps it."""
    words = re.findall(r"\w+", text.lower())
    minhash = rensa.RMinHash(128, 1)
    minhash.update(sorted({" ".join(words[start : start + 5]) for start in range(len(words) - 4)}))
    return minhash


def test_a_planted_validation_document_is_caught_without_being_asked(tmp_path: Path, model: Path) -> None:
    documents = make_documents(20, seed=1)
    built = built_from(
        tmp_path, model, [*documents[:9], documents[15], *documents[9:12], documents[15]], documents[12:]
    )
    assert documents_of(built, "train") == documents[:12]
    assert built.manifest.splits["train"].duplicates == 2
    assert "train: 2 documents were left out, as val has the same text" in built.notes
    assert check(built.path) == []


def test_a_near_duplicate_is_caught_when_asked_for(tmp_path: Path, model: Path) -> None:
    documents = make_documents(20, seed=1)
    val, train = documents[12:], documents[:12]
    close = [
        altered(val[0], 0.01, 1),
        val[1].upper() + "!",
        f"{val[2]} and a few more words",
        val[6].replace(" ", "\n "),
    ]
    far = [altered(val[3], 0.5, 2), val[4][: len(val[4]) // 4]]
    texts = [*train[:5], *close, *far, *train[5:], val[5]]
    built = built_from(tmp_path, model, texts, val)
    assert documents_of(built, "train") == texts[:-1]  # not asked for: the words are not the same
    built = built_from(tmp_path, model, texts, val, dedup="near")
    assert documents_of(built, "train") == [*train[:5], *far, *train[5:]]
    assert built.manifest.splits["train"].near_duplicates == 4
    assert built.manifest.splits["train"].duplicates == 1  # the very text is told apart
    assert "train: 4 documents were left out, as val has nearly the same text" in built.notes
    assert built.manifest.settings.near_threshold == 0.7
    assert check(built.path) == []


def test_near_duplicates_of_held_out_documents_wherever_they_stand(tmp_path: Path, model: Path) -> None:
    """Split by hash: the validation document may come after its copy."""
    documents = make_documents(60, seed=5)
    twins = [one.replace(" ", " once ", 1) for one in documents]
    source = write(tmp_path / "a.jsonl", [*twins, *documents])
    options = {"tokenizer_file": model, "val_fraction": 0.2}
    plain = build([source], tmp_path / "plain", **options)
    near = build([source], tmp_path / "near", cleaning=Cleaning(dedup="near"), **options)
    val = documents_of(plain, "val")
    assert documents_of(near, "val") == val
    pairs = dict(zip(twins + documents, documents + twins, strict=True))
    expected = [one for one in documents_of(plain, "train") if pairs[one] not in val]
    assert documents_of(near, "train") == expected
    assert near.manifest.splits["train"].near_duplicates == len(documents_of(plain, "train")) - len(expected) > 0
    assert [source.documents for source in near.manifest.sources] == [120]


def test_repeated_documents_stay_once(tmp_path: Path, model: Path) -> None:
    documents = make_documents(10, seed=1)
    train, val = [*documents[:6], documents[2], documents[2]], [*documents[6:], documents[9]]
    built = built_from(tmp_path, model, train, val)
    assert len(documents_of(built, "train")) == 8
    built = built_from(tmp_path, model, train, val, dedup="exact")
    assert documents_of(built, "train") == documents[:6]
    assert documents_of(built, "val") == documents[6:]
    assert [built.manifest.splits[split].repeated for split in ("train", "val")] == [2, 1]


def test_short_and_foreign_documents(tmp_path: Path, model: Path) -> None:
    texts = [ENGLISH * 2, "short", GERMAN * 2, ENGLISH * 3, "x" * 99]
    built = built_from(tmp_path, model, texts, [ENGLISH, GERMAN, "also short"], min_chars=100, language="en")
    assert documents_of(built, "train") == [ENGLISH * 2, ENGLISH * 3]
    assert documents_of(built, "val") == [ENGLISH]
    train, val = (built.manifest.splits[split] for split in ("train", "val"))
    assert (train.short_documents, train.other_language) == (2, 1)
    assert (val.short_documents, val.other_language) == (1, 1)
    assert "train: 2 documents were left out, as they are shorter than 100 characters" in built.notes
    assert "train: 1 documents were left out, as their language is not en" in built.notes
    assert built.manifest.sources[1].documents == 5


def test_settings_that_cannot_be(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match=r"min_chars = -1 .*dedup = 'all' .*near_threshold = 2"):
        built_from(tmp_path, model, ["a"], ["b"], min_chars=-1, dedup="all", near_threshold=2)
    for dedup in ("none", "exact"):
        with pytest.raises(UserError, match=f"near_threshold = 0.7 is for dedup = 'near', and dedup = '{dedup}'"):
            built_from(tmp_path, model, ["a"], ["b"], dedup=dedup, near_threshold=NEAR_THRESHOLD)
    with pytest.raises(UserError, match="language 'xx' is unknown: choose one of .*de.*en"):
        built_from(tmp_path, model, [ENGLISH], [GERMAN], language="xx")


def test_signatures_estimate_the_share_of_common_word_sequences() -> None:
    """Against the share itself, within four standard deviations of an estimate from 128 permutations."""
    words = [f"w{i}" for i in range(400)]
    for shared in (100, 250, 350):
        one, two = words[:shared] + [f"a{i}" for i in range(60)], words[:shared] + [f"b{i}" for i in range(90)]
        first, second = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (one, two))
        true = len(first & second) / len(first | second)
        estimate = similarity(" ".join(one), " ".join(two).upper())
        assert abs(estimate - true) < 4 * (true * (1 - true) / 128) ** 0.5


def test_a_text_is_near_itself_whatever_its_length() -> None:
    for text in ("", "one", "one two three", ENGLISH):
        assert cleaner([text]).is_near(text)


def test_texts_without_words_are_like_themselves_alone() -> None:
    near = cleaner(["!!!", "- - -"])
    assert near.is_near("!!!") and near.is_near("- - -")
    assert not near.is_near("???") and not near.is_near("\n")


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.9])
def test_what_the_signatures_call_near_is_found(threshold: float) -> None:
    """Whatever the threshold: the candidates must not be fewer than what is compared."""
    draw = random.Random(int(100 * threshold))
    near = found = 0
    for _ in range(100):
        words = [f"w{draw.randrange(3000)}" for _ in range(200)]
        share = min(threshold + 0.05, 0.99)
        kept = int(200 * 2 * share / (1 + share))  # so that the share of common sequences is about `share`
        first, second = " ".join(words), " ".join([*words[:kept], *(f"w{draw.randrange(3000)}" for _ in words[kept:])])
        near += similarity(first, second) >= threshold
        found += cleaner([first], threshold).is_near(second)
    assert near > 70 and found >= 0.97 * near


@pytest.mark.parametrize("threshold", [0.3, 0.64, 0.7, 1.0])
def test_what_is_near_against_the_index_of_the_library(threshold: float) -> None:
    """The same bands and the same signatures, so the same answers, one document at a time."""
    draw = random.Random(int(100 * threshold))
    known = [" ".join(f"w{draw.randrange(3000)}" for _ in range(60)) for _ in range(300)]
    known += [known[7], altered(known[8], 0.02, 1)]
    index = rensa.RMinHashLSH(threshold, 128, num_bands(threshold))
    for key, text in enumerate(known):
        index.insert(key, by_library(text))
    ours = cleaner(known, threshold)
    asked = [altered(draw.choice(known), share, seed) for seed, share in enumerate([0.0, 0.01, 0.03, 0.05, 0.1] * 60)]
    asked += make_documents(50, seed=2)
    own = [by_library(text) for text in asked]
    expected = [any(by_library(known[key]).jaccard(one) >= threshold for key in index.query(one)) for one in own]
    assert [ours.is_near(text) for text in asked] == expected
    assert 20 < sum(expected) < 300


def test_no_validation_documents_are_like_none() -> None:
    assert not Cleaner(Cleaning(dedup="near"), np.empty((0, 128), np.uint32)).is_near("one two three")


@pytest.mark.parametrize(("threshold", "most_bytes"), [(0.7, 1000), (0.5, 1300)])
def test_memory_of_a_validation_document(threshold: float, most_bytes: int) -> None:
    """In a process of its own, which holds the signatures (512 bytes) and 8 bytes for each of 32 or 64 bands."""
    script = (
        "import sys, numpy as np\n"
        "from epigram.data.clean import Cleaner, Cleaning, signature\n"
        "def resident(): return 4096 * int(open('/proc/self/statm').read().split()[1])\n"
        "cleaning = Cleaning(dedup='near', near_threshold=float(sys.argv[1]))\n"
        "def cleaner(count):\n"
        "    near = np.empty((count, 128), np.uint32)\n"
        "    for i in range(count):\n"
        "        near[i] = signature(f'one two three four {i}')\n"
        "    return Cleaner(cleaning, near)\n"
        "cleaner(1).is_near('')\n"
        "before = resident()\n"
        "near = cleaner(30_000)\n"
        "assert near.is_near('one two three four 29999') and not near.is_near('five six')\n"
        "print((resident() - before) / 30_000)\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    run = subprocess.run([sys.executable, "-c", script, str(threshold)], capture_output=True, text=True, check=True)
    assert 600 < float(run.stdout) < most_bytes


@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.64, 0.65, 0.7, 1.0])
def test_bands_divide_the_signature_and_miss_little(threshold: float) -> None:
    bands = num_bands(threshold)
    assert 128 % bands == 0
    assert (1 - threshold ** (128 // bands)) ** bands < 0.01


@given(st.lists(st.lists(st.integers(0, 12), max_size=8), max_size=8), st.integers(1, 6))
def test_hash_set_against_a_set(batches: list[list[int]], recent: int) -> None:
    from epigram.data import clean

    before, clean._RECENT = clean._RECENT, recent
    try:
        met, plain = HashSet(), set()
        for batch in batches:
            chosen = np.array([value != 3 for value in batch], np.bool_)
            expected = []
            for value in batch:
                expected.append(value not in plain and value != 3)
                plain |= {value} - {3}
            assert met.add_new(np.array(batch, np.uint64), chosen).tolist() == expected
        again = HashSet(np.array([*plain, *plain], np.uint64))
        asked = np.arange(13, dtype=np.uint64)
        assert again.add_new(asked, np.ones(13, np.bool_)).tolist() == [value not in plain for value in range(13)]
    finally:
        clean._RECENT = before
