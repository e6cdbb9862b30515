from . import answers as answers
from . import divergence as divergence
from . import judges as judges
from . import scores as scores
from .answers import Answer as Answer
from .answers import Harm as Harm
from .answers import Rate as Rate
