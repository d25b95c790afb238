"""Isolated documents: a batch of them computes what each would alone, through every technique, cache and gradient."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from golden_model import CONFIG, golden_model

from epigram.dist.context import Context
from epigram.evaluation import scorer
from epigram.evaluation.windows import Method, StreamingConfig
from epigram.model import gpt
from epigram.model.cache import Cache
from epigram.model.documents import reach
from epigram.model.generate import Sampling, stream
from epigram.model.gpt import GPT
from epigram.run.setup import scoring_losses

BOS = 1
# All is computed in float64. Rotations by other angles round otherwise, and scores are rounded to float32 once.
ROUNDING = 1e-9
FLOAT32 = 3e-7
# The loss of training is taken in float32, of other numbers of tokens.
HEAD = 1e-5


def isolated(**changes) -> GPT:
    """Windowed and full layers, XSA, bigrams, value embeddings, smear, skips, backout, in float64."""
    model = GPT(dataclasses.replace(CONFIG, window=10, documents="isolated", bos_id=BOS, **changes))
    model.load_state_dict(golden_model().state_dict())
    model.compute_dtype = torch.float64
    return model.double()


def text(rows: int, length: int, longest: int = 30, seed: int = 0) -> torch.Tensor:
    """(rows, length) of documents of 1 to `longest` tokens with their BOS; the rows begin in the middle of one."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(4, CONFIG.vocab_size, (rows, length))
    for row in tokens:
        starts = np.cumsum(draw.integers(1, longest + 1, length))
        row[starts[starts < length]] = BOS
    return torch.from_numpy(tokens)


def parts(tokens: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, first, end) of each document, the beginnings of rows included."""
    for row, ids in enumerate(tokens):
        starts = sorted({0, *torch.nonzero(ids == BOS).flatten().tolist(), len(ids)})
        for first, end in pairwise(starts):
            yield row, first, end


def test_reach_is_the_distance_to_the_documents_start() -> None:
    tokens = torch.tensor([[5, 6, BOS, 7, 8, BOS, BOS, 9], [BOS, 5, 6, 7, 8, 9, 10, 11]])
    alone = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert reach(tokens, BOS, None).tolist() == alone
    after = reach(tokens, BOS, torch.tensor([3, 70]))
    assert after.tolist() == [[4, 5, *alone[0][2:]], alone[1]] and after.dtype == torch.int32


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [7, 1, 20, 12]])
def test_reach_goes_on_from_piece_to_piece(pieces: list[int]) -> None:
    tokens, before, found = text(3, 40), None, []
    for piece in tokens.split(pieces, dim=1):
        found.append(reach(piece, BOS, before))
        before = found[-1][:, -1]
    assert torch.equal(torch.cat(found, 1), reach(tokens, BOS, None))


@pytest.mark.parametrize(
    "changes", [{}, {"window_layers": ()}, {"window_layers": (0, 1, 2, 3, 4, 5)}, {"rotary_dim": 0}], ids=str
)
def test_a_batch_of_documents_is_each_alone(changes: dict) -> None:
    """The states of every position: a document's first one is what the first of a window is."""
    model, tokens = isolated(**changes).requires_grad_(False), text(2, 70)
    found = model(tokens)
    for row, first, end in parts(tokens):
        alone = model(tokens[row : row + 1, first:end], rope_len=70)
        torch.testing.assert_close(found[row : row + 1, first:end], alone, rtol=ROUNDING, atol=ROUNDING)


def test_training_on_a_batch_is_training_on_each_document() -> None:
    """Loss and every gradient; the token that ends a document foretells the BOS of the next."""
    model, tokens = isolated(), text(2, 71)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model.loss(inputs, targets)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for row, first, end in parts(inputs):
        share = (end - first) / inputs.numel()
        own = share * model.loss(inputs[row : row + 1, first:end], targets[row : row + 1, first:end])
        own.backward()
        total += own.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=HEAD, atol=0)
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= HEAD * parameter.grad.norm(), name
    joined = GPT(dataclasses.replace(model.config, documents="joined")).double()
    joined.load_state_dict(model.state_dict())
    joined.compute_dtype = torch.float64
    assert abs(float(joined.loss(inputs, targets).detach() - loss.detach())) > 1e-4


def test_a_text_without_documents_is_as_if_they_were_joined() -> None:
    """To the last bit but for the masks that are written out."""
    model, tokens = isolated().requires_grad_(False), text(2, 50).clamp(min=4)
    joined = GPT(dataclasses.replace(model.config, documents="joined")).double().requires_grad_(False)
    joined.load_state_dict(model.state_dict())
    joined.compute_dtype = torch.float64
    torch.testing.assert_close(model(tokens), joined(tokens), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("pieces", [[96], [1] * 96, [50, 1, 1, 44], [13] * 7 + [5]])
@pytest.mark.parametrize("few", [1, 1000])
def test_cached_states_equal_uncached(pieces: list[int], few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces begin before, at and after a BOS."""
    monkeypatch.setattr(gpt, "_FEW", few)
    model, tokens = isolated().requires_grad_(False), text(3, 96)
    cache = Cache(model.config, context_len=96)
    found = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], 1)
    torch.testing.assert_close(found, model(tokens), rtol=ROUNDING, atol=ROUNDING)


def test_last_positions_alone() -> None:
    """What scoring asks for: the last layer's queries are fewer than its keys."""
    model, tokens = isolated().requires_grad_(False), text(2, 60)
    for last in (1, 7, 59, 60):
        torch.testing.assert_close(model(tokens, last=last), model(tokens)[:, -last:], rtol=ROUNDING, atol=ROUNDING)


def test_streaming_is_sliding_where_windows_hold_whole_documents() -> None:
    """And both are each document alone."""
    model, tokens = isolated().requires_grad_(False), text(1, 400, longest=16)[0]
    losses = scoring_losses(model, False, "auto", Context(device=torch.device("cpu")))
    ids = tokens.numpy().astype(np.uint16)

    def nats(method: Method, batch_tokens: int) -> np.ndarray:
        device = torch.device("cpu")
        return scorer.token_nlls(losses.of(method), ids, method, device=device, batch_tokens=batch_tokens)

    expected = np.concatenate(
        [
            model.nll(tokens[None, first:end], tokens[None, first + 1 : end + 1], rope_len=64)[0].numpy()
            for _, first, end in parts(tokens[None, :-1])
        ]
    )
    sliding = nats(Method(name="sliding", seq_len=64, stride=40), 256)
    np.testing.assert_allclose(sliding, expected, rtol=FLOAT32)
    for chunk, batch_tokens in ((0, 100), (16, 64), (7, 7), (64, 1000)):
        streaming = StreamingConfig(segment_tokens=150, overlap=1, chunk_tokens=chunk)
        found = nats(Method(name="streaming", seq_len=64, stride=1, streaming=streaming), batch_tokens)
        np.testing.assert_allclose(found, expected, rtol=FLOAT32)


def test_generation_begins_anew_at_a_bos() -> None:
    """What follows does not depend on the document before."""
    model, sampling = isolated().requires_grad_(False), Sampling(temperature=0.7, seed=3)
    prompt = [BOS, 40, 41, 42]
    alone = list(stream(model, prompt, 12, sampling, context_len=64, banned=[BOS]))
    for before in ([BOS, 9, 8, 7], [50] * 9):
        assert list(stream(model, before + prompt, 12, sampling, context_len=64, banned=[BOS])) == alone


def test_the_compiler_sees_one_graph_for_any_text() -> None:
    model, compiled = isolated(), 0

    def backend(graph, example_inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    loss = torch.compile(model.loss, backend=backend, fullgraph=True, dynamic=False)
    for seed in range(3):
        tokens = text(2, 71, longest=5 + 20 * seed, seed=seed)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        torch.testing.assert_close(loss(inputs, targets), model.loss(inputs, targets), rtol=ROUNDING, atol=ROUNDING)
    assert compiled == 1


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"bos_id = -1 is none of the 128.*documents = \"joined\""):
        dataclasses.replace(CONFIG, documents="isolated", bos_id=-1)
    with pytest.raises(ValueError, match="bos_id = 128 is none of the 128"):
        dataclasses.replace(CONFIG, documents="isolated", bos_id=128)
    with pytest.raises(ValueError, match="documents = 'apart' must be one of joined, isolated"):
        dataclasses.replace(CONFIG, documents="apart")
    assert dataclasses.replace(CONFIG, bos_id=-1).reset_id == -1
