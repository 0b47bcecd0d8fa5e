"""Ten architectures of transformers by six configs: numbers, generate, files, adapters, the record.

Models have random weights of tiny configs; nothing is downloaded. CI runs two configs of each.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import Int4, Int8, LowRank, Sparse
from bigops.compress.config import Config
from bigops.graph.record import Record
from tests.accept.conftest import Accept

pytest.importorskip("transformers")

import transformers

from tests.accept.census.twin import (
    MODEL_DB,
    compressed_layers,
    dequantised,
    hold_layers,
    snr,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

IDS = torch.arange(2, 16).view(2, 7)


def _model(kind: str, head: str, inputs: dict[str, Tensor], **fields: Any) -> Any:
    """What makes the model, and what it is called with."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**fields)
        model: nn.Module = getattr(transformers, f"{kind}{head}")(config).eval()
        with torch.no_grad():  # 0.02, as they come, would hide each layer behind the residuals
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
        return model

    return make, inputs


TEXT = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
GROUPED = {**HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin_().view(2, 3, 32, 32)

ARCHITECTURES: dict[str, tuple[Callable[[int], nn.Module], dict[str, Tensor]]] = {
    "T5": _model(
        "T5",
        "ForConditionalGeneration",
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
        **{**TEXT, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        decoder_start_token_id=0,
    ),
    "BERT": _model("Bert", "ForMaskedLM", {"input_ids": IDS}, **TEXT, **WIDE, **HEADS),
    "MobileBERT": _model(
        "MobileBert",
        "ForMaskedLM",
        {"input_ids": IDS},
        **{**TEXT, **WIDE, **HEADS, "embedding_size": 32, "intra_bottleneck_size": 32},
        true_hidden_size=32,
    ),
    "ALBERT": _model(
        "Albert", "ForMaskedLM", {"input_ids": IDS}, **TEXT, **WIDE, **HEADS, embedding_size=32
    ),
    "ViT": _model(
        "ViT",
        "ForImageClassification",
        {"pixel_values": IMAGE},
        **{**WIDE, **HEADS, "image_size": 32, "patch_size": 8, "num_labels": 10},
    ),
    "Llama": _model("Llama", "ForCausalLM", {"input_ids": IDS}, **TEXT, **WIDE, **GROUPED),
    # Its blocks are Conv1D, whose weights are [in, out].
    "GPT-2": _model(
        "GPT2",
        "LMHeadModel",
        {"input_ids": IDS},
        **{**TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        tie_word_embeddings=False,
    ),
    # Each token goes to all experts: which it goes to is no question of rounding then.
    "Mixtral": _model(
        "Mixtral",
        "ForCausalLM",
        {"input_ids": IDS},
        **{**TEXT, **WIDE, **GROUPED, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "Mamba": _model(
        "Mamba",
        "ForCausalLM",
        {"input_ids": IDS},
        **{**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        tie_word_embeddings=False,
    ),
    "Whisper": _model(
        "Whisper",
        "ForConditionalGeneration",
        {
            "input_features": torch.linspace(-9, 9, 2 * 16 * 64).cos_().view(2, 16, 64),
            "decoder_input_ids": IDS[:, :5],
        },
        **{**TEXT, "d_model": 64, "num_mel_bins": 16, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 32},
        **{"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_target_positions": 64},
        **{"decoder_start_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
}
CONFIGS: dict[str, Config] = {
    "Int8": Int8(),
    "Int4": Int4(),
    "Sparse": Sparse(0.5),
    "Sparse + Int8": Sparse(0.8) + Int8(),
    "LowRank": LowRank(16),
    "LowRank + Int8": LowRank(16) + Int8(),
}
TIGHT = {"Int4", "Sparse", "LowRank"}  # their products take x as it is
STORED = ("scale", "u_scale", "u", "values")  # what a planted fault multiplies by 1.1


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def held(model: nn.Module, twin: nn.Module, inputs: dict[str, Tensor], tight: bool) -> None:
    """The model and each of its layers against its dequantised twin."""
    got, exact = logits(model, inputs), logits(twin, inputs)
    if tight:
        error, largest = (got - exact).abs().max(), exact.abs().max()
        assert error <= 1e-4 * largest, f"off by {error / largest:.2e} of the largest logit"
    else:
        db = snr(got, exact.double())
        assert db >= MODEL_DB, f"{db:.1f} dB"
    if tight:
        hold_layers(model, twin, inputs, lambda x: x, 100.0)
    elif not any(layer.rank for layer in map(model.get_submodule, compressed_layers(model))):
        hold_layers(model, twin, inputs)
    else:  # what lies between the factors is rounded, too
        hold_layers(model, twin, inputs, lambda x: x, 28.0)


def check_faults(model: nn.Module, twin: nn.Module, inputs: dict[str, Tensor], tight: bool) -> None:
    """Planted: what one layer stores is 10% off. It is seen; the worst by the logits alone."""
    worst = float("inf")
    paths = compressed_layers(model)
    for path in {*paths[::4], paths[-1]}:
        layer = model.get_submodule(path)
        stored = next(t for name in STORED if (t := getattr(layer, name, None)) is not None)
        kept = stored.detach().clone()
        stored.data.mul_(1.1)
        ran: list[bool] = []
        handle = layer.register_forward_hook(lambda *_, ran=ran: ran.append(True))
        worst = min(worst, snr(logits(model, inputs), logits(twin, inputs).double()))
        handle.remove()
        if ran:  # a pooler without readers may never be called
            with pytest.raises(AssertionError):
                held(model, twin, inputs, tight)
        stored.data.copy_(kept)
    assert worst < MODEL_DB, f"{worst:.1f} dB"


def check_generate(model: nn.Module, twin: nn.Module, name: str, tight: bool) -> None:
    _, inputs = ARCHITECTURES[name]
    if not model.can_generate():  # type: ignore[operator]
        assert name in ("BERT", "MobileBERT", "ALBERT", "ViT")
        return
    asked = {n: t for n, t in inputs.items() if n != "decoder_input_ids"}
    found, expected = (
        m.generate(**asked, max_new_tokens=5, min_new_tokens=5, do_sample=False)  # type: ignore[operator]
        for m in (model, twin)
    )
    assert found.shape == expected.shape
    assert found.shape[1] >= 5
    if tight:
        assert torch.equal(found, expected)


def check_record(model: nn.Module, record: Record, before: int) -> None:
    """Each byte of the model as it was belongs to one entry, and each layer says what it takes."""
    assert record.model_bytes == before
    entries = [e.bytes_before for e in record.done]
    entries += [e.bytes for e in (*record.skipped, *record.unseen)]
    assert sum(entries) == before
    assert [e.name for e in record.done] == compressed_layers(model)
    for entry in record.done:
        assert entry.bytes_after == nbytes(model.get_submodule(entry.name)) <= entry.bytes_before


def nbytes(module: nn.Module) -> int:
    """Of all parameters and buffers; those that are tied count once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.nbytes}.values())


def check_adapters(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Three steps lower the loss and move nothing but adapters, each of those that take part."""
    record = bigops.add_lora_(model, 2)
    layers = [entry.name for entry in record.done]
    ours = {n for n, p in model.named_parameters() if p.requires_grad}
    assert ours
    assert all(any(n.startswith(f"{layer}.adapters.") for layer in layers) for n in ours)
    target = logits(model, inputs).roll(1, 0)
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(4):
        loss = (model(**inputs).logits - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        if len(losses) < 4:
            optimizer.step()
    assert losses[3] < losses[0], losses
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert moved <= ours
    fed = {n.partition(".adapters.")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert {n.partition(".adapters.")[0] for n in moved} == fed


def reload(name: str, folder: str) -> None:
    """In a fresh process: load each file into a model of other weights, and keep its logits."""
    torch.set_num_threads(1)
    make, inputs = ARCHITECTURES[name]
    for path in sorted(Path(folder).glob("*.safetensors")):
        model = bigops.load(path, model=make(1))
        torch.save(logits(model, inputs), path.with_suffix(".logits"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, tmp_path: Path, accept: Accept) -> None:
    make, inputs = ARCHITECTURES[name]
    count = max(2, accept.count(len(CONFIGS)))
    first = list(ARCHITECTURES).index(name)
    names = [list(CONFIGS)[(first + 3 * i + i // 2) % len(CONFIGS)] for i in range(count)]
    assert len({*names}) == count
    expected, layers = {}, {}
    for number, config in enumerate(names):
        model, tight = make(0), config in TIGHT
        before = nbytes(model)
        record = bigops.compress_(model, CONFIGS[config], keep="all")
        check_record(model, record, before)
        twin = dequantised(model)
        held(model, twin, inputs, tight)
        check_faults(model, twin, inputs, tight)
        held(model, twin, inputs, tight)
        check_generate(model, twin, name, tight)
        bigops.save(model, tmp_path / f"{number}.safetensors")
        expected[number] = logits(model, inputs)
        layers[config] = len(record.done)
        check_adapters(model, inputs)
    call = (
        f"from tests.accept.test_architectures import reload; reload({name!r}, {str(tmp_path)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", call], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for number, wanted in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{number}.logits"), wanted), names[number]
    accept.result(cells=count, wrong=0, layers=layers)


# Who has the weight of the first embedding besides.
TIED = {
    "T5": ("shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    "BERT": ("bert.embeddings.word_embeddings", ["cls.predictions.decoder"]),
    "Whisper": ("model.decoder.embed_tokens", ["proj_out"]),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(name: str, tmp_path: Path) -> None:
    """One storage for an embedding and its head, in memory and in the file; numbers by the twin."""
    make, inputs = ARCHITECTURES[name]
    first, others = TIED[name]
    for config in (Int8(embeddings=True), Int4(embeddings=True)):
        model = make(0)
        record = bigops.compress_(model, config, keep="all")
        table: Any = model.get_submodule(first)
        for other in others:
            layer: Any = model.get_submodule(other)
            assert layer.values is table.values
            assert layer.scale is table.scale
        assert sum(entry.bytes_after for entry in record.done) == sum(
            nbytes(model.get_submodule(entry.name)) for entry in record.done
        ) - sum(t.nbytes for t in (table.values, table.scale)) * len(others)
        tight = config == Int4(embeddings=True)
        twin = dequantised(model)
        held(model, twin, inputs, tight)
        check_generate(model, twin, name, tight)
        bigops.save(model, tmp_path / "tied.safetensors")
        again = bigops.load(tmp_path / "tied.safetensors", model=make(1))
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        assert nbytes(again) == nbytes(model)
        again.load_state_dict(model.state_dict())
        assert nbytes(again) == nbytes(model)
