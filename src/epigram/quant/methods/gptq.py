"""GPTQ: round the columns one after another, each time moving the rest to make up for the error.

For a product x Wᵀ with inputs X the error of the output is tr(E H Eᵀ), H = XᵀX, E the error of W. With U the
upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), rounding column j to q leaves the least error when the later columns
change by -(w_j - q) U[j, j+1:] / U[j, j] (Frantar et al., arXiv 2210.17323). As published in parameter-golf
#1212: columns in descending order of diag H, damping of diag H, and of five clips the one with the least
*plain* squared error.

How it is made fast: rows do not influence each other, so all matrices of one shape, and all clips of one
matrix, run in one sweep; a row whose clips coincide (the floor is active) is swept once. The sweep works in
units of the step and keeps columns contiguous; a column costs four small kernels, errors reach the columns of
their own sub-block one by one, those of their block by a product per sub-block, and the rest by a product per
block. Nothing waits for the device inside the sweep.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from epigram.errors import UserError
from epigram.quant.grid import Grid, storable
from epigram.quant.methods.base import HessianError, Outcome, full_float32, pack

NEEDS_HESSIANS = True
_SUB_BLOCK = 32  # on two busy CPU cores several times faster than a block of 128 without sub-blocks
_TRIES = 4  # factorisations before giving up; each raises the damping tenfold


@dataclass(frozen=True, kw_only=True)
class GptqConfig:
    """damping: added to the diagonal of H, as a share of its mean; `damping_passes` times, each time of the
    mean that the last one left (#1212 does it once while calibrating and once more in GPTQ). block_size:
    columns after which the rest of the matrix is brought up to date."""

    damping: float = 0.01
    damping_passes: int = 2
    block_size: int = 128

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.damping <= 1:
            problems.append(f"quant.gptq.damping must be 0 to 1 (0.005 to 0.02 is usual), got {self.damping}")
        if not 1 <= self.damping_passes <= 10:
            problems.append(f"quant.gptq.damping_passes must be 1 to 10, got {self.damping_passes}")
        if not 1 <= self.block_size <= 4096:
            problems.append(f"quant.gptq.block_size must be 1 to 4096 columns, got {self.block_size}")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def total_damping(self) -> float:
        """What all passes together add, as a share of mean(diag H)."""
        return (1 + self.damping) ** self.damping_passes - 1


@torch.no_grad()
def quantize(weights: Tensor, hessians: Tensor | None, grid: Grid, config: GptqConfig) -> Outcome:
    """Quantize n matrices of one shape.

    weights: (n, rows, cols) float32; hessians: (n, cols, cols), XᵀX times any positive number, undamped; both
    finite. A column whose input was always zero (diag H = 0) gets weight 0. Raises HessianError when a
    Hessian cannot be factorised with a thousand times the damping.
    """
    num, _, cols = weights.shape
    assert hessians is not None, "GPTQ needs Hessians"
    assert hessians.shape == (num, cols, cols)
    with full_float32():
        factors = factorize(hessians, config.total_damping)
        jobs = _row_jobs(storable(grid.candidates(weights)))
        alive = weights.masked_fill(factors.dead[:, None], 0)
        ordered = _take(_take(alive, jobs.row, 1), factors.order, 2)  # (n, jobs, cols in descending order)
        codes = sweep(ordered, jobs.step, factors.unit_upper, grid.qmax, config.block_size)
        codes = torch.empty_like(codes).scatter_(2, factors.order[:, None].expand_as(codes), codes)
        codes, step = _best_candidate(weights, codes, jobs)
    return Outcome(pack(codes, step, grid.qmax), factors.damping.tolist())


class Factors(NamedTuple):
    """Hessians, factorised.

    order: (n, cols) columns in descending diag H. unit_upper: (n, cols, cols) float32, U in that order
    with each row divided by its diagonal. dead: (n, cols) bool. damping: (n,) what was added, relative to
    mean(diag H).
    """

    order: Tensor
    unit_upper: Tensor
    dead: Tensor
    damping: Tensor


def factorize(hessians: Tensor, damping: float) -> Factors:
    """Cholesky factors of the inverses of (n, cols, cols) Hessians, damped and ordered; see Factors.

    In float64: devices then differ by rounding ties of the sweep alone. With J the reversal of the order,
    J H J = L Lᵀ makes V = J L J upper triangular with H = V Vᵀ, so U = V⁻¹: one factorisation, no inverse.
    """
    H = hessians.to(torch.float64)
    diagonal = H.diagonal(dim1=1, dim2=2).clone()
    dead = diagonal == 0
    mean = diagonal.mean(dim=1, keepdim=True)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    diagonal = torch.where(dead, torch.where(mean > 0, mean, 1.0), diagonal).gather(1, order)
    reverse = order.flip(1)
    H = _take(_take(H, reverse, 1), reverse, 2)
    added = torch.full_like(mean, damping)
    for _ in range(_TRIES):
        H.diagonal(dim1=1, dim2=2).copy_((diagonal + added * mean.clamp_min(0)).flip(1))
        lower, info = torch.linalg.cholesky_ex(H)
        failed = (info != 0)[:, None]
        if not failed.any():
            break
        tried, added = added, torch.where(failed, (added * 10).clamp_min(0.01), added)
    else:
        first = int(failed.int().argmax())
        raise HessianError(first, float(tried[first]))
    eye = torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
    upper = torch.linalg.solve_triangular(lower.flip(1, 2), eye.expand_as(H), upper=True)
    unit_upper = upper / upper.diagonal(dim1=1, dim2=2)[:, :, None]
    return Factors(order, unit_upper.float(), dead, added.squeeze(1))


def sweep(weights: Tensor, step: Tensor, unit_upper: Tensor, qmax: int, block_size: int) -> Tensor:
    """Codes (n, rows, cols) as float32 of `weights` whose columns are in the order of `unit_upper`.

    weights: (n, rows, cols); step: (n, rows); unit_upper: (n, cols, cols).
    """
    X = (weights / step[..., None]).mT.contiguous()  # (n, cols, rows): becomes the codes, column by column
    num, cols, rows = X.shape
    coefficient = unit_upper.mT.contiguous()  # [j, i]: how much of column i's error goes to column j > i
    errors = X.new_empty(num, min(block_size, cols), rows)
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        inside = coefficient[:, start:stop, start:stop]
        _sweep_block(X[:, start:stop], inside, errors, qmax)
        if stop < cols:
            rest = coefficient[:, stop:, start:stop]
            X[:, stop:].baddbmm_(rest, errors[:, : stop - start], alpha=-1)
    return X.mT


def _sweep_block(X: Tensor, coefficient: Tensor, errors: Tensor, qmax: int) -> None:
    """Round the columns of one block X (n, block, rows) in place and write what each lost into `errors`."""
    for start in range(0, X.shape[1], _SUB_BLOCK):
        stop = min(start + _SUB_BLOCK, X.shape[1])
        if start > 0:
            X[:, start:stop].baddbmm_(coefficient[:, start:stop, :start], errors[:, :start], alpha=-1)
        for j in range(start, stop):
            column, code = X[:, j : j + 1], X[:, j : j + 1]
            if j > start:
                earlier = coefficient[:, j : j + 1, start:j]
                column = torch.baddbmm(column, earlier, errors[:, start:j], alpha=-1)
            rounded = torch.round(column).clamp_(-qmax, qmax)
            torch.sub(column, rounded, out=errors[:, j : j + 1])
            code.copy_(rounded)


class _RowJobs(NamedTuple):
    """Rows to sweep, once for each different step of a row.

    row, step: (n, jobs) of a job. slot: (n, candidates, rows), the job that answers for this candidate and
    row.
    """

    row: Tensor
    step: Tensor
    slot: Tensor


def _row_jobs(candidates: Tensor) -> _RowJobs:
    """Jobs for (n, candidates, rows) steps. Equal steps of a row are neighbours, since clips ascend.

    A matrix with fewer jobs than another of the batch is padded with repetitions.
    """
    num, _, rows = candidates.shape
    new = torch.ones_like(candidates, dtype=torch.bool)
    new[:, 1:] = candidates[:, 1:] != candidates[:, :-1]
    flat = new.flatten(1)
    number = flat.cumsum(1) - 1
    slot = torch.where(flat, number, -1).view_as(candidates).cummax(dim=1).values
    num_jobs = int(number[:, -1].max()) + 1
    source = flat.int().argsort(dim=1, descending=True, stable=True)[:, :num_jobs]
    return _RowJobs(source % rows, candidates.reshape(num, -1).gather(1, source), slot)


def _best_candidate(weights: Tensor, codes: Tensor, jobs: _RowJobs) -> tuple[Tensor, Tensor]:
    """Codes (n, rows, cols) and steps (n, rows) of each matrix's candidate with the least squared error.

    codes: (n, jobs, cols) in the original order of columns.
    """
    error = torch.addcmul(_take(weights, jobs.row, 1), codes, jobs.step[..., None], value=-1)
    row_error = error.square().sum(dim=2).to(torch.float64)  # (n, jobs)
    num, num_candidates, rows = jobs.slot.shape
    total = row_error.gather(1, jobs.slot.flatten(1)).view(num, num_candidates, rows).sum(dim=2)
    best = total.argmin(dim=1)
    slot = jobs.slot[torch.arange(num, device=best.device), best]  # (n, rows)
    return _take(codes, slot, 1), jobs.step.gather(1, slot)


def _take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Choose (n, m) indices along `dim` 1 or 2 of (n, a, b), for each of the n."""
    if dim == 1:
        return tensor.gather(1, index[:, :, None].expand(-1, -1, tensor.shape[2]))
    return tensor.gather(2, index[:, None, :].expand(-1, tensor.shape[1], -1))
