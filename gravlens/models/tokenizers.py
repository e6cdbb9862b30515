"""The one tokenizer that the checkpoints of a history are read with, and whether theirs agree with it."""

import copy
import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gravlens.core.errors import GravlensError
from gravlens.history.hub import local_folder
from gravlens.history.prompts import PromptSet, encode
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.opening import OpenModel, checkpoint_tokenizer, own_tokenizer

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def sequence_tokenizer(sequence: ModelSequence | Path | str, prompts: PromptSet | None = None) -> Any:
    """The one tokenizer that all checkpoints are read with, the anchor's; templates never mix silently.

    The vocabulary may have grown on the way: the tokenizers of the witness and of each run's first checkpoint must read
    `prompts` (by default all of the sequence's) as the same token ids as the anchor's.

    Raises:
        GravlensError: no tokenizer is found, another reads a prompt as other ids (or has another vocabulary, where
            there are no prompts), the anchor and one of them have different chat templates and `chat_template` makes no
            choice, or the template has no place for the prompts' system prompt.
    """
    sequence = ModelSequence.of(sequence)
    chosen = checkpoint_tokenizer(sequence.anchor)
    if chosen is None:
        raise GravlensError(
            f"The anchor ({sequence.anchor.described}) has no tokenizer" + _or_model(sequence.anchor) + ".",
            "Prompts are texts and need one.",
            "tokenizer.save_pretrained(folder), or tokenizer= where the sequence is made.",
        )
    sets = [sequence.probes, sequence.held_out, sequence.harmless] if prompts is None else [prompts]
    for checkpoint in (sequence.witness, *(run[0] for run in sequence.runs.values() if run)):
        own = None if _same_tokenizer(checkpoint, sequence.anchor) else own_tokenizer(checkpoint)
        if own is None or own is chosen:
            continue
        _check_reads_alike(checkpoint, own, chosen, [one for one in sets if one is not None])
        if sequence.chat_template == "own":
            _check_template(checkpoint, own, chosen)
    return chosen


def _or_model(checkpoint: Checkpoint) -> str:
    """A folder that is no checkpoint at all lacks its tokenizer too."""
    folder = Path(checkpoint.source) if isinstance(checkpoint.source, Path) else None
    return " and no config.json" if folder and not any(folder.glob("*config.json")) else ""


def _check_reads_alike(checkpoint: Checkpoint, own: Any, chosen: Any, sets: Sequence[PromptSet]) -> None:
    sizes = f"vocabularies of {len(own)} and {len(chosen)} tokens"
    if not sets and own.get_vocab() != chosen.get_vocab():
        raise _other_tokenizer(checkpoint, f"has another vocabulary than the anchor ({sizes})")
    own = copy.deepcopy(own)
    own.chat_template = getattr(chosen, "chat_template", None)
    for prompts in sets:
        wanted = encode(chosen, prompts)
        try:
            read = encode(own, prompts)
        except Exception as error:  # whatever a tokenizer raises for a word that it has no token for
            raise _other_tokenizer(checkpoint, f"cannot read the prompts ({error}; {sizes})") from error
        for text, theirs, ours in zip(prompts, read, wanted, strict=True):
            if theirs != ours:
                pairs = enumerate(zip(theirs, ours, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
                ids = f"{theirs[at : at + 3]} where the anchor's reads {ours[at : at + 3]}"
                raise _other_tokenizer(checkpoint, f"reads {text[:40]!r} from token {at} on as {ids} ({sizes})")


def _other_tokenizer(checkpoint: Checkpoint, found: str) -> GravlensError:
    return GravlensError(
        f"The tokenizer of {checkpoint.name} ({checkpoint.described}) {found}.",
        "All checkpoints of a history read the same token ids.",
        "checkpoints of one history, or one tokenizer= for all.",
    )


def _check_template(checkpoint: Checkpoint, own: Any, anchor: Any) -> None:
    if own.chat_template != getattr(anchor, "chat_template", None):
        raise GravlensError(
            f"{checkpoint.name.capitalize()} and anchor have different chat templates"
            + (f" (the {checkpoint.name} has none)." if not own.chat_template else "."),
            "A difference of templates alone makes a large direction, so the choice is yours and is stored.",
            'chat_template="anchor" (the anchor\'s for all) or "none" (prompts as they are).',
        )


def _same_tokenizer(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether one tokenizer was handed over for both, or two folders hold the same files, not to be opened twice."""
    if one.tokenizer is not None or other.tokenizer is not None:
        return one.tokenizer is other.tokenizer
    if isinstance(one.source, nn.Module) or isinstance(other.source, nn.Module):
        return False
    a, b = local_folder(one.source, weights=False), local_folder(other.source, weights=False)
    same, _, _ = filecmp.cmpfiles(a, b, _TOKENIZER_FILES, shallow=False)
    absent = [name for name in _TOKENIZER_FILES if not (a / name).exists() and not (b / name).exists()]
    return "tokenizer.json" in same and len(same) + len(absent) == len(_TOKENIZER_FILES)


def check_vocabulary(checkpoint: Checkpoint, model: OpenModel, ids: Sequence[Sequence[int]]) -> None:
    """Raise where a prompt has a token that a checkpoint's embedding has no row for."""
    hugging_face = model.kind == "huggingface"
    rows = model.module.get_input_embeddings().weight.shape[0] if hugging_face else model.module.cfg.d_vocab
    if (largest := max(map(max, ids))) >= rows:
        raise GravlensError(
            f"{checkpoint.name} ({checkpoint.described}) has embeddings of {rows} tokens, and a prompt holds token "
            f"{largest}.",
            "A vocabulary may grow, where no prompt uses the new tokens.",
            'prompts without them; chat_template="none" where the template brings them.',
        )
