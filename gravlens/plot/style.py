"""One style for every figure, legible to colour-blind readers and in grey print; and saving of figures.

The style holds only inside a plot and while its figure is drawn: a user's rcParams stay unchanged. A figure is pyplot's
where pyplot shows it: in a notebook, and where the user has imported it. A script without pyplot never loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import get_backend, rc_context
from matplotlib._pylab_helpers import Gcf
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.registry import BackendFilter, backend_registry
from matplotlib.figure import Figure

from gravlens.core.errors import GravlensError, at_home, of_kind
from gravlens.core.files import write_atomically

# Okabe and Ito's palette ("Color Universal Design", 2008), which colour-blind readers can tell apart.
BLUE, GREY = "#0072B2", "#8A8A8A"
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Whatever differs by colour differs by dashes or markers too: paper is often grey.
DASHES: tuple[Any, ...] = ("--", (0, (1, 1.2)), "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType, embedded: the text of a PDF stays text (journals refuse matplotlib's own Type 3)
    "svg.fonttype": "path",  # an SVG cannot bring its font along: outlines look the same everywhere
    "svg.hashsalt": "gravlens",  # the same figure is the same file
}
DPI = 200  # of the screen and of a notebook
PRINT_DPI = 300
COLUMN = (3.6, 2.9)  # inches: one column of a page
NO_DATE = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
LABELS = {
    "alignment": r"alignment with $v_\mathrm{rev}$ (cosine)",
    "fraction": "fraction of the way back to the witness",
    "projection": r"drift along $v_\mathrm{rev}$ (residual units)",
    "drift_norm": "norm of the drift (residual units)",
    "alignment_final": r"alignment with $v_\mathrm{rev}$, last step (cosine)",
    "fraction_final": "fraction of the way back, last step",
    "compliance_rate": "harmful prompts answered (%)",
    "over_refusal": "harmless prompts refused (%)",
    "refusal_log_odds": "refusal log-odds (nats)",
    "task_loss": "held-out task loss (nats per token)",
    "seconds_per_step": "seconds per step",
}
UNITS = {"refusal_log_odds": "nats", "two_sided_log_odds": "nats", "task_loss": "nats per token"}
SHARES = ("compliance_rate", "over_refusal")


class PictureFigure(Figure):
    """A Figure in this style, whoever draws it and when: tick labels are made only as they are drawn."""

    def draw(self, renderer: Any) -> None:
        # how fonts are embedded is for the whole file: a user's `savefig` would begin a PDF in one way, end in another
        with rc_context({name: value for name, value in STYLE.items() if not name.startswith(("pdf.", "svg."))}):
            super().draw(renderer)


class PictureAxes(Axes):
    """An Axes that a notebook shows as its picture, where pyplot does not show its figure anyway."""

    def _repr_png_(self) -> bytes | None:
        figure = _figure(self)
        silent = backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE)
        shows = str(get_backend(auto_select=False)).lower() not in silent  # "Agg" and "agg" are one
        # at the end of a cell pyplot shows its figures and lets go of them: this would be a second picture
        return None if shows and figure.canvas.manager in Gcf.get_all_fig_managers() else _drawn(figure, "png", DPI)


@contextmanager
def styled() -> Generator[None]:
    """Apply the style: a decorator of every plot."""
    if pyplot := _pyplot():
        # chooses the backend now: that of a notebook turns on rcParams["interactive"], which would end with the style
        pyplot.draw_if_interactive()
    with rc_context(STYLE):
        yield


def axes_of(ax: Axes | None, size: tuple[float, float] = COLUMN, *, hidden: bool = False) -> Axes:
    """`ax`, or an Axes in a new figure of `size` inches: pyplot's where pyplot shows it, unless `hidden`."""
    if ax is not None:
        return of_kind(ax, Axes, "ax is one Axes to draw into.", "_, (left, right) = plt.subplots(1, 2), then ax=left.")
    pyplot = None if hidden else _pyplot()
    # constrained: legends and labels outside of the axes are not cut off
    look: dict[str, Any] = {"figsize": size, "dpi": DPI, "layout": "constrained"}
    figure = pyplot.figure(FigureClass=PictureFigure, **look) if pyplot else PictureFigure(**look)
    with rc_context(STYLE):  # frame and labels are as they were made, and a caller may hand these Axes to a plot
        return figure.add_subplot(axes_class=PictureAxes)


def save_figure(drawn: Axes | Figure, path: Path | str, *, formats: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """Save a figure for print: PDF with embedded text and PNG at 300 dpi; equal figures give equal bytes.

    Args:
        drawn: the result of a `plot_…` function, or any matplotlib figure.
        path: with a suffix (`"alignment.svg"`) one file, without one a file for each of `formats`.
        formats: among `pdf`, `png`, `svg`; GravlensError for another.

    Examples:
        >>> paths = gl.plot.save_figure(gl.plot_alignment(tr), "alignment", formats=("png",))
        >>> [path.name for path in paths]
        ['alignment.png']
    """
    path = at_home(path)
    if path.suffix[1:] in FigureCanvasBase.filetypes:  # those that are not ours are an error below
        path, formats = path.with_suffix(""), (path.suffix[1:],)
    if unknown := [name for name in formats if name not in NO_DATE]:
        given = f"The format {unknown[0]!r} was asked for."
        raise GravlensError(given, f"Formats: {', '.join(NO_DATE)}.", "one of these.")
    figure = _figure(drawn)
    # not with_suffix, which would cut "layer_0.5" at the dot
    files = {path.with_name(f"{path.name}.{name}"): name for name in formats}
    return [write_atomically(file, _drawn(figure, name, PRINT_DPI)) for file, name in files.items()]


def words(name: Any) -> str:
    """A column's or arm's name as it is read."""
    return str(name).replace("_", " ")


def change_of(score: str) -> str:
    """Axis label of a score's change, with its unit where known."""
    return f"change of {words(score)}" + (f" ({UNITS[score]})" if score in UNITS else "")


def _pyplot() -> Any:
    """The module pyplot: in a notebook, and where the user has imported it; else None."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return import_module("matplotlib.pyplot") if hasattr(shell, "kernel") else sys.modules.get("matplotlib.pyplot")


def _figure(drawn: Axes | Figure) -> Figure:
    drawn = of_kind(drawn, Artist, "Axes or a Figure are saved.", "the Axes that a plot_… function returned.")
    figure = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    assert isinstance(figure, Figure)  # an Axes that was drawn into has one
    return figure


def _drawn(figure: Figure, name: str, dpi: int) -> bytes:
    file = BytesIO()
    with rc_context(STYLE):
        # fonts are embedded when a figure is saved, so the style has to hold here too
        figure.savefig(file, format=name, dpi=dpi, metadata=NO_DATE[name])
    return file.getvalue()
