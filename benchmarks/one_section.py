"""P5 and P4 for one section and nothing else: tl.superresolve without a model, beside simple methods.

    python benchmarks/one_section.py holdout            # half of the spots of C4, C2, B4 hidden, five times
    python benchmarks/one_section.py truth              # the pancreas measured with Visium-like spots, against its molecules
    python benchmarks/one_section.py shuffled           # the same with the image displaced by 1 mm
    python benchmarks/one_section.py time --genes 300   # or all: seconds and peak memory on C4
    python benchmarks/one_section.py --table

Real sections are read from the folder named by STGEN_DATA. Each run leaves a JSON in benchmarks/results. Genes, kernels, noise
and intervals are decided on the visible spots.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import spatialdata as sd
from scipy.spatial.distance import cdist
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import stgen
from stgen import datasets, pp, tl
from stgen._spatial.grid import Grid
from stgen._spatial.measured import measurement_of
from stgen.features import bin_features
from stgen.kriging import NOISE, matern

RESULTS = Path(__file__).parent / "results"
ROWS = [("C4", "norm"), ("C2", "norm"), ("C4", "raw"), ("B4", "raw")]
N_GENES, REPEATS = 300, 5


def on_scale(counts: np.ndarray, total: np.ndarray, scale: str) -> np.ndarray:
    """Counts on one of the two scales of the protocol."""
    return np.log1p(counts / total[:, None] * 1e4) if scale == "norm" else np.log1p(counts)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of columns, 0 where one is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 1e-12, (a * b).sum(0) / np.maximum(norm, 1e-12), 0)


def scores(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Scores of P5."""
    r = np.sort(correlation(prediction, truth))[::-1]
    return {
        "PCC-10_oracle": r[:10].mean(),
        "PCC-50_oracle": r[:50].mean(),
        "PCC": r.mean(),
        "MSE": ((prediction - truth) ** 2).mean(),
    }


# ---- the simple methods ----------------------------------------------------------------------------------------------


def ridge(kernel: np.ndarray, y: np.ndarray, *, each: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernel ridge regression with the penalty of least error out of fold, for each gene or for all: mean, weights, errors."""
    mean = y.mean(0)
    values, vectors = np.linalg.eigh(kernel)
    rotated, squared = vectors.T @ (y - mean), vectors**2
    error = []
    for noise in NOISE:
        inverse = 1 / (values + noise)
        error.append((vectors @ (inverse[:, None] * rotated)) / (squared @ inverse)[:, None])
    loss = (np.array(error) ** 2).mean(1)
    best = loss.argmin(0) if each else np.full(y.shape[1], (loss / y.var(0).clip(1e-12)).mean(1).argmin())
    weights = vectors @ (rotated / (values[:, None] + NOISE[best]))
    return mean, weights, np.take_along_axis(np.array(error), best[None, None], 0)[0]


def interpolation(seen: np.ndarray, y: np.ndarray, hidden: np.ndarray, _: np.ndarray, __: np.ndarray) -> np.ndarray:
    """Mean of the visible spots, weighted with a Gaussian of one pitch."""
    weight = np.exp(-0.5 * cdist(hidden, seen) ** 2)
    return weight @ y / weight.sum(1, keepdims=True)


def gaussian_process(seen: np.ndarray, y: np.ndarray, hidden: np.ndarray, _: np.ndarray, __: np.ndarray) -> np.ndarray:
    """Matern process of the length that predicts best out of fold."""
    best = None
    for length in (1.0, 2.0, 3.0, 5.0, 8.0):
        mean, weights, error = ridge(matern(cdist(seen, seen), length), y, each=True)
        loss = ((error**2).mean(0) / y.var(0).clip(1e-12)).mean()
        if best is None or loss < best[0]:
            best = loss, mean + matern(cdist(hidden, seen), length) @ weights
    return best[1]


def probe(seen: np.ndarray, y: np.ndarray, hidden: np.ndarray, x: np.ndarray, x_hidden: np.ndarray) -> np.ndarray:
    """Ridge regression on the texture embedding."""
    mean, weights, _ = ridge(x @ x.T / x.shape[1], y, each=False)
    return mean + x_hidden @ x.T / x.shape[1] @ weights


def probe_and_process(
    seen: np.ndarray, y: np.ndarray, hidden: np.ndarray, x: np.ndarray, x_hidden: np.ndarray
) -> np.ndarray:
    """The probe, and a process on its errors out of fold."""
    error = ridge(x @ x.T / x.shape[1], y, each=False)[2]
    return probe(seen, y, hidden, x, x_hidden) + gaussian_process(seen, error, hidden, x, x_hidden)


SIMPLE = {
    "Gaussian interpolation": interpolation,
    "Gaussian process": gaussian_process,
    "linear probe": probe,
    "probe + Gaussian process": probe_and_process,
}


# ---- P5 --------------------------------------------------------------------------------------------------------------


@cache
def section(name: str) -> sd.SpatialData:
    """A section with its texture embedding, which only the simple methods use."""
    sdata = datasets.her2st(name)
    pp.embed(sdata, image_key="he")
    return sdata


def holdout(name: str, scale: str, repeat: int) -> None:
    """Half of the spots hidden: all methods on the other half."""
    file = RESULTS / f"P5-{name}-{scale}-{repeat}.json"
    if file.exists():
        return
    whole, load = section(name), os.getloadavg()[0]
    table = whole["spot_counts"]
    order = np.random.default_rng(repeat).permutation(table.n_obs)
    hidden, seen = np.sort(order[: table.n_obs // 2]), np.sort(order[table.n_obs // 2 :])
    visible = table[seen].copy()
    genes = pp.select_genes(
        visible, N_GENES, flavor="mean_var", transform=f"log1p_{scale}", exclude=None, key_added=None
    )
    counts, total = table[:, genes].X.toarray(), np.asarray(table.X.sum(1)).ravel()
    y = on_scale(counts, total, scale)
    out = {}

    x = table.obsm["X_texture"]
    x = np.clip((x - x[seen].mean(0)) / x[seen].std(0).clip(1e-9), -4, 4)
    xy = table.obsm["spatial"] / np.median(np.sort(cdist(*[table.obsm["spatial"]] * 2), 1)[:, 1])
    for label, method in SIMPLE.items():
        out[label] = scores(method(xy[seen], y[seen], xy[hidden], x[seen], x[hidden]), y[hidden])

    sdata = sd.SpatialData(
        images={"he": whole["he"]}, shapes={"spots": whole["spots"]}, tables={"spot_counts": visible}
    )
    start = time.perf_counter()
    tl.superresolve(sdata, "he", genes, n_samples=1, progress=False)
    seconds = time.perf_counter() - start
    sdata.tables["all"] = table
    footprints = measurement_of(sdata, "all", Grid.of_map(sdata, "superresolved"), genes[:1])
    pooled = footprints.pool(np.asarray(sdata["superresolved"].data))[hidden]
    depth = footprints.pool(np.asarray(sdata["superresolved_total"].data))[hidden, 0]
    known = (
        footprints.pool(np.isfinite(np.asarray(sdata["superresolved_total"].data)))[hidden, 0] / footprints.area[hidden]
    )
    prediction = on_scale(pooled / known.clip(1e-6)[:, None], (depth / known.clip(1e-6)).clip(1e-6), scale)
    prediction[known < 0.5] = y[seen].mean(0)  # off what was taken for tissue
    var = sdata["superresolved_out_of_fold"].var
    width = var["interval_90_norm" if scale == "norm" else "interval_90"].to_numpy()
    r, trusted = correlation(prediction, y[hidden]), var["trusted"].to_numpy()
    out["stgen"] = scores(prediction, y[hidden]) | {
        "coverage_90%": (np.abs(prediction - y[hidden]) <= width).mean(), "seconds": seconds, "n_trusted": int(trusted.sum()), "n_off_tissue": int((known < 0.5).sum()),
        "PCC_trusted": r[trusted].mean(), "PCC_others": r[~trusted].mean() if (~trusted).any() else np.nan,
        "from_image": var["from_image"].mean(), "from_neighbors": var["from_neighbors"].mean(),
    }  # fmt: skip
    write(file, {"protocol": "P5", "section": name, "scale": scale, "repeat": repeat, "load": load, "scores": out})


def write(file: Path, content: dict) -> None:
    """One result."""
    RESULTS.mkdir(exist_ok=True)
    content = {"stgen": stgen.__version__, **content}
    file.write_text(json.dumps(content, indent=1, default=float))
    print(file.name, json.dumps(content["scores"], default=lambda v: round(float(v), 4)), flush=True)


# ---- P4 with spots ---------------------------------------------------------------------------------------------------


@cache
def pancreas() -> sd.SpatialData:
    """The section of P4: molecules in halves, spots of 55 µm every 100 µm over the measured half."""
    import superresolution

    halves = superresolution.halves()
    out = sd.SpatialData(images={"stains": halves["stains"]}, points=dict(halves.points.items()))
    bounds = (0, 0, superresolution.SCALES["10x"]["width_um"], 2920)
    for key in ("true", "measured"):
        pp.rasterize(out, points_key=key, genes=superresolution.genes(), bin_um=10.0, bounds_um=bounds, mask_um=None, key_added=f"{key}_map")  # fmt: skip
    pp.simulate_spots(out, points_key="measured", genes=None, key_added="spots")
    return out


def displaced(sdata: sd.SpatialData, image_key: str, um: float) -> sd.SpatialData:
    """The object with an image moved along x, what leaves it on one side comes back on the other: it shows other tissue."""
    finest = sdata[image_key]["scale0"]["image"]
    places = get_transformation(sdata[image_key], get_all=True)
    px_um = places["um"].to_affine_matrix(("x",), ("x",))[0, 0]
    rolled = np.roll(np.asarray(finest.data), round(um / px_um), axis=2)
    image = Image2DModel.parse(
        rolled, dims=("c", "y", "x"), c_coords=list(finest.coords["c"].values), transformations=places
    )
    images = {**dict(sdata.images.items()), image_key: image}
    return sd.SpatialData(
        images=images, shapes=dict(sdata.shapes.items()), tables=dict(sdata.tables.items()), attrs=dict(sdata.attrs)
    )


def truth(*, shuffled: bool = False) -> None:
    """The map against molecular truth in the test rows of P4; bins off the tissue count as empty."""
    import superresolution

    file = RESULTS / f"P4-spots{'-shuffled' if shuffled else ''}.json"
    if file.exists():
        return
    sdata, load = pancreas(), os.getloadavg()[0]
    low, high = (int(v / 10) for v in superresolution.ROWS["test"])
    genes, scale = superresolution.genes(), superresolution.gene_scale("10x")
    if shuffled:
        sdata = displaced(sdata, "stains", 1000.0)
    true, replicate = (np.asarray(sdata[f"{key}_map"].data)[:, low:high] for key in ("true", "measured"))

    def of(map_: np.ndarray) -> dict[str, float]:
        a, b, c = (
            np.log1p(np.maximum(np.nan_to_num(m), 0)).reshape(len(m), -1).T / scale.to_numpy()
            for m in (map_, true, replicate)
        )
        r, ceiling = correlation(a, b), np.sqrt(np.maximum(correlation(b, c), 0))
        return {"PCC": r.mean(), "PCC/ceiling": (r / ceiling).mean(), "RMSE": np.sqrt(((a - b) ** 2).mean(0)).mean()}

    grid = Grid.of_map(sdata, "true_map")
    spots = measurement_of(sdata, "spots_counts", grid, genes)
    out = {}
    if not shuffled:
        for kernel in ("nearest", "linear", "cubic", "gaussian"):
            out[{"cubic": "bicubic", "linear": "bilinear"}.get(kernel, kernel)] = of(
                spots.interpolate(low, 0, high - low, grid.width, kernel)[0]
            )
        out |= {label: of(map_) for label, map_ in simple_maps(sdata, grid, spots, low, high).items()}
    ways = {"stgen": {}, "stgen, consistent": {"consistency": True}, "stgen, no image": {"image_key": None}}
    for label, way in ways.items():
        if shuffled and label != "stgen":
            continue
        start = time.perf_counter()
        tl.superresolve(
            sdata, genes=genes, low_res="spots_counts", like="true_map", n_samples=2, keep_samples=True, key_added="result",
            overwrite=True, progress=False, **({"image_key": "stains"} | way),
        )  # fmt: skip
        found = np.asarray(sdata["result"].data)[:, low:high]
        sample = np.asarray(sdata["result_samples"].data)[::2, low:high]
        a, b = (np.log1p(np.nan_to_num(m)).reshape(len(m), -1) for m in (sample, true))
        out[label] = of(found) | {
            "RVD_sample": ((a.var(1) / b.var(1) - 1) ** 2).mean(), "seconds": time.perf_counter() - start,
            **{k: sdata.attrs["stgen"]["result"][k] for k in ("from_image", "from_neighbors", "correlation_length_um")},
        }  # fmt: skip
    write(file, {"protocol": "P4, spots", "load": load, "n_spots": len(spots), "scores": out})


def simple_maps(sdata: sd.SpatialData, grid: Grid, spots: object, low: int, high: int) -> dict[str, np.ndarray]:
    """Kriging, probe, and kriging of the probe's errors, on the features that the model without a model sees."""
    y = np.log1p(spots.counts)
    px_per_bin = max(1, round(grid.bin_um / 2))
    read = grid.image_window(sdata, "stains", px_per_bin=px_per_bin)
    features = bin_features(read, grid.height, grid.width, bin_um=grid.bin_um, px_per_bin=px_per_bin)
    footprints = spots.footprints
    seen_area = footprints.pool(np.ones((1, grid.height, grid.width), np.float32))
    of_spots = footprints.pool(features) / np.maximum(seen_area, 1e-6)
    center, spread = of_spots.mean(0), of_spots.std(0).clip(1e-9)
    x = np.clip((of_spots - center) / spread, -4, 4)
    rows, columns = np.mgrid[low:high, : grid.width] + 0.5
    xy = np.column_stack([columns.ravel(), rows.ravel()]) / spots.footprints.pitch
    out = {
        name: np.zeros((y.shape[1], high - low, grid.width)) for name in ("kriging", "linear probe", "probe + kriging")
    }
    seen = spots.footprints.centers[:, ::-1] / spots.footprints.pitch
    for start in range(0, len(xy), 20_000):
        part = slice(start, start + 20_000)
        bins = features[:, low:high].reshape(len(features), -1).T[part]
        bins = np.clip((bins - center) / spread, -4, 4)
        for name, method in (
            ("kriging", gaussian_process),
            ("linear probe", probe),
            ("probe + kriging", probe_and_process),
        ):
            counts = np.expm1(method(seen, y, xy[part], x, bins)) / spots.footprints.area.mean()
            out[name].reshape(len(out[name]), -1)[:, part] = counts.T
    return out


# ---- time and memory -------------------------------------------------------------------------------------------------


def timed(n_genes: int | None) -> None:
    """Seconds and peak memory on C4, default arguments, streamed to disk."""
    file = RESULTS / f"one-section-C4-{n_genes or 'all'}.json"
    sdata, load = datasets.her2st("C4"), os.getloadavg()[0]
    genes = None
    if n_genes:
        genes = pp.select_genes(
            sdata["spot_counts"], n_genes, flavor="mean_var", transform="log1p_norm", exclude=None, key_added=None
        )
    with tempfile.TemporaryDirectory(dir=os.environ.get("STGEN_SCRATCH")) as folder:
        start, cpu = time.perf_counter(), time.process_time()
        tl.superresolve(sdata, "he", genes, store=Path(folder) / "maps.zarr", progress=False)
        out = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    out |= {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "store_mb": size / 1e6}
    write(file, {"protocol": "time", "genes": n_genes or sdata["spot_counts"].n_vars, "load": load, "scores": out})


def table() -> None:
    """Print all results as Markdown."""
    runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("P5-*.json"))]
    frame = pd.DataFrame(
        [{"section": r["section"], "scale": r["scale"], "model": m, **s} for r in runs for m, s in r["scores"].items()]
    )
    if len(frame):
        print(frame.groupby(["section", "scale", "model"], sort=False).mean().round(3).to_string())
    for file in [*sorted(RESULTS.glob("P4-spots*.json")), *sorted(RESULTS.glob("one-section-*.json"))]:
        print(f"\n{file.stem}\n", json.dumps(json.loads(file.read_text())["scores"], indent=1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["holdout", "truth", "shuffled", "time", []], default=[])
    parser.add_argument("--genes", type=int, help="for time: how many; all by default")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if "holdout" in arguments.what:
        for name, scale in ROWS:
            for repeat in range(REPEATS):
                holdout(name, scale, repeat)
    if "truth" in arguments.what:
        truth()
    if "shuffled" in arguments.what:
        truth(shuffled=True)
    if "time" in arguments.what:
        timed(arguments.genes)
    if arguments.table or not arguments.what:
        table()


if __name__ == "__main__":
    main()
