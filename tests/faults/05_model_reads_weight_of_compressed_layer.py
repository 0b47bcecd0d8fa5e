"""A model whose forward looks at `layer.weight` (T5, Mamba, ..) must still run after compress_.

Sources: huggingface/transformers#36254, #24439, intel/neural-compressor#900.
"""

import sys

import torch
from torch import nn

import bigops


class LooksAtWeight(nn.Module):
    """What T5DenseActDense does before its second product."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x):
        h = torch.relu(self.wi(x))
        if isinstance(self.wo.weight, torch.Tensor) and h.dtype != self.wo.weight.dtype:
            h = h.to(self.wo.weight.dtype)
        return self.wo(h)


wrong = []
x = torch.randn(8, 256)
for config in (bigops.Int8(), bigops.Int4(), bigops.Fp8(), bigops.Sparse(0.5), bigops.LowRank(16)):
    for example in (None, x):
        model = LooksAtWeight().eval()
        bigops.compress_(model, config, example)
        try:
            with torch.inference_mode():
                model(x)
        except Exception as error:
            given = "with" if example is not None else "without"
            wrong.append(f"{config} {given} example_inputs: {type(error).__name__}: {error}")
try:
    from transformers import T5Config, T5ForConditionalGeneration
except ImportError:
    pass
else:
    ids = torch.randint(2, 100, (2, 7))
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    small = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(small).eval()
    bigops.compress_(model, bigops.Int8())
    try:
        with torch.inference_mode():
            model(**inputs)
    except Exception as error:
        wrong.append(f"transformers T5, Int8(): {type(error).__name__}: {error}")
print("\n".join(wrong) or "ok")
sys.exit(bool(wrong))
