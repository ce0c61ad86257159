"""The registered attention is SDPA with its masks: nothing attends to the future, to padding, or past a window."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qbench.engine import attention
from qbench.engine.attention import Maps, Operands
from qbench.quant import fake
from qbench.quant.grid import Grid
from qbench.quant.uniform import fake_quantize
from tests.blocks import VARIANTS, blocks_of


@pytest.fixture(params=VARIANTS)
def model(request, build_tiny) -> nn.Module:
    family, changes = VARIANTS[request.param]
    built = build_tiny(family, **changes)
    built.set_attn_implementation(attention.register())
    return built


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def test_logits_equal_those_of_sdpa(model: nn.Module, tokens) -> None:
    ours = logits(model, tokens)
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, logits(model, tokens))
    model.set_attn_implementation("eager")
    assert torch.allclose(ours, logits(model, tokens), rtol=1e-3, atol=1e-4)


def test_no_token_sees_the_future(model: nn.Module, tokens) -> None:
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 90 + 3
    before, after = logits(model, tokens), logits(model, changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert (before[:, 15:] - after[:, 15:]).abs().amax((0, 2)).min() > 0


def test_padding_is_not_attended_to_and_causality_holds_beside_it(model: nn.Module, tokens) -> None:
    """With a mask the backend cannot fall back on its causal flag: an implementation without one fails here."""
    pad = 7
    padded = torch.cat((torch.full((len(tokens), pad), 5), tokens), 1)
    mask = torch.ones_like(padded)
    mask[:, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kwargs = {"attention_mask": mask, "position_ids": positions}
    alone, beside = logits(model, tokens), logits(model, padded, **kwargs)
    assert torch.allclose(beside[:, pad:], alone, rtol=1e-3, atol=1e-4)
    other = padded.clone()
    other[:, :pad] = 9
    assert torch.allclose(logits(model, other, **kwargs)[:, pad:], beside[:, pad:], rtol=1e-3, atol=1e-4)
    changed = padded.clone()
    changed[:, 20] = 4
    assert torch.equal(logits(model, changed, **kwargs)[:, pad:20], beside[:, pad:20])


def test_a_sliding_window_is_kept(build_tiny, tokens) -> None:
    model = build_tiny("mistral", sliding_window=4, num_hidden_layers=1)
    model.set_attn_implementation(attention.register())
    changed = tokens.clone()
    changed[:, 2] = 4
    before, after = logits(model, tokens), logits(model, changed)
    assert not torch.equal(before[:, 5], after[:, 5])
    assert torch.equal(before[:, 6:], after[:, 6:])  # token 2 has left every window
    model.set_attn_implementation("sdpa")
    assert torch.equal(before, logits(model, tokens))


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_a_block_asks_for_quantized_operands_by_its_attribute(build_tiny, tokens, variant: str) -> None:
    model = build_tiny(*VARIANTS[variant][:1])
    model.set_attn_implementation(attention.register())
    plain = logits(model, tokens)
    for block in blocks_of(model):
        setattr(block.self_attn, attention.ATTRIBUTE, Operands(None, None))
    assert torch.equal(logits(model, tokens), plain)
    setattr(blocks_of(model)[1].self_attn, attention.ATTRIBUTE, Operands(Grid(2), Grid(2)))
    assert not torch.allclose(logits(model, tokens), plain, rtol=1e-2, atol=1e-2)


def test_granularity_decides_which_elements_share_a_range() -> None:
    x = torch.randn(2, 4, 5, 8)  # [batch, heads, tokens, head_dim]
    x[:, 0] *= 30  # one head of outliers
    per_head = Operands(None, Grid(4)).quantize(x, x, x)[2]
    per_token = Operands(None, Grid(4), "per_token").quantize(x, x, x)[2]
    for batch in range(2):
        for token in range(5):
            rows = x[batch, :, token]
            assert torch.equal(
                per_head[batch, :, token], torch.stack([fake_quantize(row, Grid(4)) for row in rows])
            )
            assert torch.equal(
                per_token[batch, :, token], fake_quantize(rows.reshape(-1), Grid(4)).reshape(4, 8)
            )
    assert per_token[:, 1:].eq(0).float().mean() > 0.5, (
        "outliers of one head cost the others their resolution"
    )
    assert Operands(None, Grid(4)).quantize(x, x, x)[0] is x


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["all heads", "grouped"])
def test_one_call_for_all_operands_gives_what_three_give(monkeypatch, kv_heads: int) -> None:
    """Also where memory holds tokens before heads, as projections leave it; gradients included."""
    generator = torch.Generator().manual_seed(0)

    def operand(heads: int) -> torch.Tensor:
        return torch.randn(2, 5, heads, 8, generator=generator).transpose(1, 2).requires_grad_()

    leaves = [operand(4), operand(kv_heads), operand(kv_heads)]
    upstream = [torch.randn(x.shape, generator=generator) for x in leaves]
    calls, found = [], []

    def counted(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(x)
        return fake.fake_quantize(x, *args, **kwargs)

    monkeypatch.setattr(attention, "fake_quantize", counted)
    for small, expected in ((fake.SMALL, 1), (0, 3)):
        monkeypatch.setattr(fake, "SMALL", small)
        calls.clear()
        results = Operands(Grid(4), Grid(4)).quantize(*leaves)
        assert len(calls) == expected
        found.append([*results, *torch.autograd.grad(results, leaves, upstream)])
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))
    assert all(torch.equal(y, fake_quantize(x, Grid(4))) for x, y in zip(leaves, results, strict=True))
    assert torch.equal(Operands(Grid(4), Grid(3)).quantize(*leaves)[1], fake_quantize(leaves[1], Grid(3)))


def test_registering_twice_is_harmless() -> None:
    assert attention.register() == attention.register() == "qbench"


def recorded(model: nn.Module, ids: torch.Tensor, operands: Operands | None = None) -> list[Maps]:
    """Maps of every block for one forward pass."""
    found = []
    for block in blocks_of(model):
        found.append(Maps())
        setattr(block.self_attn, attention.MAPS, found[-1])
        setattr(block.self_attn, attention.ATTRIBUTE, operands)
    return found


def test_recorded_maps_are_those_of_the_eager_attention_and_the_output_does_not_change(model, tokens) -> None:
    """Grouped heads, biases, norms on q and k, rotary or learned positions: every variant of the fixture."""
    plain = logits(model, tokens)
    found = recorded(model, tokens)
    assert torch.allclose(logits(model, tokens), plain, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(input_ids=tokens, use_cache=False, output_attentions=True).attentions
    for maps, probabilities in zip(found, eager, strict=True):
        assert torch.allclose(maps.latest, probabilities.mean(1), rtol=1e-4, atol=1e-6)


def test_recorded_maps_keep_masks(build_tiny, tokens) -> None:
    model = build_tiny("mistral", sliding_window=4, num_hidden_layers=1)
    model.set_attn_implementation(attention.register())
    plain = logits(model, tokens)
    (maps,) = recorded(model, tokens)
    assert torch.allclose(logits(model, tokens), plain, rtol=1e-4, atol=1e-5)
    window = torch.ones(24, 24).tril() - torch.ones(24, 24).tril(-4)
    assert torch.equal(maps.latest != 0, window.bool().expand(8, -1, -1))
    assert torch.allclose(maps.latest.sum(-1), torch.ones(8, 24))


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_recorded_maps_are_those_of_quantized_operands(build_tiny, tokens, variant: str) -> None:
    model = build_tiny(*VARIANTS[variant][:1])
    model.set_attn_implementation(attention.register())
    operands = Operands(Grid(3), Grid(3))
    for block in blocks_of(model):
        setattr(block.self_attn, attention.ATTRIBUTE, operands)
    expected = logits(model, tokens)
    maps = recorded(model, tokens, operands)
    assert torch.allclose(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)
    quantized = maps[0].latest
    plain = recorded(model, tokens)
    logits(model, tokens)
    assert (quantized - plain[0].latest).abs().max() > 1e-2


def test_maps_by_hand() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)  # two query heads per key head
    found = attention.probabilities(query, key, None, 0.5)
    for batch in range(2):
        for head in range(4):
            for token in range(3):
                scores = [
                    0.5 * float(query[batch, head, token] @ key[batch, head // 2, j])
                    for j in range(token + 1)
                ]
                row = torch.tensor(scores, dtype=torch.float64).softmax(0).float()
                assert torch.allclose(found[batch, head, token, : token + 1], row, rtol=1e-4)
                assert bool((found[batch, head, token, token + 1 :] == 0).all())
