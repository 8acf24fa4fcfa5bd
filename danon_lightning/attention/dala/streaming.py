"""The softmax of DALA chunk by chunk, with a state of constant size.

The state keeps the tokens of the current block and of the one before it, at most 2·B, and M remembered ones. When a
block leaves the window its tokens compete for the memory: as scores never change, what has lost once would not win
later.
"""

import torch
from torch import Tensor

from danon_lightning.attention.checks import check_rotation
from danon_lightning.attention.core import State
from danon_lightning.attention.dala.arguments import check_settings, check_tensors
from danon_lightning.attention.dala.local import distance_coefficients, local_bias
from danon_lightning.attention.dala.memory import memory_scores
from danon_lightning.attention.merging import MASKED, attention_part, has_visible_keys, merge_parts
from danon_lightning.attention.rotary import apply_rotary, cell_positions

__all__ = ["empty_state", "stream_chunk"]


def empty_state(batch_size: int, kv_heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> State:
    """Return the state before the first token.

    Args:
        batch_size: Number of sequences b.
        kv_heads: Key and value heads G.
        head_dim: Head width d.
        device: Where the state lives.
        dtype: Dtype of keys and values; later states take on that of the newest chunk.

    Returns:
        ``position``, the number of tokens seen; ``keys`` and ``values`` ``[b, G, m, d]`` and ``log_importance``
        and ``scores`` ``[b, m]`` of the tokens in the window; the same of the remembered ones, ``memory_...``, from the
        best on. Keys are not rotated; ``log_importance`` is ``MASKED`` for padding and empty places.
    """
    nothing = torch.empty(batch_size, kv_heads, 0, head_dim, device=device, dtype=dtype)
    no_importance = torch.empty(batch_size, 0, device=device, dtype=torch.promote_types(dtype, torch.float32))
    no_scores = memory_scores(no_importance, 0, importance_threshold=0.0, recency=0.0)
    return {
        "position": 0,
        "keys": nothing,
        "values": nothing,
        "log_importance": no_importance,
        "scores": no_scores,
        "memory_keys": nothing,
        "memory_values": nothing,
        "memory_log_importance": no_importance,
        "memory_scores": no_scores,
    }


def stream_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = 0.0,
    recency: float = 1e-3,
    memory_bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    rope_base: float | None = 10000.0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, State]:
    """Attend to the window, the memory and the chunk itself, causally.

    The result equals the matching rows of ``dala_attention`` over the whole sequence. A chunk is worked on block by
    block, so it may be of any length.

    Args:
        q: Queries of the chunk ``[b, H, n, d]``; the other tensors likewise cover the chunk only, and are otherwise as
            in ``dala_attention``.
        k: Keys ``[b, G, n, d]``.
        v: Values ``[b, G, n, d]``.
        state: From ``empty_state`` or an earlier call; not changed.
        log_importance: ``[b, n]``.
        block_size: Tokens B in a block, the same in all calls, like all settings.
        memory_size: Tokens M in the memory.
        distance_decay: ``[H]``.
        window_width: A number or ``[]``, ``[H]`` or ``[H, blocks]``, for the blocks that the chunk has tokens of.
        importance_threshold: Tokens of less importance are not remembered.
        recency: What a position adds to the score of a token.
        memory_bias: ``[b, H, n]``.
        selection_bias: ``[b, n]``.
        rope_base: Base of the rotary embedding; ``None`` means no rotation.
        key_padding_mask: True for real tokens ``[b, n]``, boolean.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        The output ``[b, H, n, d]`` and the new state.

    Raises:
        ValueError: If shapes do not fit each other or a setting is out of range.
    """
    check_settings(q, block_size, memory_size, importance_threshold)
    check_rotation(q, rope_base)
    start, stop = state["position"], state["position"] + q.shape[-2]
    first_block, blocks = start // block_size, -(-stop // block_size) - start // block_size
    check_tensors(
        q,
        k,
        v,
        blocks,
        log_importance=log_importance,
        distance_decay=distance_decay,
        window_width=window_width,
        memory_bias=memory_bias,
        selection_bias=selection_bias,
        key_padding_mask=key_padding_mask,
    )
    importance = log_importance.to(torch.promote_types(q.dtype, torch.float32))
    if key_padding_mask is not None:
        importance = importance.masked_fill(~key_padding_mask, MASKED)
    scores = memory_scores(
        importance, start, importance_threshold=importance_threshold, recency=recency, selection_bias=selection_bias
    )
    coefficients = distance_coefficients(distance_decay, window_width, importance.dtype).expand(-1, blocks, -1)
    borders = [start, *range((first_block + 1) * block_size, stop, block_size), stop]
    sizes = [after - before for before, after in zip(borders, borders[1:], strict=False)]
    biases = [None] * blocks if memory_bias is None else memory_bias.split(sizes, dim=-1)
    outputs = []
    for query, key, value, mass, score, slope, bias in zip(
        q.split(sizes, dim=-2),
        k.split(sizes, dim=-2),
        v.split(sizes, dim=-2),
        importance.split(sizes, dim=-1),
        scores.split(sizes, dim=-1),
        coefficients.unbind(1),
        biases,
        strict=True,
    ):
        state = _append(state, key, value, mass, score)
        outputs.append(_attend(query, state, slope, bias, rope_base, dropout_p))
        if state["position"] % block_size == 0 and state["keys"].shape[-2] > block_size:
            state = _remember(state, block_size, memory_size)
    # Copies, so that the state does not keep the chunk alive.
    return torch.cat(outputs, dim=2), {name: x.clone() if isinstance(x, Tensor) else x for name, x in state.items()}


def _append(state: State, key: Tensor, value: Tensor, mass: Tensor, score: Tensor) -> State:
    """Return the state with tokens of the current block appended, in their dtype."""
    return {
        **state,
        "position": state["position"] + key.shape[-2],
        "keys": torch.cat([state["keys"].to(key.dtype), key], dim=-2),
        "values": torch.cat([state["values"].to(value.dtype), value], dim=-2),
        "log_importance": torch.cat([state["log_importance"].to(mass.dtype), mass], dim=-1),
        "scores": torch.cat([state["scores"].to(score.dtype), score], dim=-1),
        "memory_keys": state["memory_keys"].to(key.dtype),
        "memory_values": state["memory_values"].to(value.dtype),
        "memory_log_importance": state["memory_log_importance"].to(mass.dtype),
    }


def _attend(
    query: Tensor, state: State, slope: Tensor, memory_bias: Tensor | None, rope_base: float | None, dropout_p: float
) -> Tensor:
    """Attend to the window, of which the queries are the newest tokens, and to the memory."""
    heads, count, width = query.shape[1:]
    repeats = heads // state["keys"].shape[1]
    kept = state["keys"].shape[-2]
    positions = cell_positions(state["position"] - kept, kept, 1, query.device)
    tokens = torch.arange(kept, device=query.device)
    bias = local_bias(slope, tokens[-count:].unsqueeze(-1) - tokens) + state["log_importance"][:, None, None, :]
    parts = [
        attention_part(
            apply_rotary(query, positions[-count:], rope_base) * width**-0.5,
            apply_rotary(state["keys"], positions, rope_base).repeat_interleave(repeats, dim=1),
            state["values"].repeat_interleave(repeats, dim=1),
            bias,
            dropout_p=dropout_p,
        )
    ]
    if state["memory_keys"].shape[-2] > 0:
        memory = attention_part(
            query * width**-0.5,
            state["memory_keys"].repeat_interleave(repeats, dim=1),
            state["memory_values"].repeat_interleave(repeats, dim=1),
            state["memory_log_importance"][:, None, None, :].expand(-1, -1, count, -1),
            dropout_p=dropout_p,
        )
        parts.append(memory if memory_bias is None else memory._replace(lse=memory.lse + memory_bias))
    output, lse = merge_parts(parts)
    return output.masked_fill(~has_visible_keys(lse).unsqueeze(-1), 0.0)


def _remember(state: State, block_size: int, memory_size: int) -> State:
    """Let the older of the two blocks in the window go, and remember the best of its tokens."""
    names = ("keys", "values", "log_importance")
    leaving = {name: _narrow(state[name], 0, block_size) for name in names}
    scores = _narrow(state["scores"], 0, block_size)
    # The newest first and a stable order: of tokens with the same score the later ones are kept, as in the memory.
    scores = torch.cat([scores.flip(-1), state["memory_scores"].to(scores.dtype)], dim=-1)
    best, order = scores.sort(dim=-1, descending=True, stable=True)
    best, order = best[:, :memory_size], order[:, :memory_size]
    new_state = {**state, "memory_scores": best, "scores": _narrow(state["scores"], block_size, block_size)}
    for name in names:
        axis = -1 if name == "log_importance" else -2
        candidates = torch.cat([leaving[name].flip(axis), state[f"memory_{name}"]], dim=axis)
        index = (
            order if axis == -1 else order[:, None, :, None].expand(-1, candidates.shape[1], -1, candidates.shape[-1])
        )
        new_state[f"memory_{name}"] = candidates.gather(axis, index)
        new_state[name] = _narrow(state[name], block_size, block_size)
    empty = best == float("-inf")
    new_state["memory_log_importance"] = new_state["memory_log_importance"].masked_fill(empty, MASKED)
    return new_state


def _narrow(x: Tensor, start: int, count: int) -> Tensor:
    """Return ``count`` tokens of ``[b, m]`` or ``[b, G, m, d]``."""
    return x.narrow(-1 if x.dim() == 2 else -2, start, count)
