"""SmolVLM as ONNX graphs: export from torch, and inference through ONNX Runtime. Needs the extra `onnx`.

The folder `onnx/` holds three graphs, named as optimum and transformers.js name them. `vision_encoder` maps the
pixels of tiles to features. `embed_tokens` maps tokens to embeddings. `decoder_model_merged` reads a block of
embeddings behind a cache of keys and values, which is empty for a prompt. The first and the last also have int8
versions, `…_quantized`: weights per output channel, activations by their range at run time. That range spans the
whole batch, so batching changes a few answers.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, DynamicCache, GenerationConfig, PreTrainedModel

from foodextract.extras import extra
from foodextract.inference.confidence import Calibration
from foodextract.models.loading import ModelError, check_target, load_model, load_processor
from foodextract.models.training_data import TrainingData

FOLDER = "onnx"
VISION, EMBEDDING, TEXT = "vision_encoder", "embed_tokens", "decoder_model_merged"
QUANTIZED = "_quantized"
OPSET = 20  # the first with Gelu as one operator


class _Vision(torch.nn.Module):
    """Maps whole tiles (N, 3, P, P) to features (N, F, D)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        patches = patches + self.tower.embeddings.position_embedding.weight  # correct for tiles without padding only
        return self.connector(self.tower.post_layernorm(self.tower.encoder(inputs_embeds=patches).last_hidden_state))


class _Text(torch.nn.Module):
    """Returns the logits (B, 1, V) behind the last token of a block, and the extended keys and values of all layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.text, self.head = model.model.text_model, model.lm_head

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        new, whole = inputs_embeds.shape[1], attention_mask.shape[1]
        seen = torch.ones(new, whole, dtype=torch.bool).tril(whole - new) & attention_mask[:, None, None].bool()
        lowest = torch.finfo(inputs_embeds.dtype).min  # not -inf: the softmax of padding would be NaN
        output = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=torch.zeros_like(seen, dtype=inputs_embeds.dtype).masked_fill(~seen, lowest),
            position_ids=position_ids,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return self.head(output.last_hidden_state[:, -1:]), *present


class _Graph(torch.nn.Module):
    """One graph as a module. Raises ModelError."""

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        super().__init__()
        runtime, file = _import("onnxruntime"), Path(folder) / FOLDER / f"{name}.onnx"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen types without a common base
            reason = next(iter(str(error).splitlines()), "")
            raise ModelError(f"{file} cannot be loaded ({reason}): export the model again") from error

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        nodes = self.session.get_inputs()
        feeds = {node.name: tensor.contiguous().numpy() for node, tensor in zip(nodes, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self.session.run(None, feeds)]


class GraphModel(torch.nn.Module):
    """The graphs in `folder`, on a CPU, with the interface that `Decoder` and `Extractor` use. Raises ModelError."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str | os.PathLike[str], device: str | None = None, precision: str | None = None) -> None:
        super().__init__()
        if device not in (None, "cpu"):
            raise ModelError(f"ONNX graphs run on a CPU here, not on {device!r}: leave the device out")
        if precision not in (None, "fp32", "int8"):
            raise ModelError(f"ONNX graphs have no precision {precision!r}: choose fp32 or int8")
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        suffix = QUANTIZED if precision == "int8" else ""
        self.vision, self.text = _Graph(folder, VISION + suffix), _Graph(folder, TEXT + suffix)
        self.embedding = _Graph(folder, EMBEDDING)
        self.eval()

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: "GraphCache | None" = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """Compute what the model's forward does with `use_cache=True` and `logits_to_keep=1`."""
        [embeddings] = self.embedding(input_ids)
        if pixel_values is not None:
            tiles = pixel_values.flatten(0, 1)
            if pixel_attention_mask is not None:  # rows of fewer tiles are padded with empty ones
                tiles = tiles[pixel_attention_mask.flatten(0, 1).any(-1).any(-1)]
            [features] = self.vision(tiles)
            embeddings[input_ids == self.config.image_token_id] = features.flatten(0, 1)
        text = self.config.text_config
        empty = torch.zeros(len(input_ids), text.num_key_value_heads, 0, text.head_dim)
        past = past_key_values.tensors if past_key_values else [empty] * (2 * text.num_hidden_layers)
        logits, *present = self.text(embeddings, attention_mask, position_ids, *past)
        return SimpleNamespace(logits=logits, past_key_values=GraphCache(present))


class GraphCache:
    """Keys and values of all layers, each (B, H, S, D), with the methods of `Cache` that `Decoder` uses."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.tensors = [tensor[indices] for tensor in self.tensors]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tensors = [tensor.repeat_interleave(repeats, 0) for tensor in self.tensors]


def is_exported(model_id: str | os.PathLike[str]) -> bool:
    """Whether the folder holds graphs and no weights. Some models on the Hub come with graphs of another form."""
    folder = Path(model_id)
    return (folder / FOLDER).is_dir() and not any(folder.glob("model*.safetensors"))


def export_onnx(model_id: str | os.PathLike[str], out: Path, tiles: int | None = None) -> dict[str, float]:
    """Write a SmolVLM into `out`, as a folder that `Extractor.from_pretrained` loads. Raises ModelError.

    Returns the size of each file in megabytes.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _import(package)
    check_target(model_id, out)
    processor = load_processor(model_id, tiles)
    write_graphs(load_model(model_id, torch.device("cpu"), precision="fp32"), out)
    processor.save_pretrained(out)
    Calibration.copy(model_id, out)
    TrainingData.copy(model_id, out)
    return {file.name: file.stat().st_size / 1e6 for file in sorted((out / FOLDER).iterdir())}


def write_graphs(model: PreTrainedModel, out: Path) -> None:
    """Write the graphs and the configuration of an fp32 model on the CPU. Raises ModelError."""
    text, vision = model.config.text_config, model.config.vision_config
    kinds = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    pixels = {"pixel_values": torch.zeros(2, 3, vision.image_size, vision.image_size)}
    ids = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    block = {
        "inputs_embeds": torch.zeros(2, 4, text.hidden_size),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "position_ids": torch.ones(2, 4, dtype=torch.long),
    }
    past = {f"past_key_values.{kind}": torch.zeros(2, text.num_key_value_heads, 3, text.head_dim) for kind in kinds}
    rows, whole, earlier = {0: "batch", 1: "block"}, {0: "batch", 1: "whole"}, {0: "batch", 2: "past"}  # dynamic sizes
    outputs = ["logits", *(f"present.{kind}" for kind in kinds)]
    graphs: list[tuple[str, torch.nn.Module, dict[str, torch.Tensor], list[str], tuple[Any, ...]]] = [
        (EMBEDDING, model.get_input_embeddings(), ids, ["inputs_embeds"], (rows,)),
        (VISION, _Vision(model), pixels, ["image_features"], ({0: "tiles"},)),
        (TEXT, _Text(model), block | past, outputs, (rows, whole, rows, (earlier,) * len(past))),
    ]
    model.eval()
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    quantization = _import("onnxruntime.quantization")
    with _quiet(), torch.inference_mode():
        for name, module, inputs, names, shapes in graphs:
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                folder / f"{name}.onnx",
                input_names=list(inputs),
                output_names=names,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        for name in (VISION, TEXT):
            source, target = folder / f"{name}.onnx", folder / f"{name}{QUANTIZED}.onnx"
            int8 = quantization.QuantType.QInt8
            quantization.quantize_dynamic(source, target, ["MatMul"], per_channel=True, weight_type=int8)
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence exporter and quantizer, which warn of deprecated names within torch and of an optional step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _import(module: str) -> ModuleType:
    with extra("onnx"):
        return importlib.import_module(module)
