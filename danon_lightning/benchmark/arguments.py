"""Types of command line arguments, with errors that say what would have been right."""

import argparse
import math
import os
from pathlib import Path


def positive_int(text: str) -> int:
    """Read a whole number, at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def positive_float(text: str) -> float:
    """Read a finite number above 0."""
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def rate(text: str) -> float | None:
    """Read a rate in Mbit/s; None, written as 0, stands for unshaped."""
    value = _float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate: give a number of Mbit/s, or 0 for an unshaped link")
    return value or None


def output_file(text: str) -> Path:
    """Read the path of a file to write, whose folder must exist: better said before a measurement than after it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist: make it, or choose another one")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: choose another place, or change its permissions")
    return path


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
