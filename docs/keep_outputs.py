"""Keep what the tutorials printed and drew when the documentation was built: `make tutorials` runs the build, then this.

Read the Docs stops builds after a quarter of an hour, less than it takes to run all tutorials, and shows these outputs instead. Pictures
are kept in 256 colors, which is a third of their size, and the names of temporary folders are left out.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

HERE = Path(__file__).parent
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+/")
BUILT, KEPT = HERE / "_build" / "jupyter_execute" / "tutorials", HERE.parent / "tutorials"


def smaller(png: str) -> str:
    """A base64 PNG in 256 colors."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    # Median cut, the default, gives rare colors away: the few cells of one type would take the color of another.
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def whole(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without the later pieces of a stream, which the build (nb_merge_streams) added to the first and left there."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        before = kept[-1] if kept else {}
        if output.output_type == "stream" and output.name == before.get("name"):
            if not before.text.rstrip().endswith(output.text.rstrip()):
                before.text += output.text
        else:
            kept.append(output)
    return kept


def keep(file: Path, built: Path) -> None:
    """Put the outputs of the executed copy into a tutorial whose code must be the same."""
    kept, executed = (nbformat.read(place, as_version=4) for place in (file, built))
    mine, theirs = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (kept, executed))
    if [cell.source for cell in mine] != [cell.source for cell in theirs]:
        raise SystemExit(f"{file.name} has changed since the documentation was built; run `make tutorials`.")
    for cell, done in zip(mine, theirs, strict=True):
        for output in done.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
            for holder, kind in ((output, "text"), (data, "text/plain"), (data, "text/html")):
                if kind in holder:
                    holder[kind] = TEMPORARY.sub("", holder[kind])
        cell.outputs = whole([output for output in done.outputs if output.get("name") != "stderr"])  # progress bars
        cell.execution_count = done.execution_count
    nbformat.write(kept, file)


if __name__ == "__main__":
    for tutorial in sorted(KEPT.glob("*.ipynb")):
        keep(tutorial, BUILT / tutorial.name)
