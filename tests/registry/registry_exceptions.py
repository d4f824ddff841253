"""What the rule that shrinks configurations cannot know, by model type.

A dot goes into a part of a configuration. Most rows are settings without a default, or sizes that have to fit others.
"""

from typing import Any

from shrinking import EXPERT_FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB

VOCABULARY_MAP = {"<image>": VOCAB - 1, **{f"IMGIMG{letter}Z": 120 + place for place, letter in enumerate("ABCD")}}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SAM2 = {
    "vision_config.backbone_config.global_attention_blocks": [4, 6],
    "vision_config.backbone_config.image_size": [64, 64],
    "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
SERIES = {"prediction_length": 4, "context_length": 8, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "mamba2": {"head_dim": 2 * HIDDEN // HEADS},
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
    "mobilevitv2": {"image_size": 128},
    "align": {"projection_dim": 640},  # as wide as the pictures' features
    "clvp": {f"{part}_config.hidden_size": 256 for part in ("text", "speech", "decoder")} | {"projection_dim": 256},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROTARY}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
    "vits": {"speaking_rate": 50.0},  # short sounds
    "oneformer": {"conv_dim": 256, "mask_dim": 256, "hidden_dim": 256},
    "depth_pro": {"patch_size": 384, "intermediate_hook_ids": [1, 0]}
    | {f"{part}_model_config.image_size": 384 for part in ("image", "patch", "fov")}
    | {f"{part}_model_config.patch_size": 16 for part in ("image", "patch", "fov")},
    "apertus1p5": {
        "image_token_offset": 100,
        "audio_token_offset": 116,
        "vision_config.codebook_size": 16,
        "audio_config.codebook_size": 16,
    },
    "dory": {  # twice as many, because it counts attentions and FFNs
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
        "num_hidden_layers": 8,
    },
    "dots3_note": {"text_config.head_dim": 2 * HEAD_DIM},
    "dots3_note_text": {"head_dim": 2 * HEAD_DIM},
    "qwen4_exp": {f"text_config.{key}": value for key, value in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "xcodec": {"codebook_dim": 2 * HIDDEN},
    "fun_asr_nano_encoder": {"max_position_embeddings": 256},
    "fun_asr_nano": {"adaptor_config.intermediate_size": HIDDEN // 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config.head_dim": HEAD_DIM},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM},
    "neucodec": {"quantization_dim": 2 * HIDDEN},
    "seggpt": {"merge_index": 0},
    "mistral_large4": {"text_config.kv_source_layers": None},
    "mistral_large4_text": {"kv_source_layers": None},
    "sam2": {**SAM2, "prompt_encoder_config.image_size": 64, "prompt_encoder_config.patch_size": 16},
    "sam2_vision_model": {key.removeprefix("vision_config."): value for key, value in SAM2.items()},
    "sam2_hiera_det_model": {"global_attention_blocks": [4, 6], "image_size": [64, 64]},
    "step3p7": {"text_config.sliding_window": 8},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
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
        "vision_config.hidden_size": 2 * HIDDEN,
    },
    "swin2sr": {"embed_dim": 36, "num_heads": [2] * 6},
    "falcon_h1": {"mamba_d_ssm": HIDDEN},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "layoutlmv3": {"hidden_size": 96, "intermediate_size": 192},
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
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
}

# why a type does not run, one sentence each; those that need another package say so themselves
CANNOT_RUN = {
    "bark": "It has no forward: its three parts are called by generate.",
    "depth_pro": "It runs, but for a minute, because its images have 1536 pixels in each direction.",
    "edgetam_video": "It runs on an inference session, which is no tensor.",
    "glm_image_vqmodel": "It has no forward: it encodes and decodes.",
    "inkling2_vision": "It takes patches in blocks of an order of its own.",
    "kyutai_speech_to_text": "Its ids have a row for text and one for each codebook of sound.",
    "llama4": "Its forward reads `image_outputs`, which its text model's outputs have not; `llama4_text` runs.",
    "lw_detr": "Its default configuration has no levels of features to attend to.",
    "muse_glimmer_assistant": "It takes the hidden states of another model's layers.",
    "pi0": "It takes actions, a state and a time beside images and text.",
    "pp_ocrv6_medium_det": "Its default configuration has no backbone.",
    "pp_ocrv6_small_det": "Its default backbone does not fit its neck.",
    "sam2_video": "It runs on an inference session, which is no tensor.",
    "sam3_tracker_video": "It runs on an inference session, which is no tensor.",
    "sam3_video": "It runs on an inference session, which is no tensor.",
    "seggpt": "Its prompt and its image are two halves of one image.",
    "tvp": "It has a fault: its position embeddings take one example at a time.",
    "uvdoc": "Its default backbone does not fit its head.",
    "voxtral_realtime_text": "transformers names a class that it does not have.",
    "wavtokenizer_encoder": "Its output is whole numbers alone.",
    "xcodec2": "Its waves and its spectra have to have the same number of frames.",
}
