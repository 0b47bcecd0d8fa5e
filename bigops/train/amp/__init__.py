"""NVIDIA apex's ``amp`` on CPU and GPU: a script changes one import, ``from bigops import amp``.

::

    from bigops import amp  # was: from apex import amp

    model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
        optimizer.step()

What each level means is in `initialize`. Differences to apex:

- ``O1`` is torch's autocast around the model's ``forward``, whose floating results are float32;
  nothing in torch is patched, and what is called outside of ``forward`` is not cast. The lists are
  torch's. Products and convolutions are float16 and losses float32, as in apex. What apex runs in
  float32 besides (softmax, norms, exp, log, pow, rsqrt, sums and their like) torch does on a GPU
  too, but for ``std`` and ``var``; on a CPU all of these but ``prod`` stay in the dtype that they
  are given. ``binary_cross_entropy``, which apex forbids, raises on a GPU and is float32 on a CPU.
- ``O2``: a ``state_dict`` of the model holds the masters, and loading it restores them, so that a
  run goes on with the same bits (apex loses them).
- Overflow is agreed on by all ranks of torch.distributed, see `bigops.optim.grad_norm`.
- ``O4`` and ``O5`` are ``O1`` and ``O2`` in bfloat16 with a scale of 1, as in ROCm's apex.
- ``register_half_function`` and its like patch a module for everyone and are refused; the
  decorators `half_function`, `float_function` and `promote_function` are there.
"""

from __future__ import annotations

from typing import NoReturn

from bigops.train.amp.functions import float_function, half_function, promote_function
from bigops.train.amp.initialize import initialize, load_state_dict, state_dict
from bigops.train.amp.scaling import master_params, scale_loss

__all__ = [
    "float_function",
    "half_function",
    "initialize",
    "load_state_dict",
    "master_params",
    "promote_function",
    "scale_loss",
    "state_dict",
]

_INSTEAD = {
    f"register_{kind}_function": f"module.name = amp.{kind}_function(module.name)"
    for kind in ("half", "float", "promote")
} | {
    "init": "amp.initialize(model, optimizer, opt_level='O1')",
    "disable_casts": "torch.autocast(device_type, enabled=False)",
}


def __getattr__(name: str) -> NoReturn:
    if name in _INSTEAD:
        raise AttributeError(f"amp.{name}: not served, since it patches; use {_INSTEAD[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
