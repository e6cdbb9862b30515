"""A model provider and a task for Inspect (inspect-ai), which evaluates a checkpoint with and without an intervention.

    inspect eval gravlens/refusal --model gravlens/FOLDER -T prompts=held_out.jsonl -M projection=ablate.safetensors

Inspect finds this file by its entry point; without inspect-ai nothing is registered.
"""

# inspect-ai may be absent where types are checked, and then its classes are unknown.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportConstantRedefinition=false

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gravlens.behavior.answers import generate_answers, substring_judge
from gravlens.core.errors import GravlensError
from gravlens.exchange.control_vectors import from_gguf
from gravlens.exchange.projections import from_projection
from gravlens.history.prompts import PromptSet
from gravlens.interventions.edits import Intervention, Steer
from gravlens.interventions.hooks import intervene
from gravlens.models.opening import Openable, open_model


def edits_of(projection: Path | str | None, steer: Path | str | None, strength: float) -> list[Intervention]:
    """Read what `-M projection=`, `-M steer=` and `-M strength=` name: files of `to_projection` and `to_gguf`."""
    added = [Steer(from_gguf(steer), strength)] if steer else []
    return [*added, *([from_projection(projection)] if projection else [])]


def answer(model: Openable, turns: list[tuple[str, str]], edits: list[Intervention], max_new_tokens: int) -> Any:
    """Generate the greedy answer after a conversation of (role, text), with the edits applied."""
    *earlier, (role, prompt) = turns
    if role != "user":
        given = f"The conversation ends with a turn of {role!r}."
        raise GravlensError(given, "The model answers a user's turn.", "a solver without prefill or tools.")
    model = open_model(model)
    with intervene(model, *edits) if edits else nullcontext():
        return generate_answers(model, PromptSet((prompt,), earlier=(tuple(earlier),)), max_new_tokens=max_new_tokens)[
            0
        ]


def provider() -> type:
    """Make the class of the provider `gravlens`; its model names are folders and hub ids, as for `open_model`."""
    from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput

    class Provider(ModelAPI):
        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: Any = GenerateConfig(),  # noqa: B008
            **given: Any,
        ) -> None:
            super().__init__(model_name, base_url, api_key, [], config)
            names = {"projection": None, "steer": None, "strength": 1.0}
            self.edits = edits_of(**{name: given.pop(name, default) for name, default in names.items()})
            self.model = open_model(model_name, **given)

        async def generate(self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any) -> Any:
            # sampling would differ between the conditions by chance
            if tools or config.temperature:
                given = f"{len(tools)} tools and the temperature {config.temperature} were given."
                raise GravlensError(given, "Answers are greedy and call no tools.", "temperature=0, and no tools.")
            said = answer(self.model, [(one.role, one.text) for one in input], self.edits, config.max_tokens or 64)
            reason = "stop" if said.complete else "max_tokens"
            return ModelOutput.from_content(self.model_name, str(said), stop_reason=reason)

    return Provider


def refused() -> Any:
    """Make the scorer: 1 where an answer contains a refusal marker, else 0 (`substring_judge`)."""
    from inspect_ai.scorer import Score

    async def score(state: Any, target: Any) -> Any:
        said = state.output.completion
        return Score(value=float(not substring_judge()([state.input_text], [said])[0]), answer=said)

    return score


def refusal(prompts: str = "held_out.jsonl", max_tokens: int = 64) -> Any:
    """Make the task: the refusal rate on the prompts of a file, with greedy answers."""
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig
    from inspect_ai.scorer import mean, scorer, stderr

    asked, judged = PromptSet.of(prompts), scorer(metrics=[mean(), stderr()], name="refused")(refused)
    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    said = [[kinds[turn["role"]](content=turn["content"]) for turn in turns] for turns in asked.turns]
    samples = [Sample(id=i, input=turns) for i, turns in enumerate(said, start=1)]
    config = GenerateConfig(max_tokens=max_tokens, temperature=0)
    return Task(dataset=MemoryDataset(samples, name=asked.role), scorer=judged(), config=config)


if find_spec("inspect_ai") is not None:
    from inspect_ai import task
    from inspect_ai.model import modelapi

    modelapi(name="gravlens")(provider)
    refusal = task(refusal)
