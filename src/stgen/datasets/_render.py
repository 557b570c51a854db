"""An H&E-like picture of the simulated tissue, through optical densities (Beer-Lambert)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from ._tissue import CELL_TYPES, STEP, Tissue, at_points, noise, upsample

# optical density (red, green, blue) of one unit of hematoxylin, eosin and red blood cells
_VECTORS = np.array([[0.562, 0.720, 0.406], [0.178, 0.790, 0.480], [0.10, 0.72, 0.66]])
# concentration of hematoxylin, amplitude of the chromatin texture, dark rim, nucleoli, irregularity of the outline
_NUCLEI = {
    "tumor": (0.72, 0.30, 0.42, 0.75, 0.07),
    "luminal": (0.90, 0.22, 0.25, 0.15, 0.03),
    "myoepithelial": (1.15, 0.12, 0.0, 0.0, 0.03),
    "fibroblast": (1.15, 0.15, 0.0, 0.0, 0.04),
    "T cell": (1.50, 0.16, 0.05, 0.0, 0.03),
    "B cell": (1.34, 0.22, 0.08, 0.05, 0.03),
    "macrophage": (0.82, 0.20, 0.25, 0.1, 0.12),
    "endothelial": (1.20, 0.12, 0.0, 0.0, 0.03),
    "adipocyte": (1.25, 0.10, 0.0, 0.0, 0.02),
}
_TILE = 1024
LARGE = 2048  # pixels per side above which the image is multiscale


@dataclass
class Stain:
    """What a patient's slide shifts: stain vectors and strengths, white point."""

    vectors: np.ndarray
    strength: np.ndarray
    white: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Stain:
        """Draw a slide."""
        vectors = _VECTORS * np.exp(rng.normal(0, 0.05, _VECTORS.shape))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        strength = np.exp(rng.normal(0, 0.12, 3))
        return cls(vectors, strength, 243 + rng.normal(0, 2.0) + rng.normal(0, 0.7, 3))


def render(tissue: Tissue, stain: Stain, mpp: float, rng: np.random.Generator) -> np.ndarray:
    """Render to uint8 ``(3, h, w)`` at `mpp` µm per pixel."""
    n = int(np.ceil(tissue.size_um / mpp - 1e-6))
    n += -n % 4 if n > LARGE else 0  # so that the scales of a multiscale image are exact
    canvas = _Canvas(tissue, rng)
    image = np.empty((3, n, n), np.uint8)
    margin = int(np.ceil(12 / mpp))
    for y0 in range(0, n, _TILE):
        for x0 in range(0, n, _TILE):
            y1, x1 = min(y0 + _TILE, n), min(x0 + _TILE, n)
            tile = canvas.tile(x0 - margin, y0 - margin, x1 + margin, y1 + margin, mpp, stain)
            tile = tile[:, margin : margin + y1 - y0, margin : margin + x1 - x0]
            grain = np.random.default_rng([canvas.grain, y0, x0]).standard_normal(tile.shape, np.float32)
            tile = tile * canvas.light(x0, y0, x1, y1, mpp) + 1.6 * grain
            image[:, y0:y1, x0:x1] = np.clip(np.rint(tile), 0, 255)
    return image


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 inside, 0 outside, with an edge of `width` µm."""
    return np.clip(distance / width + 0.5, 0, 1)


class _Canvas:
    """Everything that is drawn before the picture is cut into tiles."""

    def __init__(self, tissue: Tissue, rng: np.random.Generator):
        self.tissue = tissue
        f32 = lambda a: a.astype(np.float32)  # noqa: E731
        n = tissue.nest.shape[0]
        self.plan = {
            k: f32(getattr(tissue, k))
            for k in ("outline", "nest", "gland", "lumen", "vessel", "vessel_lumen", "aggregate")
        }
        self.plan["slow"] = f32(noise(rng, n, 60 / STEP))
        self.plan["mid"] = f32(noise(rng, n, 14 / STEP))
        self.plan["light"] = f32(noise(rng, n, 250 / STEP))
        self.grain = int(rng.integers(2**31))
        self.texture = [f32(_periodic(rng, 512, s)) for s in (1.6, 2.4, 5.0)]  # one texel = 0.5 µm
        self.fine, self.coarse = _fibers(tissue.fibers, tissue.size_um, rng)
        self.look = np.random.default_rng([self.grain, 1])
        epithelial = tissue.cells["cell_type"].isin(["tumor", "luminal"]).to_numpy()
        self.epithelium = cKDTree(tissue.cells.loc[epithelial, ["x", "y"]].to_numpy())
        self.fat = cKDTree(tissue.fat_seeds)
        self.nuclei = _Nuclei(tissue, self.look)
        self.blood = _blood(tissue, self.look)

    def light(self, x0: int, y0: int, x1: int, y1: int, mpp: float) -> np.ndarray:
        """Low-frequency illumination."""
        rows, cols = (((np.arange(a, b) + 0.5) * mpp / STEP - 0.5).astype(np.float32) for a, b in ((y0, y1), (x0, x1)))
        return 1 + 0.008 * upsample(self.plan["light"], rows, cols)

    def grit(self, xs: np.ndarray, ys: np.ndarray, k: int) -> np.ndarray:
        """Periodic texture `k` on the mesh of `xs` and `ys` (µm)."""
        return self.texture[k][np.ix_((ys * 2).astype(int) % 512, (xs * 2).astype(int) % 512)]

    def tile(self, x0: int, y0: int, x1: int, y1: int, mpp: float, stain: Stain) -> np.ndarray:
        """Draw a window (pixels), float32 ``(3, h, w)``."""
        xs, ys = ((np.arange(a, b) + 0.5).astype(np.float32) * mpp for a, b in ((x0, x1), (y0, y1)))
        cols, rows = xs / STEP - 0.5, ys / STEP - 0.5
        p = {k: upsample(v, rows, cols) for k, v in self.plan.items() if k != "light"}
        fine, coarse = (upsample(v, ys - 0.5, xs - 0.5) for v in (self.fine, self.coarse))
        grit, lumps = self.grit(xs, ys, 1), self.grit(xs, ys, 2)

        # stroma: eosinophilic fibers in bundles, with clefts between them
        eosin = 0.46 + 0.09 * coarse + 0.11 * fine + 0.05 * p["slow"]
        cleft = _soft(-(coarse + 0.35 * fine + 0.4 * p["mid"]) - 1.9, 0.6)
        eosin = np.clip(eosin, 0.1, 1.2) * (1 - 0.85 * cleft)
        hema = 0.05 + 0.02 * np.abs(p["mid"])
        near = np.clip(p["aggregate"], 0, 1)
        eosin, hema = eosin * (1 - 0.55 * near), hema + 0.10 * near * (1 + 0.3 * lumps)

        # epithelium: cytoplasm with faint borders between cells
        border = self._borders(xs, ys)
        cytoplasm = 0.34 + 0.05 * grit + 0.06 * p["mid"] + 0.04 * lumps
        cytoplasm = cytoplasm * (1 - 0.35 * np.exp(-((border / 1.1) ** 2)))
        ragged = 1.1 * lumps
        nest = _soft(p["nest"] + ragged, 2.0)
        gap = _soft(3.2 - np.abs(p["nest"] + 3.0 + ragged), 2.0) * _soft(p["slow"] + 0.5 * p["mid"] - 0.9, 0.5)
        eosin, hema = eosin * (1 - gap), hema * (1 - gap)
        eosin = eosin * (1 - nest) + nest * cytoplasm
        hema = hema * (1 - nest) + nest * (0.17 + 0.03 * lumps)
        gland = _soft(p["gland"] + 0.5 * lumps, 1.6)
        apical = np.exp(-((np.clip(p["lumen"], -30, 0) / 5.0) ** 2))
        eosin = eosin * (1 - gland) + gland * (cytoplasm + 0.22 * apical)
        hema = hema * (1 - gland) + gland * 0.14
        membrane = np.exp(-(((p["gland"] + 2.2) / 1.3) ** 2))
        eosin = np.maximum(eosin, 0.62 * membrane)
        lumen = _soft(p["lumen"] + 0.9 * lumps, 1.5)
        secretion = 0.30 * _soft(p["mid"] + 0.35 * p["slow"] - 0.55, 1.2) + 0.03
        eosin, hema = eosin * (1 - lumen) + lumen * secretion, hema * (1 - lumen)

        # vessels
        wall = _soft(p["vessel"], 1.6)
        eosin = eosin * (1 - wall) + wall * 0.55
        bore = _soft(p["vessel_lumen"], 1.4)
        eosin, hema = eosin * (1 - bore) + 0.02, hema * (1 - bore)
        red = np.zeros_like(eosin)
        _splat_discs(red, self.blood, x0, y0, mpp)
        red *= bore

        # fat: empty vacuoles with thin membranes
        vacuole, rim = self._fat(xs, ys)
        eosin, hema = eosin * (1 - vacuole) + 0.42 * rim, hema * (1 - vacuole)

        # nuclei over all
        self.nuclei.halo(eosin, x0, y0, mpp)
        nuclear = np.zeros_like(hema)
        self.nuclei.splat(nuclear, x0, y0, mpp, self.grit(xs, ys, 0), grit)
        covered = np.clip(nuclear / 0.5, 0, 1)
        hema = np.maximum(hema, nuclear)
        eosin = eosin * (1 - 0.62 * covered) + 0.04 * covered

        glass = _soft(p["outline"] + 1.5 * lumps, 3.0)
        od = 0.0
        for amount, vector, strength in zip((hema, eosin, red), stain.vectors, stain.strength, strict=True):
            od = od + (amount * glass * strength)[None] * vector[:, None, None].astype(np.float32)
        rgb = stain.white[:, None, None].astype(np.float32) * np.exp(-od)
        sigma = 0.42 / mpp
        return gaussian_filter(rgb, (0, sigma, sigma), truncate=3) if sigma > 0.2 else rgb

    def _mesh(self, xs: np.ndarray, ys: np.ndarray, step: float) -> tuple:
        """A coarse grid that covers the window: points, shape, and where the pixels lie in it."""
        axes, where = [], []
        for a in (xs, ys):
            k0 = int(np.floor(a[0] / step)) - 2
            k = np.arange(k0, int(np.ceil(a[-1] / step)) + 3)
            axes.append(k * step)
            where.append((a / step - k0).astype(np.float32))
        gx, gy = np.meshgrid(*axes)
        return np.stack([gx.ravel(), gy.ravel()], 1), gx.shape, where

    def _borders(self, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
        """Half the difference between the distances to the two nearest epithelial cells (µm)."""
        points, shape, (wx, wy) = self._mesh(xs, ys, 2.0)
        near = at_points(np.maximum(self.plan["nest"], self.plan["gland"]), points) > -4
        d = np.zeros((len(points), 2), np.float32)
        d[:, 1] = 9.0
        if near.any():
            d[near] = self.epithelium.query(points[near], 2)[0]
        return upsample(((d[:, 1] - d[:, 0]) / 2).reshape(shape), wy, wx)

    def _fat(self, xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vacuoles (1 within) and their membranes (1 on)."""
        points, shape, (wx, wy) = self._mesh(xs, ys, 2.5)
        d, i = self.fat.query(points, 3)
        first, second = self.tissue.fat_is[i[:, 0]], self.tissue.fat_is[i[:, 1]]
        # a smooth minimum of the distances to the two nearest edges rounds the corners
        e1, e2 = (d[:, 1] - d[:, 0]) / 2, (d[:, 2] - d[:, 0]) / 2
        depth = 0.4 - 4.0 * np.log(np.exp(-e1 / 4.0) + np.exp(-e2 / 4.0))
        depth = np.where(first, depth, np.where(second, -e1, -4.0)).clip(-4).astype(np.float32)
        depth = upsample(depth.reshape(shape), wy, wx)
        return _soft(depth - 0.9, 1.0), np.exp(-(((depth - 0.4) / 0.8) ** 2))


def _periodic(rng: np.random.Generator, n: int, sigma: float) -> np.ndarray:
    field = gaussian_filter(rng.standard_normal((n, n)), sigma, mode="wrap")
    return field / field.std()


def _fibers(angle: np.ndarray, size_um: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Fibers and bundles: noise smeared along the flow, on a 1 µm grid (line integrals by doubling)."""
    n = int(np.ceil(size_um))
    at = ((np.arange(n) + 0.5) / STEP - 0.5).astype(np.float32)
    fx, fy = (upsample(f(angle).astype(np.float32), at, at) for f in (np.cos, np.sin))
    norm = np.maximum(np.hypot(fx, fy), 1e-3)
    dx, dy = fx / norm, fy / norm
    iy, ix = np.mgrid[:n, :n].astype(np.int32)
    white = rng.standard_normal((2, n, n), np.float32)
    fine, coarse = gaussian_filter(white[0], 0.75), gaussian_filter(white[1], 2.6)
    for level in range(6):
        x = np.clip(np.rint(ix + dx), 0, n - 1).astype(np.int32)
        y = np.clip(np.rint(iy + dy), 0, n - 1).astype(np.int32)
        flat = y * n + x
        if level < 5:
            fine = 0.5 * (fine + fine.ravel()[flat])
        coarse = 0.5 * (coarse + coarse.ravel()[flat])
        dx, dy = dx + dx.ravel()[flat], dy + dy.ravel()[flat]
    return fine / fine.std(), coarse / coarse.std()


def _blood(tissue: Tissue, rng: np.random.Generator) -> np.ndarray:
    """Red blood cells in the lumina of vessels: x, y, radius, strength."""
    rows, cols = np.nonzero(tissue.vessel_lumen > 0)
    xy = (np.stack([cols, rows], 1) + rng.uniform(0, 1, (len(rows), 2))) * STEP
    keep = rng.random(len(xy)) < 0.14
    xy = xy[keep]
    return np.column_stack([xy, rng.uniform(2.6, 3.4, len(xy)), rng.uniform(0.55, 0.95, len(xy))])


def _window(
    xy: np.ndarray, reach: float, x0: int, y0: int, shape: tuple[int, ...], mpp: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels within `reach` µm of each point: which point, offsets in µm, flat pixel index."""
    k = int(np.ceil(reach / mpp)) + 1
    step = np.arange(-k, k + 1)
    px, py = np.floor(xy[:, 0] / mpp).astype(int), np.floor(xy[:, 1] / mpp).astype(int)
    col, row = px[:, None, None] + step[None, None] - x0, py[:, None, None] + step[None, :, None] - y0
    dx = ((col + x0 + 0.5) * mpp - xy[:, 0, None, None]).astype(np.float32)
    dy = ((row + y0 + 0.5) * mpp - xy[:, 1, None, None]).astype(np.float32)
    ok = (col >= 0) & (col < shape[1]) & (row >= 0) & (row < shape[0])
    return dx, dy, np.where(ok, row * shape[1] + col, -1)


def _visible(xy: np.ndarray, reach: float, x0: int, y0: int, shape: tuple[int, ...], mpp: float) -> np.ndarray:
    lo, hi = np.array([x0, y0]) * mpp - reach, np.array([x0 + shape[1], y0 + shape[0]]) * mpp + reach
    return np.all((xy > lo) & (xy < hi), axis=1)


def _splat_discs(out: np.ndarray, discs: np.ndarray, x0: int, y0: int, mpp: float) -> None:
    discs = discs[_visible(discs[:, :2], 5, x0, y0, out.shape, mpp)]
    dx, dy, flat = _window(discs[:, :2], 4.5, x0, y0, out.shape, mpp)
    rho = np.hypot(dx, dy) / discs[:, 2, None, None]
    value = discs[:, 3, None, None] * _soft(1 - rho, 0.3) * (0.75 + 0.25 * np.minimum(rho, 1) ** 2)
    _put_max(out, flat, value)


def _put_max(out: np.ndarray, flat: np.ndarray, value: np.ndarray) -> None:
    ok = (flat >= 0) & (value > 0)
    np.maximum.at(out.reshape(-1), flat[ok], value[ok].astype(out.dtype))


class _Nuclei:
    """Nuclei as soft, slightly irregular ellipses with rim, chromatin and nucleoli."""

    def __init__(self, tissue: Tissue, rng: np.random.Generator):
        cells = tissue.cells
        n = len(cells)
        kind = cells["cell_type"].cat.codes.to_numpy()
        look = np.array([_NUCLEI[t] for t in CELL_TYPES])[kind]
        self.xy = cells[["nucleus_x", "nucleus_y"]].to_numpy()
        self.angle = cells["angle"].to_numpy()
        self.a, self.b = cells["nucleus_a"].to_numpy(), cells["nucleus_b"].to_numpy()
        self.dark = look[:, 0] * np.exp(rng.normal(0, 0.13, n)) * np.where(tissue.states["cycling"], 1.45, 1.0)
        self.chromatin, self.rim = look[:, 1], look[:, 2]
        self.irregular = look[:, 4, None] * rng.standard_normal((n, 3))
        self.phase = rng.uniform(0, 2 * np.pi, (n, 3))
        self.bend = np.where(
            np.isin(kind, [CELL_TYPES.index(t) for t in ("fibroblast", "endothelial")]), 1, 0
        ) * rng.normal(0, 0.022, n)
        where = rng.uniform(0, 1, (n, 2, 2))
        self.nucleolus = np.stack([0.55 * np.sqrt(where[..., 0]), 2 * np.pi * where[..., 1]], -1)
        self.nucleoli = (rng.random((n, 2)) < look[:, 3, None] * np.array([1.0, 0.35])) & ~tissue.states["cycling"][
            :, None
        ]
        self.macrophage = kind == CELL_TYPES.index("macrophage")

    def halo(self, eosin: np.ndarray, x0: int, y0: int, mpp: float) -> None:
        """Pale, foamy cytoplasm of macrophages."""
        xy = self.xy[self.macrophage]
        xy = xy[_visible(xy, 12, x0, y0, eosin.shape, mpp)]
        dx, dy, flat = _window(xy, 8.0, x0, y0, eosin.shape, mpp)
        cover = np.zeros_like(eosin)
        _put_max(cover, flat, _soft(6.5 - np.hypot(dx, dy), 2.5))
        eosin *= 1 - 0.45 * cover

    def splat(self, out: np.ndarray, x0: int, y0: int, mpp: float, grit: np.ndarray, lumps: np.ndarray) -> None:
        """Write the concentration of hematoxylin."""
        seen = _visible(self.xy, 14, x0, y0, out.shape, mpp)
        reach = np.maximum(self.a, self.b) * 1.12 + 0.8
        for lo, hi in ((0, 4), (4, 6), (6, 8), (8, 30)):
            pick = np.flatnonzero(seen & (reach > lo) & (reach <= hi))
            for part in np.array_split(pick, max(1, len(pick) // 4000)):
                if len(part):
                    self._part(part, out, x0, y0, mpp, grit, lumps, float(reach[part].max()))

    def _part(self, i, out, x0, y0, mpp, grit, lumps, reach) -> None:
        dx, dy, flat = _window(self.xy[i], reach, x0, y0, out.shape, mpp)
        col = lambda v: v[i].astype(np.float32).reshape(-1, 1, 1)  # noqa: E731
        c, s = np.cos(col(self.angle)), np.sin(col(self.angle))
        u, v = dx * c + dy * s, dy * c - dx * s
        v = v + col(self.bend) * u**2
        a, b = col(self.a), col(self.b)
        phi = np.arctan2(v / b, u / a)
        wobble = 1.0
        for k in range(3):
            wobble = wobble + col(self.irregular[:, k]) * np.cos((k + 2) * phi + col(self.phase[:, k])) * 0.7
        rho = np.hypot(u / a, v / b) / wobble
        scale = np.minimum(a, b)
        body = _soft((1 - rho) * scale, max(0.9, 0.8 * mpp))
        inside = np.where(flat >= 0, flat, 0)
        chromatin = 0.6 * grit.ravel()[inside] + 0.4 * lumps.ravel()[inside]
        value = 1 + col(self.chromatin) * chromatin
        value = value + col(self.rim) * np.exp(-(((rho - 0.86) * scale / 0.75) ** 2))
        for k in range(2):
            r, t = self.nucleolus[i, k].T.astype(np.float32).reshape(2, -1, 1, 1)
            d2 = (u - a * r * np.cos(t)) ** 2 + (v - b * r * np.sin(t)) ** 2
            value = value + 0.75 * self.nucleoli[i, k].reshape(-1, 1, 1) * np.exp(-d2 / 0.9**2)
        _put_max(out, flat, body * col(self.dark) * np.clip(value, 0.35, 2.2))
