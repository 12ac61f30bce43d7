"""Tiny random models of any architecture that transformers ships, and inputs for them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto import modeling_auto

from hf_latephase.compat import PreTrainedConfig


VOCAB, HIDDEN, HEADS, LAYERS, LABELS = 96, 32, 4, 2, 3
ROWS, LENGTH, IMAGE, SAMPLES, FRAMES = 2, 16, 32, 4000, 64

KINDS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
# timm's own stand-ins for its families, and the smallest members of others.
TIMM = [
    "test_*",
    "*_atto",
    "resnet10t",
    "mobilenetv3_small_050",
    "regnety_002",
    "lcnet_035",
    "tinynet_e",
    "fastvit_t8",
    "ghostnet_050",
    "mnasnet_small",
    "edgenext_xx_small",
    "efficientvit_b0",
    "repghostnet_050",
]

_SIZES: list[tuple[int, list[str]]] = [
    (VOCAB, [
        "vocab_size", "unpadded_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "src_vocab_size",
        "tgt_vocab_size", "entity_vocab_size", "pronunciation_vocab_size", "shape_vocab_size"
    ]),
    (HIDDEN, [
        "hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size", "dim",
        "word_embed_proj_dim", "lru_width", "hidden_size_global", "attention_hidden_size", "input_embedding_size",
        "out_hidden_size", "output_embedding_size", "entity_emb_size", "backbone_hidden_size", "projection_dim",
        "prediction_head_size", "codevector_dim", "proj_codevector_dim", "dim_model_base", "d_latents",
        "output_hidden_size", "router_hidden_size", "audio_hidden_size", "embedding_rank"
    ]),
    (LAYERS, [
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers",
        "num_encoder_layers", "num_decoder_layers", "depth", "num_self_attends_per_block", "speech_encoder_layers",
        "t2u_encoder_layers", "t2u_decoder_layers"
    ]),
    (HEADS, [
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
        "linear_num_value_heads", "linear_num_heads", "num_experts", "n_routed_experts", "num_local_experts",
        "moe_num_experts", "index_n_heads", "swa_num_attention_heads", "num_latents", "num_self_attention_heads",
        "num_cross_attention_heads", "speech_encoder_attention_heads", "t2u_encoder_attention_heads",
        "t2u_decoder_attention_heads"
    ]),
    (2, [
        "num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "num_experts_per_tok", "num_experts_per_token",
        "moe_topk", "moe_k", "swa_num_key_value_heads", "kv_n_heads", "H_cycles", "L_cycles", "zero_expert_num",
        "num_query_groups"
    ]),
    (1, [
        "n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "n_shared_experts",
        "num_shared_experts", "num_dense_layers", "num_mem_blocks", "num_nextn_predict_layers",
        "moe_layer_start_index", "expert_layer_offset", "attn_layer_offset"
    ]),
    (HIDDEN // HEADS, [
        "head_dim", "d_head", "v_head_dim", "qk_head_dim", "attention_head_size", "swa_head_dim", "d_kv",
        "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "dim_head", "index_head_dim",
        "kv_channels", "rotary_dim"
    ]),
    (48, [
        "intermediate_size", "ffn_dim", "d_inner", "d_ff", "ffn_hidden_size", "n_inner", "decoder_ffn_dim",
        "hidden_dim", "encoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size", "dff", "dim_ff",
        "feed_forward_size", "speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim",
        "prompt_mid_dim"
    ]),
    (24, [
        "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
        "shared_intermediate_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"
    ]),
    (24, ["embed_dim"]),
    (16, [
        "q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "laurel_rank", "hc_lowrank", "adapter_rank",
        "hidden_size_per_layer_input", "classifier_proj_size", "num_conv_pos_embeddings", "adapter_in_dim",
        "pronunciation_embed_dim", "shape_embed_dim"
    ]),
    (4, [
        "qk_rope_head_dim", "qk_nope_head_dim", "sliding_window", "index_topk", "sliding_window_size",
        "num_conv_pos_embedding_groups", "num_codevectors_per_group"
    ]),
    (IMAGE, ["image_size"]),
    (8, ["patch_size"]),
    (64, [
        "max_position_embeddings", "n_positions", "model_max_length", "max_seq_len", "n_ctx", "context_length",
        "max_source_positions", "max_target_positions"
    ]),
]  # fmt: skip
# The sizes that configs give by name; what no architecture names here keeps its default.
SIZES: dict[str, Any] = {name: size for size, names in _SIZES for name in names}
SIZES_OF_STAGES = {
    "depths": 1,
    "conv_dim": 16,
    "stage_num_blocks": 1,
    "stage_numb_of_layers": 2,
    "num_block_repeats": 1,
}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")

# Where names do not say enough.
_NO_GROUPED_HEADS = {"num_key_value_heads": HEADS}
_WIDTHS = [16, 24, 32, 40]
_SWIN = {"image_size": 64, "patch_size": 4, "window_size": 4, "depths": [1, 2], "num_heads": [3, 6]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 4}
_GEMMA4 = {"global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
_ASSISTANT = _GEMMA4 | {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": HEADS, "head_dim": 8,
    "num_key_value_heads": 2, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": _NO_GROUPED_HEADS,
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "num_groups": 4},
    "convnext": {"hidden_sizes": _WIDTHS, "image_size": 64},
    "convnextv2": {"hidden_sizes": _WIDTHS, "image_size": 64},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "donut-swin": _SWIN,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "initializer_range": 0.3},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "esmc": _NO_GROUPED_HEADS,
    "hgnet_v2": {
        "stem_channels": [3, 8, 8], "stage_in_channels": [8, *_WIDTHS[:3]], "stage_mid_channels": [8] * 4,
        "stage_out_channels": _WIDTHS, "hidden_sizes": _WIDTHS,
    },
    "hiera": {"image_size": [64, 64], "embed_dim": 16},
    "levit": {
        "hidden_sizes": [32, 48, 64], "key_dim": [8] * 3, "num_attention_heads": [2, 3, 4], "image_size": 64,
        "patch_size": 16,
    },
    "mobilenet_v1": {"depth_multiplier": 0.25, "initializer_range": 0.3},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 48], "image_size": 64,
        "patch_size": 2,
    },
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64, "patch_size": 2},
    "neomme": {"head_dim": 16},
    "perceiver": {"max_position_embeddings": LENGTH},
    "poolformer": {"hidden_sizes": _WIDTHS},
    "pvt": {"hidden_sizes": [16, 32, 40, 64]},
    "pvt_v2": {"hidden_sizes": [16, 32, 40, 64]},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "regnet": {"embedding_size": 8, "hidden_sizes": _WIDTHS, "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": _WIDTHS},
    "segformer": {"hidden_sizes": [8, 16, 40, 64]},
    "swiftformer": {"embed_dims": _WIDTHS},
    "swin": _SWIN,
    "swinv2": _SWIN | {"pretrained_window_sizes": [0, 0]},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, *_WIDTHS[:3]]},
    "timm_wrapper": {"architecture": "test_resnet"},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [2, 3], "use_cache": False},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v32": _NO_GROUPED_HEADS,
    "dots3_note_text": {
        **_NO_GROUPED_HEADS, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_qk_rope_head_dim": 4,
        "swa_v_head_dim": 8,
        "layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_vision": {"architecture": "test_vit", "hidden_size": 64},
    "gemma3n_text": {
        "intermediate_size": 48, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_assistant": {"text_config": _ASSISTANT | {"model_type": "gemma4_text"}},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_assistant": {"text_config": _ASSISTANT | {"model_type": "gemma4_unified_text"}},
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": _NO_GROUPED_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, **_NO_GROUPED_HEADS},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 1,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16],
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 4,
    },
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "xlstm": {"use_cache": False, "hidden_size": 128, "embedding_dim": 128, "chunk_size": LENGTH, "mode": "train"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_head_dim": 16, "attention_hidden_size": 64, "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(kind: str, model_type: str) -> PreTrainedConfig:
    """Returns a small config for the class of a kind that transformers maps an architecture to."""
    config_class = model_class(kind, model_type).config_class
    config_class = config_class or CONFIG_MAPPING[model_type]
    values: dict[str, Any] = {"is_decoder": kind == "causal-lm"} if "is_decoder" in _defaults(config_class) else {}
    if kind == "timm":
        values["architecture"] = model_type
    return shrunk(config_class, **values)


def shrunk(config_class: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """Returns a config of a class with small sizes, nested configs included, and the values given."""
    defaults = _defaults(config_class)
    values = {name: SIZES[name] for name in defaults if name in SIZES}
    # Sizes of stages are another matter than one size.
    values = {name: size for name, size in values.items() if not isinstance(defaults[name], (list, tuple))}
    values |= {n: [SIZES_OF_STAGES[n]] * len(v) for n, v in defaults.items() if n in SIZES_OF_STAGES and v is not None}
    if "use_mamba_kernels" in defaults:  # older releases refuse to do without them, unless told to
        values["use_mamba_kernels"] = False
    values |= {n: _small_token(defaults[n], i) for i, n in enumerate(_token_names(defaults))}
    own = OVERRIDES.get(config_class.model_type, {})
    try:
        default = config_class()
    except Exception:
        default = None  # then it says nothing about layers and nested configs
    if default is not None:
        values |= _per_layer(default, list(defaults))
    for name, nested_class in config_class.sub_configs.items():
        if name in own:
            continue
        nested = vars(default).get(name) if default is not None else None
        if nested is not None or nested_class is not AutoConfig:
            values[name] = shrunk(nested_class if nested is None else type(nested))
    return config_class(**values | own | given)


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a config takes by name, with its defaults: fields of a dataclass, or arguments (transformers 5.0)."""
    if dataclasses.is_dataclass(config_class):
        return {f.name: _default(f) for f in dataclasses.fields(config_class) if f.init}
    found: dict[str, Any] = {}
    for owner in reversed(config_class.__mro__):  # each hands on what it does not know
        if owner is not object and "__init__" in vars(owner):
            arguments = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
            named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
            found |= {a.name: None if a.default is a.empty else a.default for a in named}
    return found


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _token_names(defaults: dict[str, Any]) -> list[str]:
    return [n for n, v in defaults.items() if n.endswith(("_token_id", "_token_index")) and v is not None]


def _small_token(value: Any, place: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_small_token(v, place) for v in value]
    return value if value < VOCAB else VOCAB - 1 - place


def _per_layer(config: PreTrainedConfig, names: list[str]) -> dict[str, Any]:
    """One layer of each kind that a default config mixes, at least `LAYERS` in all."""
    lists = {n: vars(config)[n] for n in PER_LAYER if n in names and vars(config).get(n)}
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    chosen = list(dict.fromkeys(kinds))
    while len(chosen) < LAYERS:
        chosen.append(chosen[-1])
    values: dict[str, Any] = {n: list(column) for n, column in zip(lists, zip(*chosen, strict=True), strict=True)}
    counts = [n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in names]
    return values | dict.fromkeys(counts, len(chosen))


def model_class(kind: str, model_type: str) -> type[nn.Module]:
    """Returns the class that transformers' auto mapping names for an architecture."""
    name = "TimmWrapperForImageClassification" if kind == "timm" else KINDS[kind][model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def build(kind: str, model_type: str) -> nn.Module:
    """Returns a tiny random model in float32."""
    torch.manual_seed(0)
    return model_class(kind, model_type)(tiny_config(kind, model_type)).float()


def inputs(kind: str, model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Returns a batch for a model: what its forward takes, labels included."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    ids = torch.randint(5, VOCAB - 20, (ROWS, LENGTH), generator=generator)
    if config.model_type in SPECIAL:
        return SPECIAL[config.model_type](config, ids, generator)
    if kind in ("image", "timm"):
        return {"pixel_values": _images(config, generator), "labels": ids[:, 0] % 2}
    if kind == "audio":
        return {**_sounds(model, generator), "labels": ids[:, 0] % 2}
    if kind == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "labels": ids}
    return {"input_ids": ids, "labels": ids}


def _images(config: Any, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", IMAGE)
    height = width = size if isinstance(size, int) else size[0]
    if config.model_type == "timm_wrapper":
        height = width = 160 if config.architecture.startswith("test_") else 64
    channels = getattr(config, "num_channels", 3)
    return torch.randn(ROWS, channels if isinstance(channels, int) else 3, height, width, generator=generator)


def _sounds(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if model.main_input_name == "input_values":
        if hasattr(model.config, "num_mel_bins"):  # a spectrogram by that name
            return {
                "input_values": torch.randn(
                    ROWS, model.config.max_length, model.config.num_mel_bins, generator=generator
                )
            }
        return {"input_values": torch.randn(ROWS, SAMPLES, generator=generator)}
    config = model.config
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None:  # whisper
        return {"input_features": torch.randn(ROWS, bins, 2 * config.max_source_positions, generator=generator)}
    return {"input_features": torch.randn(ROWS, FRAMES, config.feature_projection_input_dim, generator=generator)}


def _pixels(config: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


def _patches(config: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    vision = config.vision_config
    side = int(vision.num_patches**0.5)
    return {
        "pixel_values": torch.randn(ROWS, side**2, vision.num_channels * vision.patch_size**2, generator=generator),
        "pixel_attention_mask": torch.ones(ROWS, side**2, dtype=torch.int64),
        "spatial_shapes": torch.full((ROWS, 2), side),
        "labels": ids[:, 0] % 2,
    }


def _prompts(config: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _streams(config: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    audio = config.audio_config
    frames = 2 * config.downsample_factor * LENGTH
    return {
        "input_ids": ids,
        "input_features": torch.randn(ROWS, audio.num_mel_bins, frames, generator=generator),
        "labels": ids,
    }


def _codebooks(config: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    books = config.num_codebooks
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH, books), generator=generator)
    return {"input_ids": labels.transpose(1, 2).flatten(0, 1), "labels": labels}


def _captions(config: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids, "pixel_values": _images(config.vision_config, generator), "labels": ids}


def _assistant(config: Any, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """What an assistant model gets of the model that it drafts for: its embeddings, keys and values."""
    keys = {
        kind: torch.randn(ROWS, 2, LENGTH, size, generator=generator)
        for kind, size in (("sliding_attention", 8), ("full_attention", 16))
    }
    embeddings = torch.randn(ROWS, LENGTH, 2 * config.backbone_hidden_size, generator=generator)
    return {
        "inputs_embeds": embeddings,
        "position_ids": torch.arange(LENGTH).expand(ROWS, -1),
        "shared_kv_states": {kind: (key, key.flip(0)) for kind, key in keys.items()},
        "labels": ids,
    }


SPECIAL: dict[str, Any] = {
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "git": _captions,
    "imagegpt": _pixels,
    "shieldgemma2": _prompts,
    "siglip2": _patches,
    "voxtral_realtime": _streams,
    "gemma4_assistant": _assistant,
    "gemma4_unified_assistant": _assistant,
}
