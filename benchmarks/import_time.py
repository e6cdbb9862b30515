"""python benchmarks/import_time.py

Seconds that a fresh interpreter takes to import torch, and to import on top of it what the Hugging Face path needs
(`locate_vrev`, `open_model`, `causal_effect`), and TransformerLens. CPU seconds, so
that other work on the machine hardly shows; the median of several interpreters.
"""

import json
import subprocess
import sys
from statistics import median

REPEATS = 3
IMPORTS = {
    "locate_vrev": "from gravlens.directions.vrev import locate_vrev",
    "open_model": "from gravlens.models.opening import open_model",
    "causal_effect": "from gravlens.interventions.effects import causal_effect",
    "TransformerLens' file": "import gravlens.models.lens",
}
TIMED = """
import json, time
start = time.process_time()
import torch
torch_there = time.process_time()
{code}
print(json.dumps([torch_there - start, time.process_time() - torch_there]))
"""


def measure(code: str) -> tuple[float, float]:
    """CPU seconds of torch, and of `code` after it."""
    command = [sys.executable, "-c", TIMED.format(code=code)]
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(REPEATS)]
    return median(first for first, _ in runs), median(then for _, then in runs)


if __name__ == "__main__":
    for name, code in IMPORTS.items():
        torch_seconds, seconds = measure(code)
        print(f"{name}: {seconds:.2f} s after torch ({torch_seconds:.2f} s)")
