"""The tokenizer of a history: the anchor's, and checks that the other checkpoints agree with it."""

import copy
import filecmp
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gravlens.core.errors import GravlensError
from gravlens.history.encoding import KWARGS, encode
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.history.sources import Known, Resolved, resolve
from gravlens.models.families import ENDS, check_context, listed
from gravlens.models.opening import PROCESSOR_FILES, OpenModel, checkpoint_tokenizer, own_tokenizer, stored_ends

_TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    *PROCESSOR_FILES,
]


def sequence_tokenizer(
    sequence: ModelSequence | Path | str, prompts: PromptSet | None = None, known: Known | None = None
) -> Any:
    """Return the one tokenizer that all checkpoints are read with: the anchor's.

    The tokenizers of the witness and of each run's first checkpoint must encode `prompts` (default: all of the
    sequence's) alike; the vocabulary may have grown. `known` as in `resolve`.

    Raises:
        GravlensError: no tokenizer; one that encodes a prompt otherwise (without prompts: has another vocabulary);
            different chat templates, and `chat_template` makes no choice; a template without a system turn.
    """
    sequence = ModelSequence.of(sequence)
    known = {} if known is None else known
    anchor = resolve(sequence.anchor, known, weights=False)
    chosen = checkpoint_tokenizer(anchor)
    if chosen is None:
        given = f"The anchor ({sequence.anchor.described}) has no tokenizer{_or_model(sequence.anchor)}."
        remedy = "tokenizer.save_pretrained(folder), or tokenizer= of the sequence."
        raise GravlensError(given, "Prompts are texts and need one.", remedy)
    sets = [sequence.probes, sequence.held_out, sequence.harmless] if prompts is None else [prompts]
    for checkpoint in _first_of_each(sequence)[1:]:
        resolved = resolve(checkpoint, known, weights=False)
        own = None if _same_tokenizer(resolved, anchor) else own_tokenizer(resolved)
        if own is None or own is chosen:
            continue
        _check_reads_alike(checkpoint, own, chosen, [one for one in sets if one is not None])
        if sequence.chat_template == "own":
            _check_template(checkpoint, own, chosen)
    first = [resolve(checkpoint, known, weights=False) for checkpoint in _first_of_each(sequence)]
    # Of later checkpoints the files on disk alone: of a hub's, each would be downloaded.
    later = {one.source for one in sequence if isinstance(one.source, Path)} - {one.checkpoint.source for one in first}
    return _ending(chosen, first, later)


def _first_of_each(sequence: ModelSequence) -> list[Checkpoint]:
    return [sequence.anchor, sequence.witness, *(run[0] for run in sequence.runs.values() if run)]


def _ending(tokenizer: Any, checkpoints: Sequence[Resolved], folders: Iterable[Path]) -> Any:
    """Return the tokenizer with the end tokens of all checkpoints, so that answers of all end alike."""
    found = {*getattr(tokenizer, ENDS, ())}.union(*map(stored_ends, folders))
    for checkpoint in checkpoints:
        source = checkpoint.checkpoint.source
        found.update(listed(getattr(source, "generation_config", None)))
        found.update(*map(stored_ends, checkpoint.paths))
    if found <= {tokenizer.eos_token_id, *getattr(tokenizer, ENDS, ())}:
        return tokenizer
    tokenizer = copy.copy(tokenizer)  # it may be the user's
    setattr(tokenizer, ENDS, tuple(sorted(found)))
    return tokenizer


def _or_model(checkpoint: Checkpoint) -> str:
    # Without config.json the folder is not a checkpoint at all.
    folder = Path(checkpoint.source) if isinstance(checkpoint.source, Path) else None
    return " and no config.json" if folder and not any(folder.glob("*config.json")) else ""


def _check_reads_alike(checkpoint: Checkpoint, own: Any, chosen: Any, sets: Sequence[PromptSet]) -> None:
    sizes = f"vocabularies of {len(own)} and {len(chosen)} tokens"
    if not sets and own.get_vocab() != chosen.get_vocab():
        raise _other_tokenizer(checkpoint, f"has another vocabulary than the anchor ({sizes})")
    own = copy.copy(own)  # it may be the user's
    own.chat_template = getattr(chosen, "chat_template", None)
    setattr(own, KWARGS, getattr(chosen, KWARGS, {}))
    for prompts in sets:
        wanted = encode(chosen, prompts)
        try:
            read = encode(own, prompts)
        except Exception as error:  # tokenizers raise various exceptions for a word without a token
            raise _other_tokenizer(checkpoint, f"cannot read the prompts ({error}; {sizes})") from error
        for text, theirs, ours in zip(prompts, read, wanted, strict=True):
            if theirs != ours:
                pairs = enumerate(zip(theirs, ours, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
                ids = f"{theirs[at : at + 3]} where the anchor's reads {ours[at : at + 3]}"
                raise _other_tokenizer(checkpoint, f"reads {text[:40]!r} from token {at} on as {ids} ({sizes})")


def _other_tokenizer(checkpoint: Checkpoint, found: str) -> GravlensError:
    given = f"The tokenizer of {checkpoint.name} ({checkpoint.described}) {found}."
    wanted = "All checkpoints of a history read the same token ids."
    return GravlensError(given, wanted, "checkpoints of one history, or one tokenizer= for all.")


def _check_template(checkpoint: Checkpoint, own: Any, anchor: Any) -> None:
    if own.chat_template != getattr(anchor, "chat_template", None):
        none = f" (the {checkpoint.name} has none)" if not own.chat_template else ""
        given = f"{checkpoint.name.capitalize()} and anchor have different chat templates{none}."
        wanted = "A difference of templates alone makes a large direction, so the choice is yours and is stored."
        raise GravlensError(given, wanted, 'chat_template="anchor" (the anchor\'s for all) or "none" (plain prompts).')


def _same_tokenizer(one: Resolved, other: Resolved) -> bool:
    """Whether both were given one tokenizer, or hold identical files."""
    given = one.checkpoint.tokenizer, other.checkpoint.tokenizer
    if given != (None, None):
        return given[0] is given[1]
    if not (one.folders and other.folders):
        return False
    a, b = one.paths[-1], other.paths[-1]
    # Comparing files is faster than opening them.
    same, _, _ = filecmp.cmpfiles(a, b, _TOKENIZER_FILES, shallow=False)
    absent = [name for name in _TOKENIZER_FILES if not (a / name).exists() and not (b / name).exists()]
    return "tokenizer.json" in same and len(same) + len(absent) == len(_TOKENIZER_FILES)


def check_vocabulary(checkpoint: Checkpoint, model: OpenModel, ids: Sequence[Sequence[int]]) -> None:
    """Raise if a prompt has a token id beyond a checkpoint's embedding, or is longer than its context."""
    check_context(model, ids, of=f"{checkpoint.name} ({checkpoint.described})")
    rows = model.family.vocabulary
    if (largest := max(map(max, ids))) >= rows:
        given = f"{checkpoint.name} ({checkpoint.described}) has embeddings of {rows} tokens"
        wanted = "A vocabulary may grow, if no prompt uses the new tokens."
        remedy = 'prompts without them; chat_template="none" if the template adds them.'
        raise GravlensError(f"{given}, and a prompt holds token {largest}.", wanted, remedy)
