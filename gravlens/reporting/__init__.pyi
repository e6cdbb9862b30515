from . import page as page
from . import paper as paper
