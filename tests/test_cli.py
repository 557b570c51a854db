"""The commands of the shell."""

from __future__ import annotations

import subprocess
import sys

import geopandas
import pandas as pd
import pytest
import spatialdata
import tifffile

from stgen import tl
from stgen._cli import main


@pytest.fixture(scope="module")
def store(simulated, tmp_path_factory):
    """A store with maps of a section, and a cell's counts."""
    sdata = spatialdata.deepcopy(simulated)
    tl.superresolve(sdata, "he", ["EPCAM", "CD3E"], low_res="spot_counts", bin_um=20, progress=False)
    tl.aggregate_cells(sdata, map_key="superresolved", shapes_key="cells")
    path = tmp_path_factory.mktemp("store") / "section.zarr"
    sdata.write(path)
    return path


def test_report_and_exports(store, tmp_path):
    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0

    run("report", store, "superresolved", tmp_path / "a.html", "--title", "A section", "--genes", "EPCAM")
    assert "<h1>A section</h1>" in (tmp_path / "a.html").read_text(encoding="utf-8")
    run("export", store, "superresolved", tmp_path / "a.ome.tif", "--genes", "CD3E,EPCAM")
    assert tifffile.imread(tmp_path / "a.ome.tif").shape == (2, 30, 30)
    run("export", store, "superresolved_cells", tmp_path / "a.geojson", "--image", "he", "--genes", "EPCAM")
    n_cells = spatialdata.read_zarr(store)["superresolved_cells"].n_obs
    assert len(geopandas.read_file(tmp_path / "a.geojson")) == n_cells
    run("export", store, "superresolved_cells", tmp_path / "a.csv")
    assert len(pd.read_csv(tmp_path / "a.csv")) == n_cells
    run("export", store, "superresolved_cells", tmp_path / "a.csv", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "nothing.zarr", "a", "a.csv"), "there is no SpatialData store nothing.zarr"),
        (("export", None, "nothing", "a.ome.tif"), "no map in sdata.images 'nothing'"),
        (("export", None, "superresolved", "a.tif"), "must end in .ome.tif"),
        (("export", None, "superresolved", "a.ome.tif", "--layer", "x"), "--layer is for GeoJSON"),
        (("export", None, "superresolved_cells", "a.csv", "--image", "he"), "are for GeoJSON"),
        (("export", None, "superresolved_cells", "a.doc"), "must end in .parquet"),
        (("report", None, "nothing", "a.html"), "results of stgen.tl.superresolve are superresolved"),
    ],
)
def test_mistakes_are_said_in_one_line(store, tmp_path, monkeypatch, caplog, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(store) if argument is None else argument for argument in arguments]) == 1
    assert message in caplog.text
    assert "Traceback" not in caplog.text
    assert not list(tmp_path.iterdir())


def test_help_and_version_need_nothing_heavy():
    code = "import sys; from stgen._cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert not {'torch', 'spatialdata'} & set(sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"report", "export", "demo"} <= set(
        done.stdout.replace(",", " ").replace("{", " ").replace("}", " ").split()
    )
    with pytest.raises(SystemExit):
        main([])
