"""A hub id, `owner/name` or `owner/name@revision`, becomes the folder of its snapshot in the Hugging Face cache."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.file_download import repo_folder_name

from gravlens.core.errors import GravlensError, wrong_kind

_PART = r"[A-Za-z0-9_-][\w.-]*"
HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>{_PART}(/{_PART})*))?", re.ASCII)
# Weights as safetensors, configurations and tokenizers; never pickles, never code.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = "*.safetensors"
UNWANTED = ("*/*", "consolidated*.safetensors", "*.fp16.safetensors")


def is_hub_id(text: str) -> bool:
    """Whether a text reads `owner/name` or `owner/name@revision`."""
    return HUB_ID.fullmatch(text) is not None


def repository_of(hub_id: str) -> str:
    """`owner/name` of a hub id."""
    return hub_id.partition("@")[0]


def revision_of(hub_id: str) -> str | None:
    """The branch, tag or commit of a hub id, or None for its main branch."""
    return hub_id.partition("@")[2] or None


def existing(folder: Path | str, here: Path = Path()) -> Path | str:
    """A folder that exists, seen from `here`, or a hub id that looks like no path."""
    if not isinstance(folder, Path | str):
        raise wrong_kind(
            folder,
            "A folder written by save_pretrained, or a hub id, is needed here.",
            "ModelSequence.from_models(witness=…, anchor=…, runs=…) for models in memory.",
        )
    path = here / Path(folder).expanduser()
    if path.exists():
        return path
    if isinstance(folder, str) and is_hub_id(folder) and not path.parent.exists():
        return folder
    raise GravlensError(
        f"The checkpoint {folder} does not exist.",
        "A folder written by save_pretrained is needed (or a hub id, owner/name@revision).",
        f"check the path; it is looked up from {here.resolve().name}/.",
    )


def local_folder(source: Path | str, *, weights: bool = True) -> Path:
    """The folder where a checkpoint's files lie: a folder itself, or a hub id's snapshot, downloaded where needed.

    Args:
        source: a folder or a hub id.
        weights: whether they are needed too; a tokenizer and a configuration are small.

    Raises:
        GravlensError: neither a folder nor a hub id, or a hub id that is out of reach.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or Path(source).exists() or not is_hub_id(source):
        raise GravlensError(f"{source} is no folder.", "A checkpoint is a folder, or a hub id.", "check the path.")
    try:
        found = snapshot_download(
            repository_of(source),
            revision=revision_of(source),
            allow_patterns=list(WANTED),
            ignore_patterns=[*UNWANTED, *([] if weights else [WEIGHTS])],
        )
    except (OSError, ValueError) as error:
        if part := getattr(error, "snapshot_path", None):  # offline, not all of its files here: weights tell what lacks
            return Path(part)
        raise GravlensError(
            f"{source} could not be opened ({str(error).strip().splitlines()[0]}).",
            "A folder written by save_pretrained is needed, or a hub id and revision in reach.",
            "check the path, or the id and revision; download it once where there is a network.",
        ) from error
    return Path(found)


def commit_of(folder: Path) -> str | None:
    """`owner--name@commit` of a snapshot's folder in the cache; None of another folder."""
    if folder.parent.name != "snapshots" or re.fullmatch("[0-9a-f]{40}", folder.name) is None:
        return None
    home = folder.parents[1]
    return f"{home.name}@{folder.name}" if home.parent == Path(constants.HF_HUB_CACHE) else None


def snapshots_here(hub_id: str) -> set[Path]:
    """Folders of a repository's snapshots in the cache that hold weights, or some of them."""
    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository_of(hub_id), repo_type="model")
    return {weights.parent for weights in (home / "snapshots").glob(f"*/{WEIGHTS}")}


def evict(snapshot: Path) -> None:
    """Delete one revision from the cache, as `hf cache` does: what another revision shares stays.

    That it could not be deleted is a warning: what was read of it stands.
    """
    failure = ""
    try:
        found = scan_cache_dir(snapshot.parents[2])
        # A fork has commits of the same name, and only this repository's was downloaded here.
        own = frozenset(repo for repo in found.repos if repo.repo_path == snapshot.resolve().parents[1])
        replace(found, repos=own).delete_revisions(snapshot.name).execute()
    except (OSError, ValueError, CacheNotFound) as error:
        failure = f" ({error})"
    if snapshot.exists():
        warnings.warn(f"{snapshot} stays on disk: it could not be deleted{failure}.", stacklevel=2)
