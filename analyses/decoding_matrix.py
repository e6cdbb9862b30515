"""python analyses/decoding_matrix.py --out docs/data

Are gravlens's greedy answers those of transformers, token for token, however a checkpoint says that a turn ends? Tiny
random models of each family answer prompts of different lengths; nothing is downloaded. Their generation configuration
asks for penalties, beams, forced and suppressed tokens and sampling. The reference is Hugging Face's own
`model.generate(do_sample=False)` on each prompt alone, with a plain configuration and the end tokens of the kind, which
are tokens that the model says. Writes decoding.csv (`family`, `end_of_turn`, `equal`, `tokens`: how many were compared,
`ended`: how many answers an end token ended) and prints the table of docs/behavior.md. A few minutes of one core.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import torch
import transformers
import typer
from measure_architectures import FAMILIES, LAYERS, USUAL, WIDTH, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm

from gravlens.history.encoding import encode
from gravlens.models.forward import generate
from gravlens.models.opening import OpenModel, open_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LENGTH = 24
LIBRARIES = ("bridge: Llama", "bridge: GPT-2", "HookedTransformer: GPT-2")  # of TransformerLens
VOCABULARY: int = USUAL["vocab_size"]
PROMPTS = ["w7 w9 w11 w30 w31 w5 w8 w21 w40 w61 w17", "w12", "w50 w60 w70", "w3 w70 w80 w4 w18 w25", "w90 w33 w40"]
WORDS = {int(word[1:]) for prompt in PROMPTS for word in prompt.split()}
# What a generation_config.json may ask for beside end tokens; each alone would change greedy answers.
HOSTILE: dict[str, Any] = {
    "repetition_penalty": 5.0, "num_beams": 4, "suppress_tokens": list(range(8, 20)), "forced_bos_token_id": 6,
    "forced_eos_token_id": 6, "min_new_tokens": 20, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 9.0,
}  # fmt: skip


class Kind(NamedTuple):
    """How a checkpoint says that a turn ends."""

    eos: str | None  # the tokenizer's
    turn: str | None  # what the chat template writes after an answer; None: no template
    listed: tuple[str, ...]  # in generation_config.json

    @property
    def ends(self) -> list[str]:
        """All of these, those that a mistake would miss first."""
        return [name for name in dict.fromkeys((self.turn, *reversed(self.listed), self.eos)) if name]


KINDS = {
    "Gemma": Kind("<eos>", "<end_of_turn>", ("<eos>", "<end_of_turn>")),
    "ChatML": Kind("<|endoftext|>", "<|im_end|>", ("<|endoftext|>",)),
    "Llama 3": Kind("<|eot_id|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "Mistral": Kind("</s>", "</s>", ("</s>",)),
    "template only": Kind(None, "<|end|>", ()),
    "list, no template": Kind("<eos>", None, ("<eos>", "<|call|>")),
}


def tokenizer_of(kind: Kind, numbers: Sequence[int]) -> Any:
    """Return a tokenizer of words w0, w1, …, in which the end tokens have these ids."""
    names = {f"w{i}": i for i in range(VOCABULARY) if i not in numbers} | dict(zip(kind.ends, numbers, strict=True))
    raw = Tokenizer(WordLevel(names, unk_token="w0"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="w0", eos_token=kind.eos, additional_special_tokens=kind.ends
    )
    if kind.turn:
        after = f"{{% if m['role'] == 'assistant' %}} {kind.turn} {{% endif %}}"
        tokenizer.chat_template = f"{{% for m in messages %}}w1 {{{{ m['content'] }}}}{after}{{% endfor %}} w2"
    return tokenizer


def reference(module: Any, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return Hugging Face's greedy tokens after one prompt alone, up to the first end token, included."""
    module.generation_config = transformers.GenerationConfig()
    plain = transformers.GenerationConfig(
        max_new_tokens=LENGTH, do_sample=False, pad_token_id=0, eos_token_id=list(ends) or None
    )
    given = torch.tensor([ids])
    return module.generate(given, attention_mask=torch.ones_like(given), generation_config=plain)[
        0, len(ids) :
    ].tolist()


def said_by(module: Any, kind: Kind) -> list[int]:
    """Return tokens that answers of the model hold after their beginning, as many as the kind has end tokens."""
    ids = encode(tokenizer_of(kind, range(VOCABULARY - len(kind.ends), VOCABULARY)), PROMPTS)
    late = Counter(
        t for one in ids for t in dict.fromkeys(reference(module, one, ())[2:]) if t not in WORDS | {0, 1, 2}
    )
    return ([token for token, _ in late.most_common()] + list(range(100, 120)))[: len(kind.ends)]


def compare(family: str, module: Any, opened: Callable[[Any], OpenModel]) -> Iterator[dict[str, Any]]:
    """Yield one row per kind: gravlens's answers, in one batch, against the module's, one by one."""
    for name, kind in KINDS.items():
        numbers = said_by(module, kind)
        tokenizer = tokenizer_of(kind, numbers)
        ids = encode(tokenizer, PROMPTS)
        wanted = [reference(module, one, numbers) for one in ids]
        stored = transformers.GenerationConfig(**HOSTILE)
        stored.eos_token_id = [numbers[kind.ends.index(end)] for end in kind.listed] or None
        with tempfile.TemporaryDirectory() as folder:  # a HookedTransformer knows the file from its tokenizer's folder
            stored.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model = opened(transformers.AutoTokenizer.from_pretrained(folder))
        getattr(model.module, "original_model", model.module).generation_config = stored
        found = generate(model, ids, max_new_tokens=LENGTH)
        ended = [one[-1] in numbers for one in wanted]
        equal = found == [one[: len(one) - end] for one, end in zip(wanted, ended, strict=True)]
        row = {"family": family, "end_of_turn": name, "equal": equal}
        yield {**row, "tokens": sum(map(len, wanted)), "ended": sum(ended)}


def rows_of(family: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one family: of transformers, or a library's model over Llama or GPT-2."""
    through, _, architecture = family.partition(": ")
    folder = make(architecture or family, folder)
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if not architecture:
        twin = copy.deepcopy(module)
        yield from compare(family, module, lambda tokenizer: open_model(twin, tokenizer=tokenizer))
    elif through == "bridge":
        bridge = open_model(folder, through="bridge").module
        yield from compare(family, module, lambda tokenizer: open_model(bridge, tokenizer=tokenizer))
    else:
        hooked = hooked_twin(module)
        yield from compare(family, module, lambda tokenizer: open_model(hooked, tokenizer=tokenizer))


def hooked_twin(gpt2: Any) -> Any:
    """Return the same GPT-2 as a HookedTransformer; raises ImportError where TransformerLens no longer has it."""
    lens = import_module("transformer_lens")
    hooked = import_module("transformer_lens.HookedTransformer").HookedTransformer
    convert = import_module("transformer_lens.pretrained.weight_conversions").convert_gpt2_weights
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS, d_model=WIDTH, d_head=WIDTH // 4, n_ctx=gpt2.config.n_positions, d_vocab=VOCABULARY,
        act_fn="gelu_new", normalization_type="LN", eps=gpt2.config.layer_norm_epsilon, device="cpu",
    )  # fmt: skip
    twin = hooked(config)
    twin.load_state_dict(convert(gpt2, config), strict=False)
    return twin.eval()


def page_table(table: pd.DataFrame) -> str:
    """Markdown: a row for each family, a column for each kind: equal or differs, and the number of tokens."""
    lines = [f"| family | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for family, rows in table.groupby("family", sort=False):
        cells = [f"{'equal' if row.equal else 'differs'}, {row.tokens}" for row in rows.itertuples()]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


@app.command()
def main(out: Annotated[Path, typer.Option(help="Folder for decoding.csv.")] = Path(".")) -> None:
    """Are greedy answers those of transformers, token for token, in every family, however a turn ends?"""
    rows: list[dict[str, Any]] = []
    for family in tqdm([*FAMILIES, *LIBRARIES], "families"):
        with tempfile.TemporaryDirectory() as folder, suppress(ImportError):
            rows += rows_of(family, Path(folder))
    table = pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "decoding.csv", index=False)
    typer.echo(page_table(table))


if __name__ == "__main__":
    app()
