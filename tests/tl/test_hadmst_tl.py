"""HaDM-ST through tl.fit and tl.superresolve: nuclei and prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from spatialdata import deepcopy
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, get_transformation, set_transformation
from spatialdata.transformations import Sequence as Chain

from stgen import models, pp, tl
from stgen._spatial.grid import Grid
from stgen._spatial.labels import labels_window
from stgen._spatial.records import write_image
from stgen.models import C3Diff, HaDMST, RegressionUNet
from stgen.models._text import embed_text

GENES = ["EPCAM", "COL1A1", "ACTB"]
TINY = {
    "factor": 5, "px_per_bin": 2, "width": 8, "semantic_width": 8, "token": 4, "window": 2, "heads": 2, "layers": 2,
    "region": 4, "widths": [8, 8, 8], "mean_widths": [8, 8], "text_dim": 32,
    "text_encoder": "hashed", "alignment_weight": 0.05,
}  # fmt: skip
QUICK = {"steps": 2, "batch_size": 2, "device": "cpu", "progress": False}
KEYS = {"map_key": "counts", "image_key": "he", "tile": 16}
DRAW = {"n_samples": 1, "steps": 2, "device": "cpu", "progress": False}
BREAST, BRAIN = "H&E of breast cancer", "H&E of the brain"


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """Constants are taken from a few tiles: they are tested elsewhere."""
    monkeypatch.setattr("stgen.models._maps.N_TILES", 8)


@pytest.fixture(scope="module")
def rasterized(simulated):
    """The simulated section with its nuclei, a fine map and a coarse one. Look, don't touch."""
    sdata = deepcopy(simulated)
    pp.segment_nuclei(sdata, image_key="he", progress=False)
    pp.rasterize(sdata, genes=GENES)
    element = sdata.images["counts"]
    transformations, values = get_transformation(element, get_all=True), np.asarray(element.data)
    del sdata.images["counts"]
    write_image(sdata, "counts", values, channels=GENES, transformations=transformations)
    pp.degrade(sdata, map_key="counts", factor=5)
    return sdata


@pytest.fixture
def section(rasterized):
    """A copy that the test may change."""
    return deepcopy(rasterized)


def hadmst(**options):
    return HaDMST(options.pop("genes", GENES), **{**TINY, **options})


def randomized(model):
    """A model as one that was fitted: weights at random, so that everything matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    if model.semantic is not None:
        for parameter in model.semantic.parameters():
            torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def told(rasterized):
    """A model that was fitted on a section with a prompt. Look, don't touch."""
    model = tl.fit(hadmst(), rasterized, labels_key="nuclei", prompt=f" {BREAST} ", **KEYS, **QUICK)
    return randomized(model)


def fit(sdata, model=None, **options):
    return tl.fit(model or hadmst(), sdata, **{**KEYS, **QUICK, "labels_key": "nuclei", "prompt": BREAST, **options})


@pytest.fixture
def no_work(monkeypatch):
    """What is wrong must be found before any work."""
    monkeypatch.setattr(HaDMST, "fit", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr(HaDMST, "sample", lambda *_, **__: pytest.fail("work was begun"))


def seen_in_fit(model):
    """Data that the model is given in place of being trained."""
    seen = []
    model.fit = lambda train, validation, **options: seen.extend([train, validation]) or {}
    return seen


def replace_nuclei(sdata, mask):
    systems = get_transformation(sdata["nuclei"], get_all=True)
    del sdata.labels["nuclei"]
    sdata.labels["nuclei"] = Labels2DModel.parse(mask.copy(), dims=("y", "x"), transformations=systems)


def elements(sdata):
    return {key: element for _, key, element in sdata.gen_elements()}


def values_of(sdata, key="superresolved"):
    return np.asarray(sdata.images[key].data)


def superresolved(sdata, model, **options):
    options = {"image_key": "he", "low_res": "counts_5x", "labels_key": "nuclei", **DRAW, **options}
    return tl.superresolve(sdata, model=model, copy=True, **options)


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_record_of_a_fit(rasterized, tmp_path):
    before = elements(rasterized)
    model = hadmst()
    assert fit(rasterized, model, prompt=f" {BREAST}\n") is model
    assert all(rasterized[key] is element for key, element in before.items())
    assert set(model.record) == {
        "sections", "n_bins", "map_key", "image_key", "low_res", "labels_key", "prompts", "version", "validation", "seed",
        "options", "history",
    }  # fmt: skip
    assert model.record["labels_key"] == "nuclei"
    assert list(model.record["prompts"]) == [BREAST]
    vector = np.asarray(model.record["prompts"][BREAST], np.float32)
    np.testing.assert_array_equal(vector, embed_text(BREAST, "hashed", 32))
    assert {"semantic", "alignment", "adversarial", "discriminator", "validation"} <= set(model.record["history"])
    restored = models.load(model.save(tmp_path))
    assert restored.record == model.record
    assert restored.weights_sha256() == model.weights_sha256()
    json.dumps(model.record)


def test_record_of_models_without_nuclei_and_prompt(rasterized):
    model = hadmst(segmentation=False, text_encoder="none")
    fit(rasterized, model, labels_key=None, prompt=None)
    assert not {"labels_key", "prompts"} & set(model.record)


def test_tiles_hold_nuclei_and_prompt(rasterized):
    model = hadmst()
    seen = seen_in_fit(model)
    fit(rasterized, model, validation=0.2)
    window = labels_window(rasterized, "nuclei", Grid.of_map(rasterized, "counts"), px_per_bin=2)
    for data in seen:
        for i in (0, len(data) - 1):
            _, y, x = data.corners[i]
            item = data[i]
            np.testing.assert_array_equal(item["s"], window(y, x, 16, 16))
            np.testing.assert_array_equal(item["text"], embed_text(BREAST, "hashed", 32))
            turned = data[i, 6]
            assert torch.equal(turned["text"], item["text"])
            assert torch.equal(torch.rot90(item["s"].flip(-1), 2, (-2, -1)), turned["s"])
    assert 0.05 < window(10, 10, 40, 40).mean() < 0.6


def test_nuclei_beyond_the_mask(section, caplog):
    """Where it does not reach there are none, and a warning says so in tl.fit, too."""
    replace_nuclei(section, np.asarray(section["nuclei"].data)[:, :300])
    matrix = Grid.of_map(section, "counts").to_element(section, "nuclei")
    end = int(np.ceil(2 * (300 - matrix[0, 2]) / matrix[0, 0]))  # in pixels that are read
    model = hadmst()
    seen = seen_in_fit(model)
    fit(section, model, validation=0)
    whole = seen[0].sections[0].labels(0, 0, 56, 56)
    assert 40 < end < 70
    assert whole[:, :, end - 10 : end].mean() > 0.05
    assert not whole[:, :, end:].any()
    assert "the labels 'nuclei' cover" in caplog.text


@pytest.mark.parametrize("kind", ["finer", "mirrored", "other system"])
def test_labels_of_another_shape_or_system(section, kind):
    """Two pixels for one, or the section seen from below: the same nuclei are found."""
    mask, systems = np.asarray(section["nuclei"].data), get_transformation(section["nuclei"], get_all=True)
    changed, moved = mask, systems
    if kind == "finer":
        changed = mask.repeat(2, 0).repeat(2, 1)
        half = Scale([0.5, 0.5], axes=("x", "y"))
        moved = {name: Chain([half, system]) for name, system in systems.items()}
    elif kind == "mirrored":
        changed = mask[:, ::-1]
        back = Affine([[-1, 0, mask.shape[1]], [0, 1, 0], [0, 0, 1]], ("x", "y"), ("x", "y"))
        moved = {name: Chain([back, system]) for name, system in systems.items()}
    else:  # to which the map is brought, too
        step = Translation([7, 9], axes=("x", "y"))
        moved = {"slide": Chain([systems["um"], step])}
        set_transformation(section["counts"], Chain([get_transformation(section["counts"], "um"), step]), "slide")
    section.labels["changed"] = Labels2DModel.parse(changed.copy(), dims=("y", "x"), transformations=moved)
    found = []
    for key in ("nuclei", "changed"):
        model = hadmst()
        seen = seen_in_fit(model)
        fit(section, model, labels_key=key, validation=0)
        found.append(seen[0].sections[0].labels(0, 0, 56, 56))
    np.testing.assert_array_equal(found[1], found[0])
    assert found[0].mean() > 0.05


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"labels_key": None}, ValueError, r"this HaDMST looks at the nuclei: pass labels_key=.*stgen\.pp\.segment_nuclei\(sdata\) makes one from the image; HaDMST\(\.\.\., segmentation=False\)"),
        ({}, {"labels_key": "nuclie"}, KeyError, r"There is no mask in sdata.labels 'nuclie'; found .*nuclei"),
        ({}, {"labels_key": "he"}, KeyError, "There is no mask in sdata.labels 'he'"),
        ({"segmentation": False}, {}, ValueError, "this HaDMST does not look at labels; leave `labels_key` out"),
        ({}, {"prompt": None}, ValueError, "`prompt` must say in a few words what the image shows, .*; found None"),
        ({}, {"prompt": "  "}, ValueError, "`prompt` must say in a few words what the image shows"),
        ({}, {"prompt": 3}, TypeError, "found 3"),
        ({}, {"prompt": "?"}, ValueError, "`prompt` holds no word of two letters or more"),
        ({"text_encoder": "none"}, {}, ValueError, "this HaDMST takes no text; leave `prompt` out"),
        ({"semantic": False}, {}, ValueError, "this HaDMST takes no text; leave `prompt` out"),
        ({"text_encoder": "none"}, {"prompt": {"section": BREAST}}, ValueError, "takes no text; leave `prompt` out"),
        ({}, {"prompt": {"section": BREAST, "other": BRAIN}}, ValueError, "`prompt` names data of 'other', which is none of the sections: 'section'"),
        ({}, {"prompt": {}}, ValueError, "`prompt` has no entry for 'section'"),
    ],
)  # fmt: skip
def test_bad_nuclei_and_prompts(rasterized, no_work, options, arguments, error, message):
    model, before = hadmst(**options), elements(rasterized)
    weights = model.weights_sha256()
    with pytest.raises(error, match=message):
        fit(rasterized, model, **arguments)
    assert (model.weights_sha256(), model.fitted) == (weights, False)
    assert elements(rasterized).keys() == before.keys()
    assert all(rasterized[key] is element for key, element in before.items())


@pytest.mark.parametrize("make", [C3Diff, RegressionUNet])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"labels_key": "nuclei"}, "does not look at labels"), ({"prompt": BREAST}, "takes no text")],
)
def test_models_that_have_no_use_for_them(rasterized, make, arguments, message):
    model = make(GENES, factor=5, px_per_bin=2)
    with pytest.raises(ValueError, match=f"this {make.__name__} {message}; leave"):
        tl.fit(model, rasterized, **KEYS, **QUICK, **arguments)
    assert not model.fitted


@pytest.mark.parametrize("where", ["apart", "elsewhere"])
def test_labels_that_are_elsewhere(section, no_work, where):
    if where == "apart":
        set_transformation(section["nuclei"], Translation([5000, 0], axes=("x", "y")), set_all=False, to_coordinate_system="um")  # fmt: skip
        message = "the labels 'nuclei' .* and the map do not overlap in the coordinate system 'um'"
    else:
        set_transformation(section["nuclei"], {"nowhere": Identity()}, set_all=True)
        message = "The grid and 'nuclei' share no coordinate system"
    model = hadmst()
    with pytest.raises(ValueError, match=message):
        fit(section, model)
    model = randomized(hadmst())
    model.record = {"sections": ["one"], "prompts": {BREAST: embed_text(BREAST, "hashed", 32).tolist()}}
    with pytest.raises(ValueError, match=message):
        superresolved(section, model)


def test_too_little_tissue_leaves_the_model_as_it_was(rasterized):
    """58 x 59 bins hold 8 locations of 20 x 20 bins, and the discriminator wants 30."""
    model = hadmst(factor=20).eval()
    weights = model.weights_sha256()
    with pytest.raises(
        ValueError, match=r"the graph of co-expressed genes needs at least 30 locations of 20 x 20 bins"
    ):
        fit(rasterized, model)
    assert (model.weights_sha256(), model.fitted, model.training) == (weights, False, False)


# ---- several sections -----------------------------------------------------------------------------------------------


def test_prompts_section_by_section(rasterized):
    model = hadmst()
    seen = seen_in_fit(model)
    sections = dict.fromkeys(["one", "two", "three"], rasterized)
    fit(sections, model, prompt={"one": BREAST, "two": f"{BRAIN} ", "three": BREAST})
    texts = [section.text for section in seen[0].sections]
    for text, prompt in zip(texts, (BREAST, BRAIN, BREAST), strict=True):
        np.testing.assert_array_equal(text, embed_text(prompt, "hashed", 32))
    assert list(model.record["prompts"]) == [BREAST, BRAIN]
    assert model.record["sections"] == ["one", "two", "three"]


def test_each_prompt_is_embedded_once(rasterized, monkeypatch):
    model, asked, embed = hadmst(), [], HaDMST.embed_prompt
    monkeypatch.setattr(HaDMST, "embed_prompt", lambda m, prompt: asked.append(prompt) or embed(m, prompt))
    seen_in_fit(model)
    fit(dict.fromkeys(["one", "two", "three"], rasterized), model, prompt=f"  {BREAST}")
    assert asked == [BREAST]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"one": BREAST}, "`prompt` has no entry for 'two'; each section needs one"),
        ({"one": BREAST, "tow": BRAIN}, "`prompt` names data of 'tow', which is none of the sections: 'one', 'two'"),
        ({"one": BREAST, "two": " "}, "`prompt` must say in a few words"),
    ],
)
def test_prompts_that_do_not_fit_the_sections(rasterized, no_work, prompt, message):
    model = hadmst()
    weights = model.weights_sha256()
    with pytest.raises(ValueError, match=message):
        fit({"one": rasterized, "two": rasterized}, model, prompt=prompt)
    assert (model.weights_sha256(), model.fitted) == (weights, False)


@pytest.mark.parametrize("named", [True, False])
def test_validation_sections_have_their_own_prompt(rasterized, named):
    model, name = hadmst(), "apart" if named else "validation"
    seen = seen_in_fit(model)
    validation = {name: rasterized} if named else rasterized
    fit({"one": rasterized}, model, validation=validation, prompt={"one": BREAST, name: BRAIN})
    for data, prompt in zip(seen, (BREAST, BRAIN), strict=True):
        np.testing.assert_array_equal(data.sections[0].text, embed_text(prompt, "hashed", 32))
        assert data.sections[0].labels is not None
    assert list(model.record["prompts"]) == [BREAST, BRAIN]
    assert model.record["validation"] == [name]


def test_validation_sections_need_nuclei_and_prompt(rasterized, no_work):
    bare = deepcopy(rasterized)
    del bare.labels["nuclei"]
    with pytest.raises(KeyError, match="mask in sdata.labels"):
        fit({"one": rasterized}, validation={"two": bare})
    with pytest.raises(ValueError, match="`prompt` has no entry for 'two'"):
        fit({"one": rasterized}, validation={"two": rasterized}, prompt={"one": BREAST})


# ---- superresolve ---------------------------------------------------------------------------------------------------


def test_prompt_of_the_fit_is_the_default(rasterized, told):
    """The same result as with the prompt said again, with spaces around it or without."""
    results = [superresolved(rasterized, told, prompt=prompt) for prompt in (None, BREAST, f"  {BREAST} ")]
    for result in results:
        entry = result.attrs["stgen"]["superresolved"]
        assert (entry["prompt"], entry["labels"]) == (BREAST, "nuclei")
        assert (entry["model"], entry["low_res"], entry["image"]) == ("HaDMST", "counts_5x", "he")
        assert entry["weights_sha256"] == told.weights_sha256()
        np.testing.assert_array_equal(values_of(result), values_of(results[0]))
    assert "superresolved" not in rasterized.images
    assert np.isfinite(values_of(results[0])).any()


def test_another_prompt_gives_another_result(rasterized, told, monkeypatch):
    asked, embed = [], HaDMST.embed_prompt
    monkeypatch.setattr(HaDMST, "embed_prompt", lambda m, prompt: asked.append(prompt) or embed(m, prompt))
    one, two = (superresolved(rasterized, told, prompt=prompt, consistency=False) for prompt in (None, BRAIN))
    assert asked == [BRAIN]  # that of the fit is in the record
    assert two.attrs["stgen"]["superresolved"]["prompt"] == BRAIN
    known = np.isfinite(values_of(one))
    assert np.abs(values_of(one) - values_of(two))[known].max() > 1e-3
    assert list(told.record["prompts"]) == [BREAST]


def test_vector_in_the_record_is_what_is_used(rasterized, told):
    """So that a saved model needs no encoder for the prompts that it was fitted with."""
    other = hadmst()
    other.load_state_dict(told.state_dict())
    other.record = {**told.record, "prompts": {"something": embed_text(BRAIN, "hashed", 32).tolist()}}
    one, two = superresolved(rasterized, other), superresolved(rasterized, told, prompt=BRAIN)
    assert one.attrs["stgen"]["superresolved"]["prompt"] == "something"
    np.testing.assert_array_equal(values_of(one), values_of(two))


def test_prompt_is_needed_when_there_were_several(rasterized, told, no_work):
    model = hadmst()
    model.record = {**told.record, "prompts": {p: embed_text(p, "hashed", 32).tolist() for p in (BREAST, BRAIN)}}
    message = (
        f"this HaDMST takes a prompt and was fitted with '{BREAST}', '{BRAIN}': pass prompt=<what the image shows>"
    )
    with pytest.raises(ValueError, match=message):
        superresolved(rasterized, model)


def test_one_of_several_prompts(rasterized, told):
    model = hadmst()
    model.load_state_dict(told.state_dict())
    model.record = {**told.record, "prompts": {p: embed_text(p, "hashed", 32).tolist() for p in (BREAST, BRAIN)}}
    one, two = superresolved(rasterized, model, prompt=BREAST), superresolved(rasterized, told)
    np.testing.assert_array_equal(values_of(one), values_of(two))


def test_nuclei_matter(section, told):
    before = superresolved(section, told, consistency=False)
    replace_nuclei(section, 0 * np.asarray(section["nuclei"].data))
    after = superresolved(section, told, consistency=False)
    known = np.isfinite(values_of(before))
    assert np.abs(values_of(before) - values_of(after))[known].max() > 1e-3


def test_from_histology_alone(rasterized, told):
    result = superresolved(rasterized, told, low_res=None)
    entry = result.attrs["stgen"]["superresolved"]
    assert (entry.get("low_res"), entry["consistency"], entry["labels"], entry["prompt"]) == (
        None,
        False,
        "nuclei",
        BREAST,
    )
    with_map = superresolved(rasterized, told, consistency=False)
    one, two = values_of(result), values_of(with_map)
    shape = min(one.shape[1], two.shape[1]), min(one.shape[2], two.shape[2])
    one, two = (values[:, : shape[0], : shape[1]] for values in (one, two))
    known = np.isfinite(one) & np.isfinite(two)
    assert known.mean() > 0.5
    assert np.abs(one - two)[known].max() > 1e-2


def test_model_without_nuclei_and_prompt(rasterized):
    model = fit(rasterized, hadmst(segmentation=False, text_encoder="none"), labels_key=None, prompt=None)
    result = superresolved(rasterized, model, labels_key=None)
    assert not {"labels", "prompt"} & set(result.attrs["stgen"]["superresolved"])


def test_result_does_not_depend_on_the_tile(rasterized, told):
    """Up to what a margin of 32 bins leaves; weights are those of an initial model, a little disturbed."""
    torch.manual_seed(0)
    model = hadmst()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.03 * torch.randn_like(p)
    model.record = told.record
    one, two = (values_of(superresolved(rasterized, model, tile=tile, low_res=None)) for tile in (64, 16))
    assert (np.isfinite(one) == np.isfinite(two)).all()
    assert np.nanmax(np.abs(one - two)) < 5e-3 * np.nanstd(one)


def test_saved_model_gives_the_same(rasterized, told, tmp_path):
    one, two = (superresolved(rasterized, model) for model in (told, told.save(tmp_path)))
    np.testing.assert_array_equal(values_of(one), values_of(two))


BAD = {
    "labels": ({"labels_key": None}, ValueError, "this HaDMST looks at the nuclei: pass labels_key="),
    "unknown labels": ({"labels_key": "cells2"}, KeyError, "There is no mask in sdata.labels 'cells2'"),
    "blank prompt": ({"prompt": " "}, ValueError, "`prompt` must say in a few words"),
    "no text": ({"prompt": {"section": BREAST}}, TypeError, "`prompt` must be text or None"),
    "no words": ({"prompt": "a b c"}, ValueError, "holds no word of two letters"),
    "labels as result": ({"key_added": "nuclei", "overwrite": True}, ValueError, "nuclei"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_of_superresolve(section, told, no_work, what):
    arguments, error, message = BAD[what]
    before, attrs = elements(section), json.dumps(section.attrs["stgen"], default=str)
    arguments = {"image_key": "he", "low_res": "counts_5x", "labels_key": "nuclei", **DRAW, **arguments}
    with pytest.raises(error, match=message):
        tl.superresolve(section, model=told, **arguments)
    assert elements(section).keys() == before.keys()
    assert all(section[key] is element for key, element in before.items())
    assert json.dumps(section.attrs["stgen"], default=str) == attrs


@pytest.mark.parametrize(("argument", "message"), [({"labels_key": "nuclei"}, "does not look at labels; leave `labels_key`"), ({"prompt": BREAST}, "takes no text; leave `prompt` out")])  # fmt: skip
def test_models_that_have_no_use_for_them_in_superresolve(rasterized, argument, message):
    plain, bare = RegressionUNet(GENES, factor=5, px_per_bin=2), hadmst(segmentation=False, text_encoder="none")
    for model in (plain, bare):
        model.record = {"sections": ["one"]}
        with pytest.raises(ValueError, match=f"this {type(model).__name__} {message}"):
            tl.superresolve(rasterized, model=model, low_res="counts_5x", image_key="he", **DRAW, **argument)
