# SPDX-License-Identifier: Apache-2.0
"""One token of the Mesa layer for heads of 64 and 128, written in Gluon, Triton's dialect with explicit layouts.

What `mesa_triton_decode.decode_kernel` computes, with the same arguments. What counts is how long a step of the
solver takes from its first instruction to its last, 13 of which follow one another in a token:

- Eight threads share a row of H. Each holds the entries of the vectors that belong to its 16 columns (of 128), so a
  product with H is multiplications in registers and three exchanges within a warp.
- Only the result of that product passes through shared memory, from the threads of its row to those of its column. The
  vectors are held by every warp, so inner products are three exchanges within a warp more.
- G comes to shared memory while the solver works.

Importing this needs triton.
"""

from .mesa_triton_decode import convolve, read_factor, read_window, scaled, softplus

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
except ImportError:
    raise

# Renamed in triton 3.8.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit(
    do_not_specialize=["q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head", "heads", "max_steps"],
    do_not_specialize_on_alignment=["decay", "beta"],
)
def decode_gluon_kernel(
    q,
    k,
    v,
    decay,
    beta,
    lam,
    h,
    g,
    o,
    steps,
    residual,
    layer,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    heads,
    max_steps,
    threshold,
    K: gl.constexpr,
    V: gl.constexpr,
    W: gl.constexpr,
    NORMALIZE: gl.constexpr,
    LAYER: gl.constexpr,
):
    """Arguments as of `mesa_triton_decode.decode_kernel`; K and V are 64 or 128, a warp for 32 of K."""
    WARPS: gl.constexpr = K // 32
    # A thread has 8 consecutive rows and, of the columns, every eighth group of four.
    ROWS: gl.constexpr = [[1, 0], [2, 0], [4, 0]]
    LANES: gl.constexpr = [[0, 4], [0, 8], [0, 16], [8, 0], [16, 0]]
    OVER_WARPS: gl.constexpr = [[32, 0], [64, 0]] if K == 128 else [[32, 0]]
    KEYS: gl.constexpr = [[0, 1], [0, 2], [0, 32], [0, 64]] if K == 128 else [[0, 1], [0, 2], [0, 32]]
    VALUES: gl.constexpr = [[0, 1], [0, 2], [0, 32], [0, 64]] if V == 128 else [[0, 1], [0, 2], [0, 32]]
    H_TILE: gl.constexpr = gl.DistributedLinearLayout(KEYS + ROWS, LANES, OVER_WARPS, [], [K, K])
    G_TILE: gl.constexpr = gl.DistributedLinearLayout(VALUES + ROWS, LANES, OVER_WARPS, [], [K, V])
    KEY: gl.constexpr = gl.SliceLayout(0, H_TILE)
    VALUE: gl.constexpr = gl.SliceLayout(0, G_TILE)
    KEY_ROW: gl.constexpr = gl.SliceLayout(1, H_TILE)
    VALUE_ROW: gl.constexpr = gl.SliceLayout(1, G_TILE)
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // V, V // 4], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    MATRIX: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    program = gl.program_id(0)
    sequence, head = (program // heads).to(gl.int64), program % heads
    program = program.to(gl.int64)
    h += program * (K * K)
    g += program * (K * V)
    q += sequence * q_batch + head.to(gl.int64) * q_head
    k += sequence * k_batch + head.to(gl.int64) * k_head
    v += sequence * v_batch + head.to(gl.int64) * v_head
    key_row, key_column = gl.arange(0, K, KEY_ROW), gl.arange(0, K, KEY)
    value_row, value_column = gl.arange(0, K, VALUE_ROW), gl.arange(0, V, VALUE)

    # First of all what takes longest to arrive.
    offset = key_row[:, None] * K + key_column[None, :]
    matrix = gl.load(h + offset)
    values = gl.allocate_shared_memory(gl.float32, [K, V], MATRIX)
    from_row, from_column = gl.arange(0, K, gl.SliceLayout(1, COPY)), gl.arange(0, V, gl.SliceLayout(0, COPY))
    copy_to_shared(values, g + from_row[:, None] * V + from_column[None, :])
    async_copy.commit_group()

    diagonal = gl.load(lam + head * K + key_column).to(gl.float32)
    weight = gl.load(beta + program).to(gl.float32)
    gamma = gl.load(decay + program).to(gl.float32)
    if LAYER:
        (
            q_state,
            k_state,
            v_state,
            q_weight,
            k_weight,
            v_weight,
            beta_bias,
            gamma_bias,
            norm_weight,
            gate,
            gate_batch,
            real,
            bounded,
            lower_bound,
            norm_epsilon,
        ) = layer
        WP: gl.constexpr = 2 if W == 2 else (4 if W <= 4 else 8)
        WINDOW: gl.constexpr = gl.BlockedLayout([1, WP], [32, 1], [WARPS, 1], [1, 0])
        if gate is not None:
            gate += sequence * gate_batch + head * V
        pad = 0
        if real is not None:
            pad = gl.where(gl.load(real + sequence), 0, 1)
        weight += gl.load(beta_bias + head).to(gl.float32)
        gamma += gl.load(gamma_bias + head).to(gl.float32)
        q_state += program * ((W - 1) * K)
        k_state += program * ((W - 1) * K)
        tap = gl.arange(0, WP, gl.SliceLayout(0, WINDOW))[None, :]
        key_entry = gl.arange(0, K, gl.SliceLayout(1, WINDOW))[:, None]
        value_entry = gl.arange(0, V, gl.SliceLayout(1, WINDOW))[:, None]
        q_old, q_new, q_weights = read_window(q, q_state, q_weight, head * K, pad, key_entry, tap, K, W)
        k_old, k_new, k_weights = read_window(k, k_state, k_weight, head * K, pad, key_entry, tap, K, W)
        if v_state is not None:
            v_state += program * ((W - 1) * V)
            v_old, v_new, v_weights = read_window(v, v_state, v_weight, head * V, pad, value_entry, tap, V, W)
        else:
            value = gl.load(v + value_column)
        # Where V is less than K, several threads read a state of which one overwrites it.
        barrier()
        query = convolve(q_old, q_new, q_weights, q_state, pad, key_entry, tap, K, W)
        key = convolve(k_old, k_new, k_weights, k_state, pad, key_entry, tap, K, W)
        query, key = gl.convert_layout(query, KEY), gl.convert_layout(key, KEY)
        if v_state is not None:
            value = convolve(v_old, v_new, v_weights, v_state, pad, value_entry, tap, V, W)
            value = gl.convert_layout(value, VALUE)
        else:
            value = value.to(gl.float32)
        weight = 1.0 / (1.0 + gl.exp(-weight))
        gamma = 1.0 / (1.0 + gl.exp(-gamma)) * (1.0 - bounded * weight * weight)
        weight = gl.where(pad == 1, 0.0, weight)
        gamma = gl.where(pad == 1, 1.0, gamma)
        diagonal = lower_bound + softplus(diagonal)
    else:
        query, key = gl.load(q + key_column).to(gl.float32), gl.load(k + key_column).to(gl.float32)
        value = gl.load(v + value_column).to(gl.float32)
        gamma = gl.exp(gamma)

    if NORMALIZE:
        key, _, key_length = scaled(key, NORMALIZE)
        key *= key_length
    r, square, length = scaled(query, NORMALIZE)
    norm = gl.where(square == 0.0, 1.0, gl.sqrt(square))
    r /= norm

    # The product of the keys comes first: it is symmetric to the last bit, and H remains so.
    matrix = gamma * matrix + weight * (gl.convert_layout(key, KEY_ROW)[:, None] * key[None, :])
    gl.store(h + offset, matrix)

    # Conjugate gradient as in mesa_solver. Every warp has the vectors, and computes the same from them. A thread has
    # several entries, so what others add to its sum has been rounded by a fused operation as its own was.
    product = gl.allocate_shared_memory(gl.float32, [K], PLAIN)
    p = r
    solution = gl.zeros([K], gl.float32, KEY)
    rr = gl.sum(r * r, 0)
    active = rr > threshold
    count = 0
    while (count < max_steps) & active:
        product.store(gl.sum(matrix * p[None, :], 1))
        a = product.load(KEY) + diagonal * p
        curvature = gl.sum(p * a, 0)
        active = curvature > 0
        alpha = gl.where(active, rr / curvature, 0.0)
        solution += alpha * p
        r -= alpha * a
        rr_next = gl.sum(r * r, 0)
        p = r + (rr_next / rr) * p
        rr = rr_next
        count += active.to(gl.int32)
        active = active & (rr > threshold)
    # Without steps, the loop has left r as it was: q in units of its norm.
    x = gl.where(max_steps == 0, r, solution) * norm * length
    if steps is not None:
        gl.store(steps + program, count)
        gl.store(residual + program, gl.where(max_steps == 0, 0.0, gl.sqrt(rr)))

    if LAYER:
        factor = read_factor(norm_weight, gate, value_column, V)
    weighted_key, x = gl.convert_layout(weight * key, VALUE_ROW), gl.convert_layout(x, VALUE_ROW)
    async_copy.wait_group(0)
    memory = gamma * values.load(G_TILE) + weighted_key[:, None] * value[None, :]
    gl.store(g + value_row[:, None] * V + value_column[None, :], memory)
    output = gl.sum(memory * x[:, None], 0)
    if LAYER:
        output *= gl.rsqrt(gl.sum(output * output, 0) / V + norm_epsilon) * factor
    gl.store(o + program * V + value_column, output.to(o.dtype.element_ty))
