"""What the Triton kernels of slot attention take, and in which blocks, warps and stages each is launched.

Every kernel has one function of shapes, dtype and GPU. Its table is read from the top: the first row whose condition
holds gives the blocks. Blocks are as large as was found to compile without spilling a register, no larger; the few
calls that spill all the same stand in compile_check/report.py. What reaches a kernel as a constexpr is written in
capitals; maxnreg=255 stands where ptxas would aim at 80 or 128 registers, and spill to get there.

Letters: N tokens, T queries, D channels (of a head, or of the tokens in absorbed form); full: fp32, whose products
leave the tensor cores and take their operands from registers.
"""

from typing import Any

import torch
import triton

from ..launch import KERNEL_DTYPES

MAX_KERNEL_QUERIES = 64
MAX_KERNEL_DIM = 2048
ENOUGH_PROGRAMS = 528  # two for each of up to 132 multiprocessors, twice


def supported(dtype: torch.dtype, num_queries: int, dim: int) -> str | None:
    """None if the Triton kernels take T = num_queries queries of dim channels a head; else why they do not."""
    if dtype not in KERNEL_DTYPES:
        return f"no GPU kernel for {dtype}; use slot_attention_reference or cast to float32"
    if num_queries > MAX_KERNEL_QUERIES or dim > MAX_KERNEL_DIM:
        return (
            f"T={num_queries}, channels={dim}: the GPU kernel holds at most T={MAX_KERNEL_QUERIES} queries of "
            f"{MAX_KERNEL_DIM} channels a head; use slot_attention_reference"
        )
    return None


def padded_queries(num_queries: int) -> int:
    """TP: T rounded up to a power of two, at least 16: what a product takes, and half a row of coefficients."""
    return max(16, 1 << (num_queries - 1).bit_length())


def one_pass_options(
    num_queries: int, dim: int, dtype: torch.dtype, *, normalize: str, norm: bool, return_map: bool, limit: int
) -> dict[str, Any] | None:
    """For the forward that reads tokens once (forward_one_pass.py); None where that kernel does not apply.

    limit: bytes of shared memory a program may use.
    """
    warps, spare = 8, norm or normalize == "mean"
    block_t = padded_queries(num_queries + spare)
    if dtype == torch.float32 or block_t > 32 or not 64 < dim <= 1408:
        return None
    # As little padding as possible, D = 384 as 3 x 128 and 768 as 3 x 256, but at most 4 chunks up to D = 1024.
    block_c = 128 if triton.cdiv(dim, 128) % 2 and not 512 < dim <= 1024 else 256
    chunks = triton.cdiv(dim, block_c)
    wide = chunks * block_c > 768
    if (wide and norm) or block_t * chunks * block_c > 32 * 1152:  # the sums would spill
        return None
    crowded = wide or (norm and (return_map or normalize == "mean"))  # 32 tokens would spill
    for block_n in (16,) if crowded else (32, 16):
        # Queries, two tiles of tokens (one in use, one on its way), every warp's share of the scores.
        shared = 2 * chunks * block_c * (block_t + 2 * block_n) + 4 * warps * block_t * block_n
        if shared + 1024 <= limit:
            return {
                "BLOCK_T": block_t,
                "BLOCK_N": block_n,
                "BLOCK_C": block_c,
                "CHUNKS": chunks,
                "WARPS": warps,
                "num_warps": warps,
                "num_stages": 3,
            } | ({"maxnreg": 255} if wide else {})
    return None


def general_options(
    num_queries: int, dim: int, dtype: torch.dtype, *, norm: bool, normalize: str, generation: int
) -> dict[str, Any]:
    """For the forward of any input (forward_general.py) on a GPU of compute capability `generation`.x.

    Channels beyond BLOCK_V go to further programs, which compute the scores again from tokens that are in cache then.
    """
    full = dtype == torch.float32
    extras = norm or normalize == "mean"  # statistics and the plain sum of the values live beside the accumulator
    block_t = padded_queries(num_queries)
    held = 8192 if full or extras else 16384  # outputs of a program
    block_v = min(max(32 if full else 16, triton.next_power_of_2(dim)), held // block_t)
    narrow = block_v <= 64  # room for more tokens a step
    # In full precision, 32 channels with the sum of the values beside them are too many.
    crowded = block_t == 32 and not (normalize == "mean" and not norm)
    block_n, block_d = _first(
        (full and crowded, (16, 32)),
        (full, (16, 16)),
        (narrow, (64, block_v)),
        (True, (32, 128)),
    )
    # Blackwell: Triton 3.6 puts products of 64 rows on the tensor cores, "ieee" or not, where one TF32 product has 10
    # bits; three have 21.
    precision = _first((full and block_t == 64 and generation >= 10, "tf32x3"), (full, "ieee"), (True, "tf32"))
    return {
        "PRECISION": precision,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "num_warps": 8,
        "num_stages": 2,
    } | ({"maxnreg": 255} if narrow and (full or extras) else {})


def scores_options(
    num_queries: int,
    num_tokens: int,
    dim: int,
    dtype: torch.dtype,
    *,
    separate: bool,
    norm: bool,
    extras: bool,
    grad_map: bool,
    generation: int,
) -> dict[str, Any]:
    """For the backward of the scores (backward_scores.py) on a GPU of compute capability `generation`.x.

    The scores of a block lie in registers. One block that holds all tokens of an image needs neither `out` nor partial
    sums: blocks are larger on Hopper, whose products take their operands from shared memory. Hopper, T = 20, N = 196:
    one block, unless the map has a gradient; a program fills a multiprocessor, three chunks of channels on the way.
    separate: values beside the keys. extras: bias, `mean`, gradients of mass or entropy.
    """
    full, hopper, blackwell = dtype == torch.float32, generation == 9, generation >= 10
    block_t = padded_queries(num_queries)
    plain = not (norm or extras or grad_map)
    many = num_tokens * block_t > 8192  # tokens beyond the largest block
    scores, block_d = _first(  # tokens x queries of a block; channels of a step
        (block_t == 64 and plain and not separate, (4096, 64)),
        (block_t == 64 and hopper and not grad_map, (4096, 64)),
        (block_t == 64, (2048, 32)),
        (block_t == 16 and plain and not hopper, (2048, 64)),
        (blackwell and not plain, (2048, 64)),
        (norm and grad_map and not hopper, (2048, 64)),
        (grad_map, (4096, 64)),
        (many and (norm or not hopper), (4096, 64)),
        (separate and not hopper, (4096, 64)),
        (True, (8192, 64)),
    )
    block_d = min(block_d, max(16, triton.next_power_of_2(dim)))
    if dim % 16:  # rows without alignment: an address per channel
        scores, block_d = min(scores, 2048), 16
    elif (norm or grad_map) and (dim % block_d or dim <= 16):
        scores //= 2
    smallest = 32 if block_t == 64 else 64
    block_n = max(smallest, min(triton.next_power_of_2(num_tokens), 256, scores // block_t))
    if full:
        block_n, block_d = 32, 16
    return {
        "PRECISION": "ieee" if full else "tf32",
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "ONE_BLOCK": num_tokens <= block_n,
        "ONE_CHUNK": dim <= block_d,
        "EVEN_D": dim % block_d == 0,
        "num_warps": 4 if full and block_t == 16 else 8,
        "num_stages": 4 if hopper and not separate else 3,
    } | ({"maxnreg": 255} if block_t == 16 and generation == 8 and not full else {})


def tokens_options(
    padded: int, num_tokens: int, dim: int, dtype: torch.dtype, *, one_entry: bool, norm: bool
) -> dict[str, Any]:
    """For the product of the tokens' gradient (backward_tokens.py). one_entry: one call, one head a group.

    An entry loads 64 KiB of factors a tile of 128 x 128, which larger tiles would halve and registers do not allow. The
    tokens that `norm` reads are not prefetched: smaller tiles then, of which two fit on a multiprocessor.
    """
    full, few, light = dtype == torch.float32, num_tokens <= 64, norm and one_entry
    block_n, block_d, warps = _first(
        (full and padded == 64, (64, 32, 8)),
        (full, (64, 64, 8)),
        (few and light, (64, 64, 4)),
        (few, (64, 128, 4)),
        (light, (128, 64, 8)),
        (True, (128, 128, 8)),
    )
    block_d = min(block_d, max(16, triton.next_power_of_2(dim)))
    if dim % 16:  # rows without alignment: an address per channel
        block_d = min(block_d, 32)
    return {
        "ONE_ENTRY": one_entry,
        "EVEN_D": dim % block_d == 0,
        "PRECISION": "ieee" if full else "tf32",
        "BLOCK_T": padded,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": 2 if full or padded > 32 else 3,
    }


def _first(*rows: tuple[bool, Any]) -> Any:
    """The value of the first row whose condition holds; the last row's is True."""
    return next(value for holds, value in rows if holds)
