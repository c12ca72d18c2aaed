"""One stage of fine-tuning in its folder: what is finished, what can be resumed, and proof of the weights it moved.

    run = StageRun(model, processor, stage, rows["train"], "outputs")
    if not run.finished:
        trainer = run.build_trainer(training_arguments(run))
        trainer.train(resume_from_checkpoint=run.checkpoint)
        run.finish(trainer)
    run.log, run.moved

`train_stage` is these lines; notebook 01 spells out the arguments and the trainer.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTConfig

from foodextract.data.dataset import as_conversations, record_of, scopes_of
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import write_results
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import FINISHED, ModelError
from foodextract.models.weights import checksum, snapshot, whole_state
from foodextract.training.cache import (
    PIXELS,
    PreparedRows,
    are_stored,
    features_shape,
    most_tiles,
    prepare,
    vision_features,
)
from foodextract.training.checkpoints import (
    CHECKPOINTS,
    RECIPE,
    Backup,
    check_keep_in,
    differences,
    finished_recipe,
    full_disk_named,
    interrupted_recipe,
    last_checkpoint,
    started_recipe,
)
from foodextract.training.collate import Collator, augmentation
from foodextract.training.config import VISION, Stage, is_sharded, precision_of
from foodextract.training.freezing import Moved, freeze, weights_moved
from foodextract.training.throughput import performance_rows, reset_peak_memory
from foodextract.training.trainer import FoodTrainer

PERFORMANCE = "performance.json"  # the speed of a stage, in the format of results/, beside its weights


def train_stage(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    split: datasets.Dataset,
    out: str | Path,
    **options: Any,
) -> "StageRun":
    """Train `model` in place on a split of the data set and save it, with its processor, to `out`/stage.name.

    `options` are those of StageRun, which is returned.
    """
    run = StageRun(model, processor, stage, split, out, **options)
    if not run.finished:
        trainer = run.build_trainer(training_arguments(run))
        trainer.train(resume_from_checkpoint=run.checkpoint)
        run.finish(trainer)
    return run


def training_arguments(run: "StageRun") -> SFTConfig:
    """The stage's settings as TRL takes them."""
    return SFTConfig(
        output_dir=str(run.checkpoints),
        **run.stage.arguments(),
        max_length=None,  # the default of 1,024 cuts image tokens off
        activation_checkpointing=False,  # on by default in TRL; one tile an image does not need it
        seed=run.seed,
        **run.settings(),
    )


class StageRun:
    """A stage of training in the folder `out`/stage.name, where it starts, resumes or is found finished.

    A stage that finished with the same recipe (settings, rows, seed and start) is loaded into `model`, unless `retrain`. `checkpoint` is
    where an interrupted one resumes. The start is the checksum of the weights or, for the result of an earlier stage, the recipe of that
    stage: training it again on a GPU need not give the same bits, and must not invalidate the checkpoints of the next stage.

    `keep_in` is a folder for backups (`checkpoints.Backup`). `report_to` is a tracker of transformers, such as "tensorboard", whose files
    go to `out`/runs. Raises ModelError before anything is done when the tracker is not installed, the parent folder of `keep_in` does not
    exist, or the model went through this stage before and should be trained again.
    """

    def __init__(
        self,
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
    ) -> None:
        self.began = time.perf_counter()
        if report_to != "none" and not find_spec(report_to):
            raise ModelError(
                f"nothing can be reported to {report_to!r}: `pip install {report_to}` first, or leave it out"
            )
        check_keep_in(keep_in)
        self.model, self.processor, self.stage, self.split, self.seed = model, processor, stage, split, seed
        self.max_steps, self.report_to = max_steps, report_to
        self.folder = Path(out) / stage.name
        self.checkpoints = self.folder / CHECKPOINTS
        self.backup = Backup(self.folder, Path(keep_in) / stage.name) if keep_in else None
        # transformers would write to a folder that is removed at the end.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(out) / "runs" / stage.name)
        freeze(model, stage.freeze)
        start, known = _start(model, self.folder)
        if stage.lora and stage.lora.modules_to_save:
            untie(model)
        self.before = snapshot(model)
        values = {"start": start, "rows": split._fingerprint, "seed": seed, "max_steps": max_steps}
        self.recipe = json.dumps(asdict(stage) | values)
        if known and (retrain or finished_recipe(self.folder) != self.recipe):
            raise ModelError(
                f"{stage.name}: the model in memory has been through this stage; load the base again to train it anew"
            )
        processes = PartialState()
        with processes.main_process_first():
            if processes.is_main_process:
                _open_folder(self.folder, self.recipe, self.backup, retrain)
        self.finished = finished_recipe(self.folder) == self.recipe
        self.log: list[dict[str, float]] = []
        self.moved: list[Moved] = []
        self.precision = precision_of(stage, model.device, model.num_parameters())
        if self.finished:
            self._load()
            return
        reset_peak_memory(model.device)
        if processes.is_main_process:
            print(f"{stage.name}: {self.precision.reason}", flush=True)

    @property
    def checkpoint(self) -> str | None:
        """The last whole checkpoint of an interrupted run."""
        return last_checkpoint(self.checkpoints)

    @property
    def seconds(self) -> float:
        """How long the finished stage took: all its steps, and the preparation of its last run."""
        return json.loads((self.folder / FINISHED).read_text())["seconds"]

    @property
    def peft_config(self) -> LoraConfig | None:
        return self.stage.lora.config() if self.stage.lora else None

    @property
    def callbacks(self) -> list[Backup]:
        return [self.backup] if self.backup else []

    def settings(self) -> dict[str, Any]:
        """The arguments of SFTConfig that follow from the device, the precision and the rhythm of checkpoints."""
        stage, device = self.stage, self.model.device
        rhythm = "steps" if stage.save_steps else "epoch"
        return {
            "max_steps": self.max_steps,
            "bf16": self.precision.autocast is torch.bfloat16,
            "fp16": self.precision.autocast is torch.float16,
            "use_cpu": device.type == "cpu",
            "torch_compile": stage.torch_compile,
            "dataloader_pin_memory": device.type == "cuda",
            "ddp_find_unused_parameters": False,
            "save_strategy": rhythm,
            "save_steps": stage.save_steps or 500,
            "save_total_limit": 1,
            "eval_strategy": rhythm if stage.validation_rows else "no",
            "eval_steps": stage.save_steps or None,
            "load_best_model_at_end": bool(stage.validation_rows),
            "metric_for_best_model": stage.metric_for_best_model if stage.validation_rows else None,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,  # show a NaN
            "report_to": self.report_to,
            "disable_tqdm": True,  # `trainer.Progress` has a bar
            "remove_unused_columns": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }

    def build_trainer(self, args: SFTConfig) -> FoodTrainer:
        train_rows, held_out, collator = self.rows()
        return FoodTrainer(
            model=self.model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=held_out,
            data_collator=collator,
            processing_class=self.processor,
            peft_config=self.peft_config,
            unlikelihood_weight=self.stage.unlikelihood_weight,
            score=self.score,
            callbacks=self.callbacks,
        )

    def rows(self) -> tuple[datasets.Dataset, datasets.Dataset | None, PreparedRows | Collator]:
        """Rows to train on, held-out rows, and their collator: `Collator`, or `PreparedRows` with `stage.cache`.

        Raises ModelError for images of several tiles that should be augmented, and when the disk is full.
        """
        stage, images = self.stage, self.processor.image_processor
        if stage.validation_rows and is_sharded():
            message = "validation generates answers, which takes whole weights: leave it out, or use configs/ddp.yaml"
            raise ModelError(f"{stage.name}: {message}")
        augment = None
        if stage.augment:
            if most_tiles(images) > 1:
                raise ModelError(
                    "images of several tiles cannot be augmented, since their tiles must fit together: take 1 tile"
                )
            augment = augmentation(images.max_image_size["longest_edge"])
        held_out = set(self.held_out())
        split = as_conversations(self.split, stage.target)
        collator: Collator | PreparedRows = Collator(self.processor, stage.completion_only_loss, augment)
        if stage.cache:
            split = datasets.Dataset.from_dict({"row": range(len(split))})
            with full_disk_named(stage.name, self.checkpoints):
                collator = self._prepare()
            collator.augment = augment
        train_rows = split.select([number for number in range(len(split)) if number not in held_out])
        return train_rows, split.select(sorted(held_out)) if held_out else None, collator

    def held_out(self) -> list[int]:
        """About `stage.validation_rows` rows by whole groups of look-alikes, whatever the order of the rows."""
        count, groups, chosen = self.stage.validation_rows, {}, []
        for number, group in enumerate(self.split["group"] if count else ()):
            groups.setdefault(group, []).append(number)
        for group in sorted(groups, key=lambda group: hashlib.sha256(f"validation {group}".encode()).digest()):
            if len(chosen) < count:
                chosen += groups[group]
        return sorted(chosen)

    def score(self) -> float:
        """The item F1 of answers to the held-out images."""
        rows = self.split.select(self.held_out())
        labels, scopes = [record_of(row) for row in rows.remove_columns("image")], scopes_of(rows)
        batch = self.stage.per_device_train_batch_size
        answers = evaluate.predict(
            Extractor(self.model, self.processor).generate_texts, rows["image"], batch, "validation"
        )
        return evaluate.validation_f1(labels, answers, scopes)

    def _prepare(self) -> PreparedRows:
        """The rows, prepared once for all stages. Features of a frozen vision tower replace the pixels, if the disk has room for both."""
        model, processes = self.model, PartialState()
        dtype = self.precision.autocast or self.precision.weights
        path = self.checkpoints / f"features-{dtype}.bin".replace("torch.", "")  # another GPU may use another type
        stored, only = are_stored(path), {"completion_only_loss": self.stage.completion_only_loss}
        with processes.main_process_first():
            home = self.folder.parent
            rows = prepare(self.split, self.processor, home, self.stage.target, with_pixels=not stored, **only)
        if is_sharded():
            rows.shared = 0  # a forward in two parts needs whole weights
        trained = any(p.requires_grad for name, p in model.named_parameters() if name.startswith(VISION))
        if is_sharded() or trained or self.stage.augment:
            return rows
        needed = features_shape(model, rows).numel() * dtype.itemsize
        if not stored and needed > 0.5 * shutil.disk_usage(self.checkpoints).free:
            print(
                f"features of {needed / 1e9:.0f} GB would fill more than half of the free disk, so they are not cached"
            )
            return rows
        with processes.main_process_first():
            rows.features = vision_features(model, rows, path, dtype)
        processes.wait_for_everyone()
        rows.pixels = None
        if processes.is_main_process:
            (rows.home / PIXELS).unlink(missing_ok=True)  # `prepare` writes them again for stage 2
        return rows

    def finish(self, trainer: FoodTrainer) -> None:
        """Merge adapters, count the moved weights, save the model and what was measured, and delete the checkpoints."""
        stage, model, processes, progress = self.stage, self.model, PartialState(), trainer.progress
        log = [entry for entry in trainer.state.log_history if {"loss", "eval_loss", "eval_item_f1"} & entry.keys()]
        self.log = [entry for entry in log if "loss" in entry]
        prepared = trainer.data_collator if stage.cache else None
        if prepared:
            frozen = not any(p.requires_grad for name, p in model.named_parameters() if name.startswith(VISION))
            step = prepared.step(trainer.args.per_device_train_batch_size, "frozen" if frozen else "trained")
            prepared.close()
        if isinstance(trainer.model, PeftModel):
            if processes.is_main_process:
                trainer.model.save_pretrained(self.folder / "adapter")
            trainer.model.merge_and_unload()
        trainer.release()
        self.moved, self.before = weights_moved(model, self.before), {}
        processes.wait_for_everyone()
        state, after = whole_state(model), checksum(snapshot(model))
        if processes.is_main_process:
            for used in (*self.checkpoints.glob("features-*"), *([prepared.home / PIXELS] if prepared else [])):
                used.unlink(missing_ok=True)
            with full_disk_named(stage.name, self.checkpoints):
                model.save_pretrained(self.folder, state_dict=state)
                self.processor.save_pretrained(self.folder)
            if prepared and progress.seconds:
                number, dtype = processes.num_processes, self.precision.autocast or self.precision.weights
                done = progress.images // number, progress.seconds, number
                rows = performance_rows(stage.name, model.config, step, *done, model.device, dtype)
                write_results(self.folder / PERFORMANCE, rows)
                print("\n".join(f"{row.metric:>20} {row.value:10.3f} {row.unit}" for row in rows))
            finished = asdict(stage) | {
                "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
                "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
                "recipe": self.recipe,
                "weights": after,
                "seconds": progress.began - self.began + (log[-1]["elapsed"] if log else 0),
                "processes": processes.num_processes,
                "precision": self.precision.reason,
                "log": log,
                "moved": [asdict(module) for module in self.moved],
            }
            with full_disk_named(stage.name, self.checkpoints):
                unfinished = self.folder / f"{FINISHED}.partial"
                unfinished.write_text(json.dumps(finished, indent=1))
                unfinished.replace(self.folder / FINISHED)
            if self.backup:
                self.backup.save_finished()
            shutil.rmtree(self.checkpoints)
        model.name_or_path = str(self.folder)
        self.finished = True
        processes.wait_for_everyone()

    def _load(self) -> None:
        """Load the finished stage into the model."""
        finished = json.loads((self.folder / FINISHED).read_text())
        if PartialState().is_main_process:
            print(f"{self.stage.name}: already trained; loaded from {self.folder}", flush=True)
            if self.backup:
                self.backup.save_finished()
            shutil.rmtree(self.checkpoints, ignore_errors=True)  # left where a kill came after the stage had finished
        self.model.load_state_dict(type(self.model).from_pretrained(self.folder, dtype=self.model.dtype).state_dict())
        self.model.name_or_path = str(self.folder)
        self.log = [entry for entry in finished["log"] if "loss" in entry]
        self.moved = [Moved(**row) for row in finished["moved"]]


def untie(model: PreTrainedModel) -> None:
    """Give the LM head its own weights where it shares those of the embedding.

    Both train as copies when they are among `Lora.modules_to_save`; saved as tied weights, one of them would be lost.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _start(model: PreTrainedModel, folder: Path) -> tuple[str, bool]:
    """Identify the weights that a stage starts from (see StageRun), and whether they went through this very stage before.

    They did when a cell runs twice in one kernel: the model is then the result of the stage that finished in `folder`, or of a later one,
    and the start is that of the finished stage.
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


def _open_folder(folder: Path, recipe: str, backup: Backup | None, retrain: bool) -> None:
    """Leave in `folder` what this recipe can resume from: its finished stage, its checkpoints, or an empty folder."""
    if not retrain:
        known = finished_recipe(folder), interrupted_recipe(folder)
        if recipe in known or (backup and backup.restore(recipe)) or started_recipe(folder) == recipe:
            return
        for place in (folder, *([backup.kept] if backup else [])):
            if other := finished_recipe(place) or interrupted_recipe(place):
                changed = differences(recipe, other)
                print(
                    f"{folder.name}: retraining, and replacing {place}: {changed} differ from the run there", flush=True
                )
    elif backup:
        shutil.rmtree(backup.kept, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CHECKPOINTS / RECIPE).write_text(recipe)
