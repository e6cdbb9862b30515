"""Mean and covariance that are summed up while states are read, against those of the states themselves."""

import numpy as np
import pytest
import tiny
from histories import refused

from gravlens.activations import reader as passes
from gravlens.activations.positions import Positions
from gravlens.activations.residuals import cache_residuals, residual_moments
from gravlens.history.sequence import ModelSequence
from gravlens.organisms.refusal_language import probe_prompts


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.TOKENS, "cpu", 30)


def sequence() -> ModelSequence:
    models = [tiny.llama(seed) for seed in range(3)]
    return ModelSequence.from_models(
        witness=models[0],
        anchor=models[1],
        runs={"a": {5: models[2]}},
        probes=probe_prompts()[:30],
        tokenizer=tiny.TOKENIZER,
    )


@pytest.mark.parametrize("positions", ["last", "instruction", "all", -2])
def test_mean_and_covariance_are_those_of_the_states(positions: Positions) -> None:
    seq = sequence()
    states = cache_residuals(seq, positions=positions).values.astype(np.float64)
    found = residual_moments(seq, positions=positions, reduce="covariance")
    assert found.rows == states.shape[1] and found.covariance is not None
    np.testing.assert_allclose(found.mean, states.mean(1), rtol=1e-6, atol=1e-6)
    for checkpoint in range(3):
        for layer in range(tiny.LAYERS):
            wanted = np.cov(states[checkpoint, :, layer], rowvar=False, bias=True)
            np.testing.assert_allclose(found.covariance[checkpoint, layer], wanted, rtol=1e-5, atol=1e-5 * wanted.max())


def test_the_mean_alone_is_the_same_and_names_what_it_was_made_from() -> None:
    seq = sequence()
    one, both = residual_moments(seq, layers=[1]), residual_moments(seq, reduce="covariance")
    assert one.covariance is None and one.layers == (1,) and one.checkpoints == ("witness", "anchor", "a/5")
    np.testing.assert_allclose(one.mean[:, 0], both.mean[:, 1], rtol=1e-12)
    wanted = cache_residuals(seq, layers=[1])
    assert (one.prompts, one.meta) == (wanted.prompts, wanted.meta)


def test_pitfall_10_a_covariance_far_from_the_origin_keeps_its_digits() -> None:
    """States that share a large part: sums of squares about 0 would lose their variance, in fp64 too."""
    seq, last = sequence(), [tiny.LAYERS - 1]
    for checkpoint in seq:
        checkpoint.source.model.layers[-1].register_forward_hook(lambda _, __, out: out + 1e5)  # pyright: ignore
    states = cache_residuals(seq, layers=last).values.astype(np.float64)
    found = residual_moments(seq, layers=last, reduce="covariance")
    wanted = np.cov(states[0, :, 0], rowvar=False, bias=True)
    assert found.covariance is not None and states.min() > 9e4
    np.testing.assert_allclose(found.covariance[0, 0], wanted, rtol=1e-6, atol=1e-8 * wanted.max())


def test_an_unknown_reduction_is_refused() -> None:
    with refused("median"):
        residual_moments(sequence(), reduce="median")  # pyright: ignore
