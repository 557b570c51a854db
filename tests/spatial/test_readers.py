"""What spatialdata-io reads goes through stgen as it is, and what stgen makes goes through the tools of scverse.

The files are those of :mod:`tenx`, written from simulated sections: what is computed from the read object must be what is
computed from the section itself, where it is in micrometers and nothing has gone through a reader.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc
import shapely
import spatialdata as sd
import squidpy as sq
import torch
from geopandas import GeoDataFrame
from sklearn.cluster import KMeans
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity, get_transformation

from stgen import datasets, metrics, models, pp, tl
from stgen._spatial.grid import Grid
from stgen._spatial.measured import measurement_of
from stgen._spatial.records import shallow_copy
from stgen._spatial.section import get_section

spec = importlib.util.spec_from_file_location("tenx", Path(__file__).with_name("tenx.py"))
tenx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tenx)

GENES = ["EPCAM", "COL1A1", "ACTB"]
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def small():
    """A section small enough for the pixels of Xenium. Look, don't touch."""
    return datasets.simulated_section(seed=3, size_um=300)


@pytest.fixture(scope="module")
def folders(simulated, small, tmp_path_factory):
    """One folder per instrument."""
    root = tmp_path_factory.mktemp("tenx")
    tenx.write_visium(root / "visium", simulated)
    tenx.write_visium_hd(root / "hd", small, corner_um=(5.0, 3.0))
    tenx.write_xenium(root / "xenium", small)
    return root


@pytest.fixture
def visium(folders):
    return tenx.read_visium(folders / "visium")


@pytest.fixture
def hd(folders):
    return tenx.read_visium_hd(folders / "hd")


@pytest.fixture
def xenium(folders):
    return tenx.read_xenium(folders / "xenium")


def values_of(sdata, key):
    return np.asarray(sdata.images[key].data)


def corners_um(sdata, key, system, mpp):
    """Upper left and lower right corner of a map in µm, through its transformation."""
    matrix = get_transformation(sdata[key], system).to_affine_matrix(("x", "y"), ("x", "y"))
    height, width = sdata[key].shape[1:]
    return (np.array([[0, 0, 1], [width, height, 1]]) @ matrix.T)[:, :2] * mpp


def check_stored(sdata, path, elements, tables=()):
    """Values and records are the same after writing and reading."""
    sdata.write(path)
    again = sd.read_zarr(path)
    for key in elements:
        np.testing.assert_array_equal(values_of(again, key), values_of(sdata, key))
        assert list(again[key].coords["c"].values) == list(sdata[key].coords["c"].values)
        assert again.attrs["stgen"][key] == sdata.attrs["stgen"][key]
        for system, transformation in get_transformation(sdata[key], get_all=True).items():
            np.testing.assert_allclose(
                get_transformation(again[key], system).to_affine_matrix(("x", "y"), ("x", "y")),
                transformation.to_affine_matrix(("x", "y"), ("x", "y")), atol=1e-9,
            )  # fmt: skip
    for key in tables:
        assert again[key].uns["stgen"] == sdata[key].uns["stgen"]
        for name, layer in sdata[key].layers.items():
            np.testing.assert_array_equal(as_array(again[key].layers[name]), as_array(layer))
    return again


def as_array(values):
    return values.toarray() if hasattr(values, "toarray") else np.asarray(values)


# ---- Visium ----------------------------------------------------------------------------------------------------------


def test_visium_holds_the_spots_of_the_section(visium, simulated):
    spots, table = simulated["spot_counts"], visium["table"]
    assert not np.allclose(table.obsm["spatial"], spots.obsm["spatial"])  # another order, as barcodes have
    order = [int(np.argmin(np.square(xy - spots.obsm["spatial"]).sum(1))) for xy in table.obsm["spatial"]]
    assert sorted(order) == list(range(spots.n_obs))
    np.testing.assert_allclose(table.obsm["spatial"], spots.obsm["spatial"][order], atol=1e-6)
    np.testing.assert_array_equal(as_array(table.X), as_array(spots.X)[order])
    np.testing.assert_array_equal(table.obs["array_col"], spots.obs["array_col"].iloc[order])


@pytest.mark.parametrize("image_key", ["section_full_image", "section_hires_image"])
def test_visium_spots_as_a_map_have_the_density_of_what_a_spot_captures(visium, simulated, image_key):
    """Space Ranger states 65 µm for spots that capture what lies within 55 µm; the µm per pixel follow from the pitch."""
    pp.spots_to_map(visium, table_key="table", image_key=image_key, bin_um=5, genes=GENES)
    np.testing.assert_allclose(corners_um(visium, "spot_map", "section", 1.0), [[0, 0], [600, 600]], atol=1e-6)
    direct = shallow_copy(simulated)
    pp.spots_to_map(direct, table_key="spot_counts", image_key="he", bin_um=5, genes=GENES)
    np.testing.assert_allclose(values_of(visium, "spot_map"), values_of(direct, "spot_map"), rtol=1e-4)
    spots = simulated["spot_counts"]
    x, y = (spots.obsm["spatial"] / 5).astype(int).T
    density = spots[:, GENES].X.toarray().T / (np.pi * (27.5 / 5) ** 2)
    np.testing.assert_allclose(values_of(visium, "spot_map")[:, y, x], density, rtol=0.02)


def test_visium_is_superresolved_as_the_section_itself_is(visium, simulated, tmp_path):
    model = models.Interpolate(GENES, kernel="linear")
    tl.superresolve(visium, "section_hires_image", model=model, low_res="table", **QUIET)
    direct = tl.superresolve(shallow_copy(simulated), "he", model=model, low_res="spot_counts", copy=True, **QUIET)
    np.testing.assert_allclose(
        values_of(visium, "superresolved"), values_of(direct, "superresolved"), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(corners_um(visium, "superresolved", "section", 1.0), [[0, 0], [600, 600]], atol=1e-6)

    measured = measurement_of(visium, "table", Grid.of_map(visium, "superresolved"), GENES)
    assert measured.footprints.diameter == pytest.approx(5.5, rel=1e-3)
    pooled = measured.footprints.pool(np.nan_to_num(values_of(visium, "superresolved")))
    np.testing.assert_allclose(pooled, visium["table"][:, GENES].X.toarray(), rtol=1e-3, atol=1e-3)

    entry = visium.attrs["stgen"]["superresolved"]
    assert (entry["low_res"], entry["image"], entry["bin_um"]) == ("table", "section_hires_image", 10.0)
    again = check_stored(visium, tmp_path / "visium.zarr", ["superresolved"])
    assert again.attrs["spatialdata_io_reader"] == "visium"  # what the reader noted is still there


def colors(patches: torch.Tensor) -> torch.Tensor:
    """Mean color of each quarter of a patch, and the spread of each channel."""
    quarters = torch.nn.functional.adaptive_avg_pool2d(patches, 2).flatten(1)
    return torch.cat([quarters, patches.std((2, 3))], 1)


def test_visium_is_predicted_as_the_section_itself_is(visium, simulated, tmp_path):
    direct = shallow_copy(simulated)
    pp.embed(visium, image_key="section_full_image", model=colors, progress=False)
    pp.embed(direct, table_key="spot_counts", model=colors, progress=False)
    table, spots = visium["table"], direct["spot_counts"]
    order = [int(np.argmin(np.square(xy - spots.obsm["spatial"]).sum(1))) for xy in table.obsm["spatial"]]
    np.testing.assert_allclose(table.obsm["X_colors"], spots.obsm["X_colors"][order], atol=1e-5)

    probe = models.LinearProbe(GENES, embedding_dim=15)
    tl.fit(probe, direct, table_key="spot_counts", progress=False)
    for data, key in ((visium, "table"), (direct, "spot_counts")):
        tl.predict_expression(data, model=probe, table_key=key, **QUIET)
    predicted = table[:, GENES].layers["predicted"]
    np.testing.assert_allclose(predicted, spots[order][:, GENES].layers["predicted"], atol=1e-3)
    scores, expected = (
        tl.evaluate(x, table_key=k).genes["PCC"] for x, k in ((visium, "table"), (direct, "spot_counts"))
    )
    np.testing.assert_allclose(scores, expected[scores.index], atol=1e-3)
    assert scores["COL1A1"] > 0.3
    assert table.uns["stgen"]["predicted"]["weights_sha256"] == probe.weights_sha256()
    check_stored(visium, tmp_path / "visium.zarr", [], ["table"])


def test_visium_read_by_squidpy_is_the_same_section(visium, folders):
    adata = sq.read.visium(folders / "visium", library_id="section")
    adata.var_names_make_unique()
    assert get_section(adata).spot_diameter_um == pytest.approx(55, rel=1e-3)
    assert pp.check_alignment(adata).mpp == pytest.approx(2, rel=1e-3)  # of the hires image
    pp.embed(adata, model=colors, progress=False)
    pp.embed(visium, image_key="section_hires_image", model=colors, progress=False)
    again = visium["table"][adata.obs_names]
    np.testing.assert_array_equal(as_array(adata.X), as_array(again.X))
    np.testing.assert_allclose(adata.obsm["X_colors"], again.obsm["X_colors"], atol=1e-3)


# ---- Visium HD -------------------------------------------------------------------------------------------------------


def test_visium_hd_is_counted_as_its_molecules_are(hd, small, tmp_path):
    bounds = (5, 3, 293, 291)  # the capture area: 18 x 18 bins of 16 µm
    pp.rasterize(hd, table_key="square_016um", bin_um=16, genes=GENES, bounds_um=bounds, mask_um=None)
    direct = shallow_copy(small)
    pp.rasterize(direct, points_key="transcripts", bin_um=16, genes=GENES, bounds_um=bounds, mask_um=None)
    np.testing.assert_array_equal(values_of(hd, "counts"), values_of(direct, "counts"))
    np.testing.assert_allclose(corners_um(hd, "counts", "section", 1.0), np.reshape(bounds, (2, 2)), atol=1e-6)
    assert np.nansum(values_of(hd, "counts")) == hd["square_016um"][:, GENES].X.sum()

    pp.degrade(hd, map_key="counts", factor=3)
    model = models.Interpolate(GENES, factor=3, bin_um=16)
    tl.superresolve(hd, model=model, low_res="counts_3x", **QUIET)
    assert values_of(hd, "superresolved").shape == values_of(hd, "counts").shape
    blocks = values_of(hd, "superresolved").reshape(3, 6, 3, 6, 3).sum((2, 4))
    np.testing.assert_allclose(blocks, values_of(hd, "counts_3x"), rtol=1e-4, atol=1e-4)
    check_stored(hd, tmp_path / "hd.zarr", ["counts", "counts_3x", "superresolved"])


def test_bins_of_visium_hd_are_sharpened_themselves(hd):
    model = models.Interpolate(GENES, factor=2, bin_um=8)
    tl.superresolve(hd, "section_full_image", model=model, low_res="square_016um", **QUIET)
    grid = Grid.of_map(hd, "superresolved")
    measured = measurement_of(hd, "square_016um", grid, GENES)
    assert (measured.footprints.shape, measured.footprints.diameter) == ("square", pytest.approx(2))
    inside = (measured.footprints.centers > 1).all(1) & (
        measured.footprints.centers < np.array([grid.height, grid.width]) - 1
    ).all(1)
    pooled = measured.footprints.pool(np.nan_to_num(values_of(hd, "superresolved")))
    counts = hd["square_016um"][:, GENES].X.toarray()
    assert inside.mean() > 0.9
    np.testing.assert_allclose(pooled[inside], counts[inside], rtol=1e-3, atol=1e-3)


# ---- Xenium ----------------------------------------------------------------------------------------------------------


def test_xenium_is_counted_as_its_molecules_are(xenium, small):
    pp.rasterize(xenium, bin_um=4, mpp=tenx.PIXEL_UM, genes=list(xenium["table"].var_names), mask_um=None)
    direct = shallow_copy(small)
    pp.rasterize(direct, points_key="transcripts", bin_um=4, mask_um=None, genes=list(xenium["table"].var_names))
    found, expected = values_of(xenium, "counts"), values_of(direct, "counts")
    assert found.shape == expected.shape
    assert found.sum() == expected.sum() == len(direct["transcripts"])
    assert np.abs(found - expected).sum() <= 4  # a molecule on an edge may fall to either side
    corners = corners_um(xenium, "counts", "global", tenx.PIXEL_UM)
    np.testing.assert_allclose(corners, corners_um(direct, "counts", "um", 1.0), atol=1e-6)
    pp.rasterize(xenium, bin_um=4, mpp=tenx.PIXEL_UM, key_added="all")
    assert tenx.CONTROL in xenium["all"].coords["c"].values  # genes=None counts the control probes too


def test_xenium_in_micrometers(xenium, small, tmp_path):
    pp.name_micrometers(xenium, points_key="transcripts")
    pp.rasterize(xenium, bin_um=4, genes=GENES, mask_um=None)  # nobody says mpp
    direct = shallow_copy(small)
    pp.rasterize(direct, points_key="transcripts", bin_um=4, genes=GENES, mask_um=None)
    assert np.abs(values_of(xenium, "counts") - values_of(direct, "counts")).sum() <= 4
    np.testing.assert_allclose(
        corners_um(xenium, "counts", "um", 1.0), corners_um(direct, "counts", "um", 1.0), atol=1e-6
    )
    for name in ("cell_boundaries", "cell_labels"):
        assert "um" in get_transformation(xenium[name], get_all=True)
    report = pp.check_alignment(xenium, image_key="he_image", table_key="table")
    np.testing.assert_allclose(report.image_um, 300, rtol=0.02)
    check_stored(xenium, tmp_path / "micrometers.zarr", ["counts"])


def test_xenium_from_molecules_to_cells(xenium, small, tmp_path):
    pp.rasterize(xenium, bin_um=2, mpp=tenx.PIXEL_UM, genes=GENES)
    pp.degrade(xenium, map_key="counts", factor=2)
    model = models.Interpolate(GENES, factor=2, bin_um=2, kernel="linear")
    tl.superresolve(xenium, model=model, low_res="counts_2x", **QUIET)
    assert np.nansum(values_of(xenium, "superresolved")) == pytest.approx(
        np.nansum(values_of(xenium, "counts_2x")), rel=1e-3
    )

    for key, cells in (("polygons", {"shapes_key": "cell_boundaries"}), ("masks", {"labels_key": "cell_labels"})):
        tl.aggregate_cells(xenium, map_key="superresolved", key_added=key, **cells)
    polygons, masks, table = xenium["polygons"], xenium["masks"], xenium["table"]
    assert polygons.obs["instance_id"].to_list() == table.obs["cell_id"].to_list()
    assert masks.obs["instance_id"].to_list() == table.obs["cell_labels"].to_list()
    np.testing.assert_allclose(polygons.obs["area_um2"], table.obs["cell_area"], rtol=0.01)
    np.testing.assert_allclose(polygons.obsm["spatial"] * tenx.PIXEL_UM, table.obsm["spatial"], atol=0.05)
    truth = table[:, GENES].X.toarray()
    for found in (polygons, masks):
        assert metrics.pcc(found.X.toarray(), truth).min() > 0.75
        total = np.asarray(found.X.sum(0)).ravel() + found.var["outside"].to_numpy()
        np.testing.assert_allclose(total, np.nansum(values_of(xenium, "superresolved"), (1, 2)), rtol=1e-3)
    assert polygons.uns["stgen"]["polygons"]["coordinate_system"] == "global"
    again = check_stored(xenium, tmp_path / "xenium.zarr", ["superresolved"], ["polygons", "masks"])
    np.testing.assert_array_equal(as_array(again["polygons"].X), as_array(polygons.X))
    assert again["polygons"].obs["instance_id"].to_list() == polygons.obs["instance_id"].to_list()


def test_aligned_histology_of_xenium_is_read_where_it_belongs(xenium, small):
    """The H&E image is turned by a quarter against the section; a model that looks at it must not notice."""
    bounds, options = (0, 0, 300, 300), {"bin_um": 5, "genes": GENES, "mask_um": None}
    pp.rasterize(xenium, mpp=tenx.PIXEL_UM, bounds_um=bounds, **options)
    direct = shallow_copy(small)
    pp.rasterize(direct, points_key="transcripts", bounds_um=bounds, **options)
    probe = models.PixelProbe(GENES, factor=4, bin_um=5, px_per_bin=5, blurs=[1.0])
    for sdata in (xenium, direct):
        pp.degrade(sdata, map_key="counts", factor=4)
    tl.fit(probe, direct, map_key="counts", low_res="counts_4x", image_key="he", tile=20, **QUIET)
    tl.superresolve(xenium, "he_image", model=probe, low_res="counts_4x", **QUIET)
    tl.superresolve(direct, "he", model=probe, low_res="counts_4x", **QUIET)
    np.testing.assert_allclose(
        values_of(xenium, "superresolved"), values_of(direct, "superresolved"), rtol=0.02, atol=0.02
    )


# ---- composition -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mapped(simulated):
    """A section with superresolved maps of more genes. Look, don't touch."""
    sdata = shallow_copy(simulated)
    genes = list(sdata["cell_counts"].var_names[:20])
    pp.rasterize(sdata, points_key="transcripts", genes=genes, bin_um=10)
    pp.degrade(sdata, map_key="counts", factor=2)
    tl.superresolve(sdata, model=models.Interpolate(genes, factor=2), low_res="counts_2x", **QUIET)
    return sdata


@pytest.fixture
def bins(mapped):
    """The map as a table, a row per known bin, as a user makes one."""
    stacked = mapped["superresolved"].stack(bin=("y", "x")).transpose("bin", "c").dropna("bin").compute()
    table = ad.AnnData(stacked.values, obsm={"spatial": np.column_stack([stacked.x, stacked.y])})
    table.var_names = stacked.c.values.astype(str)
    return table


def test_cells_go_through_scanpy(mapped):
    sdata = tl.aggregate_cells(mapped, map_key="counts", shapes_key="cells", key_added="found", copy=True)
    cells = sdata["found"]
    sc.pp.filter_cells(cells, min_counts=5)
    sc.pp.normalize_total(cells, target_sum=1e4)
    np.testing.assert_allclose(cells.X.sum(1), 1e4, rtol=1e-4)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=10)
    assert cells.var["highly_variable"].sum() == 10
    sc.pp.pca(cells, n_comps=5, random_state=0)
    group = KMeans(4, n_init=3, random_state=0).fit_predict(cells.obsm["X_pca"])
    kind = sdata["cell_counts"].obs["cell_type"].iloc[cells.obs["instance_id"]].to_numpy()
    purity = sum((kind[group == g][:, None] == np.unique(kind)).sum(0).max() for g in range(4)) / len(kind)
    assert purity > (kind[:, None] == np.unique(kind)).mean(0).max() + 0.1  # than one group of all
    assert cells.uns["stgen"]["found"]["map_key"] == "counts"  # the record came along


def test_a_patterned_gene_beats_its_shuffled_self_in_squidpy(bins, mapped):
    shuffled = np.random.default_rng(0).permutation(bins[:, "EPCAM"].X.ravel())
    shuffled = ad.AnnData(shuffled[:, None], obs=bins.obs, var={"gene": ["shuffled"]})
    shuffled.var_names = ["shuffled"]
    both = ad.concat([bins, shuffled], axis="var", merge="first")
    both.obsm["spatial"] = bins.obsm["spatial"]
    sq.gr.spatial_neighbors(both, coord_type="grid", n_neighs=4)
    sq.gr.spatial_autocorr(both, mode="moran", transformation=False, n_perms=None, genes=["EPCAM", "shuffled"])
    found = both.uns["moranI"]["I"]
    assert abs(found["shuffled"]) < 0.05
    assert found["EPCAM"] > 0.4
    channel = values_of(mapped, "superresolved")[list(mapped["superresolved"].coords["c"].values).index("EPCAM")]
    assert found["EPCAM"] == pytest.approx(metrics.morans_i_map(channel), rel=1e-4)


def test_domains_of_the_map_occur_together_in_squidpy(bins):
    logged = np.log1p(bins.X)
    logged = (logged - logged.mean(0)) / logged.std(0)
    group = KMeans(3, n_init=3, random_state=0).fit_predict(logged)
    occurrence = []
    for labels in (group, np.random.default_rng(0).permutation(group)):
        bins.obs["domain"] = labels.astype(str)
        bins.obs["domain"] = bins.obs["domain"].astype("category")
        sq.gr.co_occurrence(bins, "domain", interval=np.array([0.5, 1.5, 60.0]))
        occurrence.append(np.diagonal(bins.uns["domain_co_occurrence"]["occ"][..., 0]))
    assert (occurrence[0] > 1.2).all()
    assert (occurrence[0] > occurrence[1] + 0.1).all()
    np.testing.assert_allclose(occurrence[1], 1, atol=0.15)


def test_a_box_of_a_map_is_its_bins(mapped):
    box = {"axes": ("x", "y"), "min_coordinate": [100, 200], "max_coordinate": [300, 350]}
    part = sd.bounding_box_query(mapped, **box, target_coordinate_system="um")
    matrix = get_transformation(mapped["superresolved"], "um").to_affine_matrix(("x", "y"), ("x", "y"))
    x, y = np.round((np.array([100, 200]) - matrix[:2, 2]) / 10).astype(int)
    np.testing.assert_array_equal(
        values_of(part, "superresolved"), values_of(mapped, "superresolved")[:, y : y + 15, x : x + 20]
    )
    np.testing.assert_allclose(corners_um(part, "superresolved", "um", 1.0), [[100, 200], [300, 350]])
    assert part.attrs["stgen"]["superresolved"] == mapped.attrs["stgen"]["superresolved"]
    assert Grid.of_map(part, "superresolved").bin_um == 10
    pp.degrade(part, map_key="superresolved", factor=5)  # and on it goes
    total = np.nansum(values_of(part, "superresolved"), (1, 2))
    np.testing.assert_allclose(np.nansum(values_of(part, "superresolved_5x"), (1, 2)), total, rtol=1e-5)


def test_cells_are_aggregated_by_regions_in_spatialdata(mapped):
    sdata = tl.aggregate_cells(mapped, map_key="superresolved", shapes_key="cells", key_added="found", copy=True)
    halves = GeoDataFrame(geometry=[shapely.box(-20, -20, 300, 620), shapely.box(300, -20, 620, 620)])
    sdata["halves"] = ShapesModel.parse(halves, transformations={"um": Identity()})
    summed = sd.aggregate(
        values_sdata=sdata, values="cells", by_sdata=sdata, by="halves", value_key=GENES, table_name="found", agg_func="sum",
        fractions=True, target_coordinate_system="um",
    )  # fmt: skip
    total = np.asarray(sdata["found"][:, GENES].X.sum(0)).ravel()
    np.testing.assert_allclose(np.asarray(summed["found"].X.sum(0)).ravel(), total, rtol=1e-3)
    left = sdata["found"].obsm["spatial"][:, 0] < 285
    assert np.asarray(summed["found"].X[0].sum()) > sdata["found"][left][:, GENES].X.sum()


def test_sections_are_concatenated_with_their_records(folders):
    parts = []
    for name in ("one", "two"):
        sdata = tenx.read_visium_hd(folders / "hd", dataset_id=name)
        pp.rasterize(sdata, table_key="square_016um", bin_um=16, genes=GENES, key_added=f"{name}_counts")
        parts.append(sdata.subset([f"{name}_counts", f"{name}_full_image"]))
    both = sd.concatenate(parts, attrs_merge="unique")
    for name, part in zip(("one", "two"), parts, strict=True):
        key = f"{name}_counts"
        np.testing.assert_array_equal(values_of(both, key), values_of(part, key))
        assert both.attrs["stgen"][key] == part.attrs["stgen"][key]
        pp.degrade(both, map_key=key, factor=3)
        assert Grid.of_map(both, f"{key}_3x").bin_um == 48


def test_genes_are_drawn_over_the_histology_by_spatialdata_plot(mapped):
    pytest.importorskip("spatialdata_plot")
    _, ax = plt.subplots()
    sdata = shallow_copy(mapped)
    sdata["superresolved"] = sdata["superresolved"].fillna(0)  # it draws no NaN, and says so
    layers = sdata.pl.render_images("he").pl.render_images("superresolved", channel="EPCAM", cmap="viridis", alpha=0.5)
    layers.pl.show(ax=ax, coordinate_systems="um")
    he, gene = ax.images
    left, right, bottom, top = gene.get_extent()
    place = (gene.get_transform() - ax.transData).transform([[left, top], [right, bottom]])
    np.testing.assert_allclose(place, corners_um(mapped, "superresolved", "um", 1.0), atol=5.1)  # half a bin at most
    np.testing.assert_allclose(gene.get_array(), sdata["superresolved"].sel(c="EPCAM").values)
    assert he.get_array().shape[2] == 3
    plt.close("all")


class Slide(SpatialData):
    """A slide that knows its file, as wsidata's ``WSIData``: a subclass with an argument of its own."""

    def __init__(self, *, images=None, labels=None, shapes=None, tables=None, points=None, attrs=None, reader):
        self.reader = reader
        super().__init__(images=images, labels=labels, shapes=shapes, tables=tables, points=points, attrs=attrs)


def test_expression_is_predicted_on_a_subclass_of_spatialdata(simulated):
    trained = shallow_copy(simulated)
    pp.embed(trained, table_key="spot_counts", model="texture", patch_um=64, progress=False)
    probe = models.LinearProbe(GENES, embedding_dim=trained["spot_counts"].obsm["X_texture"].shape[1])
    tl.fit(probe, trained, table_key="spot_counts", progress=False)
    slide = Slide(images={"he": simulated["he"]}, reader="openslide")
    copied = tl.predict_expression(slide, model=probe, copy=True, **QUIET)
    assert not slide.tables
    tl.predict_expression(slide, model=probe, **QUIET)
    assert (type(slide), slide.reader) == (Slide, "openslide")
    plain = SpatialData(images={"he": simulated["he"]})
    tl.predict_expression(plain, model=probe, **QUIET)
    for other in (slide, copied):
        np.testing.assert_array_equal(other["predicted"].X, plain["predicted"].X)
        assert other["predicted"].uns["stgen"]["predicted"] == plain["predicted"].uns["stgen"]["predicted"]
    tiles = slide["predicted"].obsm["spatial"]
    assert tiles.min() >= 0
    assert tiles.max() <= 600  # µm
