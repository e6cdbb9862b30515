from . import explorers as explorers
from . import page as page
from . import paper as paper
