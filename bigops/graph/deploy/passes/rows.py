"""``addmm`` on rows that were flattened before and are unfolded behind is a linear layer.

So GPT-2's Conv1D, whose weight is ``[K, N]``, and what `nn.Linear` becomes in other exporters.
"""

from __future__ import annotations

from torch import fx

from bigops.graph.deploy.passes.rewrite import (
    VIEWS,
    args,
    arguments,
    aten,
    call,
    is_call,
    only_user,
    owned,
    replace,
    same,
    store,
)


def run(module: fx.GraphModule) -> int:
    """Turn addmm and mm with a weight of the module into ``aten.linear`` on x as it was."""
    done = 0
    for node in list(module.graph.nodes):
        if not is_call(node, aten.addmm.default, aten.mm.default):
            continue
        given = arguments(node)
        x, weight, bias = _operands(node)
        matrix = owned(module, weight)
        if matrix is None or given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
            continue
        if bias is not None and bias.meta["val"].dim() != 1:
            continue
        end, source = node, x
        unfolded = only_user(node)
        if is_call(x, *VIEWS) and unfolded is not None and is_call(unfolded, *VIEWS):
            before, after = args(x)[0].meta["val"], unfolded.meta["val"]
            k, n = matrix.shape
            lead = before.shape[:-1]
            whole = same(before.shape[-1], k) and same(after.shape[-1], n)
            if whole and len(lead) == after.dim() - 1 and all(map(same, lead, after.shape[:-1])):
                source, end = args(x)[0], unfolded
        rows = store(module, f"{weight.target}_rows", matrix.t().contiguous(), before=end)
        linear = call(
            end,
            aten.linear.default,
            {"input": source, "weight": rows, "bias": bias},
            like=end,
        )
        replace(end, linear)
        if end is not node:
            module.graph.erase_node(node)
        done += 1
    return done


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    if node.target is aten.mm.default:
        x, weight = args(node)
        return x, weight, None
    bias, x, weight = args(node)[:3]
    return x, weight, bias
