from . import heatmap as heatmap
from . import lines as lines
from . import plane as plane
from . import style as style
