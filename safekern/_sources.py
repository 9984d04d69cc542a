"""What tells compiled kernels of these sources from those of others. Read by setup.py, too."""

import hashlib
from pathlib import Path


def digest(csrc: Path, backend: str) -> str:
    """SHA-256 (hex) of the sources of a compiled backend.

    Args:
        csrc: the folder of all sources.
        backend: its folder in there, ``"cpu"`` or ``"cuda"``.
    """
    found = hashlib.sha256()
    for path in sorted([*csrc.glob("*.h"), *(csrc / backend).glob("*.[ch]*")]):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)} ".encode() + content)
    return found.hexdigest()
