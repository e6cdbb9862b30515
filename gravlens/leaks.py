"""Where a model has moved in spite of a block, in which few directions, and which of them carry the behaviour."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import nn

from gravlens.behavior import Score
from gravlens.directions import Direction, Directions, locate_vrev
from gravlens.effects import causal_effect
from gravlens.errors import GravlensError
from gravlens.interventions import Patch
from gravlens.models import OpenModel, open_model
from gravlens.prompts import PromptSet, encode
from gravlens.residuals import Residuals
from gravlens.subspaces import (
    Span,
    Spans,
    Subspaces,
    drift_subspaces,
    orthogonal_part,
    random_spans,
    share_within,
    whole_state,
)
from gravlens.trajectory import JUDGED_FROM, drift_per_prompt, measure_drift

# A drift closer to v_rev than this (degrees) has no part orthogonal to it but rounding.
NO_ANGLE = 0.1


# --- where: layers, positions, prompts ----------------------------------------------------------------------------


def leak_map(given: Sequence[Residuals], held_out: Sequence[Residuals] = ()) -> pd.DataFrame:
    """Where each checkpoint has moved: over layers, token positions, and prompts that a block has not seen.

    v_rev is located at each position by itself, on the given prompts, and used on both sets (docs/leaks.md).

    Args:
        given: residuals of witness, anchor and the runs on the probes, one for each position.
        held_out: the same on other prompts, at the same positions.

    Returns:
        One row per run × step × layer × position × prompt set (`given`, `held_out`): `alignment` and `fraction` as in
        `follow`; `drift_norm` in units of the distance; `judged`, whether that is above 2 %; `share_along_vrev`, the
        part of the per-prompt drifts' summed squared length that lies along v_rev; `refit_angle`, degrees between
        v_rev and the direction located anew from this checkpoint to the witness, on the row's own prompts.

    Raises:
        GravlensError: no run, a position twice, held-out residuals of the same prompts or at other positions.
    """
    located, others = _by_position(given), _by_position(held_out)
    same = any(one.prompts == located[position].prompts for position, one in others.items() if position in located)
    if same or not located or not others.keys() <= located.keys():
        raise GravlensError(
            f"Given prompts were read at positions {sorted(located)}, {'the same' if same else 'held-out'} ones at "
            f"{sorted(others)}.",
            "v_rev is located at every position on the given prompts; the held-out ones are others.",
            "cache_residuals(sequence, positions=…) at each position, for both sets of prompts.",
        )
    frames = []
    for position, states in located.items():
        vs = locate_vrev(states).defined()
        sets = {"given": states} | ({"held_out": others[position]} if position in others else {})
        for prompts, residuals in sets.items():
            for name in _checkpoints_of_runs(residuals):
                frames.append(_leaks(residuals, name, vs).assign(position=position, prompts=prompts))
    table = pd.concat(frames, ignore_index=True)
    first = ["run", "step", "layer", "position", "prompts"]
    return table[[*first, *table.columns.drop(first)]]


def _leaks(residuals: Residuals, checkpoint: str, vs: Directions) -> pd.DataFrame:
    drift = drift_per_prompt(residuals, checkpoint, vs.layers)
    to_witness = drift_per_prompt(residuals, "witness", vs.layers, start=checkpoint)
    mean, each_prompt = measure_drift(drift.mean(0), vs), measure_drift(drift, vs)
    refit = np.clip(measure_drift(to_witness.mean(0), vs)["alignment"], -1, 1)
    with np.errstate(invalid="ignore"):  # no drift has no share along v_rev
        share = (each_prompt["projection"] ** 2).sum(0) / (each_prompt["drift_norm"] ** 2).sum(0)
    length = mean["drift_norm"] / vs.distances
    run, _, step = checkpoint.rpartition("/")
    return pd.DataFrame(
        {"run": run, "step": int(step), "layer": vs.layers, "alignment": mean["alignment"],
         "fraction": mean["fraction"], "drift_norm": length, "judged": length > JUDGED_FROM,
         "share_along_vrev": share, "refit_angle": np.degrees(np.arccos(refit))}
    )  # fmt: skip


def _by_position(several: Sequence[Residuals]) -> dict[int, Residuals]:
    """Position (−1 is the last prompt token) -> residuals."""
    positions = [one.meta.get("positions", "last") for one in several]
    found = dict(zip([-1 if p == "last" else int(p) for p in positions], several, strict=True))
    if len(found) < len(several):
        raise GravlensError(
            f"Residuals at positions {positions} were given.", "Each position is there once.", "leave one out."
        )
    return found


def _checkpoints_of_runs(residuals: Residuals) -> list[str]:
    names = [f"{run}/{step}" for run, steps in residuals.runs.items() for step in steps]
    if not names:
        raise GravlensError(
            f"These residuals hold no run ({', '.join(residuals.checkpoints)}).",
            "What has moved is a checkpoint of a run.",
            'runs={"seed0": "ft/checkpoint-*"} in the sequence.',
        )
    return names


# --- in which directions ------------------------------------------------------------------------------------------


def candidate_spans(
    residuals: Residuals,
    directions: Directions,
    *,
    fit_on: Sequence[str],
    ranks: Sequence[int] = (1, 2, 4, 16),
    refusal: Directions | None = None,
    n_random: int = 1,
    rng: np.random.Generator,
) -> dict[str, list[Spans]]:
    """Spans that may hold what fine-tuning did, fitted on some runs, to be tested on others (docs/leaks.md).

    Args:
        residuals: of the anchor and of the checkpoints of `fit_on`, on the given prompts.
        directions: v_rev, whose layers and distances are kept.
        fit_on: `"{run}/{step}"`, of other runs than those that are tested.
        ranks: how many leading components of their per-prompt drift.
        refusal: a refusal direction at the same layers.
        n_random: random spans of each rank and kind.
        rng: of the random spans.

    Returns:
        Kind -> spans: `v_rev`; `drift`, at each rank; `drift_orthogonal`, what is left of it without v_rev (a layer
        where nothing is left is left out); `refusal`; `isotropic` and `covariance_matched`, of the drifts' ranks;
        `whole_state`.

    Raises:
        GravlensError: a checkpoint or layer that the residuals lack, a rank above the number of drifts.
    """
    vs = directions.defined()
    drift = [drift_subspaces(residuals, vs, at=fit_on, rank=rank) for rank in ranks]
    anchor = residuals.of("anchor")[:, [residuals.layers.index(layer) for layer in vs.layers]]
    draws = range(n_random)
    found: dict[str, list[Spans]] = {
        "v_rev": [vs],
        "drift": [*drift],
        "drift_orthogonal": [part for spaces in drift if len(part := _without(spaces, vs))],
        "refusal": [] if refusal is None else [refusal.at(vs.layers)],
        "isotropic": [random_spans(spaces, rng=rng) for spaces in drift for _ in draws],
        "covariance_matched": [random_spans(spaces, rng=rng, states=anchor) for spaces in drift for _ in draws],
        "whole_state": [whole_state(vs)],
    }
    return {kind: spans for kind, spans in found.items() if spans}


def _without(spaces: Subspaces, vs: Directions) -> Subspaces:
    """The part orthogonal to v_rev, at the layers that have one."""
    apart = [space.layer for space in spaces if space.rank > 1 or _angle(space, vs[space.layer]) > NO_ANGLE]
    return orthogonal_part(spaces.at(apart), vs)


def rank_table(
    residuals: Residuals,
    spans: Mapping[str, Sequence[Spans]],
    *,
    directions: Directions,
    at: Sequence[str],
    refusal: Directions | None = None,
) -> pd.DataFrame:
    """How much of a run's drift lies in spans that were fitted without it.

    Args:
        residuals: of the anchor and of the checkpoints of `at`; other prompts than the spans were fitted on.
        spans: kind -> spans, such as `candidate_spans` gives.
        directions: v_rev.
        at: the checkpoints that are tested, `"{run}/{step}"`.
        refusal: a refusal direction at the same layers.

    Returns:
        One row per checkpoint × span × layer, and `<NA>`, the mean over the span's layers: `run`, `step`, `span` (its
        kind), `rank`, `fitted_on`, `layer`, `share` (of the summed squared length of the per-prompt drifts; a random
        isotropic span of rank k holds k / d_model), `angle_vrev` and `angle_refusal` (degrees; 0: it lies within).
    """
    frames = []
    for checkpoint in at:
        run, _, step = checkpoint.rpartition("/")
        for kind, several in spans.items():
            for one in several:
                fitted_on = ", ".join(next(iter(one)).made_from.get("checkpoints", ()))
                facts = {"run": run, "step": int(step), "span": kind, "rank": rank_of(one), "fitted_on": fitted_on}
                rows = _with_mean(_ranks(residuals, checkpoint, one, directions, refusal))
                frames.append(pd.DataFrame(facts, index=rows.index).join(rows))
    return pd.concat(frames, ignore_index=True)


def rank_of(spans: Spans) -> int:
    """The rank of spans: that of the largest layer's."""
    return max(len(span.basis) for span in spans)


def _ranks(
    residuals: Residuals, checkpoint: str, spans: Spans, directions: Directions, refusal: Directions | None
) -> pd.DataFrame:
    drift = drift_per_prompt(residuals, checkpoint, spans.layers)
    return pd.DataFrame(
        {
            "layer": span.layer,
            "share": share_within(drift[:, i], span) if drift[:, i].any() else np.nan,
            "angle_vrev": _angle(span, directions[span.layer]),
            "angle_refusal": np.nan if refusal is None else _angle(span, refusal[span.layer]),
        }
        for i, span in enumerate(spans)
    )


def _with_mean(rows: pd.DataFrame) -> pd.DataFrame:
    mean = rows.drop(columns="layer").mean().to_frame().T
    return pd.concat([rows, mean], ignore_index=True).astype({"layer": "Int64"})


def _angle(span: Span, direction: Direction) -> float:
    """Degrees between a direction and a span (the principal angle, without the SVD of a whole state)."""
    basis, vector = span.basis.astype(np.float64), direction.vector.astype(np.float64)
    inside = basis @ vector
    return float(np.degrees(np.arctan2(np.linalg.norm(vector - inside @ basis), np.linalg.norm(inside))))


# --- which of them carries the behaviour --------------------------------------------------------------------------


def patch_spans(
    model: OpenModel | nn.Module,
    spans: Mapping[str, Sequence[Spans]],
    *,
    source: Residuals,
    checkpoint: str = "anchor",
    score: Score,
    prompts: PromptSet | Sequence[str],
    goal: float,
) -> pd.DataFrame:
    """Put a checkpoint's own component in each span into a model, at the last prompt token, and score it.

    h ← h − QᵀQ (h − h_source), as in `Patch`.

    Necessity: the anchor's component put into a fine-tuned model; sufficiency: the fine-tuned one's put into the
    anchor. All layers of a span act together; the whole state is the most that any of them can do.

    Args:
        model: it is scored as it is, and with each patch.
        spans: kind -> spans, such as `candidate_spans` gives.
        source: residuals of `checkpoint` on these very prompts, at the last prompt token.
        checkpoint: whose component is put in.
        score: (model, prompts) -> one number a prompt.
        prompts: what it is scored on; other prompts than the spans were fitted on.
        goal: the mean score of `checkpoint`.

    Returns:
        One row a span: `span` (its kind), `rank`, `source`, `baseline`, `patched` (mean scores), `difference` with its
        95 % bootstrap interval over prompts `low`, `high`, `n_prompts`, `goal`, and `way`: the share of the way from
        baseline to goal (NaN where there is none).

    Raises:
        GravlensError: what `Patch`, `intervene` or `causal_effect` raise.
    """
    opened, prompts = open_model(model), PromptSet.of(prompts)
    ids = encode(opened.tokenizer, prompts)
    named = [(kind, one) for kind, several in spans.items() for one in several]
    patches = {f"{kind} {i}": Patch(one, source, ids, checkpoint) for i, (kind, one) in enumerate(named)}
    effect = causal_effect(opened, patches, score=score, prompts=prompts, n_random=0)
    table = effect.table.rename(columns={"with_intervention": "patched"})
    table = table.assign(span=[kind for kind, _ in named], rank=[rank_of(one) for _, one in named])
    table = table.assign(source=checkpoint, goal=goal, way=table["difference"] / (goal - table["baseline"]))
    table.loc[table["baseline"] == goal, "way"] = np.nan
    columns = "span rank source baseline patched difference low high n_prompts goal way".split()
    return table[columns]


def smallest_rank(table: pd.DataFrame, *, share: float = 0.8) -> int | None:
    """The smallest rank that brings the score at least this share of the way (mean over draws); None: no rank does.

    Args:
        table: rows of `patch_spans` of one kind of span: `table[table.span == "drift"]`.
        share: of the way to the goal, 1 is all of it (`way` in docs/leaks.md).
    """
    way = table.groupby("rank")["way"].mean()
    enough = way.index[way >= share]
    return int(min(enough)) if len(enough) else None


# --- how long a block lasts when it is lifted ---------------------------------------------------------------------


def half_life(steps: Sequence[int], values: Sequence[float], *, lifted: int, unblocked: float) -> float:
    """Steps after a block is lifted until a measure has gone half the way to what it is without a block.

    Straight lines between the steps measured; the first crossing of (m(t) − m(lifted)) / (unblocked − m(lifted)) = ½.

    Args:
        steps: ascending, of the run that was blocked and then trained on.
        values: the measure at these steps (harm, fraction).
        lifted: the last step under the block; one of `steps`.
        unblocked: the measure of the unblocked run.

    Returns:
        Steps since `lifted`; NaN where half the way is not reached within the run.

    Raises:
        GravlensError: `lifted` was not measured, or the measure is there at once: then nothing was held.
    """
    at, measured = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if at.shape != measured.shape or not (np.diff(at) > 0).all() or lifted not in at:
        raise GravlensError(
            f"{len(at)} steps {list(steps)}, {len(measured)} values and the step {lifted} were given.",
            "There is one value a step, steps ascend, and the block was lifted at one of them.",
            "measure the checkpoint at which the block was lifted.",
        )
    at, measured = at[at >= lifted], measured[at >= lifted]
    if measured[0] == unblocked:
        raise GravlensError(
            f"At step {lifted} the measure is {unblocked}, as in the unblocked run.",
            "What a block held back is what can come back.",
            "another measure, or a step at which the block still held.",
        )
    gone = (measured - measured[0]) / (unblocked - measured[0])
    over = np.flatnonzero(gone >= 0.5)
    if not len(over):
        return float("nan")
    after = over[0]
    return float(np.interp(0.5, gone[[after - 1, after]], at[[after - 1, after]]) - lifted)
