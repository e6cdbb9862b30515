"""Build and steer shim.c, the library whose preloading makes one writing system call fail."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from enum import IntEnum
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
USABLE = sys.platform == "linux" and COMPILER is not None
LIBRARY = "GRAVLENS_SHIM"  # the variable that tells the preloaded process where its library is
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Mode(IntEnum):
    """What happens at the chosen call, numbered as in shim.c."""

    FAIL = 1  # it returns an error, and all later calls work
    KILL = 2  # the process is killed; a call that writes has written half by then
    SHORT = 3  # a call that writes moves half of its bytes, and says so
    FULL = 4  # it and all later calls that need space fail with ENOSPC


def preloaded(folder: Path) -> dict[str, str]:
    """Build the library in a folder and return the environment of a process that is run with it."""
    library = folder / "shim.so"
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    tests = str(SOURCE.parents[1])
    path = os.pathsep.join(filter(None, [str(SOURCE.parents[2]), tests, os.environ.get("PYTHONPATH")]))
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    fixed |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120"}
    return os.environ | fixed | {"LD_PRELOAD": str(library), LIBRARY: str(library), "PYTHONPATH": path}


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ[LIBRARY])  # the one that is preloaded, not a second copy
    library.crash_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    library.crash_call.argtypes = library.crash_path.argtypes = (ctypes.c_long,)
    library.crash_call.restype = library.crash_path.restype = ctypes.c_char_p
    library.crash_count.restype = ctypes.c_long
    return library


def arm(folder: Path, n: int = 0, mode: Mode = Mode.FAIL, error: int = errno.EIO) -> None:
    """Count writing calls below a folder from now on; the n-th is disturbed, none with n = 0."""
    _library().crash_arm(os.fsencode(folder.resolve()), n, mode, error)


def disarm() -> list[tuple[str, str]]:
    """Stop, and return the calls that were counted: name and path, relative to the folder."""
    library = _library()
    library.crash_arm.restype = None
    counted = range(1, library.crash_count() + 1)
    calls = [(library.crash_call(n).decode(), os.fsdecode(library.crash_path(n))) for n in counted]
    library.crash_arm(b"", 0, 0, 0)
    return calls
