import pytest
import torch

from danon_lightning.models.generation import generate, sample_next


def generator():
    return torch.Generator().manual_seed(0)


LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(500, 4)


def test_zero_temperature_takes_the_most_probable():
    assert (sample_next(LOGITS, temperature=0, top_k=None, generator=generator()) == 1).all()


def test_draws_follow_the_probabilities():
    drawn = sample_next(LOGITS.repeat(40, 1), temperature=2.0, top_k=None, generator=generator()).flatten()
    frequency = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(frequency, (LOGITS[0] / 2).softmax(0), atol=0.02, rtol=0)


def test_top_k_leaves_the_rest_out():
    drawn = sample_next(LOGITS, temperature=5.0, top_k=2, generator=generator())
    assert set(drawn.flatten().tolist()) == {1, 3}


def test_the_prompt_is_fed_once_and_the_global_random_state_is_left_alone():
    seen = []

    def next_logits(tokens):
        seen.append(tokens.clone())
        return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 5, 5) * 50.0

    before = torch.get_rng_state()
    out = generate(next_logits, torch.tensor([[0, 1, 2], [1, 2, 3]]), 4, seed=1)
    assert out.tolist() == [[0, 1, 2, 3, 4, 0, 1], [1, 2, 3, 4, 0, 1, 2]]
    assert [s.shape[1] for s in seen] == [3, 1, 1, 1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("temperature", "top_k", "name"), [(-1, None, "temperature"), (1, 0, "top_k")])
def test_values_out_of_range_are_named(temperature, top_k, name):
    with pytest.raises(ValueError, match=name):
        sample_next(LOGITS, temperature=temperature, top_k=top_k, generator=generator())
