"""The GPUs that the kernels are compiled for, and the limits of their multiprocessors."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Target(NamedTuple):
    gpu: GPUTarget
    warps: int  # resident on a multiprocessor
    blocks: int  # resident on a multiprocessor
    registers: int  # of 32 bits on a multiprocessor
    shared: int  # bytes of shared memory on a multiprocessor
    block_shared: int  # bytes of shared memory of one block, at most
    reserved: int  # bytes of shared memory that the system takes per block
    multiprocessors: int  # of the product with the fastest memory
    clock: float  # boost clock in GHz
    bandwidth: float  # of its memory, in TB/s
    registers_step: int = 8  # registers of a thread are allocated in multiples of this

    @property
    def capability(self) -> tuple[int, int]:
        """As torch reports it, for AMD's architectures too."""
        return divmod(int(self.gpu.arch), 10) if self.is_cuda else (9, 4)

    @property
    def is_cuda(self) -> bool:
        return self.gpu.backend == "cuda"

    @property
    def instructions_per_16_bytes(self) -> float:
        """Instructions of a thread while memory delivers 16 bytes to it: a multiprocessor issues for 128 a cycle."""
        return 16 * 128 * self.multiprocessors * self.clock / self.bandwidth / 1e3

    def resident_blocks(self, warps: int, registers: int, shared: int) -> int:
        """Blocks that fit on a multiprocessor. registers: per thread; shared: bytes per block."""
        step = self.registers_step
        warp_registers = max(-(-registers // step), 1) * step * self.gpu.warp_size
        # A multiprocessor has four partitions, each with its own registers; a warp runs in one of them.
        fitting_warps = min(self.warps, self.registers // 4 // warp_registers * 4)
        return min(self.blocks, fitting_warps // warps, self.shared // max(shared + self.reserved, 1))


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's CDNA 3 ISA guide, whose
# multiprocessor ("compute unit") has four SIMDs of 8 waves and 512 registers per lane. Clocks and bandwidths are from
# the data sheets: A100 80 GB, RTX 3090 Ti, RTX 4090, H200, B200, MI300X.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 64, 32, 65536, 164 << 10, 163 << 10, 1024, 108, 1.41, 2.04),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 48, 16, 65536, 100 << 10, 99 << 10, 1024, 84, 1.86, 1.01),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 48, 24, 65536, 100 << 10, 99 << 10, 1024, 128, 2.52, 1.01),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 64, 32, 65536, 228 << 10, 227 << 10, 1024, 132, 1.78, 4.8),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 64, 32, 65536, 228 << 10, 227 << 10, 1024, 148, 1.96, 8.0),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 32, 16, 131072, 64 << 10, 64 << 10, 0, 304, 2.1, 5.3),
}
