"""Shrink a configuration by one rule, which looks at the names and the values of its settings.

Sizes become small ones (`SIZES`, `WIDTHS`). Of the layers stay the first, the last and the first of each kind, and
all lists with an entry for each layer, or with numbers of layers, follow. Special tokens get small ids.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERT_FFN = 32, 4, 2, 8, 96, 64
VOCAB, FIRST_SPECIAL, POSITIONS, IMAGE, STAGED_IMAGE, PATCH = 160, 110, 64, 32, 64, 8

# (what matches the name of a setting, its largest value); the first match decides, and None keeps the default
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"num_feat_extract_layers|num_residual_layers|lstm_layers|chunk_size_feed_forward|max_window_layers", None),
    (r"num_kv_shared_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"index_topk|context_size", 16),
    (r"(n|num)_filters$", 8),
    (r"base_channels$", 32),
    (r"num_latents|pos_emb_(height|width)", 16),
    (r"(period|interval|frequency|sliding_window_pattern)$", 2),
    (r"(layer|attn_layer|expert_layer)_offset$", 1),
    (r"vocab(_size)?(_per_layer_input)?$", VOCAB),
    (
        r"(max_position_embeddings|position_embeddings?|_positions|n_ctx|max_seq_len|max_len|context_length)$",
        POSITIONS,
    ),
    (r"(layers?|n_layers?|num_blocks|_depth|^depth)$", 2),
    (r"experts_per_tok|top_?k$|moe_k$|experts_per_token", 2),
    (r"topk_group$", 1),
    (r"(n_group|num_expert_group|n_groups|ngroups)$", 2),
    (r"shared_experts$|experts_num$", 1),
    (r"(^|_)(num_|n_)?(routed_|local_)?experts$", 4),
    (r"mm_tokens_per_image", 4),
    (r"num_frames$|frames_per_clip", 4),
    (r"num_queries$|num_query_tokens|num_denoising", 10),
    (r"sliding_window(_size)?$|attention_window|local_attention|attention_chunk_size$", 8),
)
# the same for widths, which stay where a model has a list of them, for stages
WIDTHS: tuple[tuple[str, int], ...] = (
    (r"d_latents|codebook_dim|condition_dim|vector_quantization_hidden_dimension", HIDDEN),
    (r"mamba_d_head|mamba_headdim", 2 * HIDDEN // HEADS),
    (r"num_pos_feats|coordinate_size|shape_size", HIDDEN // 2),
    (r"projection_size|output_channels|upsample_groups$|adapter_(in|out)_dim", HIDDEN),
    (r"qk_head_dim$", 2 * HEAD_DIM),
    (r"(head_dim|head_size|d_kv|kv_channels|d_head|dim_head)$", HEAD_DIM),
    (r"(key_value|kv|key|group)_heads$", KV_HEADS),
    (r"heads?$", HEADS),
    (r"rotary_dim$", HEAD_DIM // 2),
    (r"rank$", HIDDEN // 2),
    (r"(moe|expert).*(intermediate|ffn|hidden_size|hidden_dim)", EXPERT_FFN),
    (r"intermediate|ffn_|_ffn|d_ff|inner|feed_?forward|mlp_dim|mlp_hidden|linear_units|mlp_size", FFN),
    (r"(image|img|input|crop)_size$", IMAGE),
    (r"patch_size$", PATCH),
    (r"(hidden_size|d_model|embed_dim|emb_dim|n_embd|^dim|width|embedding_size|projection_dim)$", HIDDEN),
    (r"(hidden_dim|output_dim|proj_dim|out_hidden_size|hidden_size_\w+|pooler_output_size|_width)$", HIDDEN),
    (r"(embedding_dim|encoder_dim|decoder_dim|latent_dim|conv_dim|word_embed_proj_dim|proj_size)$", HIDDEN),
)
STAGED = re.compile(r"(depths|hidden_sizes|embed_dims?|_per_stage|channels|num_block_repeats)$")  # lists for stages
DEPTHS = re.compile(r"depths$|block_sizes$|num_block_repeats|blocks_per_stage|stage_num_blocks")
SPECIAL = re.compile(r"(_token_id|_token_index|_token_ids|_id|_ids|_index|_id_\w+)$")
INDICES = re.compile(r"(indices|indexes|layer_ids|_layers|_idxs?|feature_layer)$")  # numbers of layers
DEPTH_NAMES = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"),
    *("num_blocks", "num_decoder_layers", "encoder_num_layers"),
)
ROPE = ("rope_parameters", "rope_scaling")


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's settings, nested dicts for its parts, with small sizes."""
    large = sorted(set(large_ids(values)), reverse=True)
    return Part(values, {old: VOCAB - 1 - rank for rank, old in enumerate(large)}).shrunk()


def is_part(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key != "per_layer_config" and (key.endswith("config") or "model_type" in value)


def large_ids(values: dict[str, Any]) -> Iterator[int]:
    """Yield every special token's id that a tiny vocabulary has no room for."""
    for key, value in values.items():
        if is_part(key, value):
            yield from large_ids(value)
        elif SPECIAL.search(key):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if type(one) is int and one >= FIRST_SPECIAL:
                    yield one


class Part:
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
        if is_part(key, value):
            return Part(value, self.ids).shrunk()
        if key == "out_features" and not self.staged and value and self.depth > 2:
            places = {f"stage{layer + 1}": f"stage{place + 1}" for place, layer in enumerate(self.kept)}
            return [places.get(stage, stage) for stage in value]
        if key == "out_indices" and self.values.get("out_features"):
            return None  # the names say the same
        if key == "per_layer_config" and value:
            layers = {int(layer): Part(one, self.ids).shrunk() for layer, one in value.items()}
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
        if key == "image_size" or (key in ("conv_dim", "patch_size") and not self.staged):
            return [self._number(key, one) for one in value]
        return value

    def _number(self, key: str, value: Any) -> Any:
        if type(value) is not int:
            return value
        if SPECIAL.search(key):
            return self.ids.get(value, value)
        if key in DEPTH_NAMES and value == self.depth:
            return len(self.kept)
        limit = _limit(SIZES, key)
        if self.staged and limit is None:
            limit = {"window_size": 2, "image_size": STAGED_IMAGE}.get(key)
        elif limit is None:
            limit = _limit(WIDTHS, key)
        queries = (key.replace("key_value", "attention"), "num_attention_heads")
        if key.endswith("heads") and limit == KV_HEADS and value in [self.values.get(name) for name in queries]:
            limit = HEADS  # as many as queries, which some models take for granted
        return value if limit is None else min(value, limit)


def _limit(table: tuple[tuple[str, Any], ...], key: str) -> int | None:
    """Return the largest value of a setting, by the first row that matches its name."""
    return next((limit for name, limit in table if re.search(name, key)), None)


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
