"""Patch subspaces of one model's activations into another: which of them carry a behaviour."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from gravlens.activations.residuals import Residuals
from gravlens.behavior.scores import Score
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Spans
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.interventions.edits import Patch
from gravlens.interventions.effects import causal_effect
from gravlens.models.opening import Openable, open_model

__all__ = ["half_life", "patch_spans", "smallest_rank"]


def patch_spans(
    model: Openable,
    spans: Mapping[str, Sequence[Spans]],
    *,
    source: Residuals,
    checkpoint: str = "anchor",
    score: Score,
    prompts: PromptSet | Sequence[str],
    goal: float,
) -> pd.DataFrame:
    """Patch a checkpoint's component in each span into a model at the last prompt token, and score the patched model.

    Patching the anchor's component into a fine-tuned model tests necessity, the fine-tuned model's into the anchor
    sufficiency (see `Patch`). All layers of a span are patched together; `whole_state` is the upper bound.

    Args:
        model: scored without and with each patch.
        spans: kind -> spans, as `candidate_spans` returns them.
        source: residuals of `checkpoint` on the same prompts, at the last prompt token.
        checkpoint: the source of the patch.
        score: (model, prompts) -> one number per prompt.
        prompts: held out: not those that the spans were fitted on.
        goal: the mean score of `checkpoint`.

    Returns:
        One row per span: `span` (its kind), `rank`, `source`, mean scores `baseline` and `patched`, `difference` with
        its 95 % bootstrap interval over prompts `low`, `high`, `n_prompts`, `goal`, and `way`: the share of the gap
        from baseline to goal that is closed (NaN if there is no gap).

    Examples:
        >>> spans = gl.decomposition.candidate_spans(given, vs, fit_on=["seed1/20"], ranks=(1,), rng=rng)
        >>> goal = float(gl.refusal_log_odds(seq.anchor, prompts).mean())
        >>> table = gl.patching.patch_spans(
        ...     model, spans, source=held_out, score=gl.refusal_log_odds, prompts=prompts, goal=goal
        ... )
        >>> "v_rev" in table.span.tolist()
        True
    """
    opened, prompts = open_model(model), PromptSet.of(prompts)
    ids = encode(opened.tokenizer, prompts)
    named = [(kind, one) for kind, several in spans.items() for one in several]
    patches = {f"{kind} {i}": Patch(one, source, ids, checkpoint) for i, (kind, one) in enumerate(named)}
    # No random draws here: `candidate_spans` returns random spans too.
    effect = causal_effect(opened, patches, score=score, prompts=prompts, n_random=0)
    table = effect.table.rename(columns={"with_intervention": "patched"})
    table = table.assign(
        span=[kind for kind, _ in named], rank=[max(len(span.basis) for span in one) for _, one in named]
    )
    table = table.assign(source=checkpoint, goal=goal, way=table["difference"] / (goal - table["baseline"]))
    table.loc[table["baseline"] == goal, "way"] = np.nan  # not ±inf
    return table["span rank source baseline patched difference low high n_prompts goal way".split()]


def smallest_rank(table: pd.DataFrame, *, share: float = 0.8) -> int | None:
    """The smallest rank that closes at least this share of the gap (mean over draws), or None.

    Args:
        table: rows of `patch_spans` of one kind of span: `table[table.span == "drift"]`.
        share: of the gap between baseline and goal (`way` in docs/leaks.md).
    """
    way = table.groupby("rank")["way"].mean()  # several spans of one rank: random draws, or fits on several runs
    return min(map(int, way.index[way >= share]), default=None)


def half_life(steps: Sequence[int], values: Sequence[float], *, lifted: int, unblocked: float) -> float:
    """Steps after a block is lifted until a measure is halfway to its value in the unblocked run.

    The first crossing of (m(t) − m(lifted)) / (unblocked − m(lifted)) = ½, interpolated linearly between steps.

    Args:
        steps: ascending, of the run that was blocked and then trained on.
        values: the measure at these steps (compliance rate, fraction).
        lifted: the last step under the block; one of `steps`.
        unblocked: the measure of the unblocked run.

    Returns:
        Steps since `lifted`; NaN if the run ends before.

    Examples:
        >>> gl.patching.half_life([20, 30, 40], [0.0, 0.4, 0.8], lifted=20, unblocked=0.8)
        10.0
    """
    at, measured = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if at.shape != measured.shape or not (np.diff(at) > 0).all() or lifted not in at:
        given = f"{len(at)} steps {list(steps)}, {len(measured)} values and step {lifted} were given."
        raise GravlensError(
            given, "Steps must ascend, one per value, with lifted among them.", "all measurements of the run."
        )
    at, measured = at[at >= lifted], measured[at >= lifted]
    if measured[0] == unblocked:  # the share below would divide by 0
        given = f"At step {lifted} the measure is {unblocked}, as in the unblocked run."
        raise GravlensError(given, "A half-life needs a gap.", "a measure or step at which the block was effective.")
    gone = (measured - measured[0]) / (unblocked - measured[0])
    over = np.flatnonzero(gone >= 0.5)
    if not len(over):
        return float("nan")
    crossing = [over[0] - 1, over[0]]  # the first one alone: np.interp needs ascending values, and a run may fall back
    return float(np.interp(0.5, gone[crossing], at[crossing]) - lifted)
