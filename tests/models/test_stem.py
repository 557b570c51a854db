from __future__ import annotations

import numpy as np
import pytest
import torch

from stgen.data import SpotData
from stgen.models import LinearProbe, Stem
from stgen.models._layers import timestep_embedding

GENES = ["A", "B", "C", "D"]
SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "image_hidden": 8, "genes_per_token": 1}


def stem(genes=GENES, *, seed=0, random=True, **options):
    """A small Stem without a probe, its weights at random instead of at their start, where the output is zero."""
    options = {"embedding_dim": 5, "transform": "none", "mean": "none", "image_dropout": 0.0, **SMALL, **options}
    torch.manual_seed(seed)
    model = Stem(genes, **options).eval()
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, len(model.genes), generator=generator)
    h = torch.randn(n, 5, generator=generator)
    return x_t, torch.arange(n) * 100, model.condition({"h": h})


# ---- its size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_genes", "expected"), [(200, 35_639_042), (300, 35_677_442), (1000, 35_946_242)])
def test_paper_preset_has_the_published_number_of_parameters(n_genes, expected):
    with torch.device("meta"):
        model = Stem([f"g{i}" for i in range(n_genes)], preset="paper", learned_variance=True, embedding_dim=1536)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_paper_preset_is_the_paper():
    with torch.device("meta"):
        model = Stem(GENES, preset="paper")
    assert model.config["transform"] == "log2p1_raw"
    assert model.diffusion.prediction == "epsilon"
    assert (model.diffusion.schedule, model.diffusion.timesteps) == ("linear", 1000)
    assert model.probe is None
    assert not model.config["learned_variance"]
    fixed = sum(p.numel() for p in model.parameters())
    assert 35_639_042 - (200 - 4) * 384 - fixed == 384 + 1  # the second output channel


def test_arguments_override_the_preset():
    assert stem(width=32).config["width"] == 32
    assert stem(width=32).config["heads"] == 2
    with pytest.raises(ValueError, match="must be one of 'small', 'paper', found 'large'"):
        Stem(GENES, preset="large")


# ---- the transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"mean": "probe"}, {"genes_per_token": 3}])
def test_untrained_output_is_exactly_zero(options):
    model = stem(random=False, **options)
    output = model.denoise(*inputs(model))
    assert output.shape == ((6, 2, 4) if options.get("learned_variance") else (6, 4))
    assert (output == 0).all()


def test_untrained_blocks_are_the_identity():
    model = stem(random=False)
    tokens, c = torch.randn(3, 4, 16), torch.randn(3, 16)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)


def test_initial_weights_are_those_of_the_paper():
    model = stem(random=False, width=64, image_hidden=256)
    for layer in (model.time[0], model.time[2], model.image[2]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert (layer.bias == 0).all()
    assert float(model.gene_type.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.05)  # Kaiming
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier
    assert float(model.blocks[0].qkv.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_block_written_out(activation):
    """Layer norm, modulation, attention head by head, gate; then the same with the MLP. Peebles & Xie (2023), Figure 3."""
    block = stem(activation=activation).blocks[0]
    tokens, c = torch.randn(3, 4, 16), torch.randn(3, 16)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(c * c.sigmoid())[:, None].split(16, -1)

    def modulated(x, shift, scale):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale) + shift

    q, k, v = block.qkv(modulated(tokens, shift_a, scale_a)).split(16, -1)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        attention = (q[..., head] @ k[..., head].mT / 8**0.5).softmax(-1)
        heads.append(attention @ v[..., head])
    x = tokens + gate_a * block.out(torch.cat(heads, -1))
    hidden = block.mlp[0](modulated(x, shift_m, scale_m))
    if activation == "gelu":
        hidden = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    else:
        hidden = hidden * hidden.sigmoid()
    torch.testing.assert_close(block(tokens, c), x + gate_m * block.mlp[2](hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("mean", ["none", "probe"])
def test_genes_are_a_set(learned_variance, mean):
    """One gene a token: genes in another order, with their embeddings, give the same answer in that order."""
    model = stem(learned_variance=learned_variance, mean=mean)
    x_t, t, cond = inputs(model)
    if mean == "probe":
        cond["mean"] = torch.randn(6, 4)
    expected = model.denoise(x_t, t, cond)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        model.gene_type.copy_(model.gene_type[order])
    if mean == "probe":
        cond["mean"] = cond["mean"][:, order]
    torch.testing.assert_close(model.denoise(x_t[:, order], t, cond), expected[..., order], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, expected[..., order], atol=1e-2)


@pytest.mark.parametrize("genes_per_token", [1, 3])
def test_items_do_not_see_each_other(genes_per_token):
    model = stem(genes_per_token=genes_per_token)
    x_t, t, cond = inputs(model)
    together = model.denoise(x_t, t, cond)
    for i in range(6):
        alone = model.denoise(x_t[i : i + 1], t[i : i + 1], {"h": cond["h"][i : i + 1]})
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["x_t", "t", "h", "gene"])
def test_every_input_matters(what):
    model = stem()
    x_t, t, cond = inputs(model)
    before = model.denoise(x_t, t, cond)
    if what == "gene":
        with torch.no_grad():
            model.gene_type[1] = torch.linspace(-1, 1, 16)
    after = model.denoise(
        x_t + (what == "x_t"), t + 300 * (what == "t"), {"h": cond["h"] + (what == "h")} if what == "h" else cond
    )
    assert ((after - before).abs() > 1e-3).any(1).all()


def test_genes_that_do_not_fill_the_last_token():
    """Five genes at three a token are six of which the last is zero and not reported."""
    five, six = (stem([f"g{i}" for i in range(n)], genes_per_token=3) for n in (5, 6))
    six.load_state_dict({**five.state_dict(), **{k: v for k, v in six.state_dict().items() if k.startswith("scale.")}})
    assert len(five.gene_type) == 2
    x_t, t, cond = inputs(five)
    padded = torch.nn.functional.pad(x_t, (0, 1))
    assert five.denoise(x_t, t, cond).shape == (6, 5)
    torch.testing.assert_close(five.denoise(x_t, t, cond), six.denoise(padded, t, cond)[:, :5])


def test_timestep_embedding():
    embedding = timestep_embedding(torch.tensor([0, 7]), 256)
    assert embedding.shape == (2, 256)
    assert torch.equal(embedding[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    torch.testing.assert_close(embedding[1, [0, 128]], torch.tensor([np.cos(7), np.sin(7)], dtype=torch.float32))
    torch.testing.assert_close(embedding[1, 128 + 64], torch.tensor(np.sin(7 / 100), dtype=torch.float32))


# ---- scales, residuals, samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["none", "probe"])
@pytest.mark.parametrize("standardize", [True, False])
def test_network_scale_and_back(spots, mean, standardize):
    model = stem(mean=mean, standardize=standardize)
    model.fit(spots, steps=1, batch_size=8, progress=False)
    cond = model.condition({"h": spots.h[:, 0]})
    z = model.to_network(spots.x, cond)
    torch.testing.assert_close(model.from_network(z, cond), spots.x, rtol=1e-4, atol=1e-4)
    if mean == "none" and standardize:
        torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    if mean == "none" and not standardize:
        assert torch.equal(z, spots.x)


def test_residuals_are_those_of_unseen_locations(spots):
    """The scale of the residual is that of the cross-fitted probe, and its offset is left in."""
    model = stem(mean="probe")
    model.fit(spots, steps=1, batch_size=8, progress=False)
    probe = LinearProbe(GENES, embedding_dim=5)
    residual = spots.x - probe.cross_fit(spots)
    torch.testing.assert_close(model.scale.scale, residual.std(0, correction=0))
    assert (model.scale.mean == 0).all()
    assert float(residual.std()) > float((spots.x - probe.predict(spots.h[:, 0])).std())
    with_mean = SpotData(spots.x, spots.h, mean=spots.x + 2)
    batch = torch.utils.data.default_collate([with_mean[i] for i in range(4)])
    assert torch.equal(model.condition(batch)["mean"], spots.x[:4] + 2)  # the batch's own, where it has one
    torch.testing.assert_close(model.condition({"h": batch["h"]})["mean"], probe.predict(batch["h"]))


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "ddpm"])
def test_same_seed_same_sample_whatever_the_batch(solver):
    model = stem()
    h = torch.randn(7, 5)

    def draw(rows):
        generators = [torch.Generator().manual_seed(i) for i in rows]
        return model.sample({"h": h[rows]}, 3, 5, generators, solver)

    together = draw(list(range(7)))
    assert together.shape == (7, 3, 4)
    for rows in ([0], [4, 5], [6, 2, 1]):
        torch.testing.assert_close(draw(rows), together[rows], rtol=1e-3, atol=1e-3)
    assert torch.equal(draw([3]), draw([3]))
    assert not torch.allclose(together[0, 0], together[0, 1])


def test_one_generator_for_all():
    model = stem()
    batch = {"h": torch.randn(1, 5).expand(3, -1)}
    one, two = (model.sample(batch, 2, 3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.allclose(one[0], one[1])
    assert not torch.equal(one, model.sample(batch, 2, 3, torch.Generator().manual_seed(2)))


def test_expression_in_the_batch_is_not_looked_at():
    model = stem()
    h = torch.randn(2, 5)
    draws = [
        model.sample(batch, 2, None, [torch.Generator().manual_seed(i) for i in range(2)])
        for batch in ({"h": h}, {"h": h, "x": torch.full((2, 4), torch.nan)})
    ]
    assert torch.equal(*draws)


def test_sampling_an_untrained_probe_model_gives_the_probe(spots):
    """With a network that says x_0 = 0 the residual is zero: what is left is the mean model."""
    model = stem(mean="probe", prediction="x_0", random=False)
    model.probe.fit(spots)
    drawn = model.sample({"h": spots.h[:5, 0]}, 2, 3)
    torch.testing.assert_close(drawn, model.probe.predict(spots.h[:5, 0])[:, None].expand(-1, 2, -1))
