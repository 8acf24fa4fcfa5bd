"""Processes of their own: what they return, and what becomes of those that do not."""

import multiprocessing
import os
import signal
import time

from danon_lightning.benchmark.workers import run_isolated


def answer(argument, tell):
    if argument == "raise":
        raise ValueError("this is the reason\nand more of it")
    if argument == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if argument == "sleep":
        time.sleep(600)
    if argument == "exit":
        os._exit(3)
    tell(f"half of {argument}")
    return argument * 2


def test_results_come_in_order_and_failures_lose_only_their_own():
    told, done = [], []
    arguments = [1, "raise", "kill", "exit", 2]
    outcomes = run_isolated(
        answer,
        arguments,
        jobs=2,
        told=lambda index, content: told.append((index, content)),
        done=lambda index, outcome: done.append(index),
    )
    assert [outcome.status for outcome in outcomes] == ["finished", "crashed", "killed", "crashed", "finished"]
    assert [outcome.value for outcome in outcomes] == [2, None, None, None, 4]
    assert outcomes[1].message == "ValueError: this is the reason" and "in answer" in outcomes[1].detail
    assert outcomes[2].message == "killed by signal 9 (out of memory, most likely)"
    assert outcomes[3].message == "ended with exit code 3 and no result"
    assert sorted(told) == [(0, "half of 1"), (4, "half of 2")] and sorted(done) == [0, 1, 2, 3, 4]


def test_what_takes_too_long_is_ended():
    [outcome] = run_isolated(answer, ["sleep"], time_limit=1.0)
    assert (outcome.status, outcome.message) == ("too slow", "ended after 1 s")
    assert not multiprocessing.active_children()
