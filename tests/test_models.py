"""Every architecture people use, as a tiny random model, passes the same tests: `VLM` against transformers' own `generate`
and its own full forward pass without a cache.

A family is a function -> (config, image processor, tokenizer, processor class, settings of the processor). It is written
as a directory the way the hub has them and opened by `VLM.load`. No torchvision is needed.
"""
import importlib.util
import json

import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from utils import distributed, memory
from utils.cli import InputError
from vlm import VLM

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, max_position_embeddings=4096, bos_token_id=2, eos_token_id=1, pad_token_id=0)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
SIGLIP = dict(VISION, model_type="siglip_vision_model", vision_use_head=False)
SQUARE = dict(height=32, width=32)


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
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=16,
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


FAMILIES = (qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, llava_onevision, gemma3, idefics3, llava_next, llava_next_video, glm4v)
REFUSED = {mllama: "cross-attention", qwen3_5: "LinearAttentionLayer", t5gemma2: "encoder and a decoder",
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On matrices this small a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def path(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def vlm(path):
    return VLM.load(path, "cpu")


def picture(seed, width, height):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


# Prompts of different lengths with one picture, with two, with none, and pictures of different sizes.
IMAGES = [[picture(0, 64, 64)], [picture(1, 120, 40), picture(2, 40, 90)], [], [picture(3, 48, 100)]]
PROMPTS = ["What is it?", "Is <image 2> like <image 1>, or is it not?", "Say something.", "Where?"]


def flat(groups):
    return [r for group in groups for r in group]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.fixture(scope="module")
def rollouts(vlm):
    """Two samples of every prompt."""
    return flat(vlm.sample(IMAGES, PROMPTS, n=2, max_new_tokens=6, seed=1, entropy=True))


def pixels_of(inputs):
    return next(value for key, value in inputs.items() if key.startswith("pixel_values"))


def plain(vlm, images, prompt, completion):
    """Log-probs of a completion (T,) by one forward pass of transformers' own model: no cache, no padding, no batch. The
    loss of its labels path must be minus their mean."""
    inputs = vlm.encode([images], [prompt])
    length, size = inputs["input_ids"].shape[1], len(completion)
    for key, value in inputs.items():
        if value.shape == (1, length):                  # what goes along with the tokens: a completion is words, type 0
            more = {"input_ids": completion, "attention_mask": torch.ones(size)}.get(key, torch.zeros(size))
            inputs[key] = torch.cat([value, more[None].to(value.dtype)], 1)
    labels = inputs["input_ids"].clone()
    inputs.pop("labels", None)                          # PaliGemma's processor makes some of its own
    labels[:, :length] = -100
    outputs = vlm.model(**inputs, labels=labels, use_cache=False)
    logp = outputs.logits[0, length - 1:-1].float().log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    torch.testing.assert_close(outputs.loss, -logp.mean(), atol=1e-4, rtol=0)
    return logp


def test_greedy_equals_generate_token_for_token(vlm):
    inputs = vlm.encode(IMAGES, PROMPTS)
    assert (inputs["attention_mask"] == 0).any()
    expected = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False,
                                  suppress_tokens=vlm.banned.nonzero()[:, 0].tolist())[:, inputs["input_ids"].shape[1]:]
    found = [r.tokens for r in flat(vlm.sample(IMAGES, PROMPTS, greedy=True, max_new_tokens=8))]
    assert padded(found).tolist() == expected[:, :max(map(len, found))].tolist()


def test_sampled_equals_scored_equals_a_plain_forward(vlm, rollouts):
    with torch.no_grad():
        scores = vlm.score(IMAGES, PROMPTS, [r.tokens for r in rollouts])
        for i, r in enumerate(rollouts):
            n = len(r.tokens)
            for scored, sampled in ((scores.logprobs, r.logprobs), (scores.confidence, r.confidences),
                                    (scores.entropy, r.entropies)):
                torch.testing.assert_close(scored[i, :n], sampled, atol=1e-5, rtol=0)
            logp = plain(vlm, IMAGES[i // 2], PROMPTS[i // 2], r.tokens)
            torch.testing.assert_close(scores.logprobs[i, :n], logp, atol=1e-4, rtol=0)


def test_a_prompt_alone_is_the_same_prompt_in_a_batch(vlm, rollouts):
    with torch.no_grad():
        together = vlm.score(IMAGES, PROMPTS, [r.tokens for r in rollouts[::2]]).logprobs
        for i, r in enumerate(rollouts[::2]):
            alone = vlm.score(IMAGES[i:i + 1], PROMPTS[i:i + 1], [r.tokens]).logprobs[0]
            torch.testing.assert_close(together[i, :len(alone)], alone, atol=1e-5, rtol=0)


def test_prompts_encoded_once_are_found_again_in_parts_and_in_another_order(vlm, monkeypatch):
    images, prompts = [IMAGES[i] for i in (0, 3, 3)], [PROMPTS[i] for i in (0, 3, 2)]
    parts, said = [[2, 0], [1], [0, 1, 2]], torch.tensor([40, 50])
    with torch.no_grad():
        fresh = [vlm.score([images[i] for i in part], [prompts[i] for i in part], [said] * len(part)) for part in parts]
        monkeypatch.setattr(vlm, "encodes_once", True)
        vlm.sample(images, prompts, max_new_tokens=1)
        held = vlm._encoded
        # A picture cut into as many tiles as suit its shape (InternVL): whose is whose cannot be told
        tiles = "image_grid_thw" not in held[2] and len(pixels_of(held[2])) != len(images)
        for part, wanted in zip(parts, fresh):
            # in lists of their own: FSDP2 rebuilds those that pass through it
            found = vlm.score([[*images[i]] for i in part], [prompts[i] for i in part], [said] * len(part))
            torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)
            assert (vlm._encoded is held) != tiles
        # another picture under the same prompt, and two pictures, are encoded
        for some, text in (([[picture(9, 64, 64)]], prompts[:1]), ([IMAGES[1]], [PROMPTS[1]])):
            vlm.score(some, text, [said])
            assert vlm._encoded[0] == some
        some = [IMAGES[0]]
        before = vlm.score(some, ["Where?"], [said]).logprobs
        some[0] = IMAGES[3]                     # the list is another's; what was encoded is not mistaken for its new picture
        assert (vlm.score(some, ["Where?"], [said]).logprobs - before).abs().max() > 1e-3
    monkeypatch.setattr(vlm, "_encoded", ((), (), {}))


def test_every_picture_is_looked_at(vlm):
    images, prompts, completions = [IMAGES[1]], [PROMPTS[1]], [torch.tensor([40, 50])]
    with torch.no_grad():
        seen = vlm.score(images, prompts, completions).logprobs
        for i in (0, 1):
            other = list(IMAGES[1])
            other[i] = picture(9, *other[i].size)
            assert (vlm.score([other], prompts, completions).logprobs - seen).abs().max() > 1e-3


def test_saved_and_loaded_says_the_same(vlm, rollouts, tmp_path):
    vlm.save(tmp_path)
    weights = tf.AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in vlm.model.state_dict().items())
    again = flat(VLM.load(tmp_path, "cpu").sample(IMAGES, PROMPTS, n=2, max_new_tokens=6, seed=1))
    assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs) for a, b in zip(again, rollouts))


def test_contrast(vlm):
    noised = [[picture(7, *image.size) for image in images] for images in IMAGES]
    plainly = flat(vlm.sample(IMAGES, PROMPTS, greedy=True, max_new_tokens=6))
    for beta in (0, 0.1):
        same = vlm.contrast(IMAGES, noised, PROMPTS, alpha=0, beta=beta, max_new_tokens=6)
        assert [r.tokens.tolist() for r in same] == [r.tokens.tolist() for r in plainly]
    other = vlm.contrast(IMAGES, noised, PROMPTS, alpha=5, beta=0, max_new_tokens=6)
    assert [r.text for r in other] != [r.text for r in plainly]


def test_gradient_equals_that_of_plain_forwards_and_a_step_along_it_lowers_the_loss(path, rollouts):
    vlm, completions = VLM.load(path, "cpu"), [r.tokens for r in rollouts]

    def loss():
        scores = vlm.score(IMAGES, PROMPTS, completions)
        return -scores.logprobs.sum() / scores.mask.sum()

    def gradient(value):
        vlm.model.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None])
    logp = torch.cat([plain(vlm, IMAGES[i // 2], PROMPTS[i // 2], c) for i, c in enumerate(completions)])
    expected, before = gradient(-logp.mean()), loss()
    found = gradient(before)
    assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
        loss()
        vlm.checkpoint_activations(distributed.blocks(vlm.model))
        kept, _ = sum(held), held.clear()
        torch.testing.assert_close(gradient(loss()), found, atol=1e-6, rtol=1e-5)
    assert sum(held) < kept / 2                     # what the blocks need is made again
    torch.optim.AdamW(vlm.model.parameters(), lr=1e-3).step()
    assert loss() < before


def test_the_state_of_training_comes_back_where_some_weights_never_had_a_gradient_too(path, rollouts, tmp_path):
    """As LLaVA's last vision layer: two steps are one, a checkpoint, and another one."""
    def start():
        policy = distributed.Policy(VLM.load(path, "cpu"))
        return policy, distributed.adamw(list(policy.parameters()), 1e-3)

    def step(policy, optimiser):
        policy.score(IMAGES, PROMPTS, [r.tokens for r in rollouts]).logprobs.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    through, resumed = start(), start()
    step(*through)
    distributed.save_state(*through, tmp_path / "state")
    distributed.load_state(*resumed, tmp_path / "state")
    for run in (through, resumed):
        step(*run)
    assert len(through[1].state) == len(resumed[1].state)
    assert all(map(torch.equal, through[0].parameters(), resumed[0].parameters()))


def test_the_plan_counts_what_the_vision_tower_sees(vlm):
    """A class token a tile apart, which some towers add."""
    sight, seen = {id(p) for p in vlm.vision_parameters()}, []
    block = next(b for b in distributed.blocks(vlm.model) if id(next(b.parameters())) in sight)

    def look(_, args, named):
        seen.append((args[0] if args else named["hidden_states"]).shape[:-1].numel())
    hook = block.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        vlm.score([IMAGES[3]], [PROMPTS[3]], [torch.tensor([5])])
    hook.remove()
    pixels = pixels_of(vlm.encode([IMAGES[3]], [PROMPTS[3]]))
    tiles = 0 if pixels.ndim == 2 else pixels.shape[:-3].numel()
    assert 0 <= seen[0] - memory.patches(pixels, vlm.model.config.vision_config) <= tiles


def test_a_processor_that_cannot_be_written_is_refused_by_name(path, vlm, tmp_path, monkeypatch):
    """By the plan of --dry_run as well, and in one sentence."""
    monkeypatch.setattr(tf.ProcessorMixin, "save_pretrained", lambda *_: {}["no such setting"])
    for refuse in (lambda: vlm.save_processor(tmp_path), lambda: VLM.load(path, meta=True)):
        with pytest.raises(InputError, match="^model class [A-Za-z0-9_]+ cannot be used here: its processor cannot be saved"):
            refuse()


def test_every_id_that_the_settings_name_is_never_sampled(vlm, monkeypatch):
    said = [i for i in (~vlm.banned).nonzero()[:, 0].tolist() if i not in vlm.eos.tolist()][:2]
    monkeypatch.setattr(vlm.model.config, "odd_token_id", said, raising=False)
    assert len(said) == 2 and vlm._banned_ids()[said].all()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="there is torchvision, which Pixtral asks for")
def test_a_processor_is_never_taken_for_another_one(tmp_path):
    """Pixtral's model is a Llava, its processor is not Llava's."""
    write(internvl, tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    with pytest.raises(InputError, match="cannot be opened here: .*Pixtral.*[Tt]orchvision"):
        VLM.load(tmp_path, "cpu")


def test_capped_logits_and_a_class_that_needs_a_picture(tmp_path):
    """`VLM.load` has compared log-probs with those of `generate`, which caps."""
    vlm = VLM.load(write(paligemma2, tmp_path), "cpu")
    images, prompts = IMAGES[:2], PROMPTS[:2]
    capped = flat(vlm.sample(images, prompts, n=2, max_new_tokens=6))
    scores = vlm.score(images, prompts, [r.tokens for r in capped]).logprobs
    assert all(torch.allclose(row[:len(r.tokens)], r.logprobs, atol=1e-5, rtol=0) for row, r in zip(scores, capped))
    vlm.text_config.final_logit_softcapping = None
    assert (vlm.score(images, prompts, [r.tokens for r in capped]).logprobs - scores).abs().max() > 0.1
    with pytest.raises(InputError, match="PaliGemmaProcessor does not take these prompts"):
        vlm.sample([[]], ["Say something."])


def test_no_second_bos_where_the_template_has_written_one(tmp_path):
    vlm = VLM.load(write(gemma3, tmp_path), "cpu")
    vlm.tokenizer.add_bos_token = True
    ids = vlm.encode(IMAGES, PROMPTS)["input_ids"]
    assert ((ids == vlm.tokenizer.bos_token_id).sum(1) == 1).all()


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.__name__)
def test_a_class_that_cannot_work_is_refused_by_name_when_loaded(family, tmp_path):
    """By the plan of --dry_run, which has no weights, as well."""
    path = write(family, tmp_path)
    for load in (VLM.load, (lambda path: VLM.load(path, meta=True))):
        with pytest.raises(InputError, match=f"ForConditionalGeneration cannot be used here: .*{REFUSED[family]}"):
            load(path)


def test_a_class_whose_log_probs_of_a_prompt_depend_on_its_batch_is_refused(tmp_path):
    with pytest.raises(InputError, match="Emu3.* cannot be used here: its log-probs of a prompt alone are off from those in"):
        VLM.load(write(emu3, tmp_path))
