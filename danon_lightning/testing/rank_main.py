"""One rank of :func:`danon_lightning.testing.run_distributed`; started as a script, never imported.

    python rank_main.py JOB_FILE

The job file is a pickle written by the parent into a folder that only its user can enter; the result goes to the same
folder. This file must not import the package: a rank that is a new process and needs only torch then starts in half
the time.
"""

import faulthandler
import importlib
import importlib.util
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any


def _load_module(name: str, file: str) -> ModuleType:
    """Imports a module by name if that leads to `file`, and from the file otherwise.

    Test modules are not always importable by name: two may have the same name in different folders, and pytest's
    import mode "importlib" leaves sys.path alone.
    """
    if name != "__main__":
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, AttributeError, ValueError):
            found = None
        if found is not None and found.origin is not None and os.path.realpath(found.origin) == os.path.realpath(file):
            return importlib.import_module(name)
    # Pickle looks for the packages above the module, too; pytest also makes them up.
    parts = name.split(".")
    for length in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:length]), ModuleType(".".join(parts[:length])))
    # Like multiprocessing, run a script under another name, so that its `if __name__ == "__main__"` stays false.
    spec = importlib.util.spec_from_file_location("__mp_main__" if name == "__main__" else name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    # Under both names before it runs: dataclasses and pickled arguments look their module up there.
    sys.modules[spec.name] = sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _call(job: dict[str, Any]) -> Any:
    import torch.distributed as dist

    function: Any = _load_module(job["module"], job["file"])
    for part in job["qualname"].split("."):
        function = getattr(function, part)
    # Only now: arguments may be instances of classes of that module.
    args = pickle.loads(job["args"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['store']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=job["collective_timeout"]),
    )
    result = pickle.dumps(function(*args))
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def _write(path: Path, content: bytes) -> None:
    # In one step: the parent never sees half a file.
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def main() -> None:
    """Runs the job named on the command line."""
    with open(sys.argv[1], "rb") as file:
        job = pickle.load(file)
    folder, rank = Path(job["folder"]), os.environ["RANK"]
    sys.path[:] = job["sys_path"]
    sys.argv[:] = [job["file"]]
    faulthandler.enable()
    # Kept open for the whole run: the interpreter writes to its descriptor when the time is up.
    stacks = open(folder / f"{rank}.stacks", "w")
    faulthandler.dump_traceback_later(max(job["deadline"] - time.monotonic(), 0.1), file=stacks)
    try:
        result = _call(job)
    except BaseException:
        # Every kind: pytest's skip and fail are no ordinary exceptions, and sys.exit in a test is an error, too.
        report = {"time": time.monotonic(), "traceback": traceback.format_exc()}
        _write(folder / f"{rank}.error", pickle.dumps(report))
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: a backend's destructor may wait for the other ranks, for ever.
        os._exit(1)
    _write(folder / f"{rank}.result", result)


if __name__ == "__main__":
    main()
