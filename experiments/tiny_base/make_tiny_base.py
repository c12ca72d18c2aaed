"""Make the tiny base: a real SmolVLM of 2.9 M parameters that sees OpenMoji drawings and speaks plain sentences.

SmolVLM2-500M is a base because it can see and talk before anybody asks it for JSON. This script gives the offline
profile a base of the same kind, from nothing, on a CPU, in two steps:

1. see: the vision tower alone, with dense supervision, on crowds. Which object covers each patch is known exactly, and
a tower this
   small learns next to nothing from the language loss alone.
2. talk: everything else, on short conversations about scenes that the tower has not seen, so that the language model
learns from sight
   as good as it will have later. The connector is told what each image token shows, in the language model's own words.
   No braces, no keys, no JSON anywhere.

Three habits that a base has from reading the web must be given to this one on purpose, or fine-tuning spends its steps
on them: every token has been written now and then (nonsense to repeat; a token that never was has sunk by 14 nats), a
long text before the picture does not blind it (nonsense as system message), and a word is the same word behind a space
and behind a quotation mark (a tokenizer that gives spaces tokens of their own).

    python experiments/tiny_base/make_tiny_base.py            # about 70 minutes on 2 cores; writes the model and results/tiny_base.json

Deterministic for a given machine: fixed seeds, fixed data, one process.
"""

import random
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from jinja2 import Template
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
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

from foodextract import prompts
from foodextract.data.scenes import (
    DRINKS,
    FOODS,
    OTHERS,
    SIZE,
    Placed,
    Scene,
    background,
    draw_scene,
    others_of,
    plan_scene,
    record_of,
    turned,
)
from foodextract.evaluation import evaluate
from foodextract.evaluation.metrics import Formula, f1
from foodextract.evaluation.results import Row, write_results
from foodextract.evaluation.scoring import match_exact

ROOT = Path(__file__).resolve().parents[2]
SEED = 2024  # another one than any data set's, so that the base has seen none of the scenes it is tuned or tested on
IMAGE, PATCH, SHUFFLE, WIDTH = 192, 16, 2, 160
GRID = IMAGE // PATCH  # 12 x 12 patches; pixel shuffle 2 makes them 36 image tokens
CLASSES = {
    name: number for number, name in enumerate([*FOODS, *DRINKS, *dict.fromkeys(OTHERS.values())], 1)
}  # 0 is background

# SmolVLM2's special tokens, by name; the chat template comes with transformers.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>"]
SPECIAL += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
SPECIAL += ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
PICTURE_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>")
AUTOCAST = torch.autocast("cpu", torch.bfloat16)  # a processor with AMX is twice as fast in bf16; weights stay fp32
SYSTEMS = [None, None, "You are a helpful assistant.", "You look at pictures and answer questions about them."]


# --- talking about scenes


def series(things: list[str]) -> str:
    return f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]


def questions_about(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Every question the base learns to answer, in random order, with its answer in a plain sentence; now and then
    names are quoted.
    """
    mark = rng.choice(["", "", "", '"'])
    wish = " Use quotation marks." if mark else ""
    foods, drinks = (
        [f"{mark}{name}{mark}" for name in names] for names in (scene.record.food_items, scene.record.drink_items)
    )
    kinds = sorted({placed.kind for placed in scene.objects if placed.name is None})
    others = [f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds]
    seen = sorted(foods + drinks) + others
    edible = [word for word, items in (("food", foods), ("a drink", drinks)) if items]
    pairs = [
        (
            ["Describe this image.", "What is in this picture?", "What can you see?", "Tell me what the image shows."],
            f"This picture shows {series(seen)}." if seen else "This picture shows nothing at all.",
        ),
        (
            ["What foods are in the image?", "Which foods can you see?", "List the food in this picture."],
            f"The food here is {series(foods)}." if foods else "There is no food in this picture.",
        ),
        (
            ["What drinks are in the image?", "Which drinks can you see?", "List the drinks in this picture."],
            f"The drink here is {series(drinks)}." if drinks else "There is no drink in this picture.",
        ),
        (
            ["Is there anything to eat or drink?", "Is this a picture of food or drink?"],
            f"Yes, there is {series(edible)} in this picture."
            if edible
            else "No, there is neither food nor drink in this picture.",
        ),
    ]
    rng.shuffle(pairs)
    return [(rng.choice(asked) + wish, answer) for asked, answer in pairs]


def scribble(tokenizer: PreTrainedTokenizerFast, rng: random.Random, longest: int) -> str:
    """4 to `longest` tokens of the vocabulary in any order, every other one a sign or a digit: nonsense, and never
    JSON.
    """
    words = [token for token in sorted(tokenizer.get_vocab()) if token not in SPECIAL]
    signs = [
        token for token in words if not any(letter.isalpha() for letter in tokenizer.convert_tokens_to_string([token]))
    ]
    chosen = [rng.choice(signs if rng.random() < 0.5 else words) for _ in range(rng.randint(4, longest))]
    return tokenizer.convert_tokens_to_string(chosen).strip().replace("\ufffd", "")


def conversation_about(
    scene: Scene, rng: random.Random, tokenizer: PreTrainedTokenizerFast | None = None
) -> list[dict]:
    """Four questions and answers, the picture in the first user turn, sometimes behind a system message.

    With a `tokenizer`, there is nonsense in it: as a long system message, and as something to repeat between two
    questions.
    """
    turns = []
    pairs = questions_about(scene, rng)
    system = rng.choice(SYSTEMS)
    if tokenizer:
        nonsense = scribble(tokenizer, rng, 24)
        pairs = [pairs[0], (f"{rng.choice(['Repeat', 'Say', 'Copy'])}: {nonsense}", nonsense), pairs[1]]
        system = scribble(tokenizer, rng, 160)
    if system:
        turns.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for number, (question, answer) in enumerate(pairs):
        picture = [{"type": "image"}] if number == 0 else []
        turns.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


# --- model and processor


@cache
def make_image_processor() -> SmolVLMImageProcessor:
    return SmolVLMImageProcessor(
        size={"longest_edge": IMAGE}, max_image_size={"longest_edge": IMAGE}, do_image_splitting=False
    )


def make_processor() -> SmolVLMProcessor:
    """SmolVLM's processor around a byte-level BPE small enough for a tiny model: learned on prompts, talk and records."""
    chat = Template(DEFAULT_CHAT_TEMPLATE)
    texts = [chat.render(messages=prompts.conversation(), add_generation_prompt=True)] * 500
    rng = random.Random(SEED)
    for index in range(3000):
        scene = draw_scene(SEED, "train", index)
        texts += [text for pair in questions_about(scene, rng) for text in pair] + [" " + scene.record.to_json()]
    bpe = Tokenizer(models.BPE())
    # A space never belongs to the word behind it: "pizza" is one word, whether it follows a space or a quotation mark.
    words = Regex(r"\p{L}+|\d| ?[^\p{L}\d\s]+|\s")
    pieces = [
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    return SmolVLMProcessor(
        make_image_processor(),
        tokenizer,
        SmolVLMVideoProcessor(),
        image_seq_len=(GRID // SHUFFLE) ** 2,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )


def make_model(processor: SmolVLMProcessor) -> SmolVLMForConditionalGeneration:
    tokenizer = processor.tokenizer
    text = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": WIDTH // 4, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": IMAGE,
        "patch_size": PATCH, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=SHUFFLE, tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = SmolVLMForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


# --- the data


def _patch_classes(scene: Scene) -> np.ndarray:
    """(GRID, GRID) int16: the object that covers most of each patch, if it covers a fifth.

    Non-food objects count as their kind.
    """
    edge = np.linspace(0, scene.owner.shape[0], GRID + 1).round().astype(int)
    classes = np.zeros((GRID, GRID), np.int16)
    covers = np.stack([
        np.add.reduceat(np.add.reduceat(scene.owner == number, edge[:-1], axis=0, dtype=np.int32), edge[:-1], axis=1)
        for number in range(len(scene.objects) + 1)
    ])  # fmt: skip
    patch_area = covers.sum(0)
    for number, placed in enumerate(scene.objects, 1):
        mine = (covers[number] == covers[1:].max(0)) & (covers[number] > 0.2 * patch_area)
        classes[mine] = CLASSES[placed.name or placed.kind]
    return classes


def _recolored(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene with half of its non-food objects in exchanged colors.

    The tower is to learn what is food, not by heart which few hundred drawings are not: drawings it has never seen are
    what it takes for food.
    """
    pixels = np.array(scene.image)
    for number, placed in enumerate(scene.objects, 1):
        if placed.name is None and rng.random() < 0.5:
            mine = scene.owner == number
            pixels[mine] = pixels[mine][:, rng.permutation(3)]
    return Image.fromarray(pixels)


def draw_crowd(index: int) -> Scene:
    """Crowd number `index`: 2 to 9 objects in one picture, over each other as it comes, half of them neither food nor
    drink.

    Half of the non-food objects stand on their heads or on a side, in exchanged colors or joined from two halves, for
    the same reason.
    """
    rng = np.random.default_rng([SEED, zlib.crc32(b"crowd"), index])
    image, owner, objects = background(rng), np.zeros((SIZE, SIZE), np.uint8), []
    for number in range(1, rng.integers(3, 11)):
        kind, names = [("food", FOODS), ("drink", DRINKS), ("other", OTHERS)][rng.choice(3, p=[0.4, 0.1, 0.5])]
        if kind == "other":
            codes = [str(code) for code in rng.choice(others_of("train"), 2)]
            placed, second = (Placed(code, OTHERS[code], None) for code in codes)
        else:
            name = str(rng.choice(list(names)))
            placed = Placed(names[name], kind, name)
        drawing = turned(rng, placed, rng.choice([0.42, 0.55]))
        if kind == "other" and rng.random() < 0.5:
            if rng.random() < 0.5:
                half = drawing.width // 2
                drawing.paste(turned(rng, second, 0.55).resize(drawing.size).crop((half, 0, *drawing.size)), (half, 0))
            drawing = drawing.rotate(90 * rng.integers(4), expand=True)
            bands = drawing.split()
            drawing = Image.merge("RGBA", [*(bands[band] for band in rng.permutation(3)), bands[3]])
        left, top = (int(rng.integers(0, SIZE - edge + 1)) for edge in drawing.size)
        image.paste(drawing, (left, top), drawing)
        owner[top : top + drawing.height, left : left + drawing.width][np.asarray(drawing)[..., 3] > 127] = number
        objects.append(placed)
    return Scene(image, record_of([]), tuple(objects), owner)


def _draw(task: tuple[str, list[int]]) -> tuple[np.ndarray, list[np.ndarray], list[Scene]]:
    torch.set_num_threads(1)
    split, indices = task
    scenes = [draw_crowd(index) if split == "crowd" else draw_scene(SEED, split, index) for index in indices]
    rng = np.random.default_rng([SEED, indices[0]])
    images = [_recolored(scene, rng) if split == "train" else scene.image for scene in scenes]
    resize_only = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    pixels = make_image_processor()(images, **resize_only).pixel_values
    classes = [_patch_classes(scene) for scene in scenes]
    bare = [Scene(None, scene.record, scene.objects, None) for scene in scenes]
    return pixels.flatten(0, 1).round().to(torch.uint8).numpy(), classes, bare


def draw_pool(split: str, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    """Scenes of a split, or crowds, as uint8 pixels (N, 3, IMAGE, IMAGE), patch classes (N, GRID, GRID) and labels."""
    tasks = [(split, list(indices[start : start + 50])) for start in range(0, len(indices), 50)]
    with ProcessPoolExecutor(2) as pool:
        parts = list(tqdm(pool.map(_draw, tasks), total=len(tasks), desc=f"drawing {split} scenes", unit="× 50"))
    pixels = torch.from_numpy(np.concatenate([part[0] for part in parts]))
    classes = torch.from_numpy(np.stack([grid for part in parts for grid in part[1]])).long()
    return pixels, classes, [scene for part in parts for scene in part[2]]


def _normalized(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1  # mean and standard deviation 0.5, as SmolVLM's processor does


def _schedule(
    parameters: list[torch.nn.Parameter], rate: float, steps: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, int(steps) // 20, int(steps))


# --- training


class PatchHead(torch.nn.Linear):
    """The dense supervision: every patch against the object that covers it. Thrown away when the base is finished."""

    def __init__(self) -> None:
        super().__init__(WIDTH, len(CLASSES) + 1)

    def loss(self, seen: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Cross-entropy of (B, GRID * GRID, WIDTH) patches, and the share of covered patches that are right.

        Background, two thirds of all patches, weighs 0.2.
        """
        weight = torch.ones(len(CLASSES) + 1)
        weight[0] = 0.2
        logits, wanted = self(seen).float(), classes.flatten(1)
        right = (logits.argmax(-1) == wanted)[wanted > 0].float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight=weight), right


def _step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def _batches(rows: int, epochs: float, batch: int, title: str):
    """The rows of every step, and which of them to mirror, behind a progress bar."""
    order = torch.cat([torch.randperm(rows) for _ in range(int(epochs) + 1)])
    bar = tqdm(range(int(epochs * rows) // batch), desc=title, unit="step")
    for step in bar:
        yield bar, order[step * batch : (step + 1) * batch], torch.rand(batch) < 0.5


def learn_to_see(
    model: SmolVLMForConditionalGeneration,
    head: PatchHead,
    pixels: torch.Tensor,
    classes: torch.Tensor,
    epochs: float,
    batch: int = 16,
) -> None:
    """Step 1: the vision tower alone, on what covers each patch.

    The batches are small: in equal time, 16 pictures a step learned far more than 64.
    """
    vision = model.model.vision_model
    optimizer, schedule = _schedule([*vision.parameters(), *head.parameters()], 1e-3, epochs * len(pixels) / batch)
    for bar, rows, flip in _batches(len(pixels), epochs, batch, "step 1: see"):
        x, y = _normalized(pixels[rows]), classes[rows]
        x[flip], y[flip] = x[flip].flip(-1), y[flip].flip(-1)
        with AUTOCAST:
            loss, right = head.loss(vision(x).last_hidden_state, y)
        _step(loss, optimizer, schedule)
        if bar.n % 200 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", patches_right=f"{right:.3f}")


@torch.no_grad()
def _seen(model: SmolVLMForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """(2, N, GRID * GRID, WIDTH) bf16: what the finished tower makes of every picture, and of its mirror image."""
    seen = torch.empty(2, len(pixels), GRID**2, WIDTH, dtype=torch.bfloat16)
    for rows in tqdm(torch.arange(len(pixels)).split(50), desc="looking", unit="× 50"):
        x = _normalized(pixels[rows])
        with AUTOCAST:
            for mirrored in (0, 1):
                seen[mirrored, rows] = model.model.vision_model(
                    x.flip(-1) if mirrored else x
                ).last_hidden_state.bfloat16()
    return seen


def _token_classes(classes: torch.Tensor) -> torch.Tensor:
    """(N, image tokens): of the patches that pixel shuffle puts into one token, the most frequent object, else 0."""
    side = GRID // SHUFFLE
    patches = classes.view(-1, side, SHUFFLE, side, SHUFFLE).transpose(2, 3).flatten(3).flatten(1, 2)
    votes = (patches[..., None] == patches[..., None, :]).sum(-1) * (patches > 0)
    return patches.gather(-1, votes.argmax(-1, keepdim=True))[..., 0]


def _words(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(classes, vocabulary): the probability of each token in the name of a class."""
    words = torch.zeros(len(CLASSES) + 1, len(tokenizer))
    for name, number in CLASSES.items():
        tokens = [token for word in name.split() for token in tokenizer(word, add_special_tokens=False).input_ids]
        words[number, tokens] = 1 / len(tokens)
    return words


def _talk_batch(
    processor: SmolVLMProcessor, scenes: list[Scene], rng: random.Random, nonsense: bool
) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels of one conversation a scene: the labels are the assistant's words and EOS, nothing
    else.
    """
    picture = get_image_prompt_string(0, 0, processor.image_seq_len, *PICTURE_TOKENS)
    said = [conversation_about(scene, rng, processor.tokenizer if nonsense else None) for scene in scenes]
    texts = [processor.apply_chat_template(turns).replace("<image>", picture) for turns in said]
    return answer_labels(processor.tokenizer, texts)


def answer_labels(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` of conversations: labels are the assistant's words and EOS, nothing else."""
    batch = tokenizer(texts, padding=True, padding_side="right", return_offsets_mapping=True, return_tensors="pt")
    labels = torch.full_like(batch.input_ids, -100)
    for row, (text, offsets) in enumerate(zip(texts, batch.pop("offset_mapping"), strict=True)):
        for turn in re.finditer(r"(?<=Assistant:).*?<end_of_utterance>", text, re.DOTALL):
            mine = (offsets[:, 0] >= turn.start()) & (offsets[:, 1] <= turn.end()) & (offsets[:, 1] > 0)
            labels[row, mine] = batch.input_ids[row, mine]
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def learn_to_talk(
    model: SmolVLMForConditionalGeneration,
    processor: SmolVLMProcessor,
    pixels: torch.Tensor,
    classes: torch.Tensor,
    scenes: list[Scene],
    epochs: float,
    batch: int = 16,
) -> None:
    """Step 2: connector and language model, by the language loss, with nonsense in every fourth batch; the tower stays
    as it is.

    The second loss asks the connector to turn an image token into something like the embedding of the words for what it
    shows. Lists of three or four things are then read off, where the language loss alone takes several times the steps
    to find out how.
    """
    rng = random.Random(SEED)
    seen, shown, words = _seen(model, pixels), _token_classes(classes), _words(processor.tokenizer)
    mirrored = _token_classes(classes.flip(-1))
    rest = [p for name, p in model.named_parameters() if "vision_model" not in name]
    optimizer, schedule = _schedule(rest, 1.5e-3, epochs * len(pixels) / batch)
    for bar, rows, flip in _batches(len(pixels), epochs, batch, "step 2: talk"):
        y = torch.where(flip[:, None], mirrored[rows], shown[rows])
        with AUTOCAST:
            image = model.model.connector(seen[flip.long(), rows].float())
            talk = _talk_batch(processor, [scenes[row] for row in rows], rng, nonsense=bar.n % 4 == 3)
            said = model(mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image)}, **talk).loss
            named = F.cross_entropy((image[y > 0] @ model.get_input_embeddings().weight.T).float(), words[y[y > 0]])
        _step(said + 0.5 * named, optimizer, schedule)
        if bar.n % 200 == 0:
            bar.set_postfix(loss=f"{said.item():.3f}", words=f"{named.item():.3f}")


# --- measuring


@torch.inference_mode()
def reply(
    model: SmolVLMForConditionalGeneration, processor: SmolVLMProcessor, pixels: torch.Tensor, turns: list[dict]
) -> list[str]:
    """What the model says about each picture when the conversation so far is `turns`."""
    picture = get_image_prompt_string(0, 0, processor.image_seq_len, *PICTURE_TOKENS)
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True).replace("<image>", picture)
    replies = []
    for part in tqdm(pixels.split(50), desc="asking", unit="× 50"):
        inputs = processor.tokenizer([prompt] * len(part), return_tensors="pt")
        written = model.generate(**inputs, pixel_values=_normalized(part)[:, None], do_sample=False, max_new_tokens=64)
        replies += processor.tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in replies]


def named_in(sentence: str) -> set[str]:
    """The items of an answer such as "The food here is beans, corn and pie." """
    listed = re.fullmatch(r"The (?:food|drink) here is (.*)\.", sentence)
    return set(re.split(r", | and ", listed[1])) if listed else set()


def measure(
    model: SmolVLMForConditionalGeneration, processor: SmolVLMProcessor, scenes: int, command: str
) -> list[Row]:
    """How well the base sees and talks, and that it does not speak JSON: on scenes and non-food objects it has never
    seen.
    """
    model.eval()
    pixels, _, drawn = draw_pool("test", range(scenes))
    records = [scene.record for scene in drawn]

    def asked(question: str) -> list[str]:
        return reply(
            model,
            processor,
            pixels,
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        )

    def compared(name: str, question: str, field: str) -> evaluate.Metric:
        pairs = zip(records, asked(question), strict=True)
        counts = [match_exact(getattr(record, field), named_in(text)) for record, text in pairs]
        table = evaluate.ScoreTable([{"images": 1, **vars(count)} for count in counts])
        return table.metric(name, Formula(f1, ("found", "invented", "missed")))

    yes = [text.startswith("Yes") for text in asked("Is there anything to eat or drink?")]
    extraction = reply(model, processor, pixels, prompts.conversation())
    metrics = [
        evaluate.rate("is_food_accuracy", [said == bool(r.is_food) for said, r in zip(yes, records, strict=True)]),
        compared("food_f1_micro", "What foods are in the image?", "food_items"),
        compared("drink_f1_micro", "What drinks are in the image?", "drink_items"),
        *(m for m in evaluate.score(records, extraction) if m.name in ("strict_json_rate", "schema_valid_rate")),
    ]
    return evaluate.to_rows("tiny_base", "base", metrics, command)


def main(
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = ROOT
    / "src/foodextract/models/bundled/tiny-base",
    work: Annotated[Path, typer.Option(help="Where step 1 keeps its result, which a second run takes up.")] = ROOT
    / "outputs/tiny-base",
    crowds: Annotated[int, typer.Option(help="Crowds to draw for step 1.")] = 40_000,
    see_epochs: Annotated[float, typer.Option(help="Passes over them.")] = 4,
    scenes: Annotated[int, typer.Option(help="Training scenes to draw for step 2.")] = 30_000,
    held_out: Annotated[
        int, typer.Option(help="Scenes to measure on, drawn with non-food objects that training never shows.")
    ] = 1000,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results/tiny_base.json",
    talk_epochs: Annotated[float, typer.Option(help="Passes over them in step 2.")] = 2,
) -> None:
    """Make the tiny base and measure it on scenes it has not seen."""
    torch.manual_seed(SEED)
    processor = make_processor()
    model = make_model(processor)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens in the vocabulary"
    )
    head = PatchHead()
    model.set_attn_implementation("eager")  # the fused kernel's backward is five times slower in bf16 on a CPU
    parts = torch.nn.ModuleDict({"vision": model.model.vision_model, "head": head})
    work.mkdir(parents=True, exist_ok=True)
    if (seen := work / "step1.safetensors").exists():
        print(f"step 1: taking up {seen}")
        parts.load_state_dict(load_file(seen))
    else:
        learn_to_see(model, head, *draw_pool("crowd", range(crowds))[:2], see_epochs)
        save_file(parts.state_dict(), seen)
    torch.manual_seed(SEED + 2)
    # A single object is soon learned: two thirds of the scenes that have no more are passed over.
    indices = (index for index in count() if index % 3 == 0 or len(plan_scene(SEED, "train", index)[0]) > 1)
    learn_to_talk(model, processor, *draw_pool("train", list(islice(indices, scenes))), talk_epochs)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    rows = measure(model, processor, held_out, command="make tiny-base")
    write_results(results, rows)
    for row in rows:
        print(f"{row.metric:>20} {row.value:.3f} ({row.low:.3f} to {row.high:.3f}), n = {row.n}")


if __name__ == "__main__":
    typer.run(main)
