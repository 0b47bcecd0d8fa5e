"""transformers' `save_pretrained` of a model with swapped layers: right, or refused by name.

`from_pretrained` builds the original classes: entries that these do not have it leaves out, and
what it misses it draws anew, with a warning alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

NAME = "save_pretrained"


class Guarded:
    """Stands for `save_pretrained` on an instance: looks at the layers, then calls the class's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            RuntimeError: a layer whose `state_dict` is not that of an `nn.Linear`. Nothing was
                written.
        """
        for path, module in self.model.named_modules():
            if not hasattr(type(module), "computes_weight"):  # as all but dense layers have
                continue
            if not {*module.state_dict()} <= {"weight", "bias"}:
                raise RuntimeError(
                    f"{NAME}: expected layers with weight and bias alone, which from_pretrained "
                    f"builds; got {path}, a {type(module).__name__} (bigops.save writes the model "
                    "as it is)"
                )
        return getattr(type(self.model), NAME)(self.model, *args, **kwargs)


def guard(model: nn.Module) -> None:
    """Let the models of transformers in ``model`` refuse to save what would not load."""
    for module in model.modules():
        if any(cls.__module__ == "transformers.modeling_utils" for cls in type(module).__mro__):
            vars(module).setdefault(NAME, Guarded(module))
