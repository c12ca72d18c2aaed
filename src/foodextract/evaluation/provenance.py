"""What was measured of which weights: `evaluation.json` beside them, bound to them by their checksum.

`results/` holds the figures of the last run, whatever became of its model. This file goes where the weights go: the model card, the Space's
table and the decision whether a model may be published are made from it.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file

from foodextract.evaluation.results import Row
from foodextract.models.loading import BUNDLED
from foodextract.models.weights import checksum

EVALUATION = "evaluation.json"
AND = " + "  # between the parts of a mixed data set


class EvidenceError(ValueError):
    """Figures that are missing, or that are about other weights; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Evidence:
    """How a model came to be, and its figures.

    `weights` is the checksum of its tensors, `base_model` a Hub id or the name of a bundled model, `dataset` what `origin` says, `stages`
    the values of each `stage.Stage`, `rows` what `results/` had to say, the model's own under the name of its last stage, `held_out` what
    `held_out` says, "" where it was not noted.
    """

    weights: str
    base_model: str
    dataset: str
    stages: list[dict[str, Any]]
    rows: list[Row]
    held_out: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """The file as it is, whatever lies beside it. Raises FileNotFoundError, or TypeError where it has other fields."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**found, "rows": [Row(**row) for row in found["rows"]]})

    @property
    def own(self) -> list[Row]:
        """The figures of these very weights that have an interval."""
        return [row for row in self.rows if row.subject == self.stages[-1]["name"] and row.low is not None]

    @property
    def scored(self) -> list[Row]:
        """The figures of base and stages that have an interval."""
        return [row for row in self.rows if row.low is not None]


def weights_of(folder: str | os.PathLike) -> str:
    """The checksum of a saved model's tensors, by file and name. Raises EvidenceError for a folder without any, and for a damaged file."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise EvidenceError(f"{folder} holds no weights (model*.safetensors): give the folder that a training wrote")
    tensors = {}
    for file in files:
        try:
            tensors |= {f"{file.name} {name}": tensor for name, tensor in sorted(load_file(file).items())}
        except SafetensorError as error:
            raise EvidenceError(f"{file} is damaged ({error}): save the model again") from error
    return checksum(tensors)


def is_hub_id(name: str) -> bool:
    """Whether this is owner/name, and no folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def name_of(where: str | os.PathLike) -> str:
    """A Hub id as it is; of anything else only its own name: in which folder it lies is nobody's business."""
    return str(where) if is_hub_id(str(where)) else Path(where).resolve().name


def origin(rows: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """What a data set (split → column → values) was made of, the most frequent first: Hub ids, `scenes`, names of folders.

    A published data set that is used by its Hub id is named by that id alone.
    """
    names: Counter[str] = Counter()
    for split in rows.values():
        if (published := getattr(split, "info", None)) and "/" in (published.dataset_name or ""):
            names[published.dataset_name] += len(split)
            continue
        for source, license in zip(split["source"], split["license"], strict=True):
            where = license.removeprefix("see ")  # how `sources` names a data set on the Hub
            names[where if where != license and is_hub_id(where) else source] += 1
    most = [name for name, _ in names.most_common()]
    return AND.join(most if len(most) <= 5 else [*most[:4], f"{len(most) - 4} more"])


def held_out(rows: Mapping[str, Any]) -> str:
    """Where the held-out rows of a data set come from: "test" is the split of that name on the Hub, else it says how they were chosen."""
    info = getattr(rows["test"], "info", None)
    return (info.description if info else "") or ""


def write(
    folder: str | os.PathLike,
    base_model: str | os.PathLike,
    dataset: str | Mapping[str, Any],
    stages: Sequence[Any],
    rows: Sequence[Row],
) -> Evidence:
    """Bind figures to the weights saved in `folder`. `dataset` is the data set (split → rows), or what `origin` says of it.

    `stages` are `stage.Stage`s; of a base or data in a folder only the name is kept.
    """
    name, chosen = (dataset, "") if isinstance(dataset, str) else (origin(dataset), held_out(dataset))
    data = AND.join(name_of(part) for part in name.split(AND))
    made = Evidence(
        weights_of(folder), name_of(base_model), data, [asdict(stage) for stage in stages], list(rows), chosen
    )
    (Path(folder) / EVALUATION).write_text(json.dumps(asdict(made), indent=1), encoding="utf-8")
    return made


def verified(folder: str | os.PathLike) -> Evidence:
    """The evidence beside the weights in `folder`. Raises EvidenceError when there is none, or when it is about other weights."""
    again = "run notebook 01, which evaluates the model it trained"
    try:
        found = Evidence.read(Path(folder) / EVALUATION)
    except FileNotFoundError:
        raise EvidenceError(
            f"{folder} has no {EVALUATION}, so nobody knows how good these weights are: {again}"
        ) from None
    except (TypeError, KeyError, ValueError) as error:
        raise EvidenceError(f"{folder}/{EVALUATION} cannot be read ({error}): {again}") from error
    actual = weights_of(folder)
    if found.weights != actual:
        raise EvidenceError(
            f"{folder}/{EVALUATION} is about the weights {found.weights}, but these are {actual}: {again}"
        )
    if not found.stages or not found.own:
        raise EvidenceError(f"{folder}/{EVALUATION} has no figures of these weights: {again}")
    return found


def find(model_id: str | os.PathLike) -> Evidence | None:
    """What a model in a folder or on the Hub says about itself; None where it says nothing."""
    try:
        path = Path(model_id) / EVALUATION if Path(model_id).is_dir() else hf_hub_download(str(model_id), EVALUATION)
        return Evidence.read(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def base_of(evidence: Evidence | None) -> str | None:
    """What `load_model` takes for the base: a folder for a bundled one, else its Hub id; None when unknown or in a folder elsewhere."""
    if evidence is None:
        return None
    bundled = BUNDLED / evidence.base_model
    return str(bundled) if bundled.is_dir() else evidence.base_model if is_hub_id(evidence.base_model) else None
