"""Runs every shape and phase of the coming run once, before the clock starts, and then undoes it all.

Compilation, autotuning, the first allocation of everything and the recording of CUDA graphs take place here. The tokens
are made up, so no data is read; afterwards all state is restored, and a hash over every byte of it proves so.

What is compiled is kept on disk, so that the next warm-up is short: by Triton in ~/.triton/cache (TRITON_CACHE_DIR), by
torch.compile in the temp folder (TORCHINDUCTOR_CACHE_DIR), by quack in quack_cache below the user's name in the temp
folder (QUACK_CACHE_DIR).
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from epigram.data.lanes import Lane
from epigram.dist.share import copy_in, own_part
from epigram.model.gpt import BankTransform
from epigram.progress import Progress
from epigram.run.graphs import Key, LaneGraph
from epigram.run.setup import Engine, Session, state_of
from epigram.run.train import StepPlan, compute_step, forward_backward, gamma_of, lane_step

_STEPS = 2  # the second one sees the state that the first one allocated
_PLAN = StepPlan(step=0, elapsed_s=0.0, progress=0.0, lr_multiplier=1.0, momentum=0.9, gamma=0.0, qat=False)


def warm_up(session: Session) -> None:
    """Compile, record and exercise; on return every tensor, the loader and the random state are as before."""
    before = state_hash(session)
    saved = {part: {k: v.detach().clone() for k, v in named.items()} for part, named in state_of(session).items()}
    random = torch.random.get_rng_state()
    parts: list[tuple[str, Callable[[], object]]] = [
        (_words(lane, transform), partial(prepare_lane, session, lane, transform))
        for transform in _phases(session)
        for lane in lane_shapes(session)
    ]
    batches = [made_up_tokens(session, session.config.flat_lanes[lane]) for lane in session.lanes]
    parts += [("a whole step", partial(compute_step, session, batches, _PLAN))] * _STEPS
    with Progress("warm-up", len(parts), "parts", shown=session.context.is_main) as bar:
        for words, work in parts:
            bar.begin(words)
            work()
            session.context.synchronize()
            bar.advance()
    _restore(session, saved)
    torch.random.set_rng_state(random)
    after = state_hash(session)
    assert before == after, "the warm-up left a trace in the state"


def _phases(engine: Engine) -> list[BankTransform | None]:
    return [None, engine.quantized] if engine.config.schedule.qat_threshold > 0 else [None]


def _words(lane: Lane, transform: BankTransform | None) -> str:
    phase = ", quantization-aware" if transform else ""
    return f"forward and backward of {lane.num_seqs} x {lane.seq_len} tokens{phase}"


def lane_shapes(engine: Engine) -> list[Lane]:
    """The distinct shapes of this process's lanes, the largest first: what is recorded later fits into its memory."""
    lanes = dict.fromkeys(engine.config.flat_lanes[index] for index in engine.lanes)
    return sorted(lanes, key=lambda lane: -lane.num_tokens)


def prepare_lane(engine: Engine, lane: Lane, transform: BankTransform | None) -> None:
    """Compile forward and backward of lanes of this shape in this phase, and record them if the engine does."""
    batch, gamma = made_up_tokens(engine, lane), gamma_of(engine, _PLAN.gamma)
    if engine.capture is not None:
        engine.graphs[Key(tuple(batch.shape), transform is not None)] = LaneGraph(
            engine.capture,
            partial(_forward_backward, engine, transform),
            list(engine.model.parameters()),
            batch.to(engine.context.device),
            gamma,
        )
    lane_step(engine, batch, gamma, transform)
    engine.optimizer.zero_grad()


def _forward_backward(engine: Engine, transform: BankTransform | None, tokens: Tensor, gamma: Tensor | None) -> Tensor:
    return forward_backward(engine, tokens, gamma, transform)


def made_up_tokens(engine: Engine, lane: Lane) -> Tensor:
    """Tokens for a lane: (num_seqs, seq_len + 1), see `random_tokens`."""
    return random_tokens(engine, lane.num_seqs, lane.seq_len + 1)


def random_tokens(engine: Engine, rows: int, cols: int) -> Tensor:
    """Made-up tokens (rows, cols) as the loader would hand them out: int64 on the host, page-locked for CUDA."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(engine.config.model.vocab_size, (rows, cols), generator=generator)
    return tokens.pin_memory() if engine.context.device.type == "cuda" else tokens


def state_hash(session: Session) -> str:
    """SHA-256 over model, optimizer, averages, gradients left over, random state and the loader's position."""
    digest = hashlib.sha256()
    digest.update(torch.random.get_rng_state().numpy().tobytes())
    digest.update(repr([name for name, p in session.model.named_parameters() if p.grad is not None]).encode())
    for part, named in state_of(session).items():
        for name in sorted(named):
            digest.update(f"{part}.{name}".encode())
            digest.update(_bytes(named[name]))
    digest.update(repr(sorted(session.loader.state_dict().items())).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return own_part(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def _restore(session: Session, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    for part, named in state_of(session).items():
        for name, tensor in named.items():
            copy_in(tensor, saved[part][name])
