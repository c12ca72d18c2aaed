"""Remove widget metadata from notebooks, which GitHub cannot render. Cells and their outputs stay."""

import json
import sys
from pathlib import Path


def strip(path: Path) -> bool:
    """Strip one notebook in place. Returns whether it changed."""
    notebook = json.loads(path.read_text())
    if notebook["metadata"].pop("widgets", None) is None:
        return False
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return True


if __name__ == "__main__":
    changed = [path for path in map(Path, sys.argv[1:]) if strip(path)]
    print(*(f"widget metadata removed: {path}" for path in changed), sep="\n")
    sys.exit(bool(changed))
