from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stgen.train
from stgen import models
from stgen.data import SpotData, StepSampler
from stgen.models import Stem
from stgen.train import check_device, fit

SCRIPT = Path(__file__).with_name("training_runs.py")
spec = importlib.util.spec_from_file_location("training_runs", SCRIPT)
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
OPTIONS = runs.OPTIONS


def small(**options):
    """A model without probe and scales, so that ``fit`` alone decides its weights."""
    torch.manual_seed(0)
    return Stem(
        ["A", "B", "C", "D"], embedding_dim=5, transform="none", width=16, depth=1, heads=2, mlp_ratio=2,
        image_hidden=8, genes_per_token=2, **{"mean": "none", "standardize": False, **options},
    )  # fmt: skip


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture(scope="module")
def uninterrupted():
    """Weights and history of the run that nothing disturbs."""
    model = runs.model()
    history = model.fit(*runs.data(), **OPTIONS)
    return weights(model), history


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """Folders of the runs that killed themselves, and how they ended."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


# ---- killed and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("death", "step"),
    [
        ("dies_between_checkpoints", 12),
        ("dies_after_a_checkpoint", 12),
        ("dies_while_writing_weights", 8),
        ("dies_in_the_first_checkpoint", None),
        ("dies_between_the_two_renames", 8),
        ("dies_before_clearing_away", 12),
    ],
)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(death, step, died, uninterrupted, caplog):
    folder, outcomes, log = died
    assert outcomes[death] == -9, log
    model = runs.model()
    with torch.no_grad():  # the checkpoint decides, not the weights that the new process happens to start with
        for parameter in model.parameters():
            parameter += step is not None
    with caplog.at_level(logging.INFO, "stgen"):
        history = model.fit(*runs.data(), checkpoint=folder / death, **OPTIONS)
    resumed = [r.getMessage() for r in caplog.records if "continuing" in r.getMessage()]
    assert resumed == ([] if step is None else [f"continuing from step {step} in {folder / death}."])
    assert_same(weights(model), uninterrupted[0])
    assert history == uninterrupted[1]
    left = sorted(path.name for path in folder.glob(f"{death}*"))
    assert left == [death]


def test_two_processes_train_one_model(died):
    folder, outcomes, log = died
    assert outcomes["distributed"] == [0, 0], log
    folder = folder / "distributed"
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    assert_same(first, second)
    histories = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert histories[0]["step"] == [4, 8]
    assert histories[0]["validation"] == histories[1]["validation"]
    assert histories[0]["mse"] != histories[1]["mse"]  # each saw its own part of the batches
    assert json.loads((folder / "checkpoint" / "state.json").read_text())["step"] == 8


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_each_batch(world):
    sampler = StepSampler(11, 8, batch_size=6, start=2, stop=9, seed=0)
    shards = [list(stgen.train._Shard(sampler, rank, world)) for rank in range(world)]
    for step, batch in enumerate(sampler):
        parts = [shard[step] for shard in shards]
        assert sorted(sum(parts, [])) == sorted(batch)
        assert {len(part) for part in parts} == {6 // world}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_finished_run_is_taken_from_its_checkpoint(tmp_path, monkeypatch, uninterrupted):
    runs.model().fit(*runs.data(), checkpoint=tmp_path / "run", **OPTIONS)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["state.json", "state.safetensors"]
    monkeypatch.setattr(stgen.train._State, "update", lambda *_: pytest.fail("trained again"))
    model = runs.model()
    history = model.fit(*runs.data(), checkpoint=tmp_path / "run", **OPTIONS)
    assert_same(weights(model), uninterrupted[0])
    assert history == uninterrupted[1]


def test_more_steps_continue_a_finished_run(tmp_path, uninterrupted):
    """Without early stopping, half a run and the other half are the whole."""
    runs.model().fit(*runs.data(), checkpoint=tmp_path / "run", **{**OPTIONS, "steps": 12})
    model = runs.model()
    model.fit(*runs.data(), checkpoint=tmp_path / "run", **OPTIONS)
    assert_same(weights(model), uninterrupted[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"lr": 0.5, "batch_size": 5}, "batch_size, lr"),
        ({"max_grad_norm": None}, "max_grad_norm"),
        ({"evaluate_every": 2}, "evaluate_every"),
    ],
)
def test_checkpoint_of_a_run_with_other_options(tmp_path, changes, named):
    train = runs.data()[0]
    fit(small(), train, checkpoint=tmp_path / "run", **{**OPTIONS, "steps": 4})
    before = (tmp_path / "run" / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"belongs to another run \(different: {named}\)\. Name another folder"):
        fit(small(), train, checkpoint=tmp_path / "run", **{**OPTIONS, **changes})
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == before


def test_checkpoint_of_another_model_or_other_data(tmp_path):
    train, validation = runs.data()
    options = {**OPTIONS, "steps": 4, "checkpoint": tmp_path / "run"}
    fit(small(), train, **options)
    with pytest.raises(ValueError, match=r"different: config\)"):
        fit(small(learned_variance=True), train, **options)
    with pytest.raises(ValueError, match=r"different: validation_rows\)"):
        fit(small(), train, validation, **options)
    with pytest.raises(ValueError, match=r"different: data\)"):  # as many rows, but not these
        fit(small(), SpotData(train.x * 1.1, train.h), **options)


def test_checkpoint_never_replaces_other_files(tmp_path):
    """A checkpoint is replaced as a whole: a folder with anything else in it is refused before any work."""
    train = runs.data()[0]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that are no checkpoint \(thesis.txt\)"):
        fit(small(), train, checkpoint=tmp_path, **OPTIONS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    fit(small(), train, checkpoint=empty, **{**OPTIONS, "steps": 4})
    (empty / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(model.safetensors\)"):
        fit(small(), train, checkpoint=empty, **OPTIONS)


def test_checkpoint_does_not_change_the_run(tmp_path, uninterrupted):
    model = runs.model()
    model.fit(*runs.data(), checkpoint=str(tmp_path / "deep" / "run"), **OPTIONS)
    assert_same(weights(model), uninterrupted[0])


# ---- interruption ---------------------------------------------------------------------------------------------------


def interrupt_at(model, step):
    """Make the loss of that (0-based) training step raise what Ctrl-C raises."""
    count = 0
    loss = model.loss

    def wrapped(batch):
        nonlocal count
        if model.training:
            if count == step:
                raise KeyboardInterrupt
            count += 1
        return loss(batch)

    model.loss = wrapped
    return model


def test_interrupted_run_continues(tmp_path, caplog, uninterrupted):
    model = interrupt_at(runs.model(), 10)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*runs.data(), checkpoint=tmp_path / "run", **OPTIONS)
    assert f"the same call continues from the last checkpoint in {tmp_path / 'run'}" in caplog.text
    assert not model.training
    del model.loss
    history = model.fit(*runs.data(), checkpoint=tmp_path / "run", **OPTIONS)  # the same object, as in a notebook
    assert_same(weights(model), uninterrupted[0])
    assert history == uninterrupted[1]


def test_interrupted_run_without_checkpoint(caplog):
    model = interrupt_at(small(), 2)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(model, runs.data()[0], **OPTIONS)
    assert caplog.text == ""
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


# ---- randomness -----------------------------------------------------------------------------------------------------


def test_seed_decides(uninterrupted):
    torch.manual_seed(12345)
    np.random.seed(1)  # noqa: NPY002
    again, other = runs.model(), runs.model()
    torch.manual_seed(999)
    history = again.fit(*runs.data(), **OPTIONS)
    assert_same(weights(again), uninterrupted[0])
    assert history == uninterrupted[1]
    other.fit(*runs.data(), **{**OPTIONS, "seed": 4})
    assert not torch.equal(other.gene_type, again.gene_type)


def test_initial_weights_come_from_the_seed_until_a_model_is_fitted(uninterrupted):
    fresh, fitted = runs.model(), runs.model()
    with torch.no_grad():
        for model in (fresh, fitted):
            model.gene_type += 1
    fitted.record, before = {"note": "fitted before"}, fitted.gene_type.detach().clone()
    fresh.fit(*runs.data(), **OPTIONS)
    fitted.fit(*runs.data(), **OPTIONS, lr=0.0)
    assert_same(weights(fresh), uninterrupted[0])
    assert torch.equal(fitted.gene_type, before)


def test_global_random_states_are_left_alone():
    model, data = runs.model(), runs.data()
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    model.fit(*data, **{**OPTIONS, "steps": 5})
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_dropout_is_on_in_training_only(monkeypatch):
    """The runs above resume exactly although dropout is drawn in each step; here, that it really is drawn."""
    modes = []
    denoise = Stem.denoise
    monkeypatch.setattr(Stem, "denoise", lambda self, *a: modes.append(self.training) or denoise(self, *a))
    model = runs.model()
    model.fit(*runs.data(), **{**OPTIONS, "steps": 4})
    assert modes[:4] == [True] * 4
    assert set(modes[4:]) == {False}
    assert model.image_dropout.p == 0.5
    assert not model.training


def test_workers_prepare_the_same_batches(uninterrupted):
    model = runs.model()
    model.fit(*runs.data(), **OPTIONS, num_workers=1)
    assert_same(weights(model), uninterrupted[0])


# ---- validation -----------------------------------------------------------------------------------------------------


def scripted(monkeypatch, losses):
    losses = iter(losses)
    monkeypatch.setattr(stgen.train._State, "validation_loss", lambda *_: next(losses))


def test_early_stopping_returns_the_best_weights(monkeypatch):
    train, validation = runs.data()
    scripted(monkeypatch, [3.0, 1.0, 2.0, 1.5, 0.1])
    stopped = small()
    history = fit(stopped, train, validation, patience=2, **OPTIONS)
    assert history["step"] == [4, 8, 12, 16]
    assert history["validation"] == [3.0, 1.0, 2.0, 1.5]
    best = small()
    fit(best, train, **{**OPTIONS, "steps": 8})
    assert_same(weights(stopped), weights(best))


def test_best_weights_without_early_stopping(monkeypatch):
    train, validation = runs.data()
    scripted(monkeypatch, [3.0, 1.0, 2.0, 1.5, 4.0, 5.0])
    model, best = small(), small()
    history = fit(model, train, validation, **OPTIONS, patience=None)
    assert len(history["validation"]) == 6
    fit(best, train, **{**OPTIONS, "steps": 8})
    assert_same(weights(model), weights(best))


def test_stopped_run_stays_stopped(monkeypatch, tmp_path):
    train, validation = runs.data()
    scripted(monkeypatch, [1.0, 2.0])
    options = {**OPTIONS, "patience": 1, "checkpoint": tmp_path / "run"}
    one, two = small(), small()
    history = fit(one, train, validation, **options)
    assert history["step"] == [4, 8]
    assert fit(two, train, validation, **options) == history
    assert_same(weights(one), weights(two))


def test_patience_outlives_the_process(monkeypatch, tmp_path):
    """One evaluation without improvement before the restart and one after it make two."""
    train, validation = runs.data()
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    options = {**OPTIONS, "patience": 2, "checkpoint": tmp_path / "run"}
    fit(small(), train, validation, **{**options, "steps": 8})
    assert fit(small(), train, validation, **options)["validation"] == [1.0, 2.0, 3.0]


def test_validation_is_the_same_question_each_time():
    """The same noise in every evaluation: a model that does not learn scores the same each time."""
    train, validation = runs.data()
    history = fit(small(), train, validation, **OPTIONS, lr=0.0, patience=None)
    assert len(set(history["validation"])) == 1
    assert len(set(history["mse"])) > 1


def test_validation_counts_every_item_once():
    """A last batch that is smaller weighs less."""
    train, validation = runs.data()

    def mean_of_x(batch):
        return {"loss": batch["x"].mean() + 0 * model.gene_type.sum()}

    model = small()
    model.loss = mean_of_x
    history = fit(model, train, validation, **{**OPTIONS, "steps": 4})
    assert history["validation"] == [pytest.approx(float(validation.x.mean()), abs=1e-5)]


def test_history_holds_every_loss():
    train, validation = runs.data()
    history = fit(small(learned_variance=True), train, validation, **{**OPTIONS, "steps": 6})
    assert set(history) == {"step", "loss", "mse", "vlb", "validation"}
    assert history["step"] == [4, 6]
    np.testing.assert_allclose(np.add(history["mse"], history["vlb"]), history["loss"], rtol=1e-4)
    json.dumps(history)


# ---- the steps ------------------------------------------------------------------------------------------------------


def test_weights_are_the_moving_average(monkeypatch):
    """With the documented warm-up, recomputed from the weights after each step."""
    seen = []
    update = stgen.train._State.update

    def recording(state, *args):
        update(state, *args)
        seen.append([p.detach().clone() for p in state.parameters])

    monkeypatch.setattr(stgen.train._State, "update", recording)
    model = small()
    fit(model, runs.data()[0], **{**OPTIONS, "steps": 12, "ema_decay": 0.4})
    average = seen[0]
    for n, now in enumerate(seen[1:], 1):
        decay = min(0.4, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * b for a, b in zip(average, now, strict=True)]
    for expected, found in zip(average, model.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [1e-3, None])
def test_gradients_are_clipped(monkeypatch, max_grad_norm):
    norms = []
    step = torch.optim.AdamW.step

    def recording(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    fit(small(), runs.data()[0], **{**OPTIONS, "steps": 4, "max_grad_norm": max_grad_norm})
    assert len(norms) == 4
    if max_grad_norm:
        assert norms == [pytest.approx(1e-3, rel=1e-3)] * 4
    else:
        assert min(norms) > 0.01


def test_mixed_precision_leaves_a_plain_model():
    train = runs.data()[0]
    model, full = small(), small()
    fit(full, train, **{**OPTIONS, "steps": 4})
    fit(model, train, **{**OPTIONS, "steps": 4}, precision="bf16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model)
    assert torch.equal(copy.deepcopy(model).gene_type, model.gene_type)
    torch.testing.assert_close(model.gene_type, full.gene_type, atol=0.01, rtol=0)
    assert not torch.equal(model.gene_type, full.gene_type)
    again = small()  # one precision does not leak into the next run
    fit(again, train, **{**OPTIONS, "steps": 4})
    assert_same(weights(again), weights(full))


def test_progress_bar(capsys):
    train, validation = runs.data()
    fit(small(), train, validation, **{**OPTIONS, "progress": True})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fit Stem" in shown.err
    assert "24/24" in shown.err
    assert "validation=" in shown.err
    fit(small(), train, **OPTIONS)
    assert capsys.readouterr() == ("", "")


# ---- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu0"])
def test_unknown_device(device, tmp_path):
    model = runs.model()
    before = weights(model)
    with pytest.raises(ValueError, match=rf"unknown or absent device '{device}'; this machine has cpu"):
        model.fit(*runs.data(), device=device, checkpoint=tmp_path / "run", **OPTIONS)
    with pytest.raises(ValueError, match="unknown or absent"):
        fit(model, runs.data()[0], device=device, **OPTIONS)
    assert_same(weights(model), before)
    assert not (tmp_path / "run").exists()


def test_device_of_choice():
    assert check_device("cpu") == torch.device("cpu")
    assert check_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


# ---- learning -------------------------------------------------------------------------------------------------------


def conditional_gaussian(n, seed):
    """Two kinds of histology; expression is Gaussian about a mean that depends on the kind."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=n)
    mean = np.array([[0.0, 4.0], [3.0, 1.0]])
    return SpotData(mean[kind] + 0.5 * rng.normal(size=(n, 2)), 2.0 * kind[:, None] - 1), mean


@pytest.mark.parametrize(("mean", "prediction"), [("none", "v"), ("probe", "x_0")])
def test_learns_a_conditional_distribution(mean, prediction):
    data, truth = conditional_gaussian(512, 0)
    torch.manual_seed(0)
    model = Stem(
        ["A", "B"], embedding_dim=1, transform="none", width=32, depth=1, heads=2, mlp_ratio=2, image_hidden=16,
        image_dropout=0.0, genes_per_token=1, mean=mean, prediction=prediction, standardize=True,
    )  # fmt: skip
    history = model.fit(
        data, conditional_gaussian(64, 1)[0], steps=300, batch_size=48, lr=4e-3, ema_decay=0.98, progress=False,
        patience=None,
    )  # fmt: skip
    assert history["validation"][-1] < history["mse"][0]
    for kind in range(2):
        batch = {"h": torch.full((200, 1), 2.0 * kind - 1)}
        x = model.sample(batch, 4, 15, [torch.Generator().manual_seed(i) for i in range(200)])
        np.testing.assert_allclose(x.mean((0, 1)), truth[kind], atol=0.2)
        np.testing.assert_allclose(x.flatten(0, 1).std(0), 0.5, rtol=0.3)


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", [torch.device("cuda:1")])])
def test_a_gpu_is_made_current_only_where_it_is_numbered(monkeypatch, device, chosen):
    """torch.cuda.set_device refuses a device without an index, which is what "cuda" and the default are."""
    import accelerate

    from stgen import train

    made_current = []
    monkeypatch.setattr(train, "check_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(accelerate, "Accelerator", dict)
    assert train._accelerator(device, None) == {"cpu": False, "mixed_precision": "bf16"}
    assert made_current == chosen


# ---- what cannot work, and what diverges ----------------------------------------------------------------------------

NAN = float("nan")
IMPOSSIBLE = [
    {"steps": 0}, {"steps": -1}, {"steps": 2.0}, {"batch_size": 0}, {"batch_size": True}, {"lr": NAN}, {"lr": float("inf")},
    {"lr": -1.0}, {"lr": "0.1"}, {"weight_decay": NAN}, {"ema_decay": NAN}, {"ema_decay": 2.0}, {"ema_decay": -1.0},
    {"max_grad_norm": -1.0}, {"max_grad_norm": NAN}, {"evaluate_every": 0}, {"evaluate_every": 1.5}, {"patience": -1},
    {"num_workers": -1}, {"num_workers": 10**6}, {"precision": "bf8"}, {"seed": -1}, {"progress": "no"}, {"checkpoint": ""},
    {"checkpoint": 3}, {"stepz": 4},
]  # fmt: skip


@pytest.mark.parametrize("wrong", IMPOSSIBLE, ids=str)
def test_options_that_cannot_work_are_refused_before_any_work(wrong):
    model = runs.model()
    before = weights(model)
    (name,) = wrong
    with pytest.raises((ValueError, TypeError), match=name):
        model.fit(*runs.data(), **{**OPTIONS, **wrong})
    assert_same(weights(model), before)
    assert model.training


@pytest.mark.parametrize("baseline", [models.TrainingMean, models.LinearProbe, models.Retrieval])
def test_a_fit_without_steps_refuses_options_of_one_with_steps(baseline):
    model = baseline(["A", "B", "C"], embedding_dim=runs.data()[0].h.shape[-1])
    before = weights(model)
    with pytest.raises(TypeError, match=rf"the fit of {baseline.__name__} takes no option 'steps'\. Its options are"):
        model.fit(runs.data()[0], steps=4)
    assert_same(weights(model), before)


def nan_from(model, step):
    """Make the training loss NaN from that step on, counted from 1."""
    count, loss = 0, model.loss

    def wrapped(batch):
        nonlocal count
        count += model.training
        return {k: v * NAN if model.training and count >= step else v for k, v in loss(batch).items()}

    model.loss = wrapped
    return model


def test_diverged_training_says_where_and_keeps_the_last_good_weights(tmp_path):
    until = runs.model()
    until.fit(*runs.data(), **{**OPTIONS, "steps": 8})
    model = nan_from(runs.model(), 11)
    with pytest.raises(
        ValueError, match=r"diverged: the loss is nan in step 11\. Lower lr .* last good state is in .*run"
    ):
        model.fit(*runs.data(), checkpoint=tmp_path / "run", **OPTIONS)
    assert not model.fitted
    assert not model.training
    assert_same(weights(model), weights(until))
    assert json.loads((tmp_path / "run" / "state.json").read_text())["step"] == 8


def test_training_that_diverges_at_once_ends_with_finite_weights():
    model = runs.model()
    with pytest.raises(ValueError, match=r"diverged: the loss is (inf|nan) in step [23]\."):
        model.fit(*runs.data(), **{**OPTIONS, "lr": 1e30})
    assert all(bool(torch.isfinite(value).all()) for value in weights(model).values())


def test_weights_that_are_no_numbers_give_no_samples():
    model = runs.model()
    model.fit(*runs.data(), **{**OPTIONS, "steps": 4})
    with torch.no_grad():
        next(model.parameters()).fill_(NAN)
    with pytest.raises(ValueError, match=r"this Stem gives values that are NaN or infinite, and its weights are, too"):
        model.sample({"h": runs.data()[0].h[:2, 0]}, steps=2)


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def other_step(folder):
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


def other_byte(folder):
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "json cut off": ("state.json", lambda f: (f / "state.json").write_text('{"step": 4')),
    "json of another kind": ("state.json", lambda f: (f / "state.json").write_text("[1]")),
    "json empty of all": ("state.json", lambda f: (f / "state.json").write_text("{}")),
    "no json": ("state.json", lambda f: (f / "state.json").unlink()),
    "another number": ("state.json", other_step),
    "tensors cut off": ("state.safetensors", lambda f: os.truncate(f / "state.safetensors", 100)),
    "no tensors": ("state.safetensors", lambda f: (f / "state.safetensors").unlink()),
    "another bit": ("state.safetensors", other_byte),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(tmp_path, damage):
    train, folder = runs.data()[0], tmp_path / "run"
    options = {**OPTIONS, "steps": 4, "checkpoint": folder}
    fit(small(), train, **options)
    name, change = DAMAGE[damage]
    change(folder)
    model = small()
    before, content = weights(model), {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=rf"run/{name} is damaged .* Delete the folder .*run to start anew"):
        fit(model, train, **options)
    assert_same(weights(model), before)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_leftovers_of_a_killed_checkpoint_are_cleared_and_nothing_else(tmp_path):
    train, options = runs.data()[0], {**OPTIONS, "steps": 4, "checkpoint": tmp_path / "run"}
    fit(small(), train, **options)
    for end in ("new", "old"):
        shutil.copytree(tmp_path / "run", tmp_path / f"run.{end}")
    fit(small(), train, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "run.new").mkdir()
    (tmp_path / "run.new" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"run.new holds files that are no checkpoint \(thesis.txt\)"):
        fit(small(), train, **options)
    assert (tmp_path / "run.new" / "thesis.txt").exists()


def test_fewer_steps_than_the_checkpoint_has(tmp_path):
    train, options = runs.data()[0], {**OPTIONS, "checkpoint": tmp_path / "run"}
    fit(small(), train, **{**options, "steps": 8})
    with pytest.raises(ValueError, match=r"is at step 8, beyond steps=4"):
        fit(small(), train, **{**options, "steps": 4})
