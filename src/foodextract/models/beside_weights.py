"""Facts about a model in JSON files beside its weights, in a folder or on the Hub."""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

from huggingface_hub import hf_hub_download
from pydantic import TypeAdapter, ValidationError

LOG = logging.getLogger("foodextract")


@dataclass(frozen=True)
class BesideWeights:
    """What a JSON file beside the weights of a model states. Subclasses are dataclasses."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Raises OSError, or ValueError where the file holds something else."""
        try:
            return TypeAdapter(cls).validate_json(Path(path).read_bytes())
        except ValidationError as error:
            fault = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}") from error

    @classmethod
    def find(cls, model_id: str | os.PathLike[str]) -> Self | None:
        """What a model in a folder or on the Hub states, None where it states nothing. A damaged file is named."""
        try:
            path = Path(model_id) / cls.FILE if Path(model_id).is_dir() else hf_hub_download(str(model_id), cls.FILE)
        except (OSError, ValueError):
            return None
        try:
            return cls.read(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            LOG.warning(f"{path} is ignored, since it cannot be read: download it again ({error})")
            return None

    def write(self, folder: Path) -> None:
        (folder / self.FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def copy(cls, model_id: str | os.PathLike[str], out: Path) -> None:
        """Write what a model states, if anything, into the folder of an export."""
        if found := cls.find(model_id):
            found.write(out)
