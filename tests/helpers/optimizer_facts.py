"""Known facts about each optimizer class as a plain table, and test doubles of the classes.

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
    "average": "it moves the weights to an average of past ones",
    "two steps": "it steps twice in a batch, once away from the weights",
    "hooks": "its step does nothing: hooks step each weight in the backward pass",
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
Adamax              | torch           |        |         |           |
Adam_mini           |                 |        | tensors |           |
AdamMini            |                 |        | tensors |           |
AdaMuon             |                 |        | tensors |           |
AdamW               | torch           |        |         | adam      |
AdamW8bit           |                 |        |         | adam      |
AdamWScheduleFree   |                 |        |         | adam      | other weights
APOLLO              |                 |        | tensors |           |
Apollo              |                 |        | tensors |           |
APOLLOAdamW         |                 |        | tensors |           |
ASGD                |                 |        |         | adam      | lr
BSAM                |                 |        |         | adam      | two steps
CAME                |                 |        | tensors |           |
Conda               |                 |        | tensors |           |
CpuFusedAdam        |                 |        |         | adam      |
DAdaptAdaGrad       |                 |        |         | adam      | own rate
DAdaptAdam          |                 |        |         | adam      | own rate
DAdaptAdan          |                 |        |         | adam      | own rate
DAdaptLion          |                 |        |         |           | own rate
DAdaptSGD           |                 |        |         | adam      | own rate
DeepSpeedCPUAdagrad | deepspeed       |        |         | adam      |
DeepSpeedCPUAdam    | deepspeed       |        |         | adam      |
DeepSpeedCPULion    | deepspeed       |        |         |           |
DistributedMuon     |                 |        | tensors |           |
Fira                |                 |        | tensors |           |
FriendlySAM         |                 |        |         | adam      | two steps
Fromage             |                 |        | tensors |           |
FusedAdagrad        | apex            |        |         | adam      |
FusedAdam           | deepspeed apex  | shared |         | adam      |
FusedLamb           |                 |        | tensors | adam      |
FusedLion           | deepspeed       | shared |         |           |
FusedSGD            | apex transformer_engine |        |         | adam      |
GaLore              |                 |        | tensors |           |
GaLoreAdamW         |                 |        | tensors |           |
GSAM                |                 |        |         | adam      | two steps
Kron                |                 |        | tensors |           |
LAMB                |                 |        | tensors | adam      |
Lamb                |                 |        | tensors | adam      |
LARS                |                 |        | tensors |           |
LayerWiseDummyOptimizer|                 |        |         | adam      | hooks
LBFGS               |                 |        |         | adam      | lr
Lion                | pytorch_optimizer|        |         |           |
Lookahead           |                 |        |         | adam      | average
LookSAM             |                 |        |         | adam      | two steps
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
Ranger              |                 |        |         | adam      | average
Ranger21            |                 |        |         | adam      | average
RMSprop             | torch           |        |         | adam      |
Rprop               |                 |        |         | adam      | lr
SAM                 |                 |        |         | adam      | two steps
ScalableShampoo     |                 |        | tensors |           |
ScheduleFreeAdamW   |                 |        |         | adam      | other weights
ScheduleFreeRAdam   |                 |        |         | adam      | other weights
ScheduleFreeSGD     |                 |        |         | adam      | other weights
ScheduleFreeWrapper |                 |        |         | adam      | other weights
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
TRAC                |                 |        |         | adam      | own rate
WSAM                |                 |        |         | adam      | two steps
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
