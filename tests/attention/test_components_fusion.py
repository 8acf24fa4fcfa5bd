"""Several scales in one sequence."""

import pytest
import torch

from danon_lightning.attention.components import MultiScaleFeatureFusion

METHODS = ("adaptive", "weighted", "concat")
LENGTHS = (12, 5, 30)


def maps(*lengths: int, batch: int = 2, width: int = 8, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, n, width, dtype=dtype, generator=generator) for n in lengths]


def build(method: str, num_scales: int = 3, scrambled: bool = True) -> MultiScaleFeatureFusion:
    torch.manual_seed(0)
    fusion = MultiScaleFeatureFusion(8, num_scales, method).double()
    if scrambled:
        with torch.no_grad():
            for parameter in fusion.parameters():
                parameter.add_(torch.randn_like(parameter))
    return fusion


def aligned(x: torch.Tensor, mask: torch.Tensor, row: int, index: int, length: int) -> torch.Tensor | None:
    """What a map holds at a token, from the definition; None if nothing is real there."""
    own = x.shape[1]
    if own <= length:
        members = [index * own // length]
    else:
        members = [j for j in range(own) if j * length // own == index]
    members = [j for j in members if mask[row, j]]
    return x[row, members].mean(dim=0) if members else None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_its_definition(method, masked):
    fusion, features = build(method), maps(*LENGTHS)
    masks = [torch.ones(2, n, dtype=torch.bool) for n in LENGTHS]
    if masked:
        masks[0][1, 8:], masks[1][:, 1], masks[2][0, 3:11], masks[2][1] = False, False, False, False
    fused = fusion(features, masks if masked else None)
    for row in range(2):
        for index in range(12):
            found = [aligned(x, mask, row, index, 12) for x, mask in zip(features, masks, strict=True)]
            if found[0] is None:
                expected = torch.zeros(8, dtype=torch.float64)
            elif method == "concat":
                side_by_side = torch.cat([torch.zeros(8, dtype=torch.float64) if x is None else x for x in found])
                expected = fusion.projection(side_by_side)
            else:
                scores = fusion.scores.clone()
                if method == "adaptive":
                    own = [0.0 if x is None else x @ w for x, w in zip(found, fusion.directions, strict=True)]
                    scores = scores + torch.stack([torch.as_tensor(s, dtype=torch.float64) for s in own])
                present = [s for s, x in enumerate(found) if x is not None]
                weights = torch.softmax(scores[present], dim=0)
                expected = sum(w * found[s] for w, s in zip(weights, present, strict=True))
            torch.testing.assert_close(fused[row, index], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["adaptive", "weighted"])
def test_scales_count_equally_at_first(method):
    features = maps(6, 6, 6)
    fused = build(method, scrambled=False)(features)
    torch.testing.assert_close(fused, torch.stack(features).mean(dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_masked_changes_nothing(method):
    fusion, features = build(method), maps(*LENGTHS)
    masks = [torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.6 for n in LENGTHS]
    fused = fusion(features, masks)
    assert torch.count_nonzero(fused[~masks[0]]) == 0
    changed = [torch.where(mask.unsqueeze(-1), x, 7.0) for x, mask in zip(features, masks, strict=True)]
    torch.testing.assert_close(fusion(changed, masks), fused, rtol=0, atol=0)
    nothing = [torch.zeros_like(mask) for mask in masks]
    assert torch.count_nonzero(fusion(features, nothing)) == 0
    if method != "concat":
        assert torch.count_nonzero(fusion(features, [None, *nothing[1:]]) - features[0]) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_scales", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_every_parameter_receives_a_gradient(method, num_scales, masked):
    fusion = build(method, num_scales, scrambled=False)
    features = [x.requires_grad_() for x in maps(*LENGTHS[:num_scales])]
    masks = [torch.zeros(2, n, dtype=torch.bool) for n in LENGTHS[:num_scales]] if masked else None
    fusion(features, masks).sin().sum().backward()
    grads = {name: parameter.grad for name, parameter in fusion.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(x.grad.isfinite().all() for x in features)
    if num_scales > 1 and not masked:
        assert all(torch.count_nonzero(grad) > 0 for grad in grads.values())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_definition(method):
    features = [x.requires_grad_() for x in maps(3, 2, 5, batch=1)]
    masks = [None, torch.tensor([[True, False]]), None]
    fusion = build(method)
    assert torch.autograd.gradcheck(lambda *features: fusion(features, masks), features)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_which_scale_matters(method):
    """Where the sign of a channel of the first map says which of the two others is the answer."""
    x = maps(40, 40, 40, batch=4)
    target = torch.where(x[0][..., :1] > 0, x[1], x[2]) if method == "adaptive" else x[1]
    if method == "adaptive":  # each map shows the sign, too
        x = [torch.cat([x[0][..., :1] * sign, y[..., 1:]], dim=-1) for y, sign in zip(x, (0, 1, -1), strict=True)]
    fusion = build(method, scrambled=False)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        loss = (fusion(x) - target)[..., 1:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_runs_and_stays_close(method):
    fusion = build(method).float()
    features, masks = maps(*LENGTHS, dtype=torch.float32), [None, None, torch.arange(30).expand(2, -1) < 20]
    expected = fusion(features, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fusion(features, masks).float(), expected, rtol=0.03, atol=0.1)
    plain = fusion.bfloat16()([x.bfloat16() for x in features], masks)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.float(), expected, rtol=0.05, atol=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_initial_values_also_after_the_meta_device(method):
    with torch.device("meta"):
        later = MultiScaleFeatureFusion(64, 3, method, initializer_range=0.05)
    later.to_empty(device="cpu")
    for module in later.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    for name, parameter in later.named_parameters():
        spread = 0.05 if name == "projection.weight" else 0.0
        assert parameter.std().item() == pytest.approx(spread, rel=0.05), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be an integer"),
        ({"num_scales": 1.0}, "num_scales=1.0 must be an integer"),
        ({"method": "sum"}, "method='sum' must be one of 'adaptive', 'weighted', 'concat'"),
        ({"initializer_range": 0.0}, "initializer_range=0.0 must be positive"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleFeatureFusion(**{"hidden_size": 8, "num_scales": 3, **settings})


def test_invalid_inputs_are_named():
    fusion, features = build("adaptive"), maps(*LENGTHS)
    with pytest.raises(ValueError, match="features has 2 maps and masks 2; with num_scales=3"):
        fusion(features[:2])
    with pytest.raises(ValueError, match=r"features\[1\] has shape \[1, 5, 8\]; it must be \[2, tokens, 8\]"):
        fusion([features[0], features[1][:1], features[2]])
    with pytest.raises(ValueError, match=r"features\[2\] has dtype torch.float32 beside torch.float64"):
        fusion([*features[:2], features[2].float()])
    with pytest.raises(ValueError, match=r"masks\[2\] has shape \[2, 29\] and dtype torch.bool"):
        fusion(features, [None, None, torch.ones(2, 29, dtype=torch.bool)])
