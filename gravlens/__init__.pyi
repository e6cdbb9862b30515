from .checkpoints import Checkpoint as Checkpoint
from .checkpoints import ModelSequence as ModelSequence
from .errors import GravlensError as GravlensError
from .prompts import PromptSet as PromptSet

__version__: str
__all__: list[str]
