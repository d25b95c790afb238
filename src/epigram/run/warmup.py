"""Runs every shape and phase of the coming run once, before the clock starts, and then undoes it all.

Compilation, autotuning and the first allocation of everything take place here. The tokens are made up, so no data is
read; afterwards all state is restored, and a hash over every byte of it proves so.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from epigram.progress import Progress
from epigram.run.setup import Session, state_of

_STEPS = 2  # the second one sees the state that the first one allocated


def warm_up(session: Session) -> None:
    """Compile and exercise; on return every tensor, the loader and the random state are as before."""
    before = state_hash(session)
    saved = {part: {k: v.detach().clone() for k, v in named.items()} for part, named in state_of(session).items()}
    random = torch.random.get_rng_state()
    phases = [None, session.quantized] if session.config.schedule.qat_threshold > 0 else [None]
    lanes = session.config.flat_lanes
    with Progress("warm-up", len(phases) * _STEPS * len(session.lanes), "lanes") as bar:
        for transform in phases:
            for _ in range(_STEPS):
                for lane in session.lanes:
                    _backward(session, lanes[lane].num_seqs, lanes[lane].seq_len, transform)
                    session.gradients.add(lane)
                    bar.advance()
                gathered = session.gradients.finish(session.reduce())
                session.optimizer.step(1.0, 0.9, gathered.scale)
                session.optimizer.zero_grad()
                session.average.update()
    _restore(session, saved)
    torch.random.set_rng_state(random)
    after = state_hash(session)
    assert before == after, "the warm-up left a trace in the state"


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
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _backward(session: Session, num_seqs: int, seq_len: int, transform: object) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (num_seqs, seq_len + 1)
    tokens = torch.randint(session.config.model.vocab_size, shape, generator=generator).to(session.context.device)
    gamma = torch.zeros((), device=session.context.device) if session.config.schedule.mile_peak else None
    floor = session.config.loss.mile_floor
    session.lane_loss(tokens[:, :-1], tokens[:, 1:], gamma, floor, transform).backward()  # type: ignore[arg-type]


@torch.no_grad()
def _restore(session: Session, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    for part, named in state_of(session).items():
        for name, tensor in named.items():
            tensor.copy_(saved[part][name])
