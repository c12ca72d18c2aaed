"""One stage of fine-tuning in its folder: what is finished, what can be resumed, and proof of the weights it moved.

`train_stage` is the whole sequence; notebook 01 spells it out.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from foodextract.data.dataset import rows_id
from foodextract.evaluation.results import write_results
from foodextract.models.loading import FINISHED, ModelError, load_weights
from foodextract.models.training_data import TrainingData
from foodextract.models.weights import checksum, snapshot, whole_state
from foodextract.training import checkpoints
from foodextract.training.cache import PIXELS
from foodextract.training.checkpoints import CHECKPOINTS, RECIPE, Backup, finished_recipe, full_disk_named
from foodextract.training.config import Stage, precision_of, trains_vision
from foodextract.training.freezing import Moved, freeze, weights_moved
from foodextract.training.rows import Rows, held_out_f1, open_rows
from foodextract.training.throughput import Step, performance_rows, reset_peak_memory
from foodextract.training.trainer import FoodTrainer

PERFORMANCE = "performance.json"  # the speed of a stage, in the format of results/, beside its weights


class StageRun:
    """A stage of training in the folder `out`/stage.name.

    A stage that finished with the same recipe (settings, rows, seed, start) is loaded into `model`, unless `retrain`.
    `checkpoint` is where an interrupted one resumes. The start is the checksum of the weights or, for the result of an
    earlier stage, the recipe of that stage: on a GPU, training it again need not give the same bits, and must not
    invalidate the checkpoints of the next stage.

    `keep_in` is a folder for backups (`checkpoints.Backup`). `report_to` is a tracker of transformers, such as
    "tensorboard", whose files go to `out`/runs. Raises ModelError before anything is done when the tracker is not
    installed, the parent folder of `keep_in` does not exist, or the model went through this stage before and should be
    trained again.
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
        if report_to not in ("none", *get_available_reporting_integrations()):
            raise ModelError(
                f"nothing can be reported to {report_to!r}: `pip install {report_to}` first, or leave it out"
            )
        checkpoints.check_keep_in(keep_in)
        self.model, self.processor, self.stage, self.split = model, processor, stage, split
        self.seed, self.max_steps, self.report_to = seed, max_steps, report_to
        self.folder = Path(out) / stage.name
        self.checkpoints = self.folder / CHECKPOINTS
        self.backup = Backup(self.folder, Path(keep_in) / stage.name) if keep_in else None
        self.log: list[dict[str, float]] = []
        self.moved: list[Moved] = []
        # The default is inside `checkpoints`, which is deleted at the end.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(out) / "runs" / stage.name)
        freeze(model, stage.freeze)
        start, known = _start(model, self.folder)
        if stage.lora and stage.lora.modules_to_save:
            untie(model)
        self.before = snapshot(model)
        values = {"start": start, "rows": rows_id(split), "seed": seed, "max_steps": max_steps}
        self.recipe = json.dumps(asdict(stage) | values)
        if known and (retrain or finished_recipe(self.folder) != self.recipe):
            message = "the model in memory has been through this stage; load the base again to train it anew"
            raise ModelError(f"{stage.name}: {message}")
        processes = PartialState()
        with processes.main_process_first():
            if processes.is_main_process:
                _open_folder(self.folder, self.recipe, self.backup, retrain)
        self.precision = precision_of(stage, model.device, model.num_parameters())
        self.finished = finished_recipe(self.folder) == self.recipe
        if self.finished:
            self._load()
        elif processes.is_main_process:
            print(f"{stage.name}: {self.precision.reason}", flush=True)
        reset_peak_memory(model.device)

    @property
    def checkpoint(self) -> str | None:
        """The last whole checkpoint of an interrupted run."""
        return checkpoints.last_checkpoint(self.checkpoints)

    @property
    def seconds(self) -> float:
        """How long the finished stage took: all its steps, and the preparation of its last run."""
        return json.loads((self.folder / FINISHED).read_text())["seconds"]

    @property
    def callbacks(self) -> list[Backup]:
        return [self.backup] if self.backup else []

    @property
    def peft_config(self) -> LoraConfig | None:
        return self.stage.lora.config() if self.stage.lora else None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return self.precision.autocast or self.precision.weights

    def settings(self) -> dict[str, Any]:
        """The arguments of SFTConfig that follow from the device, the precision and the stage's checkpoints."""
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

    def rows(self) -> Rows:
        """Rows to train on, held-out rows, and their collator. Raises ModelError, also when the disk is full."""
        with full_disk_named(self.stage.name, self.checkpoints):
            return open_rows(self)

    def score(self) -> float:
        """The item F1 on the held-out images."""
        return held_out_f1(self)

    def build_trainer(self, args: SFTConfig) -> FoodTrainer:
        train_rows, validation_rows, collator = self.rows()
        return FoodTrainer(
            model=self.model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            data_collator=collator,
            processing_class=self.processor,
            peft_config=self.peft_config,
            unlikelihood_weight=self.stage.unlikelihood_weight,
            score=self.score,
            callbacks=self.callbacks,
        )

    def finish(self, trainer: FoodTrainer) -> None:
        """Merge adapters, count the moved weights, save the model and its log, and delete the checkpoints."""
        stage, model, processes = self.stage, self.model, PartialState()
        log = [entry for entry in trainer.state.log_history if {"loss", "eval_loss", "eval_item_f1"} & entry.keys()]
        self.log = [entry for entry in log if "loss" in entry]
        prepared = trainer.data_collator if stage.cache else None
        if prepared:
            vision = "trained" if trains_vision(model) else "frozen"
            step = prepared.step(trainer.args.per_device_train_batch_size, vision)
            prepared.close()
        if isinstance(trainer.model, PeftModel):
            if processes.is_main_process:
                trainer.model.save_pretrained(str(self.folder / "adapter"))
            trainer.model.merge_and_unload()
        trainer.release()
        self.moved, self.before = weights_moved(model, self.before), {}
        processes.wait_for_everyone()
        state = whole_state(model)
        values = asdict(stage) | {
            "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
            "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
            "recipe": self.recipe,
            "weights": checksum(snapshot(model)),
            "seconds": trainer.progress.began - self.began + (log[-1]["elapsed"] if log else 0),
            "processes": processes.num_processes,
            "precision": self.precision.reason,
            "log": log,
            "moved": [asdict(module) for module in self.moved],
        }
        if processes.is_main_process:
            if prepared:
                used = [prepared.home / PIXELS, *([] if stage.keep_features else prepared.home.glob("features-*"))]
                for path in used:
                    path.unlink(missing_ok=True)
                self._save_performance(trainer, step)
            with full_disk_named(stage.name, self.checkpoints):
                model.save_pretrained(self.folder, state_dict=state)
                self.processor.save_pretrained(self.folder)
                TrainingData.of(self.split.remove_columns("image")).write(self.folder)
                unfinished = self.folder / f"{FINISHED}.partial"
                unfinished.write_text(json.dumps(values, indent=1))
                unfinished.replace(self.folder / FINISHED)
            self._clean_up()
        model.name_or_path, self.finished = str(self.folder), True
        processes.wait_for_everyone()

    def _save_performance(self, trainer: FoodTrainer, step: Step) -> None:
        progress, processes = trainer.progress, PartialState().num_processes
        if progress.seconds:
            rows = performance_rows(
                self.stage.name, self.model, step, progress.images, progress.seconds, processes, self.dtype
            )
            write_results(self.folder / PERFORMANCE, rows)
            print("\n".join(f"{row.metric:>20} {row.value:10.3f} {row.unit}" for row in rows))

    def _clean_up(self) -> None:
        """Back the finished stage up and delete its checkpoints."""
        if self.backup:
            self.backup.save_finished()
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _load(self) -> None:
        """Load the finished stage into the model."""
        finished = json.loads((self.folder / FINISHED).read_text())
        if PartialState().is_main_process:
            print(f"{self.stage.name}: already trained; loaded from {self.folder}", flush=True)
            self._clean_up()  # where a kill came after the stage had finished
        self.model.load_state_dict(load_weights(type(self.model), self.folder, dtype=self.model.dtype).state_dict())
        self.model.name_or_path = str(self.folder)
        self.log = [entry for entry in finished["log"] if "loss" in entry]
        self.moved = [Moved(**row) for row in finished["moved"]]


def training_arguments(run: StageRun) -> SFTConfig:
    """The settings of a stage as TRL takes them. Raises ModelError for one that it refuses."""
    try:
        return SFTConfig(
            output_dir=str(run.checkpoints),
            **run.stage.arguments(),
            max_length=None,  # the default of 1,024 cuts image tokens off
            activation_checkpointing=False,  # on by default in TRL; one tile an image does not need it
            seed=run.seed,
            **run.settings(),
        )
    except ValueError as error:
        raise ModelError(f"{run.stage.name}: {error}") from error


def train_stage(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    split: datasets.Dataset,
    out: str | Path,
    **options: Any,
) -> StageRun:
    """Train `model` in place on a split and save it, with its processor, to `out`/stage.name; `options` of StageRun."""
    run = StageRun(model, processor, stage, split, out, **options)
    if not run.finished:
        trainer = run.build_trainer(training_arguments(run))
        trainer.train(resume_from_checkpoint=run.checkpoint)
        run.finish(trainer)
    return run


def untie(model: PreTrainedModel) -> None:
    """Give the LM head its own weights where it shares those of the embedding.

    Both train as copies when they are among `Lora.modules_to_save`; saved as tied weights, one would be lost.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _start(model: PreTrainedModel, folder: Path) -> tuple[str, bool]:
    """Identify the weights that a stage starts from (see StageRun), and whether they went through this very stage.

    They did when a cell runs twice in one kernel: the model is then the result of the stage that finished in `folder`,
    or of a later one, and the start is that of the finished stage.
    """
    now, finished = checksum(snapshot(model)), Path(model.name_or_path or "") / FINISHED
    found = json.loads(finished.read_text()) if finished.is_file() else {}
    if found.get("weights") != now:
        return now, False
    mine, theirs = finished_recipe(folder), _digest(found["recipe"])
    if mine and _digest(mine) in (theirs, json.loads(found["recipe"])["start"]):
        return json.loads(mine)["start"], True
    return theirs, False


def _digest(recipe: str) -> str:
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


def _open_folder(folder: Path, recipe: str, backup: Backup | None, retrain: bool) -> None:
    """Leave in `folder` what this recipe can resume from: its finished stage, its checkpoints, or an empty folder."""
    if retrain and backup:
        shutil.rmtree(backup.kept, ignore_errors=True)
    elif not retrain:
        known = finished_recipe(folder), checkpoints.interrupted_recipe(folder)
        if recipe in known or (backup and backup.restore(recipe)):
            return
        for place in (folder, *([backup.kept] if backup else [])):
            if other := finished_recipe(place) or checkpoints.interrupted_recipe(place):
                changed = checkpoints.differences(recipe, other)
                message = f"retraining, and replacing {place}: {changed} differ from the run there"
                print(f"{folder.name}: {message}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CHECKPOINTS / RECIPE).write_text(recipe)
