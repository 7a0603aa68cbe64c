"""What the GPUs can do at most: arithmetic and memory per second, and what a multiprocessor holds.

Peaks are dense, at boost clock, from the makers' data sheets:

- A100 80GB SXM: NVIDIA A100 data sheet (2021). H100 and H200 SXM: NVIDIA H100 and H200 data sheets, whose tensor
  figures are with sparsity and halved here. B200: NVIDIA HGX B200 data sheet (2024), per GPU, halved likewise.
- RTX 4090: NVIDIA Ada architecture white paper 2.1, appendix A; tensor figures with float32 accumulation.
- Multiprocessors, registers, shared memory, resident warps and blocks: CUDA C++ programming guide, table "Technical
  specifications per compute capability"; 1 KiB of shared memory per block is the system's.

No card holds its data-sheet clock in long products. ``reached`` are the shares of the two peaks that the best public
kernels reach, where somebody measured them (H200: 790 TFLOP/s in bfloat16, 4.3 TB/s); the floor uses these.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

from ..op import Cost

REGISTERS = 65536  # of 32 bits, in a multiprocessor of every architecture here
SYSTEM_SHARED = 1024  # bytes per block
GB = 10**9  # as the data sheets count memory; a card shows its programs up to a few per cent more


@dataclass(frozen=True)
class Multiprocessor:
    """What one streaming multiprocessor holds at once; bytes for shared memory, columns for tensor memory."""

    warps: int
    blocks: int
    shared: int
    tensor_memory: int = 0


#: By compute capability, major * 10 + minor.
MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared=164 * 1024),
    89: Multiprocessor(warps=48, blocks=24, shared=100 * 1024),
    90: Multiprocessor(warps=64, blocks=32, shared=228 * 1024),
    100: Multiprocessor(warps=64, blocks=32, shared=228 * 1024, tensor_memory=512),
}


@dataclass(frozen=True)
class Gpu:
    """Peaks in FLOP/s (``half``: bfloat16 and float16 products; ``tf32``: float32 products in tf32; ``vector``:
    float32 outside of the matrix units) and bytes/s; second-level cache and memory (``capacity``) in bytes."""

    name: str
    arch: int
    multiprocessors: int
    half: float
    tf32: float
    vector: float
    memory: float
    cache: int
    capacity: int
    reached: tuple[float, float] = (1.0, 1.0)

    def peak(self, bits: int) -> float:
        """FLOP/s of matrix products on operands of ``bits``, as far as ``reached``."""
        return (self.half if bits <= 16 else self.tf32) * self.reached[0]

    @property
    def bandwidth(self) -> float:
        """Bytes/s, as far as ``reached``."""
        return self.memory * self.reached[1]

    def floor(self, cost: Cost, bits: int) -> tuple[float, str]:
        """The least seconds that a cost takes, and what bounds it: ``compute`` or ``memory``."""
        compute, memory = cost.flops / self.peak(bits), cost.bytes / self.bandwidth
        return max(compute, memory), "compute" if compute >= memory else "memory"


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 312e12, 156e12, 19.5e12, 2.039e12, 40 << 20, 80 * GB),
        Gpu("RTX4090", 89, 128, 165.2e12, 82.6e12, 82.6e12, 1.008e12, 72 << 20, 24 * GB),
        Gpu("H100", 90, 132, 989.4e12, 494.7e12, 66.9e12, 3.35e12, 50 << 20, 80 * GB),
        Gpu("H200", 90, 132, 989.4e12, 494.7e12, 66.9e12, 4.8e12, 50 << 20, 141 * GB, (790 / 989.4, 4.3 / 4.8)),
        Gpu("B200", 100, 148, 2250e12, 1125e12, 75e12, 8.0e12, 126 << 20, 180 * GB),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, be it the table's or what the driver calls the card (``NVIDIA H200``).

    Raises:
        ValueError: when the table has none.
    """
    plain = "".join(name.upper().split())
    slower = any(mark in plain for mark in ("PCIE", "NVL", "40GB", "GH200", "GB200", "LAPTOP", "4090D"))
    for key, gpu in GPUS.items():
        if key in plain and not slower:
            return gpu
    raise ValueError(f"gpu was {name!r}; it must be one of {sorted(GPUS)}, or the name of such a card, in SXM form")


def occupancy(arch: int, *, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> tuple[int, str]:
    """Blocks that a multiprocessor holds at once, and what limits them.

    Registers are given to a warp in units of 256, shared memory in units of 128 bytes. 0 blocks: it cannot be launched.
    """
    room = MULTIPROCESSORS[arch]
    per_warp = 256 * ceil(max(registers, 1) * 32 / 256)
    limits: dict[str, Any] = {
        "registers": REGISTERS // per_warp // warps,
        "shared memory": room.shared // (128 * ceil(shared / 128) + SYSTEM_SHARED),
        "warps": room.warps // warps,
        "blocks": room.blocks,
    }
    if tensor_memory:
        limits["tensor memory"] = room.tensor_memory // tensor_memory
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit
