"""Make the photo base: a SmolVLM of 26 M parameters that sees photographs and speaks plain sentences.

Its vision tower is DINOv2-S (`make_tower.py`) and stays as it is. Connector and language model, 5 M parameters from
scratch, learn to talk about the images of a data set (`photos.py`): short questions, answers in sentences, no JSON. The
two stages of fine-tuning then start from this base, as they would from SmolVLM2-500M.

    python experiments/photo_base/make_base.py DATASET TOWER OUT

writes the base to OUT/base. The features of the images, in OUT/prepared-*, take most of the time; stage 1 of
`foodextract train DATASET --base OUT/base --out OUT` reads the same file. Rerun to resume.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import typer
from jinja2 import Template
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    get_cosine_schedule_with_warmup,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, get_image_prompt_string

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_base"))
from make_tiny_base import PICTURE_TOKENS, SPECIAL, SYSTEMS, answer_labels, scribble, series
from make_tower import MEAN, SIZE, STD, VISION_CONFIG

from foodextract import prompts
from foodextract.data.dataset import load, record_of
from foodextract.schema import EXHAUSTIVE, FoodRecord
from foodextract.training import cache

SEED = 2024
SHUFFLE = 2  # 16 x 16 patches → 64 image tokens
VOCABULARY, WIDTH, LAYERS = 2000, 256, 5
TOWER_SHARD, REST_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def questions_about(record: FoodRecord, complete: bool, rng: random.Random) -> list[tuple[str, str]]:
    """Two questions about an image, with their answers in a sentence. `complete`: the label lists all there is."""
    items = sorted(record.food_items + record.drink_items)
    edible = [word for word, found in (("food", record.food_items), ("a drink", record.drink_items)) if found]
    shown = f"This picture shows {series(items)}." if items else "This picture shows neither food nor drink."
    yes = f"Yes, there is {series(edible)} in this picture." if edible else ""
    pairs = [
        (
            ["Describe this image.", "What is in this picture?", "What can you see?", "Tell me what the image shows."],
            shown,
        ),
        (
            ["Is there anything to eat or drink?", "Is this a picture of food or drink?"],
            yes or "No, there is neither food nor drink in this picture.",
        ),
    ]
    for kind, plural, found in (("food", "foods", record.food_items), ("drink", "drinks", record.drink_items)):
        asked = [
            f"What {plural} are in the image?",
            f"Which {plural} can you see?",
            f"List the {kind} in this picture.",
        ]
        if found:
            pairs.append((asked, f"The {kind} here is {series(found)}."))
        elif complete:
            pairs.append((asked, f"There is no {kind} in this picture."))
    return [(rng.choice(asked), answer) for asked, answer in rng.sample(pairs, 2)]


def conversation_about(
    record: FoodRecord, complete: bool, rng: random.Random, nonsense: PreTrainedTokenizerFast | None
) -> list[dict[str, Any]]:
    """The questions as a conversation. With a tokenizer for `nonsense`: a meaningless system message, and a text to repeat."""
    pairs = questions_about(record, complete, rng)
    system = rng.choice(SYSTEMS)
    if nonsense:
        text = scribble(nonsense, rng, 24)
        pairs = [pairs[0], (f"{rng.choice(['Repeat', 'Say', 'Copy'])}: {text}", text)]
        system = scribble(nonsense, rng, 160)
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for number, (question, answer) in enumerate(pairs):
        picture = [{"type": "image"}] if number == 0 else []
        turns.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def make_processor(split: datasets.Dataset) -> SmolVLMProcessor:
    """SmolVLM's processor for 224 px images, with a byte-level BPE learned on prompts, sentences and records."""
    rng, chat = random.Random(SEED), Template(DEFAULT_CHAT_TEMPLATE)
    texts = [chat.render(messages=prompts.conversation(), add_generation_prompt=True)] * 500
    for row in split.remove_columns("image"):
        record = record_of(row)
        texts += [text for pair in questions_about(record, True, rng) for text in pair] + [" " + record.to_json()]
    bpe = Tokenizer(models.BPE())
    words = Regex(r"\p{L}+|\d| ?[^\p{L}\d\s]+|\s")  # a space is a token of its own, see make_tiny_base.py
    split_words = pre_tokenizers.Split(words, "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split_words, byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    images = SmolVLMImageProcessor(
        size={"longest_edge": SIZE},
        max_image_size={"longest_edge": SIZE},
        do_image_splitting=False,
        resample=Image.Resampling.BICUBIC,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    tokens = (SIZE // VISION_CONFIG["patch_size"] // SHUFFLE) ** 2
    return SmolVLMProcessor(
        images, tokenizer, SmolVLMVideoProcessor(), image_seq_len=tokens, chat_template=DEFAULT_CHAT_TEMPLATE
    )


def make_model(processor: SmolVLMProcessor, tower: Path) -> SmolVLMForConditionalGeneration:
    """The base before training, with the tower's weights."""
    tokenizer = processor.tokenizer
    text = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 704, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": WIDTH // 4, "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=VISION_CONFIG, scale_factor=SHUFFLE, tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = SmolVLMForConditionalGeneration(config)
    model.model.vision_model.load_state_dict(load_file(tower / "tower.safetensors"))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def talk_batch(
    processor: SmolVLMProcessor, rows: list[tuple[FoodRecord, bool]], rng: random.Random, nonsense: bool
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` (B, S) of one conversation a row."""
    picture = get_image_prompt_string(0, 0, processor.image_seq_len, *PICTURE_TOKENS)
    tokenizer = processor.tokenizer if nonsense else None
    texts = [processor.apply_chat_template(conversation_about(*row, rng, tokenizer)) for row in rows]
    return answer_labels(processor.tokenizer, [text.replace("<image>", picture) for text in texts])


def train(
    model: SmolVLMForConditionalGeneration,
    processor: SmolVLMProcessor,
    rows: list[tuple[FoodRecord, bool]],
    features: torch.Tensor,
    out: Path,
    epochs: float,
    batch: int,
    learning_rate: float,
) -> list[dict[str, float]]:
    """Train connector and language model on conversations; the last state is kept in OUT. Returns the losses."""
    rest = [p for name, p in model.named_parameters() if "vision_model" not in name]
    steps = int(epochs * len(rows)) // batch
    optimizer = torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    order = torch.cat(
        [torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED + e)) for e in range(int(epochs) + 1)]
    )
    state, log, first = out / "base-state.pt", [], 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        log, first = saved["log"], saved["step"]
    model.train()
    if features.dtype is torch.bfloat16:  # for a long training: compiling takes two minutes
        model.set_attn_implementation({"text_config": "eager"})
        model.model.text_model.compile(dynamic=True)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="base", unit="step")
    for step in bar:
        numbers = order[step * batch : (step + 1) * batch]
        rng = random.Random(f"{SEED} {step}")
        talk = talk_batch(processor, [rows[number] for number in numbers.tolist()], rng, nonsense=step % 6 == 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=features.dtype is torch.bfloat16):
            image = model.model.connector(features[numbers, 0])
            loss = model(mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image)}, **talk).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            log.append({"step": step + 1, "loss": loss.item()})
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved |= {"schedule": schedule.state_dict(), "log": log, "step": step + 1}
            torch.save(saved, state.with_suffix(".partial"))
            state.with_suffix(".partial").replace(state)
    return log


def save(model: SmolVLMForConditionalGeneration, processor: SmolVLMProcessor, folder: Path) -> None:
    """Save in bf16 as two shards. The first holds the tower alone: later trainings leave that file as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.init_kwargs["local_files_only"] = False  # True if it was read with HF_HUB_OFFLINE
    processor.save_pretrained(folder)
    tied = {"lm_head.weight"}
    state = {
        name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items() if name not in tied
    }
    shards = {TOWER_SHARD: {}, REST_SHARD: {}}
    for name, value in state.items():
        shards[TOWER_SHARD if name.startswith("model.vision_model") else REST_SHARD][name] = value
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    size = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def main(
    dataset: Annotated[Path, typer.Argument(help="Data set that photos.py wrote.")],
    tower: Annotated[Path, typer.Argument(help="Folder that make_tower.py wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder of the base and of the features.")],
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data set.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1e-3,
    bf16: Annotated[bool, typer.Option(help="bf16 autocast, for a processor with AMX.")] = False,
) -> None:
    """Make the base of the photo model."""
    began = time.monotonic()
    torch.manual_seed(SEED)
    split = load(dataset)["train"]
    processor = make_processor(split)
    model = make_model(processor, tower)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    print(json.dumps(sizes), f"{len(processor.tokenizer)} tokens in the vocabulary", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if bf16 else torch.float32
    path = cache.features_file(cache.home_of(split, processor, out), model, dtype)
    prepared = cache.prepare(split, processor, out, with_pixels=not path.is_file())
    features = cache.vision_features(model, prepared, path, dtype)
    looked = time.monotonic()
    complete = [scope == EXHAUSTIVE for scope in split["label_scope"]]
    rows = list(zip(map(record_of, split.remove_columns("image")), complete, strict=True))
    log = train(model, processor, rows, features, out, epochs, batch, learning_rate)
    save(model, processor, out / "base")
    seconds = {"features": looked - began, "training": time.monotonic() - looked}
    report = {"rows": len(rows), "epochs": epochs, "seconds_of_this_run": seconds, "parameters": sizes, "log": log}
    (out / "base.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
