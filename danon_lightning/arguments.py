"""Types of command line arguments, with errors that say what would have been right."""

import argparse
import importlib
import math
import os
from pathlib import Path

_SUFFIXES = {"k": 1024, "M": 1024**2}


def positive_int(text: str) -> int:
    """Read a whole number, at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Read a whole number, at least 0."""
    return _at_least(0, text)


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


def length(text: str) -> int:
    """Read a number of tokens, which may be written with a suffix: 4096, 16k, 1M (of 1024 and 1024²)."""
    number, factor = text, 1
    if text and text[-1] in _SUFFIXES:
        number, factor = text[:-1], _SUFFIXES[text[-1]]
    try:
        return positive_int(number) * factor
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, such as 4096, 16k or 1M") from None


def format_length(tokens: int) -> str:
    """Write a number of tokens as :func:`length` reads it: ``16k``."""
    for suffix, factor in (("M", 1024**2), ("k", 1024)):
        if tokens % factor == 0:
            return f"{tokens // factor}{suffix}"
    return str(tokens)


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


def add_modules(parser: argparse.ArgumentParser) -> None:
    """Add ``--import``, which imports modules as they are read.

    Args:
        parser: Of a subcommand.
    """
    parser.add_argument(
        "--import",
        type=_importable,
        nargs="+",
        default=[],
        metavar="MODULE",
        dest="modules",
        help="modules to import first, which register variants of your own",
    )


def add_output_files(parser: argparse.ArgumentParser, drawn: str) -> None:
    """Add ``--json`` and ``--plot``.

    Args:
        parser: Of a subcommand.
        drawn: What the plot shows, for the help.
    """
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all figures to this file")
    parser.add_argument(
        "--plot",
        type=output_file,
        metavar="FILE",
        help=f"draw {drawn} into this PNG file; needs matplotlib (pip install 'danon-lightning[bench]')",
    )


def _importable(text: str) -> str:
    """Read the name of a module, and import it: it may register variants."""
    try:
        importlib.import_module(text)
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be imported: {error}") from None
    return text


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
