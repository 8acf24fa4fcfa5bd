"""Plots need matplotlib, which the package itself does not."""

import importlib.util


def missing_reason() -> str | None:
    """Why nothing can be plotted, and the remedy; None if it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'danon-lightning[bench]'"
    return None
