"""Gene selection, alignment and tile grids."""

import logging
import re

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData, get_extent
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, Translation, get_transformation, set_transformation
from xarray import DataArray

import stgen
from stgen._spatial.counts import get_counts
from stgen._spatial.image import Histology
from stgen.pp._alignment import tissue_mask


# -- genes ------------------------------------------------------------------------------------------------------------
def gene_table(seed=0, n=200, n_genes=60, names=None):
    rng = np.random.default_rng(seed)
    mean = np.exp(rng.uniform(-2, 3, n_genes))
    spread = rng.gamma(2.0, 0.5, (n, n_genes))
    names = [f"G{i}" for i in range(n_genes)] if names is None else names
    x = sparse.csr_matrix(rng.poisson(mean * spread).astype(np.float32))
    return AnnData(x, var=pd.DataFrame(index=names))


def test_hmhvg_is_the_smallest_intersection_that_holds_n_genes():
    table = gene_table()
    chosen = stgen.pp.select_genes(table, 12)
    counts = table.X.toarray().astype(np.float64)
    by_mean, by_std = np.argsort(-counts.mean(0)), np.argsort(-counts.std(0))
    for k in range(1, 61):
        both = set(by_mean[:k]) & set(by_std[:k])
        if len(both) >= 12:
            break
    assert set(chosen) <= {f"G{i}" for i in both}
    assert len(both) <= 13
    assert len(set(chosen)) == 12


def test_mean_var_scores_a_gene_by_the_worse_of_its_ranks():
    sections = {"a": gene_table(0), "b": gene_table(1)}
    chosen = stgen.pp.select_genes(sections, 15, flavor="mean_var", exclude=None)
    norm = []
    for table in sections.values():
        x = table.X.toarray().astype(np.float64)
        norm.append(np.log1p(x / x.sum(1, keepdims=True) * 1e4))
    norm = np.concatenate(norm)
    rank = np.maximum(np.argsort(np.argsort(-norm.mean(0))), np.argsort(np.argsort(-norm.var(0))))
    assert chosen == [f"G{i}" for i in np.argsort(rank, kind="stable")[:15]]


def test_mitochondrial_and_ribosomal_genes_are_left_out_but_not_mtor():
    names = ["MT-CO1", "mt-Nd1", "RPL3", "Rps6", "MTOR", "MTHFD1"] + [f"G{i}" for i in range(54)]
    table = gene_table(names=names)
    x = table.X.toarray()
    x[:, :6] += 500
    table.X = sparse.csr_matrix(x)
    chosen = stgen.pp.select_genes(table, 55, flavor="hvg")
    assert {"MTOR", "MTHFD1"} <= set(chosen)
    assert not {"MT-CO1", "mt-Nd1", "RPL3", "Rps6"} & set(chosen)
    assert "MT-CO1" in stgen.pp.select_genes(table, 60, flavor="hvg", exclude=None)


def numbered_genes():
    """60 genes under Ensembl ids, of which four are mitochondrial or ribosomal by the column of their symbols."""
    symbols = ["MT-CO1", "mt-Nd1", "RPL3", "Rps6", "MTOR"] + [f"G{i}" for i in range(55)]
    table = gene_table(names=[f"ENSG{i:011d}" for i in range(60)])
    x = table.X.toarray()
    x[:, :5] += 500
    table.X = sparse.csr_matrix(x)
    table.var["feature_name"] = pd.Categorical(symbols)
    return table


def test_genes_are_left_out_by_their_symbols(caplog):
    table = numbered_genes()
    chosen = stgen.pp.select_genes(table, 40, flavor="hvg", gene_symbols="feature_name")
    assert not set(table.var_names[:4]) & set(chosen)
    assert table.var_names[4] in chosen
    assert table.uns["stgen"]["genes"]["gene_symbols"] == "feature_name"
    assert "matches none" not in caplog.text
    # a gene that one section calls mitochondrial is left out of all; a missing symbol is no match
    other = numbered_genes()
    other.var["feature_name"] = [np.nan] * 60
    assert stgen.pp.select_genes([other, table], 40, flavor="hvg", gene_symbols="feature_name") == chosen
    with pytest.raises(KeyError, match="var has no column 'symbol'; found feature_name"):
        stgen.pp.select_genes(table, 40, gene_symbols="symbol")


@pytest.mark.parametrize(
    ("names", "options", "warns"),
    [
        ([f"ENSMUSG{i:011d}.2" for i in range(60)], {}, "none of the 60 gene names.*gene_symbols=<column of var"),
        ([str(i) for i in range(60)], {}, "mitochondrial and ribosomal ones neither"),
        ([f"G{i}" for i in range(60)], {"exclude": "^MT:"}, r"exclude='\^MT:' matches none"),
        ([f"G{i}" for i in range(60)], {}, None),  # a panel without such genes
        ([f"ENSG{i:011d}" for i in range(60)], {"exclude": None}, None),
    ],
)
def test_a_warning_says_that_exclude_matches_nothing(caplog, names, options, warns):
    stgen.pp.select_genes(gene_table(names=names), 10, **options)
    if warns is None:
        assert "matches none" not in caplog.text
    else:
        assert re.search(warns, caplog.text)


def test_the_warning_names_the_column_of_symbols(caplog):
    chosen = stgen.pp.select_genes(numbered_genes(), 40, flavor="hvg")
    assert chosen[0] in [f"ENSG{i:011d}" for i in range(5)]
    assert "pass gene_symbols='feature_name'" in caplog.text


def test_the_record_of_another_result_is_not_replaced():
    table = gene_table()
    table.uns["stgen"] = {"X_texture": {"function": "pp.embed"}}
    with pytest.raises(ValueError, match=r'uns\["stgen"\]\[\'X_texture\'\] is not a result'):
        stgen.pp.select_genes(table, 10, key_added="X_texture")
    assert table.uns["stgen"] == {"X_texture": {"function": "pp.embed"}}


def test_only_shared_genes_and_the_record():
    a, b = gene_table(0), gene_table(1)[:, 10:].copy()
    chosen = stgen.pp.select_genes([a, b], 50)
    assert set(chosen) == {f"G{i}" for i in range(10, 60)}
    for table in (a, b):
        entry = table.uns["stgen"]["genes"]
        assert entry["genes"].split("\n") == chosen
        assert entry["flavor"] == "hmhvg"
    with pytest.raises(ValueError, match="Only 50 genes are eligible"):
        stgen.pp.select_genes([a, b], 51)


def test_many_genes_are_prefiltered_to_the_highly_variable_ones():
    table = gene_table(n_genes=2500)
    log = sc.pp.log1p(sc.pp.normalize_total(table, target_sum=1e4, copy=True), copy=True)
    sc.pp.highly_variable_genes(log, n_top_genes=2000)
    chosen = stgen.pp.select_genes(table, 2000)
    assert set(chosen) == set(log.var_names[log.var["highly_variable"]])
    by_mean = table.X.toarray().mean(0)
    means = by_mean[table.var_names.get_indexer(stgen.pp.select_genes(table, 100, flavor="hvg"))]
    assert (np.diff(means) <= 0).all()


@pytest.mark.parametrize("flavor", ["hmhvg", "hvg", "deg", "mean_var"])
def test_constant_genes_are_never_chosen(flavor):
    sections = [gene_table(0), gene_table(1)]
    for k, table in enumerate(sections):
        x = table.X.toarray()
        x[:, 0], x[:, 1] = 0, 400
        x[:, 2] = 300 + k  # constant within each section, not over both
        table.X = sparse.csr_matrix(x)
        table.obs["group"] = np.repeat(["x", "y"], 100)
    chosen = stgen.pp.select_genes(sections, 58, flavor=flavor, groupby="group")
    assert set(chosen) == {f"G{i}" for i in range(2, 60)}
    with pytest.raises(ValueError, match=r"Only 58 genes are eligible in all sections \(2 are constant\), 59 were"):
        stgen.pp.select_genes(sections, 59, flavor=flavor, groupby="group")
    assert len(stgen.pp.select_genes(sections, 59, flavor=flavor, groupby="group", at_most=True)) == 58


def test_normalized_values_are_not_silently_counts(caplog):
    table = gene_table()
    stgen.pp.select_genes(table, 5)
    assert "whole numbers" not in caplog.text
    table.layers["counts"] = table.X.copy()
    sc.pp.normalize_total(table)
    sc.pp.log1p(table)
    stgen.pp.select_genes(table, 5)
    assert caplog.text.count("X does not hold whole numbers") == 1
    assert 'layer="counts"' in caplog.text
    stgen.pp.select_genes(table, 5, layer="counts")
    assert caplog.text.count("whole numbers") == 1


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_values_that_are_no_counts_are_warned_about(kind, caplog):
    table = gene_table(n=20)
    whole = table.X.toarray()
    for dtype in (np.float64, np.float32, np.int32):
        table.X = sparse.csr_matrix(whole.astype(dtype)) if kind == "sparse" else whole.astype(dtype)
        get_counts(table)
    assert not caplog.records
    table.layers["corrected"] = np.log1p(table.X) if kind == "dense" else table.X.log1p()
    values = get_counts(table, layer="corrected")
    np.testing.assert_allclose(values, np.log1p(whole), rtol=1e-6)  # taken as they are
    assert len(caplog.records) == 1
    assert "layers['corrected'] does not hold whole numbers" in caplog.text
    assert 'layer="counts"' in caplog.text


def test_differential_genes():
    table = gene_table()
    group = np.repeat(["x", "y"], 100)
    x = table.X.toarray()
    x[:100, 3] += 60
    x[100:, 7] += 60
    table.X = sparse.csr_matrix(x)
    table.obs["group"] = group
    chosen = stgen.pp.select_genes(table, 4, flavor="deg", groupby="group")
    assert set(chosen[:2]) == {"G3", "G7"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 5, "flavor": "best"}, ValueError, "`flavor` must be"),
        ({"n": 5, "flavor": "deg"}, ValueError, "pass groupby="),
        ({"n": 5, "flavor": "deg", "groupby": "a"}, KeyError, "no column 'a'"),
        ({"n": 0}, ValueError, "`n` must be a positive"),
        ({"n": 61}, ValueError, "Only 60 genes are eligible"),
        ({"n": 5, "layer": "raw"}, KeyError, "no layer 'raw'"),
    ],
)
def test_select_genes_errors_leave_the_object_alone(arguments, error, message):
    table = gene_table()
    with pytest.raises(error, match=message):
        stgen.pp.select_genes(table, **arguments)
    assert "stgen" not in table.uns
    with pytest.raises(ValueError, match="no section"):
        stgen.pp.select_genes({}, 3)


# -- alignment --------------------------------------------------------------------------------------------------------
def slide(height=400, width=600):
    """White glass with tissue in the right part: columns 350 to 580, rows 40 to 360."""
    image = np.full((3, height, width), 243, dtype=np.uint8)
    rng = np.random.default_rng(0)
    texture = rng.integers(-25, 25, (3, 320, 230))
    image[:, 40:360, 350:580] = np.clip(np.array([190, 110, 170])[:, None, None] + texture, 0, 255)
    return image


def slide_sdata(xy, *, mpp=2.0, image=None, radius=27.5):
    """Locations given in image pixels, stored in µm."""
    n = len(xy)
    table = AnnData(sparse.csr_matrix(np.ones((n, 2), np.float32)))
    table.obs["region"] = pd.Categorical(["spots"] * n)
    table.obs["id"] = np.arange(n)
    shapes = ShapesModel.parse(
        np.asarray(xy) * mpp, geometry=0, radius=radius, index=np.arange(n), transformations={"um": Identity()}
    )
    image = Image2DModel.parse(
        slide() if image is None else image,
        dims=("c", "y", "x"),
        transformations={"um": Scale([mpp, mpp], axes=("x", "y"))},
    )
    linked = TableModel.parse(table, region="spots", region_key="region", instance_key="id")
    return SpatialData(images={"he": image}, shapes={"spots": shapes}, tables={"t": linked})


@pytest.fixture
def on_tissue():
    x, y = np.meshgrid(np.arange(360, 575, 20.0), np.arange(50, 355, 20.0))
    return np.column_stack([x.ravel(), y.ravel()])


def test_a_good_alignment(on_tissue):
    report = stgen.pp.check_alignment(slide_sdata(on_tissue))
    assert report.inside == 1
    assert report.on_tissue > 0.98
    assert report.warnings == ()
    assert report.mpp == 2
    assert report.image_um == (1200, 800)
    assert report.tissue_fraction == pytest.approx(230 * 320 / 240000, rel=0.05)
    assert report.pitch_um == pytest.approx(40)


def test_the_report_is_readable(on_tissue):
    report = stgen.pp.check_alignment(slide_sdata(on_tissue))
    text = str(report)
    assert text == repr(report)
    assert text.splitlines()[:3] == [
        "AlignmentReport",
        "    locations: 176, 40 µm apart; 100 % inside the image",
        "    on tissue: 100 %; with x and y exchanged, 0 %",
    ]
    assert "    image: 1,200 x 800 µm, 2 µm per pixel; " in text
    assert text.endswith(" % tissue\n    no warnings")
    shifted = stgen.pp.check_alignment(slide_sdata(on_tissue - [120, 0]))
    assert shifted.warnings[0] in str(shifted)


def test_swapped_axes(on_tissue):
    with pytest.raises(ValueError, match=r"x and y look exchanged.*\[:, ::-1\]"):
        stgen.pp.check_alignment(slide_sdata(on_tissue[:, ::-1]))


def test_a_few_spots_on_patchy_tissue_are_not_called_exchanged():
    for seed in range(4):
        section = stgen.datasets.simulated_section(size_um=500, seed=seed)
        assert stgen.pp.check_alignment(section, table_key="spot_counts").inside == 1


def test_outside(on_tissue):
    with pytest.raises(ValueError, match="176 of 176 locations lie outside the image"):
        stgen.pp.check_alignment(slide_sdata(on_tissue + 1000))


def test_next_to_tissue():
    x, y = np.meshgrid(np.arange(20, 300, 20.0), np.arange(100, 350, 20.0))
    with pytest.raises(ValueError, match="do not overlap with tissue"):
        stgen.pp.check_alignment(slide_sdata(np.column_stack([x.ravel(), y.ravel()])))


def test_partly_on_tissue_warns(caplog, on_tissue):
    shifted = on_tissue - [120, 0]
    with caplog.at_level(logging.WARNING, logger="stgen"):
        report = stgen.pp.check_alignment(slide_sdata(shifted))
    assert "lie on tissue" in report.warnings[0]
    assert report.warnings[0] in caplog.text


@pytest.mark.parametrize("mpp", [1e-5, 5000.0])
def test_implausible_mpp(on_tissue, mpp):
    with pytest.raises(ValueError, match="implausible"):
        stgen.pp.check_alignment(slide_sdata(on_tissue), mpp=mpp)


@pytest.mark.parametrize("too_large", [True, False])
def test_coordinates_of_another_resolution(on_tissue, too_large):
    """Full-resolution coordinates on the hires image, and hires coordinates taken for full-resolution ones."""
    scalef = 0.2
    adata = AnnData(np.ones((len(on_tissue), 2), np.float32))
    adata.obsm["spatial"] = on_tissue / scalef
    factors = {"tissue_hires_scalef": scalef, "spot_diameter_fullres": 50.0}
    adata.uns["spatial"] = {"lib": {"images": {"hires": slide().transpose(1, 2, 0)}, "scalefactors": factors}}
    assert stgen.pp.check_alignment(adata, mpp=0.5).inside == 1
    adata.obsm["spatial"] *= 1 / scalef if too_large else scalef
    before = adata.obsm["spatial"].copy()
    found = r"another resolution.*\*= 0.2" if too_large else r"in pixels of the image 'hires'.*\] / 0.2"
    with pytest.raises(ValueError, match=found):
        stgen.pp.check_alignment(adata, mpp=0.5)
    np.testing.assert_array_equal(adata.obsm["spatial"], before)


def test_other_resolution_in_spatialdata(on_tissue):
    sdata = slide_sdata(on_tissue)
    set_transformation(sdata["spots"], Scale([2.0, 2.0], axes=("x", "y")), "um")
    with pytest.raises(ValueError, match="another resolution"):
        stgen.pp.check_alignment(sdata)


def test_visium_pitch_that_contradicts_the_scale():
    row, column = np.divmod(np.arange(48), 6)
    xy = np.column_stack([(column + 0.5 * (row % 2)) * 35 + 355, row * 30.3 + 60])
    report = stgen.pp.check_alignment(slide_sdata(xy, radius=0.275 * 70))
    assert "look like Visium, 100 µm apart" in report.warnings[0]
    assert "mpp=2.858" in report.warnings[0]


def test_tissue_mask_of_fluorescence():
    dark = np.random.default_rng(0).integers(0, 6, (4, 200, 200)).astype(np.uint8)
    dark[2, 50:150, 50:150] += 90
    image = Histology([DataArray(dark, dims=("c", "y", "x"), coords={"c": list("wxyz")})], mpp=1.0)
    mask, pixel = tissue_mask(image)
    assert pixel == 1
    assert mask[60:140, 60:140].all()
    assert mask.mean() == pytest.approx(0.25, abs=0.02)


# -- tiles ------------------------------------------------------------------------------------------------------------
def test_tile_grid_covers_the_tissue(on_tissue):
    sdata = slide_sdata(on_tissue)
    set_transformation(sdata["he"], Translation([100, 50], axes=("x", "y")), "other")
    stgen.pp.tile_grid(sdata, spacing_um=50, diameter_um=40, key_added="tiles")
    table = sdata["tiles_table"]
    assert table.n_vars == 0
    assert table.n_obs == len(sdata["tiles"])
    # 460 x 640 µm of tissue, one tile per 50 x 43.3 µm
    assert table.n_obs == pytest.approx(460 * 640 / (50 * 43.3), rel=0.15)
    section = stgen._spatial.section.get_section(sdata, shapes_key="tiles", need_image=True)
    np.testing.assert_allclose(section.xy_um, table.obsm["spatial"], atol=1e-9)
    assert section.spot_diameter_um == pytest.approx(40)
    assert stgen.pp.check_alignment(sdata, shapes_key="tiles").on_tissue > 0.8
    extent = get_extent(sdata["tiles"], coordinate_system="other")
    assert extent["x"][0] > 100 + 330
    assert sdata.attrs["stgen"]["tiles"]["n_tiles"] == table.n_obs
    with pytest.raises(ValueError, match=r"sdata.shapes\['tiles'\] exists already"):
        stgen.pp.tile_grid(sdata)
    stgen.pp.tile_grid(sdata, spacing_um=100, overwrite=True)
    assert sdata["tiles_table"].n_obs < table.n_obs


def test_tile_grid_copy_and_store(on_tissue, tmp_path):
    sdata = slide_sdata(on_tissue)
    copy = stgen.pp.tile_grid(sdata, copy=True)
    assert "tiles" in copy
    assert "tiles" not in sdata
    assert "stgen" not in sdata.attrs
    copy.write(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing_um": 0}, "`spacing_um` must be a positive"),
        ({"diameter_um": np.nan}, "`diameter_um` must be a finite"),
        ({"min_tissue": 2}, "`min_tissue` must lie"),
    ],
)
def test_tile_grid_errors(on_tissue, arguments, message):
    sdata = slide_sdata(on_tissue)
    with pytest.raises(ValueError, match=message):
        stgen.pp.tile_grid(sdata, **arguments)
    with pytest.raises(TypeError, match="SpatialData"):
        stgen.pp.tile_grid(sdata["t"])
    blank = slide_sdata(on_tissue, image=np.full((3, 400, 600), 245, np.uint8))
    with pytest.raises(ValueError, match="No tile lies on tissue"):
        stgen.pp.tile_grid(blank)
    assert set(blank.shapes) == {"spots"}


# ---- a coordinate system in micrometers ------------------------------------------------------------------------------


def test_micrometers_by_the_scale(on_tissue):
    sdata = slide_sdata(on_tissue)
    sdata.rename_coordinate_systems({"um": "px"})
    stgen.pp.name_micrometers(sdata, mpp=0.25, coordinate_system="px")
    for name, scale in (("he", 0.5), ("spots", 0.25)):  # a pixel of the image measures 2 units of "px"
        matrix = get_transformation(sdata[name], "um").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([scale, scale, 1]))
    assert stgen.pp.check_alignment(sdata).mpp == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either points_key=.* or mpp="),
        ({"points_key": "transcripts", "mpp": 1.0}, ValueError, "either points_key=.* or mpp="),
        ({"mpp": 0}, ValueError, "`mpp` must be a positive number"),
        ({"points_key": "nothing"}, KeyError, "sdata.points has transcripts"),
        ({"mpp": 1.0, "coordinate_system": "moon"}, KeyError, "no element is in the coordinate system 'moon'; found"),
        ({"mpp": 1.0, "key_added": "pixels"}, ValueError, "'pixels' does not say"),
        ({"mpp": 1.0, "key_added": "um"}, ValueError, "have a transformation to 'um' already"),
    ],
)
def test_micrometers_refuses(sdata, arguments, error, message):
    def systems():
        return {
            name: set(get_transformation(sdata[name], get_all=True)) for name in ("he", "spots", "transcripts", "cells")
        }

    before = systems()
    with pytest.raises(error, match=message):
        stgen.pp.name_micrometers(sdata, **{"coordinate_system": "um", "key_added": "microns", **arguments})
    assert systems() == before
