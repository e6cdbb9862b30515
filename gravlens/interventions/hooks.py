"""`intervene`: forward hooks that apply interventions and are removed on exit."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gravlens.core.display import listed
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Span
from gravlens.interventions.edits import Intervention, fitted, mark_apart
from gravlens.interventions.edits import check_fit as check_fit
from gravlens.models.opening import Openable, open_model


class Firings:
    """How often states were changed: one forward pass of a block is one firing of each edit that acted there."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers, self.counts = tuple(layers), [0] * len(layers)

    def __repr__(self) -> str:
        return f"Firings({listed(f'layer {layer}: {count}' for layer, count in self.per_layer.items())})"

    @property
    def per_layer(self) -> Counter[int]:
        """Layer -> firings."""
        found = Counter(dict.fromkeys(self._layers, 0))  # a layer that never fired is listed, with 0
        for layer, count in zip(self._layers, self.counts, strict=True):
            found[layer] += count
        return found

    @property
    def total(self) -> int:
        """Firings over all layers."""
        return sum(self.counts)


@contextmanager
def intervene(model: Openable, *interventions: Intervention) -> Generator[Firings]:
    """Apply interventions in every forward pass inside the `with` block, at all token positions or those of `At`.

    Prefill and decoding are edited alike, so generation with and without a KV cache agree. Logits and likelihoods of
    prompts with a shared prefix run it once, in a pass of its own, under the same edits. At one layer interventions
    act in the order given, those of nested blocks after the outer ones. The hooks are removed on exit, also on error.

    Args:
        model: opened or not; run this same model inside the block.
        interventions: one or several.

    Yields:
        How often each layer was edited.

    Raises:
        GravlensError: a layer out of range, a direction of another width, an output that is no hidden state, positions
            in a pass outside `reading`, and, on a clean exit, an intervention that never fired.

    Examples:
        >>> with gl.intervene(model, gl.Steer(vs[1], 0.5), gl.Ablate(vs[2])) as fired:
        ...     answers = gl.generate_answers(model, prompts, max_new_tokens=8)
        >>> sorted(fired.per_layer)
        [1, 2]
    """
    opened = open_model(model)
    edits = fitted(opened, interventions)  # checked before the first hook is registered
    firings = Firings([direction.layer for _, direction in edits])
    with ExitStack() as hooks:
        for number, (edit, direction) in enumerate(edits):
            hook = _hook(edit, direction, firings, number)
            # torch runs hooks in the order of their registration, so edits of a layer act in the order given.
            hooks.callback(opened.blocks[direction.layer].register_forward_hook(hook).remove)
        yield firings
    # Reached on a clean exit only: an error inside the block is the better message.
    silent = [pair for pair, count in zip(edits, firings.counts, strict=True) if not count]
    if silent or not edits:
        raise _silence(edits, silent)


def _hook(edit: Intervention, direction: Span, firings: Firings, number: int) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        # Exactly a tuple: a subclass could not be rebuilt from its elements.
        hidden = output[0] if type(output) is tuple and output else output
        if not isinstance(hidden, Tensor):
            given = f"The block of layer {direction.layer} returns a {type(output).__name__}."
            wanted = "Its states [prompt, pos, d_model] are expected, alone or first in a tuple."
            remedy = "a decoder-only Hugging Face model, a TransformerBridge or a HookedTransformer."
            raise GravlensError(given, wanted, remedy)
        edited = edit.edit(hidden, direction)
        firings.counts[number] += edited is not hidden
        # What follows the states in a tuple (KV cache, attention weights) is passed on.
        return (edited, *output[1:]) if type(output) is tuple else edited

    return mark_apart(hook, edit)


def _silence(edits: Sequence[tuple[Intervention, Span]], silent: Sequence[tuple[Intervention, Span]]) -> GravlensError:
    names = ", ".join(sorted({type(edit).__name__ for edit, _ in silent}))
    layers = ", ".join(map(str, sorted({span.layer for _, span in silent})))
    return GravlensError(
        f"No forward pass reached layer {layers}, where {names} would act." if edits else "No intervention was given.",
        "At least one is needed, and inside the block a pass of this model over the positions that it edits.",
        "with intervene(model, Ablate(v)): generate_answers(model, prompts).",
    )
