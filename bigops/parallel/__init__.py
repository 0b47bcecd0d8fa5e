"""More than one process: launch helpers for data parallel runs, DTensor sharding rules.

``bigops.parallel.sharding`` is not imported here: torch.distributed.tensor takes long to import.
"""

from bigops.parallel.launch import World, init

__all__ = ["World", "init"]
