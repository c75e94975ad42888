"""How `split_kv` cuts a call into programs: chosen from shapes and the device, not from data."""

import functools
from dataclasses import dataclass

import torch
import triton

MOST_SPLITS = 32
TILES_A_SPLIT = 4
SCRATCH = 4096  # bytes of shared memory that reductions take
MOST_SUMS = 32768  # float32 of a tile's result: 128 registers a thread of 8 warps
WIDE, WIDE_KEYS, WIDE_STAGES = 512, 32, 2  # keys a tile and stages, of such heads


@dataclass(frozen=True)
class Tiling:
    """How a call is cut up: rows and keys a tile, shares of the keys, warps and pipeline stages."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Device:
    """Multiprocessors, and the bytes of shared memory that one of them gives to a program."""

    multiprocessors: int
    shared_memory: int


H100 = Device(multiprocessors=132, shared_memory=232448)


@functools.cache
def device_limits(device: torch.device) -> Device:
    """Those of a CUDA device; an H100's for the interpreter."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    planes: int,
    packed: int,
    length: int,
    width: int,
    itemsize: int,
    masked: bool,
    device: Device,
) -> Tiling:
    """The tiling for `planes` = B * Hkv kv heads, `packed` rows each, T = `length` keys of `width`.

    A tile has 64 rows, the least that Hopper's matrix units take, or 128, and 64 keys in three
    stages: the fastest, or within 6% of it, at 8K and 32K keys of both shapes on an H100
    (benchmarks/results/tiling_h100.json).
    """
    if itemsize == 4:  # float32 is multiplied outside the tensor cores, from registers
        block_m, block_n, stages = 16, 32, 2
    else:
        block_m, block_n, stages = _rows_a_tile(packed), 64, 3
    block_d = padded(width)
    if itemsize < 4 and block_d >= WIDE:
        block_n, stages = WIDE_KEYS, WIDE_STAGES
    while block_m * block_d > MOST_SUMS and block_m > 16:
        block_m //= 2
    row_bytes = block_d * itemsize

    def shared() -> int:
        mask = 4 * block_m * block_n if masked else 0
        loop = block_m * row_bytes + stages * 2 * block_n * row_bytes + mask
        return max(loop, 4 * block_m * block_d) + SCRATCH  # the result passes through it as well

    while shared() > device.shared_memory and stages > 1:
        stages -= 1
    while shared() > device.shared_memory and block_n > 16:
        block_n //= 2
    while shared() > device.shared_memory and block_m > 16:
        block_m //= 2
    resident = min(2, device.shared_memory // shared()) or 1
    row_tiles = triton.cdiv(packed, block_m)
    most = min(MOST_SPLITS, max(1, length // (TILES_A_SPLIT * block_n)))
    splits = choose_splits(planes * row_tiles, device.multiprocessors * resident, most)
    return Tiling(block_m, block_n, splits, 8 if block_m * block_d > 8192 else 4, stages)


def _rows_a_tile(packed: int) -> int:
    """128, or 64 where that wastes a tenth less."""
    wide, narrow = triton.cdiv(packed, 128) * 128, triton.cdiv(packed, 64) * 64
    return 64 if wide > 1.1 * narrow else 128


def choose_splits(programs: int, slots: int, most: int) -> int:
    """Fewest shares whose programs fill at least 90% of the waves of `slots`, else the fullest."""

    def filled(splits: int) -> float:
        total = programs * splits
        return total / (triton.cdiv(total, slots) * slots)

    choices = range(1, most + 1)
    return next((s for s in choices if filled(s) >= 0.9), max(choices, key=filled))


def padded(width: int) -> int:
    """The head dimension as a tile has it: a power of two that a matrix unit takes."""
    return max(16, int(triton.next_power_of_2(width)))
