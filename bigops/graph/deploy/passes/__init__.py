"""Passes over an ATen graph of torch, one file each: `bigops.deploy` and the compile backend.

A pass is ``run(module) -> int``: it rewrites the graph of an `fx.GraphModule` in place, gives the
number of places where it did, and leaves what it does not know. The graph is one of torch.export
before any decomposition (``aten.linear``, ``aten.scaled_dot_product_attention``,
``aten.layer_norm``), or the same made of a graph of dynamo's; nodes carry a fake tensor in
``meta["val"]``. A pass that reads weights finds them as attributes of the module
(`rewrite.owned`); where they are inputs of the graph it does nothing.
"""

from __future__ import annotations

from torch import fx

from bigops.graph.deploy.passes import (
    attention,
    attention_bf16,
    clean,
    epilogue,
    fold,
    inline,
    norm,
    products,
    quantize_once,
    repeated,
    rotary,
    rows,
    shared,
    siblings,
    u8_chain,
    written_out,
)

# In this order: what one leaves is what the next looks for.
PASSES = {
    "inline": inline.run,
    "clean": clean.run,
    "fold": fold.run,
    "repeated": repeated.run,
    "rows": rows.run,
    "siblings": siblings.run,
    "pack": products.pack,
    "fuse": products.fuse,
    "written_out": written_out.run,
    "epilogue": epilogue.run,
    "u8_chain": u8_chain.run,
    "rotary": rotary.run,
    "attention": attention.run,
    "attention_bf16": attention_bf16.run,
    "norm": norm.run,
    "quantize_once": quantize_once.run,
    "shared": shared.run,
}
# Those that make new weights of the module's own, which nobody may write afterwards.
OWNING = ("fold", "rows", "siblings", "pack", "u8_chain", "shared")
# Those that put ops of this package into a graph.
GIVE_OPS = ("pack", "fuse", "epilogue", "u8_chain", "rotary", "attention", "norm", "quantize_once")


def run(module: fx.GraphModule, owns: bool) -> dict[str, int]:
    """All passes in their order; how often each of them rewrote something.

    ``owns``: whether the tensors of the module are its own.
    """
    counts = {}
    for name, rewrite in PASSES.items():
        if owns or name not in OWNING:
            counts[name] = rewrite(module)
            module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return counts
