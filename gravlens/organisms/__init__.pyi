from . import arms as arms
from . import base as base
from . import fetch as fetch
from . import gguf as gguf
from . import given as given
from . import pretrained as pretrained
from . import refusal as refusal
from . import refusal_language as refusal_language
