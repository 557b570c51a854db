"""Keep what the tutorials printed and drew when the documentation was built: `make tutorials` runs the build, then this.

Read the Docs stops builds after a quarter of an hour, less than it takes to run all tutorials, and shows these outputs instead. Pictures
are kept in 256 colors, which is a quarter of their size.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
from PIL import Image

HERE = Path(__file__).parent
BUILT, KEPT = HERE / "_build" / "jupyter_execute" / "tutorials", HERE.parent / "tutorials"


def smaller(png: str) -> str:
    """A base64 PNG in 256 colors."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    """Put the outputs of the executed copies into the tutorials, whose sources must be the same."""
    for file in sorted(KEPT.glob("*.ipynb")):
        kept, built = (nbformat.read(place, as_version=4) for place in (file, BUILT / file.name))
        if [cell.source for cell in kept.cells] != [cell.source for cell in built.cells]:
            raise SystemExit(f"{file.name} has changed since the documentation was built; run `make tutorials`.")
        for mine, theirs in zip(kept.cells, built.cells, strict=True):
            if mine.cell_type != "code":
                continue
            for output in theirs.outputs:
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = smaller(output["data"]["image/png"])
            mine.outputs, mine.execution_count = theirs.outputs, theirs.execution_count
        nbformat.write(kept, file)


if __name__ == "__main__":
    main()
