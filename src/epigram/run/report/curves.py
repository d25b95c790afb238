"""Which curves the report draws from the metrics of its runs."""

from collections.abc import Sequence

from epigram.run.report.plots import Plot, Series
from epigram.run.report.reader import Run

# Curves after that of the loss: key, title, whether the axis begins at zero.
_CURVES = (
    ("val_bpb", "Validation, bits per byte", False),
    ("lr", "Learning rate, share of its peak", True),
    ("momentum", "Momentum", False),
    ("gamma", "Exponent of the entropy weighting", True),
    ("tokens_per_s", "Tokens per second", True),
    ("grad_norm", "Norm of the gradient", True),
)


def curves(runs: Sequence[Run]) -> list[Plot]:
    """The plots for which there is something to draw."""
    loss = _loss_series(runs)
    marks = _phase_marks(runs[0]) if len(runs) == 1 else ()
    plots = [Plot(title="Loss, nats per token", series=loss, settle=True, marks=marks)] if loss else []
    for key, title, from_zero in _CURVES:
        series = []
        for index, run in enumerate(runs):
            steps, values = run.curve(key)
            if len(values) > 1:
                dotted = key.startswith("val_")
                series.append(Series(label="", run=index, steps=steps, values=values, dotted=dotted))
        if series:
            settle = not from_zero and key.startswith("val_")
            plots.append(Plot(title=title, series=tuple(series), settle=settle, from_zero=from_zero))
    return plots


def _loss_series(runs: Sequence[Run]) -> tuple[Series, ...]:
    """Training and validation loss of every run; in words which is which only where there is one run."""
    series = []
    for index, run in enumerate(runs):
        for key, label, dotted in (("train_loss", "training", False), ("val_nats", "validation", True)):
            steps, values = run.curve(key)
            if values:
                series.append(
                    Series(
                        label=label if len(runs) == 1 else "",
                        run=index if len(runs) > 1 or not dotted else 1,
                        steps=steps,
                        values=values,
                        dotted=dotted,
                    )
                )
    return tuple(series)


def _phase_marks(run: Run) -> tuple[tuple[float, str], ...]:
    """Where training went into another phase."""
    marks, phase = [], None
    for row in run.rows:
        if isinstance(row.get("phase"), str) and row["phase"] != phase:
            if phase is not None:
                marks.append((float(row["step"]), row["phase"]))
            phase = row["phase"]
    return tuple(marks)
