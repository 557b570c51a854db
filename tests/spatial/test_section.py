"""Sections from SpatialData and AnnData, counts, records, and lazy reading of images."""

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale
from xarray import DataArray

from stgen._spatial.counts import get_counts
from stgen._spatial.image import Histology, image_of, is_micrometers, resample_matrix, spatial_groups
from stgen._spatial.records import provenance, record, write_image, write_table
from stgen._spatial.section import get_section


def image_array(height=300, width=400, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.random((channels, height // 10, width // 10)).repeat(10, 1).repeat(10, 2)
    return (40 + 180 * smooth + 20 * rng.random((channels, height, width))).astype(np.uint8)


def histology(array, mpp=0.5, **kwargs):
    return Histology([DataArray(array, dims=("c", "y", "x"), **kwargs)], mpp=mpp)


def hexagonal(n_rows, n_columns, pitch, offset):
    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    return np.column_stack([(column + 0.5 * (row % 2)) * pitch, row * pitch * np.sqrt(3) / 2]) + offset


def counts_table(n, n_genes=5, **kwargs):
    x = sparse.csr_matrix(np.random.default_rng(1).poisson(3, (n, n_genes)).astype(np.float32))
    return AnnData(x, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]), **kwargs)


def visium_sdata(*, fullres=True, scalef=0.25, pitch_px=80.0):
    """The elements and transformations that spatialdata-io's Visium reader makes."""
    xy = hexagonal(6, 7, pitch_px, 90.0)
    table = counts_table(len(xy))
    table.obs_names = [f"barcode{i}" for i in range(len(xy))]
    table.obs["spot_id"] = np.arange(len(xy))
    table.obs["region"] = pd.Categorical(["lib"] * len(xy))
    table.obsm["spatial"] = xy
    down = Scale([scalef, scalef], axes=("y", "x"))
    shapes = ShapesModel.parse(
        xy,
        geometry=0,
        radius=0.55 * pitch_px / 2,
        index=table.obs["spot_id"].copy(),
        transformations={"lib": Identity(), "lib_downscaled_hires": down},
    )
    full = image_array(600, 720)
    images = {
        "lib_hires_image": Image2DModel.parse(
            full[:, ::4, ::4],
            dims=("c", "y", "x"),
            transformations={"lib_downscaled_hires": Identity(), "lib": down.inverse()},
        )
    }
    if fullres:
        images["lib_full_image"] = Image2DModel.parse(
            full, dims=("c", "y", "x"), scale_factors=[2, 2], transformations={"lib": Identity()}
        )
    linked = TableModel.parse(table, region="lib", region_key="region", instance_key="spot_id")
    return SpatialData(images=images, shapes={"lib": shapes}, tables={"table": linked})


def visium_adata(*, scalef=0.25, pitch_px=80.0, **factors):
    xy = hexagonal(6, 7, pitch_px, 90.0)
    adata = counts_table(len(xy))
    adata.obsm["spatial"] = xy
    hires = image_array(600, 720)[:, ::4, ::4].transpose(1, 2, 0)
    scalefactors = {"tissue_hires_scalef": scalef, "spot_diameter_fullres": 0.55 * pitch_px} | factors
    adata.uns["spatial"] = {"lib": {"images": {"hires": hires}, "scalefactors": scalefactors}}
    return adata


# -- images -----------------------------------------------------------------------------------------------------------
def test_read_at_native_resolution_is_the_image_itself():
    array = image_array()
    window = histology(array).read(30, 20, 50, 40)
    np.testing.assert_allclose(window, array[:, 20:60, 30:80] / 255, atol=1e-6)


def test_read_at_half_resolution_keeps_the_mean_and_centers():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (1, 100, 1))
    window = histology(ramp).read(40, 20, 64, 32, mpp=1.0)
    assert window.shape == (1, 16, 32)
    # output pixel i covers columns 40 + 2i and 41 + 2i, whose mean value is 40.5 + 2i
    np.testing.assert_allclose(window[0, 5] * 255, 40.5 + 2 * np.arange(32), atol=1e-3)


def test_reading_repeats_the_edge_outside():
    array = image_array(50, 60)
    image = histology(array)
    np.testing.assert_allclose(image.read(-10, 0, 5, 50)[:, :, 0], array[:, :, 0] / 255, atol=1e-6)
    assert image.read(1000, 1000, 4, 4).shape == (3, 4, 4)


def test_resampling_weights_sum_to_one_and_mirror():
    weights = resample_matrix(np.array([2.3]), 20.0, 7, 30)[0]
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    mirrored = resample_matrix(np.array([30 - 22.3]), 20.0, 7, 30)[0]
    np.testing.assert_allclose(mirrored, weights[::-1, ::-1], atol=1e-6)


def test_lazy_equals_in_memory_and_reads_only_what_it_needs():
    array = image_array(1200, 1200)
    seen = []

    def load(block, block_info=None):
        if block_info:
            seen.append(block_info[0]["chunk-location"])
        return block

    lazy = da.from_array(array, chunks=(3, 200, 200)).map_blocks(load, dtype=array.dtype)
    xy = np.array([[150.0, 130.5], [320.2, 90.0]])
    seen.clear()
    patches = [dict(zip(rows, p, strict=True)) for rows, p in histology(lazy).patches(xy, size_um=40, out_px=32)]
    patches = {k: v for part in patches for k, v in part.items()}
    assert len(set(seen)) <= 6
    direct = {
        k: v for rows, p in histology(array).patches(xy, size_um=40, out_px=32) for k, v in zip(rows, p, strict=True)
    }
    for row in (0, 1):
        np.testing.assert_array_equal(patches[row], direct[row])


def test_patches_visit_every_location_once():
    xy = np.random.default_rng(0).uniform(0, 9000, (500, 2))
    groups = list(spatial_groups(xy, 700.0))
    assert sorted(np.concatenate(groups)) == list(range(500))
    image = histology(image_array(80, 80))
    rows = np.concatenate([r for r, _ in image.patches(xy, size_um=8, out_px=8, batch_size=7)])
    assert sorted(rows) == list(range(500))


def test_a_coarser_level_is_used_when_it_is_fine_enough():
    fine = image_array(400, 400)
    coarse = np.zeros((3, 100, 100), dtype=np.uint8)
    image = Histology([DataArray(a, dims=("c", "y", "x")) for a in (fine, coarse)], mpp=0.5)
    assert image.scales == [1.0, 4.0]
    assert image.read(0, 0, 100, 100, mpp=2.0).max() == 0
    assert image.read(0, 0, 100, 100, mpp=1.9).max() > 0.1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((3, 8, 8), 255, np.uint8), 1.0),
        (np.full((3, 8, 8), 65535, np.uint16), 1.0),
        (np.full((3, 8, 8), 51, np.int64), 0.2),
        (np.full((3, 8, 8), 0.25, np.float64), 0.25),
        (np.full((3, 8, 8), 51.0, np.float32), 0.2),
        (np.ones((1, 8, 8), bool), 1.0),
    ],
)
def test_values_are_brought_to_the_unit_interval(values, expected):
    np.testing.assert_allclose(histology(values).read(1, 1, 4, 4), expected, rtol=1e-5)


def test_opacity_is_no_channel_but_a_fourth_stain_is_one():
    rgba = image_array(channels=4)
    stains = histology(rgba, coords={"c": ["dapi", "bound", "rna", "prot"]})
    assert stains.n_channels == 4
    assert histology(rgba, coords={"c": ["r", "g", "b", "a"]}).n_channels == 3
    assert histology(rgba).n_channels == 4
    rgba[3] = 255
    assert histology(rgba).n_channels == 3


@pytest.mark.parametrize("mpp", [0, -1, np.nan])
def test_implausible_mpp_of_an_image(mpp):
    with pytest.raises(ValueError, match="µm per pixel must be a positive"):
        histology(image_array(), mpp=mpp)


def test_text_is_not_an_image():
    with pytest.raises(TypeError, match="integers or floats"):
        histology(np.full((3, 4, 4), "a"))


# -- SpatialData ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["lib_full_image", "lib_hires_image"])
def test_visium_layout_of_spatialdata_io(key):
    sdata = visium_sdata()
    section = get_section(sdata, image_key=key)
    factor = 1.0 if key == "lib_full_image" else 0.25
    np.testing.assert_allclose(section.xy_px, sdata["table"].obsm["spatial"] * factor, atol=1e-9)
    assert section.mpp == pytest.approx(100 / 80 / factor)
    assert section.spot_diameter_um == pytest.approx(55)
    assert section.table is sdata["table"]
    assert section.image.n_channels == 3
    np.testing.assert_allclose(section.xy_um, sdata["table"].obsm["spatial"] * 1.25)


def test_several_images_are_listed():
    with pytest.raises(KeyError, match="lib_hires_image, lib_full_image"):
        get_section(visium_sdata(), need_image=True)


def test_micrometer_system_gives_mpp(tmp_path):
    sdata = micrometer_sdata()
    section = get_section(sdata, need_image=True)
    assert section.mpp == pytest.approx(0.5)
    np.testing.assert_allclose(section.xy_px, sdata["spot_counts"].obsm["spatial"] / 0.5, atol=1e-9)
    assert section.spot_diameter_um == pytest.approx(55)
    sdata.write(tmp_path / "a.zarr")
    again = get_section(sd.read_zarr(tmp_path / "a.zarr"), need_image=True)
    np.testing.assert_allclose(again.xy_px, section.xy_px)
    assert get_section(sdata, need_image=True, mpp=0.25).mpp == 0.25


def micrometer_sdata(n=12):
    xy = np.random.default_rng(0).uniform(30, 120, (n, 2))
    table = counts_table(n)
    table.obsm["spatial"] = xy
    table.obs["region"] = pd.Categorical(["spots"] * n)
    table.obs["spot_id"] = np.arange(n)
    image = Image2DModel.parse(
        image_array(), dims=("c", "y", "x"), transformations={"um": Scale([0.5, 0.5], axes=("x", "y"))}
    )
    shapes = ShapesModel.parse(xy, geometry=0, radius=27.5, index=np.arange(n), transformations={"um": Identity()})
    linked = TableModel.parse(table, region="spots", region_key="region", instance_key="spot_id")
    return SpatialData(images={"he": image}, shapes={"spots": shapes}, tables={"spot_counts": linked})


def test_rows_follow_the_table_not_the_shapes():
    sdata = micrometer_sdata()
    sdata.tables["spot_counts"] = sdata["spot_counts"][::-1].copy()
    section = get_section(sdata, need_image=True)
    np.testing.assert_allclose(section.xy_px, sdata["spot_counts"].obsm["spatial"] / 0.5)


def test_labels_are_located_too():
    labels = np.zeros((60, 80), dtype=np.int32)
    labels[10:20, 30:40], labels[40:50, 10:30] = 1, 2
    table = counts_table(2)
    table.obs["region"] = pd.Categorical(["cells"] * 2)
    table.obs["cell"] = [1, 2]
    sdata = SpatialData(
        images={
            "he": Image2DModel.parse(image_array(60, 80), dims=("c", "y", "x"), transformations={"um": Identity()})
        },
        labels={"cells": Labels2DModel.parse(labels, dims=("y", "x"), transformations={"um": Identity()})},
        tables={"t": TableModel.parse(table, region="cells", region_key="region", instance_key="cell")},
    )
    np.testing.assert_allclose(get_section(sdata, need_image=True).xy_px, [[35, 15], [20, 45]], atol=0.51)


def test_unknown_scale_names_the_argument():
    sdata = micrometer_sdata()
    for name in ("he", "spots"):
        sd.transformations.set_transformation(sdata[name], Identity(), "global")
        sd.transformations.remove_transformation(sdata[name], "um")
    with pytest.raises(ValueError, match="mpp=<µm per image pixel>"):
        get_section(sdata, need_image=True)
    assert get_section(sdata, need_image=True, mpp=0.5).mpp == 0.5


def test_no_shared_coordinate_system():
    sdata = micrometer_sdata()
    sd.transformations.set_transformation(sdata["he"], Identity(), "elsewhere")
    sd.transformations.remove_transformation(sdata["he"], "um")
    with pytest.raises(ValueError, match="share no coordinate system"):
        get_section(sdata, need_image=True)
    with pytest.raises(KeyError, match="do not share the coordinate system 'um'"):
        get_section(sdata, need_image=True, coordinate_system="um")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_key": "nope"}, KeyError, "no image 'nope'; found he"),
        ({"table_key": "nope"}, KeyError, "no table 'nope'; found spot_counts"),
        ({"shapes_key": "nope"}, KeyError, "`shapes_key`: no table annotates 'nope'"),
        ({"mpp": -1}, ValueError, "`mpp` must be a positive"),
        ({"mpp": "1"}, ValueError, "`mpp` must be a positive"),
    ],
)
def test_wrong_keys(arguments, error, message):
    with pytest.raises(error, match=message):
        get_section(micrometer_sdata(), need_image=True, **arguments)


def test_table_without_link_or_with_lost_instances():
    sdata = micrometer_sdata()
    table = sdata["spot_counts"].copy()
    del table.uns["spatialdata_attrs"]
    sdata.tables["loose"] = TableModel.parse(table)
    with pytest.raises(ValueError, match="annotates no element"):
        get_section(sdata, table_key="loose", need_image=True)
    sdata.shapes["spots"] = sdata["spots"].iloc[:5]
    with pytest.raises(ValueError, match="instances that 'spots' does not have"):
        get_section(sdata, table_key="spot_counts", need_image=True)


def two_regions():
    """One table of two sections that share a coordinate system, each with its own image."""
    a, b = micrometer_sdata(), micrometer_sdata()
    table = ad.concat([a["spot_counts"], b["spot_counts"]], index_unique="-")
    table.obs["region"] = pd.Categorical(["spots_A"] * 12 + ["spots_B"] * 12)
    linked = TableModel.parse(table, region=["spots_A", "spots_B"], region_key="region", instance_key="spot_id")
    return SpatialData(
        images={"he_A": a["he"], "he_B": b["he"]},
        shapes={"spots_A": a["spots"], "spots_B": b["spots"]},
        tables={"t": linked},
    )


def test_a_table_of_several_regions_is_refused():
    sdata = two_regions()
    for arguments in ({"image_key": "he_A"}, {}, {"shapes_key": "spots_A", "image_key": "he_A"}):
        with pytest.raises(ValueError, match=r"'t' has rows in 2 regions \(spots_A, spots_B\).*sdata.subset\(\[name, "):
            get_section(sdata, **arguments)
    with pytest.raises(
        ValueError, match=r"adata\[adata.obs\['region'\] == name\].copy\(\) for name in \['spots_A', 'spots_B'\]"
    ):
        get_section(sdata["t"], mpp=0.5)
    # what the message advises
    for name, image in (("spots_A", "he_A"), ("spots_B", "he_B")):
        part = get_section(sdata.subset([name, image]), need_image=True)
        assert part.image_key == image
        np.testing.assert_allclose(part.xy_um, part.table.obsm["spatial"])
        part = get_section(sdata["t"][sdata["t"].obs["region"] == name].copy(), mpp=0.5)
        assert len(part.xy_px) == 12


def test_suffix_of_concatenated_objects():
    both = sd.concatenate({"A": micrometer_sdata(), "B": micrometer_sdata()})
    assert set(both.coordinate_systems) == {"um-A", "um-B"}
    section = get_section(both, image_key="he-B", table_key="spot_counts-B")
    assert section.mpp == pytest.approx(0.5)
    np.testing.assert_allclose(section.xy_um, section.table.obsm["spatial"])
    assert image_of(both, "he-A").mpp == pytest.approx(0.5)


def test_names_of_micrometer_systems():
    assert all(map(is_micrometers, ["um", "µm", "Microns", "micrometers", "um-A", "um-A-B"]))
    assert not any(map(is_micrometers, ["umap", "global", "um2", "album-um", "um-"]))


# -- AnnData ----------------------------------------------------------------------------------------------------------
def test_several_libraries_are_refused():
    adata = visium_adata()
    adata.uns["spatial"]["other"] = adata.uns["spatial"]["lib"]
    for need_image in (True, False):
        with pytest.raises(ValueError, match='several libraries: lib, other.*adata.obs\\["library_id"\\] == name'):
            get_section(adata, need_image=need_image)


def test_visium_convention_of_scanpy():
    adata = visium_adata()
    section = get_section(adata, need_image=True)
    assert section.table is adata
    np.testing.assert_allclose(section.xy_px, adata.obsm["spatial"] * 0.25)
    assert section.mpp == pytest.approx(5.0)
    assert section.spot_diameter_um == pytest.approx(55)
    assert get_section(adata, need_image=True, mpp=0.5).mpp == pytest.approx(2.0)
    assert get_section(visium_adata(microns_per_pixel=0.3), need_image=True).mpp == pytest.approx(1.2)


def test_without_an_image():
    adata = visium_adata()
    section = get_section(adata)
    assert section.image is None
    np.testing.assert_allclose(section.xy_um, adata.obsm["spatial"] * 1.25)
    del adata.uns["spatial"]
    assert get_section(adata).mpp is None
    with pytest.raises(ValueError, match="pass mpp="):
        _ = get_section(adata).xy_um


def test_anndata_errors():
    adata = visium_adata()
    with pytest.raises(KeyError, match="no image 'lowres'; found hires"):
        get_section(adata, image_key="lowres")
    adata.obsm["spatial"] = adata.obsm["spatial"] * 0.25
    with pytest.raises(ValueError, match=r'adata.obsm\["spatial"\] / 0.25'):
        get_section(adata, need_image=True)
    adata.obsm["spatial"][3] = np.nan
    with pytest.raises(ValueError, match="1 rows without finite coordinates"):
        get_section(adata)
    del adata.obsm["spatial"]
    with pytest.raises(KeyError, match="no spatial coordinates"):
        get_section(adata)
    with pytest.raises(ValueError, match="table is empty"):
        get_section(visium_adata()[:0].copy())
    plain = visium_adata()
    del plain.uns["spatial"]["lib"]["images"]
    with pytest.raises(KeyError, match="There is no image"):
        get_section(plain, need_image=True)
    with pytest.raises(TypeError, match="found ndarray"):
        get_section(np.ones(3))


# -- counts -----------------------------------------------------------------------------------------------------------
def test_counts_in_the_order_asked_for():
    table = counts_table(4)
    counts = get_counts(table, genes=["g3", "g0"])
    np.testing.assert_array_equal(counts, table[:, ["g3", "g0"]].X.toarray())
    assert counts.dtype == np.float32
    assert sparse.issparse(get_counts(table, dense=False))
    table.layers["raw"] = table.X.toarray() * 2
    np.testing.assert_array_equal(get_counts(table, layer="raw"), table.X.toarray() * 2)


def test_bad_counts():
    def changed(value):
        table = counts_table(4)
        x = table.X.toarray()
        x[1, 1] = value
        table.X = x
        return table

    with pytest.raises(ValueError, match="NaN"):
        get_counts(changed(np.nan))
    with pytest.raises(ValueError, match="negative values"):
        get_counts(changed(-1))
    table = counts_table(4)
    with pytest.raises(KeyError, match="2 of 3 genes are not in the table"):
        get_counts(table, genes=["g0", "x", "y"])
    with pytest.raises(KeyError, match="no layer 'raw'; found none"):
        get_counts(table, layer="raw")
    table.var_names = ["a", "b", "a", "c", "d"]
    with pytest.raises(ValueError, match="var_names_make_unique"):
        get_counts(table)
    table = counts_table(4)
    table.layers["text"] = np.full(table.shape, "3", dtype=object)
    with pytest.raises(TypeError, match="object"):
        get_counts(table, layer="text")
    with pytest.raises(ValueError, match="no genes"):
        get_counts(table[:, :0])


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_counts_on_disk(tmp_path, kind):
    table = counts_table(6)
    x = table.X.toarray()
    table.X = x if kind == "dense" else getattr(sparse, f"{kind}_matrix")(x)
    table.layers["twice"] = 2 * table.X
    table.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    for view, rows in ((backed, slice(None)), (backed[[4, 1]], [4, 1])):
        np.testing.assert_array_equal(get_counts(view), x[rows])
        np.testing.assert_array_equal(get_counts(view, genes=["g3", "g0"]), x[rows][:, [3, 0]])
        np.testing.assert_array_equal(get_counts(view, dense=False).toarray(), x[rows])
        np.testing.assert_array_equal(get_counts(view, layer="twice"), 2 * x[rows])
    assert backed.isbacked


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_lazy_counts(kind):
    table = counts_table(6)
    x = table.X.toarray()
    table.X = da.from_array(x, chunks=(4, 5)) if kind == "dense" else da.from_array(table.X, chunks=(4, 5))
    np.testing.assert_array_equal(get_counts(table), x)
    np.testing.assert_array_equal(get_counts(table, genes=["g3", "g0"]), x[:, [3, 0]])


# -- results ----------------------------------------------------------------------------------------------------------
def test_provenance_survives_a_store(tmp_path):
    sdata = micrometer_sdata()
    many = [f"g{i}" for i in range(100)]
    entry = provenance("f", a=1, b=None, c=(1, 2), d={"x": np.float32(2), "y": None}, e=many, f=np.int64(3))
    assert entry["c"] == "1, 2"
    assert entry["d"] == {"x": 2.0}
    assert entry["e"]["n"] == 100
    assert "b" not in entry
    record(sdata, "one", entry)
    record(sdata, "two", entry)
    record(sdata["spot_counts"], "one", entry)
    sdata.write(tmp_path / "a.zarr")
    again = sd.read_zarr(tmp_path / "a.zarr")
    assert again.attrs["stgen"] == {"one": entry, "two": entry}
    assert again["spot_counts"].uns["stgen"]["one"] == entry


def test_images_and_tables_that_are_written():
    sdata = micrometer_sdata()
    values = np.random.default_rng(0).random((2, 30, 40))
    to_um = {"um": Scale([5, 5], axes=("x", "y"))}
    write_image(sdata, "map", values, channels=["A", "B"], transformations=to_um)
    assert list(sdata["map"].coords["c"].values) == ["A", "B"]
    assert sdata["map"].dtype == np.float32
    assert sdata["map"].data.chunksize == (1, 30, 40)
    np.testing.assert_allclose(sdata["map"].values, values, rtol=1e-6)
    with pytest.raises(ValueError, match=r"sdata.images\['map'\] exists already"):
        write_image(sdata, "map", values, channels=["A", "B"], transformations=to_um)
    with pytest.raises(KeyError, match="several candidates for the image: he, map"):
        get_section(sdata, need_image=True)
    record(sdata, "map", provenance("f"))  # a result is not a candidate
    write_table(sdata, "new", counts_table(12), region="spots")
    section = get_section(sdata, table_key="new", need_image=True)
    np.testing.assert_allclose(section.xy_px, get_section(sdata, table_key="spot_counts", need_image=True).xy_px)
