"""A SmolVLM as ONNX graphs: written from torch, and asked through ONNX Runtime as if it were the model. Needs the extra `onnx`.

Three graphs in `onnx/`, with the names that optimum and transformers.js give them: `vision_encoder` turns a tile's pixels into features,
`embed_tokens` looks tokens up, and `decoder_model_merged` reads a block of embeddings behind the keys and values of what came before it;
a prompt is a block behind nothing. `vision_encoder_quantized` and `decoder_model_merged_quantized` are their int8 versions: linear
layers by output channel, activations by range at run time; a batch is rounded together there, so that it changes a few answers. The
table of embeddings stays as it is.
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

from foodextract.models.loading import ModelError, load_model, load_processor

FOLDER = "onnx"
VISION, EMBEDDING, TEXT = "vision_encoder", "embed_tokens", "decoder_model_merged"
QUANTIZED = "_quantized"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20  # the first with Gelu as one operator


class _Vision(torch.nn.Module):
    """Features (N, F, D) of N whole tiles (N, 3, P, P), which are all that the processor makes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        patches = (
            patches + self.tower.embeddings.position_embedding.weight
        )  # what the model works out for a tile without a margin
        return self.connector(self.tower.post_layernorm(self.tower.encoder(inputs_embeds=patches).last_hidden_state))


class _Text(torch.nn.Module):
    """Logits (B, 1, V) behind the last token of a block, and the keys and values of all layers with the block's own."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.text, self.head = model.model.text_model, model.lm_head

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        new, whole = inputs_embeds.shape[1], attention_mask.shape[1]
        seen = torch.ones(new, whole, dtype=torch.bool).tril(whole - new) & attention_mask[:, None, None].bool()
        lowest = torch.finfo(
            inputs_embeds.dtype
        ).min  # not -inf: a padded place sees nothing, and a softmax of nothing is NaN
        output = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=torch.zeros_like(seen, dtype=inputs_embeds.dtype).masked_fill(~seen, lowest),
            position_ids=position_ids,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return self.head(output.last_hidden_state[:, -1:]), *present


class _Graph(torch.nn.Module):
    """A graph in ONNX Runtime, on as many threads as torch uses: tensors in the order of its inputs → tensors. Raises ModelError."""

    def __init__(self, folder: str | os.PathLike, name: str) -> None:
        super().__init__()
        runtime, file = _need("onnxruntime"), Path(folder) / FOLDER / f"{name}.onnx"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen types here that have nothing in common
            raise ModelError(
                f"{file} cannot be loaded ({next(iter(str(error).splitlines()), '')}): export the model again"
            ) from error

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        feeds = {
            node.name: tensor.contiguous().numpy()
            for node, tensor in zip(self.session.get_inputs(), inputs, strict=True)
        }
        return [torch.from_numpy(array) for array in self.session.run(None, feeds)]


class GraphModel(torch.nn.Module):
    """What `Decoder` and `Extractor` ask of a model, answered by the graphs in `folder`, on a CPU. Raises ModelError."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str | os.PathLike, device: str | None = None, precision: str | None = None) -> None:
        super().__init__()
        if device not in (None, "cpu"):
            raise ModelError(
                f"ONNX graphs are answered on a CPU here, not on {device!r}: leave the device out, or give the model itself"
            )
        if precision not in (None, "fp32", "int8"):
            raise ModelError(f"ONNX graphs have no precision {precision!r}: choose fp32 or int8")
        self.config, self.generation_config = (
            AutoConfig.from_pretrained(folder),
            GenerationConfig.from_pretrained(folder),
        )
        ending = QUANTIZED if precision == "int8" else ""
        self.vision, self.embedding, self.text = (
            _Graph(folder, name) for name in (VISION + ending, EMBEDDING, TEXT + ending)
        )
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
        """As that of the model, with `use_cache` and `logits_to_keep=1`."""
        [embeddings] = self.embedding(input_ids)
        if pixel_values is not None:
            shown = slice(None) if pixel_attention_mask is None else pixel_attention_mask.flatten(0, 1).any(-1).any(-1)
            [features] = self.vision(pixel_values.flatten(0, 1)[shown])  # the others pad rows of fewer tiles
            embeddings[input_ids == self.config.image_token_id] = features.flatten(0, 1)
        text = self.config.text_config
        nothing = torch.zeros(len(input_ids), text.num_key_value_heads, 0, text.head_dim)
        past = past_key_values.tensors if past_key_values else [nothing] * (2 * text.num_hidden_layers)
        logits, *present = self.text(embeddings, attention_mask, position_ids, *past)
        return SimpleNamespace(logits=logits, past_key_values=GraphCache(present))


class GraphCache:
    """Keys and values by layer, each (B, H, S, D)."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.tensors = [tensor[rows] for tensor in self.tensors]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self.tensors = [tensor.repeat_interleave(repeats, 0) for tensor in self.tensors]


def is_exported(model_id: str | os.PathLike) -> bool:
    """Does the folder hold graphs?"""
    return (Path(model_id) / FOLDER).is_dir()


def export_onnx(model_id: str | os.PathLike, out: Path, tiles: int | None = None) -> dict[str, float]:
    """Write a SmolVLM into `out`, as a folder that `Extractor.from_pretrained` loads; megabytes by file. Raises ModelError.

    Nothing in the folder names a form of answers: the extractor notices the graphs' dialect as it does the model's.
    """
    for package in PACKAGES:
        _need(package)
    processor = load_processor(model_id, tiles)
    write_graphs(load_model(model_id, torch.device("cpu"), precision="fp32"), out)
    processor.save_pretrained(out)
    return {file.name: file.stat().st_size / 1e6 for file in sorted((out / FOLDER).iterdir())}


def write_graphs(model: PreTrainedModel, out: Path) -> None:
    """Write the graphs of an fp32 model on the CPU, and its configuration. Raises ModelError."""
    text, vision = model.config.text_config, model.config.vision_config
    kinds = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    past = {f"past_key_values.{kind}": torch.zeros(2, text.num_key_value_heads, 3, text.head_dim) for kind in kinds}
    ids = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    mask = {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    block = {
        "inputs_embeds": torch.zeros(2, 4, text.hidden_size),
        **mask,
        "position_ids": torch.ones(2, 4, dtype=torch.long),
    }
    pixels = {"pixel_values": torch.zeros(2, 3, vision.image_size, vision.image_size)}
    rows, whole, earlier = (
        {0: "batch", 1: "block"},
        {0: "batch", 1: "whole"},
        {0: "batch", 2: "past"},
    )  # dimensions that may vary
    model.eval()
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    with _quietly():
        _write(out, EMBEDDING, model.get_input_embeddings(), ids, ["inputs_embeds"], (rows,))
        _write(out, VISION, _Vision(model), pixels, ["image_features"], ({0: "tiles"},))
        present = [f"present.{kind}" for kind in kinds]
        _write(out, TEXT, _Text(model), block | past, ["logits", *present], (rows, whole, rows, (earlier,) * len(past)))
        for name in (VISION, TEXT):
            _quantize(out / FOLDER / f"{name}.onnx", out / FOLDER / f"{name}{QUANTIZED}.onnx")
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)


@torch.inference_mode()
def _write(
    out: Path,
    name: str,
    module: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: list[str],
    dynamic: tuple[Any, ...],
) -> None:
    torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        out / FOLDER / f"{name}.onnx",
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes=dynamic,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )


def _quantize(source: Path, target: Path) -> None:
    quantization = _need("onnxruntime.quantization")
    quantization.quantize_dynamic(
        source, target, ["MatMul"], per_channel=True, weight_type=quantization.QuantType.QInt8
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporter and quantizer warn of what does not matter to a caller: deprecated names within torch, an optional step not taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"ONNX needs {error.name}, which is not installed here: pip install 'foodextract[onnx]', or -e '.[onnx]'"
        ) from error
