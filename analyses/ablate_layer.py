"""python analyses/ablate_layer.py SEQUENCE.toml --layer 12 --out results

Does ablating v_rev in the fine-tuned model bring refusal back? It is `gravlens ablate` by the name that it has among
the other questions of this folder: v_rev is located on the sequence's probes; the refusal log-odds is measured on its
held-out prompts, with and without v_rev, beside random directions ablated at the same layer. With `--out` it writes
ablate_layer.csv and ablate_layer.png.
"""

import typer

from gravlens.cli.interventions import ablate
from gravlens.cli.output import Script

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=Script)(ablate)

if __name__ == "__main__":
    app()
