"""Models of the transformers library as they are, small and with random weights."""

import pytest
import torch
from staged_models import LENGTH, VOCABULARY
from staged_runs import largest_difference, make_batch, run_plainly, run_staged
from torch.nn import functional as F
from transformers_models import gpt2, llama

EXACT = 1e-12
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def in_full_precision(logits, labels, vocab_size, **_):
    """The loss of these models, which they take in float32."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), ignore_index=-100)


def step(model, batch):
    tokens, labels = batch
    return model(input_ids=tokens, labels=labels, attention_mask=(tokens != 0).long()).loss


@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2(VOCABULARY, LENGTH, **NO_DROPOUT),
        lambda: llama(VOCABULARY),
        lambda: llama(VOCABULARY, tie_word_embeddings=True, attention_bias=True),
    ],
    ids=["gpt2", "llama", "llama, tied"],
)
def test_gradients_are_those_of_the_model_itself(make, checkpointed, bounds):
    torch.manual_seed(0)
    model = make().double().train()
    model.loss_function = in_full_precision
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = make_batch(6, ignored=True, padded=True)

    staged = run_staged(model, batch, bounds, step=step)

    assert max(largest_difference(staged, run_plainly(model, batch, step))) <= EXACT


def test_dropout_draws_the_same_for_every_cut():
    torch.manual_seed(0)
    model, batch = gpt2(VOCABULARY, LENGTH).double().train(), make_batch()
    model.loss_function = in_full_precision

    whole = run_staged(model, batch, (0, 4), step=step)

    assert max(largest_difference(whole, run_staged(model, batch, (0, 1, 3, 4), step=step))) <= EXACT
