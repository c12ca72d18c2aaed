"""The README.md that goes with a data set or a model when it leaves this machine, rendered from its own figures."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from foodextract import prompts
from foodextract.evaluation.provenance import AND, Evidence, base_of, is_hub_id, name_of
from foodextract.names import CODE
from foodextract.reporting.tables import NAMES, markdown_table, metric_table

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
UNNAMED = "owner/name"
OLDEST_DATASETS = "4.0.0"  # the release that brought the feature type `List`, which `columns.FEATURES` has
RECIPE = (
    "freeze",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "unlikelihood_weight",
)


def image_budget(processor: dict[str, Any]) -> str:
    """What a processor_config.json makes of an image. Raises KeyError or TypeError for one that is not SmolVLM's."""
    size = processor["image_processor"]
    tile = size["max_image_size"]["longest_edge"]
    tiles = (
        f"up to {(size['size']['longest_edge'] // tile) ** 2 + 1} tiles" if size["do_image_splitting"] else "one tile"
    )
    return f"{tiles} of {tile} x {tile} pixels"


def stored_as(counts: Mapping[str, int]) -> str:
    """The number formats of a model's weights, from the parameter count that safetensors gives by format."""
    return " and ".join({"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(one, one.lower()) for one in counts)


def model_card(evidence: Evidence, budget: str, repo_id: str, counts: Mapping[str, int]) -> ModelCard:
    """The README.md of a tuned model: front matter for the Hub with its figures as `model-index`, then how to use and how far to trust it.

    `budget` is its `image_budget`, `counts` its parameters by number format (`stored_as`).
    """
    name = repo_id.split("/")[-1]
    data_names = [name_of(part) for part in evidence.dataset.split(AND)]
    base = evidence.base_model if is_hub_id(evidence.base_model) else None
    data = ModelCardData(
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        base_model=base,
        datasets=[one for one in data_names if is_hub_id(one)] or None,
        license="apache-2.0",
        language="en",
        metrics=["accuracy", "f1"],
        tags=["food", "drink", "structured-output", "json", "smolvlm"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=AND.join(data_names),
                dataset_name=AND.join(data_names),
                dataset_split="test"
                if evidence.held_out == "test"
                else None,  # only where the data set has this split on the Hub
                metric_type=row.metric,
                metric_name=f"{NAMES[row.metric].replace('`', '')}, 95 % interval {row.low:.4f} to {row.high:.4f}, n = {row.n}",
                metric_value=row.value,
            )
            for row in evidence.own
            if row.metric in NAMES
        ],
    )
    seconds = [row for row in evidence.rows if row.metric == "seconds"]
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"Answers any image with one line of strict JSON: is food or drink visible, a short title, the food items, the drink items. "
        f"Fine-tuned from {_base_link(evidence)} on {' and '.join(map(_dataset_link, data_names))} with [FoodExtract Vision]({CODE}).\n",
        "## Use\n",
        "With the extractor of the repository a grammar keeps every answer on the rails, and each comes with how sure the model was:\n",
        f"```bash\npip install git+{CODE}\nfoodextract extract lunch.jpg --model {repo_id}\n```\n",
        "```python\nfrom foodextract.inference.extractor import Extractor\n\n"
        f'extractor = Extractor.from_pretrained("{repo_id}")\nprint(extractor.extract("lunch.jpg").to_json())\n```\n',
        "With plain transformers, without a grammar:\n",
        "```python\nfrom transformers import pipeline\n\n"
        f'pipe = pipeline("image-text-to-text", model="{repo_id}")\nmessages = [\n'
        f'    {{"role": "system", "content": [{{"type": "text", "text": {prompts.SYSTEM!r}}}]}},\n'
        '    {"role": "user", "content": [{"type": "image", "path": "lunch.jpg"}, '
        f'{{"type": "text", "text": {prompts.USER!r}}}]}},\n]\n'
        'print(pipe(text=messages, max_new_tokens=256, return_full_text=False)[0]["generated_text"])\n```\n',
        "## Prompt\n",
        f"It was trained on these words and no others. System:\n\n```\n{prompts.SYSTEM}\n```\n",
        f"User, behind the image:\n\n```\n{prompts.USER}\n```\n",
        "## Image budget\n",
        f"An image becomes {budget}. The saved processor says so, so serving agrees.\n",
        "## How good it is\n",
        f"{metric_table(evidence.scored)}\n",
        f"Held-out images{_chosen(evidence)}, greedy, no grammar, the same prompt for all; 95 % intervals in brackets. Whatever is not "
        "exactly the canonical JSON scores nothing. The figures are about the weights with checksum "
        f"`{evidence.weights}` and lie beside them in `evaluation.json`.\n",
        "## How it was trained\n",
        markdown_table(
            ("", *(stage["name"] for stage in evidence.stages)),
            [
                (field, *(_value(stage[field]) for stage in evidence.stages))
                for field in RECIPE
                if field in evidence.stages[0]
            ],
        ),
        f"\nThe weights are stored in {stored_as(counts)}, bit for bit those that were measured. "
        "Loaded with `dtype=torch.bfloat16`, fp32 weights take half the memory and answer slightly differently.\n"
        "\nFull fine-tuning with TRL's `SFTTrainer`; the loss is on the answer and its end token only; fp32 master weights.\n",
        "## Hardware and time\n",
        markdown_table(("step", "seconds"), [(row.subject, f"{row.value:,.0f}") for row in seconds])
        if seconds
        else "Not noted.",
        f"\nMeasured on {evidence.rows[0].device}, at commit `{evidence.rows[0].commit}`, by `{evidence.rows[0].command}`.\n",
        "## Limits\n",
        "- The answer is as good as the labels it learned from; it names what they name, in English.\n"
        "- A grammar gives an answer its form, not its truth.\n"
        "- The figures are about images like those it was tested on. It knows nothing of allergens or amounts, "
        "nor whether food is safe to eat.\n",
        "## Citation\n",
        f"```bibtex\n@software{{foodextract_vision,\n  title = {{FoodExtract Vision: {name}}},\n  url = {{{CODE}}},\n"
        f"  version = {{{evidence.rows[0].commit}}}\n}}\n```\n",
    ]
    return ModelCard("\n".join(lines))


def _chosen(evidence: Evidence) -> str:
    if evidence.held_out == "test":
        return f" (the split `test` of {evidence.dataset})"
    return f" ({evidence.held_out})" if evidence.held_out else ""


def _base_link(evidence: Evidence) -> str:
    if is_hub_id(evidence.base_model):
        return f"[{evidence.base_model}](https://huggingface.co/{evidence.base_model})"
    return (
        f"the bundled `{evidence.base_model}` of the repository"
        if base_of(evidence)
        else f"`{name_of(evidence.base_model)}`"
    )


def _dataset_link(name: str) -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    return "drawn scenes" if name == "scenes" else f"`{name}`"


def _value(value: object) -> str:
    return ", ".join(f"`{part}`" for part in value) or "nothing" if isinstance(value, list | tuple) else str(value)


def dataset_card(report: dict[str, Any], title: str, seed: int, commit: str) -> DatasetCard:
    """The README.md of a data set that `dataset.build` made: front matter for the Hub, how to use it, what is in it and what was left out.

    `report` is what `build` returned; every figure comes from it. The data set is called UNNAMED until it is published.
    """
    sources = [name for name, _ in report["sources"]]
    data = DatasetCardData(
        license="other" if len(report["licenses"]) > 1 else _license_id(report["licenses"][0][0]),
        task_categories=["image-text-to-text", "image-classification"],
        language=["en"],
        tags=["food", "drink", "structured-output", "json"],
        annotations_creators=["machine-generated"] if sources != ["scenes"] else ["no-annotation"],
        size_categories=[next((size for limit, size in SIZES if report["kept"] < limit), "n>10M")],
        source_datasets=["original" if source == "scenes" else "extended" for source in sources[:1]],
        pretty_name=title,
        configs=[
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in ("train", "test")]}
        ],
    )
    is_food = report["is_food"]
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        "Images, each with one record: is food or drink visible, a short title, the food items, the drink items. Made with [FoodExtract "
        f"Vision]({CODE}) at commit `{commit}`, seed {seed}; fingerprint `{report['fingerprint'][:16]}`.\n",
        "## Use\n",
        "```python\nfrom datasets import load_dataset\n\n"
        f'row = load_dataset("{UNNAMED}", split="test")[0]\nprint(row["image"].size, row["image_title"], row["food_items"])\n```\n',
        f"It needs `datasets` {OLDEST_DATASETS} or newer, which know the feature type `List` of its columns.\n",
        "## What is in it\n",
        markdown_table(
            ("split", "images", "show food or drink"),
            [
                (split, f"{report[split]:,}", f"{is_food[split]:,} ({is_food[split] / report[split]:.1%})")
                for split in ("train", "test")
            ],
        ),
        f"\nThe test split: {'as published' if report['held_out'] == 'test' else report['held_out']}.\n",
        f"\n{len(report['food_items']):,} different foods, most often {_few(report['food_items'])}; "
        f"{len(report['drink_items']):,} different drinks, most often {_few(report['drink_items'])}.\n",
        "Images that look alike (resized, recompressed, mirrored or slightly cropped) and images that their source puts into one group "
        "are on one side of the split.\n",
        "## Where it comes from\n",
        markdown_table(("source", "images"), [(name, f"{count:,}") for name, count in report["sources"]]),
        "",
        markdown_table(("license", "images"), [(name, f"{count:,}") for name, count in report["licenses"]]),
        "\n## What was left out or mended\n",
        f"{report['read']:,} rows were read, {report['kept']:,} kept and {report['rejected']:,} rejected, {report['duplicates']:,} of them "
        f"as exact duplicates. {report['near_duplicate_groups']:,} groups of near-duplicates were kept together. `rejects.jsonl` gives the "
        "reason for every rejected row, `findings.jsonl` what was found in the labels.\n",
        markdown_table(
            ("label rule: what was done", "findings"), [(name, f"{count:,}") for name, count in report["findings"]]
        )
        if report["findings"]
        else "The label lint found nothing.",
        "\n## Columns\n",
        "`image`, `is_food`, `image_title`, `food_items`, `drink_items`; `name`, `category`, `group`, `source`, `license` and "
        "`pixels_sha256` say where a row comes from, `label_scope` whether its label names everything or only the main item.\n",
        "## Limits\n",
        f"{_labels_by(sources)}\n"
        "- Two names for one thing are two items: what the label rules do not know as twins is left as it was found, in English.\n"
        f"- {report['test']:,} images are held out, {report['test'] - is_food['test']:,} of them without food or drink: figures measured "
        "on so many are no finer than that.\n"
        "- It says nothing of allergens or amounts, nor whether food is safe to eat.\n",
        "## Citation\n",
        f"```bibtex\n@misc{{foodextract_vision_dataset,\n  title = {{{title}}},\n  url = {{{CODE}}},\n  version = {{{commit}}},\n"
        f"  note = {{fingerprint {report['fingerprint'][:16]}}}\n}}\n```\n",
        *(["Please cite its sources, too.\n"] if sources != ["scenes"] else []),
    ]
    return DatasetCard("\n".join(lines))


def _labels_by(sources: list[str]) -> str:
    drawn = "- Drawn scenes are exact, and they are drawings: what is learned from them alone says little about photographs."
    found = "- Labels are as good as their source: the rules mend how things are called, not what somebody overlooked or imagined."
    return "\n".join([drawn] * ("scenes" in sources) + [found] * (sources != ["scenes"]))


def _license_id(license: str) -> str:
    return {"CC BY-SA 4.0 (OpenMoji)": "cc-by-sa-4.0", "CC0": "cc0-1.0"}.get(license, "other")


def _few(counts: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts[:5]) or "none"
