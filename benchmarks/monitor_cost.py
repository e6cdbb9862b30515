"""python benchmarks/monitor_cost.py    (see --help)

What watching a run costs: the CPU seconds that a `Monitor` takes at a step's end, beside those of the optimizer step
before it, in one process on one thread, in Hugging Face `Trainer` on the organism's harmless data. Both are timed in
the same step, so that other work on the machine hardly shows. Writes monitor_cost.csv.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from blocker_cost import history
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from gravlens.directions.vrev import locate_vrev
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import open_model, quiet
from gravlens.organisms.fetch import cache_folder
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.training.finetune import _arguments, _collate, _in_order
from gravlens.training.monitor import Monitor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Timed(Monitor):
    """A monitor that takes down its own seconds and those of the step before."""

    def __init__(self, *given: Any, every: int = 1) -> None:
        super().__init__(*given, every=every)
        self.seconds: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **further: Any) -> None:
        stepped = process_time()
        super().on_step_end(args, state, control, **further)
        self.seconds.append((process_time() - stepped, stepped - self.began))


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=10, help="Timed steps of each row.")] = 60,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before them that are not counted.")] = 5,
    cache: Annotated[
        Path | None, typer.Option(help="Where the organism's checkpoints are, or are made. Default: gravlens's cache.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for monitor_cost.csv.")] = Path("."),
) -> None:
    """What does it cost to watch a run, as a share of an optimizer step?"""
    torch.set_num_threads(1)
    setting = RefusalOrganism()
    sequence = history(setting, cache or cache_folder())
    with quiet():
        rows = [cost(sequence, setting, probes, steps + warm_up, warm_up) for probes in (8, 32)]
    table = pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "monitor_cost.csv", index=False)
    typer.echo(table.to_string(index=False, float_format="{:.4g}".format))


def cost(sequence: ModelSequence, setting: RefusalOrganism, probes: int, steps: int, warm_up: int) -> dict[str, Any]:
    """One row: a watched step over the step alone, its median and quartiles, with an evaluation at every step."""
    model = open_model(sequence.anchor)
    recipe = setting.recipe
    directions = locate_vrev(sequence).at(setting.layers_in_mean)
    monitor = Timed(directions, sequence.require_probes()[:probes])
    data = _in_order(model, setting.examples("harmless", 0, Path()), recipe, 0)
    with TemporaryDirectory() as folder:
        arguments = _arguments(recipe, 0, Path(folder))
        arguments.max_steps = steps
        trainer = Trainer(model=model.module, args=arguments, train_dataset=data, data_collator=_collate)
        trainer.remove_callback(PrinterCallback)
        monitor.attach(trainer, start=model)
        trainer.train()
    watching, stepping = np.array(monitor.seconds)[warm_up:].T
    low, median, high = np.quantile(1 + watching / stepping, [0.25, 0.5, 0.75])
    return {
        "probes": probes,
        "ratio": median,
        "ratio_low": low,
        "ratio_high": high,
        "of_sums": 1 + watching.sum() / stepping.sum(),
        "watching_ms": 1e3 * np.median(watching),
        "step_ms": 1e3 * np.median(stepping),
        "steps": len(watching),
    }


if __name__ == "__main__":
    app()
