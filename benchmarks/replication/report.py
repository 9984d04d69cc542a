"""Tables and plots from the JSON files."""

from pathlib import Path


def write(folder: Path) -> None:
    """Placeholder."""
