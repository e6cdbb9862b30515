"""A pickle that tells when it is loaded: unpickling it writes a file."""

from pathlib import Path
from typing import Any


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.target), "w")
