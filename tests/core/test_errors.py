"""The one exception, and the one layer number."""

import pickle

import numpy as np
import pytest
from histories import refused

from gravlens.core.errors import GravlensError, check_layer


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
