"""What this machine has (`machine`), which kernels ran (`note`, `record`), and measured tables.

Anything in bigops may import this room. It imports no op, and only the data of crossover.py names
one.
"""

from bigops.backend import machine
from bigops.backend.record import note, record

__all__ = ["machine", "note", "record"]
