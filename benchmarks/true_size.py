"""Models of true size with random weights, and how their costs are summed up: what benchmarks of speed share.

Models are built from their published configurations, so nothing is fetched. The tokenizer is the bundled one unless
another SmolVLM's folder is named: it knows 920 tokens of the model's 49,280, so prompts differ by some tokens.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin, SmolVLMConfig

from foodextract.data.scenes import Scene
from foodextract.models import loading
from foodextract.training.throughput import matmul_rate

SIZES = {  # of the text model; the vision tower is the same in both
    "500m": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
    },
    "256m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
}


def build(size: str, processor_from: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A SmolVLM2 of true size with random bf16 weights, or the bundled tiny one, with a processor that fits."""
    processor = loading.load_processor(processor_from)
    if size == "tiny":
        return loading.load_model(loading.TINY_TUNED, torch.device("cpu"), precision="bf16"), processor
    tokenizer = processor.tokenizer
    end, pad, image = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<image>")
    text = {
        "model_type": "llama",
        "vocab_size": 49280,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    }
    config = SmolVLMConfig(
        text_config=text | SIZES[size] | {"eos_token_id": end, "pad_token_id": pad},
        vision_config=vision | {"image_size": 512, "hidden_act": "gelu_pytorch_tanh"},
        scale_factor=4,
        image_token_id=image,
        tie_word_embeddings=False,  # with a head of its own it has 507,482,304 or 256,484,928 parameters, as published
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    processor.image_processor.max_image_size = {"longest_edge": 512}
    processor.image_seq_len = 64
    return model.eval(), processor


def bf16_is_slow(device: torch.device) -> bool:
    """Does this device multiply bf16 matrices slower than fp32 ones, as a CPU without AVX-512 does?"""
    return matmul_rate(device, torch.bfloat16) < matmul_rate(device, torch.float32)


def as_photograph(scene: Scene) -> bytes:
    """A drawn scene as a JPEG file of 1024 x 1024 pixels, which takes as long to decode and resize as a photograph."""
    file = io.BytesIO()
    scene.image.resize((1024, 1024)).save(file, "JPEG")
    return file.getvalue()


def interval(
    values: Sequence[float], statistic: Callable = np.mean, *others: Sequence[float]
) -> dict[str, float | None]:
    """Value with its bootstrap interval over images, which several lists share."""
    columns = tuple(np.asarray(column) for column in (values, *others))
    if len(values) < 3:
        return {"value": float(statistic(*columns)), "low": None, "high": None}
    bounds = bootstrap(
        columns, statistic, paired=True, vectorized=False, n_resamples=999, method="percentile", rng=0
    ).confidence_interval
    return {"value": float(statistic(*columns)), "low": float(bounds.low), "high": float(bounds.high)}


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """How many times more a cost than b."""
    return float(np.sum(a) / np.sum(b))
