"""The ``danon-bench`` command: one subcommand a subject."""

import argparse
import sys
from collections.abc import Sequence

from danon_lightning.benchmark.attention import command_line as attention
from danon_lightning.benchmark.communication import command_line as communication
from danon_lightning.benchmark.links import command_line as links
from danon_lightning.benchmark.recall import command_line as recall
from danon_lightning.benchmark.scaling import command_line as scaling

_SUBJECTS = [links, communication, scaling, attention, recall]
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the command; by default that of this process.

    Returns:
        The exit code: 0; 1 if something of this package failed; 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 and an explanation, if the command line is at fault.
    """
    parser = argparse.ArgumentParser(
        prog="danon-bench",
        description="Measures what this package claims, on this machine. Everything that is started or created for a "
        "measurement (processes, emulated hosts) is gone when it ends, however it ends.",
    )
    subparsers = parser.add_subparsers(title="subjects", dest="subject", metavar="SUBJECT", required=True)
    for subject in _SUBJECTS:
        subject.add_parser(subparsers)
    args = parser.parse_args(arguments)
    try:
        code: int = args.run(args)
    except KeyboardInterrupt:
        print("interrupted: all processes and emulated hosts of this run are gone", file=sys.stderr)
        return _INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
