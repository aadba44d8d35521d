"""First on PYTHONPATH of the commands that tests start (`tests.apps.command.run`): names a process group left alive."""

import atexit
import os
import sys

LEFT = "the process group is alive at exit: a thread of gloo may abort the process"


def _look() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        os.write(2, f"{LEFT}\n".encode())  # at once: another rank may write its line


if __name__ == "sitecustomize":
    atexit.register(_look)  # the first that is registered, so the last that is called
