"""First on PYTHONPATH of the commands that tests start (`tests.apps.command.run`): names a process group left alive."""

import atexit
import sys

LEFT = "the process group is alive at exit: a thread of gloo may abort the process"


def _look() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        print(LEFT, file=sys.stderr, flush=True)


if __name__ == "sitecustomize":
    atexit.register(_look)  # the first that is registered, so the last that is called
