"""A mean over layers says which it is over, and why another is not among them."""

import json
from pathlib import Path

from test_cli import gravlens, history

__all__ = ["history"]  # a fixture


def test_a_layer_without_v_rev_is_told_of_beside_the_mean(history: Path) -> None:
    told = json.loads(gravlens("trajectory", history / "SEQUENCE.toml", "--json").stdout)
    assert told["layers"] == [1, 2] and told["undefined"].keys() == {"0"}
    assert "witness and anchor differ by 0" in told["undefined"]["0"]
    shown = " ".join(gravlens("trajectory", history / "SEQUENCE.toml").stdout.split())
    assert "mean over layers 1, 2" in shown and "layer 0 is undefined: witness and anchor" in shown
    assert (
        json.loads(gravlens("trajectory", history / "SEQUENCE.toml", "--layer", "1", "--json").stdout)["undefined"]
        == {}
    )
