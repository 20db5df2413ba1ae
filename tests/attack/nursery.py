"""Runs commands in forks of one process that has imported everything, so that each begins at once.

Reads a line of JSON for each: argv, a limit on the size of files, where its output goes; answers with its process id,
and with its status once it ends. No tensor is computed before a fork, whose child would wait for lost threads.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading

import torch
from tokcomp import assets, visualize  # noqa: F401
from tokcomp.cli import compare as _compare_command  # noqa: F401
from tokcomp.cli import main
from tokcomp.cli.dense import tocom as _dense_tocom  # noqa: F401
from tokcomp.cli.dense import train as _dense_train  # noqa: F401
from tokcomp.compare import run as _compare  # noqa: F401
from tokcomp.dense import evaluate as _scores  # noqa: F401
from tokcomp.dense import train as _segmenters  # noqa: F401
from tokcomp.finetune import run as _finetune  # noqa: F401
from tokcomp.search import run as _search  # noqa: F401
from tokcomp.tocom import train as _tocom  # noqa: F401


def child(order: dict) -> None:
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    if order.get("fsize"):
        # Output goes through a pipe: the limit is for the files that the command writes.
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(writer)
            while some := os.read(reader, 65536):
                os.write(output, some)
            os._exit(0)
        os.close(reader)
        output = writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["fsize"], order["fsize"]))
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    try:
        status = main(order["argv"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


def wait(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        threading.Thread(target=wait, args=(pid,), daemon=True).start()
