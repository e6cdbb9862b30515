"""gravlens audit: judge a user's own history, with the controls that exist and those that are trained for it."""

from pathlib import Path
from typing import Annotated, Any

import lazy_loader
import typer

import gravlens as gl
from gravlens import claims, organisms, studies, training
from gravlens.cli import options as opt
from gravlens.cli.output import print_json, print_line, print_note, print_prose, print_table, print_written, records
from gravlens.cli.verdict import print_verdict

np: Any = lazy_loader.load("numpy")  # --help and completion do without
commands = typer.Typer()
PANEL = "Your own checkpoints"
QUICK = {"draws": 19, "max_prompts": 32}  # 19 draws are the least with which p = .05 can be reached
SEQUENCES = Annotated[
    list[Path],
    typer.Argument(
        metavar="SEQUENCE.toml",
        parser=opt.at_home,
        help="Files of histories: witness, anchor, runs, controls and prompts (docs/sequence.md). With several files, "
        "each one's witness is a stranger of the others.",
    ),
]
MAKE = Annotated[
    list[str],
    typer.Option(
        metavar="NAME",
        callback=opt.texts,
        help="Control to train on your data; repeat for several: runs, twins, stranger_twins, clamp, random, push, "
        "penalty, released, released_random, lower_rate (with --data); siblings, continued (with --alignment-data).",
    ),
]
DATA = Annotated[
    Path | None, opt.place("FILE", "Your runs' data, with prompt and answer or conversations: task loss and --make.")
]
ALIGNMENT_DATA = Annotated[
    Path | None, opt.place("FILE", "Data of the alignment phase, with prompt and answer or conversations.")
]
HARMLESS = Annotated[
    Path | None, opt.place("FILE", "Harmless prompts, for over-refusal. Default: those of SEQUENCE.toml.")
]
LAYERS = Annotated[
    list[int],
    opt.repeated_layer("Layer to judge and to block, from 0; repeat for several. Default: the middle layers."),
]
RUNS = Annotated[int, opt.number("Number of runs that --make runs trains.", least=1)]
DIRECTIONS = Annotated[int, opt.number("Number of random directions of --make random and released_random.", least=1)]
STEPS = Annotated[int, opt.number("Steps of --make runs, where you have none: else as many as yours.", least=1)]
BATCH = Annotated[int, opt.number("Examples per step of what is trained.", least=1)]
RATE = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        "--lr",
        min=0,
        metavar="X",
        help="Learning rate of what is trained; for controls of your own runs theirs. Default: 2e-5, with --make runs.",
    ),
]
LORA = Annotated[int, opt.number("Rank of LoRA adapters of what is trained; 0: train all weights.")]
OUT = Annotated[Path, opt.place("FOLDER", "Results folder.", check=opt.writable_folder)]
PLAN = Annotated[bool, opt.flag("--plan", "Only print what each claim level would need, and what that costs here.")]
PREREGISTER = Annotated[
    Path | None,
    opt.place("FILE", "Only write layers, step, alpha and prompts to this TOML file.", check=opt.writable_file),
]
PREREGISTRATION = Annotated[
    Path | None, opt.place("FILE", "Preregistration that the audit is held against, as written by --preregister.")
]
WORKERS = Annotated[int, opt.number("Parallel processes; 0: as many as there are cores for their threads.")]
THREADS = Annotated[
    int, opt.number("Threads per process; 0: one, or all cores for a model above 50 M parameters. 1 on busy cores.")
]


@commands.command(**opt.described(PANEL, "gravlens audit SEQUENCE.toml --out results"))
def audit(
    sequence: SEQUENCES,
    out: OUT = Path("results"),
    make: MAKE = [],  # noqa: B006 (typer copies it)
    data: DATA = None,
    alignment_data: ALIGNMENT_DATA = None,
    harmless: HARMLESS = None,
    layer: LAYERS = [],  # noqa: B006
    runs: RUNS = 2,
    directions: DIRECTIONS = 4,
    steps: STEPS = 50,
    batch: BATCH = 8,
    learning_rate: RATE = None,
    lora: LORA = 0,
    openings: opt.OPENINGS = [],  # noqa: B006
    compliances: opt.COMPLIANCES = [],  # noqa: B006
    quick: Annotated[bool, opt.flag("--quick", "19 draws of weight noise, at most 32 prompts of each kind.")] = False,
    full: Annotated[bool, opt.flag("--full", "Print every table, not only the verdict.")] = False,
    plan: PLAN = False,
    preregister: PREREGISTER = None,
    preregistration: PREREGISTRATION = None,
    workers: WORKERS = 0,
    threads: THREADS = 0,
    json: opt.JSON = False,
) -> None:
    """Judge your own history: what may be claimed about it, and which controls are missing for more.

    Runs that exist are measured as they are; no weights are copied or changed. What --make names is trained on your
    data. Complete parts are cached (see GRAVLENS_CACHE) and reused, so an interrupted command resumes.
    """
    sequences = _by_name(sequence)
    if plan or preregister is not None:
        _prepare(sequences, tuple(layer), preregister, plan, json)
        return
    fixed = None if preregistration is None else claims.preregistration.Preregistration.from_toml(preregistration)
    options: dict[str, Any] = {
        **{"data": data, "alignment_data": alignment_data, "harmless": harmless, "train": tuple(make)},
        **{"layers": tuple(layer) or (fixed.layers if fixed else ()), "runs": runs, "directions": directions},
        **{"measures": _measures(openings, compliances), "same_recipe": learning_rate is not None, "threads": threads},
        "recipe": training.finetune.Recipe(steps, batch, learning_rate or 2e-5, 0.0, lora=lora or None),
        **(QUICK if quick else {}),
    }
    histories = {name: organisms.recorded.RecordedHistory(one, **options) for name, one in sequences.items()}
    print_note("\n".join(_work(name, history) for name, history in histories.items()))
    results = studies.audit.audit(histories, out, workers=workers or None, preregistration=fixed)
    if json:
        print_json(results)
    else:
        print_verdict(results, full=full)
    (print_note if json else print_line)(f"Report: {out / 'report.html'}\nData: {out / 'results.json'}")


def _prepare(
    sequences: "dict[str, gl.ModelSequence]", layers: tuple[int, ...], file: Path | None, plan: bool, json: bool
) -> None:
    """Write the preregistration, print the plan; nothing is measured."""
    if file is not None:
        # one file is held against every history of an audit, so it must say the same of each
        first, *others = sequences.values()
        fixed = claims.preregistration.Preregistration.of(first, layers=layers or None)
        for other in others:
            if claims.preregistration.Preregistration.of(other, layers=layers or None) != fixed:
                given = f"The histories {', '.join(sequences)} differ in depth, last step or prompts."
                raise gl.GravlensError(given, "One preregistration is for all of them.", "--preregister for each file.")
        print_written(fixed.write(file), json)
    if plan:
        found = claims.planning.plan_audit(sequences.values(), rng=np.random.default_rng(0))
        if json:
            print_json({"now": dict(found.now), "plans": records(found.table)})
        else:
            enough = sorted({*found.table["level"][found.table["power_now"] >= found.target]})
            now = f"enough for level {', '.join(map(str, enough))}" if enough else "not enough for any level"
            print_prose(f"What is there is {now}, with {found.target:.0%} power; what the others need:")
            print_table(("quantity", "plan"), found.lines())


def _by_name(files: list[Path]) -> "dict[str, gl.ModelSequence]":
    """Return the histories by the names of their files or, where these are equal, of their folders."""
    # most people call every one of them SEQUENCE.toml
    names = [file.stem for file in files]
    if len({*names}) < len(names):
        names = [file.absolute().parent.name for file in files]
    if len({*names}) < len(names):
        given = f"Two of the files {', '.join(map(str, files))} would have one name."
        raise gl.GravlensError(given, "A history is named by its file, or by its folder.", "files of other names.")
    return {name: gl.ModelSequence.from_toml(file) for name, file in zip(names, files, strict=True)}


def _measures(openings: list[str], compliances: list[str]) -> Any:
    usual = organisms.base.ENGLISH
    own: dict[str, Any] = {"refusals": tuple(openings), "markers": tuple(openings)} if openings else {}
    own |= {"compliances": tuple(compliances)} if compliances else {}
    return organisms.base.Measures(**{**vars(usual), **own})


def _work(name: str, history: "organisms.recorded.RecordedHistory") -> str:
    """Say what will be measured and trained, in this order."""
    recorded = sum(len(arm.recorded) for arm in history.arms)
    trained = {arm.name: n for arm in history.arms if (n := len({*arm.seeds} - {*arm.recorded}))}
    more = f", trains {sum(trained.values())} ({', '.join(trained)})" if trained else ""
    runs = f"{recorded} recorded run{'s' * (recorded != 1)} at steps {', '.join(map(str, history.save_steps))}{more}"
    return f"{name}: measures witness and anchor, then {runs}, then {history.draws} draws of weight noise and damage"
