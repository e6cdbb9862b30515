"""Controls of a history: checkpoints and runs that a claim compares the history's own with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gravlens.core.display import brief
from gravlens.core.errors import GravlensError, as_list, at_home, unknown_keys

# tables of runs that are paired with the history's by name -> the checkpoint that they start from
PAIRED = {
    "twins": "witness",
    **dict.fromkeys(("clamp", "push", "penalty", "released", "lower_rate"), "anchor"),
}
RANDOM = ("random", "released_random")  # tables of runs along random directions
RUN_FORMS = 'run1 = "folder/checkpoint-*", a list of folders, or {folders = "…", missing = "skip"}'


@dataclass(frozen=True, eq=False)
class RandomClamp:
    """Runs that were clamped along a matched random direction, for good or until the block was released.

    Attributes:
        directions: file of the directions (`Directions.save`).
        runs: name of the paired run -> folders.
    """

    directions: Path | str
    runs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Controls:
    """Controls that exist. Runs have the same forms as those of `ModelSequence.from_folders`.

    Attributes:
        siblings: further alignments of the same witness.
        strangers: witnesses of other histories (another initialisation or lineage), trained like the witness. Without
            names they are named by their folder.
        twins: name of a run -> the witness fine-tuned on that run's data, in its order.
        stranger_twins: name of a stranger -> the same of that stranger.
        continued: runs of alignment continued from the anchor, under any names.
        clamp: name of a run -> the anchor fine-tuned on its data, clamped along v_rev.
        push: likewise, pushed towards the witness.
        penalty: likewise, with a penalty against motion towards the witness.
        released: likewise, clamped and then released.
        lower_rate: likewise, with no blocker and a lower learning rate.
        random: likewise, clamped along matched random directions, under any names.
        released_random: likewise, clamped along matched random directions and then released.
    """

    siblings: Sequence[Any] = ()
    strangers: Mapping[str, Any] | Sequence[Any] = ()
    twins: Mapping[str, Any] = field(default_factory=dict)
    stranger_twins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    continued: Mapping[str, Any] = field(default_factory=dict)
    clamp: Mapping[str, Any] = field(default_factory=dict)
    push: Mapping[str, Any] = field(default_factory=dict)
    penalty: Mapping[str, Any] = field(default_factory=dict)
    released: Mapping[str, Any] = field(default_factory=dict)
    lower_rate: Mapping[str, Any] = field(default_factory=dict)
    random: Mapping[str, RandomClamp] = field(default_factory=dict)
    released_random: Mapping[str, RandomClamp] = field(default_factory=dict)
    __repr__ = brief

    def __post_init__(self) -> None:
        object.__setattr__(self, "siblings", tuple(as_list(self.siblings)))
        object.__setattr__(self, "strangers", _named(self.strangers))

    def mapped(self, one: Callable[[str, Any], Any], run: Callable[[str, Any, Any], Any]) -> "Controls":
        """Return the controls with every model and every run replaced.

        Args:
            one: (name, model) -> its replacement.
            run: (name, folders, start) -> its replacement; `start` is `witness`, `anchor`, or the stranger replaced.
        """
        strangers = {name: one(f"controls.strangers.{name}", source) for name, source in dict(self.strangers).items()}

        def runs(table: Mapping[str, Any], label: str, start: Any) -> dict[str, Any]:
            return {name: run(f"{label}.{name}", folders, start) for name, folders in table.items()}

        twins = {n: runs(t, f"stranger_twins.{n}", strangers.get(n)) for n, t in self.stranger_twins.items()}
        random = {
            table: {
                name: RandomClamp(one.directions, runs(one.runs, f"{table}.{name}", "anchor"))
                for name, one in getattr(self, table).items()
            }
            for table in RANDOM
        }
        return Controls(
            siblings=[one(f"controls.siblings.{i}", source) for i, source in enumerate(self.siblings, 1)],
            strangers=strangers,
            stranger_twins=twins,
            continued=runs(self.continued, "continued", "anchor"),
            **random,
            **{name: runs(getattr(self, name), name, start) for name, start in PAIRED.items()},
        )

    def paired(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Iterate over the tables whose keys are names of runs."""
        yield from ((name, getattr(self, name)) for name in PAIRED)
        yield from ((f"stranger_twins.{name}", table) for name, table in self.stranger_twins.items())
        yield from ((f"{table}.{name}", one.runs) for table in RANDOM for name, one in getattr(self, table).items())

    def check(self, runs: Sequence[str]) -> None:
        """Raise where a control is paired with a run or a stranger that is not there."""
        for table, found in self.paired():
            for name in found.keys() - set(runs):
                known = ", ".join(runs) or "none"
                given = f"controls.{table} names the run {name!r}."
                remedy = f"a name of [runs], or {name} = … under [runs]."
                raise GravlensError(given, f"It is paired with one of the history's runs: {known}.", remedy)
        # these become names of folders and must not lead out of them
        for name in [*dict(self.strangers), *self.continued, *self.random, *self.released_random]:
            if not name.isprintable() or {"/", "\\"} & {*name} or name in ("", ".", ".."):
                wanted = "It becomes part of the name of a folder."
                raise GravlensError(f"A control is called {name!r}.", wanted, 'a plain word, such as "other1".')
        for name in self.stranger_twins.keys() - dict(self.strangers).keys():
            known = ", ".join(dict(self.strangers)) or "none"
            given = f"controls.stranger_twins names the stranger {name!r}."
            raise GravlensError(given, f"Known strangers: {known}.", f'strangers = ["{name}"] under [controls].')

    def described(self) -> str:
        """How many of each kind there are; "" for none."""
        counts = {item.name: len(getattr(self, item.name)) for item in fields(self)}
        return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items() if count)


def _named(strangers: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(strangers, Mapping):
        return dict(strangers)
    sources = as_list(strangers)
    named = {Path(str(source)).name: source for source in sources}
    if len(named) < len(sources):
        given = f"Several strangers would have one name ({', '.join(map(str, sources))})."
        remedy = '[controls.strangers] with lines such as seed1 = "seed1/witness".'
        raise GravlensError(given, "Strangers are named by their folder, and each has its own name.", remedy)
    return named


# --- [controls] of SEQUENCE.toml --------------------------------------------------------------------------------------
def read_controls(path: Path, table: Any) -> Controls:
    """Return the controls of the table [controls] of the file `path`, with paths as they are written there."""
    known = [item.name for item in fields(Controls)]
    if not isinstance(table, dict):
        raise _wrong(path, "controls", "a table", "[controls] with lines such as " + 'siblings = ["sibling1"].')
    if unknown := table.keys() - set(known):
        raise unknown_keys(f"{path}: controls", unknown, known, "one of these (see docs/sequence.md).")
    if not _are_texts(table.get("siblings", [])):
        raise _wrong(path, "controls.siblings", "a list of texts", 'siblings = ["sibling1", "sibling2"].')
    strangers = table.get("strangers", [])
    if not _are_texts(list(strangers.values()) if isinstance(strangers, dict) else strangers):
        raise _wrong(path, "controls.strangers", "a list of texts", 'strangers = ["other_witness1"].')
    for name in (*PAIRED, "continued"):
        _check_runs(path, name, table.get(name, {}))
    for name in ("stranger_twins", *RANDOM):
        if not isinstance(table.get(name, {}), dict):
            raise _wrong(path, f"controls.{name}", "a table of tables", f"[controls.{name}.NAME].")
    for name, runs in table.get("stranger_twins", {}).items():
        _check_runs(path, f"stranger_twins.{name}", runs)
    # the file of directions here, runs and models by `mapped`: only the sequence knows how to find those
    random = {
        name: {number: _random(path, f"{name}.{number}", entry) for number, entry in table[name].items()}
        for name in table.keys() & {*RANDOM}
    }
    return Controls(**{**table, **random})


def _random(path: Path, name: str, entry: Any) -> RandomClamp:
    if not isinstance(entry, dict) or not isinstance(entry.get("directions"), str):
        remedy = f'[controls.{name}] with directions = "random.safetensors" (Directions.save).'
        raise _wrong(path, f"controls.{name}", "a table with the file of its directions", remedy)
    runs = {key: run for key, run in entry.items() if key != "directions"}
    _check_runs(path, name, runs)
    return RandomClamp(path.parent / at_home(entry["directions"]), runs)


def _check_runs(path: Path, name: str, table: Any) -> None:
    if not isinstance(table, dict):
        raise _wrong(path, f"controls.{name}", "a table of runs", f"[controls.{name}] with {RUN_FORMS}.")
    for run, entry in table.items():
        folders = entry.get("folders") if isinstance(entry, dict) else entry
        known = not isinstance(entry, dict) or entry.keys() <= {"folders", "missing"}
        if not known or not (isinstance(folders, str) or _are_texts(folders)):
            raise _wrong(path, f"controls.{name}.{run}", "a run", f"{RUN_FORMS}.")


def _are_texts(entry: Any) -> bool:
    return isinstance(entry, list) and all(isinstance(item, str) for item in entry)


def _wrong(path: Path, key: str, wanted: str, remedy: str) -> GravlensError:
    return GravlensError(f"{path}: {key} is of another kind.", f"It is {wanted}.", remedy)


NO_CONTROLS = Controls()
