"""One thread, no window, no hub, no bars: said before torch, matplotlib and transformers are imported."""

import os
import re
from functools import cache
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
for name in (
    "COLUMNS",
    "FORCE_COLOR",
    "PY_COLORS",
    "GITHUB_ACTIONS",
):  # rich and typer read them when they are imported
    os.environ.pop(name, None)

TRANSFORMER_LENS = re.compile("HookedTransformer|TransformerBridge|transformer_lens|hooked_transformer|bridge")


@cache
def names_transformer_lens(path: Path) -> bool:
    return TRANSFORMER_LENS.search(path.read_text(encoding="utf-8")) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests whose file names TransformerLens: they are run once more on its newest release."""
    for item in items:
        if names_transformer_lens(item.path):
            item.add_marker("transformer_lens")
