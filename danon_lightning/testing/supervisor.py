"""A small program that runs one command and leaves nothing of it behind; the fork server uses its two functions, too.

    python -I -S supervisor.py PARENT_PID COMMAND [ARGUMENT ...]

When the command ends, when the supervisor is told to end (SIGTERM, SIGINT, SIGHUP) or when the process PARENT_PID dies,
every process that the command started is killed. It exits as the command did, also by the same signal.

Killing a process group is not enough for that: torchrun puts its workers in sessions of their own. On Linux the
supervisor therefore declares itself the reaper of all its descendants: whoever loses its parent becomes its child, so
killing its children until none is left ends the whole tree. Elsewhere only the command's process group is killed.

Only the standard library is imported, because one of these is started for each rank.
"""

import ctypes
import os
import resource
import signal
import sys

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_END_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_IS_LINUX = sys.platform == "linux"


def _prctl(option: int, value: int) -> None:
    if _IS_LINUX and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _children() -> list[int]:
    """Returns the processes whose parent is this one, zombies included."""
    found = []
    for name in os.listdir("/proc") if _IS_LINUX else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command name, in parentheses, may hold anything; the state and the parent follow it.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getpid():
                found.append(int(name))
    return found


def _kill_everything(group: int) -> None:
    """Kills the process group, then children until this process has none."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    while True:
        for pid in _children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _wait(child: int) -> int:
    """Returns the exit code of the process, or minus the signal that ended it or this one."""
    while True:
        received = signal.sigwait(_END_SIGNALS | {signal.SIGCHLD})
        if received in _END_SIGNALS:
            return -received
        # One SIGCHLD may stand for several ended processes, adopted ones among them.
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == child:
                return os.waitstatus_to_exitcode(status)
            if pid == 0:
                break


def fork() -> int:
    """Forks a process that :func:`supervise` is to watch over.

    This process becomes the reaper of all that the new one starts. Signals to it wait for :func:`supervise`.

    Returns:
        0 in the new process, which leads a process group of its own and dies if this one does; in this one, its number.
    """
    # Signals are waited for, not handled, so none can slip in between a check and a wait.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS | {signal.SIGCHLD})
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        # A second line of defence.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return 0
    try:
        # The child does the same; whoever comes first, the group exists before it may have to be killed.
        os.setpgid(child, child)
    except OSError:
        pass
    return child


def supervise(child: int) -> int:
    """Waits until the process ends, or this one is told to end, then kills everything that the process started.

    Args:
        child: What :func:`fork` has returned.

    Returns:
        The exit code of the process, or minus the signal that ended it or this process.
    """
    code = _wait(child)
    _kill_everything(child)
    return code


def _execute(command: list[str]) -> None:
    """Turns this freshly forked process into `command`; never returns."""
    try:
        # Python ignores SIGPIPE, and what is ignored stays so across exec.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def main() -> None:
    """Runs the command given on the command line."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        # The parent died before the request above could take effect.
        sys.exit(1)

    child = fork()
    if child == 0:
        _execute(command)
    code = supervise(child)

    if code < 0:
        # End by the same signal, so that the parent sees what happened; the command has left its core file already.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
