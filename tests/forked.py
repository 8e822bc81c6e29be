"""tenpak in real processes that are killed, interrupted, or run out of disk: started within milliseconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

__all__ = ["Forked", "forked"]

# Imports everything once and then forks a process for every line of JSON that it reads; that one runs tenpak, over and
# over where it is to be killed, so that signals come in the middle of the work. Replies with exit code and stderr.
FORKER = """
import json, os, resource, signal, sys, time, traceback
import tenpak, tenpak.cli, tenpak.pipeline, transformers.models.llama.modeling_llama
application = tenpak.cli.application
verbs = application.app
for line in sys.stdin:
    order = json.loads(line)
    ready, tell = os.pipe()
    errors, told = os.pipe()  # not a file, whose size may be limited; a few lines fit
    pid = os.fork()
    if pid == 0:
        os.dup2(told, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        def app():
            os.write(tell, b".")
            if order["limit"] is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"],) * 2)
            verbs(standalone_mode=False)
            while order["signal"] and order["repeat"]:
                verbs(standalone_mode=False)
        application.app = app
        sys.argv[1:] = order["arguments"]
        try:
            application.main()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(70)
    os.close(tell)  # so that a process that dies early ends the wait
    os.close(told)
    os.read(ready, 1)
    if order["signal"]:
        time.sleep(order["delay"])
        os.kill(pid, order["signal"])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, os.read(errors, 65536).decode()]), flush=True)
    os.close(ready)
    os.close(errors)
"""

Forked = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    """``forked(*arguments, number=signal, delay=seconds, limit=bytes, repeat=…)`` → exit code and stderr."""
    command = [sys.executable, "-c", FORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(
            *arguments: object, number: int = 0, delay: float = 0, limit: int | None = None, repeat: bool = True
        ) -> tuple[int, str]:
            order = {
                "arguments": [*map(str, arguments)], "signal": number, "delay": delay, "limit": limit, "repeat": repeat
            }  # fmt: skip
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            code, error = json.loads(process.stdout.readline())
            return code, error

        yield run
        process.stdin.close()
