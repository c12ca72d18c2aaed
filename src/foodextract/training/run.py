"""Two stages of full fine-tuning with TRL: what each one freezes, how it runs, and proof of which weights it moved."""

import gc
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, set_seed
from trl import SFTConfig, SFTTrainer

from foodextract.data.dataset import as_conversations, record_of, scopes_of
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import write_results
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import FINISHED, ModelError, Precision
from foodextract.models.weights import checksum, snapshot, whole_state
from foodextract.training.cache import (
    PIXELS,
    Prepared,
    are_stored,
    augmentation,
    features_shape,
    prepare,
    vision_features,
    whole_text,
)
from foodextract.training.checkpoints import (
    CHECKPOINTS,
    RECIPE,
    Keeper,
    check_keep_in,
    differences,
    finished_recipe,
    full_disk_named,
    interrupted_recipe,
    last_checkpoint,
)
from foodextract.training.collate import Collator
from foodextract.training.config import Stage, is_sharded, precision_of, training_config
from foodextract.training.freezing import Moved, freeze, weights_moved
from foodextract.training.lora import attach, untie
from foodextract.training.throughput import memory_kept, performance_rows, reset_peak_memory
from foodextract.training.trainer import PreparedTrainer, Progress

PERFORMANCE = "performance.json"  # how fast a stage went, in the format of results/, beside its weights


def train_stage(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    split: datasets.Dataset,
    out: str | Path,
    *,
    seed: int = 42,
    max_steps: int = -1,
    report_to: str = "none",
    retrain: bool = False,
    keep_in: str | Path | None = None,
) -> tuple[list[dict[str, float]], list[Moved]]:
    """Train `model` in place on a split of the data set and save it, with its processor, to `out`/stage.name.

    Every stage starts with a fresh optimizer. A stage that finished here with the same recipe (settings, rows, seed and start) is loaded,
    not trained again, unless `retrain` says so. An interrupted stage resumes from its last checkpoint. `keep_in` is a folder that outlives
    this machine: checkpoints and the finished stage are copied there, and read back where `out` lacks them (`checkpoints.Keeper`). When
    a GPU's memory does not suffice, smaller batches are accumulated to the same effective batch. `report_to` is a tracker of transformers,
    such as "tensorboard" (its files go to `out`/runs).

    The start of a stage is the checksum of the model's weights or, when the model is the outcome of an earlier stage, the recipe of that
    stage: training it again on a GPU need not give the same bits, and must not invalidate the next stage's checkpoint.

    Returns the log (loss, learning rate, gradient norm by step) and the table of moved weights; `seconds_of` says how long it took.
    Raises ModelError when the loss stops being a number, when the disk is full and when not even one image fits; the folder then keeps
    its last whole checkpoint. Raises it before anything is done when the tracker is not installed, the parent folder of `keep_in` does
    not exist, or the model has been through this stage already and should be trained anew.
    """
    began = time.perf_counter()
    if report_to != "none" and not find_spec(report_to):
        raise ModelError(f"nothing can be reported to {report_to!r}: `pip install {report_to}` first, or leave it out")
    check_keep_in(keep_in)
    folder = Path(out) / stage.name
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(
        Path(out) / "runs" / stage.name
    )  # transformers would choose a folder that is removed
    checkpoints = folder / CHECKPOINTS
    keeper = Keeper(folder, Path(keep_in) / stage.name) if keep_in else None
    processes = PartialState()
    freeze(model, stage.freeze)
    start, been_through = _start(model, folder)
    if stage.lora and stage.lora.also:
        untie(model)
    before = snapshot(model)
    recipe = json.dumps(
        {**asdict(stage), "start": start, "rows": split._fingerprint, "seed": seed, "max_steps": max_steps}
    )
    if been_through and (retrain or finished_recipe(folder) != recipe):
        raise ModelError(
            f"{stage.name}: the model in memory has been through this stage; load the base again to train it anew"
        )
    with processes.main_process_first():
        if processes.is_main_process:
            _take_up(folder, recipe, keeper, retrain)
    if finished_recipe(folder) == recipe:
        finished = json.loads((folder / FINISHED).read_text())
        if processes.is_main_process:
            print(f"{stage.name}: already trained; loaded from {folder}", flush=True)
            if keeper:
                keeper.keep_finished()
            shutil.rmtree(checkpoints, ignore_errors=True)  # where a kill came after the stage had finished
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())
        model.name_or_path = str(folder)
        return [entry for entry in finished["log"] if "loss" in entry], [Moved(**row) for row in finished["moved"]]
    precision = precision_of(stage, model.device, model.num_parameters())
    reset_peak_memory(model.device)
    progress = Progress(stage.name, stage.learning_rate)
    run = stage
    if stage.fast and model.device.type == "cuda":  # the whole effective batch at once, if it fits
        run = replace(stage, batch_size=stage.batch_size * stage.accumulation, accumulation=1)
    if processes.is_main_process:
        print(f"{stage.name}: {precision.reason}; batches of {run.batch_size} x {run.accumulation}", flush=True)
    while True:
        try:
            with full_disk_named(stage.name, checkpoints):
                set_seed(seed)  # adapters start at random
                trained = attach(model, stage.lora) if stage.lora else model
                config = training_config(run, precision, model.device, checkpoints, seed, max_steps, report_to)
                trainer = _trainer(model, trained, processor, run, split, config, precision)
                trainer.remove_callback(PrinterCallback)
                trainer.add_callback(progress)
                if keeper:
                    trainer.add_callback(keeper)
                prepared_in = time.perf_counter() - began
                resumed = last_checkpoint(checkpoints)
                if resumed and processes.is_main_process:
                    print(f"{stage.name}: resumed from {Path(resumed).name}", flush=True)
                with memory_kept(model.device):
                    trainer.train(resume_from_checkpoint=resumed)
            break
        except torch.OutOfMemoryError as error:
            if run.batch_size == 1:
                raise ModelError(
                    f"{stage.name}: not even one image at a time fits into memory; take fewer tiles"
                ) from error
            if is_sharded():
                raise ModelError(
                    f"{stage.name}: batches of {run.batch_size} do not fit into memory; take a smaller batch_size"
                ) from error
            fewer = 1 if run.batch_size % 2 else run.batch_size // 2
            run = replace(run, batch_size=fewer, accumulation=run.accumulation * run.batch_size // fewer)
            print(f"out of memory: going on with batches of {run.batch_size} x {run.accumulation}")
            if stage.lora:
                trained.unload()
            model.load_state_dict(before, strict=False)
            torch.cuda.empty_cache()
    log = [entry for entry in trainer.state.log_history if {"loss", "eval_loss", "eval_item_f1"} & entry.keys()]
    step = trainer.step_of(model, run.batch_size) if stage.fast else None
    cache = trainer.prepared.home if stage.fast else None
    del trainer
    gc.collect()  # maps of deleted files hold their disk space
    if stage.lora:
        if processes.is_main_process:
            trained.save_pretrained(folder / "adapter")
        trained.merge_and_unload()
    moved = weights_moved(model, before)
    processes.wait_for_everyone()
    state = whole_state(model)
    after = checksum(snapshot(model))
    if processes.is_main_process:
        for used in (*checkpoints.glob("features-*"), *([cache / PIXELS] if cache else [])):
            used.unlink(missing_ok=True)
        with full_disk_named(stage.name, checkpoints):
            model.save_pretrained(folder, state_dict=state)
            processor.save_pretrained(folder)
        finished = {
            **asdict(run),
            "recipe": recipe,
            "weights": after,
            "seconds": prepared_in + (log[-1]["elapsed"] if log else 0),
            "processes": processes.num_processes,
            "precision": precision.reason,
            "log": log,
            "moved": [asdict(m) for m in moved],
        }
        if step and progress.seconds:
            dtype = precision.autocast or precision.weights
            done = progress.images // processes.num_processes, progress.seconds, processes.num_processes
            rows = performance_rows(stage.name, model.config, step, *done, model.device, dtype)
            write_results(folder / PERFORMANCE, rows)
            print("\n".join(f"{row.metric:>20} {row.value:10.3f} {row.unit}" for row in rows))
        with full_disk_named(stage.name, checkpoints):
            unfinished = folder / f"{FINISHED}.partial"
            unfinished.write_text(json.dumps(finished, indent=1))
            unfinished.replace(folder / FINISHED)
        if keeper:
            keeper.keep_finished()
        shutil.rmtree(checkpoints)
    model.name_or_path = str(folder)
    processes.wait_for_everyone()
    return [entry for entry in log if "loss" in entry], moved


def seconds_of(folder: str | Path) -> float:
    """How long the stage took that finished in `folder`: its steps in all runs, and the preparation of the last run."""
    return json.loads((Path(folder) / FINISHED).read_text())["seconds"]


def _start(model: PreTrainedModel, folder: Path) -> tuple[str, bool]:
    """What identifies the weights that a stage starts from (see `train_stage`), and whether they have been through this very stage.

    They have when its cell is run twice in one kernel: the model is then the outcome of the stage that finished in `folder`, or of one
    that followed it, and the start is the one that the stage had.
    """
    now, finished = checksum(snapshot(model)), Path(model.name_or_path) / FINISHED
    found = json.loads(finished.read_text()) if finished.is_file() else {}
    if found.get("weights") != now:
        return now, False
    mine = finished_recipe(folder)
    if mine and _digest(mine) in (_digest(found["recipe"]), json.loads(found["recipe"])["start"]):
        return json.loads(mine)["start"], True
    return _digest(found["recipe"]), False


def _digest(recipe: str) -> str:
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


def _take_up(folder: Path, recipe: str, keeper: Keeper | None, retrain: bool) -> None:
    """Leave in `folder` what this recipe can be resumed from: its finished stage, its checkpoints, or nothing yet."""
    checkpoints = folder / CHECKPOINTS
    if not retrain:
        if recipe in (finished_recipe(folder), interrupted_recipe(folder)) or (keeper and keeper.read_back(recipe)):
            return
        if (checkpoints / RECIPE).is_file() and (
            checkpoints / RECIPE
        ).read_text() == recipe:  # no checkpoint yet, perhaps features
            return
        for place in (folder, *([keeper.kept] if keeper else [])):
            if other := finished_recipe(place) or interrupted_recipe(place):
                changed = differences(recipe, other)
                print(
                    f"{folder.name}: retraining, and replacing {place}: {changed} differ from the run there", flush=True
                )
    elif keeper:
        shutil.rmtree(keeper.kept, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.mkdir(parents=True)
    (checkpoints / RECIPE).write_text(recipe)


def _trainer(
    model: PreTrainedModel,
    trained: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    stage: Stage,
    split: datasets.Dataset,
    config: SFTConfig,
    precision: Precision,
) -> SFTTrainer:
    """The trainer of a stage, with its rows prepared next to the folder of `config`'s checkpoints.

    `trained` is the model, or the adapters around it.
    """
    if stage.validation and is_sharded():
        raise ModelError(
            f"{stage.name}: validation generates answers, which takes whole weights: leave it out, or use configs/ddp.yaml"
        )
    held_out = validation_rows(split, stage.validation)
    if not stage.fast:
        if stage.augment or stage.against_repeats or stage.whole_text or stage.target != "json":
            raise ModelError(
                f"{stage.name}: augment, against_repeats, whole_text and target belong to the fast path: leave fast=False out"
            )
        seen = sorted(set(range(len(split))) - set(held_out))
        return SFTTrainer(
            trained,
            config,
            train_dataset=as_conversations(split.select(seen)),
            eval_dataset=as_conversations(split.select(held_out)) if held_out else None,
            processing_class=processor,
            data_collator=Collator(processor),
        )
    unseen = split.select(held_out)
    labels, scopes = [record_of(row) for row in unseen.remove_columns("image")], scopes_of(unseen)

    def score() -> float:
        answers = evaluate.predict(
            Extractor(model, processor).generate_texts, unseen["image"], stage.batch_size, "validation"
        )
        return evaluate.validation_f1(labels, answers, scopes)

    prepared = _prepared(model, processor, stage, split, Path(config.output_dir), precision)
    return PreparedTrainer(
        trained,
        config,
        prepared=prepared,
        held_out=held_out,
        score=score if held_out else None,
        against_repeats=stage.against_repeats,
        processing_class=processor,
    )


def validation_rows(split: datasets.Dataset, count: int) -> list[int]:
    """About `count` rows by whole groups of look-alikes, the same whatever the order of the rows."""
    groups: dict[str, list[int]] = {}
    for number, group in enumerate(split["group"] if count else ()):
        groups.setdefault(group, []).append(number)
    chosen: list[int] = []
    for group in sorted(groups, key=lambda group: hashlib.sha256(f"validation {group}".encode()).digest()):
        if len(chosen) >= count:
            break
        chosen += groups[group]
    return sorted(chosen)


def _prepared(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    split: datasets.Dataset,
    checkpoints: Path,
    precision: Precision,
) -> Prepared:
    """The rows, once for all stages.

    The features of a frozen vision tower replace the pixels, unless the disk has no room for both at once.
    """
    dtype = precision.autocast or precision.weights
    features_file = checkpoints / f"features-{dtype}.bin".replace("torch.", "")  # another GPU may take another type
    stored = are_stored(features_file)
    with PartialState().main_process_first():
        prepared = prepare(split, processor, checkpoints.parents[1], stage.target, with_pixels=not stored)
    if is_sharded():
        prepared = prepared.unshared()
    if stage.whole_text:
        prepared = whole_text(prepared)
    if stage.augment:
        if prepared.shape[0] > 1:
            raise ModelError(
                "images of several tiles cannot be augmented, since their tiles must fit together: take 1 tile"
            )
        return replace(prepared, augment=augmentation(prepared.shape[1]))
    if is_sharded() or any(parameter.requires_grad for parameter in model.model.vision_model.parameters()):
        return prepared
    needed = features_shape(model, prepared).numel() * dtype.itemsize
    if not stored and needed > 0.5 * shutil.disk_usage(checkpoints).free:
        print(
            f"what the frozen vision tower sees would take {needed / 1e9:.0f} GB, more than half of the free disk: not stored"
        )
        return prepared
    with PartialState().main_process_first():
        features = vision_features(model, prepared, processor.image_processor, features_file, dtype)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        (prepared.home / PIXELS).unlink(
            missing_ok=True
        )  # a frozen tower looks only once; `prepare` writes them again for stage 2
    return replace(prepared, pixels=None, features=features)
