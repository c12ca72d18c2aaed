"""What goes with a data set when it leaves this machine: the card, rendered from the run's own figures."""

from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from foodextract.tables import markdown_table

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


def dataset_card(report: dict[str, Any], title: str, seed: int, commit: str) -> DatasetCard:
    """The README.md of a data set that `dataset.build` made: front matter for the Hub, then what is in it and what was left out.

    `report` is what `build` returned; every figure comes from it.
    """
    sources = [name for name, _ in report["sources"]]
    data = DatasetCardData(
        license="other" if len(report["licences"]) > 1 else _licence_id(report["licences"][0][0]),
        task_categories=["image-text-to-text", "image-classification"],
        language=["en"],
        tags=["food", "drink", "structured-output", "json"],
        annotations_creators=["machine-generated"] if sources != ["scenes"] else ["no-annotation"],
        size_categories=[next((size for limit, size in SIZES if report["kept"] < limit), "n>10M")],
        source_datasets=["original" if source == "scenes" else "extended" for source in sources[:1]],
        pretty_name=title,
        configs=[{"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in ("train", "test")]}],
    )
    is_food = report["is_food"]
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        "Pictures, each with one record: is food or drink visible, a short title, the food items, the drink items. Made with FoodExtract "
        f"Vision at commit `{commit}`, seed {seed}; fingerprint `{report['fingerprint'][:16]}`.\n",
        "## What is in it\n",
        markdown_table(
            ("split", "pictures", "show food or drink"),
            [(split, f"{report[split]:,}", f"{is_food[split]:,} ({is_food[split] / report[split]:.1%})") for split in ("train", "test")],
        ),
        f"\n{len(report['food_items']):,} different foods, most often {_few(report['food_items'])}; "
        f"{len(report['drink_items']):,} different drinks, most often {_few(report['drink_items'])}.\n",
        "Pictures that look alike (resized, recompressed, mirrored or slightly cropped) and pictures that their source puts into one group "
        "are on one side of the split.\n",
        "## Where it comes from\n",
        markdown_table(("source", "pictures"), [(name, f"{count:,}") for name, count in report["sources"]]),
        "",
        markdown_table(("licence", "pictures"), [(name, f"{count:,}") for name, count in report["licences"]]),
        "\n## What was left out or mended\n",
        f"{report['read']:,} rows were read, {report['kept']:,} kept and {report['rejected']:,} rejected, {report['duplicates']:,} of them "
        f"as exact duplicates. {report['near_duplicate_groups']:,} groups of near-duplicates were kept together. `rejects.jsonl` gives the "
        "reason for every rejected row, `findings.jsonl` what was found in the labels.\n",
        markdown_table(("label rule: what was done", "findings"), [(name, f"{count:,}") for name, count in report["findings"]])
        if report["findings"]
        else "The label lint found nothing.",
        "\n## Columns\n",
        "`image`, `is_food`, `image_title`, `food_items`, `drink_items`; `name`, `category`, `group`, `source`, `licence` and "
        "`pixels_sha256` say where a row comes from.\n",
    ]
    return DatasetCard("\n".join(lines))


def _licence_id(licence: str) -> str:
    return {"CC BY-SA 4.0 (OpenMoji)": "cc-by-sa-4.0", "CC0": "cc0-1.0"}.get(licence, "other")


def _few(counts: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts[:5]) or "none"
