"""Options of the families: written once, checked before anything is built, and kept in a configuration that does not change."""

from __future__ import annotations

import copy
import inspect
import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from tests.models.conftest import shapes_of

from stgen import models, train
from stgen.models import (
    C3Diff,
    DiffST,
    HaDMST,
    Interpolate,
    LinearProbe,
    PixelProbe,
    RegressionUNet,
    Retrieval,
    Stem,
    TrainingMean,
)

FAMILIES = {
    "C3Diff": (C3Diff, models.C3DiffOptions),
    "DiffST": (DiffST, models.DiffSTOptions),
    "HaDMST": (HaDMST, models.HaDMSTOptions),
    "Stem": (Stem, models.StemOptions),
}

# Configurations as they stand in folders that were saved before options were dataclasses.
SAVED = {
    "DiffST": {
        "genes": ["A", "B", "C"], "factor": 4, "bin_um": 40.0, "image_channels": 3, "px_per_bin": 2,
        "transform": "log1p_raw", "preset": "default", "modulation": True, "graph": True, "hierarchy": True,
        "disentangle": True, "curriculum": True, "alpha": 0.2, "disentangling_weight": 0.01, "learned_variance": True,
        "residual": True, "scale": "std", "prediction": "v", "width": 8, "region": 4, "reach": 1, "widths": [8, 8],
        "mean_widths": [8, 8], "blocks": 1, "attention": [],
    },
    "HaDMST": {
        "genes": ["A", "B", "C"], "factor": 4, "bin_um": 10.0, "image_channels": 3, "px_per_bin": 2,
        "transform": "log1p_raw", "preset": "default", "semantic": True, "segmentation": True, "text_dim": 16,
        "semantic_weight": 0.1, "euclidean_weight": 0.1, "info_nce_weight": 1.0, "adversarial_weight": 0.01,
        "p_missing": 0.3, "residual": True, "scale": "std", "prediction": "v", "width": 8, "semantic_width": 8,
        "token": 4, "window": 2, "layers": 2, "heads": 2, "region": 4, "widths": [8, 8, 8], "mean_widths": [8, 8],
        "blocks": 1, "attention": [], "gene_width": 4, "text_encoder": "hashed", "alignment_weight": 0.05,
    },
    "C3Diff": {
        "genes": ["A", "B", "C"], "factor": 4, "bin_um": 160.0, "image_channels": 3, "px_per_bin": 2,
        "transform": "log1p_raw", "preset": "paper", "gene_embedding": None, "p_missing": 0.5, "p_unconditional": 0.1,
        "guidance": 2.0, "augmentation": True, "sigma": 0.03, "imputation": "similarity", "residual": False,
        "scale": "map", "prediction": "epsilon", "width": 8, "code": 8, "widths": [8, 8], "control_widths": [8, 8],
        "blocks": 2, "attention": [1, 2, 3], "patch": 4, "control_patch": 4, "genes_per_tile": 1, "modal_weight": 0.05,
        "content_weight": 0.05, "inter_sphere_weight": 0.03,
    },
    "Stem": {
        "genes": ["A", "B", "C"], "embedding_dim": 5, "preset": "paper", "learned_variance": True, "width": 16,
        "depth": 2, "heads": 2, "mlp_ratio": 4, "genes_per_token": 1, "image_hidden": None, "image_dropout": 0.0,
        "mean": "none", "standardize": False, "transform": "log2p1_raw", "prediction": "epsilon", "activation": "gelu",
    },
}  # fmt: skip
SHAPES = {  # some of the weights that such a folder holds
    "DiffST": {"graph.weight.weight": (1, 1, 3, 3), "cells.nothing.weight": (16, 1), "unet.leave.weight": (6, 8, 3, 3)},
    "HaDMST": {"null": (3, 1, 1), "single.gene": (3, 8), "semantic.text.0.weight": (8, 16), "alignment.of_h.weight": (128, 8)},
    "C3Diff": {"codes.embedding.weight": (3, 8), "log_tau": (), "inject.1.weight.weight": (8, 8)},
    "Stem": {"gene_type": (3, 16), "image.0.weight": (5, 5), "blocks.1.qkv.weight": (48, 16), "final.weight": (2, 16)},
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_configurations_of_before_make_the_same_model(name):
    model = FAMILIES[name][0](**SAVED[name])
    assert model.config == SAVED[name]
    assert json.loads(json.dumps(model.config)) == SAVED[name]
    found = shapes_of(model)
    assert {key: found[key] for key in SHAPES[name]} == SHAPES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_option_is_documented_where_it_is_written(name):
    """A text below the field, in the class itself or in the one that all families of maps have in common."""
    written = {}
    for cls in FAMILIES[name][1].__mro__[:-2]:
        lines = inspect.getsource(cls).splitlines()
        for line, below in zip(lines, lines[1:], strict=False):
            field = line.strip().split(":")[0]
            if ": " in line and line.startswith("    ") and field.isidentifier():
                written.setdefault(field, below.strip().startswith('"""'))
    assert [f.name for f in fields(FAMILIES[name][1]) if not written.get(f.name)] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_default_values_are_those_of_the_first_preset(name):
    cls, options = FAMILIES[name]
    first, *others = cls.presets.values()
    assert first.options == options()
    assert all(preset.options != options() for preset in others)
    assert inspect.signature(cls).parameters["preset"].default == next(iter(cls.presets))


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_train_with_options_that_exist(name):
    known = inspect.signature(train.fit).parameters
    for preset in FAMILIES[name][0].presets.values():
        assert set(preset.training) <= set(known)
        assert {"steps", "batch_size", "lr", "ema_decay"} <= set(preset.training)


@pytest.mark.parametrize("cls", [cls for cls, _ in FAMILIES.values()])
def test_constructors_are_short(cls):
    assert len(inspect.signature(cls).parameters) <= 14


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_options_are_refused_with_those_that_there_are(name):
    cls, options = FAMILIES[name]
    known = ", ".join(sorted(f.name for f in fields(options)))
    with pytest.raises(
        TypeError, match=f"{name} takes no option 'widht'. Did you mean 'width'. Its options are {known}"
    ):
        cls(["A", "B"], widht=8)


@pytest.mark.parametrize("name", FAMILIES)
def test_options_do_not_change(name):
    with pytest.raises(FrozenInstanceError):
        FAMILIES[name][1]().width = 8


def test_nothing_given_is_the_preset():
    given = Stem(["A"], width=None, mean=None, transform=None)
    assert given.config == Stem(["A"]).config


# ---- impossible values ----------------------------------------------------------------------------------------------

COUNTS = {
    "C3Diff": ["width", "code", "blocks", "patch", "control_patch", "genes_per_tile"],
    "DiffST": ["width", "blocks", "region"],
    "HaDMST": ["width", "blocks", "semantic_width", "token", "window", "layers", "heads", "region", "text_dim"],
    "Stem": ["width", "depth", "heads", "mlp_ratio", "genes_per_token", "image_hidden"],
}
LISTS = {
    "C3Diff": ["widths", "control_widths"], "DiffST": ["widths", "mean_widths"], "HaDMST": ["widths", "mean_widths"],
}  # fmt: skip
NUMBERS = {
    "C3Diff": ["p_missing", "p_unconditional", "guidance", "sigma", "modal_weight", "content_weight", "inter_sphere_weight"],
    "DiffST": ["alpha", "disentangling_weight"],
    "HaDMST": ["semantic_weight", "alignment_weight", "euclidean_weight", "info_nce_weight", "adversarial_weight", "p_missing"],
    "Stem": ["image_dropout"],
}  # fmt: skip
BAD = [
    *((name, option, value) for name in COUNTS for option in COUNTS[name] for value in (0, -1, 2.5, "x", True, math.nan)),
    *((name, option, value) for name in LISTS for option in LISTS[name] for value in ([], [0], [8, -1], [8.5], "88", 8)),
    *((name, option, value) for name in NUMBERS for option in NUMBERS[name] for value in (-0.1, math.nan, math.inf, "x", True)),
    *((name, f.name, 1) for name, (_, options) in FAMILIES.items() for f in fields(options) if f.type == "bool"),
    *((name, f.name, "x") for name, (_, options) in FAMILIES.items() for f in fields(options) if "Literal" in str(f.type)),
    ("C3Diff", "attention", [-1]), ("DiffST", "attention", [0.5]), ("HaDMST", "attention", 1), ("DiffST", "reach", -1),
    ("HaDMST", "gene_width", -1), ("HaDMST", "text_encoder", 3), ("HaDMST", "text_encoder", " "),
    ("C3Diff", "imputation", "x"), ("DiffST", "scale", 1),
]  # fmt: skip


@pytest.fixture
def nothing_is_built(monkeypatch):
    """No layer may be made on the way to the error."""
    monkeypatch.setattr(torch.nn.Conv2d, "__init__", lambda *_, **__: pytest.fail("a layer was built"))
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *_, **__: pytest.fail("a layer was built"))


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_impossible_values_are_refused_before_anything_is_built(name, option, value, nothing_is_built):
    with pytest.raises((ValueError, TypeError), match=rf"`{option}(\[\d\])?` must .*found"):
        FAMILIES[name][0](["A", "B"], **{option: value})


BASELINES = {
    TrainingMean: {"embedding_dim": 3}, LinearProbe: {"embedding_dim": 3}, Retrieval: {"embedding_dim": 3}, Stem: {},
    Interpolate: {}, PixelProbe: {}, RegressionUNet: {}, DiffST: {}, C3Diff: {}, HaDMST: {},
}  # fmt: skip
BAD_OF_ALL = [
    *((cls, "genes", value) for cls in BASELINES for value in ("AB", [1, 2], [None], [""], 3)),
    *((cls, "transform", value) for cls in BASELINES for value in ("log", 3)),
    *((cls, "embedding_dim", value) for cls in (TrainingMean, LinearProbe, Retrieval, Stem) for value in (0, -5, 2.5, "x", True)),
    *((cls, option, value) for cls in (Interpolate, PixelProbe, RegressionUNet, DiffST, C3Diff, HaDMST)
      for option in ("factor", "image_channels", "px_per_bin") for value in (0, -1, 2.5, "x", True)),
    *((cls, "bin_um", value) for cls in (Interpolate, PixelProbe, RegressionUNet, DiffST, C3Diff, HaDMST)
      for value in (0, -1.0, math.nan, "x", True)),
    *((LinearProbe, "penalties", value) for value in ([], [math.nan], [-1.0], ["x"], 3)),
    *((cls, "clamp", value) for cls in (LinearProbe, Retrieval) for value in (0, -1.0, math.nan, "x")),
    *((Retrieval, "k", value) for value in (0, -1, 1.5, True)),
    *((PixelProbe, "blurs", value) for value in ([0], [-1.0], [math.nan], "x", 2.0)),
    *((PixelProbe, "n_bins", value) for value in (0, 2.5)),
    *((RegressionUNet, "widths", value) for value in ([], [0], [8, 2.5], 8)),
    *((RegressionUNet, "use_low_res", value) for value in (1, "yes")),
    *((Interpolate, "kernel", value) for value in ("sinc", 3)),
    *((C3Diff, "gene_embedding", value) for value in (0, 2.5, "x")),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "argument", "value"), BAD_OF_ALL)
def test_impossible_arguments_of_all_models(cls, argument, value, nothing_is_built):
    arguments = {"genes": ["A", "B"], **BASELINES[cls], argument: value}
    with pytest.raises((ValueError, TypeError), match=rf"`{argument}(\[\d\])?` must .*found|unknown transform"):
        cls(**arguments)


@pytest.mark.parametrize("name", ["Stem", "DiffST"])
def test_preset_must_exist(name):
    for value in ("large", 3, None):
        with pytest.raises(ValueError, match="`preset` must be one of .*found"):
            FAMILIES[name][0](["A"], preset=value)


# ---- the configuration ----------------------------------------------------------------------------------------------


def test_configuration_is_what_was_given_and_does_not_change():
    genes = ["A", "B"]
    model = Stem(genes, embedding_dim=5, width=16)
    genes.append("C")
    assert model.genes == ["A", "B"]
    model.genes.append("C")
    assert model.genes == model.config["genes"] == ["A", "B"]
    for change in (
        lambda c: c.update(width=8), lambda c: c.__setitem__("width", 8), lambda c: c.pop("width"), lambda c: c.clear(),
        lambda c: c.__delitem__("width"), lambda c: c.setdefault("more", 1), lambda c: c.__ior__({"width": 8}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="a model's config is what it was constructed with and does not change"):
            change(model.config)
    assert model.config["width"] == 16
    assert (model.config | {"width": 8})["width"] == 8
    assert copy.deepcopy(model).config == model.config


def test_guidance_is_saved_with_the_model_beside_its_configuration(tmp_path):
    small = {"width": 8, "code": 8, "widths": [8, 8], "control_widths": [8, 8]}
    model = C3Diff(["A", "B"], **small)
    model.record = {"sections": ["one"]}
    model.guidance = 3.0
    restored = models.load(model.save(tmp_path))
    assert restored.config == model.config == C3Diff(["A", "B"], **small).config
    assert (restored.guidance, restored.config["guidance"]) == (3.0, 1.0)
    content = json.loads((tmp_path / "config.json").read_text())
    content = {name: content[name] for name in ("class", "config", "record")}  # as folders were written before
    content["config"]["guidance"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert models.load(tmp_path).guidance == 2.0


@pytest.mark.parametrize("cls", [TrainingMean, LinearProbe, Retrieval])
def test_baselines_take_every_argument_of_sample(cls, spots):
    model = cls(["A", "B", "C", "D"], embedding_dim=5)
    model.fit(spots)
    batch = {"h": spots.h[:3, 0]}
    plain = model.sample(batch, 2)
    assert torch.equal(model.sample(batch, 2, noise=lambda: pytest.fail("noise was drawn")), plain)
    assert torch.equal(model.sample(batch, 2, project=lambda x: x + 1), plain + 1)
