"""Small models of the transformers library, with random weights."""

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


def gpt2(vocabulary, length, **options):
    sizes = {"vocab_size": vocabulary, "n_positions": length, "n_embd": 16, "n_layer": 4, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))


def llama(vocabulary, **options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder_sizes(vocabulary), **options))


def mixtral(vocabulary):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_decoder_sizes(vocabulary), **experts))


def t5(vocabulary):
    sizes = {"vocab_size": vocabulary, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_decoder_layers=4, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(**sizes, **no_dropout, image_size=8, patch_size=4, num_channels=3, num_labels=5)
    return transformers.ViTForImageClassification(config)


def _decoder_sizes(vocabulary):
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
