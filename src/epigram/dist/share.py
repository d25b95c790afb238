"""Tensors whose axis 0 (the layers of a bank) several processes share: who has which rows, and the whole as a DTensor.

Every process has as many rows as the first, the last ones perhaps fewer or none, as `Shard(0)` of
torch.distributed.tensor cuts a tensor. In messages, where all parts must be equally long, what the last ones lack are
rows of zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # imported when needed: it takes a second, and one process does without it
    from torch.distributed.device_mesh import DeviceMesh

    from epigram.dist.context import Context


class Share(NamedTuple):
    """The part of `num_rows` rows that process `rank` of `world_size` has."""

    num_rows: int
    rank: int
    world_size: int

    @property
    def rows_each(self) -> int:
        """Rows of a process, zeros at the end included."""
        return -(-self.num_rows // self.world_size)

    @property
    def padded_rows(self) -> int:
        """Rows of all processes, zeros included: `num_rows` where it divides by the number of processes."""
        return self.rows_each * self.world_size

    @property
    def own(self) -> tuple[int, int]:
        """First row and the one after the last; the same where there is none."""
        first = min(self.rank * self.rows_each, self.num_rows)
        return first, min(first + self.rows_each, self.num_rows)

    @property
    def num_own(self) -> int:
        return self.own[1] - self.own[0]

    def of(self, whole: Tensor) -> Tensor:
        """The own rows of a tensor with all of them, as a view."""
        return whole[self.own[0] : self.own[1]]


def mesh_of(context: Context) -> DeviceMesh | None:
    """All processes in a row, as a DTensor wants it; None for one that has no others."""
    if not context.has_peers:
        return None
    assert dist.group.WORLD is not None
    return mesh_over(dist.group.WORLD, context.device.type)


def mesh_over(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """The processes of a group in a row, for tensors on this type of device."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device_type)


def as_whole(own: Tensor, num_rows: int, mesh: DeviceMesh | None) -> Tensor:
    """The tensor of `num_rows` rows of which this process has `own`: a DTensor around it, or with no mesh itself."""
    if mesh is None:
        return own
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((num_rows, *own.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def own_part(tensor: Tensor) -> Tensor:
    """What lies in this process of a tensor that several may share; the tensor itself if none do."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def is_shared(tensor: Tensor) -> bool:
    """Whether `tensor` is one of `as_whole`."""
    return own_part(tensor) is not tensor


def copy_in(target: Tensor, saved: Tensor) -> None:
    """target <- saved, in place; `saved` is whole, or shared as `target` is."""
    if is_shared(target) and not is_shared(saved):
        mesh = target.device_mesh  # type: ignore[attr-defined]
        saved = Share(target.shape[0], mesh.get_local_rank(), mesh.size()).of(saved)
    own_part(target).copy_(own_part(saved))
