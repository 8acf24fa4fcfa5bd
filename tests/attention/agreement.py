"""How fast forms of attention are compared with their definitions."""

import torch

BATCH = 2
PADDING = ("none", "left", "right", "ragged", "whole row")


def make_mask(kind, length):
    """Return a mask of one of the kinds of padding ``[2, n]``, or ``None``."""
    if kind == "none":
        return None
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if kind == "left":
        mask[0, : length // 3] = False
    if kind == "right":
        mask[0, length - length // 3 :] = False
    if kind == "ragged":
        mask = torch.rand(BATCH, length) < 0.5
    if kind == "whole row":
        mask[1] = False
    return mask


def assert_same(tensors, ours, theirs, tolerance=1e-10):
    """Raise unless two outputs agree, and so do the gradients of those of ``tensors`` that want one."""
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    leaves = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    upstream = torch.randn_like(ours)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(output, list(leaves.values()), upstream, **options) for output in (ours, theirs)]
    for name, mine, other in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
