"""Starts training processes quickly: imports everything once, then forks a child for each process of each order.

An order is a line of JSON on stdin, its result a line on stdout. A child runs the command's own ``main``, and is killed
as any process is, so that a test can afford many starts and kills. See ``Runner`` in conftest.py for the fields.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback

# Imported before the forks: what a run would import, and torch with its first optimizer.
import numpy.random  # noqa: F401
import safetensors.torch  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import palimpsest.train.loop  # noqa: F401
from palimpsest.train.__main__ import main

LIMIT = 150.0


def child(order: dict, rank: int, port: int) -> int:
    """One training process; its output goes to the order's log."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order["cwd"])
    if order["processes"] > 1:
        count = str(order["processes"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    exec(order["prelude"], {"rank": rank})
    return main(order["arguments"])


def fork(order: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = child(order, rank, port)
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def carry_out(order: dict) -> dict:
    """Start the processes, signal them as ordered, and wait for all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.monotonic()
    running = {fork(order, rank, port): rank for rank in range(order["processes"])}
    codes = [0] * order["processes"]
    signalled = order["signal"] is None
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                if os.WIFSIGNALED(status):  # as torchrun does: one killed, all killed
                    for other in running:
                        os.kill(other, signal.SIGKILL)
        if not signalled and time.monotonic() - begin >= order["after"] and seen(order):
            for pid in running:
                os.kill(pid, order["signal"])
            signalled = True
        if time.monotonic() - begin > LIMIT:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return {"codes": codes, "seconds": time.monotonic() - begin}


def seen(order: dict) -> bool:
    if not order["when"]:
        return True
    if not os.path.exists(order["log"]):
        return False
    with open(order["log"]) as file:
        return order["when"] in file.read()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(carry_out(json.loads(line))) + "\n")
        answers.flush()
