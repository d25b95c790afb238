"""The streaming score against a loop over single tokens with the masks written out, in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from golden_model import CONFIG, golden_model

from epigram.attention import reference
from epigram.byte_tables import ByteTables
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation import scorer
from epigram.evaluation.windows import EvalConfig, Method, StreamingConfig
from epigram.model.gpt import GPT
from epigram.run.setup import Losses, scoring_losses

CPU = torch.device("cpu")
SEQ_LEN, WINDOW = 24, 10
# All is computed in float64, and a loss is rounded to float32 once.
ROUNDING = 2e-7
# In float32, sums in another order.
ORDER = 1e-5


def tiny(**changes) -> GPT:
    """Windowed and full layers, XSA, bigrams, value embeddings, smear, skips, backout, in float64."""
    config = dataclasses.replace(CONFIG, window=WINDOW, rotary_reference_len=16, **changes)
    model = GPT(config)
    model.load_state_dict(golden_model().state_dict())
    model.compute_dtype = torch.float64
    return model.double().requires_grad_(False)


def losses(model: GPT) -> Losses:
    return scoring_losses(model, False, "auto", Context(device=CPU))


def method(seq_len: int = SEQ_LEN, **streaming) -> Method:
    return Method(name="streaming", seq_len=seq_len, stride=1, streaming=StreamingConfig(**streaming))


def stream(num_tokens: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, CONFIG.vocab_size, num_tokens).astype(np.uint16)


def nlls(model: GPT, tokens: np.ndarray, how: Method, batch_tokens: int = 64) -> np.ndarray:
    return scorer.token_nlls(losses(model).of(how), tokens, how, device=CPU, batch_tokens=batch_tokens)


def loop(model: GPT, tokens: np.ndarray, seq_len: int, limits: tuple[int, ...] = ()) -> np.ndarray:
    """Each target after all tokens before it, without a cache; layers see what their limits leave of the prefix."""
    limits = limits or (seq_len,) * model.config.num_layers
    layer = 0

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        nonlocal layer
        limit = (limits[layer % len(limits)] or seq_len) - 1
        layer += 1
        return reference.attend(q, k, v, min(window or limit, limit))

    model.attend = model.attend_window = attend
    ids, found = torch.from_numpy(tokens.astype(np.int64)), []
    for target in range(len(tokens) - 1):
        x = model(ids[None, : target + 1], rope_len=seq_len)[:, -1]
        logits = torch.nn.functional.linear(x, model.embed)
        logits = CONFIG.softcap * torch.tanh(logits / CONFIG.softcap)
        found.append(-torch.log_softmax(logits, -1)[0, ids[target + 1]].item())
    return np.array(found)


def test_each_token_sees_what_its_layers_may_see() -> None:
    """Chunks shorter and longer than windows; a rotary base that is rescaled for the length."""
    tokens = stream(90)
    expected = loop(tiny(), tokens, SEQ_LEN)
    for batch_tokens in (1, 7, 10, 23, 24, 64, 500):
        np.testing.assert_allclose(nlls(tiny(), tokens, method(), batch_tokens), expected, rtol=ROUNDING)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_layers": ()},
        {"window_layers": (0, 1, 2, 3, 4, 5)},
        {"rotary_dim": 0},
        {"rotary_scaling": "none"},
        {"smear": True, "xsa_layers": (0, 1, 2, 3, 4, 5)},
    ],
    ids=str,
)
def test_every_kind_of_layer(changes: dict) -> None:
    tokens = stream(60)
    np.testing.assert_allclose(
        nlls(tiny(**changes), tokens, method(), 17), loop(tiny(**changes), tokens, SEQ_LEN), rtol=ROUNDING
    )


def test_limits_are_per_layer() -> None:
    tokens, limits = stream(70), (5, 0, 40, 12, 3, 31)
    found = nlls(tiny(), tokens, method(limits=limits), 16)
    np.testing.assert_allclose(found, loop(tiny(), tokens, SEQ_LEN, limits), rtol=ROUNDING)
    assert np.abs(found - nlls(tiny(), tokens, method(), 16)).max() > 1e-4


def test_segments_with_enough_overlap_are_one_stream() -> None:
    """What a token can see through all layers is the sum of what each sees: beyond that a seam changes nothing."""
    tokens = stream(700)
    sees = sum(min(WINDOW, SEQ_LEN - 1) if i in CONFIG.window_layers else SEQ_LEN - 1 for i in range(CONFIG.num_layers))
    overlap = -(-(sees + 2) // SEQ_LEN)  # and the tokens before it, through smear and bigram
    whole = nlls(tiny(), tokens, method(), 100)
    found = nlls(tiny(), tokens, method(segment_tokens=overlap * SEQ_LEN + 60, overlap=overlap), 100)
    np.testing.assert_allclose(found, whole, rtol=ROUNDING)
    less = nlls(tiny(), tokens, method(segment_tokens=SEQ_LEN + 60, overlap=1), 100)
    seams = np.abs(less - whole)
    assert 0 < seams.max() < 0.2, "an overlap of one window leaves a seam that can be measured"


@pytest.mark.parametrize("chunk_tokens", [0, 8, 30])
@pytest.mark.parametrize("batch_tokens", [24, 60, 1000])
@pytest.mark.parametrize("num_tokens", [2, 30, 100, 337])
def test_batches_and_chunks_change_nothing(num_tokens: int, batch_tokens: int, chunk_tokens: int) -> None:
    tokens, segments = stream(num_tokens), {"segment_tokens": 100, "overlap": 1}
    expected = nlls(tiny(), tokens, method(**segments), 100)
    found = nlls(tiny(), tokens, method(**segments, chunk_tokens=chunk_tokens), batch_tokens)
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_ranks_add_up_to_the_same_score(world_size: int) -> None:
    tokens, how, model = stream(500), method(segment_tokens=100, overlap=1), tiny()
    ones = np.ones(CONFIG.vocab_size, np.int64)
    tables = ByteTables(token_bytes=ones, has_space=ones < 0, is_edge=ones < 0)
    parts = [
        scorer.score(
            losses(model).of(how), tokens, tables, how, device=CPU, batch_tokens=64, expected_bytes=None,
            rank=rank, world_size=world_size, progress=False,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    total = sum(parts[1:], parts[0])
    expected = nlls(model, tokens, how, 100).sum(dtype=np.float64)
    assert (total.tokens, total.bytes) == (499, 499)
    assert total.nats == pytest.approx(expected, rel=ROUNDING)


def test_each_token_is_computed_once() -> None:
    """But for the overlaps, and the end of the last chunk."""
    read = 0
    how = method(segment_tokens=100, overlap=1)

    def open_stream(_: Method):
        def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            nonlocal read
            read += inputs.numel()
            return torch.zeros(inputs.shape)

        return step

    scorer.token_nlls(open_stream, stream(405), how, device=CPU, batch_tokens=50)
    assert read == 404 + 4 * SEQ_LEN


def test_behind_the_text_comes_no_more_of_its_last_token() -> None:
    """It could begin documents, and attention that keeps them apart has room for so many in a batch."""
    tokens, read = stream(70), []
    tokens[-1] = 1

    def open_stream(how: Method):
        def nll(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            read.append(inputs.clone())
            return torch.zeros(inputs.shape)

        return nll

    scorer.token_nlls(
        open_stream, tokens, method(segment_tokens=48, overlap=1, chunk_tokens=32), device=CPU, batch_tokens=64
    )
    inputs = torch.cat([x.flatten() for x in read])
    assert len(inputs) > 80 and int((inputs == 1).sum()) <= 2


def test_rotation_far_into_a_stream() -> None:
    """Positions count from the segment's start: at the two-hundred-thousandth the same tokens lose the same."""
    model = tiny().float()
    model.compute_dtype = torch.float32
    rows, found = torch.from_numpy(stream(60).astype(np.int64))[None], []
    for position in (0, 200_000):
        step = losses(model).stream(method())
        step.keywords["cache"].position = position
        found.append(step(rows[:, :-1], rows[:, 1:]))
    torch.testing.assert_close(found[1], found[0], rtol=ORDER, atol=ORDER)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"segments of 48 tokens leave nothing to score.*above 48"):
        method(segment_tokens=48)
    with pytest.raises(UserError, match="leave nothing to score"):
        EvalConfig(seq_len=6144, stride=128, methods=("streaming",), streaming=StreamingConfig(segment_tokens=10_000))
    with pytest.raises(ValueError, match=r"segment_tokens = 0.*overlap = -1.*limits"):
        StreamingConfig(segment_tokens=0, overlap=-1, limits=(-1,))
    with pytest.raises(UserError, match="method streaming has stride = 1"):
        Method(name="streaming", seq_len=4, stride=2)
    with pytest.raises(UserError, match=r"has 2 numbers, the model 6 layers"):
        losses(tiny()).stream(method(limits=(3, 4)))
