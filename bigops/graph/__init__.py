"""What is done to a user's model: finding, proving and swapping layers, and the record of it."""

from bigops.graph.add_lora import add_lora_
from bigops.graph.fuse import fuse_
from bigops.graph.pack import pack_, unpack_
from bigops.graph.plain import plain

__all__ = ["add_lora_", "fuse_", "pack_", "plain", "unpack_"]
