"""A lane's forward and backward, timed as a run executes them: for the benchmark of a step, and for that of lanes."""

from epigram.data.lanes import Lane
from epigram.model.cost import training_flops
from epigram.run.bench.base import Bench, Row, Work
from epigram.run.setup import Engine
from epigram.run.train import gamma_of, lane_step
from epigram.run.warmup import made_up_tokens


def time_lane(bench: Bench, name: str, lane: Lane) -> Row:
    """Of a lane of this shape, on made-up tokens; replayed where the engine has recorded it."""
    engine, batch = bench.engine, made_up_tokens(bench.engine, lane)

    def work() -> None:
        lane_step(engine, batch, gamma_of(engine, engine.config.schedule.mile_peak), None)
        engine.optimizer.zero_grad()

    return bench.time(name, work, lane_work(engine, lane), amounts={"tokens": lane.num_tokens})


def lane_work(engine: Engine, lane: Lane) -> Work:
    """The products and attention of a forward and a backward, which has twice as many."""
    return Work(flops=training_flops(engine.config.model, lane.seq_len) * lane.num_tokens)
