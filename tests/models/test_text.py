"""Text from models of every variant."""

import sys
from pathlib import Path

import pytest
import torch

from danon_lightning.attention import available_variants
from danon_lightning.models import LanguageModel, MSRALightning

sys.path.insert(0, str(Path(__file__).parent))
from small_models import config_of, language_model, scrambled  # noqa: E402

PROMPTS = ["a", "the quick brown fox jumps", "over", "the lazy dog. " * 3]
ENDLESS = config_of("msra", num_levels=2, max_sequence_length=16)
pytestmark = pytest.mark.filterwarnings("ignore:num_levels is fixed")


def build(variant: str) -> LanguageModel:
    return language_model(variant, max_sequence_length=96)


@pytest.mark.parametrize("variant", available_variants())
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}])
def test_a_batch_gives_what_each_prompt_alone_would_give(variant, sampling):
    module = build(variant)
    together = module.generate_texts(PROMPTS, max_new_bytes=30, seed=5, **sampling)
    alone = [module.generate_text(text, max_new_bytes=30, seed=5 + i, **sampling) for i, text in enumerate(PROMPTS)]
    assert together == alone
    assert all(text.startswith(prompt) for text, prompt in zip(together, PROMPTS, strict=True))
    assert len({text[-20:] for text in together}) > 1


@pytest.mark.parametrize("variant", available_variants())
def test_a_stream_gives_the_same_bytes_as_they_are_made(variant):
    module = build(variant).train()
    whole = module.generate_text("the ", max_new_bytes=40, seed=2)
    made, modes = bytearray(), set()
    for byte in module.stream_text("the ", max_new_bytes=40, seed=2):
        assert len(byte) == 1
        made += byte
        modes.add(module.training)
    assert (b"the " + made).decode(errors="replace") == whole and len(made) == 40
    assert modes == {True}


def left_padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[255] * (longest - len(prompt)) + list(prompt.encode()) for prompt in prompts])
    missing = torch.tensor([longest - len(prompt) for prompt in prompts])
    return ids, (torch.arange(longest) >= missing[:, None]).long()


@pytest.mark.parametrize("variant", available_variants())
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": 5}])
def test_symbols_are_those_of_the_texts(variant, sampling):
    module, (ids, mask) = build(variant), left_padded(PROMPTS)
    out = module.generate(ids, 20, attention_mask=mask, **sampling)
    assert out.shape == (len(PROMPTS), ids.shape[1] + 20) and torch.equal(out[:, : ids.shape[1]], ids)
    texts = [bytes(row[-20 - len(prompt) :].tolist()) for row, prompt in zip(out, PROMPTS, strict=True)]
    assert [text.decode(errors="replace") for text in texts] == module.generate_texts(
        PROMPTS, max_new_bytes=20, **sampling
    )


@pytest.mark.parametrize("variant", available_variants())
def test_greedy_symbols_are_the_argmax_of_the_whole_sequence(variant):
    module, ids = language_model(variant, max_sequence_length=96, vocab_size=300), torch.randint(0, 300, (3, 7))
    out = module.generate(ids, 20, temperature=0)
    assert torch.equal(module.eval()(out[:, :-1]).argmax(dim=-1)[:, 6:], out[:, 7:])
    assert not torch.equal(module.generate(ids, 20, seed=1), out)


def test_rows_of_symbols_end_after_a_stop():
    module, ids = build("msra"), torch.tensor([[97, 98], [99, 100]])
    whole = module.generate(ids, 30, seed=1)
    stop = int(whole[0, 6])
    ended = module.generate(ids, 30, seed=1, stop=stop, pad_token_id=7)
    made = whole[0, 2:].tolist().index(stop) + 1
    assert ended[0, : 2 + made].tolist() == whole[0, : 2 + made].tolist()
    assert set(ended[0, 2 + made :].tolist()) <= {7}
    assert torch.equal(ended, module.generate(ids, 30, seed=1, stop=[299, stop], pad_token_id=7))


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids has shape \[3\] .* input_ids\[None\]"),
        ({"input_ids": IDS[:, :0]}, r"input_ids has shape \[1, 0\]"),
        ({"input_ids": IDS.float()}, "dtype torch.float32"),
        ({"input_ids": IDS + 254}, r"input_ids lies in \[255, 257\]; symbols of vocab_size=256 are 0 … 255"),
        ({"input_ids": -IDS}, r"input_ids lies in \[-3, -1\]"),
        ({"attention_mask": IDS[:, :2]}, r"attention_mask has shape \[1, 2\], but input_ids \[1, 3\]"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "attention_mask has zeros behind ones"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padded on the left"),
        ({"attention_mask": torch.zeros(1, 3)}, "attention_mask has zeros"),
        ({"max_new_tokens": 94}, "a prompt of 3 symbols and max_new_tokens=94 exceed max_sequence_length=96"),
        ({"max_new_tokens": None}, "max_new_tokens=None must be an integer of at least 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_symbols_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("full").generate(**{"input_ids": IDS, "max_new_tokens": 3, **arguments})


@pytest.mark.parametrize("variant", available_variants())
def test_texts_end_after_a_stop(variant):
    module = build(variant)
    full = b"".join(module.stream_text("ab", max_new_bytes=40, seed=1))
    stop = full[9:12]
    cut = full[: full.index(stop) + len(stop)]
    assert b"".join(module.stream_text("ab", max_new_bytes=40, seed=1, stop=[b"\x00" * 5, stop])) == cut
    other = module.generate_text("the quick", max_new_bytes=40, seed=2)
    texts = module.generate_texts(["ab", "the quick"], max_new_bytes=40, seed=1, stop=stop)
    assert texts[0] == (b"ab" + cut).decode(errors="replace")
    assert texts[1] == other or stop.decode(errors="replace") in other


def test_a_model_that_streams_without_end_goes_on_beyond_its_length():
    module = scrambled(MSRALightning(ENDLESS))
    stream = module.stream_text("a", seed=3)
    made = b"".join(next(stream) for _ in range(100))
    assert module.generate_text("a", max_new_bytes=100, seed=3) == (b"a" + made).decode(errors="replace")
    assert len(set(made)) > 10


@pytest.mark.parametrize("settings", [{"num_levels": "auto"}, {"learned_positions": True}])
def test_others_refuse_before_the_first_byte(settings):
    module = MSRALightning({**ENDLESS, **settings})
    with pytest.raises(ValueError, match="max_new_bytes=None: .* beyond max_sequence_length=16; .* at most 13"):
        module.stream_text("abc")
    with pytest.raises(ValueError, match="a prompt of 3 bytes and max_new_bytes=14 exceed max_sequence_length=16"):
        module.stream_text("abc", max_new_bytes=14)
    assert len(list(module.stream_text("abc", max_new_bytes=13))) == 13


def test_streams_leave_random_state_and_training_alone():
    module = scrambled(MSRALightning(ENDLESS))
    expected = b"".join(module.stream_text("a", max_new_bytes=20, seed=1))
    state, stream = torch.get_rng_state(), module.stream_text("a", max_new_bytes=20, seed=1)
    made = next(stream)
    assert torch.equal(torch.get_rng_state(), state)
    module.loss(torch.randint(0, 256, (2, 10))).backward()  # in between, with another text
    other = module.stream_text("b", max_new_bytes=20, seed=2)
    made += b"".join(byte for byte, _ in zip(stream, other, strict=False))
    assert made == expected
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_bad_input_is_named():
    module = MSRALightning(ENDLESS)
    with pytest.raises(ValueError, match="prompts is empty"):
        module.generate_texts([])
    with pytest.raises(TypeError, match=r"prompts='abc' is one text: put it in a list, .* or use generate_text"):
        module.generate_texts("abc")
    for count in (2.5, None, -1, True):
        for write in (module.generate_text, module.stream_text)[: 1 if count is None else 2]:
            with pytest.raises(ValueError, match=f"max_new_bytes={count} must be an integer of at least 0"):
                write("a", max_new_bytes=count)
    with pytest.raises(ValueError, match="prompt='' is empty"):
        module.generate_texts(["a", ""])
    with pytest.raises(ValueError, match="top_p=2"):
        module.stream_text("a", top_p=2)
    with pytest.raises(ValueError, match=r"stop\[0\] is empty"):
        module.generate_text("a", stop="")
    with pytest.raises(ValueError, match="vocab_size=300 does not fit"):
        MSRALightning({**ENDLESS, "vocab_size": 300}).generate_text("a")
    with pytest.raises(ValueError, match="vocab_size=90 does not fit"):
        MSRALightning({**ENDLESS, "vocab_size": 90}).generate_text("a")
