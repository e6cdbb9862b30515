"""Limits of time and memory for the small programs in a checkpoint: chat templates and regular expressions.

Nothing in a process can stop either of them, so each is tried once in a child process.
"""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from gravlens.core.errors import GravlensError

SECONDS, LONGEST, MIB = 5, 1_000_000, 512  # of processor time; characters that a template writes; memory
_WALL = 12  # times as long by the clock, for a busy machine
# Ends with 3 where the memory or the length is exceeded, by a signal where the time is. Any other failure is found
# again, and named, where the program is used.
_CHILD = """
import json, re, sys
given = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (given["mib"] << 20, given["mib"] << 20))
except (ImportError, ValueError, OSError):
    pass  # not on this system: the parent's clock remains
try:
    exec(given["program"])
except MemoryError:
    sys.exit(3)
except Exception:
    pass
"""
# As transformers renders, after a removal of the one block that it adds to the language.
_RENDER = r"""
sys.path[:] = given["paths"]
import jinja2.ext, jinja2.sandbox
def refuse(message): raise jinja2.TemplateError(message)
extensions = [jinja2.ext.loopcontrols]
world = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
world.filters["tojson"] = lambda x, indent=None, **_: json.dumps(x, ensure_ascii=False, indent=indent)
world.globals["raise_exception"] = refuse
template = world.from_string(re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", given["template"]))
for messages in given["conversations"]:
    for opened in (True, False):
        try:
            written = 0
            for part in template.generate(messages=messages, add_generation_prompt=opened, **given["values"]):
                written += len(part)
                if written > given["longest"]: raise MemoryError
        except MemoryError: raise
        except Exception: pass
"""
# The forms in which PEFT matches names of modules.
_MATCH = r"""
for pattern in given["patterns"]:
    for form in ("{}", r"(^|.*\.){}($|\..*)", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."):
        try: found = re.compile(form.replace("{}", pattern))
        except (re.error, RecursionError, OverflowError): continue
        for name in given["names"]: found.match(name), found.fullmatch(name)
"""


def check_template(template: str, values: Mapping[str, Any]) -> None:
    """Raise if a chat template exceeds the limits on a short conversation; each is tried once.

    Args:
        values: what it is rendered with, besides the conversation.
    """
    if found := _template_exceeds(template, json.dumps(dict(values), default=str)):
        wanted = "A template renders a short conversation at once."
        raise GravlensError(f"The chat template {found}.", wanted, 'tokenizer= with another, or chat_template="none".')


@lru_cache
def _template_exceeds(template: str, values: str) -> str:
    roles = (["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant"])
    plain = [[{"role": role, "content": "a text"} for role in each] for each in roles]
    parts = [[{**turn, "content": [{"type": "text", "text": "a text"}]} for turn in each] for each in plain]
    plain.append([{"role": "user", "content": "A sentence of 6 words, repeated. " * 99}])
    given = {"template": template, "values": json.loads(values), "conversations": plain + parts}
    return _exceeds(_RENDER, given | {"paths": sys.path, "longest": LONGEST})


def patterns_exceed(texts: Iterable[str], names: Iterable[str]) -> str:
    """Say which limit a configuration's regular expressions exceed on names of modules; "" if none."""
    patterns = sorted({text for text in texts if not re.fullmatch(r"[\w./ -]*", text)})
    return _exceeds(_MATCH, {"patterns": patterns, "names": list(names)}) if patterns else ""


def _exceeds(program: str, given: dict[str, Any]) -> str:
    given |= {"program": program, "seconds": SECONDS, "mib": MIB}
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(command, input=json.dumps(given).encode(), capture_output=True, timeout=_WALL * SECONDS)
    except subprocess.TimeoutExpired:
        return f"takes more than {_WALL * SECONDS} s"
    except OSError as error:
        warnings.warn(
            f"No process could be started ({error}): limits of time and memory are not checked.", stacklevel=4
        )
        return ""
    if done.returncode == 3:
        return f"writes more than {LONGEST:,} characters, or takes more than {MIB} MiB"
    return f"takes more than {SECONDS} s, or ends its process" if done.returncode < 0 else ""
