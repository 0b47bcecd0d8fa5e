"""chunked_loss_: models of transformers make their own loss, and no logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigops
from bigops import backend
from bigops.benches import memory
from bigops.train import chunked_loss_
from bigops.train.logits import Logits, LossHead
from tests.support.kernels_ran import needs_extension

transformers = pytest.importorskip("transformers")
pytestmark = needs_extension

V = 101
_SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAIR = {
    "d_model": 32,
    "vocab_size": V,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 8, "suppress_tokens": None}

# class of the model, class and arguments of its config
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _SMALL),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**_SMALL, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "vocab_size": V}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "decoder_start_token_id": 0, "tie_word_embeddings": True},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_PAIR, **_WHISPER, "begin_suppress_tokens": None},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _PAIR),  # a bias of its own
    "bert": ("BertForMaskedLM", "BertConfig", _SMALL),  # and of the head
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_SMALL, "head_dim": 8}),  # a soft cap
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_SMALL, "logits_scaling": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_SMALL, "logit_scale": 0.3}),
}


def build(name: str, **other: Any) -> Any:
    kind, config, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**options, **other})
    return getattr(transformers, kind)(config).eval()


def inputs_of(name: str, rows: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(3, V, (rows, tokens))
    given = {"input_ids": labels.clone(), "labels": labels}
    if name == "whisper":
        given = {"input_features": torch.randn(rows, 8, 16), "labels": labels}
    labels[0, :3] = -100
    return given


def step(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def close(got: tuple[Tensor, Any], want: tuple[Tensor, Any], **near: float) -> None:
    torch.testing.assert_close(got[0], want[0], **near)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, msg=lambda m, n=name: f"{n}: {m}", **near)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name: str) -> None:
    """In float64, where only a wrong loss differs; `num_items_in_batch` too."""
    model, inputs = build(name).double(), inputs_of(name)
    if name == "whisper":
        inputs["input_features"] = inputs["input_features"].double()
    calls = [inputs]
    if name not in ("whisper", "t5", "bart"):  # which take none
        calls.append({**inputs, "num_items_in_batch": torch.tensor(11)})
    want = [step(model, **call) for call in calls]
    keys = list(model.state_dict())
    assert chunked_loss_(model) is model
    assert list(model.state_dict()) == keys
    for call, (loss, grads) in zip(calls, want, strict=True):
        with backend.record() as names:
            got = step(model, **call)
        close(got, (loss, grads))
        assert any("linear_cross_entropy.f64.gradient" in n for n in names)
        assert not any("logits" in n for n in names)
    logits = model(**inputs).logits
    assert type(logits) is Logits
    assert logits.shape[-1] == V


@pytest.mark.parametrize("name", ["llama", "t5", "gemma2", "bart"])
def test_autocast(name: str) -> None:
    model, inputs = build(name), inputs_of(name)
    plain = copy.deepcopy(model)
    chunked_loss_(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = plain(**inputs), model(**inputs)
    assert (got.loss.dtype, got.logits.dtype) == (want.loss.dtype, want.logits.dtype)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-3, atol=0)
    # as they were made in the forward pass, also outside of autocast
    torch.testing.assert_close(torch.softmax(got.logits, -1), torch.softmax(want.logits, -1))


def test_bf16_and_the_dtype_of_the_loss() -> None:
    for name in ("llama", "t5"):  # one casts its logits up, the other does not
        model, inputs = build(name).bfloat16(), inputs_of(name)
        want = model(**inputs)
        got = chunked_loss_(model)(**inputs)
        assert (got.loss.dtype, got.logits.dtype) == (want.loss.dtype, want.logits.dtype)
        torch.testing.assert_close(got.loss, want.loss, rtol=2**-7, atol=0)


def test_no_logits_are_allocated() -> None:
    model, inputs = build("llama", vocab_size=4000), inputs_of("llama", 4, 128)
    logits = 4 * 128 * 4000 * 4
    peaks = []
    for _ in range(2):
        peaks.append(memory.measure(lambda: step(model, **inputs)).peak)
        chunked_loss_(model)
    assert peaks[1] < peaks[0] - 2 * logits  # they and their gradient


def test_logits_are_made_when_asked_for() -> None:
    model, inputs = build("llama"), inputs_of("llama")
    want = model(**inputs).logits
    chunked_loss_(model)
    with backend.record() as names:
        out = model(**inputs)
        assert out.logits.shape == want.shape
        assert out.logits.dtype == want.dtype
    assert not any("logits" in n for n in names)
    with backend.record() as names:
        assert torch.equal(out.logits, want)
        assert torch.equal(out.logits.argmax(-1), want.argmax(-1))
        torch.testing.assert_close(out.logits[:, -1].log_softmax(-1), want[:, -1].log_softmax(-1))
        assert torch.equal(out.logits.detach().cpu(), want)
        assert out.logits.tolist() == want.tolist()
    assert names.count("reference.LossHead.logits") == 5
    (model(**inputs).logits[0, 1].sum() * 2).backward()
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with torch._C.DisableTorchFunctionSubclass():  # as in DistributedDataParallel's own nodes
        (model(**inputs).logits[0, 1].sum() * 2).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, grad)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="logits: expected the head's weight as it was"):
        out.logits.sum()
    with pytest.raises(RuntimeError, match="LossHead.logits: expected to be read only"):
        model(**inputs).logits.mul_(2)


def test_views_that_keep_rows_whole() -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    head = LossHead.from_linear(nn.Linear(8, 11), False)
    head.weight.data.copy_(weight)
    head.lazy, plain = True, F.linear(x, weight, head.bias)
    row, mask = torch.tensor([0, 3]), torch.tensor([True, False])
    kept: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[..., :-1, :].contiguous().view(-1, 11),
        lambda t: t[:, 1:].reshape(2, 4, -1),
        lambda t: t[1, -2].float(),
        lambda t: t[:, row, :],
        lambda t: t[mask],
        lambda t: t[None, ..., :],
        lambda t: (t * 0.5 / 3).to(torch.float64),
        lambda t: 30 * torch.tanh(t / 30),
        lambda t: torch.ones(11) + t,
        lambda t: torch.mul(2, t) if type(t) is Logits else 2 * t,
    ]
    for f in kept:
        got = f(head(x))
        assert type(got) is Logits
        torch.testing.assert_close(got.clone(), f(plain))
        assert got.shape == f(plain).shape
    made: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[..., 0],
        lambda t: t[:, :, 1:],
        lambda t: t[0, 0, 0],
        lambda t: t[t > 0],
        lambda t: t.view(-1),
        lambda t: t * -1,
        lambda t: t * torch.rand(2, 5, 11),
        lambda t: t + torch.ones(5, 11),
        lambda t: 2 / t,
        lambda t: torch.div(torch.ones(11), t),
        lambda t: F.cross_entropy(t.transpose(1, 2), torch.zeros(2, 5).long()),
    ]
    for f in made:
        torch.manual_seed(3)
        got = f(head(x)).clone()
        torch.manual_seed(3)
        torch.testing.assert_close(got, f(plain))


def test_generate_and_evaluation_without_labels_are_untouched() -> None:
    model = build("gpt2").eval()
    ids = inputs_of("gpt2")["input_ids"]
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    logits = model(input_ids=ids).logits
    chunked_loss_(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
    got = model(input_ids=ids).logits
    assert type(got) is Tensor
    assert torch.equal(got, logits)
    with pytest.raises(IndexError):  # a forward that raises leaves the head as it was
        model(input_ids=ids + V, labels=ids)
    assert type(model(input_ids=ids).logits) is Tensor


def test_copies_pickles_saves_and_fuses(tmp_path: Path) -> None:
    model, inputs = build("llama tied"), inputs_of("llama tied")
    want = model(**inputs).loss
    chunked_loss_(chunked_loss_(model))  # the second time nothing is left to do
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other(**inputs).logits) is Logits
        torch.testing.assert_close(other(**inputs).loss, want)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).loss, want)
    bigops.fuse_(model, inputs)
    assert type(model.lm_head) is LossHead
    torch.testing.assert_close(model(**inputs).loss, want)
    fused = build("llama")
    bigops.fuse_(fused)
    want = fused(**inputs).loss
    torch.testing.assert_close(chunked_loss_(fused)(**inputs).loss, want)


def test_compiled() -> None:
    model, inputs = build("llama"), inputs_of("llama")
    want = step(model, **inputs)
    chunked_loss_(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**inputs).loss
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    close((loss.detach(), grads), want)


def test_trainer(tmp_path: Path) -> None:
    """Two steps with accumulation, and an evaluation with and without predictions."""
    pytest.importorskip("accelerate")
    rows = [{k: v[0] for k, v in inputs_of("llama", 1).items()} for _ in range(8)]
    metrics, predictions = [], []
    for chunked in (False, True):
        model = build("llama")
        if chunked:
            chunked_loss_(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        loss = trainer.train().training_loss
        metrics.append((loss, trainer.evaluate()["eval_loss"]))
        predictions.append(torch.tensor(trainer.predict(rows).predictions))
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-3, atol=1e-4)


def test_an_adapter_around_it() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build("llama"), inputs_of("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    want = step(model, **inputs)
    close(step(chunked_loss_(model), **inputs), want)
    assert type(model(**inputs).logits) is Logits


# refused by name, the model as it was --------------------------------------------------------


def untouched(model: Any, before: list[type]) -> None:
    assert [type(m) for m in model.modules()] == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_forward_that_needs_the_numbers() -> None:
    class Own(transformers.LlamaForCausalLM):  # type: ignore[name-defined, misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            out = super().forward(input_ids)
            out.loss = out.logits.log_softmax(-1).mean()
            return out

    model = Own(transformers.LlamaConfig(**_SMALL))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="Own needs their numbers in log_softmax"):
        chunked_loss_(model)
    untouched(model, kinds)


def test_a_head_that_is_no_plain_linear_layer() -> None:
    class Head(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = build("llama")
    model.lm_head = Head(32, V)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"lm_head: it is a .*Head, which may do more"):
        chunked_loss_(model)
    untouched(model, kinds)


def test_what_is_no_such_model() -> None:
    with pytest.raises(TypeError, match="model: expected one with output embeddings .* Linear"):
        chunked_loss_(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="got LlamaModel"):
        chunked_loss_(transformers.LlamaModel(transformers.LlamaConfig(**_SMALL)))
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module; got int"):
        chunked_loss_(3)  # type: ignore[arg-type]
    model = build("llama")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="example_inputs: expected inputs that give a loss"):
        chunked_loss_(model, {"input_ids": torch.ones(1, 3).long()})
    with pytest.raises(ValueError, match="example_inputs: expected what LlamaForCausalLM runs on"):
        chunked_loss_(model, {"nothing": 3})
    untouched(model, kinds)


def test_a_loss_that_is_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigops.train import logits

    true = logits.linear_cross_entropy
    monkeypatch.setattr(logits, "linear_cross_entropy", lambda *a, **o: true(*a, **o) * 1.01)
    model = build("llama")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="model: expected a loss that stays the same"):
        chunked_loss_(model)
    untouched(model, kinds)
