"""What a module offers to be watched, and the numbers that are made of it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["MeasuresAttention", "summarise"]

_ROUTE = "route/"
# What numbers are made of; anything else a module tells is a number already.
_INGREDIENTS = {"weights", "visible_keys", "tokens_read", "keys_read"}


@runtime_checkable
class MeasuresAttention(Protocol):
    """A module that can tell what it attends to. One method, and nothing to be done in the forward pass.

    A whole example::

        class MyAttention(nn.Module):
            def forward(self, x):
                q, k, v = self.qkv(x).chunk(3, dim=-1)  # [b, n, d]
                return F.scaled_dot_product_attention(q, k, v)

            def attention_statistics(self, x):
                q, k, _ = self.qkv(x).chunk(3, dim=-1)
                return {"weights": torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1).unsqueeze(1)}
    """

    def attention_statistics(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Measure what ``forward`` attends to with the same arguments.

        It is called with the arguments of an actual forward pass, cut to its first sequences (the first dimension of
        tensors), in evaluation mode and without gradients; the random state is put back afterwards.

        Returns:
            Any of these, b sequences, H heads, n queries, m keys; shapes may be any that broadcast to the ones given:

            - ``weights [b, H, n, m]``: the share of each key in what a query reads; zero where nothing is read. They
              may be given of the first queries and keys only.
            - ``visible_keys [b, H, n]``: how many keys the query may see; 0 leaves a query (padding) out of all means.
              Without it every key is visible, or those up to the query itself if no weight is on a later one.
            - ``tokens_read [b, H, n]``: how many keys are read one by one. Without it, those with a weight.
            - ``keys_read [b, H, n]``: how many keys there are in the softmax, summaries of several included.
            - ``route/<name> [b, H, n]``: the share of what is read by one of several ways.
            - ``<name>``: a tensor or number of the module's own, whose mean is logged under its name.
            - ``<name>``: a mapping with the same things of a part of the module.
        """
        ...


def summarise(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn what a module tells into numbers.

    Args:
        found: As from ``attention_statistics``.

    Returns:
        Scalars, float32, on the device of what they are made of, without waiting for it. As far as they can be told:

        - ``sparsity``: the share of visible pairs of query and key that are not read one by one.
        - ``compression_ratio``: keys read over visible ones.
        - ``entropy``: of the weights, Σ −p ln p in nats, the mean over queries and heads; ``entropy_normalised``: over
          the largest possible, the logarithm of the number of visible keys, for queries that see at least two.
        - ``share/<route>``: its mean share; ``load/<route>``: the share of queries (of all heads) that take most by it;
          ``imbalance``: the largest load over the mean one, from 1 to the number of routes.
        - whatever else the module tells, and of a part all of this, after the name of the part.

    Reference:
        Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (the entropy).
    """
    numbers: dict[str, Tensor] = {}
    weights = found.get("weights")
    weights = None if weights is None else _precise(weights)
    visible = found.get("visible_keys")
    if visible is None and weights is not None:
        visible = _guess_visible(weights)
    if visible is not None:
        visible = _precise(visible)
    if visible is not None and "tokens_read" in found:
        numbers["sparsity"] = 1 - _ratio(_precise(found["tokens_read"]), visible)
    elif visible is not None and weights is not None:
        numbers["sparsity"] = 1 - _ratio((weights > 0).sum(dim=-1).float(), visible[..., : weights.shape[-2]])
    if visible is not None and "keys_read" in found:
        numbers["compression_ratio"] = _ratio(_precise(found["keys_read"]), visible)
    if visible is not None and weights is not None:
        seen = visible[..., : weights.shape[-2]]
        entropy = torch.special.entr(weights).sum(dim=-1)
        numbers["entropy"] = _mean(entropy, seen > 0)
        numbers["entropy_normalised"] = _mean(entropy / seen.clamp(min=2).log(), seen > 1)
    numbers |= _routes(found, visible)
    for name, value in found.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{part}": number for part, number in summarise(value).items()}
        elif name not in _INGREDIENTS and not name.startswith(_ROUTE):
            numbers[name] = _precise(torch.as_tensor(value)).mean()
    return numbers


def _routes(found: Mapping[str, Any], visible: Tensor | None) -> dict[str, Tensor]:
    routes = {name.removeprefix(_ROUTE): _precise(share) for name, share in found.items() if name.startswith(_ROUTE)}
    if not routes:
        return {}
    shares = torch.stack(torch.broadcast_tensors(*routes.values()))
    counted = torch.ones_like(shares[0]) if visible is None else visible > 0
    most = torch.nn.functional.one_hot(shares.argmax(dim=0), len(routes)).movedim(-1, 0).float()
    loads = torch.stack([_mean(load, counted) for load in most])
    numbers = {f"share/{name}": _mean(share, counted) for name, share in zip(routes, shares, strict=True)}
    if len(routes) > 1:
        numbers |= {f"load/{name}": load for name, load in zip(routes, loads, strict=True)}
        numbers["imbalance"] = loads.max() * len(routes)
    return numbers


def _precise(x: Tensor) -> Tensor:
    return x.detach().float()


def _guess_visible(weights: Tensor) -> Tensor:
    """All keys, or those up to the query if no weight is on a later one, without waiting for the device."""
    queries, keys = weights.shape[-2:]
    everything = torch.full((queries,), keys, device=weights.device)
    past = torch.arange(keys - queries + 1, keys + 1, device=weights.device)  # the queries are the last of the tokens
    sees_future = weights.triu(keys - queries + 1).any()
    return torch.where(sees_future, everything, past)[None, None]


def _ratio(read: Tensor, visible: Tensor) -> Tensor:
    """Σ read / Σ visible, over the queries of all heads that see something."""
    read, visible = torch.broadcast_tensors(read, visible)
    return torch.where(visible > 0, read, 0.0).sum() / visible.sum().clamp(min=1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    values, counted = torch.broadcast_tensors(values, counted)
    return torch.where(counted > 0, values, 0.0).sum() / (counted > 0).sum().clamp(min=1)
