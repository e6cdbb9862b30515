from . import adapters as adapters
from . import families as families
from . import forward as forward
from . import opening as opening
from . import placement as placement
from . import swapping as swapping
from . import tokenizers as tokenizers
from .tokenizers import sequence_tokenizer as sequence_tokenizer
