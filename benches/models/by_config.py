"""Architectures by transformers' configs, with random weights: speed and agreement, no accuracy.

Widths and depths are the published ones (BERT-base, ALBERT-base, ViT-B/16, T5-small); the Llama
type has 160 million parameters. Random weights are drawn from a fixed seed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bigops.benches.harness import LeftOut
from bigops.benches.models.subject import SAMPLES, Inputs, Subject, batches, tokens

PAST = 255  # tokens in the cache of a decode step: with the new one it attends to 256


def transformers() -> Any:
    """The package.

    Raises:
        LeftOut: not installed.
    """
    try:
        import transformers as package
    except ImportError as error:
        raise LeftOut(f"transformers does not load: {error!s:.200}") from None
    return package


def cache_word(model: nn.Module) -> str:
    """What the installed version calls the cache, among its arguments and in what it returns."""
    words = inspect.signature(model.forward).parameters
    return "cache" if "cache" in words else "past_key_values"


class TextEncoder(nn.Module):
    """ids, mask ``[batch, tokens]`` -> the last hidden state ``[batch, tokens, hidden]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


class Images(nn.Module):
    """pixels ``[batch, 3, height, width]`` -> logits ``[batch, classes]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


class Prefill(nn.Module):
    """ids ``[batch, tokens]`` -> logits ``[batch, tokens, vocabulary]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


class Step(nn.Module):
    """One decode step on a cache of fixed length that is given: no `generate()`, no growing graph.

    ids ``[batch, 1]``, then keys and values of each layer ``[batch, heads, past, size]`` -> logits
    ``[batch, 1, vocabulary]``. The new key and value would be written by the caller.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.word = cache_word(model)

    def forward(self, ids: Tensor, *past: Tensor) -> Tensor:
        cache = transformers().DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        return self.model(input_ids=ids, use_cache=True, **{self.word: cache}).logits


class T5Step(nn.Module):
    """One decode step of T5 against what its encoder said; the decoder's cache is given.

    ids ``[batch, 1]``, hidden ``[batch, tokens, width]``, then for each layer the decoder's own
    keys and values ``[batch, heads, past, size]`` and those of the encoder ``[.., tokens, size]``
    -> logits ``[batch, 1, vocabulary]``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.word = cache_word(model)

    def forward(self, ids: Tensor, hidden: Tensor, *past: Tensor) -> Tensor:
        package = transformers()
        own, cross = package.DynamicCache(), package.DynamicCache()
        for layer in range(len(past) // 4):
            keys, values, cross_keys, cross_values = past[4 * layer : 4 * layer + 4]
            own.update(keys, values, layer)
            cross.update(cross_keys, cross_values, layer)
        cache = package.EncoderDecoderCache(own, cross)
        outputs = package.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)
        return self.model(
            decoder_input_ids=ids, encoder_outputs=outputs, use_cache=True, **{self.word: cache}
        ).logits


def drawn(kind: str, config: Any, **options: Any) -> Any:
    """A model of transformers with weights from seed 0, ready to run."""
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers(), kind)(config, **options)
    return model.eval().requires_grad_(False)


def text(name: str, model: nn.Module, batch: int, length: int, vocabulary: int) -> Subject:
    """An encoder of tokens; the last quarter of every fourth row is padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[3::4, length * 3 // 4 :] = 0

    def given(seed: int) -> Inputs:
        return tokens(batch, length, vocabulary, seed), mask

    samples = [given(seed) for seed in range(1, batches(batch) + 1)]
    return Subject(name, TextEncoder(model).eval(), given(0), samples)


def bert(name: str, batch: int = 8, length: int = 128, **sizes: int) -> Subject:
    """BERT-base, or with other ``sizes`` of its config."""
    config = transformers().BertConfig(**sizes)
    model = drawn("BertModel", config, add_pooling_layer=False)  # nothing reads it here
    return text(name, model, batch, length, config.vocab_size)


def albert(name: str, batch: int = 8, length: int = 128, **sizes: int) -> Subject:
    """ALBERT-base: one layer's weights, run twelve times."""
    wide = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072} | sizes
    config = transformers().AlbertConfig(**wide)
    model = drawn("AlbertModel", config, add_pooling_layer=False)
    return text(name, model, batch, length, config.vocab_size)


def vit(name: str, batch: int = 1, **sizes: int) -> Subject:
    """ViT-B/16 with 1,000 classes."""
    config = transformers().ViTConfig(num_labels=1000, **sizes)
    size, random = config.image_size, torch.Generator().manual_seed(0)

    def pixels() -> Inputs:
        return (torch.randn(batch, 3, size, size, generator=random),)

    model = Images(drawn("ViTForImageClassification", config)).eval()
    samples = [pixels() for _ in range(batches(batch))]
    return Subject(name, model, pixels(), samples, classes=True)


def llama(name: str, step: bool, length: int = PAST + 1, **sizes: int) -> Subject:
    """A Llama of 162 million parameters, 12 layers of 768, grouped heads, tied head."""
    given = {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    } | sizes
    config = transformers().LlamaConfig(**given)
    model = drawn("LlamaForCausalLM", config)
    return causal(name, model, config, step, length)


def causal(name: str, model: nn.Module, config: Any, step: bool, length: int) -> Subject:
    """The prefill of ``length`` tokens by a decoder, or the step behind ``length - 1`` of them."""
    vocabulary = config.vocab_size
    if not step:
        given = [(tokens(1, length, vocabulary, seed),) for seed in range(SAMPLES + 1)]
        return Subject(name, Prefill(model).eval(), given[0], given[1:], classes=True)

    def inputs(seed: int) -> Inputs:
        with torch.no_grad():
            ids = tokens(1, length - 1, vocabulary, seed)
            cache = getattr(model(input_ids=ids, use_cache=True), cache_word(model))
        kept = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return tokens(1, 1, vocabulary, seed + 1000), *kept

    # a few: each is a prefill and its cache
    samples = [inputs(seed) for seed in range(1, SAMPLES // 4 + 1)]
    return Subject(name, Step(model).eval(), inputs(0), samples, classes=True, decode=True)


def t5(name: str, step: bool, batch: int = 8, length: int = 64, **sizes: int) -> Subject:
    """T5-small: its encoder, or one step of its decoder behind 31 tokens."""
    config = transformers().T5Config(**sizes)
    model = drawn("T5ForConditionalGeneration", config)
    whole = text(name, model.get_encoder(), batch, length, config.vocab_size)
    if not step:
        return whole
    start = torch.zeros(batch, 1, dtype=torch.int64)

    def inputs(seed: int, encoded: Inputs) -> Inputs:
        with torch.no_grad():
            hidden = whole.model(*encoded)
            before = tokens(batch, 31, config.vocab_size, seed)
            outputs = transformers().modeling_outputs.BaseModelOutput(last_hidden_state=hidden)
            out = model(decoder_input_ids=before, encoder_outputs=outputs, use_cache=True)
            cache = getattr(out, cache_word(model))
        kept = [
            part
            for own, cross in zip(
                cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True
            )
            for part in (own.keys, own.values, cross.keys, cross.values)
        ]
        return start, hidden, *kept

    samples = [inputs(seed, encoded) for seed, encoded in enumerate(whole.calibration, 1)]
    return Subject(
        name, T5Step(model).eval(), inputs(0, whole.inputs), samples, classes=True, decode=True
    )
