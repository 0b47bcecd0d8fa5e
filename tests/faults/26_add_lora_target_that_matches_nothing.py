"""A target pattern that adapts nothing has to be reported, also when another one matches.

Sources: huggingface/trl#5430 (gate_proj, up_proj in one module), casper-hansen/AutoAWQ#464.
"""

import sys

from torch import nn

import bigops

wrong = []
for name, model, targets, idle in (
    ("misspelt", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["0", "no_such_layer"], "no_such_layer"),
    ("Llama block", nn.Sequential(bigops.nn.GatedMLP(16, 32)), ["*gate_proj", "*up_proj", "*down_proj"], "gate"),
):  # fmt: skip
    try:
        record = bigops.add_lora_(model, rank=2, targets=targets)
    except ValueError:
        continue
    if idle not in str(record):
        wrong.append(f"{name}: {targets}: {len(record.done)} done, nothing said of {idle!r}")
print("\n".join(wrong) or "ok")
sys.exit(bool(wrong))
