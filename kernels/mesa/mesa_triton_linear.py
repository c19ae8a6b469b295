# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the projections of a layer without gradients, with what surrounds them.

`launch_norm_linears` is RMSNorm, then projections that share it, `launch_add_linear` projection and residual addition,
`launch_norm_gated_linears` RMSNorm, gate and up projection, `silu(gate) * up`. Importing this needs triton.

With at most FEW_ROWS rows, reading weights is all that counts, and each is one kernel. Sums are float32. Every value
that the torch modules round to the dtype of the activations is rounded here too, in the same places: the norm's
output, each projection's (but for those asked for in float32), SiLU's, the product's. What differs from torch is the
order of the sums. That order depends neither on the number of rows nor on what the others hold: a row gives the same
bits in every batch of so few.

With more rows, torch's matrix products pay. Around them stand kernels: the norm together with the projections of few
outputs and a copy of the residual, and the gating; a residual is added before the sum is rounded.

Dimensions: B rows, K input size, N output size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .mesa_layers import FEW_ROWS, MANY_ROWS
from .mesa_library import NAMESPACE
from .mesa_triton_helpers import ceil_div, round_to_power_of_two
from .mesa_triton_layers import launch_head_norm, within

try:  # in a try block, so that an export of the model does not list triton as required
    import triton
    import triton.language as tl
except ImportError:
    raise

# The interpreter multiplies bfloat16 matrices as if they held integers.
INTERPRETED = triton.knobs.runtime.interpret


class Blocks(NamedTuple):
    """How a program computes `rows` outputs, of each of two weights where there are two.

    With `slices`, on tensor cores (16-bit weights): a warp takes one of `slices` pieces of `width` inputs a step, the
    steps are loaded `stages - 1` ahead into shared memory, and the warps' sums are added at the end. The bytes under
    way are `2 * rows * slices * width * (stages - 1)` a program; some 40 kB a multiprocessor keep the memory busy.

    Without, in plain arithmetic (any dtype): `stages` pieces of `width` inputs are loaded into registers at once by
    `warps` warps. That starts fastest, but multiplies every weight once for every row of the batch.

    `ahead`: a program first asks for all of its weights to be brought into the L2 cache. They are then on their way
    while it waits for its inputs and their norm, and whatever the number of stages.

    `overlap` (compute capability 9.0): a program may start while the launch before it ends, and with `ahead` asks for
    its weights meanwhile. Nothing is read before that launch has ended: the L2 cache may know weights early, as it
    notices when they change.
    """

    rows: int
    slices: int
    width: int
    stages: int
    warps: int
    ahead: bool = False
    overlap: bool = False


# Tensor cores take 16 rows of weights at a time, and 64 inputs are a line of 128 bytes. N = 1536 are 96 programs of 48
# kB each (K = 1536). All fit the 99 kB of shared memory of compute capability 8.6 and 8.9, two weights included.
TENSOR = Blocks(rows=16, slices=4, width=64, stages=4, warps=4)
# In registers, 6 kB a warp at K = 1536; 16-bit weights and few rows.
REGISTERS = Blocks(rows=4, slices=0, width=512, stages=3, warps=4)
FLOAT32 = Blocks(rows=4, slices=0, width=256, stages=6, warps=4)

# What the launches of a layer take: kind of launch, bytes of a weight. One entry for all batches: then a row's bits do
# not depend on the batch. `benchmarks/decode_linears.py` times these and others: on an H200 a layer's four launches
# take 30 us at batch 1 and 33 us at batch 8 (torch's operators 72 and 75), with `ahead` 35 and 38.
TABLE = {
    ("norm_linears", 2): TENSOR,
    ("add_linear", 2): TENSOR._replace(stages=6),
    ("norm_gated_linears", 2): TENSOR,
    ("norm_linears", 4): FLOAT32,
    ("add_linear", 4): FLOAT32,
    ("norm_gated_linears", 4): FLOAT32,
}


# From MANY_ROWS rows on, a program of the norm takes so many of them, and so many inputs at a time.
TILE_ROWS, TILE_WIDTH = 16, 256


@triton.jit
def bring(weight, rows_left, K: tl.constexpr, ROWS: tl.constexpr):
    """Ask for the rows of a program to be brought into the L2 cache, without waiting for them."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # 128 bytes
    output = tl.minimum(tl.arange(0, ROWS), rows_left - 1)[:, None]
    line = tl.arange(0, 32)[None, :] * LINE
    for first in tl.static_range(0, K, 32 * LINE):
        address = (weight + output * K + tl.minimum(first + line, K - 1)).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def begin(
    first_weight,
    second_weight,
    rows_left,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What a program does before it reads anything, as `Blocks` says."""
    if AHEAD:
        bring(first_weight, rows_left, K, ROWS)
        if second_weight is not None:
            bring(second_weight, rows_left, K, ROWS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        # Only now, so that the launch after this one finds all before this one ended.
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def inverse_rms(x, row, inside, epsilon, K: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr):
    """`1 / sqrt(mean(x^2) + epsilon)` `[B]` of the rows `row` `[B]` of `x` `[.., K]`.

    COLUMNS is as many as all threads load at once: a row is then summed in the same order whatever B is.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([B, COLUMNS], dtype=tl.float32)
    for first in tl.static_range(0, K, COLUMNS):
        here = inside[:, None] & (first + column < K)
        values = tl.load(x + row[:, None] * K + first + column, mask=here, other=0.0).to(tl.float32)
        total = tl.fma(values, values, total)
    return tl.rsqrt(tl.sum(total, 1) / K + epsilon)


@triton.jit
def load_weights(weight, offset, in_rows, k, first, K: tl.constexpr, STEP: tl.constexpr):
    """A tile of weights at inputs `first + k`, zeros outside."""
    inside = in_rows
    if K % STEP != 0:
        inside = in_rows & (first + k < K)
    return tl.load(weight + offset + first, mask=inside, other=0.0)


@triton.jit
def tensor_core_product(
    x,
    norm_weight,
    first_weight,
    second_weight,
    rows_left,
    batch,
    epsilon,
    K: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Outputs `[ROWS, PADDED]` in float32 of one or two (else the second is the first) weights.

    B is `batch` rounded up to a power of two, PADDED what tensor cores take.
    """
    STEP: tl.constexpr = SLICES * WIDTH
    k = tl.arange(0, SLICES)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    output = tl.arange(0, ROWS)[None, :, None]
    offset, in_rows = output * K + k, output < rows_left
    # Normalised rows are computed once, and repeated for the tensor cores; others go there straight from memory.
    COUNT: tl.constexpr = PADDED if norm_weight is None else B
    row = tl.arange(0, COUNT)
    in_batch = row < batch
    if norm_weight is not None:
        rstd = inverse_rms(x, row, in_batch, epsilon, K, COUNT, 256 * SLICES)[None, :, None]
    first_total = tl.zeros([SLICES, ROWS, PADDED], dtype=tl.float32)
    second_total = first_total
    for first in tl.range(0, K, STEP, num_stages=STAGES):
        weights = load_weights(first_weight, offset, in_rows, k, first, K, STEP)
        here = in_batch[None, :, None]
        if K % STEP != 0:
            here = here & (first + k < K)
        values = tl.load(x + row[None, :, None] * K + k + first, mask=here, other=0.0)
        if norm_weight is not None:
            scale = tl.load(norm_weight + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            values = (values.to(tl.float32) * rstd * scale).to(weights.dtype)
            if COUNT != PADDED:
                values = tl.broadcast_to(values[:, None, :, :], [SLICES, PADDED // COUNT, COUNT, WIDTH])
                values = tl.reshape(values, [SLICES, PADDED, WIDTH])
        if IN_FLOAT32:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        values = tl.trans(values, 0, 2, 1)
        first_total = tl.dot(weights, values, first_total)
        if second_weight is not None:
            weights = load_weights(second_weight, offset, in_rows, k, first, K, STEP)
            if IN_FLOAT32:
                weights = weights.to(tl.float32)
            second_total = tl.dot(weights, values, second_total)
    return tl.sum(first_total, 0), tl.sum(second_total, 0)


@triton.jit
def register_product(
    x,
    norm_weight,
    first_weight,
    second_weight,
    rows_left,
    batch,
    epsilon,
    K: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The same `[ROWS, B]`, without tensor cores."""
    STEP: tl.constexpr = WIDTH * STAGES
    column = tl.arange(0, WIDTH)
    k = column[None, :]
    output = tl.arange(0, ROWS)[:, None]
    offset, in_rows = output * K + k, output < rows_left
    row = tl.arange(0, B)
    first_total = tl.zeros([ROWS, B], dtype=tl.float32)
    second_total = first_total
    for start in tl.range(0, K, STEP):
        # All weights are on their way before the inputs are waited for.
        first_tiles, second_tiles = (), ()
        for stage in tl.static_range(STAGES):
            first = start + stage * WIDTH
            first_tiles += (load_weights(first_weight, offset, in_rows, k, first, K, STEP),)
            if second_weight is not None:
                second_tiles += (load_weights(second_weight, offset, in_rows, k, first, K, STEP),)
        for i in tl.static_range(B):
            inputs = x + tl.minimum(i, batch - 1) * K
            if norm_weight is not None:
                zero = tl.zeros([1], dtype=tl.int32)
                rstd = tl.sum(inverse_rms(inputs, zero, zero == 0, epsilon, K, 1, 256 * WARPS), 0)
            first_sum = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
            second_sum = first_sum
            for stage in tl.static_range(STAGES):
                here = start + stage * WIDTH + column
                values = tl.load(inputs + here, mask=here < K, other=0.0).to(tl.float32)
                if norm_weight is not None:
                    scale = tl.load(norm_weight + here, mask=here < K, other=0.0).to(tl.float32)
                    values = (values * rstd * scale).to(x.dtype.element_ty).to(tl.float32)
                first_sum += first_tiles[stage].to(tl.float32) * values[None, :]
                if second_weight is not None:
                    second_sum += second_tiles[stage].to(tl.float32) * values[None, :]
            first_total = tl.where(row[None, :] == i, first_total + tl.sum(first_sum, 1)[:, None], first_total)
            if second_weight is not None:
                second_total = tl.where(row[None, :] == i, second_total + tl.sum(second_sum, 1)[:, None], second_total)
    return first_total, second_total


@triton.jit
def product(
    x,
    norm_weight,
    first_weight,
    second_weight,
    rows_left,
    batch,
    epsilon,
    K: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Outputs `[ROWS, PADDED]` of `x` `[batch, K]`, normalised if there is a `norm_weight`, for one or two weights."""
    if SLICES > 0:
        first, second = tensor_core_product(
            x,
            norm_weight,
            first_weight,
            second_weight,
            rows_left,
            batch,
            epsilon,
            K,
            B,
            PADDED,
            ROWS,
            SLICES,
            WIDTH,
            STAGES,
            IN_FLOAT32,
        )
    else:
        first, second = register_product(
            x,
            norm_weight,
            first_weight,
            second_weight,
            rows_left,
            batch,
            epsilon,
            K,
            B,
            ROWS,
            WIDTH,
            STAGES,
            WARPS,
        )
    return first, second


@triton.jit
def places(first, rows_left, batch, N: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Where the outputs `[ROWS, PADDED]` of a program belong in `[batch, N]`, and which exist."""
    output, row = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    return row * N + first + output, (output < rows_left) & (row < batch)


@triton.jit(do_not_specialize=["batch"])
def norm_linears_kernel(
    x,
    norm_weight,
    weights,
    outputs,
    batch,
    epsilon,
    SIZES: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """The programs of all weights stand in one row; SIZES are the numbers of outputs of the COUNT weights."""
    program = tl.program_id(0)
    weight = weights[0]
    start, end, size = 0, (SIZES[0] + ROWS - 1) // ROWS, SIZES[0]
    for i in tl.static_range(1, COUNT):
        weight = tl.where(program >= end, weights[i], weight)
        size = tl.where(program >= end, SIZES[i], size)
        start = tl.where(program >= end, end, start)
        end += (SIZES[i] + ROWS - 1) // ROWS
    first = (program - start) * ROWS
    rows_left = size - first
    weight += first.to(tl.int64) * K
    begin(weight, None, rows_left, K, ROWS, AHEAD, OVERLAP)
    result, _ = product(
        x,
        norm_weight,
        weight,
        None,
        rows_left,
        batch,
        epsilon,
        K,
        B,
        PADDED,
        ROWS,
        SLICES,
        WIDTH,
        STAGES,
        WARPS,
        IN_FLOAT32,
    )
    end = 0
    for i in tl.static_range(COUNT):
        offset, inside = places(first, rows_left, batch, SIZES[i], ROWS, PADDED)
        before = end
        end += (SIZES[i] + ROWS - 1) // ROWS
        tl.store(
            outputs[i] + offset, result.to(outputs[i].dtype.element_ty), mask=within(inside, program, before, end)
        )


@triton.jit(do_not_specialize=["batch"])
def add_linear_kernel(
    x,
    weight,
    residual,
    y,
    batch,
    N: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows_left = N - first
    weight += first.to(tl.int64) * K
    begin(weight, None, rows_left, K, ROWS, AHEAD, OVERLAP)
    offset, inside = places(first, rows_left, batch, N, ROWS, PADDED)
    # Asked for early: it arrives while the weights do.
    residual = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    result, _ = product(
        x,
        None,
        weight,
        None,
        rows_left,
        batch,
        0.0,
        K,
        B,
        PADDED,
        ROWS,
        SLICES,
        WIDTH,
        STAGES,
        WARPS,
        IN_FLOAT32,
    )
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(y + offset, (residual + result.to(dtype).to(tl.float32)).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def norm_gated_linears_kernel(
    x,
    norm_weight,
    gate_weight,
    up_weight,
    y,
    batch,
    epsilon,
    N: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows_left = N - first
    gate_weight += first.to(tl.int64) * K
    up_weight += first.to(tl.int64) * K
    begin(gate_weight, up_weight, rows_left, K, ROWS, AHEAD, OVERLAP)
    gate, up = product(
        x,
        norm_weight,
        gate_weight,
        up_weight,
        rows_left,
        batch,
        epsilon,
        K,
        B,
        PADDED,
        ROWS,
        SLICES,
        WIDTH,
        STAGES,
        WARPS,
        IN_FLOAT32,
    )
    dtype: tl.constexpr = y.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    offset, inside = places(first, rows_left, batch, N, ROWS, PADDED)
    tl.store(y + offset, (gate * up).to(dtype), mask=inside)


@triton.jit
def norm_row_kernel(
    x,
    norm_weight,
    normed,
    copy,
    weights,
    outputs,
    epsilon,
    SIZES: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (row, i) normalises a row, rounds it, and multiplies it with weight i of COUNT, of few outputs each."""
    row, chosen = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < K
    loaded = tl.load(x + row * K + column, mask=inside, other=0.0)
    values = loaded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, 0) / K + epsilon)
    scale = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (values * rstd * scale).to(normed.dtype.element_ty)
    if chosen == 0:
        tl.store(normed + row * K + column, rounded, mask=inside)
        if copy is not None:
            tl.store(copy + row * K + column, loaded, mask=inside)
    values = rounded.to(tl.float32)[None, :]
    for i in tl.static_range(COUNT):
        if chosen == i:
            for first in range(0, SIZES[i], ROWS):
                output = first + tl.arange(0, ROWS)
                here = (output < SIZES[i])[:, None] & inside[None, :]
                weight = tl.load(weights[i] + output[:, None] * K + column[None, :], mask=here, other=0.0)
                result = tl.sum(weight.to(tl.float32) * values, 1)
                tl.store(outputs[i] + row * SIZES[i] + output, result, mask=output < SIZES[i])


@triton.jit(do_not_specialize=["rows"])
def norm_tile_kernel(
    x,
    norm_weight,
    normed,
    copy,
    weights,
    outputs,
    epsilon,
    rows,
    SIZES: tl.constexpr,
    PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """As `norm_row_kernel`, ROWS rows a program and all weights on tensor cores; reads `x` twice, then from a cache.

    PADDED is what SIZES are rounded up to, for all weights the same.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, output = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    there = (row < rows)[:, None]
    offset = row[:, None] * K + column[None, :]
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for first in range(0, K, WIDTH):
        values = tl.load(x + offset + first, mask=there & (first + column < K)[None, :], other=0.0).to(tl.float32)
        total = tl.fma(values, values, total)
    rstd = tl.rsqrt(tl.sum(total, 1) / K + epsilon)[:, None]
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros([ROWS, PADDED], dtype=tl.float32),)
    for first in range(0, K, WIDTH):
        inside = first + column < K
        here = there & inside[None, :]
        loaded = tl.load(x + offset + first, mask=here, other=0.0)
        scale = tl.load(norm_weight + first + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (loaded.to(tl.float32) * rstd * scale[None, :]).to(normed.dtype.element_ty)
        tl.store(normed + offset + first, rounded, mask=here)
        if copy is not None:
            tl.store(copy + offset + first, loaded, mask=here)
        new_sums = ()
        for i in tl.static_range(COUNT):
            existing = (output < SIZES[i])[None, :] & inside[:, None]
            place = output[None, :] * K + (first + column)[:, None]
            weight = tl.load(weights[i] + place, mask=existing, other=0.0)
            if IN_FLOAT32:
                product = tl.dot(rounded.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
            else:
                product = tl.dot(rounded, weight)
            new_sums += (sums[i] + product,)
        sums = new_sums
    for i in tl.static_range(COUNT):
        place = row[:, None] * SIZES[i] + output[None, :]
        tl.store(outputs[i] + place, sums[i], mask=there & (output < SIZES[i])[None, :])


# Specialised on `count`: multiples of 16 let threads load and store 16 bytes at a time.
@triton.jit
def gate_rows_kernel(gate, up, count, BLOCK: tl.constexpr):
    """`silu(gate) * up`, in place of `gate`; `count` entries."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    dtype: tl.constexpr = gate.dtype.element_ty
    opening = tl.load(gate + entry, mask=inside, other=0.0).to(tl.float32)
    opening = (opening * tl.sigmoid(opening)).to(dtype).to(tl.float32)
    values = tl.load(up + entry, mask=inside, other=0.0).to(tl.float32)
    tl.store(gate + entry, (opening * values).to(dtype), mask=inside)


def norm_rows(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    epsilon: float,
    weights: list[torch.Tensor],
    outputs: list[torch.Tensor],
    copy: torch.Tensor | None,
) -> torch.Tensor:
    """The normalised rows of `x`; their projections by `weights` go to `outputs`, float32, and `x` to `copy`."""
    if not weights:
        if copy is not None:
            copy.copy_(x)
        return launch_head_norm(x, norm_weight, epsilon, None)
    size = x.shape[-1]
    rows = x.numel() // size
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = {
        "x": x.contiguous(),
        "norm_weight": norm_weight.contiguous(),
        "normed": normed,
        "copy": copy,
        "weights": tuple(weight.contiguous() for weight in weights),
        "outputs": tuple(outputs),
        "epsilon": epsilon,
        "SIZES": tuple(weight.shape[0] for weight in weights),
        "COUNT": len(weights),
        "K": size,
    }
    with torch.cuda.device_of(x):
        if rows < MANY_ROWS:
            block = round_to_power_of_two(size)
            norm_row_kernel[(rows, len(weights))](
                **arguments,
                BLOCK=block,
                # 128 registers a thread hold so many rows of a weight.
                ROWS=max(1, min(16, 32768 // block)),
                num_warps=8,
            )
        else:
            exact = x.dtype == torch.float32
            norm_tile_kernel[(ceil_div(rows, TILE_ROWS),)](
                **arguments,
                rows=rows,
                PADDED=round_to_power_of_two(max(arguments["SIZES"]), 16),
                # Of 4-byte numbers half as many, for the shared memory.
                WIDTH=TILE_WIDTH // 2 if exact else TILE_WIDTH,
                ROWS=TILE_ROWS,
                IN_FLOAT32=exact or INTERPRETED,
                num_warps=4,
                num_stages=2,
            )
    return normed


def gate_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, in place of `gate`; both contiguous."""
    with torch.cuda.device_of(gate):
        gate_rows_kernel[(ceil_div(gate.numel(), 1024),)](gate=gate, up=up, count=gate.numel(), BLOCK=1024)
    return gate


def launch_options(kind: str, x: torch.Tensor, batch: int) -> dict:
    """Blocks and compiler options of a launch for `batch` rows of `x`."""
    blocks = TABLE[kind, x.element_size()]
    rows = round_to_power_of_two(batch)
    return {
        "B": rows,
        # The second operand of a tensor core has 8 or 16 columns.
        "PADDED": max(8, rows) if blocks.slices else rows,
        "ROWS": blocks.rows,
        "SLICES": blocks.slices,
        "WIDTH": blocks.width,
        "STAGES": blocks.stages,
        "WARPS": blocks.warps,
        "AHEAD": blocks.ahead and not INTERPRETED,
        "OVERLAP": blocks.overlap,
        "IN_FLOAT32": INTERPRETED,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages if blocks.slices else 1,
        "launch_pdl": blocks.overlap,
        # Off by default from triton 3.10 on.
        "enable_fp_fusion": True,
    }


def check_inputs(x: torch.Tensor, norm_weight: torch.Tensor | None, weights: list[torch.Tensor]) -> int:
    """The number of rows of `x`; refuses what the kernels would read beyond.

    Raises:
        ValueError: a shape or dtype does not fit, or there are no rows.
    """
    size = x.shape[-1]
    batch = x.numel() // size
    if batch < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; the kernels take at least one row.")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != size or weight.dtype != x.dtype:
            raise ValueError(
                f"a weight is {weight.dtype} of shape {tuple(weight.shape)}; it must be {x.dtype} of [N, {size}]."
            )
    if norm_weight is not None and norm_weight.shape != (size,):
        raise ValueError(f"norm_weight has shape {tuple(norm_weight.shape)}; it must be ({size},).")
    return batch


def launch_norm_linears(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    epsilon: float,
    weights: list[torch.Tensor],
    rounded: int,
    copy: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Several projections `[..., N_i]` of `x / sqrt(mean(x^2) + epsilon) * norm_weight`.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16.
        norm_weight: `[K]`, any of these dtypes.
        epsilon: added to the mean square, greater than 0.
        weights: `[N_i, K]` each, in the dtype of `x`.
        rounded: as many outputs, the first, take the dtype of `x`; the others are float32.
        copy: contiguous, to be filled with `x`; of more than FEW_ROWS rows.

    Raises:
        ValueError: a shape or dtype does not fit, or there are no rows.
    """
    batch = check_inputs(x, norm_weight, weights)
    sizes = tuple(weight.shape[0] for weight in weights)
    if batch > FEW_ROWS:
        wide = [x.new_empty((*x.shape[:-1], size), dtype=torch.float32) for size in sizes[rounded:]]
        normed = norm_rows(x, norm_weight, epsilon, weights[rounded:], wide, copy)
        return [F.linear(normed, weight) for weight in weights[:rounded]] + wide
    options = launch_options("norm_linears", x, batch)
    outputs = [
        x.new_empty((*x.shape[:-1], size), dtype=x.dtype if i < rounded else torch.float32)
        for i, size in enumerate(sizes)
    ]
    # Triton launches on the current device, which may be another one.
    with torch.cuda.device_of(x):
        norm_linears_kernel[(sum(ceil_div(size, options["ROWS"]) for size in sizes),)](
            x=x.contiguous(),
            norm_weight=norm_weight.contiguous(),
            weights=tuple(weight.contiguous() for weight in weights),
            outputs=tuple(outputs),
            batch=batch,
            epsilon=epsilon,
            SIZES=sizes,
            COUNT=len(sizes),
            K=x.shape[-1],
            **options,
        )
    return outputs


def launch_add_linear(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, overwrite: bool = False
) -> torch.Tensor:
    """`residual + x weight^T`.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16.
        weight: `[N, K]` in the dtype of `x`.
        residual: `[..., N]` in the dtype of `x`.
        overwrite: nobody needs `residual` afterwards, so that with more than FEW_ROWS rows it need not be copied.

    Raises:
        ValueError: a shape or dtype does not fit, or there are no rows.
    """
    batch = check_inputs(x, None, [weight])
    shape = (*x.shape[:-1], weight.shape[0])
    if residual.shape != shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}; it must be {x.dtype} of {shape}."
        )
    if batch > FEW_ROWS:
        rows, sums = x.reshape(batch, -1), residual.reshape(batch, -1)
        return torch.addmm(sums, rows, weight.mT, out=sums if overwrite else None).view(shape)
    options = launch_options("add_linear", x, batch)
    y = x.new_empty(shape)
    with torch.cuda.device_of(x):
        add_linear_kernel[(ceil_div(shape[-1], options["ROWS"]),)](
            x=x.contiguous(),
            weight=weight.contiguous(),
            residual=residual.contiguous(),
            y=y,
            batch=batch,
            N=shape[-1],
            K=x.shape[-1],
            **options,
        )
    return y


def launch_norm_gated_linears(
    x: torch.Tensor, norm_weight: torch.Tensor, epsilon: float, gate_weight: torch.Tensor, up_weight: torch.Tensor
) -> torch.Tensor:
    """`silu(n gate_weight^T) * (n up_weight^T)` `[..., N]`, where n is `x / sqrt(mean(x^2) + epsilon) * norm_weight`.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16.
        norm_weight: `[K]`, any of these dtypes.
        epsilon: added to the mean square, greater than 0.
        gate_weight, up_weight: `[N, K]` in the dtype of `x`.

    Raises:
        ValueError: a shape or dtype does not fit, or there are no rows.
    """
    batch = check_inputs(x, norm_weight, [gate_weight, up_weight])
    if gate_weight.shape != up_weight.shape:
        raise ValueError(
            f"gate_weight has shape {tuple(gate_weight.shape)}, up_weight {tuple(up_weight.shape)}; they must agree."
        )
    if batch > FEW_ROWS:
        normed = launch_head_norm(x, norm_weight, epsilon, None)
        return gate_rows(F.linear(normed, gate_weight), F.linear(normed, up_weight))
    options = launch_options("norm_gated_linears", x, batch)
    size = gate_weight.shape[0]
    y = x.new_empty((*x.shape[:-1], size))
    with torch.cuda.device_of(x):
        norm_gated_linears_kernel[(ceil_div(size, options["ROWS"]),)](
            x=x.contiguous(),
            norm_weight=norm_weight.contiguous(),
            gate_weight=gate_weight.contiguous(),
            up_weight=up_weight.contiguous(),
            y=y,
            batch=batch,
            epsilon=epsilon,
            N=size,
            K=x.shape[-1],
            **options,
        )
    return y


@torch.library.custom_op(f"{NAMESPACE}::norm_linears", mutates_args=())
def norm_linears_op(
    x: torch.Tensor, norm_weight: torch.Tensor, epsilon: float, weights: list[torch.Tensor], rounded: int
) -> list[torch.Tensor]:
    return launch_norm_linears(x, norm_weight, epsilon, weights, rounded)


@torch.library.custom_op(f"{NAMESPACE}::add_linear", mutates_args=())
def add_linear_op(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return launch_add_linear(x, weight, residual)


norm_gated_linears_op = torch.library.custom_op(
    f"{NAMESPACE}::norm_gated_linears", launch_norm_gated_linears, mutates_args=()
)


@norm_linears_op.register_fake
def _(x, norm_weight, epsilon, weights, rounded):
    shape = x.shape[:-1]
    return [
        x.new_empty((*shape, weight.shape[0]), dtype=x.dtype if i < rounded else torch.float32)
        for i, weight in enumerate(weights)
    ]


@add_linear_op.register_fake
def _(x, weight, residual):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@norm_gated_linears_op.register_fake
def _(x, norm_weight, epsilon, gate_weight, up_weight):
    return x.new_empty((*x.shape[:-1], gate_weight.shape[0]))


# What the operators do, for callers that neither autograd nor a compiler watches.
LAUNCHES = {
    "norm_linears": launch_norm_linears,
    "add_linear": launch_add_linear,
    "norm_gated_linears": launch_norm_gated_linears,
}
