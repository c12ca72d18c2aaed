"""Model and dataset cards (README.md on the Hub), rendered from `templates/` and measured figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from foodextract import prompts
from foodextract.evaluation.provenance import AND, Provenance, base_of, is_hub_id, name_of
from foodextract.evaluation.results import Row
from foodextract.models.loading import most_tiles
from foodextract.names import CODE
from foodextract.reporting.tables import NAMES, markdown_table, metric_table

TEMPLATES = Path(__file__).parent / "templates"
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
LICENSES = {"CC BY-SA 4.0 (OpenMoji)": "cc-by-sa-4.0", "CC0": "cc0-1.0"}  # the Hub's identifiers
FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
UNNAMED = "owner/name"  # stands for the Hub id in a dataset card until the dataset is published
OLDEST_DATASETS = "4.0.0"  # the release that brought the feature type `List`, which `samples.FEATURES` has
RECIPE = (  # a stage's settings in the model card
    "freeze", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "warmup_steps", "lr_scheduler_type", "unlikelihood_weight",
)  # fmt: skip


def describe_budget(processor: Mapping[str, Any]) -> str:
    """Say what a processor_config.json makes of an image. Raises KeyError or TypeError where it is not SmolVLM's."""
    size = processor["image_processor"]
    tile = size["max_image_size"]["longest_edge"]
    most = most_tiles(size["size"]["longest_edge"], tile)
    return f"{f'up to {most} tiles' if size['do_image_splitting'] else 'one tile'} of {tile} x {tile} pixels"


def stored_as(counts: Mapping[str, int]) -> str:
    """Name the number formats of a model's weights, given parameter counts by safetensors format."""
    return " and ".join(FORMATS.get(name, name.lower()) for name in counts)


def model_card(provenance: Provenance, budget: str, repo_id: str, counts: Mapping[str, int]) -> ModelCard:
    """Render the README.md of a tuned model; its front matter has the figures as `model-index`.

    `budget` describes its image budget, `counts` holds its parameters by safetensors format.
    """
    datasets = [name_of(part) for part in provenance.dataset.split(AND)]
    stages, split = provenance.stages, provenance.held_out
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=AND.join(datasets),
            dataset_name=AND.join(datasets),
            dataset_split=split if split == "test" else None,  # a split that the dataset has on the Hub
            metric_type=row.metric,
            metric_name=_metric_name(row),
            metric_value=row.value,
        )
        for row in provenance.own
        if row.metric in NAMES
    ]
    card_data = ModelCardData(
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        base_model=provenance.base_model if is_hub_id(provenance.base_model) else None,
        datasets=[name for name in datasets if is_hub_id(name)] or None,
        license="apache-2.0",
        language="en",
        metrics=["accuracy", "f1"],
        tags=["food", "drink", "structured-output", "json", "smolvlm"],
        model_name=repo_id.split("/")[-1],
        eval_results=results,
    )
    recipe = [[name, *(_setting(stage.get(name)) for stage in stages)] for name in RECIPE]
    seconds = [
        (row.subject.replace("ask_", "evaluate "), f"{row.value:,.0f}")
        for row in provenance.rows
        if row.metric == "seconds"
    ]
    published = f" (the split `test` of {provenance.dataset})" if split == "test" else f" ({split})" if split else ""
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "model_card.md"),
        model_name=card_data.model_name,
        base=_base_link(provenance),
        data=" and ".join(map(_dataset_link, datasets)),
        code=CODE,
        repo_id=repo_id,
        system=prompts.SYSTEM,
        user=prompts.USER,
        system_repr=repr(prompts.SYSTEM),
        user_repr=repr(prompts.USER),
        budget=budget,
        metrics=metric_table(provenance.scored),
        held_out=published,
        weights=provenance.weights,
        recipe=markdown_table(["", *(stage["name"] for stage in stages)], recipe),
        formats=stored_as(counts),
        seconds=markdown_table(["step", "seconds"], seconds) if seconds else "Not recorded.",
        run=provenance.rows[0],
    )


def _metric_name(row: Row) -> str:
    low, high = row.interval
    return f"{NAMES[row.metric].replace('`', '')}, 95 % interval {low:.4f} to {high:.4f}, n = {row.n}"


def _base_link(provenance: Provenance) -> str:
    base = provenance.base_model
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    return f"the bundled `{base}` of the repository" if base_of(provenance) else f"`{name_of(base)}`"


def _dataset_link(name: str) -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    return "drawn scenes" if name == "scenes" else f"`{name}`"


def _setting(value: object) -> str:
    return ", ".join(f"`{part}`" for part in value) or "nothing" if isinstance(value, list | tuple) else str(value)


def dataset_card(report: Mapping[str, Any], title: str, seed: int, commit: str) -> DatasetCard:
    """Render the README.md of a dataset from the report of `build.build`; its name is UNNAMED until published."""
    sources, licenses, is_food = report["sources"], report["licenses"], report["is_food"]
    names = [name for name, _ in sources]
    files = [{"split": split, "path": f"data/{split}-*"} for split in ("train", "test")]
    card_data = DatasetCardData(
        license="other" if len(licenses) > 1 else LICENSES.get(licenses[0][0], "other"),
        task_categories=["image-text-to-text", "image-classification"],
        language=["en"],
        tags=["food", "drink", "structured-output", "json"],
        annotations_creators=["machine-generated"] if names != ["scenes"] else ["no-annotation"],
        size_categories=[next((size for limit, size in SIZES.items() if report["kept"] < limit), "n>10M")],
        source_datasets=["original" if name == "scenes" else "extended" for name in names[:1]],
        pretty_name=title,
        configs=[{"config_name": "default", "data_files": files}],
    )
    counts = {key: report[key] for key in ("read", "kept", "rejected", "duplicates", "near_duplicate_groups", "test")}
    counts |= {"not_food": report["test"] - is_food["test"]}
    counts |= {"foods": len(report["food_items"]), "drinks": len(report["drink_items"])}
    splits = [
        (name, report[name], f"{is_food[name]:,} ({is_food[name] / report[name]:.1%})") for name in ("train", "test")
    ]
    issues = report["issues"]
    return DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "dataset_card.md"),
        code=CODE,
        commit=commit,
        seed=seed,
        fingerprint=report["fingerprint"][:16],
        repo_id=UNNAMED,
        oldest_datasets=OLDEST_DATASETS,
        n={name: f"{count:,}" for name, count in counts.items()},
        splits=_count_table(("split", "images", "show food or drink"), splits),
        held_out="as published" if report["held_out"] == "test" else report["held_out"],
        foods=_most_frequent(report["food_items"]),
        drinks=_most_frequent(report["drink_items"]),
        sources=_count_table(("source", "images"), sources),
        licenses=_count_table(("license", "images"), licenses),
        issues=_count_table(("label rule: policy", "issues"), issues) if issues else "The label rules found no issue.",
        drawn="scenes" in names,
        collected=names != ["scenes"],
    )


def _count_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return markdown_table(header, [[name, f"{count:,}", *rest] for name, count, *rest in rows])


def _most_frequent(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts[:5]) or "none"
