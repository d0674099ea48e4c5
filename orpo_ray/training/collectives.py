"""Small messages between the ranks, on the host. Every function is a collective: all ranks call it.

`group` is the process group; None is the default group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather(value: Any, group: Any = None) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Any, group: Any = None) -> Any:
    """Rank 0's value, on every rank; the other ranks' values are ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def any_rank(flag: bool, group: Any = None) -> bool:
    """Whether the flag is set on at least one rank. Does not wait for the device."""
    if dist.get_world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return bool(flags.item())
