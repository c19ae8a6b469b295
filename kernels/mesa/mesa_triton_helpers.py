# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: where a chunk lies, splitting float32 into half precision pairs, decay factors.

Importing this needs triton. Dimensions: B batch, T tokens a row, H heads, K key size, V value size, C chunk size, N
chunks.
"""

try:  # in a try block, so that an export of the model does not list triton as required
    import triton
    import triton.language as tl
except ImportError:
    raise

# A factor of 0 (an exact reset) in the log of decays to the base 2: far below the rounding of float32 beside anything
# that follows it, and a small whole number, so that sums of it over a chunk are exact.
RESET = tl.constexpr(-64.0)

# Powers of two that scale a vector are held between these, so that they and their inverses are normal numbers.
SMALLEST_SCALE = tl.constexpr(2.0**-60)
LARGEST_SCALE = tl.constexpr(2.0**100)


# As triton's `cdiv` and `next_power_of_2`, which kernels can call, too, and which for that take as long as a launch.
def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up."""
    return -(-number // divisor)


def round_to_power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` (from 1) and `least`."""
    return max(least, 1 << (size - 1).bit_length())


@triton.jit
def locate_chunk(chunk, length, chunks_per_row, table, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of chunk number `chunk`, counted through all rows (int64), and its number of tokens (1 to C).

    Rows of `length` tokens have `chunks_per_row` chunks each; packed sequences have a table `[N, 2]` of both numbers.
    """
    if PACKED:
        first = tl.load(table + 2 * chunk).to(tl.int64)
        count = tl.load(table + 2 * chunk + 1).to(tl.int32)
    else:
        row = chunk // chunks_per_row
        start = (chunk - row * chunks_per_row) * C
        first = row.to(tl.int64) * length + start
        count = tl.minimum(C, length - start)
    return first, count


@triton.jit
def load_rows(pointer, row, inside, column, D: tl.constexpr):
    """Rows of `[.., D]` in float32, zeros outside and in columns past D."""
    offset = row[:, None] * D + column[None, :]
    return tl.load(pointer + offset, mask=inside[:, None] & (column[None, :] < D), other=0.0).to(tl.float32)


@triton.jit
def power_of_two(x):
    """The largest power of two that is at most `x`, elementwise for float32 `x` >= 0, within the limits above."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(exponent.to(tl.float32, bitcast=True), SMALLEST_SCALE), LARGEST_SCALE)


@triton.jit
def split_half(x):
    """Float32 `x` as the sum of two float16 numbers `(high, low)`: 22 significant bits; |x| must be below 65504."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def scale_rows(x):
    """Float32 `x` `[C, D]` divided by a power of two a row, so that no entry of a row exceeds 2; and that power `[C]`.

    bfloat16 and float16 numbers scaled so are exact in float16, down to 2^-24 of their row's largest.
    """
    scale = power_of_two(tl.max(tl.abs(x), 1))
    return x * (1.0 / scale)[:, None], scale


@triton.jit
def normalizer(scaled, scale, epsilon, NORMALIZE: tl.constexpr):
    """The factor `[C]` that makes rows of `scaled` `[C, D]` what the operator computes with.

    That is `rsqrt(||scaled||^2 + epsilon / scale^2)`, which L2-normalises `scale * scaled`, or else `scale` itself
    (which `scale_rows` made, so that it is not 0).
    """
    if NORMALIZE:
        return tl.rsqrt(tl.sum(scaled * scaled, 1) + epsilon / scale / scale)
    else:
        return scale


@triton.jit
def decay_exponents(log_gamma):
    """Cumulative log2 of decays `[C]` as a whole and a fractional part, from the natural logs `[C]` of the gammas.

    `zeta_ts = 2^((whole_t - whole_s) + (fraction_t - fraction_s))`. The differences of the whole parts are exact, so
    that strong forgetting and resets cancel nothing; the fractional parts, at most a half each, add up to little where
    little is forgotten.
    """
    log2 = log_gamma * 1.4426950408889634
    log2 = tl.where(log2 < RESET, RESET, log2)  # unlike a maximum, keeps NaN
    whole = tl.floor(log2 + 0.5)
    return tl.cumsum(whole, 0), tl.cumsum(log2 - whole, 0)


@triton.jit
def decay_to_end(whole, fraction, C: tl.constexpr):
    """`zeta_end,s` `[C]`, and the exponent of the decay across the chunk, from `decay_exponents`."""
    last = tl.arange(0, C) == C - 1
    whole_end, fraction_end = tl.sum(tl.where(last, whole, 0.0), 0), tl.sum(tl.where(last, fraction, 0.0), 0)
    return tl.exp2((whole_end - whole) + (fraction_end - fraction)), whole_end + fraction_end


@triton.jit
def load_pair(top, rest, offset, TERMS: tl.constexpr):
    """One float16 tile, or with two TERMS a pair of them; with one, the second is the first and not used."""
    high = tl.load(top + offset)
    low = high
    if TERMS == 2:
        low = tl.load(rest + offset)
    return high, low


@triton.jit
def dot_pairs(left, left_rest, right, right_rest, product, LEFT_TERMS: tl.constexpr, RIGHT_TERMS: tl.constexpr):
    """`product + left right`, each of one or two float16 terms; the product of the two rests is below rounding."""
    product = tl.dot(left, right, product)
    if RIGHT_TERMS == 2:
        product = tl.dot(left, right_rest, product)
    if LEFT_TERMS == 2:
        product = tl.dot(left_rest, right, product)
    return product
