"""Every model type of transformers' registry, as a tiny model with random weights.

A tiny configuration is the default one of its class, shrunk by one rule that looks at the names of settings (`SIZES`).
`EXCEPTIONS` has the few settings that the rule cannot know, by model type.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERT_FFN = 32, 4, 2, 8, 96, 64
VOCAB, FIRST_SPECIAL, POSITIONS, IMAGE, PATCH = 160, 110, 64, 32, 8

# (what matches a setting's name, its largest value); the first match decides, None keeps the default
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"num_feat_extract_layers|num_residual_layers|lstm_layers|chunk_size_feed_forward|max_window_layers", None),
    (r"num_kv_shared_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"index_topk|context_size", 16),
    (r"(n|num)_filters$", 8),
    (r"num_latents", 16),
    (r"codebook_dim|condition_dim|vector_quantization_hidden_dimension", HIDDEN),
    (r"mamba_d_head|mamba_headdim", 2 * HIDDEN // HEADS),
    (r"num_pos_feats|coordinate_size|shape_size", HIDDEN // 2),
    (r"projection_size|output_channels|upsample_groups$", HIDDEN),
    (r"d_latents", HIDDEN),
    (r"(period|interval|frequency|sliding_window_pattern)$", 2),
    (r"(layer|attn_layer|expert_layer)_offset$", 1),
    (r"vocab(_size)?(_per_layer_input)?$", VOCAB),
    (
        r"(max_position_embeddings|_positions|n_ctx|max_seq_len|max_len|context_length|position_embeddings?)$",
        POSITIONS,
    ),
    (r"(layers?|n_layers?|num_blocks|_depth|^depth)$", 2),
    (r"(head_dim|head_size|d_kv|kv_channels|d_head|dim_head)$", HEAD_DIM),
    (r"(key_value|kv|key|group)_heads$", KV_HEADS),
    (r"(heads?|n_heads?)$", HEADS),
    (r"qk_head_dim$", 2 * HEAD_DIM),
    (r"rotary_dim$", HEAD_DIM // 2),
    (r"rank$", HIDDEN // 2),
    (r"experts_per_tok|top_?k$|moe_k$|experts_per_token", 2),
    (r"topk_group$", 1),
    (r"(n_group|num_expert_group|n_?groups)$", 2),
    (r"shared_experts$|experts_num$", 1),
    (r"(^|_)(num_|n_)?(routed_|local_)?experts$", 4),
    (r"(moe|expert).*(intermediate|ffn|hidden_size|hidden_dim)", EXPERT_FFN),
    (r"intermediate|ffn_|_ffn|d_ff|inner|feed_?forward|mlp_dim|mlp_hidden|linear_units|mlp_size", FFN),
    (r"mm_tokens_per_image", 4),
    (r"num_frames$", 4),
    (r"num_queries$|num_query_tokens|num_denoising", 10),
    (r"sliding_window(_size)?$|attention_window|local_attention|attention_chunk_size$", 8),
    (r"(image|img|input)_size$", IMAGE),
    (r"patch_size$", PATCH),
    (r"(hidden_size|d_model|embed_dim|emb_dim|n_embd|^dim|width|embedding_size|projection_dim)$", HIDDEN),
    (r"(hidden_dim|output_dim|proj_dim|out_hidden_size|hidden_size_\w+|pooler_output_size|_width)$", HIDDEN),
    (r"(embedding_dim|encoder_dim|decoder_dim|latent_dim|conv_dim|word_embed_proj_dim|proj_size)$", HIDDEN),
)
DEPTHS = re.compile(r"depths$|num_block_repeats|blocks_per_stage|stage_num_blocks")
SPECIAL = re.compile(r"(_token_id|_token_index|_token_ids|_id|_ids|_index|_id_\w+)$")
INDICES = re.compile(r"(indices|indexes|ind(e|i)ces|layer_ids|_layers|_idxs?|feature_layer)$")
DEPTH_NAMES = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers",
    "num_blocks", "num_decoder_layers", "encoder_num_layers",
)  # fmt: skip
ROPE = ("rope_parameters", "rope_scaling")
STAGED = re.compile(r"(depths|hidden_sizes|embed_dims?|_per_stage|channels|block_repeats)$")  # widths per stage stay

# what the rule cannot know, by model type; a dot goes into a part of a configuration
VOCABULARY_MAP = {"<image>": VOCAB - 1, **{f"IMGIMG{letter}Z": 120 + place for place, letter in enumerate("ABCD")}}
MAMBA_HEAD = 2 * HIDDEN // HEADS
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SAM2 = {
    "vision_config.backbone_config.global_attention_blocks": [4, 6],
    "vision_config.backbone_config.image_size": [64, 64],
    "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
SERIES = {"prediction_length": 4, "context_length": 8}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "mamba2": {"head_dim": MAMBA_HEAD},
    "paddleocr_vl": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "muse_spark": {"audio_config.out_hidden_size": HIDDEN},
    "neomme": {
        "rope_parameters.full_attention.partial_rotary_factor": 0.5,
        "rope_parameters.sliding_attention.partial_rotary_factor": 0.5,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 100, "vision_end_token_id": 101},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 100, "vision_end_token_id": 101},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4]},
    "sam": {"prompt_encoder_config.image_embedding_size": 4},
    "sam_hq": {"prompt_encoder_config.image_embedding_size": 4, "mask_decoder_config.vit_dim": HIDDEN},
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "seggpt": {"merge_index": 0},
    "mobilevitv2": {"image_size": 128},
    "align": {"projection_dim": 640},  # as wide as the pictures' features
    "clvp": {f"{part}_config.hidden_size": 256 for part in ("text", "speech", "decoder")} | {"projection_dim": 256},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROTARY}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"],
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "num_hidden_layers": 4,
    },
    "fun_asr_nano": {"adaptor_config.intermediate_size": HIDDEN // 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config.head_dim": HEAD_DIM},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM},
    "lw_detr": {"backbone_config.image_size": 64, "backbone_config.pretrain_image_size": 64},
    "mistral_large4": {"text_config.kv_source_layers": None},
    "mistral_large4_text": {"kv_source_layers": None},
    "sam2": {**SAM2, "prompt_encoder_config.image_size": 64, "prompt_encoder_config.patch_size": 16},
    "sam2_vision_model": {key.removeprefix("vision_config."): value for key, value in SAM2.items()},
    "sam2_hiera_det_model": {"global_attention_blocks": [4, 6], "image_size": [64, 64]},
    "step3p7": {"text_config.sliding_window": 8},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 64},
    "xlstm": {"hidden_size": 256, "embedding_dim": 256},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
        "qformer_config.num_attention_heads": HEADS,
    },
    "swin2sr": {"embed_dim": 36, "num_heads": [2] * 6},
    "falcon_h1": {"mamba_d_ssm": HIDDEN},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "layoutlmv3": {"hidden_size": 96, "intermediate_size": EXPERT_FFN},
    "lilt": {"hidden_size": 48},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "mobilebert": {"true_hidden_size": HIDDEN, "intra_bottleneck_size": HIDDEN},
    "ministral": {"head_dim": HEAD_DIM},
    "deepseek_ocr2": {"text_config.num_experts_per_tok": 2, "text_config.mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": EXPERT_FFN,
    },
    "blip-2": {"image_token_index": VOCAB - 1},
    "instructblip": {"image_token_index": VOCAB - 1},
    "instructblipvideo": {"video_token_index": VOCAB - 1},
    "blt": {"use_cache": False},
    "bridgetower": {"vision_config.hidden_size": 64, "text_config.hidden_size": 64, "hidden_size": 64},
    "bros": {
        "hidden_size": 64,
        "dim_bbox_projection": 16,
        "dim_bbox_sinusoid_emb_2d": 16,
        "dim_bbox_sinusoid_emb_1d": 2,
    },
    "chameleon": {"vocabulary_map": VOCABULARY_MAP},
    "emu3": {"vocabulary_map": VOCABULARY_MAP},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
}

CLASSES = {  # whose AutoModel takes the configuration of a part
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
HEADS_OF: dict[str, str] = {  # wholes that have no AutoModel
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "vision-encoder-decoder": "AutoModelForImageTextToText",
    "speech-encoder-decoder": "AutoModelForSpeechSeq2Seq",
}


def model_types() -> list[str]:
    """Return every model type that AutoModel can build."""
    return sorted(MODEL_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a model type, shrunk.

    Raises:
        KeyError: transformers has no such model type.
    """
    config_class = CONFIG_MAPPING[model_type]
    values = _defaults(config_class)
    ids = {old: VOCAB - 1 - rank for rank, old in enumerate(sorted(set(_large_ids(values)), reverse=True))}
    shrunk = _Part(values, ids).shrunk()
    for path, value in EXCEPTIONS.get(model_type, {}).items():
        *parts, key = path.split(".")
        place = shrunk
        for part in parts:
            place = place[part]
        place[key] = value
    return config_class.from_dict(shrunk)


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the default configuration as nested dicts, with its parts' own `model_type`s."""
    values = config_class().to_dict()
    for key in ("transformers_version", "stage_names", "_out_features", "_out_indices"):
        values.pop(key, None)
    return values


def _is_part(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key != "per_layer_config" and (key.endswith("config") or "model_type" in value)


def _large_ids(values: dict[str, Any]) -> Iterator[int]:
    """Yield every special token's id that a tiny vocabulary has no room for."""
    for key, value in values.items():
        if _is_part(key, value):
            yield from _large_ids(value)
        elif SPECIAL.search(key):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if type(one) is int and one >= FIRST_SPECIAL:
                    yield one


class _Part:
    """One configuration, as settings: shrinks them together, because sizes and lists per layer belong together."""

    def __init__(self, values: dict[str, Any], ids: dict[int, int]):
        """`ids` maps large token ids to small ones."""
        self.values, self.ids = values, ids
        depths = [values[key] for key in DEPTH_NAMES if type(values.get(key)) is int]
        self.depth = depths[0] if depths else 0
        self.staged = any(STAGED.search(key) and isinstance(one, (list, tuple)) for key, one in values.items())
        self.kept = self._kept_layers()

    def _per_layer(self, value: Any) -> bool:
        return self.depth > 2 and isinstance(value, (list, tuple)) and len(value) == self.depth

    def _indices(self, key: str, value: Any) -> bool:
        """Say whether the value lists layers by their numbers."""
        listed = isinstance(value, (list, tuple)) and len(value) > 0 and all(type(one) is int for one in value)
        return listed and INDICES.search(key) is not None and 0 <= min(value) and max(value) < self.depth

    def _kept_layers(self) -> list[int]:
        """Return the layers that stay: the first, the last, and the first of each kind."""
        if self.depth <= 2:
            return list(range(self.depth))
        kept = {0, self.depth - 1}
        for key, value in self.values.items():
            if key == "out_features" and not self.staged and value:
                kept.update(int(stage.removeprefix("stage")) - 1 for stage in value if stage != "stem")
            elif key == "per_layer_config" and value:
                kept.update(min(int(layer) for layer, one in value.items() if one == kind) for kind in value.values())
            elif self._per_layer(value):
                kept.update(value.index(one) for one in value)
            elif self._indices(key, value):
                kept.update(value[:4] if len(value) < 5 else value[:1])
        return sorted(kept)

    def shrunk(self) -> dict[str, Any]:
        """Return all settings, small."""
        return {key: self._value(key, value) for key, value in self.values.items()}

    def _value(self, key: str, value: Any) -> Any:
        if _is_part(key, value):
            return _Part(value, self.ids).shrunk()
        if key == "out_features" and not self.staged and value and self.depth > 2:
            places = {f"stage{layer + 1}": f"stage{place + 1}" for place, layer in enumerate(self.kept)}
            return [places.get(stage, stage) for stage in value]
        if key == "out_indices" and self.values.get("out_features"):
            return None  # the names say the same
        if key == "per_layer_config" and value:
            layers = {int(layer): _Part(one, self.ids).shrunk() for layer, one in value.items()}
            return {place: layers[layer] for place, layer in enumerate(self.kept) if layer in layers}
        if key in ROPE:
            return _shrunk_rope(value, self.values.get("model_type"))
        if type(value) is int:
            return self._number(key, value)
        if not isinstance(value, (list, tuple)) or not value:
            return value
        if DEPTHS.search(key):
            return [min(one, 2) for one in value]
        if self._per_layer(value):
            return [self._number(key, value[layer]) for layer in self.kept]
        if self._indices(key, value):
            return [self.kept.index(layer) for layer in value if layer in self.kept]
        if SPECIAL.search(key):
            return [self.ids.get(one, one) for one in value]
        if key in ("conv_dim", "image_size", "patch_size") and not self.staged:
            return [self._number(key, one) for one in value]
        return value

    def _number(self, key: str, value: Any) -> Any:
        if type(value) is not int:
            return value
        if SPECIAL.search(key):
            return self.ids.get(value, value)
        if key in DEPTH_NAMES and value == self.depth:
            return len(self.kept)
        limit = next((limit for name, limit in SIZES if re.search(name, key)), None)
        if key == "window_size" and self.staged:
            return min(value, 2)
        if limit is None or (self.staged and limit in (HIDDEN, HEADS, HEAD_DIM, FFN, PATCH, IMAGE)):
            return min(value, 64) if key == "image_size" else value
        queries = (key.replace("key_value", "attention"), "num_attention_heads")
        if limit == KV_HEADS and value in [self.values.get(name) for name in queries]:
            limit = HEADS  # as many as queries, which some models take for granted
        return min(value, limit)


def _shrunk_rope(value: Any, model_type: str | None = None) -> Any:
    """Return rotary settings whose sections fit small heads; some models have sections that defaults do not name."""
    if not value:
        return value
    if any(isinstance(one, dict) for one in value.values()):  # one for each kind of layer
        return {kind: _shrunk_rope(one, model_type) for kind, one in value.items()}
    rope = dict(value)
    sectioned = CONFIG_MAPPING[model_type].ignore_keys_at_rope_validation if model_type in CONFIG_MAPPING else ()
    if "mrope_section" in rope or "mrope_section" in sectioned:
        count = len(rope.get("mrope_section") or "thw")
        frequencies = max(int(HEAD_DIM * rope.get("partial_rotary_factor", 1)) // 2, 1)
        rope["mrope_section"] = [frequencies // count + (axis < frequencies % count) for axis in range(count)]
    for key in ("short_factor", "long_factor"):
        if rope.get(key):
            rope[key] = rope[key][: HEAD_DIM // 2]
    return rope


def tiny_model(model_type: str, seed: int = 0, head: str = "AutoModel") -> PreTrainedModel:
    """Return a model of tiny size with random weights, in evaluation mode and float32.

    Weights that transformers initialises with zeros get small noise, and tiny scales of layers become larger, so that
    each part of the model has an effect on its output.

    Args:
        model_type: One of `model_types()`, or a whole of `HEADS_OF`.
        seed: Of the weights.
        head: The AutoModel class that builds it.
    """
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    model = _model_class(model_type, head)._from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.abs() < 1e-3).all():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _model_class(model_type: str, head: str) -> type[PreTrainedModel]:
    """Return the class itself: AutoModel knows some types' configurations by other names."""
    if head == "AutoModel" and model_type in MODEL_MAPPING_NAMES:
        name = CLASSES.get(model_type, MODEL_MAPPING_NAMES[model_type])
        return getattr(transformers, name if isinstance(name, str) else name[0])
    auto = getattr(transformers, HEADS_OF.get(model_type, head))
    return auto._model_mapping[CONFIG_MAPPING[model_type]]


def first_output(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    """Return the first floating-point tensor of a model's output; random numbers that it draws are the same each time.

    Raises:
        ValueError: The output has none.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(**batch)
    for tensor in _float_tensors(output):
        return tensor
    raise ValueError(f"{type(model).__name__} returned no floating-point tensor, but {type(output).__name__}")


def _float_tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of an output in order, nested ones too."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel() > 1:
            yield output
    elif isinstance(output, (dict, list, tuple)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _float_tensors(part)
