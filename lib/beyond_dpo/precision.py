"""Which precisions this machine computes itself.

bfloat16 on a CPU without the instructions takes 30 times as long as float32.
"""

import functools
import re
from pathlib import Path

CPUINFO = "/proc/cpuinfo"  # where Linux lists what the processor can do
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86-64, the same with tiles, ARM


@functools.cache
def computes_bf16(cpuinfo: str) -> bool:
    """Return whether the processor that a `cpuinfo` file describes multiplies bfloat16 itself.

    True also where the file is missing or lists no flags: then nothing is known against it.
    """
    file = Path(cpuinfo)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is None or not BF16_FLAGS.isdisjoint(flags[1].split())


def require_precision(precision: str) -> None:
    """Raise ValueError for an unknown precision, or "bf16" where this machine would emulate it.

    On an AVX2 processor bfloat16 products were measured to take 30 times as long as float32.
    """
    import torch

    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision must be bf16 or fp32, got {precision!r}")
    if precision == "bf16" and not torch.cuda.is_available() and not computes_bf16(CPUINFO):
        raise ValueError(
            'precision "bf16" needs a GPU, or a CPU with AVX512_BF16 or AMX; this one would emulate'
            ' it, at a thirtieth of the speed of float32: set precision to "fp32"'
        )
