"""What lies in a folder: its images, its other files, and what the names of its folders mean."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from foodextract.data.ingest import LEDGER
from foodextract.data.label_rules.vocabulary import entries, key
from foodextract.data.samples import Sample, Split, readable, split_named
from foodextract.data.tables import TABLES
from foodextract.images import images_and_others

SYSTEM_FOLDERS = frozenset(
    (
        *("cache", "caches", "thumb", "thumbs", "thumbnail", "thumbnails", "lost+found", "system volume information"),
        *("recycler", "recycled", "temporary items", "network trash folder", "node_modules", "site-packages", "venv"),
        *("vti_cnf", "wandb"),
    )
)
# Classes that state that no food is visible.
NOT_FOOD = frozenset(("not food", "notfood", "non food", "nonfood", "no food"))
MISSING = "there is no such file"
PLAIN_FILES = re.compile(r"(readme|license|licence|notice|changelog)\b.*|thumbs\.db|desktop\.ini|.*\.md", re.IGNORECASE)


@dataclass
class Tree:
    """The images and the other files below a folder, without those of systems and of data sets built here."""

    root: Path
    images: list[Path]
    files: list[Path]
    _by_name: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def scan(cls, root: Path) -> "Tree":
        """List a folder. A path that is no folder is empty."""
        images, files = images_and_others(root) if root.is_dir() else ([], [])
        built = {parent for path in files if (parent := path.parent) != root and _is_built(parent)}

        def is_shown(path: Path) -> bool:
            folders = path.relative_to(root).parts[:-1]
            return not any(map(_is_system, folders)) and built.isdisjoint(path.parents)

        files = [path for path in files if is_shown(path) and not path.name.startswith(".")]
        tree = cls(root, list(filter(is_shown, images)), files)
        for path in tree.images:
            tree._by_name[_key(path.name)].append(path)
            if not path.stem.isdecimal():  # a number may be that of a class
                tree._by_name[_key(path.stem) + "/"].append(path)
        return tree

    def sample(self, image: Path, label: dict[str, Any], **stated: Any) -> Sample:
        """Return an image of the folder with its label, and with what is stated of the other fields of a sample."""
        defaults = {"source": self.root.name, "license": "not stated"}
        return Sample(self.name(image), image.read_bytes, label, **(defaults | stated))

    def name(self, path: Path) -> str:
        """Return a path relative to the root, with slashes."""
        return path.relative_to(self.root).as_posix()

    def split_of(self, path: Path) -> Split | None:
        """Return the split that the folders of a file state, or the name of a table."""
        return _split_in(PurePosixPath(self.name(path)))

    def find(self, stated: str, table: Path, anywhere: bool = False) -> Path | str:
        """Return the file that a table names, or the reason why there is none.

        Backslashes, letter case and the Unicode form may differ, and folders before the name and its suffix may be left
        out. With `anywhere`, the folders that the table states may be those of another machine.
        """
        if re.match(r"(data|https?|s3|gs|file):", stated):
            return "file_name is an address: save the image below the folder and state its path"
        wanted = PurePosixPath(stated.replace("\\", "/").strip())
        if not anywhere and (wanted.is_absolute() or ".." in wanted.parts or re.match("[A-Za-z]:/", str(wanted))):
            return "file_name leads out of the folder: keep images below it"
        try:  # symbolic links below the folder are allowed
            for path in (table.parent / stated, table.parent / wanted):
                if path.is_file() and path.is_relative_to(self.root) and ".." not in path.parts:
                    return path
            alike = self._by_name.get(_key(wanted.name)) or self._by_name.get(_key(wanted.name) + "/", [])
        except (OSError, ValueError):  # too long, or with a NUL
            alike = []
        ending = f"/{_key(str(wanted))}"
        endings = (ending, f"{ending}{_key(alike[0].suffix)}") if alike else ()
        found = [path for path in alike if f"/{_key(self.name(path))}".endswith(endings)] or (alike if anywhere else [])
        for near in (lambda p: table.parent in p.parents, lambda p: self.split_of(p) == self.split_of(table)):
            found = [path for path in found if near(path)] or found
        if len(found) == 1:
            return found[0]
        if found:
            return f"{len(found)} images have this name: state the folder, too"
        return f"{MISSING}: put it into {self.root.name} or remove the line"


def class_of(name: str) -> str:
    """Return the class that the name of a folder or a class means: "Apple_Pie" is "apple pie"."""
    name = unicodedata.normalize("NFC", readable(name))
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


def names_no_class(name: str) -> bool:
    """Tell whether a folder is a split, sorts files ("images", "batch_02"), or has a number for a name."""
    words = " ".join(re.sub(r"[\W\d_]+", " ", name).split())
    return not words or key(words) in entries("folders") or split_named(name) is not None


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """Join names for a message, and count those beyond the limit."""
    names = list(names)
    rest = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(readable(name[:80]) for name in names[:limit]) + rest


def _is_system(name: str) -> bool:
    return name.startswith(("@", "$", "#", "~", "__")) or name.lower().strip("_") in SYSTEM_FOLDERS


def _is_built(folder: Path) -> bool:
    """Tell whether a folder holds a data set that `build` wrote or was writing."""
    return (folder / LEDGER).is_file() or ((folder / "report.json").is_file() and (folder / "arrow").is_dir())


def _split_in(path: PurePosixPath) -> Split | None:
    """Return the split that a path states: the first folder with such a name, else the words of a table's name."""
    for part in path.parts[:-1]:
        if split := split_named(part):
            return split
    if path.suffix.lower() not in TABLES:
        return None
    stated = {split for word in re.split(r"[\W_]+", path.stem) if (split := split_named(word))}
    return stated.pop() if len(stated) == 1 else None


def _key(name: str) -> str:
    return unicodedata.normalize("NFKC", readable(name)).casefold()
