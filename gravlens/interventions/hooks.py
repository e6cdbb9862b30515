"""`intervene` owns the hooks: they carry interventions out, count, and are gone when the block is left."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gravlens.core.errors import GravlensError, check_layer
from gravlens.directions.direction import Span, each
from gravlens.interventions.edits import Intervention, check_intervention
from gravlens.models.opening import Openable, OpenModel, open_model, resid_post


class Firings:
    """How often states were changed: one forward pass of a block is one firing of each edit that acted there.

    Args:
        layers: each edit's.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers, self.counts = tuple(layers), [0] * len(layers)

    @property
    def per_layer(self) -> Counter[int]:
        """Layer -> firings."""
        found = Counter(dict.fromkeys(self._layers, 0))
        for layer, count in zip(self._layers, self.counts, strict=True):
            found[layer] += count
        return found

    @property
    def total(self) -> int:
        """Over all layers."""
        return sum(self.counts)


@contextmanager
def intervene(model: Openable, *interventions: Intervention) -> Generator[Firings]:
    """Carry out interventions on every forward pass inside the `with` block, at all token positions or those of `At`.

    Prefill and each decoded token count alike, so a cached generation sees what an uncached one sees. At one layer the
    interventions act in the order given; nested blocks add theirs after the outer ones. The hooks are gone when the
    block is left, however it is left.

    Args:
        model: opened or not (`open_model`); run the same model inside the block.
        interventions: one or several.

    Yields:
        `Firings`, counting.

    Raises:
        GravlensError: a layer out of range, a direction of another width, an output that is no state, positions in a
            pass that does not say where its prompts end, and, at a clean exit, an intervention that changed nothing.
    """
    opened = open_model(model)
    edits = [(edit, direction) for edit in interventions for direction in each(check_intervention(edit).directions)]
    firings = Firings([check_fit(direction, opened) for _, direction in edits])
    with ExitStack() as hooks:
        for number, (edit, direction) in enumerate(edits):
            hook = _hook(edit, direction, firings, number)
            hooks.callback(resid_post(opened, direction.layer).register_forward_hook(hook).remove)
        yield firings
    silent = [pair for pair, count in zip(edits, firings.counts, strict=True) if not count]
    if silent or not edits:
        raise _silence(edits, silent)


def _hook(edit: Intervention, direction: Span, firings: Firings, number: int) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if type(output) is tuple and output else output
        if not isinstance(hidden, Tensor):
            raise GravlensError(
                f"The block of layer {direction.layer} gives a {type(output).__name__}.",
                "A block gives its states [prompt, pos, d_model], alone or first in a tuple.",
                "a decoder-only Hugging Face model, a TransformerBridge or a HookedTransformer.",
            )
        edited = edit.edit(hidden, direction)
        firings.counts[number] += edited is not hidden
        return (edited, *output[1:]) if type(output) is tuple else edited

    return hook


def _silence(edits: Sequence[tuple[Intervention, Span]], silent: Sequence[tuple[Intervention, Span]]) -> GravlensError:
    names = ", ".join(sorted({type(edit).__name__ for edit, _ in silent}))
    layers = ", ".join(map(str, sorted({span.layer for _, span in silent})))
    return GravlensError(
        f"No forward pass reached layer {layers} where {names} would act." if edits else "No intervention was given.",
        "Inside the block this very model is run, with at least one intervention, over positions that it acts at.",
        "with intervene(model, Ablate(v)): generate_answers(model, prompts).",
    )


def check_fit(span: Span, model: OpenModel) -> int:
    """The layer of a span; raises where a model has no such layer or another width."""
    layer = check_layer(span.layer, model.n_layers)
    if span.basis.shape[1:] != (model.d_model,):
        raise GravlensError(
            f"The direction of layer {layer} has the shape {span.basis.shape[1:]}.",
            f"This model's residual stream has width {model.d_model}.",
            "a direction that was located in this model's history.",
        )
    return layer
