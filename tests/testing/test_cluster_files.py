"""The job files in cluster/: run with stand-ins for the programs of a cluster, and for real between emulated hosts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from danon_lightning.testing import launch_ranks

_CLUSTER = Path(__file__).parents[2] / "cluster"
_TORCHRUN, _SBATCH = _CLUSTER / "torchrun.sh", _CLUSTER / "slurm.sbatch"

# Shows the arguments of torchrun, and does everything else.
_FAKE_PYTHON = f"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
printf '%s\\n' "$@"
"""
# One task on each of two nodes, one after the other.
_FAKE_SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID SLURMD_NODENAME=node$SLURM_NODEID
    "$@" >"$RECORD$SLURM_NODEID"
done
sleep "$SRUN_SECONDS"
"""
_FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ "$*" == "show hostnames node[0-1]" ]]; then
    printf 'node0\\nnode1\\n'
else
    echo "scontrol $*"
fi
"""


@pytest.fixture
def fake_programs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python3", _FAKE_PYTHON), ("srun", _FAKE_SRUN), ("scontrol", _FAKE_SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("PYTHON", "PORT", "MODULE", "INTERFACE", "RANKS_PER_NODE", "OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RECORD", str(tmp_path / "arguments-"))
    monkeypatch.setenv("SRUN_SECONDS", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-1]")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.chdir(tmp_path)


def _run(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=30)


def _options(arguments):
    """Returns a torchrun command line as its options, module included, and what is passed on."""
    module = arguments.index("-m", 2)
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments[2:module])
    return {"command": arguments[:2], "module": arguments[module + 1], **options}, arguments[module + 2 :]


def _sbatch_arguments(tmp_path, node):
    return _options((tmp_path / f"arguments-{node}").read_text().splitlines())


@pytest.mark.parametrize("path", [_TORCHRUN, _SBATCH], ids=lambda path: path.name)
def test_the_files_parse_and_stop_at_errors(path):
    result = _run("bash", "-n", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "set -euo pipefail" in path.read_text().splitlines()


def test_both_files_start_the_same_torchrun(fake_programs, tmp_path):
    result = _run("bash", _SBATCH, "trainer=gpu", "name=two words")
    assert result.returncode == 0, result.stderr
    assert "going on" not in result.stdout
    for node in range(2):
        by_slurm, passed_on = _sbatch_arguments(tmp_path, node)
        common = ["trainer.num_nodes=2", "trainer.devices=4"]
        assert passed_on == [*common, "output_dir=runs/slurm-1234567", "trainer=gpu", "name=two words"]

        shown = _run(_TORCHRUN, "127.0.0.1", 2, node, 4, "trainer=gpu", "name=two words")
        assert shown.returncode == 0, shown.stderr
        by_hand, passed_on = _options(shown.stdout.splitlines())
        assert passed_on == [*common, "trainer=gpu", "name=two words"]

        # The same options with the same values, but for the names of the machines and the port.
        assert by_slurm.keys() == by_hand.keys()
        assert {name for name in by_hand if by_hand[name] != by_slurm[name]} == {
            "rdzv-id",
            "rdzv-endpoint",
            "local-addr",
        }
        assert by_hand["command"] == ["-m", "torch.distributed.run"] and by_hand["module"] == "danon_lightning.train"
        assert by_hand["rdzv-conf"] == ("is_host=true" if node == 0 else "is_host=false")
        assert (by_slurm["rdzv-endpoint"], by_slurm["local-addr"]) == ("node0:24567", f"node{node}")
        assert (by_hand["rdzv-endpoint"], by_hand["local-addr"]) == ("127.0.0.1:29400", "127.0.0.1")


def test_a_requeued_job_goes_on_from_its_newest_checkpoint(fake_programs, tmp_path):
    for version in (2, 1):
        path = tmp_path / f"runs/slurm-1234567/my run/version_{version}/checkpoints/last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (version, version))
    result = _run("bash", _SBATCH)
    assert result.returncode == 0, result.stderr
    newest = "runs/slurm-1234567/my run/version_2/checkpoints/last.ckpt"
    assert f"going on from {newest}" in result.stdout
    assert _sbatch_arguments(tmp_path, 1)[1][2:] == ["output_dir=runs/slurm-1234567", f"ckpt_path='{newest}'"]


def test_the_job_goes_back_into_the_queue_when_its_time_is_up(fake_programs, monkeypatch):
    monkeypatch.setenv("SRUN_SECONDS", "600")
    # timeout sends the signal to the script's whole process group, which is how the stand-in for srun ends as well.
    result = _run("timeout", "--signal=USR1", "1", "bash", _SBATCH)
    assert "scontrol requeue 1234567" in result.stdout


@pytest.mark.parametrize(
    "arguments", [["head", "2"], ["head", "2", "2"], ["head", "zero", "0"]], ids=["few", "rank too high", "no number"]
)
def test_wrong_arguments_are_refused(fake_programs, arguments):
    result = _run(_TORCHRUN, *arguments)
    assert result.returncode == 2 and "NODE_RANK" in result.stderr


@pytest.mark.slow
@pytest.mark.hosts
def test_torchrun_script_between_emulated_hosts(emulated_hosts, tmp_path):
    (tmp_path / "job.py").write_text(
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "tensor = torch.ones(())\n"
        "dist.all_reduce(tensor)\n"
        "node, interface = os.environ['GROUP_RANK'], os.environ['GLOO_SOCKET_IFNAME']\n"
        # In one piece: torchrun's workers are unbuffered, and the parts of a print mix with those of other ranks.
        "sys.stdout.write(f'{tensor.item()} {node} {interface} {sys.argv[1:]}\\n')\n"
        "dist.destroy_process_group()\n"
    )
    hosts = emulated_hosts(2)
    # The script itself has to find the interface.
    env = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "MODULE": "job", "GLOO_SOCKET_IFNAME": ""}
    results = launch_ranks(
        lambda node: [str(_TORCHRUN), hosts.address(0), "2", str(node), "2", "model=full"],
        nodes=2,
        hosts=hosts,
        env=env,
        timeout=60,
    )
    assert all(result.ok for result in results), "\n".join(map(str, results))
    for node, result in enumerate(results):
        line = f"4.0 {node} {hosts.interface} ['trainer.num_nodes=2', 'trainer.devices=2', 'model=full']"
        assert result.stdout.splitlines() == [line] * 2
