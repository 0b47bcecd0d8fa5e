"""Low-rank adapters: on a dense layer (`LoRALinear`) and on a compressed one (`QLoRALinear`)."""

from bigops.nn.lora.lora_linear import LoRAAdapter, LoRALinear, check_adapter
from bigops.nn.lora.qlora_linear import QLoRALinear

__all__ = ["LoRAAdapter", "LoRALinear", "QLoRALinear", "check_adapter"]
