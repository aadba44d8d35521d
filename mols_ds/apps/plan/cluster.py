"""The machines of a plan, from a YAML file (configs/clusters/*.yaml) or from numbers on the command line."""

from __future__ import annotations

import argparse
import contextlib
from typing import Annotated, Literal

from pydantic import ByteSize, Field, TypeAdapter, ValidationError

from mols_ds.core.json_types import JsonObject
from mols_ds.core.validation import Frozen, validation_message
from mols_ds.errors import MolsConfigError
from mols_ds.training.yaml_text import read_yaml

Positive = Annotated[float, Field(gt=0)]
GIB = 2**30
GB = 10**9


class Cluster(Frozen):
    """Equal nodes. Vendors' figures are nominal; a real link or chip reaches less.

    Units: GiB = 2^30 bytes, GB/s = 10^9 bytes a second, in one direction; TFLOP/s = 10^12 operations a second.
    """

    name: str = "cluster"
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the ranks. cpu: Megatron-core uses its own layers instead of Transformer Engine's."""
    nodes: Annotated[int, Field(ge=1)] = 1
    accelerators: Annotated[int, Field(ge=1)] = 8
    """Accelerators per node."""
    memory_gib: Positive
    """Memory of one accelerator."""
    usable_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of it that tensors may fill. The rest is for the driver's context, NCCL's buffers and fragmentation."""
    host_memory_gib: Positive = 1024.0
    """Host memory per node, shared by its ranks."""
    nvme_gib: Annotated[float, Field(ge=0)] = 0.0
    """NVMe per node."""
    intra_node_gbs: Positive = 300.0
    """Bandwidth from one accelerator to the others of its node."""
    inter_node_gbs: Positive = 50.0
    """Bandwidth from one accelerator to other nodes: the node's network divided by its accelerators."""
    host_link_gbs: Positive = 25.0
    """Bandwidth from one accelerator to its host."""
    memory_gbs: Positive = 2000.0
    """Bandwidth of one accelerator's memory, reads and writes together."""
    host_memory_gbs: Positive = 200.0
    """Bandwidth of one node's host memory, reads and writes together, shared by its ranks."""
    fp32_tflops: Positive = 19.5
    bf16_tflops: Positive = 312.0
    fp8_tflops: Positive | None = None
    """Peak rates of dense matrix products; fp8 None: the hardware has no fp8."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Expected share of the peak that a whole training step reaches, including communication."""

    @property
    def ranks(self) -> int:
        """Number of ranks: one per accelerator."""
        return self.nodes * self.accelerators

    @property
    def limit(self) -> int:
        """Bytes of one accelerator that tensors may fill."""
        return int(self.memory_gib * GIB * self.usable_share)

    @property
    def host_limit(self) -> int:
        """Bytes of host memory that one rank may fill."""
        return int(self.host_memory_gib * GIB * self.usable_share / self.accelerators)

    @property
    def nvme_limit(self) -> int:
        """Bytes of NVMe that one rank may fill."""
        return int(self.nvme_gib * GIB / self.accelerators)

    @classmethod
    def parse(cls, values: JsonObject, where: str) -> Cluster:
        """Validate `values`. Raises MolsConfigError with one line that names every wrong key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise MolsConfigError(f"{where}: {validation_message(error, cls)}") from None


def read_cluster(path: str) -> JsonObject:
    """Read a cluster file. Raises MolsConfigError if it is missing or not a YAML mapping."""
    content = read_yaml(path, f"cluster {path}")
    if not isinstance(content, dict):
        raise MolsConfigError(f"cluster {path}: keys and values are needed, not {type(content).__name__}")
    return content


def gib(text: str) -> float:
    """Parse a size such as 80GiB, 80GB or 80 (GiB) into GiB. Raises argparse.ArgumentTypeError."""
    size = 0
    with contextlib.suppress(ValidationError):
        size = TypeAdapter(ByteSize).validate_python(text if text.strip()[-1:].isalpha() else f"{text}GiB")
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GiB or 80GB")
    return size / GIB
