"""python analyses/ablate_layer.py SEQUENCE.toml --layer 12 --out results

Does directional ablation of v_rev in the fine-tuned model bring refusal back? The same as `gravlens ablate`: v_rev is
located on the sequence's probes, and the refusal log-odds is measured on its held-out prompts, with and without v_rev
and with random directions ablated at the same layer. With `--out` it writes ablate_layer.csv and ablate_layer.png.
"""

import typer

from gravlens.cli.interventions import ablate
from gravlens.cli.output import Script

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=Script)(ablate)

if __name__ == "__main__":
    app()
