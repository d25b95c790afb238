"""The plan of a recipe's lanes over processes, from measured times where the recipe has them, else from operations."""

from epigram.config import Config
from epigram.data.plan import LanePlan, plan_lanes
from epigram.model.cost import training_flops


def lane_plan(config: Config, world_size: int) -> LanePlan:
    """Which of `world_size` processes executes which lanes; UserError when there are more of them than lanes."""
    return plan_lanes(lane_times(config), world_size)


def lane_times(config: Config) -> tuple[float, ...]:
    """The time of each lane: `ms` of its [[lanes]] group, else the operations of its forward and backward.

    The plan needs ratios only; a recipe gives `ms` for all of its groups or for none.
    """
    return tuple(
        group.ms or training_flops(config.model, group.seq_len) * group.seq_len * group.num_seqs
        for group in config.lanes
        for _ in range(group.count)
    )


def times_are_measured(config: Config) -> bool:
    """Whether `lane_times` are milliseconds."""
    return all(group.ms for group in config.lanes)
