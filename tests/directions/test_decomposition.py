"""Where the motion goes: planted shares and pulls in closed form, and weights moved by a known amount."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from by_layer import stacked
from histories import between, moved, refused, synthetic
from scipy.optimize import lsq_linear
from torch import nn

from gravlens.activations.residuals import Residuals
from gravlens.directions.decomposition import ancestor_pull, split_drift, split_update
from gravlens.directions.direction import Direction, Directions, Subspace, Subspaces
from gravlens.directions.vrev import direction_from
from gravlens.history.sequence import Checkpoint

D, N = 24, 40
AXES = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0].T  # orthonormal rows
PAIRED = np.where(np.arange(N) % 2, 1.0, -1.0)[:, None]  # a spread over prompts whose mean is 0


def history(drifts: Mapping[str, Any], ancestors: Mapping[str, Any] | None = None, layers: int = 1) -> Residuals:
    """Planted drifts from a random anchor: name -> [d], [prompt, d] or [prompt, layer, d]."""
    anchor = np.random.default_rng(1).standard_normal((N, layers, D))

    def state(drift: Any) -> np.ndarray:
        drift = np.asarray(drift, dtype=float)
        return anchor + (drift if drift.ndim == 3 else np.atleast_2d(drift)[:, None])

    named = {"witness": 2 * AXES[0], **(ancestors or {}), **drifts}
    return synthetic({"anchor": anchor, **{name: state(drift) for name, drift in named.items()}})


def along(*vectors: np.ndarray) -> Directions:
    return Directions(tuple(direction_from(vector, layer=layer) for layer, vector in enumerate(vectors)))


def shares(table: pd.DataFrame, run: str = "a", step: int = 1, layer: int | None = 0) -> dict[str, float]:
    where = table["layer"].isna() if layer is None else table["layer"] == layer
    rows = table[(table["run"] == run) & (table["step"] == step) & where]
    return dict(zip(rows["part"], rows["share"], strict=True))


# -- the drift over directions -----------------------------------------------------------------------------------------


def test_planted_parts_have_their_shares() -> None:
    """The run's own component is one along which prompts move apart, so that the mean's last part is the rest."""
    drift = 3 * AXES[0] + 2 * AXES[1] + AXES[2] + 0.5 * AXES[3] + 20 * PAIRED * AXES[2]
    parts = {"v_rev": along(AXES[0]), "refusal": along(AXES[1])}
    table = stacked(split_drift(history({"a/1": drift}), parts, components=1))
    assert list(table.columns) == ["run", "step", "layer", "part", "share"]
    wanted = {"v_rev": 9, "refusal": 4, "top_components": 1, "rest": 0.25}
    assert shares(table) == pytest.approx({name: value / 14.25 for name, value in wanted.items()}, abs=2e-3)
    without = stacked(split_drift(history({"a/1": drift}), parts, components=0))
    assert shares(without) == pytest.approx({"v_rev": 9 / 14.25, "refusal": 4 / 14.25, "rest": 1.25 / 14.25}, abs=1e-6)


def test_what_two_parts_share_goes_to_the_first() -> None:
    oblique = (AXES[0] + AXES[1]) / np.sqrt(2)
    residuals = history({"a/1": AXES[0] + 3 * AXES[1] + AXES[2]})
    one, other = along(AXES[0]), along(oblique)
    first = shares(stacked(split_drift(residuals, {"v_rev": one, "refusal": other}, components=0)))
    assert first == pytest.approx({"v_rev": 1 / 11, "refusal": 9 / 11, "rest": 1 / 11}, abs=1e-6)
    last = shares(stacked(split_drift(residuals, {"refusal": other, "v_rev": one}, components=0)))
    assert list(last) == ["refusal", "v_rev", "rest"]
    assert last == pytest.approx({"refusal": 8 / 11, "v_rev": 2 / 11, "rest": 1 / 11}, abs=1e-6)


def test_shares_are_differences_of_least_squares_fits_and_sum_to_one() -> None:
    """Held against least squares on growing sets of vectors; components are eigenvectors of the summed squares."""
    rng = np.random.default_rng(2)
    drifts = {f"{run}/{step}": rng.standard_normal((N, 2, D)) + 1 for run in "ab" for step in (1, 5)}
    plane = Subspaces(tuple(Subspace(np.linalg.qr(rng.standard_normal((D, 2)))[0].T, k, 1.0) for k in (0, 1)))
    vs = along(rng.standard_normal(D), rng.standard_normal(D))
    residuals = history(drifts, layers=2)
    table = stacked(split_drift(residuals, {"v_rev": vs, "plane": plane}, components=2))
    sums = table.groupby(["run", "step", "layer"], dropna=False)["share"].sum()
    assert len(sums) == 12 and sums.to_numpy() == pytest.approx(1, abs=1e-12) and (table["share"] >= 0).all()
    for run, step, layer in (("a", 1, 0), ("a", 5, 1), ("b", 1, 1)):
        every = np.concatenate([(residuals.of(f"{run}/{s}") - residuals.of("anchor"))[:, layer] for s in (1, 5)])
        own = np.linalg.eigh(every.T.astype(float) @ every)[1].T[::-1][:2]
        drift = (residuals.of(f"{run}/{step}") - residuals.of("anchor"))[:, layer].astype(float).mean(0)
        left, vectors = [drift @ drift], np.empty((0, D))
        for span in (vs[layer].basis, plane[layer].basis, own):
            vectors = np.vstack([vectors, span])
            left.append(((drift - vectors.T @ np.linalg.lstsq(vectors.T, drift)[0]) ** 2).sum())
        wanted = np.array([*-np.diff(left), left[-1]]) / left[0]
        assert list(shares(table, run, step, layer).values()) == pytest.approx(wanted, abs=1e-5)
    by_layer = [shares(table, "b", 5, layer) for layer in (0, 1)]
    assert shares(table, "b", 5, None) == pytest.approx({k: (by_layer[0][k] + by_layer[1][k]) / 2 for k in by_layer[0]})


def test_a_run_has_its_own_components() -> None:
    drifts = {"a/1": AXES[4] + 9 * PAIRED * AXES[4], "b/1": AXES[4] + 9 * PAIRED * AXES[5]}
    table = stacked(split_drift(history(drifts), {"v_rev": along(AXES[0])}, components=1))
    assert shares(table, "a")["top_components"] == pytest.approx(1, abs=1e-6)
    assert shares(table, "b")["top_components"] < 0.02


def test_a_part_within_those_before_it_gets_nothing() -> None:
    residuals = history({"a/1": AXES[0] + AXES[1]})
    again = along(AXES[0] + 1e-5 * AXES[1])  # apart from v_rev by rounding only
    table = stacked(split_drift(residuals, {"v_rev": along(AXES[0]), "again": again}, components=1))
    assert shares(table) == pytest.approx({"v_rev": 0.5, "again": 0, "top_components": 0.5, "rest": 0}, abs=1e-6)


def test_no_drift_has_no_shares_and_leaves_the_other_steps_alone() -> None:
    table = stacked(
        split_drift(history({"a/0": 0 * AXES[0], "a/1": AXES[0], "b/0": 0 * AXES[0]}), {"v_rev": along(AXES[0])})
    )
    assert all(np.isnan(list(shares(table, run, 0).values())).all() for run in "ab")
    assert shares(table)["v_rev"] == pytest.approx(1, abs=1e-6)


def test_a_layer_without_a_part_is_left_out_or_refused_where_it_was_asked_for() -> None:
    undefined = Direction(np.full(D, np.nan), 0, 0.0, undefined="no difference")
    vs = Directions((undefined, direction_from(AXES[0], layer=1)))
    residuals = history({"a/1": np.tile(AXES[0], (N, 2, 1))}, layers=2)
    assert set(split_drift(residuals, {"v_rev": vs}).table["layer"]) == {1}
    for layers, named in (([0], "v_rev is undefined at layer 0"), ([7], "no layer 7")):
        with refused(named):
            split_drift(residuals, {"v_rev": vs}, layers=layers)
    with refused("v_rev is undefined"):
        split_drift(residuals, {"v_rev": Directions((undefined,))})


def test_what_cannot_be_split_is_refused() -> None:
    vs = {"v_rev": along(AXES[0])}
    with refused("no run"):
        split_drift(history({}), vs)
    for name in ("rest", "top_components"):
        with refused(name):
            split_drift(history({"a/1": AXES[0]}), {name: along(AXES[0])})
    with refused("25 components"):
        split_drift(history({"a/1": AXES[0]}), vs, components=25)


# -- the drift over ancestors ------------------------------------------------------------------------------------------

ANCESTORS = {"older": 3 * AXES[1] + AXES[0], "other": -AXES[3] + AXES[1]}
NAMES = ["witness", "older", "other"]


def pulls(table: pd.DataFrame, column: str = "coefficient", layer: int | None = 0) -> list[float]:
    return table[table["layer"].isna() if layer is None else table["layer"] == layer][column].tolist()


def test_planted_pulls_are_recovered_and_explain_all() -> None:
    drift = 0.3 * 2 * AXES[0] + 0.2 * ANCESTORS["older"] + 0.7 * ANCESTORS["other"]
    table = stacked(ancestor_pull(history({"a/1": drift}, ANCESTORS), NAMES))
    wanted = ["run", "step", "layer", "witness", "coefficient", "explained", "condition"]
    assert list(table.columns) == wanted and table["witness"].tolist() == NAMES * 2
    assert pulls(table) == pytest.approx([0.3, 0.2, 0.7], abs=1e-5)
    assert pulls(table, "explained") == pytest.approx([1] * 3, abs=1e-5)


def test_an_ancestor_that_it_leads_away_from_gets_nothing() -> None:
    ancestors = {"away": -4 * AXES[2]}
    table = stacked(ancestor_pull(history({"a/1": AXES[0] + AXES[2]}, ancestors), ["witness", "away"]))
    assert pulls(table) == pytest.approx([0.5, 0], abs=1e-6) and pulls(table)[1] == 0
    assert pulls(table, "explained") == pytest.approx([0.5] * 2, abs=1e-6)
    alone = stacked(ancestor_pull(history({"a/1": AXES[2]}, ancestors), ["away"]))
    assert pulls(alone) == [0] and pulls(alone, "explained") == pytest.approx([0], abs=1e-6)


def test_it_is_bounded_least_squares_at_every_step_and_layer() -> None:
    rng = np.random.default_rng(3)
    drifts = {f"a/{step}": rng.standard_normal((N, 2, D)) + rng.standard_normal(D) for step in (1, 5)}
    ancestors = {name: rng.standard_normal((N, 2, D)) + rng.standard_normal(D) for name in ("older", "other")}
    residuals = history(drifts, ancestors, layers=2)
    table = stacked(ancestor_pull(residuals, NAMES))
    mean = {name: (residuals.of(name) - residuals.of("anchor")).astype(float).mean(0) for name in (*NAMES, *drifts)}
    for step in (1, 5):
        for layer in (0, 1):
            ways = np.stack([mean[name][layer] for name in NAMES])
            fit = lsq_linear(ways.T, mean[f"a/{step}"][layer], bounds=(0, np.inf), tol=1e-12)
            rows = table[(table["step"] == step) & (table["layer"] == layer)]
            assert rows["coefficient"].to_numpy() == pytest.approx(fit.x, abs=1e-5)
            explained = 1 - 2 * fit.cost / (mean[f"a/{step}"][layer] ** 2).sum()
            assert rows["explained"].to_numpy() == pytest.approx(explained, abs=1e-5)
        by_layer = table[(table["step"] == step) & table["layer"].notna()].groupby("witness")[["coefficient"]].mean()
        mean_rows = table[(table["step"] == step) & table["layer"].isna()].set_index("witness")
        assert by_layer["coefficient"].to_dict() == pytest.approx(mean_rows["coefficient"].to_dict())
        assert mean_rows["condition"].max() == table["condition"].max()


@pytest.mark.parametrize("angle", [90.0, 20.0, 1.0])
def test_collinear_ancestors_show_in_the_condition_number_and_only_their_sum_holds(angle: float) -> None:
    """Two unit vectors of cosine c: condition √((1 + c)/(1 − c)); their own lengths play no part in it."""
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    twin = {"twin": 2 * (cosine * AXES[0] + sine * AXES[1])}
    for noise in (-0.05, 0.05):
        drift = AXES[0] * (1 + cosine) + AXES[1] * sine + noise * AXES[1]
        table = stacked(ancestor_pull(history({"a/1": drift}, twin), ["witness", "twin"]))
        assert pulls(table, "condition") == pytest.approx([np.sqrt((1 + cosine) / (1 - cosine))] * 2, rel=1e-3)
        assert sum(pulls(table)) == pytest.approx(1, abs=0.1)
        if angle == 1.0:  # the same drift but for 3 %: all of it is one's or the other's
            assert pulls(table) == pytest.approx([0, 1] if noise > 0 else [1, 0], abs=0.02)
        else:
            assert pulls(table) == pytest.approx([0.5, 0.5], abs=0.08)


def test_no_drift_is_not_explained_and_bad_witnesses_are_refused() -> None:
    residuals = history({"a/0": 0 * AXES[0]}, {"same": 0 * AXES[0]})
    table = stacked(ancestor_pull(residuals, ["witness"]))
    assert pulls(table) == [0] and np.isnan(pulls(table, "explained")).all()
    for witnesses, named in (([], "[]"), (["witness"] * 2, "witness"), (["nobody"], "nobody"), (["same"], "same")):
        with refused(named):
            ancestor_pull(residuals, witnesses)
    with refused("no run"):
        ancestor_pull(history({}), ["witness"])


# -- the update over the weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """An anchor, and a witness apart from it in every weight, also in the norms' (which are all 1 at first)."""
    anchor, generator = tiny.llama(0), torch.Generator().manual_seed(1)
    witness = copy.deepcopy(anchor)
    with torch.no_grad():
        for weight in witness.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return anchor, witness


def checkpoints(**models: nn.Module) -> Iterator[Checkpoint]:
    for name, model in models.items():
        yield Checkpoint(f"a/{name.removeprefix('s')}", model, int(name.removeprefix("s")))


def ends(pair: tuple[nn.Module, nn.Module]) -> tuple[Checkpoint, Checkpoint]:
    return Checkpoint("anchor", pair[0]), Checkpoint("witness", pair[1])


@pytest.mark.parametrize("way", [0.25, -0.5, 1.0])
def test_part_of_the_way_is_that_fraction_of_every_tensor(pair: tuple[nn.Module, nn.Module], way: float) -> None:
    table = split_update(*ends(pair), checkpoints(s20=between(*pair, way)))
    tensors = ["all", *dict(pair[0].named_parameters())]
    columns = ["cosine", "fraction", "share_parallel", "share_orthogonal", "norm"]
    assert list(table.columns) == ["checkpoint", "step", "tensor", *columns] and table["tensor"].tolist() == tensors
    assert set(table["checkpoint"]) == {"a/20"} and set(table["step"]) == {20}
    assert table["fraction"].to_numpy() == pytest.approx(way, abs=1e-5)
    assert table["cosine"].to_numpy() == pytest.approx(np.sign(way), abs=1e-6)
    assert table["share_parallel"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert table["share_orthogonal"].to_numpy() == pytest.approx(0, abs=1e-6)


def test_any_update_against_numpy_on_all_weights(pair: tuple[nn.Module, nn.Module]) -> None:
    models = {"s1": moved(pair[0], seed=5, by=0.1), "s20": moved(between(*pair, 0.5), seed=6, by=0.1)}
    table = split_update(*ends(pair), checkpoints(**models))
    flat = [np.concatenate([p.detach().double().numpy().ravel() for p in m.parameters()]) for m in pair]
    for name, model in models.items():
        vector = np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()]) - flat[0]
        task = flat[1] - flat[0]
        row = table[(table["step"] == int(name[1:])) & (table["tensor"] == "all")].iloc[0]
        cosine = vector @ task / np.linalg.norm(vector) / np.linalg.norm(task)
        along_it = (vector @ task) / (task @ task)
        across = vector - along_it * task
        assert row["cosine"] == pytest.approx(cosine, abs=1e-6) and row["fraction"] == pytest.approx(along_it, abs=1e-6)
        assert row["norm"] == pytest.approx(np.linalg.norm(vector), rel=1e-6)
        assert row["share_orthogonal"] == pytest.approx((across @ across) / (vector @ vector), abs=1e-6)
        assert row["share_parallel"] == pytest.approx(cosine**2, abs=1e-6)
    noise, mixed = (table[(table["step"] == s) & (table["tensor"] == "all")]["share_parallel"].item() for s in (1, 20))
    assert noise < 0.01 < 0.1 < mixed


def test_a_tensor_without_a_task_vector_or_an_update_has_no_cosine(pair: tuple[nn.Module, nn.Module]) -> None:
    anchor, witness = pair[0], copy.deepcopy(pair[0])
    name, other = "model.norm.weight", "lm_head.weight"
    tuned = copy.deepcopy(anchor)
    with torch.no_grad():
        witness.get_parameter(name).mul_(2)
        tuned.get_parameter(other).mul_(2)
    table: Any = split_update(*ends((anchor, witness)), checkpoints(s1=tuned)).set_index("tensor")
    assert table.loc[[name, other], ["cosine", "share_parallel", "share_orthogonal"]].isna().to_numpy().all()
    assert table.loc["all", "cosine"] == 0 and table.loc["all", "share_orthogonal"] == 1
    assert table.loc[name, "fraction"] == 0 and np.isnan(table.loc[other, "fraction"])


def test_folders_are_swapped_into_one_model(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"anchor": pair[0], "witness": pair[1], "s1": between(*pair, 0.1), "s2": between(*pair, 0.6)}
    found = [Checkpoint(name, tiny.save(model, tmp_path / name), None) for name, model in models.items()]
    from_memory = split_update(*ends(pair), checkpoints(s1=models["s1"], s2=models["s2"]))
    opened = []
    monkeypatch.setattr("gravlens.models.opening.load_huggingface", tiny.spied(opened))
    on_disk = split_update(found[0], found[1], found[2:])
    assert len(opened) == 1  # one model, however many checkpoints
    numbers = ["cosine", "fraction", "share_parallel", "norm"]
    assert on_disk[numbers].to_numpy() == pytest.approx(from_memory[numbers].to_numpy(), abs=1e-6)
    assert on_disk["checkpoint"].unique().tolist() == ["s1", "s2"] and on_disk["step"].isna().all()


def test_other_models_are_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    anchor, witness = ends(pair)
    for model, named in ((tiny.llama(intermediate_size=64), "another"), (tiny.gpt2(), "GPT2LMHeadModel")):
        with refused("a/1", named):
            split_update(anchor, witness, checkpoints(s1=model))
        with refused("witness", named):
            split_update(anchor, Checkpoint("witness", model), [])
    with refused("HookedTransformer"):
        split_update(Checkpoint("anchor", tiny.hooked_transformer()), witness, [])
    with refused("No checkpoint"):
        split_update(anchor, witness, [])
