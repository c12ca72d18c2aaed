"""Gemma-3n: loading it with the guards it needs, and a tiny model of the same architecture for machines without a GPU.

The tiny one is built from the real configuration classes: a MobileNet-V5 tower with one to three blocks a stage, an
audio tower, AltUp, LAuReL, per-layer embeddings, shared keys and values, sparse activations. Its weights are random,
so it knows nothing.
"""

import copy
from pathlib import Path

import torch
from timm.models._efficientnet_builder import decode_arch_def, efficientnet_init_weights
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    Gemma3nAudioConfig,
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessor,
)

from foodextract.models.loading import TINY_BASE, ModelError
from foodextract.models.precision import choose_precision
from recipes import TINY

LARGEST_FP16 = 65_504.0
EDGE = 192  # pixels of an image; the tower halves it five times, to 6 x 6
TURN_END = "<end_of_turn>"

# Gemma's order of token ids: text, then those of the vision embedder alone, then those of the audio embedder alone.
TEXT_TOKENS = ("<bos>", "<pad>", "<eos>", "<start_of_turn>", TURN_END, "<start_of_image>", "<start_of_audio>")
VISION_TOKENS = ("<end_of_image>", "<image_soft_token>")
AUDIO_TOKENS = ("<end_of_audio>", "<audio_soft_token>")

# The system message opens the first user turn, as in Gemma's own template.
TEMPLATE = (
    "{{ bos_token }}{% set system = messages[0].content[0].text + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for message in messages if message.role != 'system' %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n{{ system if loop.first }}"
    "{% for part in message.content %}{{ '<image_soft_token>' if part.type == 'image' else part.text }}{% endfor %}"
    "<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def load(base: str, device: torch.device) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor by Hub id or folder, or the tiny ones. Raises ModelError for a GPU that could only compute
    in fp16.

    Weights come in the type of inference: LoRA leaves them as they are, so that they need no fp32 master copy.
    """
    if choose_precision(device, training=True).autocast is torch.float16:
        raise ModelError(
            "Gemma-3n overflows fp16, and this GPU has no bf16 units: take one that has (A100, L4), or the CPU"
        )
    if base == TINY:
        model, processor = make_tiny()
    else:
        dtype = choose_precision(device, training=False).weights
        model, processor = (
            AutoModelForImageTextToText.from_pretrained(base, dtype=dtype),
            AutoProcessor.from_pretrained(base),
        )
    processor.tokenizer.eos_token = TURN_END  # an answer ends where the turn ends; <eos> would be the end of a document
    return model.to(device), processor


def make_tiny(seed: int = 0) -> tuple[Gemma3nForConditionalGeneration, Gemma3nProcessor]:
    """A random Gemma-3n of some five million parameters around the words of the bundled tiny base."""
    words = Tokenizer.from_file(str(Path(TINY_BASE) / "tokenizer.json"))
    words.add_special_tokens([*TEXT_TOKENS, *VISION_TOKENS, *AUDIO_TOKENS])
    token = words.token_to_id
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token=TURN_END,
        pad_token="<pad>",
        model_specific_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "audio_token": "<audio_soft_token>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
    )
    patches = (EDGE // 32) ** 2
    blocks = [
        ["er_r1_k3_s2_e4_c128"],
        ["uir_r1_a3_k5_s2_e6_c256"],
        ["uir_r1_a5_k5_s2_e6_c640", "mqa_r1_k3_h8_s2_d64_c640", "uir_r1_a0_k0_s1_e2_c640"],
        ["uir_r1_a5_k5_s2_e6_c1280", "mqa_r1_k3_h16_s1_d96_c1280", "uir_r1_a0_k0_s1_e2_c1280"],
    ]
    tower = {"channel_multiplier": 0.125, "block_args": decode_arch_def(blocks), "msfa_output_resolution": EDGE // 32}
    text = Gemma3nTextConfig(
        vocab_size=words.get_vocab_size(),
        vocab_size_per_layer_input=token(VISION_TOKENS[0]),
        hidden_size=128,
        hidden_size_per_layer_input=32,
        intermediate_size=256,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        laurel_rank=16,
        bos_token_id=token("<bos>"),
        pad_token_id=token("<pad>"),
        eos_token_id=token(TURN_END),
    )
    config = Gemma3nConfig(
        text_config=text,
        vision_config=Gemma3nVisionConfig(
            model_args=tower, vocab_size=len(VISION_TOKENS), vocab_offset=token(VISION_TOKENS[0])
        ),
        audio_config=Gemma3nAudioConfig(
            hidden_size=32,
            conf_num_hidden_layers=1,
            conf_num_attention_heads=2,
            sscp_conv_channel_size=(8, 4),
            vocab_size=len(AUDIO_TOKENS),
            vocab_offset=token(AUDIO_TOKENS[0]),
        ),
        vision_soft_tokens_per_image=patches,
        boi_token_id=token("<start_of_image>"),
        eoi_token_id=token("<end_of_image>"),
        image_token_id=token("<image_soft_token>"),
        boa_token_id=token("<start_of_audio>"),
        eoa_token_id=token("<end_of_audio>"),
        audio_token_id=token("<audio_soft_token>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given = copy.deepcopy(tower)  # timm writes layer classes into it, which no config.json can hold
        model = Gemma3nForConditionalGeneration(config)
        model.config.vision_config.model_args.update(given)
        efficientnet_init_weights(model.model.vision_tower)  # which transformers leaves at zero, expecting a checkpoint
    model.generation_config.eos_token_id = token(TURN_END)
    images = SiglipImageProcessor(size={"height": EDGE, "width": EDGE}, do_normalize=False)
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), images, tokenizer, chat_template=TEMPLATE, image_seq_length=patches
    )
    return model, processor


@torch.inference_mode()
def largest_activations(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest absolute output of any layer, by part of the model, for one batch; compare it with LARGEST_FP16."""
    found: dict[str, float] = {}

    def look(part: str):
        def hook(_module, _inputs, output) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            sizes = [
                float(t.abs().max())
                for t in tensors
                if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()
            ]
            found[part] = max([found.get(part, 0.0), *sizes])

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(look(name.removeprefix("model.").split(".")[0])) for name, module in leaves]
    try:
        model(**BatchFeature(inputs).to(model.device, model.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return found
