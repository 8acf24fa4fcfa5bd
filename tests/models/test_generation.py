import pytest
import torch

from danon_lightning.models.generation import continue_prompts, generate, sample_next


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


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("logits", [[0.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 3.0, 1.0]])
def test_top_k_leaves_exactly_k_of_equal_ones_the_first(logits, top_k):
    drawn = sample_next(torch.tensor([logits]).expand(500, 4), temperature=9.0, top_k=top_k, generator=generator())
    ranked = sorted(range(4), key=lambda symbol: -logits[symbol])  # a stable order
    assert set(drawn.flatten().tolist()) == set(ranked[:top_k])


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("left_out", [{"top_k": None}, {"top_k": 3}, {"top_k": None, "top_p": 0.9}])
def test_tiny_temperatures_take_the_most_probable(temperature, left_out):
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([[500.0, -80.0, 501.0, 499.0]], dtype=dtype).expand(50, 4)
        assert (sample_next(logits, temperature=temperature, generator=generator(), **left_out) == 2).all()


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


@pytest.mark.parametrize(
    ("temperature", "top_k", "name"),
    [
        (-1, None, "temperature=-1 must be finite and not negative"),
        (float("nan"), None, "temperature=nan"),
        (float("inf"), None, "temperature=inf"),
        (1, 0, "top_k=0 must be an integer of at least 1"),
        (1, 2.5, "top_k=2.5"),
        (1, True, "top_k=True"),
    ],
)
def test_values_out_of_range_are_named(temperature, top_k, name):
    with pytest.raises(ValueError, match=name):
        sample_next(LOGITS, temperature=temperature, top_k=top_k, generator=generator())


def test_top_p_keeps_the_fewest_that_have_the_probability_together():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(2000, 4)
    cases = [
        (1e-300, {1}),
        (0.1, {1}),
        (0.39, {1}),
        (0.45, {1, 3}),
        (0.75, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
        (1, {0, 1, 2, 3}),
    ]
    for top_p, left in cases:
        settings = {"temperature": 1.0, "top_k": None, "top_p": top_p, "generator": generator()}
        drawn = sample_next(probabilities.log(), **settings).flatten()
        assert set(drawn.tolist()) == left, top_p
    frequency = torch.bincount(
        sample_next(probabilities.log(), temperature=1.0, top_k=None, top_p=0.65, generator=generator()).flatten()
    )
    torch.testing.assert_close(frequency[[1, 3]] / 2000, torch.tensor([4 / 7, 3 / 7]), atol=0.04, rtol=0)
    # Of the three most probable, renormalised, the first has 4/9 < 0.5.
    drawn = sample_next(probabilities.log(), temperature=1.0, top_k=3, top_p=0.5, generator=generator())
    assert set(drawn.flatten().tolist()) == {1, 3}


def counting(record=None):
    """A model that knows nothing but the last symbol and counts on from it, modulo 10."""

    def next_logits(tokens):
        if record is not None:
            record.append(tokens.tolist())
        return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 10, 10) * 50.0

    return next_logits


def test_prompts_of_different_lengths_are_continued_together():
    fed = []
    steps = list(continue_prompts(counting(fed), [[3], [5, 6, 7]], 3, temperature=0))
    assert steps == [[4, None], [5, None], [6, 8], [None, 9], [None, 0]]
    # The longer prompt is read on while the shorter one is continued.
    assert [step[1] for step in fed] == [[5], [6], [7], [8], [9]]
    assert [step[0] for step in fed][:3] == [[3], [4], [5]]


def test_rows_stop_and_stay_stopped():
    steps = list(continue_prompts(counting(), [[1], [4], [7, 8]], 9, temperature=0, stop=[[5], b"\x02\x03"]))
    rows = [[symbol for symbol in row if symbol is not None] for row in zip(*steps, strict=True)]
    assert rows == [[2, 3], [5], [9, 0, 1, 2, 3]]
    # An ending must be made by the model: that of the prompt does not count.
    steps = list(continue_prompts(counting(), [[1, 2]], 4, temperature=0, stop=[[2, 3]]))
    assert [row for [row] in steps] == [3, 4, 5, 6]


def test_rows_that_end_early_are_filled_up():
    real = torch.tensor([[False, False, True], [True, True, True]])
    prompts = torch.tensor([[77, 77, 1], [5, 6, 7]], dtype=torch.int32)
    out = generate(counting(), prompts, 4, real=real, temperature=0, stop=[[3]], fill=99)
    assert out.tolist() == [[77, 77, 1, 2, 3, 99, 99], [5, 6, 7, 8, 9, 0, 1]]
    assert out.dtype == torch.int32
    assert torch.equal(generate(counting(), prompts, 0), prompts)
    with pytest.raises(ValueError, match="max_new_tokens=None must be an integer of at least 0"):
        generate(counting(), prompts, None)


def test_streams_go_on_and_end_when_nobody_asks():
    calls = []
    steps = continue_prompts(counting(calls), [[0]], None, temperature=0)
    assert calls == []
    assert [next(steps)[0] for _ in range(25)] == [(n + 1) % 10 for n in range(25)]
    assert len(calls) == 25
    assert list(continue_prompts(counting(calls), [[0]], 0)) == [] and len(calls) == 25


def test_draws_of_a_row_do_not_depend_on_the_others():
    def noise(tokens):
        return torch.zeros(len(tokens), 100)

    together = list(continue_prompts(noise, [[1], [2, 3, 4], [5]], 10, seed=3))
    for row, prompt in enumerate([[1], [2, 3, 4], [5]]):
        alone = [symbol for [symbol] in continue_prompts(noise, [prompt], 10, seed=3 + row) if symbol is not None]
        assert [step[row] for step in together if step[row] is not None] == alone
    assert [step[0] for step in together] != [step[2] for step in together]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"stop": [b"a", b""]}, r"stop\[1\] is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be an integer of at least 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be an integer"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_errors_come_before_the_first_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        continue_prompts(counting(), **{"prompts": [[1]], "max_new_tokens": 3, **arguments})
