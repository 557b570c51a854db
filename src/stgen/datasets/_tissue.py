"""Architecture, cells and gene programs of the simulated section: everything about it except the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates
from scipy.spatial import Delaunay, cKDTree

CELL_TYPES = (
    "tumor",
    "luminal",
    "myoepithelial",
    "fibroblast",
    "T cell",
    "B cell",
    "macrophage",
    "endothelial",
    "adipocyte",
)
_T = {name: i for i, name in enumerate(CELL_TYPES)}
STEP = 2.5  # µm per cell of the plan on which the architecture is drawn
FAR = -60.0  # distance (µm) below which glands and vessels are not followed

#: nuclear semi-axes (µm), largest radius of the cell (µm), relative RNA content
_GEOMETRY = {
    "tumor": (4.7, 3.8, 7.0, 1.0),
    "luminal": (4.4, 2.9, 6.0, 0.9),
    "myoepithelial": (4.4, 1.4, 4.5, 0.5),
    "fibroblast": (6.6, 1.35, 7.0, 0.8),
    "T cell": (2.9, 2.7, 3.8, 0.4),
    "B cell": (3.1, 2.9, 4.0, 0.45),
    "macrophage": (3.9, 2.6, 7.5, 0.9),
    "endothelial": (4.4, 1.2, 4.5, 0.6),
    "adipocyte": (4.2, 1.1, 30.0, 1.2),
}


@dataclass
class Tissue:
    """Architecture on a grid of ``STEP`` µm (fields in µm, positive inside), and the cells.

    The value at index ``(i, j)`` of a field belongs to the point ``x = (j + 0.5) * STEP``, ``y = (i + 0.5) * STEP``.
    """

    size_um: float
    outline: np.ndarray
    nest: np.ndarray
    gland: np.ndarray
    lumen: np.ndarray
    vessel: np.ndarray
    vessel_lumen: np.ndarray
    fibers: np.ndarray
    aggregate: np.ndarray
    fat_seeds: np.ndarray
    fat_is: np.ndarray
    cells: pd.DataFrame
    states: dict[str, np.ndarray]


def noise(rng: np.random.Generator, n: int, sigma: float) -> np.ndarray:
    """Smooth noise of unit variance on an ``(n, n)`` grid; `sigma` is its length in grid steps."""
    k = max(1, int(sigma // 4))
    m = int(np.ceil(n / k)) + 4
    pad = int(3 * sigma / k) + 2
    field = gaussian_filter(rng.standard_normal((m + 2 * pad, m + 2 * pad)), sigma / k)[pad:-pad, pad:-pad]
    field *= 2 * np.sqrt(np.pi) * sigma / k
    at = (np.arange(n) + 0.5) / k + 1.0
    return upsample(field, at, at)


def upsample(field: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Read `field` on the mesh of fractional indices `rows` x `cols` with Catmull-Rom cubics (separable)."""
    return np.ascontiguousarray(_cubic(_cubic(field, rows).T, cols).T)


def _cubic(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    base = np.floor(at).astype(int)
    f = (at - base).astype(field.dtype)[:, None]
    top = field.shape[0] - 1
    if not f.any():
        return field[np.clip(base, 0, top)]
    weights = (
        -0.5 * f + f**2 - 0.5 * f**3,
        1 - 2.5 * f**2 + 1.5 * f**3,
        0.5 * f + 2 * f**2 - 1.5 * f**3,
        -0.5 * f**2 + 0.5 * f**3,
    )
    out = np.zeros((len(at), field.shape[1]), field.dtype)
    for w, d in zip(weights, (-1, 0, 1, 2), strict=True):
        term = field[np.clip(base + d, 0, top)]
        term *= w
        out += term
    return out


def at_points(field: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Read a plan field at points `xy` in µm."""
    return map_coordinates(field, [xy[:, 1] / STEP - 0.5, xy[:, 0] / STEP - 0.5], order=1, mode="nearest")


def _signed(mask: np.ndarray) -> np.ndarray:
    """Smooth signed distance in µm to the border of `mask`, positive inside."""
    if not mask.any():
        return np.full(mask.shape, -1e3)
    distance = distance_transform_edt(mask) - distance_transform_edt(~mask)
    return gaussian_filter(distance, 1.0) * STEP


# ---- architecture ---------------------------------------------------------------------------------------------------


@dataclass
class _Ring:
    """A closed outline ``r(phi) = radius * (1 + sum_k a_k cos(k phi + p_k))`` around `center`, with a wall."""

    center: np.ndarray
    radius: float
    wall: float
    amplitude: np.ndarray
    phase: np.ndarray

    def r(self, phi: np.ndarray) -> np.ndarray:
        k = np.arange(2, 2 + len(self.amplitude))
        return self.radius * (1 + (self.amplitude * np.cos(phi[..., None] * k + self.phase)).sum(-1))

    def paint(self, outer: np.ndarray, inner: np.ndarray) -> None:
        """Write the distance to the outline and to the lumen into the two fields (the larger value wins)."""
        reach = self.radius * 1.5 - FAR
        lo = np.maximum(((self.center - reach) / STEP).astype(int), 0)
        hi = np.minimum(((self.center + reach) / STEP).astype(int) + 1, outer.shape[0])
        if (hi <= lo).any():
            return
        window = (slice(lo[1], hi[1]), slice(lo[0], hi[0]))
        dx = (np.arange(lo[0], hi[0]) + 0.5) * STEP - self.center[0]
        dy = ((np.arange(lo[1], hi[1]) + 0.5) * STEP - self.center[1])[:, None]
        rho, r = np.hypot(dx, dy), self.r(np.arctan2(dy, dx))
        outer[window] = np.maximum(outer[window], r - rho)
        inner[window] = np.maximum(inner[window], r - self.wall - rho)

    def row(self, depth: float, spacing: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Points along the wall, `depth` µm inside the outline, and the direction of the radius there."""
        n = max(4, int(2 * np.pi * (self.radius - depth) / spacing))
        phi = (np.arange(n) + rng.uniform(-0.22, 0.22, n) + rng.uniform()) * 2 * np.pi / n
        r = self.r(phi) - depth
        return self.center + r[:, None] * np.stack([np.cos(phi), np.sin(phi)], 1), phi


def _ring(rng: np.random.Generator, center: np.ndarray, radius: float, wall: float, wobble: float) -> _Ring:
    k = np.arange(2, 6)
    return _Ring(center, radius, wall, rng.normal(0, wobble, 4) / (k - 1), rng.uniform(0, 2 * np.pi, 4))


def _pick(rng: np.random.Generator, n: int, score: np.ndarray, taken: list, gap: float, size_um: float) -> list:
    """Choose up to `n` centers with high `score` (a plan field) that keep `gap` µm from those `taken`."""
    chosen: list[np.ndarray] = []
    candidates = rng.uniform(0.06, 0.94, (60 * n + 200, 2)) * size_um
    for xy in candidates[np.argsort(-at_points(score, candidates), kind="stable")]:
        if all(np.hypot(*(xy - c)) > gap + r for c, r in [*taken, *((c, gap) for c in chosen)]):
            chosen.append(xy)
        if len(chosen) == n:
            break
    return chosen


def _glands(rng: np.random.Generator, score: np.ndarray, size_um: float) -> list[_Ring]:
    """Ducts, each with a lobule of acini beside it."""
    rings: list[_Ring] = []
    n = max(2, round(4.5 * (size_um / 1000) ** 2 * rng.uniform(0.85, 1.15)))
    for center in _pick(rng, n, score, [], 85.0, size_um):
        radius = rng.uniform(34, 62)
        rings.append(_ring(rng, center, radius, rng.uniform(13, 17), 0.07))
        toward = rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(3, 9)):
            for _try in range(8):
                phi, small = toward + rng.normal(0, 0.75), rng.uniform(17, 25)
                at = center + (radius + small + rng.uniform(7, 60)) * np.array([np.cos(phi), np.sin(phi)])
                if all(np.hypot(*(at - other.center)) > small + other.radius * 1.1 + 5 for other in rings):
                    rings.append(_ring(rng, at, small, small - rng.uniform(4, 8), 0.06))
                    break
    return rings


def _fiber_angle(rng: np.random.Generator, n: int, structures: np.ndarray) -> np.ndarray:
    """Angle of the collagen fibers: a wavy flow which wraps around `structures` (signed distance)."""
    theta = rng.uniform(0, np.pi)
    y, x = np.mgrid[:n, :n] * STEP
    potential = np.cos(theta) * y - np.sin(theta) * x + 48 * noise(rng, n, 130 / STEP) + 7 * noise(rng, n, 42 / STEP)
    potential += 42 * (1 - np.exp(np.minimum(gaussian_filter(structures, 4.0), 0) / 32))
    gy, gx = np.gradient(potential)
    return np.arctan2(gy, gx) + np.pi / 2 + 0.22 * noise(rng, n, 9 / STEP)


def _architecture(rng: np.random.Generator, size_um: float) -> tuple[dict, list[_Ring], list[_Ring], list]:
    n = int(np.ceil(size_um / STEP))
    c = (np.arange(n) + 0.5) * STEP
    edge = np.minimum(c, size_um - c)
    corner = np.minimum(edge[:, None], edge[None]) - 900 / (edge[:, None] + edge[None] + 1)
    outline = _signed(corner + 13 * noise(rng, n, 70 / STEP) + 3 * noise(rng, n, 14 / STEP) > 30)
    inside = outline > 0
    tumor = 0.7 * noise(rng, n, 230 / STEP) + noise(rng, n, 34 / STEP) + 0.35 * noise(rng, n, 14 / STEP)
    fraction = rng.uniform(0.3, 0.42)
    nest = tumor > np.quantile(tumor[inside], 1 - fraction)
    away = gaussian_filter(tumor, 25 / STEP)
    rings = _glands(rng, -away + 0.004 * np.minimum(outline, 150), size_um)
    gland, lumen = np.full((n, n), FAR), np.full((n, n), FAR)
    for ring in rings:
        ring.paint(gland, lumen)
    nest &= (gland < -14) & (outline > 7)
    nest = _signed(gaussian_filter(nest.astype(float), 1.6) > 0.5)
    fat_field = noise(rng, n, 130 / STEP) + 0.2 * noise(rng, n, 40 / STEP) - 0.6 * away
    fat_field += 0.02 * np.minimum(-nest - 25, 0) + 0.03 * np.minimum(-gland - 25, 0)
    fat = fat_field > np.quantile(fat_field[inside], 1 - rng.uniform(0.12, 0.2))
    fat = _signed(fat & (outline > -10) & (gland < -18) & (nest < -10))
    taken = [(r.center, r.radius) for r in rings]
    per_mm2 = (size_um / 1000) ** 2
    score = -np.abs(-nest - 45) / 30 - (fat > -20) * 3.0 - (gland > -40) * 3.0 - (outline < 40) * 3.0
    follicles = [
        (xy, rng.uniform(42, 78)) for xy in _pick(rng, max(2, round(3.2 * per_mm2)), score, taken, 60.0, size_um)
    ]
    aggregate = np.zeros((n, n))
    bump = 0.3 * noise(rng, n, 18 / STEP)
    for xy, radius in follicles:
        d = np.hypot(c[None] - xy[0], c[:, None] - xy[1]) / radius
        aggregate = np.maximum(aggregate, np.exp(-((d * (1 + bump).clip(0.6)) ** 4)))
    aggregate *= (nest < 0) & (gland < -5) & (outline > 4)
    score = -np.abs(nest + 30) / 40 - (gland > -14) * 4.0 - aggregate * 4 - (outline < 25) * 4.0 - (fat > -8) * 2.0
    score += noise(rng, n, 12 / STEP)
    vessels = [
        _ring(rng, xy, rng.uniform(8, 19), 3.5, 0.12)
        for xy in _pick(rng, max(2, round(9 * per_mm2)), score, [*taken, *follicles], 26.0, size_um)
    ]
    vessels = [v for v in vessels if at_points(nest, v.center[None])[0] < -v.radius - 4]
    vessel, vessel_lumen = np.full((n, n), FAR), np.full((n, n), FAR)
    for ring in vessels:
        ring.paint(vessel, vessel_lumen)
    fibers = _fiber_angle(rng, n, np.maximum(np.maximum(nest, gland), np.maximum(vessel, fat)))
    fields = {"outline": outline, "nest": nest, "gland": gland, "lumen": lumen, "vessel": vessel}
    fields |= {"vessel_lumen": vessel_lumen, "fibers": fibers, "aggregate": aggregate, "fat": fat}
    return fields, rings, vessels, follicles


# ---- cells ----------------------------------------------------------------------------------------------------------


def _scatter(rng: np.random.Generator, spacing: float, size_um: float, jitter: float = 0.32) -> np.ndarray:
    """A jittered hexagonal grid over the square, ``(n, 2)`` in µm."""
    rows, cols = int(size_um / (spacing * 0.866)) + 2, int(size_um / spacing) + 2
    i, j = np.mgrid[:rows, :cols]
    xy = np.stack([(j + 0.5 * (i % 2)) * spacing, i * spacing * 0.866], -1).reshape(-1, 2)
    xy = xy + rng.normal(0, jitter, xy.shape) * spacing
    return xy[((xy > 0) & (xy < size_um)).all(1)]


def _place_cells(rng: np.random.Generator, f: dict, rings: list, vessels: list, follicles: list, size_um: float):
    """Positions, types, orientations and whether a cell may be moved; and the seeds of the fat vacuoles."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]] = []

    def add(xy: np.ndarray, kind: str | np.ndarray, angle: np.ndarray, fixed: bool = False) -> None:
        kinds = np.full(len(xy), _T[kind]) if isinstance(kind, str) else kind
        parts.append((xy, kinds, angle, fixed))

    def any_angle(xy: np.ndarray) -> np.ndarray:
        return rng.uniform(0, np.pi, len(xy))

    for ring in rings:
        xy, phi = ring.row(5.0, 6.6, rng)
        add(xy + rng.normal(0, 0.6, xy.shape), "luminal", phi + rng.normal(0, 0.25, len(xy)), True)
        if ring.wall > 12 and ring.radius > 30:
            xy, phi = ring.row(10.5, 9.0, rng)
            add(xy + rng.normal(0, 0.9, xy.shape), "luminal", phi + rng.normal(0, 0.35, len(xy)), True)
        if ring.radius - ring.wall > 14:  # foam cells and debris
            xy = ring.center + rng.normal(0, 0.3, (rng.integers(3, 9), 2)) * (ring.radius - ring.wall)
            add(xy, "macrophage", any_angle(xy), True)
        xy, phi = ring.row(-0.6, 17.0, rng)
        add(xy, "myoepithelial", phi + np.pi / 2, True)
    for ring in vessels:
        xy, phi = ring.row(1.2, 11.0, rng)
        add(xy, "endothelial", phi + np.pi / 2, True)

    seeds = _scatter(rng, 50.0, size_um + 160, 0.2) - 80
    is_fat = at_points(f["fat"], np.clip(seeds, 0, size_um)) > 0
    is_fat &= (np.abs(seeds - size_um / 2) < size_um / 2 + 25).all(1)
    add(seeds[is_fat], "adipocyte", any_angle(seeds[is_fat]), True)
    edges = Delaunay(seeds).simplices[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    edges = np.unique(np.sort(edges, 1), axis=0)
    edges = edges[is_fat[edges].any(1)]
    edges = edges[rng.random(len(edges)) < 0.4]
    between = seeds[edges].mean(1) + rng.normal(0, 0.5, (len(edges), 2))
    d = np.diff(seeds[edges], axis=1)[:, 0]
    kind = rng.choice([_T["fibroblast"], _T["endothelial"], _T["macrophage"]], len(edges), p=[0.4, 0.4, 0.2])
    add(between, kind, np.arctan2(d[:, 1], d[:, 0]) + np.pi / 2, True)

    fat_tree = cKDTree(seeds)

    def in_fat(xy: np.ndarray) -> np.ndarray:
        return is_fat[fat_tree.query(xy)[1]]

    def stroma(xy: np.ndarray) -> np.ndarray:
        keep = (at_points(f["nest"], xy) < -2.5) & (at_points(f["gland"], xy) < -4)
        return keep & (at_points(f["vessel"], xy) < -1) & ~in_fat(xy)

    xy = _scatter(rng, 11.6, size_um, 0.24)
    xy = xy[(at_points(f["nest"], xy) > 2.5) & ~in_fat(xy) & (rng.random(len(xy)) < 0.95)]
    lymph = rng.random(len(xy)) < 0.035
    add(xy, np.where(lymph, _T["T cell"], _T["tumor"]), any_angle(xy))

    xy = _scatter(rng, 6.6, size_um, 0.42)
    xy = xy[stroma(xy)]
    dense = at_points(f["aggregate"], xy)
    infiltrate = 0.10 * np.exp(0.9 * at_points(f["infiltrate"], xy) + np.minimum(at_points(f["nest"], xy), 0) / 45)
    xy = xy[rng.random(len(xy)) < np.maximum(dense * 0.92, infiltrate.clip(0, 0.45))]
    dense = at_points(f["aggregate"], xy)
    center = np.array([c for c, _ in follicles]).reshape(-1, 2)
    core = cKDTree(center).query(xy)[0] / np.array([r for _, r in follicles])[cKDTree(center).query(xy)[1]]
    b_cell = rng.random(len(xy)) < np.where((dense > 0.3) & (core < 0.62), 0.85, 0.15)
    kind = np.where(b_cell, _T["B cell"], _T["T cell"])
    kind[rng.random(len(xy)) < 0.08] = _T["macrophage"]
    add(xy, kind, any_angle(xy))

    xy = _scatter(rng, 15.5, size_um, 0.3)
    keep = stroma(xy) & (at_points(f["aggregate"], xy) < 0.35)
    keep &= rng.random(len(xy)) < 0.62 * np.exp(0.35 * at_points(f["cellularity"], xy))
    xy = xy[keep]
    kind = np.where(rng.random(len(xy)) < 0.07, _T["macrophage"], _T["fibroblast"])
    add(xy, kind, _angle_at(f["fibers"], xy) + rng.normal(0, 0.12, len(xy)))

    xy, kind, angle = (np.concatenate([p[k] for p in parts]) for k in range(3))
    fixed = np.concatenate([np.full(len(p[0]), p[3]) for p in parts])
    return xy, kind, angle, fixed, seeds, is_fat


def _angle_at(angle: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return np.arctan2(at_points(np.sin(angle), xy), at_points(np.cos(angle), xy))


def _settle(xy: np.ndarray, kind: np.ndarray, fixed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Push overlapping nuclei apart; fixed cells stay."""
    room = np.array([np.sqrt(_GEOMETRY[t][0] * _GEOMETRY[t][1]) for t in CELL_TYPES])[kind] + 0.5
    room[kind == _T["adipocyte"]] = 1.0
    for _ in range(3):
        pairs = cKDTree(xy).query_pairs(11.0, output_type="ndarray")
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        d = xy[pairs[:, 0]] - xy[pairs[:, 1]]
        length = np.maximum(np.hypot(*d.T), 1e-3)
        push = np.maximum(room[pairs].sum(1) - length, 0) / length * 0.5
        move = np.zeros_like(xy)
        for k, sign in ((0, 1.0), (1, -1.0)):
            for axis in (0, 1):
                move[:, axis] += np.bincount(pairs[:, k], sign * push * d[:, axis], len(xy))
        xy = xy + 0.7 * move * ~fixed[:, None]
    return xy


def _fat_nuclei(
    rng: np.random.Generator, xy: np.ndarray, kind: np.ndarray, angle: np.ndarray, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centers and orientations of the nuclei: those of fat cells lie flat against a membrane, others in the middle."""
    fat = kind == _T["adipocyte"]
    if not fat.any():
        return xy, angle
    nearest = cKDTree(seeds).query(xy[fat], 4)[1]
    toward = seeds[nearest[np.arange(fat.sum()), rng.integers(1, 4, fat.sum())]] - xy[fat]
    length = np.hypot(*toward.T)[:, None]
    side = np.stack([-toward[:, 1], toward[:, 0]], 1) / length
    nucleus, angle = xy.copy(), angle.copy()
    nucleus[fat] += toward * (0.5 - 0.9 / length) + side * rng.normal(0, 4, (fat.sum(), 1))
    angle[fat] = np.arctan2(side[:, 1], side[:, 0])
    return nucleus, angle


def draw_tissue(rng: np.random.Generator, size_um: float) -> Tissue:
    """Draw architecture and cells on a square of `size_um` µm."""
    f, rings, vessels, follicles = _architecture(rng, size_um)
    n = f["nest"].shape[0]
    f["infiltrate"], f["cellularity"] = noise(rng, n, 45 / STEP), noise(rng, n, 60 / STEP)
    xy, kind, angle, fixed, seeds, is_fat = _place_cells(rng, f, rings, vessels, follicles, size_um)
    xy = _settle(xy, kind, fixed, rng)
    keep = (at_points(f["outline"], xy) > 3.5) & ((xy > 4) & (xy < size_um - 4)).all(1)
    hollow = np.maximum(f["lumen"], f["vessel_lumen"])
    keep &= (at_points(hollow, xy) < 0.5) | (fixed & (kind == _T["macrophage"]))
    near = cKDTree(xy[keep]).query(xy[keep], 2)
    crowded = (near[0][:, 1] < 3.2) & (near[1][:, 1] < np.arange(keep.sum()))
    keep[np.flatnonzero(keep)[crowded]] = False
    xy, kind, angle = xy[keep], kind[keep], angle[keep]

    geometry = np.array([_GEOMETRY[t] for t in CELL_TYPES])[kind]
    tumor = kind == _T["tumor"]
    scale = np.exp(rng.normal(0, np.where(tumor, 0.15, 0.09)))
    states = {
        "cycling": tumor & (rng.random(len(xy)) < 0.14),
        "depth_um": at_points(f["nest"], xy),
        "clone": 1 / (1 + np.exp(-2.5 * at_points(noise(rng, n, 150 / STEP), xy))),
        "interferon": at_points(noise(rng, n, 120 / STEP), xy),
        "capture": np.exp(0.1 * at_points(noise(rng, n, 200 / STEP), xy)),
    }
    heading = rng.uniform(0, 2 * np.pi)
    states["gradient"] = (xy / size_um - 0.5) @ np.array([np.cos(heading), np.sin(heading)])
    scale = scale * np.where(states["cycling"], 1.12, 1.0)
    free = 0.5 * cKDTree(xy).query(xy, 2)[0][:, 1]
    radius = np.minimum(geometry[:, 2] * scale, free)
    nucleus, angle = _fat_nuclei(rng, xy, kind, angle, seeds)
    cells = pd.DataFrame(
        {
            "x": xy[:, 0],
            "y": xy[:, 1],
            "radius": radius,
            "cell_type": pd.Categorical.from_codes(kind, CELL_TYPES),
            "nucleus_x": nucleus[:, 0],
            "nucleus_y": nucleus[:, 1],
            "angle": angle,
            "nucleus_a": geometry[:, 0] * scale * np.exp(rng.normal(0, 0.08, len(xy))),
            "nucleus_b": geometry[:, 1] * scale * np.exp(rng.normal(0, 0.08, len(xy))),
            "content": geometry[:, 3] * scale**2 * np.exp(rng.normal(0, 0.2, len(xy))),
        }
    )
    fields = {k: f[k] for k in ("outline", "nest", "gland", "lumen", "vessel", "vessel_lumen", "fibers", "aggregate")}
    return Tissue(size_um=size_um, fat_seeds=seeds, fat_is=is_fat, cells=cells, states=states, **fields)
