"""What the profile `hub` finds on the Hub, in small: a base with SmolVLM2's files and token ids, and the original's
dirty data set.
"""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from foodextract.data.scenes import draw_scenes
from foodextract.models.loading import TINY_BASE

VOCABULARY = 49_280
SPECIAL = {49152: "<global-img>", 49189: "<fake_token_around_image>", 49190: "<image>", 49279: "<end_of_utterance>"}
SPECIAL |= {49153 + 6 * row + column: f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)}


def save_base(folder: Path) -> None:
    """SmolVLM2-500M-Video-Instruct as its repository has it: the files, ids, image budget of 17 tiles and bf16; the
    weights are tiny.
    """
    folder.mkdir(parents=True)
    _save_tokenizer(folder)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 512,
        "patch_size": 16,
    }
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY, "rope_theta": 100000,
        "bos_token_id": 1, "eos_token_id": 49279,
        "pad_token_id": 2,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        scale_factor=4,
        image_token_id=49190,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmolVLMForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 49279
    model.save_pretrained(folder)
    images = {
        "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor", "do_convert_rgb": True,
        "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 1, "max_image_size": {"longest_edge": 512}, "rescale_factor": 1 / 255, "size": {"longest_edge": 2048},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
    }  # fmt: skip
    template = (TINY_BASE / "chat_template.jinja").read_text()
    for name, content in {
        "preprocessor_config.json": images,
        "processor_config.json": {"image_seq_len": 64, "processor_class": "SmolVLMProcessor"},
        "chat_template.json": {"chat_template": template},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")


def _save_tokenizer(folder: Path) -> None:
    """The words of the tiny base, under the ids of SmolVLM2's special tokens; ids that have no word get one that nobody
    writes.
    """
    tiny = json.loads((TINY_BASE / "tokenizer.json").read_text())
    words = [word for word in tiny["model"]["vocab"] if not (word.startswith("<") and word.endswith(">"))]
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    filler = [f"⁂{number}" for number in range(49_152 - len(first) - len(words))]
    tiny["model"]["vocab"] = {word: number for number, word in enumerate([*first, *words, *filler])}
    tiny["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(tiny))
    added = [
        SPECIAL.get(number, f"<|reserved_special_token_{number - 49191}|>") for number in range(49_152, VOCABULARY)
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*first, *added]])
    assert tokenizer.token_to_id("<image>") == 49190
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    more = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "processor_class": "SmolVLMProcessor", "model_max_length": 8192, "add_prefix_space": False,
        "additional_special_tokens": more, "clean_up_tokenization_spaces": False, "truncation_side": "left", **names,
        "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>", "image_token": "<image>",
    }  # fmt: skip
    content = json.loads((folder / "tokenizer.json").read_text())
    for name, what in {
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {**names, "additional_special_tokens": more},
        "added_tokens.json": {token: number for number, token in enumerate(added, 49_152)},
        "vocab.json": content["model"]["vocab"],
    }.items():
        (folder / name).write_text(json.dumps(what))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


# what is wrong with rows of the data set, by their number: which change of its label, or of its image
DIRT: dict[int, Any] = {
    1: lambda label: label | {"is_food": None},
    2: lambda label: label | {"is_food": "false"},
    3: lambda label: label | {"food_items": "soup, bread"},
    4: lambda label: None,
    5: lambda label: label | {"drink_items": None},
    6: lambda label: label | {"image_title": "turkish_coffee"},
}
EXACT_COPY, BROKEN, TURNED, TRANSPARENT = 8, 9, 10, 11


def rows_of_the_original(count: int = 48) -> list[dict[str, Any]]:
    """Rows with the original's columns: labels as JSON or as Python reprs, some of them dirty, and images as they come."""
    rows = []
    for number, scene in enumerate(draw_scenes(11, "train", count)):
        label = scene.record.model_dump()
        if number in DIRT:
            food = {"is_food": 1, "image_title": "soup", "food_items": ["soup"], "drink_items": []}
            label = DIRT[number](food)
        text = None if label is None else json.dumps(label) if number % 2 else str(label)
        rows.append(
            {
                "image": {"bytes": _encoded(number, scene.image), "path": f"{number}.jpg"},
                "image_id": f"{number:08x}",
                "image_name": f"{number}.jpg",
                "food255_class_id": None,
                "uuid": f"{number}",
                "category": "food" if scene.record.is_food else "not_food",
                "image_source": "food270" if scene.record.is_food else "coco",
                "food270_class_name": "soup" if number in DIRT else None,
                "food270_class_id": None,
                "output_json": text,
            }
        )
    rows[EXACT_COPY] |= {"image": rows[EXACT_COPY - 1]["image"], "output_json": rows[EXACT_COPY - 1]["output_json"]}
    rows[BROKEN]["image"] = {"bytes": rows[BROKEN]["image"]["bytes"][:200], "path": "broken.jpg"}
    return rows


def _encoded(number: int, image: Image.Image) -> bytes:
    file = io.BytesIO()
    if number == TRANSPARENT:
        image = image.copy()
        image.putalpha(200)
        image.save(file, "PNG")
    elif number == TURNED:
        exif = Image.Exif()
        exif[0x0112] = 6  # a phone held upright
        image.save(file, "JPEG", quality=90, exif=exif)
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """One file of the data set, as the Hub holds it."""
    features = datasets.Features({name: datasets.Value("string") for name in rows[0]} | {"image": datasets.Image()})
    features |= {name: datasets.Value("int64") for name in ("food255_class_id", "food270_class_id")}
    file = io.BytesIO()
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    return file.getvalue()
