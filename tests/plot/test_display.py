"""A notebook shows each figure once, `plt.show()` shows it, and a script without pyplot keeps none."""

import gc
import subprocess
import sys
import weakref
from io import BytesIO
from typing import Any

import matplotlib as mpl
import nbclient
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from nbformat.v4 import new_code_cell, new_notebook

from gravlens.plot.lines import plot_arms
from gravlens.plot.style import STYLE, axes_of

TABLE = '{"arm": ["one"], "run": ["a"], "compliance_rate": [0.5]}'
PLOT = "gl.plot.plot_arms(table)"
# what stands in a cell -> pictures in its output, where pyplot shows figures, and under %matplotlib agg
CELLS = {
    "the last line": (PLOT, 1, 1),
    "in the middle": (f"{PLOT}\n1", 1, 0),
    "with a semicolon": (f"{PLOT};", 1, 0),
    "named": (f"ax = {PLOT}", 1, 0),
    "two": (f"{PLOT};\n{PLOT}", 2, 1),
    "in a loop": (f"for _ in range(3):\n    {PLOT}", 3, 0),
    "show": (f"from matplotlib import pyplot as plt\n{PLOT}\nplt.show()", 1, 0),
    "again, in a later cell": ("ax", 1, 1),
    "silent, in a later cell": ("ax;", 0, 0),
    "displayed": (f"ax = {PLOT}\ndisplay(ax)", 1, 1),
    "closed": (f"ax = {PLOT}\nplt.close(ax.figure)\nax", 1, 1),
    "in one's own subplots": ("figure, (left, right) = plt.subplots(1, 2)\ngl.plot.plot_arms(table, ax=right)", 1, 0),
    "hidden": ("import gravlens.plot.style as s\nax = gl.plot.plot_arms(table, ax=s.axes_of(None, hidden=True))", 0, 0),
    "another figure of that number": ("plt.close('all')\nfigure = plt.figure().add_subplot()\nax", 2, 1),
    "pyplot switched off": (f"with plt.ioff():\n    {PLOT}\nplt.close()", 0, 0),
}
BEGINNINGS = {
    "pyplot not imported": "1;",
    "pyplot imported": "from matplotlib import pyplot as plt",
    "inline": "%matplotlib inline",
    "agg": "%matplotlib agg",
}


def pictures(cell: dict) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


@pytest.mark.long
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_notebook_shows_each_figure_once(beginning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND")  # that of tests; a kernel has its own
    sources = [f"import gravlens as gl, pandas\ntable = pandas.DataFrame({TABLE})", BEGINNINGS[beginning]]
    left = "import matplotlib\nprint(plt.get_fignums(), 'plotly' in __import__('sys').modules)"
    sources += [source for source, *_ in CELLS.values()] + [left]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    found = {name: pictures(cell) for name, cell in zip(CELLS, notebook.cells[2:], strict=False)}
    assert found == {name: one[2 if beginning == "agg" else 1] for name, one in CELLS.items()}
    if beginning != "agg":  # what was shown is let go
        assert notebook.cells[-1].outputs[0].text == "[] False\n"


def drawn(**at: Axes) -> Axes:
    return plot_arms(pd.DataFrame({"arm": ["one"], "run": ["a"], "compliance_rate": [0.5]}), **at)


def test_with_pyplot_loaded_a_figure_is_pyplot_s_until_it_is_closed() -> None:
    ax = drawn()
    assert pyplot.get_fignums() == [ax.figure.number] and pyplot.gca() is ax
    mine = pyplot.figure().add_subplot()
    assert drawn(ax=mine) is mine and len(pyplot.get_fignums()) == 2
    drawn(ax=axes_of(None, hidden=True))
    assert len(pyplot.get_fignums()) == 2, "a hidden one is not pyplot's"
    kept = weakref.ref(ax.figure)
    del ax
    pyplot.close("all")
    gc.collect()
    assert kept() is None


def pixels(rc: dict[str, Any]) -> bytes:
    """A figure that is drawn while `rc` holds, after the plot has returned."""
    figure: Any = drawn().figure
    with mpl.rc_context(rc):
        before = dict(mpl.rcParams)
        figure.canvas.draw()
        assert dict(mpl.rcParams) == before
    return bytes(figure.canvas.buffer_rgba())


def test_the_style_holds_when_the_figure_is_drawn_later() -> None:
    hostile = {name: 31 for name, value in STYLE.items() if isinstance(value, int | float) and value > 1}
    hostile.pop("pdf.fonttype")
    assert pixels(hostile) == pixels({})


def test_a_pdf_of_one_s_own_savefig_embeds_fonts_in_one_way() -> None:
    file = BytesIO()
    figure: Any = drawn().figure
    with mpl.rc_context({"pdf.fonttype": 3}):
        figure.savefig(file, format="pdf")
    assert b"/Subtype /Type3" in file.getvalue() and b"/FontFile2" not in file.getvalue()


SCRIPT = f"""
import gc, sys, warnings, weakref
warnings.simplefilter("error")
import pandas
PYPLOT
from gravlens.plot.lines import plot_arms
table = pandas.DataFrame({TABLE})
kept = [weakref.ref(plot_arms(table).figure) for _ in range(LOOPS)]
plot_arms(table)._repr_png_()
gc.collect()
print("matplotlib.pyplot" in sys.modules, sum(one() is not None for one in kept))
"""


@pytest.mark.parametrize(
    ("imported", "loops", "told"),
    [("", 100, "False 0"), ("from matplotlib import pyplot as plt", 5, "True 5")],  # the second: as seaborn's
)
def test_a_script_without_pyplot_loads_none_and_keeps_no_figure(imported: str, loops: int, told: str) -> None:
    code = SCRIPT.replace("PYPLOT", imported).replace("LOOPS", str(loops))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (told, "")
