"""Lanes against one backward pass over the concatenated batch, and against clipping written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from peers import Peers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from epigram.dist.context import Context
from epigram.dist.share import Share
from epigram.errors import UserError
from epigram.optim.gradients import Gathered, GradientConfig, LaneGradients, lane_weights

LANE_TOKENS = [36, 36, 10, 5]
BANKS = ("second.weight", "first.weight")


class Toy(nn.Module):
    """Two layers and a scalar: gradients of very different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 5)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.second(torch.tanh(self.first(x)))


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def lanes() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            # Lanes of different difficulty, so that their gradients differ in size.
            (1 + 3 * index) * torch.randn(tokens, 6, generator=generator),
            torch.randint(5, (tokens,), generator=generator),
        )
        for index, tokens in enumerate(LANE_TOKENS)
    ]


def _backward(toy: Toy, lane: tuple[Tensor, Tensor]) -> Tensor:
    loss = F.cross_entropy(toy(lane[0]), lane[1])
    loss.backward()
    return loss.detach()


def _gradients(toy: Toy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in toy.named_parameters()}


def _lane_gradient(toy: Toy, lane: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    toy.zero_grad()
    _backward(toy, lane)
    gradients = _gradients(toy)
    toy.zero_grad()
    return gradients


def _norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def _run(toy: Toy, lanes, which: list[int], collector: LaneGradients) -> Gathered:
    """A step; afterwards `.grad` is what the optimizer makes of it: times the scale."""
    losses = []
    for lane in which:
        losses.append(_backward(toy, lanes[lane]))
        collector.add(lane)
    gathered = collector.finish(losses)
    for message in gathered.arriving.values():
        message.wait()
    for parameter in toy.parameters():
        parameter.grad.mul_(gathered.scale)
    return gathered


def _assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-7, msg=name)


def _collector(
    toy: Toy, clip: str, max_norm: float = 0.3, mode: str = "equal", context: Context | None = None
) -> LaneGradients:
    return LaneGradients(
        dict(toy.named_parameters()),
        clip=clip,
        max_norm=max_norm,
        lane_weights=lane_weights(LANE_TOKENS, mode),
        banks=BANKS,
        context=context,
    )


def test_token_weights_equal_the_concatenated_batch(toy: Toy, lanes) -> None:
    batch = tuple(torch.cat(column) for column in zip(*lanes, strict=True))
    expected = _lane_gradient(toy, batch)
    norms = _run(toy, lanes, [0, 1, 2, 3], _collector(toy, "none", mode="tokens"))
    _assert_close(_gradients(toy), expected)
    torch.testing.assert_close(norms.norm, torch.tensor(_norm(expected)))


def test_equal_weights_equal_the_mean_of_the_lane_losses(toy: Toy, lanes) -> None:
    losses = [F.cross_entropy(toy(x), y) for x, y in lanes]
    torch.stack(losses).mean().backward()
    expected = _gradients(toy)
    toy.zero_grad()
    _run(toy, lanes, [0, 1, 2, 3], _collector(toy, "none"))
    _assert_close(_gradients(toy), expected)
    tokens = _collector(toy, "none", mode="tokens")
    toy.zero_grad()
    _run(toy, lanes, [0, 1, 2, 3], tokens)
    assert _norm({n: g - expected[n] for n, g in _gradients(toy).items()}) > 0.05 * _norm(expected)


@pytest.mark.parametrize("mode", ["equal", "tokens"])
def test_lane_clip_equals_clipping_each_by_hand(toy: Toy, lanes, mode: str) -> None:
    by_hand = [_lane_gradient(toy, lane) for lane in lanes]
    norms = [_norm(g) for g in by_hand]
    max_norm = sorted(norms)[1] * 1.01  # clips two of the four
    weights = lane_weights(LANE_TOKENS, mode)
    expected = {
        name: sum(
            weight * min(1.0, max_norm / (norm + 1e-6)) * gradient[name]
            for weight, norm, gradient in zip(weights, norms, by_hand, strict=True)
        )
        for name in by_hand[0]
    }
    result = _run(toy, lanes, [0, 1, 2, 3], _collector(toy, "lane", max_norm, mode))
    _assert_close(_gradients(toy), expected)
    torch.testing.assert_close(result.norms, torch.tensor(norms))
    torch.testing.assert_close(result.norm, torch.tensor(norms).mean())
    with torch.no_grad():
        torch.testing.assert_close(result.losses, torch.stack([F.cross_entropy(toy(x), y) for x, y in lanes]))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_global_clip_limits_the_average(toy: Toy, lanes, factor: float) -> None:
    _run(toy, lanes, [0, 1, 2, 3], _collector(toy, "none", mode="tokens"))
    average = _gradients(toy)
    toy.zero_grad()
    max_norm = factor * _norm(average)
    result = _run(toy, lanes, [0, 1, 2, 3], _collector(toy, "global", max_norm, "tokens"))
    _assert_close(_gradients(toy), {name: min(1.0, factor) * g for name, g in average.items()})
    torch.testing.assert_close(result.norm, torch.tensor(_norm(average)))


@pytest.mark.parametrize("mode", ["equal", "tokens"])
@pytest.mark.parametrize("clip", ["lane", "global", "none"])
@pytest.mark.parametrize("shares", [[[0, 2], [1, 3]], [[3], [0, 1, 2]], [[0], [1], [2], [3]]])
def test_any_split_over_processes_gives_the_same(
    toy: Toy, lanes, clip: str, mode: str, shares: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bank each process knows its own rows; the 5 of the second divide by neither number of processes."""
    alone = _run(toy, lanes, [0, 1, 2, 3], _collector(toy, clip, 0.3, mode))
    expected = _gradients(toy)
    peers = Peers(monkeypatch, len(shares))

    def one(context: Context) -> tuple[Gathered, dict[str, Tensor]]:
        own = Toy()
        own.load_state_dict(toy.state_dict())
        return _run(own, lanes, shares[context.rank], _collector(own, clip, 0.3, mode, context)), _gradients(own)

    for rank, (gathered, found) in enumerate(peers.run(one)):
        torch.testing.assert_close(gathered.losses, alone.losses)
        torch.testing.assert_close(gathered.norms, alone.norms)
        torch.testing.assert_close(gathered.norm, alone.norm)
        for name in BANKS:
            own = Share(len(found[name]), rank, len(shares)).of
            torch.testing.assert_close(own(found[name]), own(expected[name]), rtol=1e-5, atol=1e-7, msg=name)
        rest = [name for name in found if name not in BANKS]
        _assert_close({name: found[name] for name in rest}, {name: expected[name] for name in rest})
    padded = [-(-rows // len(shares)) * len(shares) * cols for rows, cols in ((12, 6), (5, 12))]
    order = [("sum", 12 + 5 + 1 + 2 * 4), *(("scatter", numbers) for numbers in padded)]
    order += [("sum", 1)] * (clip != "lane")
    assert peers.sent == [order] * len(shares), "the small first, the largest bank next, the same in every process"


def test_one_lane_is_read_for_its_norm_and_not_written(toy: Toy, lanes) -> None:
    """Its gradient stays as it is, where it is; what clips it is the scale."""
    for clip in ("none", "lane", "global"):
        collector = LaneGradients(dict(toy.named_parameters()), clip=clip, max_norm=0.3, lane_weights=[1.0])
        toy.zero_grad()
        _backward(toy, lanes[0])
        raw = _gradients(toy)
        before = {name: p.grad.data_ptr() for name, p in toy.named_parameters()}
        collector.add(0)
        gathered = collector.finish()
        assert {name: p.grad.data_ptr() for name, p in toy.named_parameters()} == before
        assert all(torch.equal(p.grad, raw[name]) for name, p in toy.named_parameters())
        expected = 1.0 if clip == "none" else min(1.0, 0.3 / (_norm(raw) + 1e-6))
        assert expected == 1.0 or expected < 0.9, "the test needs a gradient that is clipped"
        torch.testing.assert_close(gathered.scale, torch.tensor(expected))


def test_lanes_that_are_added_up_need_no_scale(toy: Toy, lanes) -> None:
    gathered = _run(toy, lanes, [0, 1, 2, 3], _collector(toy, "lane"))
    assert gathered.scale == 1.0


def test_collector_starts_afresh_each_step(toy: Toy, lanes) -> None:
    collector = _collector(toy, "lane")
    first = _run(toy, lanes, [0, 1, 2, 3], collector)
    gradients = _gradients(toy)
    toy.zero_grad()
    second = _run(toy, lanes, [0, 1, 2, 3], collector)
    assert torch.equal(first.norms, second.norms)
    _assert_close(_gradients(toy), gradients)


@pytest.mark.parametrize("clip", ["lane", "global", "none"])
def test_lent_gradients_are_not_kept(toy: Toy, lanes, clip: str) -> None:
    """Every lane's gradient lies in the same tensors, as those of CUDA graphs that share their memory."""
    collector = _collector(toy, clip)
    expected = _run(toy, lanes, [0, 1, 2, 3], collector)
    gradients = _gradients(toy)
    toy.zero_grad()
    places = {name: torch.empty_like(p) for name, p in toy.named_parameters()}
    for index, lane in enumerate(lanes):
        _backward(toy, lane)
        for name, parameter in toy.named_parameters():
            parameter.grad = places[name].copy_(parameter.grad)
        collector.add(index, lent=True)
        for place in places.values():
            place.fill_(math.nan)
    found = collector.finish()
    assert torch.equal(found.norms, expected.norms)
    _assert_close({name: found.scale * gradient for name, gradient in _gradients(toy).items()}, gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", ["lane", "global", "none"])
def test_what_is_not_finite_shows(toy: Toy, lanes, clip: str, value: float) -> None:
    collector = _collector(toy, clip)
    found = _run(toy, lanes, [0, 1, 2, 3], collector)
    assert bool(found.norm.isfinite() & found.norms.isfinite().all())
    toy.zero_grad()
    for index, lane in enumerate(lanes):
        _backward(toy, lane)
        if index == 0:
            toy.second.bias.grad[2] = value
        collector.add(index)
    found = collector.finish()
    assert not bool(found.norm.isfinite())
    assert found.norms.isfinite().tolist() == [False, True, True, True], "it shows where it is from"


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode():
        named = {"a": nn.Parameter(torch.empty(3, 2)), "b": nn.Parameter(torch.empty(()))}
        for clip in ("lane", "global", "none"):
            collector = LaneGradients(named, clip=clip, max_norm=0.3, lane_weights=[0.5, 0.5])
            for lane in range(2):
                for p in named.values():
                    p.grad = torch.empty(p.shape)
                collector.add(lane)
            gathered = collector.finish()
            with pytest.raises(Exception, match=r"local_scalar_dense|data-dependent|item"):
                bool(gathered.norm.isfinite())  # the stand-in would have raised


def test_misuse_is_named(toy: Toy, lanes) -> None:
    collector = _collector(toy, "lane")
    with pytest.raises(AssertionError, match="no lane was added"):
        collector.finish()
    with pytest.raises(AssertionError, match=r"lane 0 gave no gradient for gain, first\.weight"):
        collector.add(0)
    _backward(toy, lanes[0])
    collector.add(0)
    with pytest.raises(AssertionError, match="added twice"):
        collector.add(0)
    with pytest.raises(AssertionError, match="lanes are missing"):
        collector.finish()


def test_lane_weights() -> None:
    assert lane_weights([36, 36, 10, 5], "equal") == [0.25] * 4
    assert lane_weights([30, 10], "tokens") == [0.75, 0.25]
    tokens = [73728] * 5 + [61440] * 3  # the published step
    assert sum(lane_weights(tokens, "tokens")) == pytest.approx(1)
    assert lane_weights(tokens, "tokens")[0] / lane_weights(tokens, "tokens")[7] == pytest.approx(1.2)


def test_config_names_every_problem() -> None:
    with pytest.raises(UserError) as error:
        GradientConfig(clip="rank", max_norm=0.0, lane_weight="mean")
    for word in ("clip = 'rank'", "lane, global, none", "max_norm = 0.0", "lane_weight = 'mean'"):
        assert word in str(error.value)
