"""The one exception, and the one layer number."""

import pickle

import numpy as np
import pytest
from histories import refused

from gravlens.core.errors import GravlensError, check_layer, said


def test_an_error_says_given_wanted_and_what_to_try() -> None:
    error = GravlensError("A cat was given.", "A dog is needed.", "bark.")
    assert str(error) == "A cat was given. A dog is needed. Try: bark."
    assert isinstance(error, ValueError)


def test_an_error_survives_the_way_back_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(GravlensError("given", "wanted", "remedy")))
    assert (error.given, error.wanted, error.remedy) == ("given", "wanted", "remedy")
    assert str(error) == "given wanted Try: remedy"


@pytest.mark.parametrize("layer", [0, 2, np.int64(1)])
def test_layers_count_from_0_to_the_last(layer: int) -> None:
    assert check_layer(layer, 3) == layer and type(check_layer(layer, 3)) is int


@pytest.mark.parametrize("layer", [-1, 3, True, 1.0, "1", None])
def test_any_other_layer_is_an_error_that_names_the_range(layer: object) -> None:
    with refused(f"Layer {layer!r}"):
        check_layer(layer, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GravlensError, match="from 0 to 2"):
        check_layer(layer, 3)  # pyright: ignore[reportArgumentType]


GATED = (
    "401 Client Error. (Request ID: Root=1-0-0)\n\nCannot access gated repo for url https://hub.invalid/owner/name.\n"
    "Access to model owner/name is restricted. You must have access to it and be authenticated to access it. "
    "Please log in."
)


@pytest.mark.parametrize(
    ("message", "kept", "dropped"),
    [
        (GATED, ["Cannot access gated repo", "restricted", "Please log in"], "Request ID"),
        (
            "Error(s) in loading state_dict for X:\n\tsize mismatch for a.weight: 3 and 4.",
            ["size mismatch for a"],
            "\n",
        ),
        (
            "\nX requires the sentencepiece library.\nSee its page.\n pip install it.",
            ["X requires", "pip install"],
            "page",
        ),
        ("one\ntwo", ["one"], "two"),
        ("401 Client Error.", ["401"], "\n"),
        ("", ["OSError"], "\n"),
    ],
)
def test_what_matters_of_another_programs_message_is_kept_on_one_line(
    message: str, kept: list[str], dropped: str
) -> None:
    found = said(OSError(message))
    assert all(part in found for part in kept) and dropped not in found
    assert len(said(OSError("x" * 9999))) < 500 and said(KeyError("a.weight")) == "there is no 'a.weight'"
