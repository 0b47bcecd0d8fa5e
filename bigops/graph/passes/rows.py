"""``addmm`` on rows that were flattened before and are unfolded behind is a linear layer.

So GPT-2's Conv1D, whose weight is ``[K, N]``, and what `nn.Linear` becomes in other exporters.
"""

from __future__ import annotations

from torch import fx

from bigops.graph.passes.rewrite import (
    VIEWS,
    arguments,
    aten,
    call,
    is_call,
    only_user,
    owned,
    replace,
    same,
    store,
    value,
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
        if bias is not None and (value(bias) is None or value(bias).dim() != 1):  # type: ignore
            continue
        end, source = node, x
        unfolded = only_user(node)
        if is_call(x, *VIEWS) and unfolded is not None and is_call(unfolded, *VIEWS):
            before, after = value(x.args[0]), value(unfolded)
            assert before is not None and after is not None
            lead = before.shape[:-1]
            if (
                len(lead) == after.dim() - 1
                and all(map(same, lead, after.shape[:-1]))
                and same(before.shape[-1], matrix.shape[0])
                and same(after.shape[-1], matrix.shape[1])
            ):
                source, end = x.args[0], unfolded
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
        x, weight = node.args
        return x, weight, None  # type: ignore[return-value]
    bias, x, weight = node.args[:3]
    return x, weight, bias  # type: ignore[return-value]
