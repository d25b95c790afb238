"""The update of the weights and its parts, on made-up gradients."""

from epigram.run.bench._updates import Updates
from epigram.run.bench.base import Bench

REPEATS = 20
OPTIONS = frozenset({"profile"})


def run(bench: Bench) -> None:
    updates = Updates(bench)
    updates.time_rules()
    updates.time_optimizer()
    updates.time_average()
    updates.time_clip()
    updates.time_all("whole update")
