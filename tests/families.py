"""Every architecture that people use, as a tiny random model: what `test_models.py` opens with `VLM.load`.

A family is a function -> (config, image processor, tokenizer, processor class, settings of the processor). `write` makes a
directory of it, the way the hub has them.
"""
import json
import os

import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Llama 4 of transformers 5.24 asks its language model's outputs for this field, which they lack; without it the class fails.
tf.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, max_position_embeddings=4096, bos_token_id=2, eos_token_id=1, pad_token_id=0)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
SIGLIP = dict(VISION, model_type="siglip_vision_model", vision_use_head=False)
SQUARE = dict(height=32, width=32)
EXPERTS = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2)


def tokenizer(image, *more, shown=None, bos=None, **named):
    """Bytes and a few special tokens. image: the placeholder; shown: what the chat template writes for a picture; more and
    named: other special tokens, those that the processor asks the tokenizer for by name."""
    special = list(dict.fromkeys(["<pad>", "<eos>", "<bos>", image, *more, *named.values()]))
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.add_special_tokens(special)
    template = ("{% for m in messages %}U: {% for part in m['content'] %}{% if part['type'] == 'image' %}" + (shown or image)
                + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}A:")
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<pad>", bos_token=bos, padding_side="left",
        chat_template=(bos or "") + template, extra_special_tokens={"image_token": image, **named})


def qwen(name, patch, **vision):
    words = tokenizer("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
                      shown="<|vision_start|><|image_pad|><|vision_end|>")
    images = tf.Qwen2VLImageProcessor(patch_size=patch, size=dict(shortest_edge=(2 * patch)**2, longest_edge=(8 * patch)**2))
    config = getattr(tf, f"{name}Config")(
        text_config=dict(TEXT, vocab_size=len(words), rope_parameters=MROPE),
        vision_config=dict(patch_size=patch, depth=2, hidden_size=32, num_heads=2, **vision),
        image_token_id=words.image_token_id, video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"))
    return config, images, words, f"{name}Processor", {}


def untyped(config):
    """The settings of a config, for one of another class (dict)."""
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}


def qwen2_vl():
    return qwen("Qwen2VL", 14, embed_dim=32, mlp_ratio=2)


def qwen2_5_vl():
    return qwen("Qwen2_5_VL", 14, intermediate_size=64, out_hidden_size=32, window_size=56, fullatt_block_indexes=[1])


def qwen3_vl():
    return qwen("Qwen3VL", 16, intermediate_size=64, out_hidden_size=32, num_position_embeddings=16,
                deepstack_visual_indexes=[0])


def internvl():
    words = tokenizer("<IMG_CONTEXT>", context_image_token="<IMG_CONTEXT>", start_image_token="<img>",
                      end_image_token="</img>", video_token="<video>")
    images = tf.models.got_ocr2.GotOcr2ImageProcessorPil(size=SQUARE, max_patches=4)
    config = tf.InternVLConfig(text_config=dict(TEXT, model_type="qwen2", vocab_size=len(words)), vision_config=VISION,
                               image_token_id=words.image_token_id, image_seq_length=4)
    return config, images, words, "InternVLProcessor", dict(image_seq_length=4)


def llava_onevision():
    words = tokenizer("<image>", video_token="<video>")
    grid = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = tf.LlavaOnevisionConfig(
        text_config=dict(TEXT, model_type="qwen2", vocab_size=len(words)), vision_config=SIGLIP, image_grid_pinpoints=grid,
        image_token_index=words.image_token_id, video_token_index=words.video_token_id)
    images = tf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=grid)
    return config, images, words, "LlavaOnevisionProcessor", dict(num_image_tokens=16, vision_feature_select_strategy="full")


def gemma3():
    """Half of its layers see a window of 24 tokens only, image tokens see each other; the template writes <bos>."""
    words = tokenizer("<image_soft_token>", shown="<start_of_image>", bos="<bos>", boi_token="<start_of_image>",
                      eoi_token="<end_of_image>")
    config = tf.Gemma3Config(
        text_config=dict(TEXT, vocab_size=len(words), sliding_window=24, query_pre_attn_scalar=16,
                         layer_types=["sliding_attention", "full_attention"]),
        vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id)
    return config, tf.Gemma3ImageProcessor(size=SQUARE), words, "Gemma3Processor", dict(image_seq_length=4)


def idefics3():
    """Pictures in tiles, padded to the largest number of tiles of the batch."""
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles)
    config = tf.Idefics3Config(text_config=dict(TEXT, model_type="llama", vocab_size=len(words)), vision_config=VISION,
                               image_token_id=words.image_token_id, scale_factor=2, pad_token_id=0)
    images = tf.Idefics3ImageProcessor(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32))
    return config, images, words, "Idefics3Processor", dict(image_seq_len=4)


def llava_next():
    """Pictures in tiles, of which the padding is cut away again."""
    words = tokenizer("<image>", bos="<bos>")
    grid = [[32, 64], [64, 32], [64, 64]]
    config = tf.LlavaNextConfig(
        text_config=dict(TEXT, model_type="mistral", vocab_size=len(words)), image_grid_pinpoints=grid,
        vision_config=dict(VISION, model_type="clip_vision_model", projection_dim=32), image_token_index=words.image_token_id)
    images = tf.LlavaNextImageProcessor(size=dict(shortest_edge=32), crop_size=SQUARE, image_grid_pinpoints=grid)
    return config, images, words, "LlavaNextProcessor", dict(patch_size=8, vision_feature_select_strategy="default",
                                                             num_additional_image_tokens=1)


def llava_next_video():
    """Its processor's parts come in an order of their own, the one for videos first."""
    config, images, words, _, settings = llava_next()
    words.add_special_tokens(dict(additional_special_tokens=["<video>"]))
    config = tf.LlavaNextVideoConfig(
        text_config=config.text_config, vision_config=config.vision_config, image_grid_pinpoints=config.image_grid_pinpoints,
        image_token_index=config.image_token_index, video_token_index=words.convert_tokens_to_ids("<video>"))
    config.text_config.vocab_size = len(words)
    return config, images, words, "LlavaNextVideoProcessor", settings


def glm4v():
    named = {name: f"<|{word}|>" for name, word in dict(
        image="image", image_start="begin_of_image", image_end="end_of_image", video="video", video_start="begin_of_video",
        video_end="end_of_video").items()}
    words = tokenizer(named["image"], *named.values(), shown="".join(map(named.get, ("image_start", "image", "image_end"))),
                      video_token=named["video"])
    images = tf.Glm4vImageProcessor(patch_size=14, size=dict(shortest_edge=56**2, longest_edge=112**2))
    config = tf.Glm4vConfig(
        text_config=dict(TEXT, vocab_size=len(words), rope_parameters=dict(MROPE, partial_rotary_factor=1.0)),
        vision_config=dict(depth=2, hidden_size=32, num_heads=2, out_hidden_size=32, intermediate_size=64, patch_size=14,
                           image_size=56),
        **{f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in named.items()})
    return config, images, words, "Glm4vProcessor", {}


def paligemma2():
    """Caps its logits and takes no prompt without a picture."""
    words = tokenizer("<image>", bos="<bos>")
    config = tf.PaliGemmaConfig(
        text_config=dict(TEXT, model_type="gemma2", vocab_size=len(words), final_logit_softcapping=2.0, sliding_window=24,
                         query_pre_attn_scalar=16),
        vision_config=dict(SIGLIP, projection_dim=32), projection_dim=32, image_token_index=words.image_token_id)
    images = tf.SiglipImageProcessor(size=SQUARE, image_seq_length=16)
    return config, images, words, "PaliGemmaProcessor", {}


def mllama():
    words = tokenizer("<|image|>", bos="<bos>")
    config = tf.MllamaConfig(
        text_config=dict(TEXT, vocab_size=len(words), cross_attention_layers=[1], rope_parameters={"rope_type": "default"}),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_global_layers=1, attention_heads=2,
                           image_size=32, patch_size=8, vision_output_dim=64, intermediate_layers_indices=[0]),
        image_token_index=words.image_token_id)
    return config, tf.MllamaImageProcessor(size=SQUARE), words, "MllamaProcessor", {}


def qwen3_5():
    _, images, words, name, _ = qwen3_vl()
    config = tf.Qwen3_5Config(
        text_config=dict(TEXT, vocab_size=len(words), layer_types=["linear_attention", "full_attention"],
                         linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
                         rope_parameters=dict(MROPE, partial_rotary_factor=1.0)),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=16,
                           num_position_embeddings=16), image_token_id=words.image_token_id)
    return config, images, words, name, {}


def t5gemma2():
    _, images, words, name, settings = gemma3()
    part = dict(TEXT, vocab_size=len(words), sliding_window=24, query_pre_attn_scalar=16)
    config = tf.T5Gemma2Config(
        encoder=dict(text_config=part, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=words.image_token_id),
        decoder=part, image_token_index=words.image_token_id)
    return config, images, words, name, settings


def hunyuan_vl():
    """Numbers pictures over the whole batch, and so gives a prompt other positions alone than in a batch."""
    words = tokenizer("<image>", shown="<im_start><image><im_end>", image_start_token="<im_start>", image_end_token="<im_end>",
                      image_newline_token="<im_newline>")
    config = tf.HunYuanVLConfig(
        text_config=dict(TEXT, vocab_size=len(words), rope_parameters=dict(MROPE, mrope_section=[2, 2, 2, 2])),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, out_hidden_size=32,
                           patch_size=16, max_image_size=128, text_hidden_size=32),
        image_token_id=words.image_token_id, im_start_id=words.image_start_token_id, im_end_id=words.image_end_token_id,
        im_newline_id=words.image_newline_token_id)
    images = tf.HunYuanVLImageProcessor(patch_size=16, size=dict(shortest_edge=32**2, longest_edge=128**2))
    return config, images, words, "HunYuanVLProcessor", {}


def emu3():
    """Its words for a picture depend on the largest picture of the batch."""
    visual = [f"<|visual token {i:06d}|>" for i in range(16)]
    words = tokenizer("<image>", *visual, "<|extra_200|>", bos="<bos>", boi_token="<|image start|>",
                      eoi_token="<|image end|>", image_wrapper_token="<|image token|>", eof_token="<|extra_201|>")
    config = tf.Emu3Config(
        text_config=dict(TEXT, vocab_size=len(words)),
        vq_config=dict(codebook_size=16, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1, 1, 1],
                       num_res_blocks=1, attn_resolutions=[4], hidden_size=32, temporal_downsample_factor=1),
        vocabulary_map={token: words.convert_tokens_to_ids(token) for token in [*visual, "<image>", "<|extra_200|>"]})
    return config, tf.Emu3ImageProcessor(min_pixels=32**2, max_pixels=64**2, spatial_factor=8), words, "Emu3Processor", {}


def qwen3_5_moe():
    config, images, words, name, settings = qwen3_5()
    text, vision = (untyped(part) for part in (config.text_config, config.vision_config))
    config = tf.Qwen3_5MoeConfig(text_config=dict(text, **EXPERTS), vision_config=vision,
                                 image_token_id=words.image_token_id, video_token_id=config.video_token_id)
    return config, images, words, name, settings


def qwen3_vl_moe():
    config, images, words, name, settings = qwen3_vl()
    text, vision = (untyped(part) for part in (config.text_config, config.vision_config))
    config = tf.Qwen3VLMoeConfig(text_config=dict(text, decoder_sparse_step=1, **EXPERTS), vision_config=vision,
                                 image_token_id=words.image_token_id, video_token_id=config.video_token_id)
    return config, images, words, name, settings


def minicpmv(version):
    """Pictures in slices of any size; the text model is Qwen3.5's."""
    named = dict(image_start_token="<image>", image_end_token="</image>", slice_start_token="<slice>",
                 slice_end_token="</slice>", image_id_start_token="<image_id>", image_id_end_token="</image_id>",
                 video_token="<|video_pad|>")
    words = tokenizer("<|image_pad|>", **named)
    images = tf.models.minicpmv4_6.MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=32, max_slice_nums=4)
    ids = {f"{name}_id": words.convert_tokens_to_ids(named[f"{name}_token"]) for name in (
        "image_start", "image_end", "slice_start", "slice_end")} if version == "7" else {}
    if version == "7":
        ids["newline_id"] = words.convert_tokens_to_ids("\u010a")
    text = dict(qwen3_5()[0].text_config.to_dict(), vocab_size=len(words))
    config = getattr(tf, f"MiniCPMV4_{version}Config")(
        text_config=text, vision_config=dict(VISION, num_hidden_layers=3), insert_layer_id=1,
        image_token_id=words.image_token_id, video_token_id=words.video_token_id, **ids)
    return config, images, words, f"MiniCPMV4_{version}Processor", {}


def minicpmv4_6():
    return minicpmv("6")


def minicpmv4_7():
    return minicpmv("7")


def lfm2_vl():
    """Short convolutions and attention in turns."""
    words = tokenizer("<image>", "<|img_thumbnail|>", *[f"<|img_row_{r}_col_{c}|>" for r in (1, 2) for c in (1, 2)],
                      image_start_token="<|image_start|>", image_end_token="<|image_end|>")
    config = tf.Lfm2VlConfig(
        text_config=dict(TEXT, vocab_size=len(words), layer_types=["conv", "full_attention"], block_multiple_of=8),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
                           num_patches=16, vision_use_head=False),
        image_token_id=words.image_token_id, projector_hidden_size=32)
    images = tf.Lfm2VlImageProcessor(encoder_patch_size=8, tile_size=32, min_image_tokens=1, max_image_tokens=4, max_tiles=4)
    return config, images, words, "Lfm2VlProcessor", {}


def lfm3_vl():
    """Short convolutions, a sliding window and attention in turns."""
    words = tokenizer("<|image_pad|>", vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
                      video_token="<|video_pad|>")
    config = tf.Lfm3VlConfig(
        text_config=dict(TEXT, vocab_size=len(words), num_hidden_layers=3, sliding_window=24,
                         layer_types=["conv", "sliding_attention", "full_attention"]),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                           num_key_value_heads=2, patch_size=16),
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
        vision_start_token_id=words.vision_start_token_id, vision_end_token_id=words.vision_end_token_id,
        projector_hidden_size=32)
    images = tf.Qwen2VLImageProcessor(patch_size=16, size=dict(shortest_edge=32**2, longest_edge=128**2))
    return config, images, words, "Lfm3VlProcessor", {}


def granite4_vision():
    """Divides its logits, as all Granite models do; picture features enter several layers."""
    words = tokenizer("<image>")
    grid = [[32, 64], [64, 32], [64, 64]]
    config = tf.Granite4VisionConfig(
        text_config=dict({key: value for key, value in TEXT.items() if key != "head_dim"}, vocab_size=len(words),
                         logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2),
        vision_config=dict(SIGLIP, hidden_size=64), image_token_index=words.image_token_id, image_grid_pinpoints=grid,
        downsample_rate="1/2", deepstack_layer_map=[[-2, 0], [-1, 1]], vision_feature_select_strategy="full",
        qformer_config=dict(model_type="blip_2_qformer", num_hidden_layers=1, intermediate_size=64))
    images = tf.LlavaNextImageProcessor(size=dict(shortest_edge=32), crop_size=SQUARE, image_grid_pinpoints=grid)
    return config, images, words, "Granite4VisionProcessor", dict(patch_size=8, downsample_rate="1/2",
                                                                 vision_feature_select_strategy="full")


def muse_glimmer():
    """Multiplies its logits and caps them."""
    names = ("<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>")
    words = tokenizer("<|patch|>", *names)
    config = tf.MuseGlimmerConfig(
        text_config=dict(TEXT, vocab_size=len(words), sliding_window=24, output_multiplier=0.5,
                         layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(VISION, pos_emb_height=4, pos_emb_width=4, max_position_embeddings=16),
        image_token_id=words.image_token_id, video_token_id=words.convert_tokens_to_ids("<|video|>"), out_hidden_size=128,
        projector_hidden_size=32)
    return config, tf.MuseGlimmerImageProcessor(patch_size=8, max_image_tokens=16), words, "MuseGlimmerProcessor", {}


def kimi_k25():
    words = tokenizer("<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>")
    text = dict(TEXT, model_type="deepseek_v3", vocab_size=len(words), num_key_value_heads=2, q_lora_rank=16,
                kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4,
                moe_intermediate_size=32, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
    text.pop("head_dim")
    config = tf.Kimi_K25Config(
        text_config=text, vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                             patch_size=8, pos_emb_height=4, pos_emb_width=4),
        image_token_id=words.image_token_id, video_token_id=words.video_token_id, projection_hidden_size=32)
    images = tf.Kimi_K25ImageProcessor(patch_size=8, max_patches=64, size=dict(max_height=16, max_width=16))
    return config, images, words, "Kimi_K25Processor", {}


def gemma4():
    """Layers that share keys and values, a sliding window, inputs for each layer."""
    words = tokenizer("<|image|>", "<|video|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>",
                      boa_token="<|audio>", eoa_token="<audio|>", bos="<bos>")
    config = tf.Gemma4Config(
        text_config=dict(TEXT, vocab_size=len(words), num_hidden_layers=4, sliding_window=24, num_kv_shared_layers=2,
                         layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=16,
                         vocab_size_per_layer_input=len(words), global_head_dim=16),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                           num_key_value_heads=2, patch_size=8, pooling_kernel_size=2, position_embedding_size=128),
        image_token_id=words.image_token_id, video_token_id=words.convert_tokens_to_ids("<|video|>"),
        boi_token_id=words.boi_token_id, eoi_token_id=words.eoi_token_id, audio_token_id=words.audio_token_id)
    images = tf.models.gemma4.Gemma4ImageProcessorPil(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2)
    return config, images, words, "Gemma4Processor", {}


def mistral3():
    """Pixtral's vision tower and processor."""
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = tf.Mistral3Config(
        text_config=dict(TEXT, model_type="mistral", vocab_size=len(words)),
        vision_config=dict(VISION, model_type="pixtral", image_size=64, head_dim=16),
        image_token_index=words.image_token_id)
    images = tf.models.pixtral.PixtralImageProcessorPil(size=dict(longest_edge=64), patch_size=dict(height=8, width=8))
    return config, images, words, "PixtralProcessor", dict(patch_size=8, spatial_merge_size=2)


def ovis2():
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = tokenizer("<IMG_ATOM>", "<image>", *indicators, shown="<image>")
    config = tf.Ovis2Config(
        text_config=dict(TEXT, model_type="qwen2", vocab_size=len(words)),
        vision_config=dict(VISION, vocab_size=64, hidden_stride=2), image_token_id=words.image_token_id,
        visual_indicator_token_ids=words.convert_tokens_to_ids(indicators),
        vocab_size=len(words), hidden_size=32)
    images = tf.models.ovis2.Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=False)
    return config, images, words, "Ovis2Processor", dict(image_seq_length=4)


def glm46v():
    config, images, words, _, settings = glm4v()
    text, vision = (untyped(part) for part in (config.text_config, config.vision_config))
    ids = {name: getattr(config, name) for name in vars(config) if name.endswith("_token_id") and name != "image_token_id"}
    config = tf.Glm46VConfig(
        text_config=dict(text, model_type="glm4v_text"), vision_config=dict(vision, model_type="glm4v_vision"),
        image_token_id=config.image_token_id, **ids)
    return config, tf.models.glm46v.Glm46VImageProcessorPil(
        patch_size=14, size=dict(shortest_edge=56**2, longest_edge=112**2)), words, "Glm46VProcessor", settings


def glm4v_moe():
    config, images, words, _, settings = glm4v()
    text, vision = (untyped(part) for part in (config.text_config, config.vision_config))
    ids = {name: getattr(config, name) for name in vars(config) if name.endswith("_token_id")}
    config = tf.Glm4vMoeConfig(
        text_config=dict(text, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1),
        vision_config=vision, **ids)
    return config, images, words, "Glm4vProcessor", settings


def glm_ocr():
    config, images, words, _, settings = glm4v()
    text, vision = (untyped(part) for part in (config.text_config, config.vision_config))
    ids = {name: getattr(config, name) for name in vars(config) if name.endswith("_token_id")}
    return tf.GlmOcrConfig(text_config=text, vision_config=vision, **ids), tf.models.glm46v.Glm46VImageProcessorPil(
        patch_size=14, size=dict(shortest_edge=56**2, longest_edge=112**2)), words, "Glm46VProcessor", settings


def exaone4_5():
    config, images, words, _, settings = qwen2_5_vl()
    config = tf.Exaone4_5_Config(
        text_config=dict(TEXT, model_type="exaone4", vocab_size=len(words), sliding_window=24,
                         layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(untyped(config.vision_config), num_key_value_heads=1), image_token_id=words.image_token_id,
        video_token_id=config.video_token_id)
    return config, images, words, "Exaone4_5_Processor", settings


def llava():
    words = tokenizer("<image>", bos="<bos>")
    config = tf.LlavaConfig(
        text_config=dict(TEXT, model_type="llama", vocab_size=len(words)), image_token_index=words.image_token_id,
        vision_config=dict(VISION, model_type="clip_vision_model", projection_dim=32))
    images = tf.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=SQUARE)
    return config, images, words, "LlavaProcessor", dict(patch_size=8, vision_feature_select_strategy="default",
                                                         num_additional_image_tokens=1)


def vipllava():
    """Reads several layers of its vision tower."""
    config, images, words, name, settings = llava()
    config = tf.VipLlavaConfig(text_config=config.text_config, vision_config=config.vision_config, vision_feature_layers=[0, 1],
                               vision_feature_layer=[-2, -1], image_token_index=words.image_token_id)
    return config, images, words, name, settings


def pixtral():
    """Mistral's vision tower behind LLaVA's class, without merging patches."""
    config, images, words, name, _ = mistral3()
    config = tf.LlavaConfig(text_config=config.text_config, vision_config=config.vision_config, vision_feature_layer=-1,
                            vision_feature_select_strategy="full", image_token_index=words.image_token_id)
    return config, images, words, name, dict(patch_size=8)


def lighton_ocr():
    _, images, words, _, _ = mistral3()
    words = tokenizer("[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    config = tf.LightOnOcrConfig(
        text_config=dict(TEXT, model_type="qwen3", vocab_size=len(words)), image_token_id=words.image_token_id,
        vision_config=dict(VISION, model_type="pixtral", image_size=64, head_dim=16))
    return config, images, words, "LightOnOcrProcessor", dict(patch_size=8, spatial_merge_size=2)


def idefics2():
    """A perceiver gives each picture the same number of tokens."""
    words = tokenizer("<image>", "<end_of_utterance>", image_boundary_token="<fake_token_around_image>")
    config = tf.Idefics2Config(
        text_config=dict(TEXT, model_type="mistral", vocab_size=len(words)), vision_config=VISION,
        perceiver_config=dict(hidden_size=32, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2,
                              resampler_head_dim=16, num_key_value_heads=1), image_token_id=words.image_token_id)
    images = tf.Idefics2ImageProcessor(size=dict(shortest_edge=16, longest_edge=32), do_image_splitting=False)
    return config, images, words, "Idefics2Processor", dict(image_seq_len=4)


def smolvlm():
    config, _, words, _, settings = idefics3()
    words.add_special_tokens(dict(additional_special_tokens=["<video>"]))
    text = dict(untyped(config.text_config), model_type="llama", vocab_size=len(words))
    config = tf.SmolVLMConfig(text_config=text, vision_config=VISION, image_token_id=words.image_token_id, scale_factor=2,
                              pad_token_id=0)
    images = tf.SmolVLMImageProcessor(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32))
    return config, images, words, "SmolVLMProcessor", settings


def aya_vision():
    """Multiplies its logits by `logit_scale`."""
    words = tokenizer("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL",
                      *[f"TILE_{i}" for i in range(1, 5)])
    config = tf.AyaVisionConfig(
        text_config=dict(TEXT, model_type="cohere2", vocab_size=len(words), logit_scale=0.25, sliding_window=24,
                         layer_types=["sliding_attention", "full_attention"]),
        vision_config=SIGLIP, image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"))
    images = tf.models.got_ocr2.GotOcr2ImageProcessorPil(size=SQUARE, max_patches=4)
    return config, images, words, "AyaVisionProcessor", dict(patch_size=8, img_size=32, downsample_factor=2)


def cohere2_vision():
    words = tokenizer("<|IMG_PATCH|>", boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>",
                      img_line_break_token="<|IMG_LINE_BREAK|>")
    config = tf.Cohere2VisionConfig(
        text_config=dict(TEXT, model_type="cohere2", vocab_size=len(words), logit_scale=0.25, sliding_window=24,
                         layer_types=["sliding_attention", "full_attention"]),
        vision_config=SIGLIP, image_token_id=words.image_token_id, alignment_intermediate_size=64)
    images = tf.Cohere2VisionImageProcessor(size=SQUARE, max_patches=4, patch_size=2)
    return config, images, words, "Cohere2VisionProcessor", {}


def janus():
    """It can draw, too: its class holds a tower of codes beside the one that sees."""
    words = tokenizer("<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    config = tf.JanusConfig(
        text_config=dict(TEXT, model_type="llama", vocab_size=len(words)),
        vision_config=dict({name: value for name, value in VISION.items() if name != "intermediate_size"},
                           num_image_tokens=16, projection_dim=32),
        vq_config=dict(embed_dim=4, num_embeddings=16, latent_channels=4, base_channels=32, channel_multiplier=[1, 1],
                       num_res_blocks=1, num_patches=4, projection_dim=32, num_hidden_layers=1, image_token_embed_dim=32),
        image_token_id=words.image_token_id)
    images = tf.models.janus.JanusImageProcessorPil(size=SQUARE, min_size=8)
    return config, images, words, "JanusProcessor", dict(num_image_tokens=16)


def deepseek_vl():
    words = tokenizer("<image_placeholder>")
    config = tf.DeepseekVLConfig(text_config=dict(TEXT, model_type="llama", vocab_size=len(words)), vision_config=SIGLIP,
                                 image_token_id=words.image_token_id)
    images = tf.models.deepseek_vl.DeepseekVLImageProcessorPil(size=SQUARE, min_size=8)
    return config, images, words, "DeepseekVLProcessor", dict(num_image_tokens=16)


def molmo2():
    """Its embeddings and its head have different numbers of words."""
    names = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>", "<im_low>")
    words = tokenizer("<|image|>", *names, video_token="<|video|>", bos="<bos>")
    ids = dict(zip(names, words.convert_tokens_to_ids(list(names))))
    vision = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    config = tf.Molmo2Config(
        text_config=dict(TEXT, vocab_size=len(words), additional_vocab_size=8),
        vision_config=dict(vision, intermediate_size=64, num_hidden_layers=2, image_size=[32, 32], patch_size=8,
                           num_position_embeddings=16),
        adapter_config=dict(vision, vision_feature_layer=[-1, -2], intermediate_size=64, text_hidden_size=32),
        image_start_token_id=ids["<im_start>"], low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"], image_patch_id=ids["<im_patch>"], frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"], image_col_id=ids["<im_col>"])
    images = tf.Molmo2ImageProcessor(size=SQUARE, max_crops=2, overlap_margins=[1, 1], patch_size=8)
    return config, images, words, "Molmo2Processor", {}


def llama4():
    """Its class has no backbone of its own, but a whole language model with its head; one layer sees words in chunks."""
    words = tokenizer("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
                      "<|tile_y_separator|>", bos="<bos>")
    config = tf.Llama4Config(
        text_config=dict(TEXT, vocab_size=len(words), intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
                         attention_chunk_size=64, no_rope_layers=[1, 0], attn_temperature_tuning=False),
        vision_config=dict(VISION, intermediate_size=128, vision_output_dim=32, projector_input_dim=32,
                           projector_output_dim=32),
        image_token_index=words.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=words.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=words.convert_tokens_to_ids("<|image_end|>"))
    images = tf.Llama4ImageProcessor(size=SQUARE, max_patches=2)
    return config, images, words, "Llama4Processor", dict(patch_size=8)


def florence2():
    words = tokenizer("<image>")
    config = tf.Florence2Config(
        text_config=dict(model_type="bart", vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1,
                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32),
        vision_config=dict(embed_dim=[8, 8, 16, 32], num_heads=[2, 2, 2, 2], num_groups=[2, 2, 2, 2], depths=[1, 1, 1, 1],
                           projection_dim=32), image_token_id=words.image_token_id)
    return config, tf.CLIPImageProcessor(size=SQUARE, crop_size=SQUARE), words, "Florence2Processor", dict(num_additional_image_tokens=0)


# Their image processors need torchvision; SmolVLM's processor num2words, too.
NEEDS_TORCHVISION = (lfm2_vl, muse_glimmer, kimi_k25, mistral3, pixtral, lighton_ocr, cohere2_vision, llama4, molmo2, smolvlm)
# One of each kind: states beside keys, experts, short convolutions and a window, a divided logit, windows in the vision tower,
# shared keys, tiles whole and padded. The must-haves of 2026 are among them.
REPRESENTATIVES = (qwen3_5, qwen3_5_moe, minicpmv4_6, lfm3_vl, granite4_vision, qwen2_5_vl, gemma4, internvl, idefics3,
                   llava_next)
OTHERS = (minicpmv4_7, qwen2_vl, qwen3_vl, qwen3_vl_moe, gemma3, llava, vipllava, llava_onevision, llava_next_video, glm4v,
          glm46v, glm4v_moe, glm_ocr, exaone4_5, idefics2, aya_vision, janus, deepseek_vl, ovis2, *NEEDS_TORCHVISION)
# FAMILIES=all, or names with commas between them; benchmarks/families.py sets it.
CHOSEN = os.environ.get("FAMILIES", "")
ALL = (*REPRESENTATIVES, *OTHERS)
FAMILIES = REPRESENTATIVES if not CHOSEN else ALL if CHOSEN == "all" else [f for f in ALL if f.__name__ in CHOSEN.split(",")]
REFUSED = {mllama: "cross-attention", t5gemma2: "encoder and a decoder", florence2: "encoder and a decoder",
           hunyuan_vl: "other positions alone than in a batch"}


def write(family, path):
    """A directory as on the hub, with random weights loud enough for pictures and positions to matter."""
    torch.manual_seed(0)
    config, images, words, processor, settings = family()
    model = tf.AutoModelForImageTextToText.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    # A fifth of the letters end the answer too, so that rows end at different steps.
    ends = [words.eos_token_id, *words.convert_tokens_to_ids(list("aeiouyAEIOUY.,?!123456"))]
    model.generation_config = tf.GenerationConfig(eos_token_id=ends, pad_token_id=words.pad_token_id)
    for part in (model, images, words):
        part.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps({"processor_class": processor, **settings}))
    return path


def picture(seed, width, height):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


# Prompts of different lengths with one picture, with two, with none, and pictures of different sizes.
IMAGES = [[picture(0, 64, 64)], [picture(1, 120, 40), picture(2, 40, 90)], [], [picture(3, 48, 100)]]
PROMPTS = ["What is it?", "Is <image 2> like <image 1>, or is it not?", "Say something.", "Where?"]
