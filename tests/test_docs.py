"""What the documentation shows is run."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def python_block(page: str, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    [block] = [block for block in blocks if containing in block]
    return block


def test_the_example_of_a_variant_is_causal_and_streams_like_its_parallel_form(monkeypatch):
    from danon_lightning.attention import available_variants, registry

    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    names: dict[str, object] = {"__name__": "docs_example"}
    exec(compile(python_block("attention.md", "register_variant("), "attention.md", "exec", dont_inherit=True), names)
    assert "mean" in available_variants()
    model = names["model"]
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model(tokens).last_hidden_state
    changed = tokens.clone()
    changed[:, 12] += 1
    torch.testing.assert_close(model(changed % 256).last_hidden_state[:, :12], whole[:, :12])
    state, parts = model.init_state(2), []
    for chunk in tokens.split([7, 1, 12], dim=1):
        output = model(chunk, state=state)
        state = output.state
        parts.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")) + ["../README.md"])
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (DOCS / page).parent.joinpath(target).exists(), f"{page} links to {target}"
