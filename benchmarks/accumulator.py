"""How fast the statistics take in a gradient, as a share of this machine's copy bandwidth, from one interleaved run.

    python benchmarks/accumulator.py --numel 32M --threads 1 2 --dtype float32

One update reads the gradient and reads and writes the mean and the squared deviations: 20 bytes an element in fp32
(18 with a 16-bit gradient, which is what is counted then). The yardstick is torch's copy_ of an array that no cache
holds, 8 bytes an element. Each repetition times a copy, an update as in training, and an update that is not split
into cache-sized chunks, one after the other. As STREAM does, bandwidths are those of the fastest repetition, which
another process on the machine slows least; the median of the ratios within the repetitions is next to them.
Target: 0.8 or more. More threads than idle cores measure the waiting of threads for each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from mols_ds.core.accumulators import Accumulators
from mols_ds.core.layout import ElementLayout
from mols_ds.core.ranges import ShardRange
from mols_ds.core.subsample import Subsample, choose
from mols_ds.core.welford import welford

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGET = 0.8


def count(text: str) -> int:
    """An element count such as 500000, 512k or 32M (powers of 1,024)."""
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    unit = units.get(text[-1:].lower(), 1)
    number = text[:-1] if unit > 1 else text
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an element count such as 500000, 512k or 32M")
    return int(number) * unit


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(numel: int, dtype: torch.dtype, device: torch.device, repeats: int) -> None:
    """Print bandwidths and ratios for one setting."""
    gradient = torch.randn(numel, device=device).to(dtype)
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    owned, layouts = [ShardRange("w", 0, 0, numel)], {"w": ElementLayout.whole("vo")}
    kept = Subsample(*choose(owned, layouts, ("vo",)), device, torch.float32)
    moments = Accumulators(numel, device=device, kept=kept)
    whole_mean, whole_m2 = torch.zeros(numel, device=device), torch.zeros(numel, device=device)

    def sample() -> None:
        moments.open()
        moments.update(0, gradient)
        moments.close()

    def unchunked() -> None:
        welford(whole_mean, whole_m2, gradient.to(torch.float32), 5)

    for _ in range(2):  # the first sample is a copy, and pages are touched
        sample()
        unchunked()
        target.copy_(source)
    copies, updates, wholes = [], [], []
    for _ in range(repeats):
        copies.append(8 * numel / seconds(partial(target.copy_, source), device))
        updates.append((16 + gradient.element_size()) * numel / seconds(sample, device))
        wholes.append((16 + gradient.element_size()) * numel / seconds(unchunked, device))
    copy, update, whole = max(copies), max(updates), max(wholes)
    median = statistics.median(u / c for u, c in zip(updates, copies, strict=True))
    ratio = update / copy
    print(
        f"{device.type} {str(dtype).removeprefix('torch.')} threads={torch.get_num_threads()} numel={numel:,}: "
        f"copy {copy / 1e9:.1f} GB/s, update {update / 1e9:.1f} GB/s, unchunked {whole / 1e9:.1f} GB/s; "
        f"update/copy {ratio:.2f} ({'meets' if ratio >= TARGET else 'MISSES'} {TARGET}; median {median:.2f}), "
        f"unchunked/copy {whole / copy:.2f}"
    )


def main() -> None:
    """Parse the arguments and measure every combination of threads and dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=count, default=count("32M"), help="elements; 5 arrays of 4 bytes each (32M)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch thread counts to try (1)")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["float32"], help="gradient dtypes")
    parser.add_argument("--device", default="cpu", help="where gradients and accumulators live (cpu)")
    parser.add_argument("--repeats", type=int, default=11, help="interleaved repetitions (11)")
    arguments = parser.parse_args()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.dtype:
            measure(arguments.numel, DTYPES[name], torch.device(arguments.device), arguments.repeats)


if __name__ == "__main__":
    main()
