"""What a recipe is and costs: parameters, bytes, operations, lanes, schedules. Nothing is computed on a device."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from epigram.config import Config
from epigram.data.plan import LanePlan
from epigram.model.cost import forward_flops_per_token
from epigram.model.gpt import GPT
from epigram.optim import schedule
from epigram.run.lanes import lane_plan, times_are_measured
from epigram.run.size import forecast_bytes, past_ratio
from epigram.run.wire import messages, step_ms

_CURVE_POINTS = 11
_USUAL_STEPS = 8400  # in 600 s on eight GPUs, of recipes that do not say how many they were made for

DOCUMENTS = {
    "joined": "documents are joined: a token may see the document before its own",
    "isolated": "documents are isolated: attention, smear gate and bigram table end at the start of a document",
}


def describe(config: Config, world_size: int = 1, past: Sequence[Path] = ()) -> dict[str, Any]:
    """Plain values for a table or JSON; `parameters` is the total.

    past: run folders whose sizes correct the forecast; their ratio of fact to forecast is then under `past`.
    """
    with torch.device("meta"):
        model = GPT(config.model)
    parts = {name: p.numel() for name, p in model.named_parameters()}
    ratio = past_ratio(past) if past else None
    forecast = round(forecast_bytes(config, model) * (ratio.mean if ratio else 1))
    plan, measured = lane_plan(config, world_size), times_are_measured(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    banks = [name for name, role in model.roles().items() if role.kind == "matrix"]
    sent = messages(
        shapes, banks, len(plan.times), world_size, clip=config.gradients.clip, muon_dtype=config.optim.muon.dtype
    )
    spent_ms = step_ms(plan, sent) if measured else None
    num_steps = config.budget.steps or None
    if num_steps is None and spent_ms is not None:
        num_steps = max(round(1000 * config.budget.optimize_s / spent_ms), 1)
    return {
        "recipe": config.recipe,
        "summary": config.summary,
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "forecast_bytes": forecast + config.artifact.code_bytes,
        **({"past": asdict(ratio)} if ratio else {}),
        "cap_bytes": config.artifact.cap_bytes,
        "documents": config.model.documents,
        "lanes": _lanes(config, plan),
        "lane_times": "measured, ms" if measured else "modelled, operations",
        "balance": plan.balance,
        "world_sizes": _world_sizes(config),
        "wire": [asdict(message) for message in sent],
        "step_ms": spent_ms,
        "steps": num_steps,
        "warnings": list(schedule.shortfalls(config.schedule, num_steps)) if num_steps else [],
        "tokens_per_step": config.tokens_per_step,
        "flops_per_token": _flops(config),
        "float8": config.run.float8,
        "schedule": _curve(config, num_steps),
    }


def _lanes(config: Config, plan: LanePlan) -> list[dict[str, float]]:
    """share: of the time of the slowest process, which the lane takes."""
    slowest = max(plan.loads)
    return [
        {
            "lane": i,
            "rank": plan.rank_of(i),
            "seq_len": lane.seq_len,
            "num_seqs": lane.num_seqs,
            "share": plan.times[i] / slowest,
        }
        for i, lane in enumerate(config.flat_lanes)
    ]


def _world_sizes(config: Config) -> list[dict[str, float]]:
    """Each number of processes that the lanes can be shared by, and what the plan for it predicts."""
    plans = [lane_plan(config, n) for n in range(1, len(config.flat_lanes) + 1)]
    return [{"processes": len(plan.ranks), "balance": plan.balance, "speedup": plan.speedup} for plan in plans]


def _flops(config: Config) -> list[dict[str, float]]:
    """Training operations of a token (three forwards' worth) for each length of the recipe."""
    rows = []
    for seq_len in sorted(config.seq_lens):
        parts = forward_flops_per_token(config.model, seq_len)
        rows.append({"seq_len": seq_len, **{k: 3 * v for k, v in parts.items()}, "total": 3 * sum(parts.values())})
    return rows


def _curve(config: Config, num_steps: int | None) -> list[dict[str, float]]:
    """The schedules over a run of so many equal steps; where that is not known, of those the recipe was made for."""
    budget_s = config.budget.optimize_s
    num_steps = num_steps or config.budget.max_steps or config.schedule.made_for_steps or _USUAL_STEPS
    rows = []
    for point in range(_CURVE_POINTS):
        progress = point / (_CURVE_POINTS - 1)
        step = round(progress * num_steps)
        rows.append(
            {
                "progress": progress,
                "lr": schedule.lr_multiplier(progress * budget_s, step, budget_s, config.schedule),
                "momentum": schedule.muon_momentum(step, config.schedule),
                "mile_gamma": schedule.mile_gamma(progress, config.schedule),
            }
        )
    return rows


def print_description(description: dict[str, Any]) -> None:
    """The same as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{escape(description['recipe'])}[/bold]: {escape(description['summary'])}")
    share = description["forecast_bytes"] / description["cap_bytes"]
    console.print(
        f"{description['parameters']:,} parameters, about {description['forecast_bytes']:,} bytes packed: "
        f"{100 * share:.0f} % of the cap of {description['cap_bytes']:,}"
    )
    if ratio := description.get("past"):
        console.print(
            f"{ratio['runs']} past run(s) came to {ratio['mean']:.4f} of their forecasts ({ratio['low']:.4f} to "
            f"{ratio['high']:.4f}); this one is corrected by it"
        )
    console.print(DOCUMENTS[description["documents"]])
    tables: list[tuple[str, list[dict[str, Any]]]] = [
        ("parameters", [{"part": k, "parameters": v} for k, v in description["parameters_by_part"].items()]),
        (
            f"lanes of a step ({description['tokens_per_step']:,} tokens; times: {description['lane_times']}; "
            f"predicted balance {100 * description['balance']:.1f} %)",
            description["lanes"],
        ),
        ("numbers of processes that work", description["world_sizes"]),
        (
            "what each process sends in a step, and ms over NVLink (H100)",
            [message for message in description["wire"] if message["sent_bytes"]],
        ),
        ("training operations of a token", description["flops_per_token"]),
        ("schedules", description["schedule"]),
    ]
    for title, rows in tables:
        if not rows:  # one process sends nothing
            continue
        table = Table(title=title, title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if column in ("part", "what", "behind") else "right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        console.print(table)
    if description["float8"]:
        console.print("trains with the products of the layers in float8 (run.float8)")
    if description["step_ms"] is not None:
        console.print(
            f"slowest process's lanes and all messages, none hidden: {description['step_ms']:.2f} ms a step, without "
            "the update"
        )
    for warning in description["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True, highlight=False)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
