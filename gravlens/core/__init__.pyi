from . import display as display
from . import errors as errors
from . import files as files
from . import limits as limits
from . import parallel as parallel
from . import process_state as process_state
from . import progress as progress
