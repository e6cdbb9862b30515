"""Writers that are wrong in one way each: the harness must catch them."""

from contextlib import suppress
from pathlib import Path

from crash.harness import BYSTANDERS, Operation

from gravlens.core.errors import GravlensError
from gravlens.core.files import write_atomically, writing

NEW = b"new" * 9000


def in_place(folder: Path) -> None:
    (folder / "results.bin").write_bytes(NEW)


def silent(folder: Path) -> None:
    with suppress(GravlensError):
        write_atomically(folder / "results.bin", NEW)


def greedy(folder: Path) -> None:
    write_atomically(folder / "results.bin", NEW)
    (folder / "notes.md").unlink(missing_ok=True)
    (folder / "notes.md").write_bytes(BYSTANDERS["notes.md"])


def locked(folder: Path) -> None:
    with writing(folder):
        (folder / ".lock").touch(exist_ok=False)
    write_atomically(folder / "results.bin", NEW)
    (folder / ".lock").unlink()


def careless() -> list[Operation]:
    """Writers that are wrong in one way each, over an old file."""

    def old(folder: Path) -> None:
        (folder / "results.bin").write_bytes(b"old" * 9000)

    return [Operation("careless", one.__name__, one, old) for one in (in_place, silent, greedy, locked)]
