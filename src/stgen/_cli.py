"""The commands of the shell: ``stgen report``, ``stgen export`` and ``stgen demo``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]

logger = logging.getLogger("stgen")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user did wrong is said in one line, and the exit status is then 1."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    if given.command == "demo":
        from stgen._demo import run

        run(given.out)
        return 0
    try:
        _report(given) if given.command == "report" else _export(given)
    except (KeyError, OSError, TypeError, ValueError) as error:
        logger.error("stgen %s: %s", given.command, error.args[0] if isinstance(error, KeyError) else error)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stgen", description="Reports and exports of what stgen left in a store.")
    parser.add_argument("--version", action="version", version=f"stgen {version('stgen')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{report,export,demo}")

    report = commands.add_parser("report", help="a result of superresolve as one HTML file")
    export = commands.add_parser("export", help="maps as OME-TIFF, outlines as GeoJSON, tables as Parquet or CSV")
    for command, key, path in (
        (report, "name of the result", "file to write, .html"),
        (export, "name of a map, a table, shapes or a mask", "file to write: .ome.tif, .geojson, .parquet, .csv, .tsv"),
    ):
        command.add_argument("store", type=Path, help="SpatialData store, a folder that ends in .zarr")
        command.add_argument("key", help=key)
        command.add_argument("path", type=Path, help=path)
        command.add_argument("--genes", type=_names, metavar="A,B,...", help="genes, separated by commas")
        command.add_argument("--overwrite", action="store_true", help="replace a file of this name")
    report.add_argument("--title", help="title of the page")
    export.add_argument("--image", help="GeoJSON: image in whose pixels to write, as QuPath needs it")
    export.add_argument("--layer", help="GeoJSON and tables: layer to write instead of X")
    export.add_argument("--classification", metavar="COLUMN", help="GeoJSON: column of obs that becomes the class")

    demo = commands.add_parser("demo", help="the main jobs on simulated patients; takes some minutes")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the results")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _report(given: argparse.Namespace) -> None:
    import matplotlib as mpl
    from spatialdata import read_zarr

    from stgen import pl

    mpl.use("Agg")
    pl.report(
        read_zarr(_store(given.store)), given.key, given.path, genes=given.genes, title=given.title,
        overwrite=given.overwrite,
    )  # fmt: skip


def _export(given: argparse.Namespace) -> None:
    from spatialdata import read_zarr

    from stgen import io

    name = given.path.name.lower()
    geojson = {"image_key": given.image, "classification": given.classification}
    if not name.endswith((".geojson", ".json")) and any(geojson.values()):
        raise ValueError("--image and --classification are for GeoJSON.")
    sdata = read_zarr(_store(given.store))
    options = {"genes": given.genes, "overwrite": given.overwrite}
    if name.endswith((".tif", ".tiff")):
        if given.layer is not None:
            raise ValueError("--layer is for GeoJSON and tables.")
        io.write_ome_tiff(sdata, given.key, given.path, **options)
    elif name.endswith((".geojson", ".json")):
        io.write_geojson(sdata, given.key, given.path, layer=given.layer, **geojson, **options)
    else:
        io.write_table(sdata, given.path, table_key=given.key, layer=given.layer, **options)


def _store(path: Path) -> Path:
    if not (path / "zarr.json").is_file() and not (path / ".zgroup").is_file():
        raise FileNotFoundError(f"there is no SpatialData store {path}.")
    return path
