"""What is known of each optimizer class, as a plain table, and stand-ins for the classes.

Written down from the code of release 0.4.0 by running it, so that a change of the catalog that changes a fact is seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MODULES = {
    "torch": "torch.optim.some",
    "deepspeed": "deepspeed.ops.some",
    "apex": "apex.optimizers.some",
    "transformer_engine": "transformer_engine.pytorch.optimizers.some",
    "pytorch_optimizer": "pytorch_optimizer.optimizer.some",
    "bitsandbytes": "bitsandbytes.optim.some",
    "elsewhere": "elsewhere.some",
}
"""Column "elementwise in" -> a module of that package."""

REASONS = {
    "lr": "its step is not proportional to lr",
    "own rate": "it finds its own rate",
    "other weights": "the weights that it steps are not those that the model has",
    "min rate": "torch's takes min(lr, 1/sqrt(t)) for the rate, which is not proportional to lr",
    "snr rate": "it sets a rate for each tensor from its gradient's signal-to-noise ratio itself",
    "1-bit": "its step communicates and freezes the variance",
}
"""Column "refused" -> the words of the message."""

TABLE = """
class               | elementwise in  | counter| reads   | two betas | refused
Adadelta            | torch           |        |         | adam      |
AdaFactor           |                 |        | tensors |           |
Adafactor           |                 |        | tensors | adam      | min rate
AdaGO               |                 |        | tensors |           |
Adagrad             | torch           |        |         | adam      |
Adam                | torch           |        |         | adam      |
Adam_mini           |                 |        | tensors |           |
Adamax              | torch           |        |         |           |
AdamMini            |                 |        | tensors |           |
AdaMuon             |                 |        | tensors |           |
AdamW               | torch           |        |         | adam      |
AdamW8bit           |                 |        |         | adam      |
AdamWScheduleFree   |                 |        |         | adam      | other weights
APOLLO              |                 |        | tensors |           |
Apollo              |                 |        | tensors |           |
APOLLOAdamW         |                 |        | tensors |           |
ASGD                |                 |        |         | adam      | lr
CAME                |                 |        | tensors |           |
Conda               |                 |        | tensors |           |
CpuFusedAdam        |                 |        |         | adam      |
DAdaptAdam          |                 |        |         | adam      | own rate
DAdaptLion          |                 |        |         |           | own rate
DAdaptSGD           |                 |        |         | adam      | own rate
DeepSpeedCPUAdagrad | deepspeed       |        |         | adam      |
DeepSpeedCPUAdam    | deepspeed       |        |         | adam      |
DeepSpeedCPULion    | deepspeed       |        |         |           |
DistributedMuon     |                 |        | tensors |           |
Fira                |                 |        | tensors |           |
Fromage             |                 |        | tensors |           |
FusedAdagrad        | apex            |        |         | adam      |
FusedAdam           | deepspeed apex  | shared |         | adam      |
FusedLamb           |                 |        | tensors | adam      |
FusedLion           | deepspeed       | shared |         |           |
FusedSGD            | apex            |        |         | adam      |
GaLore              |                 |        | tensors |           |
GaLoreAdamW         |                 |        | tensors |           |
Kron                |                 |        | tensors |           |
LAMB                |                 |        | tensors | adam      |
Lamb                |                 |        | tensors | adam      |
LARS                |                 |        | tensors |           |
LBFGS               |                 |        |         | adam      | lr
Lion                | pytorch_optimizer|        |         |           |
Muon                |                 |        | tensors |           |
MuonClip            |                 |        | tensors |           |
NAdam               | torch           |        |         | adam      |
Nero                |                 |        | tensors |           |
NorMuon             |                 |        | tensors |           |
NovoGrad            |                 |        | tensors |           |
OneBitAdam          |                 |        |         | adam      | 1-bit
OneBitLamb          |                 |        |         | adam      | 1-bit
Prodigy             |                 |        |         | adam      | own rate
PSGD                |                 |        | tensors |           |
RAdam               | torch           |        |         | adam      |
RMSprop             | torch           |        |         | adam      |
Rprop               |                 |        |         | adam      | lr
ScalableShampoo     |                 |        | tensors |           |
ScheduleFreeAdamW   |                 |        |         | adam      | other weights
ScheduleFreeRAdam   |                 |        |         | adam      | other weights
ScheduleFreeSGD     |                 |        |         | adam      | other weights
Scion               |                 |        | tensors |           |
SGD                 | torch           |        |         | adam      |
SGDSaI              |                 |        | tensors | adam      | snr rate
SGDScheduleFree     |                 |        |         | adam      | other weights
SGG                 |                 |        |         | adam      |
Shampoo             |                 |        | tensors |           |
ShardedAdamMini     |                 |        |         |           |
ShardedLamb         |                 |        |         | adam      |
SM3                 |                 |        | tensors |           |
SOAP                |                 |        | tensors |           |
SPlus               |                 |        | tensors |           |
ZeroOneAdam         |                 |        |         | adam      | 1-bit
"""
"""Reads "tensors": whole parameters. Two betas "adam": they mean Adam's moments in exp_avg and exp_avg_sq."""


class Facts(NamedTuple):
    """One row of the table."""

    name: str
    elementwise_in: tuple[str, ...]
    shared_counter: bool
    reads_tensors: bool
    adam_moments: bool
    refused: str


def _facts(line: str) -> Facts:
    name, packages, counter, reads, moments, refused = (part.strip() for part in line.split("|"))
    return Facts(
        name, tuple(packages.split()), bool(counter), bool(reads), bool(moments), REASONS[refused] if refused else ""
    )


CLASSES = [_facts(line) for line in TABLE.strip().splitlines()[1:]]


def stand_in(name: str, package: str = "elsewhere", **group: Any) -> Any:
    """An optimizer without parameters, of a class of this name from this package, with these settings."""
    own = {"__module__": MODULES[package], "step": lambda self: None, "param_groups": [{"params": [], **group}]}
    return type(name, (), own)()
