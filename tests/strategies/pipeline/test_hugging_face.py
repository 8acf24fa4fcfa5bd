"""Models of the transformers library as they are, small and with random weights."""

import pytest
import torch
from staged_models import LENGTH, VOCABULARY
from staged_runs import largest_difference, make_batch, run_plainly, run_staged
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

EXACT = 1e-12


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=4,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


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
        lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        lambda: llama(),
        lambda: llama(tie_word_embeddings=True, attention_bias=True),
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
    model, batch = gpt2().double().train(), make_batch()
    model.loss_function = in_full_precision

    whole = run_staged(model, batch, (0, 4), step=step)

    assert max(largest_difference(whole, run_staged(model, batch, (0, 1, 3, 4), step=step))) <= EXACT
