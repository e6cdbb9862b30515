"""Find, test and block the direction along which harmless fine-tuning undoes alignment.

The public names stand in `__init__.pyi` and are loaded when they are first used, so that `import gravlens`
costs nothing: neither torch nor transformers nor matplotlib.
"""

import warnings

import lazy_loader

with warnings.catch_warnings():
    # Without ipywidgets tqdm writes its bars as text, and says so in red when it is first imported in a notebook: here,
    # before other packages import it.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401  # pyright: ignore[reportUnusedImport]

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
