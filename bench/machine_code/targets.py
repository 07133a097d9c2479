"""The GPUs that every kernel is compiled for, and what one multiprocessor of each can hold."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Target(NamedTuple):
    gpu: GPUTarget
    warps: int  # resident on a multiprocessor
    blocks: int  # resident on a multiprocessor
    registers: int  # of 32 bits on a multiprocessor
    shared: int  # bytes of shared memory on a multiprocessor
    block_shared: int  # bytes of shared memory that one block may have
    reserved: int  # bytes of shared memory that the system takes for each block
    multiprocessors: int  # of the product with the fastest memory
    clock: float  # its GHz, boosted
    bandwidth: float  # its memory's TB/s
    registers_step: int = 8  # a thread's registers come in multiples of this

    @property
    def capability(self) -> tuple[int, int]:
        """As torch reports it; AMD's architectures have one too."""
        return divmod(int(self.gpu.arch), 10) if self.is_cuda else (9, 4)

    @property
    def is_cuda(self) -> bool:
        return self.gpu.backend == "cuda"

    @property
    def instructions_per_16_bytes(self) -> float:
        """What its threads can do while its memory brings 16 bytes: a multiprocessor issues for 128 threads a cycle."""
        return 16 * 128 * self.multiprocessors * self.clock / self.bandwidth / 1e3

    def resident_blocks(self, warps: int, registers: int, shared: int) -> int:
        """Blocks of so many warps, registers a thread and bytes of shared memory that fit a multiprocessor together."""
        step = self.registers_step
        warp_registers = max(-(-registers // step), 1) * step * self.gpu.warp_size
        # A multiprocessor is four parts, and a warp lives in one.
        fitting_warps = min(self.warps, self.registers // 4 // warp_registers * 4)
        return min(self.blocks, fitting_warps // warps, self.shared // max(shared + self.reserved, 1))


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's CDNA 3 ISA guide, whose
# multiprocessor ("compute unit") has four SIMDs of 8 waves and 512 registers a lane. Clocks and memory are those of the
# data sheets: A100 80 GB, RTX 3090 Ti, RTX 4090, H200, B200, MI300X.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 64, 32, 65536, 164 << 10, 163 << 10, 1024, 108, 1.41, 2.04),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 48, 16, 65536, 100 << 10, 99 << 10, 1024, 84, 1.86, 1.01),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 48, 24, 65536, 100 << 10, 99 << 10, 1024, 128, 2.52, 1.01),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 64, 32, 65536, 228 << 10, 227 << 10, 1024, 132, 1.78, 4.8),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 64, 32, 65536, 228 << 10, 227 << 10, 1024, 148, 1.96, 8.0),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 32, 16, 131072, 64 << 10, 64 << 10, 0, 304, 2.1, 5.3),
}
