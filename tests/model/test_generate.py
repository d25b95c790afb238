"""Sampling against closed forms, and the streams against the uncached forward."""

import pytest
import torch
from golden_model import golden, golden_model

from epigram.errors import UserError
from epigram.model.generate import Sampling, draw, probabilities, sample_batch, stream

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))


def test_plain_sampling_is_the_softmax() -> None:
    torch.testing.assert_close(probabilities(LOGITS, Sampling(temperature=1.0)), LOGITS.exp())
    hot = probabilities(LOGITS, Sampling(temperature=2.0))
    torch.testing.assert_close(hot, LOGITS.exp().sqrt() / LOGITS.exp().sqrt().sum())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_truncated_distributions(settings: dict, expected: list[float]) -> None:
    found = probabilities(LOGITS, Sampling(**({"temperature": 1.0} | settings)))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


def test_no_token_of_a_large_vocabulary_is_left_out() -> None:
    """The likely ones add up to 1 in float32 before the others had their turn."""
    logits = 3 * torch.randn(1, 8192, generator=torch.Generator().manual_seed(0))
    found = probabilities(logits, Sampling(temperature=0.8))
    assert (found > 0).all()
    torch.testing.assert_close(found, torch.softmax(logits.double() / 0.8, -1).float())


def test_draws_follow_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = draw(LOGITS.expand(20_000, -1), Sampling(temperature=1.0), generator).flatten()
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, LOGITS.exp()[0], atol=0.015, rtol=0)


def test_greedy_stream_equals_the_uncached_argmax() -> None:
    model, prompt = golden_model(), golden()["short.input_ids"][0, :20].tolist()
    expected = list(prompt)
    for _ in range(30):
        # The stream's rotary base is that of context_len = 96; below the reference length it is the same.
        expected.append(int(model.logits(model(torch.tensor([expected])))[0, -1].argmax()))
    assert list(stream(model, prompt, 30, Sampling(temperature=0.0), context_len=96)) == expected[20:]


def test_seed_decides_and_banned_tokens_never_come() -> None:
    model, prompt = golden_model(), [5, 6, 7]
    runs = [list(stream(model, prompt, 40, Sampling(seed=s), context_len=64)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    common = max(set(runs[0]), key=runs[0].count)
    assert common not in list(stream(model, prompt, 40, Sampling(seed=1), context_len=64, banned=[common]))


def test_batch_of_samples_is_what_the_model_predicts() -> None:
    """At temperature 0 each token after the first is the argmax of the full forward over what came before."""
    model = golden_model()
    tokens = torch.cat(list(sample_batch(model, 3, 25, Sampling(temperature=0.0), banned=[0, 1])), dim=1)
    assert tokens.shape == (3, 25)
    logits = model.logits(model(tokens))
    logits[..., :2] = float("-inf")
    assert torch.equal(logits[:, :-1].argmax(-1), tokens[:, 1:])


@pytest.mark.parametrize("settings", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"top_p": 1e-50}])
@pytest.mark.parametrize("scale", [1.0, 1e37])
def test_the_most_likely_token_always_stays(settings: dict, scale: float) -> None:
    logits = torch.cat([LOGITS * scale, LOGITS.flip(-1) * scale])
    found = probabilities(logits, Sampling(**settings))
    assert found.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert draw(logits, Sampling(**settings), torch.Generator()).tolist() == [[0], [3]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_without_predictions_is_the_users_error(value: float, temperature: float) -> None:
    model = golden_model()
    with torch.no_grad():
        model.embed[7] = value
    for make in (
        lambda how: stream(model, [7, 6], 1, how, context_len=64),
        lambda how: sample_batch(model, 2, 3, how, banned=[1]),
    ):
        with pytest.raises(UserError, match="the model predicts no numbers"):
            list(make(Sampling(temperature=temperature)))


def test_bad_settings_are_refused_together() -> None:
    with pytest.raises(ValueError, match="temperature = -1.*top_k = -2.*top_p = 0.*seed = 9223372036854775808"):
        Sampling(temperature=-1, top_k=-2, top_p=0, seed=2**63)
    with pytest.raises(ValueError, match="seed = -9223372036854775808"):
        Sampling(seed=-(2**63))


@pytest.mark.parametrize("seed", [2**63 - 1, 1 - 2**63, 10**18])
def test_any_seed_that_is_accepted_can_be_used(seed: int) -> None:
    assert len(list(stream(golden_model(), [5], 2, Sampling(seed=seed), context_len=64))) == 2
