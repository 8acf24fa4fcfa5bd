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
