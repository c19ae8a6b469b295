# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels. Importing this needs triton; `mesa_triton_solve` does so when a GPU asks for them."""

try:  # in a try block, so that an export of the model does not list triton as required
    import triton
    import triton.language as tl
except ImportError:
    raise


# The sequence length must not enter the compile key, nor may it recompile where a count happens to be 1 or even.
@triton.jit(do_not_specialize=["max_steps", "heads", "chunks"])
def fused_chunk_solve_kernel(
    b,
    k,
    h,
    lam,
    from_start,
    weights,
    x,
    steps,
    residual,
    max_steps,
    threshold,
    tiny,
    h_stride,
    h_row_stride,
    heads,
    chunks,
    C: tl.constexpr,
    K: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    head = (block // chunks) % heads
    row, channel = tl.arange(0, C), tl.arange(0, K)
    vectors = block * C * K + row[:, None] * K + channel[None, :]
    keys = tl.load(k + vectors)
    state = tl.load(h + block * h_stride + channel[:, None] * h_row_stride + channel[None, :])
    weight = tl.load(weights + block * C * C + row[:, None] * C + row[None, :])
    decay = tl.load(from_start + block * C + row)[:, None]
    regularizer = tl.load(lam + head * K + channel)[None, :]

    # Rows in units of their norm; the largest entry first, so that squares cannot overflow.
    r = tl.load(b + vectors)
    peak = tl.maximum(tl.max(tl.abs(r), 1), tiny)
    r = r / peak[:, None]
    norm = tl.maximum(tl.sqrt(tl.sum(r * r, 1)), tiny)
    r = r / norm[:, None]
    p = r
    solution = tl.zeros_like(r)
    rr = tl.sum(r * r, 1)
    active = rr > threshold
    count = tl.zeros([C], dtype=tl.int32)
    step = 0
    remaining = tl.max(active.to(tl.int32), 0)
    while (step < max_steps) & (remaining > 0):
        inside = tl.dot(p, tl.trans(keys), input_precision="tf32x3") * weight
        a = tl.dot(inside, keys, input_precision="tf32x3")
        a += tl.dot(p, state, input_precision="tf32x3") * decay + regularizer * p
        curvature = tl.sum(p * a, 1)
        active = active & (curvature > 0)
        alpha = tl.where(active, rr / curvature, 0.0)[:, None]
        solution += alpha * p
        r -= alpha * a
        count += active.to(tl.int32)
        rr_next = tl.sum(r * r, 1)
        p = r + (rr_next / tl.maximum(rr, tiny))[:, None] * p
        rr = rr_next
        active = active & (rr > threshold)
        step += 1
        remaining = tl.max(active.to(tl.int32), 0)
    tl.store(x + vectors, solution * norm[:, None] * peak[:, None])
    tl.store(steps + block * C + row, count)
    tl.store(residual + block * C + row, tl.sqrt(rr))
