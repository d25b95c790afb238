"""The scorer against a loop over single tokens, for any batch size and number of ranks."""

import math
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from epigram.byte_tables import ByteTables
from epigram.errors import DataError, UserError
from epigram.evaluation import bpb, passes, scorer
from epigram.evaluation.windows import Method, plan_windows

VOCAB, WIDTH, NUM_TOKENS = 17, 6, 200
CPU = torch.device("cpu")
BLOCKS = Method(name="blocks", seq_len=24, stride=24)
SLIDING = Method(name="sliding", seq_len=24, stride=7)
# The model is evaluated in float64 and rounded once, so only that rounding separates it from the loop.
ROUNDING = 1e-6
# Sums of the same float32 losses in float64, in another order.
ORDER = 1e-12


class DecayedContext:
    """A causal model: logits from the mean of all inputs so far in the window, fading with distance, and the
    rotation length. A token's loss depends on where its window begins, on every earlier token in it, and on
    nothing later.
    """

    def __init__(self, seed=0):
        draw = np.random.default_rng(seed)
        self.embed, self.head = draw.normal(size=(VOCAB, WIDTH)), draw.normal(size=(WIDTH, VOCAB))
        self.shapes = set()

    def __call__(self, inputs, targets, *, rope_len, last):
        self.shapes.add((*inputs.shape, last))
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        steps = torch.arange(inputs.shape[1], dtype=torch.float64)
        weight = torch.exp(-(steps[:, None] - steps[None, :]) / rope_len).tril()
        if last is not None:  # the others are not computed
            weight, targets = weight[-last:], targets[:, -last:]
        state = (weight @ torch.from_numpy(self.embed)[inputs]) / weight.sum(1, keepdim=True)
        logits = torch.log_softmax(state @ torch.from_numpy(self.head), dim=-1)
        return -logits.gather(-1, targets[..., None])[..., 0].float()

    def one(self, context, target, rope_len):
        """Loss of one target after the tokens `context`, in plain float64."""
        state, total = np.zeros(WIDTH), 0.0
        for distance, token in enumerate(reversed(context)):
            weight = math.exp(-distance / rope_len)
            state, total = state + weight * self.embed[token], total + weight
        logits = (state / total) @ self.head
        return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


class Dense(DecayedContext):
    """The same model, computing every position whatever is asked for."""

    def __call__(self, inputs, targets, *, rope_len, last):
        losses = super().__call__(inputs, targets, rope_len=rope_len, last=None)
        return losses if last is None else losses[:, -last:]


def loop(model, tokens, method):
    """Loss of every target by the method's definition, one target at a time; knows nothing of the plan."""
    num_targets = len(tokens) - 1
    found = []
    for target in range(num_targets):
        window = max(0, math.ceil((target + 1 - method.seq_len) / method.stride))
        start = max(0, min(window * method.stride, num_targets - method.seq_len))
        found.append(model.one(tokens[start : target + 1], tokens[target + 1], method.seq_len))
    return np.array(found)


@pytest.fixture(scope="module")
def tables():
    draw = np.random.default_rng(3)
    token_bytes, is_edge = draw.integers(1, 5, VOCAB), np.arange(VOCAB) < 2
    token_bytes[is_edge] = 0
    return ByteTables(token_bytes=token_bytes, has_space=draw.random(VOCAB) < 0.4, is_edge=is_edge)


def stream(num_tokens=NUM_TOKENS, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(np.uint16)


def run(model, tokens, tables, method, batch_tokens=100, **options):
    options = {"expected_bytes": None, "device": CPU, "progress": False, **options}
    return scorer.score(model, tokens, tables, method, batch_tokens=batch_tokens, **options)


@pytest.mark.parametrize("method", [BLOCKS, SLIDING], ids=lambda m: m.name)
@pytest.mark.parametrize("num_tokens", [2, 10, 24, 25, 26, 49, 97, 170, NUM_TOKENS])
@pytest.mark.parametrize("kind", [DecayedContext, Dense])
def test_scores_equal_a_loop_over_tokens(tables, method, num_tokens, kind):
    model, tokens = kind(), stream(num_tokens)
    expected = loop(model, tokens, method)
    found = scorer.token_nlls(model, tokens, method, device=CPU, batch_tokens=100)
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)
    total = run(model, tokens, tables, method)
    assert total.nats == pytest.approx(expected.sum(), rel=ROUNDING)
    assert total.tokens == num_tokens - 1
    assert total.bytes == tables.count(tokens[:-1], tokens[1:]).sum()


@pytest.mark.parametrize("method", [BLOCKS, SLIDING], ids=lambda m: m.name)
@pytest.mark.parametrize("batch_tokens", [1, 24, 50, 100, 333, 10_000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 40])
def test_ranks_and_batches_change_nothing(tables, method, batch_tokens, world_size):
    model, tokens = DecayedContext(), stream()
    alone = run(model, tokens, tables, method)
    parts = [run(model, tokens, tables, method, batch_tokens, rank=r, world_size=world_size) for r in range(world_size)]
    total = sum(parts[1:], parts[0])
    assert (total.tokens, total.bytes) == (alone.tokens, alone.bytes)
    assert total.nats == pytest.approx(alone.nats, rel=ORDER)


def test_ranks_agree_through_reduce(tables):
    """Three ranks in threads that add their sums up; every one gets the whole score."""
    world_size, tokens = 3, stream()
    waiting, sums, found = threading.Barrier(world_size), {}, {}

    def rank_of(rank):
        def reduce(mine):
            sums[rank] = mine
            waiting.wait(timeout=30)
            return torch.stack([sums[r] for r in range(world_size)]).sum(0)

        found[rank] = run(DecayedContext(), tokens, tables, SLIDING, rank=rank, world_size=world_size, reduce=reduce)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert found[0].nats == pytest.approx(run(DecayedContext(), tokens, tables, SLIDING).nats, rel=ORDER)


@pytest.mark.parametrize("method", [BLOCKS, SLIDING], ids=lambda m: m.name)
@pytest.mark.parametrize("batch_tokens", [24, 77, 120, 10_000])
def test_a_compiled_model_sees_one_shape(tables, method, batch_tokens):
    """And beside it the first window of a sliding evaluation, alone, of which all is scored."""
    shapes = set()
    for rank in range(3):
        model = DecayedContext()
        run(model, stream(), tables, method, batch_tokens, rank=rank, world_size=3)
        shapes |= model.shapes
    if method is SLIDING:
        shapes.remove((1, 24, None))
        assert {last for *_, last in shapes} == {SLIDING.stride}
    assert len(shapes) == 1


def test_only_what_is_scored_is_asked_for(tables):
    """And what is scored is asked for once: positions of all calls add up to the targets and the filling."""
    asked = 0

    def counting(inputs, targets, *, rope_len, last):
        nonlocal asked
        losses = model(inputs, targets, rope_len=rope_len, last=last)
        asked += losses.numel()
        return losses

    model, tokens = DecayedContext(), stream()
    plan = plan_windows(len(tokens) - 1, SLIDING.seq_len, SLIDING.stride)
    size = 100 // SLIDING.seq_len
    run(counting, tokens, tables, SLIDING)
    filled = -(-(len(plan) - 1) // size) * size
    assert asked == SLIDING.seq_len + filled * SLIDING.stride


@pytest.mark.parametrize("method", [BLOCKS, SLIDING], ids=lambda m: m.name)
@pytest.mark.parametrize("more", range(0, 40, 5))
def test_a_batch_is_filled_up_with_other_text(tables, method, more):
    """Its last window again and again could be of more documents than a backend keeps apart, though no batch of the
    text has so many."""
    tokens, seen = stream(NUM_TOKENS + more), []

    def watching(inputs, targets, *, rope_len, last):
        seen.append(inputs.numpy().copy())
        return model(inputs, targets, rope_len=rope_len, last=last)

    model = DecayedContext()
    run(watching, tokens, tables, method, batch_tokens=240)
    text = {tuple(tokens[start : start + method.seq_len]) for start in range(len(tokens))}
    for inputs in seen:
        rows = Counter(tuple(row) for row in inputs)
        assert max(rows.values()) <= 2, "what fills it up may meet one that counts"
        assert rows.keys() <= text


@pytest.mark.parametrize(("method", "batch_tokens"), [(BLOCKS, 60), (SLIDING, 100)], ids=["blocks", "sliding"])
def test_positions_that_do_not_count_cannot_matter(tables, method, batch_tokens):
    """Losses outside the plan are poisoned: rows that fill up a batch, and context before the scored part."""
    tokens, model = stream(NUM_TOKENS + 4), DecayedContext()
    expected = run(model, tokens, tables, method, batch_tokens)
    plan = plan_windows(len(tokens) - 1, method.seq_len, method.stride)
    seen = poisons = 0

    def poisoned(inputs, targets, *, rope_len, last):
        nonlocal seen, poisons
        losses = model(inputs, targets, rope_len=rope_len, last=last)
        for row in range(len(inputs)):
            counts = plan.num_scored_of(seen) if seen < len(plan) else 0
            first = losses.shape[1] - counts
            losses[row, :first] = float("nan") if seen % 2 else float("inf")
            seen, poisons = seen + 1, poisons + first
        return losses

    assert run(poisoned, tokens, tables, method, batch_tokens) == expected
    assert seen > len(plan), "the sizes of this test should leave a batch to fill up"
    assert poisons > (seen - len(plan)) * min(method.stride, method.seq_len), "and a window that scores less"


def test_a_later_token_changes_no_earlier_loss():
    model, tokens = DecayedContext(), stream()
    before = scorer.token_nlls(model, tokens, SLIDING, device=CPU, batch_tokens=100)
    for changed in (1, 60, 150, len(tokens) - 1):
        other = tokens.copy()
        other[changed] = (other[changed] + 1) % VOCAB
        after = scorer.token_nlls(model, other, SLIDING, device=CPU, batch_tokens=100)
        np.testing.assert_array_equal(after[: changed - 1], before[: changed - 1])
        assert after[changed - 1] != before[changed - 1]


def test_sums_do_not_drift(tables):
    """Three million losses of a tenth: a running float32 sum is off by percent, the scorer's by nothing."""
    tokens = np.ones(3_000_001, dtype=np.uint16)
    method = Method(name="blocks", seq_len=1000, stride=1000)
    tenth = torch.tensor(0.1, dtype=torch.float32)

    def constant(inputs, targets, *, rope_len, last):
        assert last is None, "blocks score all"
        return tenth.expand(inputs.shape)

    total = run(constant, tokens, tables, method, batch_tokens=100_000)
    exact = 3_000_000 * tenth.double().item()
    assert total.nats == pytest.approx(exact, rel=ORDER)
    in_float32 = np.full(3_000_000, np.float32(0.1)).cumsum(dtype=np.float32)[-1]
    assert abs(in_float32 - exact) / exact > 1e-3


def test_wrong_denominator_is_refused_before_scoring(tables):
    tokens = stream()
    right = bpb.count_bytes(tokens, tables)

    def never(inputs, targets, *, rope_len, last):
        raise AssertionError("scored although the bytes do not match")

    with pytest.raises(DataError, match="manifest"):
        run(never, tokens, tables, BLOCKS, expected_bytes=right + 1)
    assert run(DecayedContext(), tokens, tables, BLOCKS, expected_bytes=right).bytes == right


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_model_has_no_score(tables, bad):
    def broken(inputs, targets, *, rope_len, last):
        losses = torch.ones(inputs.shape)
        losses[0, 3] = bad
        return losses

    with pytest.raises(UserError, match="no score"):
        run(broken, stream(), tables, BLOCKS)


def test_a_stream_of_one_token_is_refused(tables):
    with pytest.raises(UserError, match="two tokens"):
        run(DecayedContext(), stream(1), tables, BLOCKS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    """On CUDA the host runs ahead through the whole loop, and the sum is the CPU's."""
    device, tokens = torch.device("cuda"), stream()
    table = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def bigram(inputs, targets, *, rope_len, last):
        losses = table.to(inputs.device, non_blocking=True)[inputs, targets]
        return losses if last is None else losses[:, -last:]

    plan = plan_windows(len(tokens) - 1, SLIDING.seq_len, SLIDING.stride)
    expected = scorer.token_nlls(bigram, tokens, SLIDING, device=CPU, batch_tokens=100).sum(dtype=np.float64)
    table = table.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = passes.parts(bigram, tokens, plan, SLIDING, batch_tokens=100, world_size=1, device=device)
        nats, counted = scorer.sum_losses(found, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert nats.item() == pytest.approx(expected, rel=ORDER)
    assert counted.item() == len(tokens) - 1
