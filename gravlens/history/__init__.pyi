from . import hub as hub
from . import prefetch as prefetch
from . import prompt_formats as prompt_formats
from . import prompts as prompts
from . import sequence as sequence
from . import sources as sources
from . import weight_files as weight_files
