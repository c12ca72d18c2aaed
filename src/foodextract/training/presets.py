"""The two profiles, a handful of values each; nothing below the notebooks asks which one is running."""

from dataclasses import dataclass

from foodextract.models.loading import TINY_BASE, ModelError, choose_device
from foodextract.names import HUB_BASE, HUB_DATASET
from foodextract.training.config import Stage

VISION = "model.vision_model"
SMALL_STEPS = {"batch_size": 16, "accumulation": 1, "schedule": "cosine", "against_repeats": 300}


@dataclass(frozen=True)
class Profile:
    """What differs between a Colab GPU with the Hub and a laptop without either."""

    base_model: str
    source: str
    dataset_id: str  # what `source` reads where it is the Hub
    stage1: Stage
    stage2: Stage
    tiles: int = 1  # image budget: one 512 px tile is 64 tokens, the shipped 17 tiles are 1,088
    needs_gpu: bool = False

    def require_gpu(self, allow_cpu: bool = False, gpu: str = "T4") -> None:
        """Raise ModelError where a GPU is needed and there is none, unless `allow_cpu`. `gpu` is the one to choose in Colab."""
        if self.needs_gpu and not allow_cpu and choose_device().type == "cpu":
            raise ModelError(
                f"this profile needs a GPU, and there is none here. In Colab choose Runtime > Change runtime type > {gpu} GPU and run all "
                "cells again. To run on the CPU anyway, which takes days, set allow_cpu = True"
            )


PROFILES = {
    "hub": Profile(
        base_model=HUB_BASE,
        source="hub",
        dataset_id=HUB_DATASET,
        stage1=Stage("stage1", freeze=(VISION,), learning_rate=2e-4, epochs=2),
        stage2=Stage("stage2", freeze=(), learning_rate=2e-6, epochs=2),
        needs_gpu=True,
    ),
    # A model of 2.9 M parameters needs rates some ten times higher than one of 507 M, and more, smaller steps that die away at the end: at
    # a constant rate it stays in the noise of its last batches. And it names things twice, unless that costs. Stage 2 is short and gentle:
    # there is little for a tower to learn here that it does not know, and it soon takes drawings it has never seen for food.
    "offline": Profile(
        base_model=str(TINY_BASE),
        source="scenes",
        dataset_id="",
        stage1=Stage("stage1", freeze=(VISION,), learning_rate=7e-4, epochs=2, **SMALL_STEPS),
        stage2=Stage("stage2", freeze=(), learning_rate=1e-5, epochs=0.25, **SMALL_STEPS),
    ),
}
