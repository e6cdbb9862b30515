"""The pretrained setting with what `gravlens fetch` has brought, or with a user's own model and prompts."""

from pathlib import Path
from typing import Any

from gravlens.errors import GravlensError
from gravlens.fetch import cache_folder, fetched_prompts, fetched_smollm2
from gravlens.finetune import Recipe
from gravlens.gguf import gguf_to_folder
from gravlens.settings.pretrained import CHATML, Pretrained, inner_layers


def pretrained_setting(
    model: str = "",
    harmful: Path | None = None,
    harmless: Path | None = None,
    *,
    runs: int = 0,
    threads: int = 0,
    quick: bool = False,
) -> Pretrained:
    """The setting of a model: hub id, folder or GGUF file; what is not given is what was fetched.

    Args:
        model: default: fetched weights.
        harmful: file of harmful prompts; default: fetched ones.
        harmless: file of harmless prompts with answers; default: fetched ones.
        runs: fine-tuning seeds of each arm; 0: one.
        threads: of a process; 0: all cores.
        quick: a shorter alignment phase and fewer draws of weight noise.

    Raises:
        GravlensError: nothing was given and nothing fetched.
    """
    source: Path | str | None = model or fetched_smollm2()
    prompts = fetched_prompts()
    if source is None:
        raise GravlensError("No model was given.", "A model is needed.", "gravlens fetch smollm2, or --model FOLDER.")
    if (harmful is None or harmless is None) and prompts is None:
        raise GravlensError(
            "No prompts were given.", "Both sets are needed.", "gravlens fetch prompts, or --harmful and --harmless."
        )
    if str(source).endswith(".gguf"):
        source = gguf_to_folder(Path(source), cache_folder() / f"{Path(source).stem}")
    elif Path(source).is_dir():
        source = Path(source)
    extra: dict[str, Any] = {"threads": threads} if threads else {}
    if model:
        extra["layers_in_mean"] = inner_layers(source)
    if quick:
        extra |= {
            "alignment": Recipe(40, 8, 2e-5, weight_decay=0.0, bf16=True, freeze_embeddings=True),
            "noise_draws": 5,
        }
    return Pretrained(
        source,
        harmful or prompts.harmful,  # pyright: ignore[reportOptionalMemberAccess]
        harmless or prompts.harmless,  # pyright: ignore[reportOptionalMemberAccess]
        harmful_train=None if harmful or prompts is None else prompts.harmful_train,
        chat_template=None if model else CHATML,
        runs=runs or 1,
        **extra,
    )
