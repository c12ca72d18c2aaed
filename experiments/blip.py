"""BLIP: the real one by its Hub id, and a small one of the same architecture for machines without a GPU."""

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from captioning import TARGET
from foodextract.data.scenes import FOODS
from foodextract.models.loading import TINY_BASE, load_model, load_processor
from recipes import TINY


def load(base: str, device: torch.device) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor by Hub id or folder, in fp32, or the tiny ones."""
    if base == TINY:
        model, processor = make_tiny()
    else:
        model, processor = BlipForConditionalGeneration.from_pretrained(base), BlipProcessor.from_pretrained(base)
    return model.to(device), processor


def make_tiny(seed: int = 0) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """A small BLIP: the vision tower of the bundled tiny base, of the same architecture, and a random decoder."""
    words = dict.fromkeys(" ".join([TARGET.format(""), *FOODS]).lower().split())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, bos_token="[DEC]")
    eyes = load_model(TINY_BASE, torch.device("cpu")).model.vision_model
    seen, looking = eyes.config, load_processor(TINY_BASE, tiles=1).image_processor
    both = {name: getattr(seen, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    look = {
        name: getattr(seen, name)
        for name in ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "num_hidden_layers")
    }
    ids = {
        f"{name}_token_id": vocabulary.index(f"[{token}]")
        for name, token in (("pad", "PAD"), ("sep", "SEP"), ("bos", "DEC"))
    }
    talk = {
        "vocab_size": len(vocabulary),
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "eos_token_id": ids["sep_token_id"],
    }
    config = BlipConfig(
        text_config=both | talk | ids | {"encoder_hidden_size": seen.hidden_size}, vision_config=both | look
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
    model.vision_model.load_state_dict(_as_blip(eyes.state_dict()))
    size = {"height": seen.image_size, "width": seen.image_size}
    images = BlipImageProcessor(
        size=size, image_mean=looking.image_mean, image_std=looking.image_std, resample=looking.resample
    )
    return model.eval(), BlipProcessor(images, tokenizer)


def _as_blip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SmolVLM's vision weights under BLIP's names. BLIP has one token more, the class token, which is left blank."""
    blank = torch.zeros(1, 1, weights["post_layernorm.bias"].numel())
    position = weights["embeddings.position_embedding.weight"][None]
    renamed = {"embeddings.class_embedding": blank, "embeddings.position_embedding": torch.cat([blank, position], 1)}
    for name, value in weights.items():
        if name.startswith("embeddings.patch_embedding"):
            renamed[name] = value
        elif ".q_proj." in name:  # BLIP computes queries, keys and values at once
            renamed[name.replace("q_proj", "qkv")] = torch.cat(
                [weights[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")]
            )
        elif not any(part in name for part in ("k_proj", "v_proj", "position_embedding")):
            renamed[name.replace("out_proj", "projection")] = value
    return renamed
