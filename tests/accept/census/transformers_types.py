"""A tiny model of each type that transformers knows, with inputs that it takes, by rules of names.

Nothing is downloaded: configs are the defaults of their classes with known fields made small.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, logging
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.accept.census.tiny import NotBuiltError, Tiny, line, made, runs

PACKAGE = "transformers"
FIRST = "llama"
_GENERATING = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
)

# The first pattern that fits a whole name says what the field becomes.
_RULES = [
    (r"(decoder_|encoder_)?(n_)?vocab_size.*|.*_vocab_size|codebook_size", 128),
    (r".*num_(key_value|kv|query)_?(heads|groups)|num_key_value_heads|n_kv_heads?|.*kv_heads", 2),
    (r".*(num_|n_)?(attention_)?heads?|n_head|num_heads", 4),
    (r"num_experts_per_tok(en)?|.*top_?k(_experts)?|experts_per_token|moe_k", 2),
    (r"n_group|topk_group|(mamba_)?n_groups", 1),
    (r"(mamba_)?chunk_size", 8),
    (r".*num_(local_|routed_)?experts|n_routed_experts|num_expert", 4),
    (r"n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r".*(num|n)_.*layers?|.*_layers|n_layer|num_layers|layers|depth|num_blocks|n_blocks", 2),
    (r".*(q|kv|o|compress)_lora_rank|.*_low_rank_dim", 16),
    (r"qk_rope_head_dim|rope_head_dim|rotary_dim", 8),
    (r"attention_head_size|.*head_dim|d_kv|kv_channels", 8),
    (r".*(intermediate|ffn|ff|mlp|inner).*(size|dim)|d_ff|n_inner|.*ffn_dim|d_inner", 64),
    (r"hidden_dim|(.*_)?hidden_size|d_model|n_embd|(.*_)?embed_dim|emb_dim|dim|width", 32),
    (r"(.*_)?(embedding_size|projection_dim|projection_size|out_hidden_size)", 32),
    (r"mamba_d_state|state_size|ssm_state_size|time_step_rank", 8),
    (r"(max_|n_)(position_embeddings|positions|seq_len.*)|n_positions|n_ctx|max_.*_positions", 128),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size", 8),
    (r"(num_)?frames|num_frames", 4),
    (r"num_mel_bins|feature_size|num_mel_.*", 16),
    (r"num_queries|num_query_tokens|num_latents", 8),
]
# What no rule of names finds.
_GIVEN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
}
# Heads and their width of state space layers: their product is `expand` times the hidden size.
_STATE_SPACE = [
    *(("num_heads", "head_dim"), ("mamba_n_heads", "mamba_d_head")),
    *(("n_mamba_heads", "mamba_headdim"), ("mamba_num_heads", "mamba_head_dim")),
]
_WIDTHS = re.compile(
    r".*(hidden|intermediate|ffn|ff|mlp|inner|embed|model|embd|proj|head)_?(size|dim|channels)?s?"
    r"|d_model|dim|d_ff|d_kv|width"
)


def names() -> list[str]:
    """Every type that some auto class of transformers makes a model of."""
    known = {*modeling_auto.MODEL_MAPPING_NAMES}
    for name in _GENERATING:
        known |= {*getattr(modeling_auto, name)._model_mapping._model_mapping}
    return sorted(known & {*CONFIG_MAPPING_NAMES})


def build(kind: str, seed: int = 0) -> Tiny:
    """The smallest model of ``kind`` whose forward runs, always with the same numbers.

    Raises:
        NotBuiltError: no way made one.
    """
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    causes: list[str] = []
    for tier in ("fields", "sections", "heads", "eighth", "layers"):
        try:
            config = _config(CONFIG_MAPPING[kind], tier)
        except Exception as error:
            causes.append(f"config: {line(error)}")
            continue
        for auto in (*_GENERATING, "AutoModel"):
            maker = getattr(modeling_auto, auto)
            if type(config) not in maker._model_mapping:
                continue
            make = partial(maker.from_config, config)
            try:
                model = made(make, seed)
            except ImportError as error:
                raise NotBuiltError(f"package: {line(error)}") from None
            except NotBuiltError as error:
                causes.append(str(error))
                continue
            except Exception as error:
                causes.append(f"model: {line(error)}")
                continue
            for inputs in _inputs(model, config):
                if cause := runs(model, inputs):
                    causes.append(cause)
                else:
                    return Tiny(model, inputs, f"{auto} {tier}", partial(made, make, seed + 1))
    order = ("output", "inputs", "model", "size", "config")
    causes.sort(key=lambda cause: order.index(cause.partition(":")[0]))
    raise NotBuiltError(causes[0] if causes else "config: no auto class")


# --- configs --------------------------------------------------------------------------------


def _config(kind: type[PreTrainedConfig], tier: str) -> PreTrainedConfig:
    config = kind(**_small(kind(), tier))
    _set_tokens(config, [10])
    return config


def _small(default: PreTrainedConfig, tier: str) -> dict[str, Any]:
    """The arguments that make a config of this class small."""
    given: dict[str, Any] = dict(_GIVEN.get(default.model_type, {}))
    names = {*inspect.signature(type(default).__init__).parameters, *vars(default)}
    for name in names - {"self", "kwargs", "args", *given}:
        try:
            value = getattr(default, name, None)
        except Exception:  # a field that each layer has by itself
            continue
        if isinstance(value, PreTrainedConfig):
            given[name] = type(value)(**_small(value, tier))
        elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            new = [_field(name, v, tier) for v in value]
            if new != list(value):
                given[name] = type(value)(new)
        elif type(value) is int and (new_value := _field(name, value, tier)) != value:
            given[name] = new_value
    heads, kv = given.get("num_attention_heads"), given.get("num_key_value_heads")
    if heads and kv and default.num_key_value_heads == default.num_attention_heads:
        given["num_key_value_heads"] = heads
    rope = getattr(default, "rope_parameters", None) or getattr(default, "rope_scaling", None)
    if isinstance(rope, dict) and "mrope_section" in rope and tier == "fields":
        width = getattr(default, "head_dim", None)
        width = width or default.hidden_size // default.num_attention_heads
        total = max(2, sum(rope["mrope_section"]) * 8 // width)  # 8: the head_dim of the rules
        given["rope_parameters"] = {**rope, "mrope_section": [total - total // 2, total // 2, 0]}
    expand = getattr(default, "expand", None) or getattr(default, "mamba_expand", None)
    if expand and "hidden_size" in given:
        width = int(expand * given["hidden_size"])
        for heads_name, width_name in _STATE_SPACE:
            if hasattr(default, heads_name) and hasattr(default, width_name):
                given |= {heads_name: 4, width_name: width // 4}
        if getattr(default, "mamba_d_ssm", None):
            given["mamba_d_ssm"] = width
    if tier == "sections" and hasattr(default, "rope_parameters"):
        sections = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, **sections}
    if tier == "fields" and "head_dim" in names and getattr(default, "head_dim", 0) is None:
        given["head_dim"] = 8
    if hasattr(default, "prediction_length") and not default.prediction_length:
        given["prediction_length"] = 4
    return given


def _field(name: str, value: int, tier: str) -> int:
    if value <= 0 or "feat_extract" in name or name.startswith("index_"):
        return value
    if name == "depths":
        return 1
    rule = next((small for pattern, small in _RULES if re.fullmatch(pattern, name)), None)
    counts = rule is not None and (rule == 128 or rule <= 2 or "expert" in name)
    if tier in ("fields", "sections", "heads") or counts:
        if rule is not None:
            kept = tier == "heads" and name.endswith(("head_dim", "head_size"))
            return value if kept else min(value, rule)
        if name in ("hidden_sizes", "encoder_hidden_sizes", "embed_dims", "dims", "channels"):
            return max(8, value // 8)
        return value
    if "heads" in name:
        return value
    if tier == "eighth" and value % 8 == 0 and value >= 64 and _WIDTHS.fullmatch(name):
        return value // 8
    return value


def _set_tokens(config: PreTrainedConfig, free: list[int]) -> None:
    """Special tokens inside of the small vocabulary, each another one; parts have their model's."""
    config.use_cache = False
    parts = [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    for part in parts:
        _set_tokens(part, free)
    for name, value in list(vars(config).items()):
        if type(value) is not int or not name.endswith(("_id", "token_index")):
            continue
        if value >= 128:
            setattr(config, name, free[0] % 128)
            free[0] += 1
        for part in parts if "token" in name else ():
            if type(getattr(part, name, None)) is int:
                setattr(part, name, getattr(config, name))


# --- inputs ---------------------------------------------------------------------------------


def _inputs(model: nn.Module, config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """What the model may take, the likeliest first."""
    generator = torch.Generator().manual_seed(1)

    def ids(*shape: int) -> Tensor:
        return torch.randint(70, 100, shape, generator=generator)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for inputs in _by_name(model, config, ids, numbers):
        yield _with_required(inputs, model, config, numbers)


def _with_required(
    inputs: dict[str, Any], model: nn.Module, config: PreTrainedConfig, numbers: Any
) -> dict[str, Any]:
    """What has no default, too: masks of ones, embeddings of the model's width."""
    found = dict(inputs)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.default is not parameter.empty or name in found:
            continue
        if name.endswith("mask") and inputs:
            first = next(iter(inputs.values()))
            length = first.shape[1] if not first.is_floating_point() else first.shape[-1]
            found[name] = torch.ones(first.shape[0], length, dtype=torch.long)
        elif name.endswith(("embeds", "hidden_states", "embeddings")):
            found[name] = numbers(2, 7, getattr(config, "hidden_size", 32))
    return found


def _by_name(
    model: nn.Module, config: PreTrainedConfig, ids: Any, numbers: Any
) -> Iterator[dict[str, Any]]:
    names = list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    text = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    if "decoder_input_ids" in names:
        text["decoder_input_ids"] = ids(2, 5)
    if "bbox" in names:
        text["bbox"] = torch.ones(2, 7, 4, dtype=torch.long)
    pixels = _pixels(config, numbers)
    text = {name: value for name, value in text.items() if name in names}
    if "input_ids" in names:
        if main == "input_ids":
            yield text
        if "pixel_values" in names:
            for value in pixels:
                yield {**text, "pixel_values": value}
        yield text
    if "grid_thw" in names:  # patches of two images in one list
        area = getattr(config, "patch_size", 8) ** 2
        for frames in (getattr(config, "temporal_patch_size", 1), 1):
            width = area * getattr(config, "in_channels", 3) * frames
            grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
            for name in ("hidden_states", "pixel_values"):
                if name in names:
                    yield {name: numbers(32, width), "grid_thw": grid}
                    patch = (getattr(config, "patch_size", 8),) * 2
                    yield {name: numbers(32, 3, *patch), "grid_thw": grid}
    if "pixel_values" in names or main == "pixel_values":
        for value in pixels:
            yield {"pixel_values": value}
    for name in (main, "pixel_values_videos", "input_features", "input_values", "features"):
        if name not in names or name in ("input_ids", "pixel_values"):
            continue
        decoder = {"decoder_input_ids": ids(2, 5)} if "decoder_input_ids" in names else {}
        for shape in _shapes(name, config):
            yield {name: numbers(*shape), **decoder}
    if "past_values" in names:
        length = getattr(config, "context_length", None) or 4
        lags = max(getattr(config, "lags_sequence", None) or [0])
        yield {"past_values": numbers(2, length, getattr(config, "num_input_channels", 1))}
        past = torch.zeros(2, length + lags)
        yield {
            "past_values": past + 1,
            "past_time_features": torch.zeros(*past.shape, getattr(config, "num_time_features", 0)),
            "past_observed_mask": past + 1,
        }
    yield {}  # what is required alone


def _pixels(config: PreTrainedConfig, numbers: Any) -> list[Tensor]:
    parts = [config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))]
    channels = next((c for p in parts if (c := getattr(p, "num_channels", None))), 3)
    sizes: list[Any] = [s for p in parts if (s := getattr(p, "image_size", None))]
    frames = next((f for p in parts if (f := getattr(p, "num_frames", None))), 4)
    found = []
    for size in [*sizes[:2], 32, 64, 224]:
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        if max(high, wide) <= 256:
            found += [numbers(2, channels, high, wide), numbers(2, frames, channels, high, wide)]
    return found


def _shapes(name: str, config: PreTrainedConfig) -> Iterator[tuple[int, ...]]:
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 16
    if name == "pixel_values_videos":
        frames = getattr(config, "frames_per_clip", None) or getattr(config, "num_frames", 4)
        size = getattr(config, "crop_size", None) or getattr(config, "image_size", 32)
        yield (2, frames, 3, size, size)
    if positions := getattr(config, "max_source_positions", None):
        yield (2, mel, 2 * positions)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and (n := getattr(part, "num_mel_bins", None)):
            yield (2, n, 2 * getattr(part, "max_source_positions", 64))
    if name == "input_values":
        yield (2, 4000)
    yield (2, 64, mel)
    yield (2, mel, 64)
    for field in ("input_feat_per_channel", "feature_projection_input_dim", "input_dim"):
        if width := getattr(config, field, None):
            yield (2, 64, width)
    length = getattr(config, "max_length", None) or 1024
    yield (2, length, mel)
    yield (2, 4000)
    yield (2, 1, 4000)
    yield (2, 16000)
