"""The arithmetic of a training step, against sums by hand from SmolVLM2-500M's published configuration."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import SmolVLMConfig

from foodextract.training.throughput import (
    Step,
    flops_per_image,
    matmul_rate,
    peak_memory,
    performance_rows,
    reset_peak_memory,
)

VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 512, "patch_size": 16}
TEXT = {
    "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "head_dim": 64,
    "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280,
}  # fmt: skip
CONFIG = SmolVLMConfig(vision_config=VISION, text_config=TEXT, scale_factor=4)


@pytest.mark.parametrize(
    ("tiles", "tokens", "answer", "vision", "tera"),
    [
        (
            1,
            255,
            60,
            "frozen",
            0.727,
        ),  # V + 2C + 3LM with V = 213.8, C = 1.5 and 0.629 a token, 0.0946 a position of the head, in GFLOP
        (1, 255, 60, "trained", 1.156),  # 3 (V + C + LM)
        (17, 1315, 1315, "frozen", 6.86),
        (1, 255, 60, "cached", 0.727 - 0.2138),
    ],
)
def test_a_step_of_the_500m_model(tiles, tokens, answer, vision, tera):
    assert flops_per_image(CONFIG, Step(tiles, tokens, 0, 1, answer, vision)) == pytest.approx(tera * 1e12, rel=0.01)


def test_sharing_the_system_message_saves_its_tokens():
    alone = flops_per_image(CONFIG, Step(1, 255, 0, 1, 60, "cached"))
    shared = flops_per_image(CONFIG, Step(1, 120, 135, 32, 60, "cached"))
    assert shared < 0.6 * alone
    assert flops_per_image(CONFIG, Step(1, 120, 135, 1, 60, "cached")) == pytest.approx(
        alone, rel=1e-9
    )  # nobody to share it with


def test_the_device_is_measured():
    cpu = torch.device("cpu")
    assert matmul_rate(cpu, torch.float32, size=64, seconds=0.01) > 1e6
    model, step = SimpleNamespace(config=CONFIG, device=cpu), Step(1, 255, 0, 1, 60, "frozen")
    rows = {row.metric: row for row in performance_rows("stage1", model, step, 100, 10, 2, torch.float32)}
    assert (rows["images_per_second"].value, rows["images_per_second"].n) == (10, 100)
    assert rows["tokens_per_second"].value == 2550
    assert rows["tflop_per_second"].value == pytest.approx(7.27, rel=0.01)
    assert rows["mfu"].value > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts from a given point on Linux only")
def test_the_peak_of_memory_counts_from_the_reset():
    cpu, size = torch.device("cpu"), 400_000_000
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    torch.ones(size, dtype=torch.uint8)
    assert peak_memory(cpu) > before + 0.9 * size
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < before + 0.5 * size
