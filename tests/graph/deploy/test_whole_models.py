"""What the passes leave of models of transformers: no product alone, no norm, no activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bigops
from tests.support import tolerance

transformers = pytest.importorskip("transformers")

LAYERS = 2
_SMALL = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": 64}


def _ids(batch: int = 2, length: int = 8) -> torch.Tensor:
    return torch.randint(0, 100, (batch, length))


def _masked(ids: torch.Tensor) -> dict[str, Any]:
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _causal(name: str, **options: Any) -> tuple[Any, Callable[..., dict[str, Any]]]:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=100, intermediate_size=128, **_SMALL, **options
    )
    return getattr(transformers, f"{name}ForCausalLM")(config), lambda *size: {
        "input_ids": _ids(*size),
        "use_cache": False,
    }


def bert() -> tuple[Any, Callable[..., dict[str, Any]]]:
    """As MiniLM."""
    config = transformers.BertConfig(vocab_size=100, intermediate_size=128, **_SMALL)
    return transformers.BertModel(config), lambda *size: _masked(_ids(*size))


def vit() -> tuple[Any, Callable[..., dict[str, Any]]]:
    config = transformers.ViTConfig(intermediate_size=128, image_size=32, patch_size=8, **_SMALL)
    return transformers.ViTModel(config), lambda batch=2, _=0: {
        "pixel_values": torch.randn(batch, 3, 32, 32)
    }


def t5() -> tuple[Any, Callable[..., dict[str, Any]]]:
    """Its encoder."""
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=LAYERS, num_heads=4, vocab_size=100
    )
    return transformers.T5EncoderModel(config), lambda *size: _masked(_ids(*size))


def llama() -> tuple[Any, Callable[..., dict[str, Any]]]:
    return _causal("Llama", num_key_value_heads=2)


def gpt2() -> tuple[Any, Callable[..., dict[str, Any]]]:
    """Its linear layers are Conv1D."""
    config = transformers.GPT2Config(n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=100)
    return transformers.GPT2LMHeadModel(config), lambda *size: {
        "input_ids": _ids(*size),
        "use_cache": False,
    }


def qwen3() -> tuple[Any, Callable[..., dict[str, Any]]]:
    """It norms q and k before they turn."""
    return _causal("Qwen3", num_key_value_heads=2, head_dim=16)


def phi() -> tuple[Any, Callable[..., dict[str, Any]]]:
    """Half of the columns turn."""
    return _causal("Phi", partial_rotary_factor=0.5)


def gpt_neox() -> tuple[Any, Callable[..., dict[str, Any]]]:
    """A quarter of them, in chunks of one product."""
    return _causal("GPTNeoX", rotary_pct=0.25)


# Of each: products, norms, attentions; and what else computes on whole activations.
EXPECTED = {
    bert: (4 * LAYERS + 1, 2 * LAYERS + 1, LAYERS),
    vit: (4 * LAYERS + 1, 2 * LAYERS + 1, LAYERS),
    t5: (4 * LAYERS, 2 * LAYERS + 1, LAYERS),
    llama: (5 * LAYERS + 1, 2 * LAYERS + 1, LAYERS),
    gpt2: (4 * LAYERS, 2 * LAYERS + 1, LAYERS),
}
_TIED = {gpt2: {"aten.linear.default"}}  # a head that shares its weight keeps it, unpacked
_ALONE = (
    "aten.linear.default",
    "aten.addmm.default",
    "aten.mm.default",
    "aten.layer_norm.default",
    "aten.rsqrt.default",
    "aten.native_layer_norm.default",
    "aten.gelu.default",
    "aten.relu.default",
    "aten.silu.default",
    "aten.dropout.default",
    "aten.scaled_dot_product_attention.default",
    "aten.softmax.int",
)


@pytest.mark.slow
@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("config", [None, bigops.Int8()], ids=["dense", "int8"])
def test_nothing_is_left_alone(make: Any, config: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    if config is not None:
        bigops.compress_(model, config)
    deployed = bigops.deploy(model, inputs(2, 8))
    calls = deployed.calls()
    products, norms, attentions = EXPECTED[make]

    def count(*names: str) -> int:
        return sum(calls.get(f"bigops.{name}.code", 0) for name in names)

    assert count("packed_linear", "quantized_linear", "quantized_linear_rows") == products, calls
    assert count("norm", "norm_act_quant") == norms, calls
    assert calls["bigops.attention.default"] == attentions, calls
    assert set(_ALONE) & set(calls) == _TIED.get(make, set()), calls
    for size in ((3, 5), (1, 1)):
        given = inputs(*size)
        with torch.no_grad():
            wanted, got = model(**given)[0], deployed(**given)[0]
        assert tolerance.snr_db(got, wanted) > (100 if config is None else 40)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [llama, qwen3, phi, gpt_neox], ids=lambda make: make.__name__)
def test_rotary_embeddings_are_one_op(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval().to(dtype)
    deployed = bigops.deploy(model, inputs(2, 8))
    calls = deployed.calls()
    assert deployed.counts["rotary"] == calls["bigops.rotary.default"] == 2 * LAYERS, calls
    assert "aten.neg.default" not in calls
    assert calls["aten.cat.default"] == 1, calls  # of the angles, before the blocks
    for size in ((3, 5), (1, 1)):
        given = inputs(*size)
        with torch.no_grad():
            wanted, got = model(**given)[0], deployed(**given)[0]
        assert tolerance.snr_db(got, wanted) > (100 if dtype == torch.float32 else 35)
