"""Score-first adaptation: who is handed what, against a plain loop; and adapters that cheat."""

import math

import numpy as np
import pytest
import torch
from golden_model import CONFIG, golden_model

from epigram.evaluation import probes, scorer
from epigram.evaluation.adapt import SgdAdapter, chunks
from epigram.evaluation.adapt_config import SgdConfig
from epigram.evaluation.windows import Method, StreamingConfig, plan_windows
from epigram.model.gpt import GPT

CPU = torch.device("cpu")
SEQ_LEN, CHUNK = 16, 48
SLIDING = Method(name="sliding", seq_len=SEQ_LEN, stride=4)
BLOCKS = Method(name="blocks", seq_len=SEQ_LEN, stride=SEQ_LEN)
STREAMING = Method(name="streaming", seq_len=SEQ_LEN, stride=1, streaming=StreamingConfig(segment_tokens=40, overlap=1))
CONFIG_FAST = SgdConfig(lr=0.5, chunk_tokens=CHUNK, num_rows=2, epochs=2)


def stream(num_tokens: int) -> np.ndarray:
    return np.random.default_rng(2).integers(4, CONFIG.vocab_size, num_tokens).astype(np.uint16)


def sgd(model: GPT, **options) -> SgdAdapter:
    return SgdAdapter(list(model.parameters()), model.loss, CONFIG_FAST, SEQ_LEN, **options)


def adapted(tokens: np.ndarray, how: Method = SLIDING, make=sgd) -> np.ndarray:
    """Scores of a fresh model that adapts."""
    model = golden_model()
    return scorer.token_nlls(
        model.nll, tokens, how, device=CPU, batch_tokens=64, adapter=make(model), chunk_tokens=CHUNK
    )


class Watching:
    """Remembers what it was handed."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], int, int]] = []

    def learn(self, tokens, chunk, num_chunks) -> None:
        self.seen.append((tokens.tolist(), chunk, num_chunks))
        tokens[:] = 0  # its own copy


@pytest.mark.parametrize("how", [SLIDING, BLOCKS, STREAMING], ids=lambda how: how.name)
def test_what_is_released_is_scored_and_the_last_chunk_is_kept(how: Method) -> None:
    tokens, watching, asked = stream(200), Watching(), []

    def windows(inputs, targets, *, rope_len=None, last=None):
        asked.append(len(watching.seen))
        return torch.zeros(targets.shape if last is None else (len(targets), last))

    nll = (lambda method: windows) if how.is_streaming else windows
    scorer.token_nlls(nll, tokens, how, device=CPU, batch_tokens=64, adapter=watching, chunk_tokens=CHUNK)
    groups = chunks(how.plan(199), CHUNK)
    assert [seen for seen, *_ in watching.seen] == [
        tokens[group.scored[0] : group.scored[1] + 1].tolist() for group in groups[:-1]
    ]
    assert [numbers for _, *numbers in watching.seen] == [[i, len(groups)] for i in range(len(groups) - 1)]
    assert asked == sorted(asked) and set(asked) == set(range(len(groups))), "each is scored before it is learned"


def test_chunks_cut_the_plan() -> None:
    plan = plan_windows(1000, 64, 10)
    parts = chunks(plan, 128)
    assert sum(map(len, parts)) == len(plan)
    assert all(len({int(t) // 128 for t in part.first_scored}) == 1 for part in parts)


def test_sgd_is_that_of_the_description() -> None:
    """Chunk by chunk with torch's own SGD, one row at a time, its gradients averaged by hand."""
    tokens, model = stream(150), golden_model()
    found = adapted(tokens, BLOCKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    expected, groups = [], chunks(BLOCKS.plan(149), CHUNK)
    for number, group in enumerate(groups):
        for start, first, end in zip(group.start, group.first_scored, group.end, strict=True):
            ids = torch.from_numpy(tokens[start : end + 1].astype(np.int64))[None]
            with torch.no_grad():
                expected.append(model.nll(ids[:, :-1], ids[:, 1:])[0, first - start :])
        if number == len(groups) - 1:
            break
        ids = torch.from_numpy(tokens[group.scored[0] : group.scored[1] + 1].astype(np.int64))
        for part in optimizer.param_groups:
            part["lr"] = 0.5 * 0.5 * (1 + math.cos(math.pi * number / (len(groups) - 1)))
        rows = [ids[at : at + SEQ_LEN + 1][None] for at in range(0, len(ids) - SEQ_LEN, SEQ_LEN)]
        for _ in range(2):
            for first in range(0, len(rows), 2):
                optimizer.zero_grad()
                step = rows[first : first + 2]
                for row in step:
                    (model.loss(row[:, :-1], row[:, 1:]) / len(step)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), rtol=2e-4, atol=2e-4)
    plain = scorer.token_nlls(golden_model().nll, tokens, BLOCKS, device=CPU, batch_tokens=64)
    np.testing.assert_array_equal(found[:CHUNK], plain[:CHUNK])
    assert np.abs(found[CHUNK:] - plain[CHUNK:]).max() > 0.01, "it does learn"


def test_adaptation_passes_the_probe_and_one_that_peeks_is_caught() -> None:
    tokens, places = stream(160), [2, 47, 49, 60, 110, 159]
    found = probes.causality(adapted, tokens, places, CONFIG.vocab_size)
    assert found.passed, found.detail

    def peeking(some: np.ndarray) -> np.ndarray:
        """It got hold of the text, and learns the chunk that comes next."""

        class Peeks(SgdAdapter):
            def learn(self, tokens, chunk, num_chunks):
                super().learn(some[(chunk + 1) * CHUNK : (chunk + 2) * CHUNK + 1], chunk, num_chunks)

        return adapted(some, make=lambda m: Peeks(list(m.parameters()), m.loss, CONFIG_FAST, SEQ_LEN))

    assert not probes.causality(peeking, tokens, places, CONFIG.vocab_size).passed


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_rows(world_size: int) -> None:
    """The gradients of all ranks, added up, are those of one process."""
    tokens, gradients = stream(CHUNK + 1), {}

    def capture(rank: int, size: int) -> list[torch.Tensor]:
        model, taken = golden_model(), []
        reduce = lambda grads: taken.append([g.clone() for g in grads])  # noqa: E731
        sgd(model, rank=rank, world_size=size, reduce=reduce).learn(tokens, 0, 2)
        return taken[0]

    alone = capture(0, 1)
    shares = [capture(rank, world_size) for rank in range(world_size)]
    gradients = [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]
    for found, expected in zip(gradients, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_bad_settings_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"epochs = 0.*lr = -1"):
        SgdConfig(epochs=0, lr=-1)
