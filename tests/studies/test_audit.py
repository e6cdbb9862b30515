"""The main job on a small organism: its tables against numbers worked out anew, its results folder, its verdicts."""

import base64
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small
from histories import reference, refused
from scipy import stats
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gravlens.cli import app
from gravlens.core.display import number
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.trajectory import Trajectory
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import load_tokenizer
from gravlens.organisms.base import Organism
from gravlens.stats.nulls import isotropic_quantile
from gravlens.studies import experiment
from gravlens.studies.audit import audit, environment, spread, summarise
from gravlens.studies.evidence import TOGETHER, Findings, final_rows, findings_of
from gravlens.studies.study import Study

pytestmark = pytest.mark.long

SPREAD = {"mean", "sem", "runs"}
FINALS = {"alignment_final", "fraction_final"}
BEHAVIOR = {"compliance_rate", "cut_share", "refusal_log_odds", "over_refusal"}
COST = {"task_loss", "seconds_per_step"}
CONTROLS = {"stranger", "sibling_anchor", "unaligned_twin", "continued_alignment"}
ENDS = ("mean", "low", "high")
WITHOUT = {"stranger", "sibling_anchor"}  # what one refusal organism has not
ARMS = {"unblocked", "penalty", "penalty_margin", "clamp", "clamp_random", "reinforce"}
ARMS |= {"rehearsal", "lower_rate", "released_at_20"}
NULLS = {"isotropic", "weight_noise", "covariance_of_states", "covariance_of_drifts"}
NULLS |= {"sign_flips", "swapped_labels", "harmless", "shuffled_words"}


@dataclass
class Done:
    """What `audit` left, and what it was asked."""

    out: Path
    study: Study
    returned: dict[str, Any]
    results: dict[str, Any]

    @property
    def home(self) -> Path:
        return self.study.home

    @property
    def organism(self) -> Organism:
        return self.study.organism

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.out / f"{name}.csv")


def done(root: Path, made: Organism, *, workers: int = 1) -> Done:
    """`audit`, asked by paths relative to where one stands, as at a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        returned = audit({"one": made}, Path("results"), cache=Path("cache"), workers=workers)
    results = json.loads((root / "results" / "results.json").read_text(), parse_constant=not_json)
    return Done(root / "results", Study.at(made, root / "cache"), returned, results)


def not_json(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Made by a worker process, as ever."""
    return done(tmp_path_factory.mktemp("organism"), small.Short(**small.PLAN))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The real model's organism on a tiny folder, made in this process."""
    root = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "processes", small.inline)
        return done(root, small.pretrained(root / "user"))


@pytest.fixture(params=["organism", "pretrained"])
def each(request: pytest.FixtureRequest) -> Done:
    return request.getfixturevalue(request.param)


# -- results.json ------------------------------------------------------------------------------------------------------


def spreads(table: Mapping[str, Any], names: set[str], runs: int) -> None:
    assert set(table) == names
    for one in table.values():
        assert set(one) == SPREAD and len(one["runs"]) == runs
        values = [value for value in one["runs"] if value is not None]
        assert one["mean"] == (pytest.approx(np.mean(values)) if values else None)
        assert one["sem"] == (pytest.approx(stats.sem(values)) if len(values) > 1 else None)


def test_the_plane_shows_every_run_where_the_trajectory_has_it(each: Done) -> None:
    """`along` is the fraction in trajectory.csv at the layer of the largest final alignment; the anchor is 0."""
    table, followed = each.table("plane"), each.table("trajectory")
    held_out = followed[(followed.prompts == "held_out") & followed.layer.isin(each.organism.layers_in_mean)]
    unblocked = held_out[(held_out.arm == "unblocked") & (held_out.step == held_out.step.max())]
    layer = unblocked.groupby("layer").alignment.mean().idxmax()
    assert set(table.layer) == {layer} and 0 < table.across_share.unique().item() <= 1
    rows = held_out[(held_out.layer == layer) & held_out.arm.isin(table.arm.dropna())].set_index(["arm", "run", "step"])
    placed = table[table.kind == "run"].set_index(["arm", "run", "step"])
    assert set(placed.index) == set(rows.index) and len(placed) == len(rows)
    assert placed.along.to_numpy() == pytest.approx(rows.fraction.reindex(placed.index).to_numpy(), abs=1e-5)
    starts = {arm.name: arm.start for arm in each.organism.arms}
    assert set(table.arm.dropna()) == {name for name, start in starts.items() if start == "anchor"}
    ends = table.set_index("checkpoint")
    assert ends.loc["anchor", ["along", "across"]].tolist() == [0, 0]
    assert not table.checkpoint.str.startswith("stranger").any()


def test_the_command_is_told_where_there_was_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/gravlens", "audit", "a b/SEQUENCE.toml", "--quick"])
    assert environment(small.organism(), {})["command"] == "gravlens audit 'a b/SEQUENCE.toml' --quick"
    monkeypatch.setattr("sys.argv", ["/opt/ipykernel_launcher.py", "-f", "/private/kernel.json"])
    assert environment(small.organism(), {})["command"] is None, "that of another program"


def test_v_rev_is_shown_with_and_without_its_largest_dimensions(organism: Done) -> None:
    """By numpy on the states themselves, and on the page."""
    study, rows = organism.study, organism.table("vrev")
    given, held_out = study.states("measured", "probes"), study.run_states(study.unblocked, "held_out")
    for row in rows.to_dict("records"):
        at = given.layers.index(row["layer"])
        difference = (given.of("witness") - given.of("anchor")).astype(np.float64)[:, at].mean(0)
        order = np.argsort(-np.abs(difference))
        squares = difference**2 / np.sum(difference**2)
        assert row["top_1"] == pytest.approx(squares[order[0]], rel=1e-4)
        assert row["top_3"] == pytest.approx(squares[order[:3]].sum(), rel=1e-4)
        for column, left in (("alignment_final", order), ("alignment_without_top_3", order[3:])):
            cosines = []
            for run, steps in held_out.runs.items():
                drift = (held_out.of(f"{run}/{steps[-1]}") - held_out.of("anchor")).astype(np.float64)[:, at].mean(0)
                cosine = drift[left] @ difference[left]
                cosines.append(cosine / np.linalg.norm(drift[left]) / np.linalg.norm(difference[left]))
            assert row[column] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert len(organism.results["vrev"]) == len(rows) == 3
    assert "v_rev by layer" in (organism.out / "report.html").read_text()


def test_results_hold_what_is_documented(organism: Done) -> None:
    found, runs = organism.results, 2
    documented = {"schema_version", "setting", "n_anchors", "seeds", "layers", "layers_in_mean", "alignment", "summary"}
    documented |= {"nulls", "controls", "arms", "history", "environment"}
    documented |= {"organisms", "claims", "effects", "missing", "interval", "damage", "vrev", "revised"}
    assert set(found) == documented
    assert (found["schema_version"], found["setting"], found["n_anchors"]) == (3, "refusal", 1)
    assert (found["organisms"], found["seeds"]) == (["one"], [0, 1])
    assert (found["layers"], found["layers_in_mean"]) == ([0, 1, 2], [0, 1])
    columns = {"run", "step", "layer", "prompts", "alignment", "projection", "fraction", "drift_norm"}
    assert all(set(row) == columns for row in found["alignment"])
    keys = {(row["run"], row["step"], row["layer"], row["prompts"]) for row in found["alignment"]}
    assert keys == {
        (run, step, layer, prompts)
        for run in ("one/unblocked-0", "one/unblocked-1")
        for step in (1, 20)
        for layer in (None, 0, 1, 2)
        for prompts in ("given", "held_out")
    }
    assert len(found["alignment"]) == len(keys)
    assert set(found["summary"]) == {"first_step", "step_20", "final"}
    for step in found["summary"].values():
        spreads(step, {"alignment", "fraction"}, runs)
    assert set(found["nulls"]) == NULLS
    for name, null in found["nulls"].items():
        assert set(null) == {"p99", "p99_by_step", "n_pairs", "n_above"}
        pairs = {"sign_flips": 2, "covariance_of_drifts": 2}  # of the mean over runs; at the last step alone
        assert null["n_pairs"] == pairs.get(name, 4)
        assert set(null["p99_by_step"]) == ({"20"} if name == "covariance_of_drifts" else {"1", "20"}) and null[
            "p99"
        ] == max(null["p99_by_step"].values())
    assert set(found["controls"]) == CONTROLS
    for name, control in found["controls"].items():
        assert (control is None) == (name in WITHOUT), "one organism has no stranger, and none has a sibling"
        if control is not None:
            spreads(control, FINALS | ({"closure_final"} if name == "unaligned_twin" else set()), 1)
    assert set(found["arms"]) == ARMS
    once = ("penalty", "penalty_margin", "reinforce", "rehearsal", "lower_rate", "released_at_20")
    single = {**dict.fromkeys(once, 1), "clamp_random": 8}
    for name, arm in found["arms"].items():
        spreads(arm, FINALS | BEHAVIOR | COST, single.get(name, runs))
    assert set(found["history"]) == {"witness", "anchor"}
    for checkpoint in found["history"].values():
        spreads(checkpoint, BEHAVIOR, 1)
    (claim,) = found["claims"]
    assert set(claim) == {"organism", "level", "statement", "setting", "sentence", "capped_by", "demands"}
    assert "preregistered (" in claim["setting"] and found["missing"] == []
    effects = {row["effect"] for row in found["effects"]}
    assert effects == {"alignment", "fraction", "harm of the anchor", "harm", "harm, blocked", "harm, random"}
    assert all(set(demand) == {"level", "name", "holds", "figures"} for demand in claim["demands"])
    assert {row["measure"] for row in found["interval"]} == {"alignment", "fraction"}
    assert all(row["low"] <= row["estimate"] <= row["high"] for row in found["interval"])
    assert found["damage"][0]["damage"] == "none" and len(found["damage"]) == 5


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float | None]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(item, f"{path}/{key}")
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, path)
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value


def test_every_number_is_finite_and_what_is_missing_has_a_reason(each: Done) -> None:
    for row in each.results["effects"]:
        # answers that are all nonsense have no rate; one run has no interval
        assert row["mean"] is not None or row["effect"].startswith("harm"), row
        assert row["low"] is not None or row["n"] < 2 or row["effect"].startswith("harm"), row
        assert (row["low"] is None) == (row["high"] is None) and all(math.isfinite(row[x] or 0) for x in ENDS), row
    for path, value in numbers({**each.results, "effects": []}):
        if value is not None:
            assert math.isfinite(value), path
        elif not path.endswith(("/sem", "/layer")):
            # a tiny model may say nothing but nonsense, which is counted apart; steps and arms may be absent
            absent = "/summary/step_20" in path or path.startswith(("/arms/", "/controls/", "/interval/"))
            if path == "/damage/alignment":  # of no drift
                continue
            if path in {f"/controls/{name}" for name in WITHOUT} and each.organism.name == "refusal":
                continue
            # a call in Python has no command
            assert re.search("compliance_rate|cut_share|over_refusal|holds|^/environment/command$", path) or (
                absent and each.organism.name == "pretrained"
            ), path


def test_what_is_returned_is_what_is_written(each: Done) -> None:
    def plain(value: Any) -> Any:
        return json.loads(json.dumps(value), parse_constant=lambda _: None)

    assert plain(each.returned) == each.results


def test_the_environment_is_this_one(each: Done) -> None:
    found = each.results["environment"]
    for package in ("torch", "transformers", "transformer-lens", "numpy", "scipy"):
        assert found[package] == importlib.metadata.version(package)
    assert found["threads"] == 1 and set(found["seconds"]) >= {"make and measure", "judge"}


# -- the tables, worked out anew ---------------------------------------------------------------------------------------


def means(each: Done, folder: Path) -> np.ndarray:
    """Hugging Face's own mean states [layer, d_model] on the held-out prompts, for all layers but the last."""
    sequence = ModelSequence.from_toml(each.out / "SEQUENCE.toml")
    ids = encode(load_tokenizer(folder), sequence.held_out or sequence.require_probes())
    return reference(AutoModelForCausalLM.from_pretrained(folder), ids, range(2)).double().mean(0).numpy()


def test_alignment_is_that_of_the_checkpoints_on_disk(each: Done) -> None:
    last = each.organism.save_steps[-1]
    vs = locate_vrev(each.study.states("measured", "probes"))
    anchor = means(each, each.home / "anchor")
    drift = means(each, each.home / f"runs/unblocked/seed0/checkpoint-{last}") - anchor
    projection = np.sum(drift * vs.vectors[:2], axis=1)
    rows = {
        row["layer"]: row
        for row in each.results["alignment"]
        if (row["run"], row["step"], row["prompts"]) == ("one/unblocked-0", last, "held_out")
    }
    for layer in (0, 1):
        length = np.linalg.norm(drift[layer])
        wanted = [projection[layer] / length, projection[layer], projection[layer] / vs[layer].distance, length]
        found = [rows[layer][name] for name in ("alignment", "projection", "fraction", "drift_norm")]
        assert found == pytest.approx(wanted, rel=2e-3, abs=1e-4)
    for name in ("alignment", "fraction"):
        assert rows[None][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)
        assert each.results["summary"]["final"][name]["runs"][0] == pytest.approx(rows[None][name])


def mean_states(each: Done, part: str, name: str, prompts: str = "held_out") -> np.ndarray:
    return each.study.states(part, prompts).of(name).mean(0, dtype=np.float64)[:2]


def finals(drift: np.ndarray, towards: np.ndarray) -> dict[str, float]:
    distance = np.linalg.norm(towards, axis=1)
    along = np.sum(drift * towards, axis=1) / distance
    return {
        "alignment_final": float(np.mean(along / np.linalg.norm(drift, axis=1))),
        "fraction_final": float(np.mean(along / distance)),
    }


def test_controls_and_arms_are_the_same_measurement_with_one_thing_exchanged(each: Done) -> None:
    last = each.organism.save_steps[-1]
    given = {name: mean_states(each, "measured", name, "probes") for name in each.organism.checkpoints}
    held_out = {name: mean_states(each, "measured", name) for name in each.organism.checkpoints}
    v_rev = given["witness"] - given["anchor"]
    ends = {arm.name: mean_states(each, f"runs/{arm.name}/seed0", f"{arm.name}-0/{last}") for arm in each.organism.arms}
    free = ends["unblocked"] - held_out["anchor"]
    siblings = [finals(free, given["witness"] - given[name]) for name in given if name.startswith("sibling_anchor")]
    wanted = {"unaligned_twin": finals(ends["unaligned_twin"] - held_out["witness"], v_rev)}
    if siblings:
        wanted["sibling_anchor"] = {key: float(np.mean([one[key] for one in siblings])) for key in siblings[0]}
    if "continued_alignment" in ends:
        wanted["continued_alignment"] = finals(ends["continued_alignment"] - held_out["anchor"], v_rev)
    apart = ends["unaligned_twin"] - ends["unblocked"]
    closed = 1 - np.sum(apart * v_rev, axis=1) / np.linalg.norm(v_rev, axis=1) ** 2
    wanted["unaligned_twin"]["closure_final"] = float(closed.mean())
    found = {name: control for name, control in each.results["controls"].items() if control is not None}
    assert {n: {k: one["runs"][0] for k, one in control.items()} for n, control in found.items()} == {
        name: pytest.approx(values, rel=1e-3, abs=1e-4) for name, values in wanted.items()
    }
    arms = {name: arm for name, arm in each.results["arms"].items() if arm is not None}
    for name, arm in arms.items():
        if name == "clamp_random":  # of all random directions together
            assert len(arm["fraction_final"]["runs"]) == 2 * each.organism.random_directions  # pyright: ignore
            continue
        assert {k: arm[k]["runs"][0] for k in FINALS} == pytest.approx(
            finals(ends[name] - held_out["anchor"], v_rev), rel=1e-3, abs=1e-4
        )


def test_arms_hold_the_behaviour_that_was_measured_at_the_last_step(each: Done) -> None:
    last = str(each.organism.save_steps[-1])
    arms, behavior = each.table("arms"), each.table("behavior")
    assert arms.arm.unique().tolist() == [arm.name for arm in each.organism.arms]
    for row in arms.to_dict("records"):
        facts = json.loads((each.home / f"runs/{row['arm']}/seed{row['seed']}/run.json").read_text())
        log = pd.read_csv(each.home / f"runs/{row['arm']}/seed{row['seed']}/log.csv")
        assert row["seconds_per_step"] == pytest.approx(facts["seconds_per_step"])
        assert row["blocker_norm"] == pytest.approx(log.blocker_norm.mean())
        blocked = row["arm"].startswith(("penalty", "clamp", "reinforce", "released", "rehearsal"))
        assert row["blocker_norm"] >= 0 if blocked else row["blocker_norm"] == 0
        for name in ("compliance_rate", "refusal_log_odds", "over_refusal", "task_loss", "two_sided_log_odds", "empty"):
            wanted = facts["behavior"][last][name]
            assert row[name] == pytest.approx(math.nan if wanted is None else wanted, nan_ok=True)
    assert (arms[arms.arm == "penalty"].blocker_norm > 0).all()
    history = behavior[behavior.arm == "history"].set_index("run")
    measured = json.loads((each.home / "measured/behavior.json").read_text())
    assert set(history.index) == {"witness", "anchor"}
    assert history.task_loss["anchor"] == pytest.approx(measured["anchor"]["task_loss"])
    assert history.refusal_log_odds["witness"] == each.results["history"]["witness"]["refusal_log_odds"]["runs"][0]
    assert "answers" not in behavior.columns


def test_nulls_are_of_their_own_draws(each: Done) -> None:
    nulls, means, made = each.table("nulls"), each.table("nulls_layer_mean"), each.organism
    isotropic = nulls[nulls.null == "isotropic"]
    assert isotropic.p99.to_numpy() == pytest.approx(isotropic_quantile(0.99, 32), rel=0.05)
    for step, draws in made.noise.items():
        cosines = each.study.noise(step)[0][:, 0]
        assert len(cosines) == draws
        rows = pd.concat([nulls, means])
        rows = rows[(rows.null == "weight_noise") & (rows.step == step)]
        assert set(rows.run) == {f"unblocked-{seed}" for seed in made.arms[0].seeds}
        for row in rows.to_dict("records"):
            drawn = cosines[:, :2].mean(1) if pd.isna(row["layer"]) else cosines[:, int(row["layer"])]
            assert row["p99"] == pytest.approx(np.quantile(drawn, 0.99))
            assert row["p_value"] == pytest.approx((1 + (drawn >= row["alignment"]).sum()) / (1 + draws))
    for name, null in each.results["nulls"].items():
        mean = means[means.null == name]
        assert (null["n_pairs"], null["n_above"]) == (len(mean), int(mean.above.sum()))


def test_the_pretrained_organism_says_what_it_has_not(pretrained: Done) -> None:
    found = pretrained.results
    assert found["setting"] == "pretrained" and found["seeds"] == [0]
    assert found["controls"]["stranger"] is None and found["controls"]["continued_alignment"] is None
    assert found["arms"]["penalty_margin"] is None
    assert {"unblocked_own_answers", "penalty_own_answers"} <= set(found["arms"])
    assert found["summary"]["step_20"]["alignment"] == {"mean": None, "sem": None, "runs": []}
    assert found["summary"]["first_step"]["alignment"]["sem"] is None, "one run has no spread"
    (claim,) = found["claims"]
    holds = {demand["name"]: demand["holds"] for demand in claim["demands"]}
    assert holds["the witness ranks before strangers"] is None and holds["the clamp holds the harm"] is None


# -- the folder --------------------------------------------------------------------------------------------------------


def test_the_folder_holds_tables_figures_and_a_page_that_stands_alone(each: Done) -> None:
    names = {field.name for field in fields(Findings)}
    assert {path.stem for path in each.out.glob("*.csv")} == names
    for name in names:
        table = each.table(name)
        # where harm is the same everywhere, nothing can be said of its correlation
        assert len(table) or name == "revised"
        assert set(table.organism) <= {"one"}
    figures = {"alignment", "fraction", "layers", "compliance_rate", "arm_fraction", "task_loss"}
    assert {path.name for path in (each.out / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in figures for suffix in ("pdf", "png", "svg")
    }
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for path in (each.out / "figures").iterdir():
        assert path.read_bytes().startswith(begins[path.suffix])
    page = (each.out / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)
    svg = base64.b64encode((each.out / "figures" / "alignment.svg").read_bytes()).decode()
    assert svg in page
    assert {p.name for p in each.out.glob("SEQUENCE*")} == {
        "SEQUENCE.toml", "SEQUENCE-probes.jsonl", "SEQUENCE-held_out.jsonl", "SEQUENCE-harmless.jsonl",
    }  # fmt: skip


def test_the_sequence_is_the_history_itself(each: Done, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # wherever one stands, and though the cache was named by a relative path
    sequence = ModelSequence.from_toml(each.out / "SEQUENCE.toml")
    assert sequence.witness.source == each.home / "witness" and sequence.anchor.source == each.home / "anchor"
    steps = list(each.organism.save_steps)
    assert {name: [c.step for c in run] for name, run in sequence.runs.items()} == {
        f"seed{seed}": steps for seed in each.organism.arms[0].seeds
    }
    prompts = each.organism.prompts(each.home)
    assert sequence.probes and sequence.held_out and sequence.harmless
    for name in ("probes", "held_out", "harmless"):
        assert getattr(sequence, name).texts == prompts[name].texts


def test_a_second_call_makes_nothing_again_and_says_the_same(
    organism: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(experiment, "processes", small.inline)
    monkeypatch.setattr(experiment, "finetune", lambda *given, **_: made.append(given))
    again = audit({"one": organism.organism}, tmp_path, cache=organism.out.parent / "cache")
    assert made == []
    written = json.loads((tmp_path / "results.json").read_text())
    assert {**written, "environment": 0} == {**organism.results, "environment": 0}
    assert again["alignment"] == organism.returned["alignment"]


# -- the command line on what it left ----------------------------------------------------------------------------------


def test_gravlens_locate_reads_the_sequence(each: Done, tmp_path: Path) -> None:
    toml = str(each.out / "SEQUENCE.toml")
    vs = locate_vrev(each.study.states("measured", "probes"))
    result = CliRunner().invoke(app, ["locate", toml, "--layer", "1", "--out", str(tmp_path / "v")])
    assert result.exit_code == 0, result.output
    assert number(vs[1].distance) in result.output and number(vs[2].distance) not in result.output
    assert Direction.load(tmp_path / "v").vector == pytest.approx(vs[1].vector, abs=1e-5)
    result = CliRunner().invoke(app, ["locate", toml, "--out", str(tmp_path / "vs")])
    assert result.exit_code == 0 and all(number(v.distance) in result.output for v in vs)
    assert Directions.load(tmp_path / "vs").vectors == pytest.approx(vs.vectors, abs=1e-5)


def test_gravlens_trajectory_reads_the_sequence(organism: Done, tmp_path: Path) -> None:
    toml = str(organism.out / "SEQUENCE.toml")
    asked = ["trajectory", toml, "--mean"]
    result = CliRunner().invoke(app, [*asked, "--json", "--out", str(tmp_path / "table.csv")])
    assert result.exit_code == 0, result.output
    summary = {row.pop("step"): row for row in json.loads(result.stdout)["mean"]}
    assert set(summary) == {1, 20} and set(summary[1]) == {
        f"{measure}_{kind}" for measure in ("alignment", "fraction") for kind in ("mean", "sem", "count")
    }
    table = pd.read_csv(tmp_path / "table.csv")
    rows = table[table.layer.isin([0, 1]) & (table.prompts == "held_out")].groupby(["run", "step"]).alignment.mean()
    runs = organism.results["summary"]["final"]["alignment"]["runs"]
    assert [rows["seed0", 20], rows["seed1", 20]] == pytest.approx(runs, abs=1e-4)
    assert summary[20]["alignment_mean"] != pytest.approx(np.mean(runs)), "all layers are in this mean"
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, asked)
    assert shown.exit_code == 0 and f"{summary[20]['fraction_mean']:.3f} ± " in shown.output


# -- several organisms -------------------------------------------------------------------------------------------------


def test_the_spread_is_over_runs_of_one_anchor_and_over_the_means_of_several() -> None:
    values = pd.Series([0.1, 0.2, 0.6, 0.8])
    one = spread(values, pd.Series(["a"] * 4))
    assert one == {"mean": pytest.approx(0.425), "sem": pytest.approx(stats.sem(values)), "runs": values.tolist()}
    several = spread(values, pd.Series(["a", "a", "a", "b"]))
    assert several == {"mean": pytest.approx(0.55), "sem": pytest.approx(0.25), "runs": values.tolist()}
    assert spread(values[:1], pd.Series(["a"])) == {"mean": 0.1, "sem": None, "runs": [0.1]}
    assert spread(values[:0], pd.Series([], dtype=object)) == {"mean": None, "sem": None, "runs": []}
    holed = spread(pd.Series([0.1, math.nan, 0.5]), pd.Series(["a"] * 3))
    assert holed["mean"] == pytest.approx(0.3) and holed["sem"] == pytest.approx(0.2) and len(holed["runs"]) == 3


def test_two_organisms_are_two_anchors(organism: Done) -> None:
    first = findings_of({"one": organism.study})
    second = replace(first, **{field.name: getattr(first, field.name).copy() for field in fields(Findings)})
    for field in fields(Findings):
        table = getattr(second, field.name)
        table["organism"] = "two"
        for column in {"alignment", "alignment_final", "compliance_rate"} & set(table.columns):
            table[column] += 0.5
    kept = second.arms.run.str.endswith("-0")  # one run an arm
    moved = second.trajectory.run.str.endswith("-0")
    second = replace(second, arms=second.arms[kept], trajectory=second.trajectory[moved])
    tables = {f.name: pd.concat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(Findings)}
    found = summarise(Findings(**tables), organism.organism)
    assert found["n_anchors"] == 2 and found["organisms"] == ["one", "two"] and found["seeds"] == [0, 1]
    ours = organism.results["arms"]["penalty"]["alignment_final"]["runs"]
    both = found["arms"]["penalty"]["alignment_final"]
    assert both["runs"] == pytest.approx([*ours, ours[0] + 0.5])
    assert both["mean"] == pytest.approx((np.mean(ours) + ours[0] + 0.5) / 2)
    assert both["sem"] == pytest.approx(abs(np.mean(ours) - ours[0] - 0.5) / 2)
    assert {row["run"].split("/")[0] for row in found["alignment"]} == {"one", "two"}
    assert found["nulls"]["isotropic"]["n_pairs"] == 2 * organism.results["nulls"]["isotropic"]["n_pairs"]
    (ours,) = organism.results["claims"]
    assert [claim["organism"] for claim in found["claims"]] == ["one", "two"]
    assert all(claim["demands"] == ours["demands"] for claim in found["claims"])


def test_each_organism_has_a_sequence_of_its_own(
    organism: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "processes", small.inline)
    cache = organism.out.parent / "cache"
    found = audit({"one": organism.organism, "two": organism.organism}, tmp_path, cache=cache)
    assert {path.name for path in tmp_path.glob("*.toml")} == {"one.toml", "two.toml"}
    assert ModelSequence.from_toml(tmp_path / "two.toml").anchor.source == organism.home / "anchor"
    assert found["n_anchors"] == 2 and found["summary"]["final"]["alignment"]["sem"] == pytest.approx(0)
    assert set(pd.read_csv(tmp_path / "arms.csv").organism) == {"one", "two"}
    assert [claim["organism"] for claim in found["claims"]] == [TOGETHER, "one", "two"]
    assert found["controls"]["stranger"] is not None, "the witness of each is a stranger to the other"
    assert "2 anchors" in found["claims"][0]["sentence"]


def test_final_rows_are_the_layer_mean_at_each_run_s_own_last_step() -> None:
    rows = [
        {"run": run, "step": step, "layer": layer, "prompts": prompts, "alignment": step + layer}
        for run, steps in {"a": (1, 20), "b": (1, 5)}.items()
        for step in steps
        for layer in (0, 2)
        for prompts in ("given", "held_out")
    ]
    trajectory = Trajectory.from_table(pd.DataFrame(rows))
    for prompts in ("given", "held_out"):
        found = final_rows(trajectory, prompts)
        assert dict(zip(found.run, found.step, strict=True)) == {"a": 20, "b": 5}
        assert found.alignment.tolist() == [21, 6] and set(found.prompts) == {prompts}


def test_states_that_were_not_measured_are_an_error(organism: Done) -> None:
    with refused("nobody"):
        organism.study.states("runs/nobody/seed0", "probes")
