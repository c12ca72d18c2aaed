"""Provenance of a model's figures: `evaluation.json` beside the weights, bound to them by their checksum.

`results/` holds the figures of the last run. This file travels with the weights: the model card, the Space's table and
the check before publishing are made from it.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file

from foodextract.evaluation.results import Row
from foodextract.models.beside_weights import BesideWeights
from foodextract.models.loading import BUNDLED
from foodextract.models.weights import checksum

AND = " + "  # between the parts of a mixed dataset
REMEDY = "run notebook 01, which evaluates the model it trained"


class ProvenanceError(ValueError):
    """Figures that are missing or belong to other weights; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Provenance(BesideWeights):
    """How a model was made, and its figures.

    `weights` is the checksum of its tensors, `base_model` a Hub id or the name of a bundled model, `dataset` the result
    of `origin`, `stages` the values of each `training.config.Stage`, `rows` the rows of `results/` (the model's own
    carry the name of its last stage), `held_out` the result of `held_out`, "" where it was not recorded.
    """

    FILE: ClassVar[str] = "evaluation.json"

    weights: str
    base_model: str
    dataset: str
    stages: list[dict[str, Any]]
    rows: list[Row]
    held_out: str = ""

    @property
    def scored(self) -> list[Row]:
        """The figures of base and stages that have an interval."""
        return [row for row in self.rows if row.low is not None]

    @property
    def own(self) -> list[Row]:
        """The scored figures of these weights."""
        return [row for row in self.scored if row.subject == self.stages[-1]["name"]]


def weights_of(folder: str | os.PathLike) -> str:
    """Return the checksum of a saved model's tensors. Raises ProvenanceError where files are missing or damaged."""
    tensors: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        try:
            tensors |= {f"{file.name} {name}": tensor for name, tensor in sorted(load_file(file).items())}
        except SafetensorError as error:
            raise ProvenanceError(f"{file} is damaged ({error}): save the model again") from error
    if not tensors:
        raise ProvenanceError(f"{folder} holds no weights (model*.safetensors): give the folder of a trained model")
    return checksum(tensors)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name and is not a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def name_of(where: str | os.PathLike) -> str:
    """Return a Hub id unchanged, and only the last part of a local path."""
    return str(where) if is_hub_id(str(where)) else Path(where).resolve().name


def origin(rows: Mapping[str, Any]) -> str:
    """Name what a dataset (split → rows) was made of, the most frequent first: Hub ids, `scenes`, names of folders.

    A published dataset that is used by its Hub id is named by that id alone.
    """
    names: Counter[str] = Counter()
    for split in rows.values():
        published = split.info.dataset_name or ""
        if "/" in published:
            names[published] += len(split)
            continue
        for source, license in zip(split["source"], split["license"], strict=True):
            where = license.removeprefix("see ")  # `data.sources` writes "see <Hub id>"
            names[where if where != license and is_hub_id(where) else source] += 1
    most = [name for name, _ in names.most_common()]
    return AND.join(most if len(most) <= 5 else [*most[:4], f"{len(most) - 4} more"])


def held_out(rows: Mapping[str, Any]) -> str:
    """Say how the test rows of a dataset were chosen: "test" for the Hub split of that name, else a description."""
    return rows["test"].info.description


def write(
    folder: str | os.PathLike,
    base_model: str | os.PathLike,
    dataset: str | Mapping[str, Any],
    stages: Sequence[Any],
    rows: Sequence[Row],
) -> None:
    """Bind figures to the weights saved in `folder`. `dataset` is the dataset (split → rows), or its `origin`.

    `stages` are `training.config.Stage`s. Local paths are reduced to their names.
    """
    name, chosen = (dataset, "") if isinstance(dataset, str) else (origin(dataset), held_out(dataset))
    parts = AND.join(name_of(part) for part in name.split(AND))
    settings = [asdict(stage) for stage in stages]
    Provenance(weights_of(folder), name_of(base_model), parts, settings, list(rows), chosen).write(Path(folder))


def verified(folder: str | os.PathLike) -> Provenance:
    """Return the provenance of the weights in `folder`. Raises ProvenanceError where there is none of these weights."""
    path = Path(folder) / Provenance.FILE
    try:
        found = Provenance.read(path)
    except FileNotFoundError:
        raise ProvenanceError(f"{folder} has no {path.name}, so its quality is unknown: {REMEDY}") from None
    except (TypeError, KeyError, ValueError) as error:
        raise ProvenanceError(f"{path} cannot be read ({error}): {REMEDY}") from error
    actual = weights_of(folder)
    if found.weights != actual:
        raise ProvenanceError(f"{path} is about the weights {found.weights}, but these are {actual}: {REMEDY}")
    if not found.stages or not found.own:
        raise ProvenanceError(f"{path} has no figures of these weights: {REMEDY}")
    return found


def base_of(provenance: Provenance | None) -> str | None:
    """Return the base as `load_model` takes it: the folder of a bundled model or a Hub id; None where it is neither."""
    if provenance is None:
        return None
    bundled = BUNDLED / provenance.base_model
    return str(bundled) if bundled.is_dir() else provenance.base_model if is_hub_id(provenance.base_model) else None
