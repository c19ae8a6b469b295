# SPDX-License-Identifier: Apache-2.0
"""The chunkwise Mesa layer on Triton kernels: launches, and their registration as torch operators with gradients.

Forward: states at chunk boundaries (`mesa_triton_states`, or from a layer's projections on `mesa_triton_prefill`),
then the solve and the read-out of every chunk (`mesa_triton_solver`, or `mesa_hopper_solver` on Hopper GPUs).
Backward: the states again, the second solve, the adjoint states from the last chunk to the first, and the gradients of
every chunk (`mesa_triton_backward`). Importing this needs triton.

Dimensions: B batch, S sequences, T tokens, H heads, K key size, V value size, C chunk size, N chunks; KP and VP are K
and V rounded up to a power of two of at least 64.
"""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .mesa_library import NAMESPACE, OPERATORS
from .mesa_solver import L2_NORM_EPS, residual_bound
from .mesa_triton_backward import gradients_kernel
from .mesa_triton_helpers import ceil_div, round_to_power_of_two
from .mesa_triton_layers import with_dense_channels, write_head_norm
from .mesa_triton_prefill import convolve_chunks_kernel
from .mesa_triton_solver import solve_chunks_kernel
from .mesa_triton_states import (
    CHUNK_NUMBERS,
    FIRST_PASS,
    SECOND_PASS,
    SEGMENT_NUMBERS,
    SINGLE_PASS,
    carry_adjoints_kernel,
    carry_states_kernel,
    prepare_chunks_kernel,
)

try:  # in a try block, so that an export of the model does not list triton as required
    import triton
except ImportError:
    raise

# Whether launches only compile their kernels: inside `compile_ahead`.
ONLY_COMPILE = ContextVar("ONLY_COMPILE", default=False)

# Long sequences are cut into segments whose states are summed up side by side, of at least so many chunks.
MIN_SEGMENT_CHUNKS = 8

# Why the solve for Hopper could not be compiled or launched, if so; it is then not tried again.
HOPPER_FAULTS: list[Exception] = []

# The published width of the short convolutions, for which a prompt's kernel is compiled ahead.
USUAL_WIDTH = 4

# Columns of G that the plain solve takes at once.
VALUE_COLUMNS = 64


class Carry(NamedTuple):
    """How states are carried: columns of one that a program takes; about how many programs run; stages of loads."""

    columns: int
    programs: int
    stages: int


# Four programs for each multiprocessor of the largest GPUs. On Hopper, where there is shared memory for three chunks
# of 16-bit keys and values, twice the columns halve how often keys are read, in a fifth less time (H200).
CARRY, HOPPER_CARRY = Carry(64, 528, 1), Carry(128, 132, 3)


class Pair(NamedTuple):
    """States of N chunks: float16 `high` and `low` `[N, H, KP, D]`, float32 `scale` `[N, H, D / columns a block]`."""

    high: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor


class Rows(NamedTuple):
    """Vectors of every token as float16 pairs `[N, H, C, D]`, each times its float32 `unit` `[N, H, C]`."""

    top: torch.Tensor
    rest: torch.Tensor
    unit: torch.Tensor


class Norm(NamedTuple):
    """The norm of outputs, as `mesa_triton_layers.launch_head_norm` takes it; `gate` may be None."""

    weight: torch.Tensor
    epsilon: float
    gate: torch.Tensor | None


class Adjoints(NamedTuple):
    """What the backward solve leaves for the adjoint states and the gradients.

    Gradients of o in float16 `[N, H, C, VP]` (for float32 inputs in pairs, else the rest is None) and their units;
    then, in float32 `[N, H, C]`, the weights of `y x^T` and `x e^T`, and the gradient of each token's decay from the
    start of the chunk.
    """

    grad_rows: torch.Tensor
    grad_rows_rest: torch.Tensor | None
    grad_unit: torch.Tensor
    update_h: torch.Tensor
    update_g: torch.Tensor
    from_earlier: torch.Tensor


class Chunks(NamedTuple):
    """What `prepare_chunks_kernel` makes of every chunk.

    Keys and values in float16, `[N, H, C, KP]` and `[N, H, C, VP]` (in pairs for float32 inputs, else the rests are
    None), float32 vectors `[N, H, C]`, and `numbers` `[N, H, CHUNK_NUMBERS]`.
    """

    keys: torch.Tensor
    keys_rest: torch.Tensor | None
    values: torch.Tensor
    values_rest: torch.Tensor | None
    decay_whole: torch.Tensor
    decay_fraction: torch.Tensor
    key_unit: torch.Tensor
    key_factor: torch.Tensor
    key_weight: torch.Tensor
    value_unit: torch.Tensor
    value_weight: torch.Tensor
    key_update: torch.Tensor
    value_update: torch.Tensor
    numbers: torch.Tensor

    def some(self, *names: str) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in names}


def named(*names: str, values: tuple | None) -> dict:
    """`values` by name, or None for each of them."""
    return dict(zip(names, (None,) * len(names) if values is None else values, strict=True))


def padded(size: int) -> int:
    """`size` rounded up to a power of two of at least 64.

    Smaller tiles would do, but triton 3.6 reads past the end of some on Hopper (products of 16 or 32 columns).
    """
    return round_to_power_of_two(size, 64)


class Plan:
    """How many chunks there are, and where they begin; all from shapes, without reading the device.

    Packed sequences each begin a chunk of their own. How many chunks that makes is known on the device only, so the
    plan has room for as many as there could be, and a table (`chunk_table` `[N, 2]`: first token and number of tokens,
    0 for chunks that do not exist).
    """

    def __init__(self, batch: int, length: int, chunk_size: int, cu_seqlens: torch.Tensor | None):
        self.batch, self.length, self.packed = batch, length, cu_seqlens is not None
        self.sequences = cu_seqlens.shape[0] - 1 if self.packed else batch
        self.chunks_per_row = ceil_div(length, chunk_size)
        self.chunks = length // chunk_size + self.sequences if self.packed else batch * self.chunks_per_row
        self.chunk_table = self.chunk_bounds = None
        if self.packed:
            self.chunk_bounds, chunks = cut(cu_seqlens.long(), chunk_size, self.chunks)
            self.chunk_table = torch.stack([chunks.start, chunks.length], 1)


class Segments:
    """Segments of the sequences of a plan, whose states are carried by programs of their own.

    Those of packed sequences are known on the device only: `table` is `[count, SEGMENT_COLUMNS]`, with room for as
    many as there could be.

    Args:
        plan: of the chunks.
        blocks: programs for a segment.
        programs: about how many there should be.
    """

    def __init__(self, plan: Plan, blocks: int, programs: int):
        longest = plan.chunks if plan.packed else plan.chunks_per_row
        self.chunks = max(MIN_SEGMENT_CHUNKS, ceil_div(plan.chunks * blocks, programs))
        self.several = self.chunks < longest
        if not self.several:
            self.chunks = longest
        self.table = None
        if plan.packed:
            self.count = plan.sequences + (plan.chunks // self.chunks if self.several else 0)
            # An empty sequence has a segment, too, which leaves its initial state as the final one.
            self.table = torch.stack(cut(plan.chunk_bounds, self.chunks, self.count, least=1)[1], 1)
        else:
            self.count = plan.batch * ceil_div(plan.chunks_per_row, self.chunks)


class Pieces(NamedTuple):
    """Pieces of spans: where they start, their lengths, their spans, and how many of a span's come before and after.

    int64 `[room]` each; of pieces that do not exist the length is 0 and the number after them negative.
    """

    start: torch.Tensor
    length: torch.Tensor
    span: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def cut(bounds: torch.Tensor, size: int, room: int, least: int = 0) -> tuple[torch.Tensor, Pieces]:
    """Cut the spans between `bounds` `[S + 1]` into pieces of `size`, each span into at `least` so many.

    Returns:
        The bounds of the spans counted in pieces `[S + 1]`, and the pieces, with `room` for more.
    """
    lengths = bounds.diff()
    counts = ((lengths + size - 1) // size).clamp_min(least)
    piece_bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    piece = torch.arange(room, device=bounds.device)
    span = torch.searchsorted(piece_bounds[1:], piece, right=True).clamp_max(lengths.shape[0] - 1)
    before, after = piece - piece_bounds[span], piece_bounds[span + 1] - 1 - piece
    length = (lengths[span] - before * size).clamp(0, size)
    return piece_bounds, Pieces(bounds[span] + before * size, length, span, before, after)


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Launch a kernel, or inside `compile_ahead` only compile it."""
    if ONLY_COMPILE.get():
        kernel.warmup(grid=grid, **arguments)
    else:
        kernel[grid](**arguments)


class Layer:
    """One call's inputs and sizes, and the launches that share them."""

    def __init__(self, k, v, log_gamma, beta, cu_seqlens, normalize):
        self.k, self.v, self.log_gamma, self.beta, self.normalize = k, v, log_gamma, beta, normalize
        batch, length, self.heads, self.key_dim = k.shape
        self.value_dim = v.shape[-1]
        self.key_padded, self.value_padded = padded(self.key_dim), padded(self.value_dim)
        self.chunk_size = chunk_size_of(self.key_dim)
        self.plan = Plan(batch, length, self.chunk_size, cu_seqlens)
        self.terms = 2 if torch.float32 in (k.dtype, v.dtype) else 1
        self.sizes = {
            "C": self.chunk_size,
            "K": self.key_dim,
            "V": self.value_dim,
            "KP": self.key_padded,
            "VP": self.value_padded,
        }

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def new_pairs(self) -> tuple[Pair, Pair]:
        """Room for H and G, or their adjoints, at every chunk."""

        def pair(size: int) -> Pair:
            shape = (self.plan.chunks, self.heads)
            halves = self.empty(2, *shape, self.key_padded, size, dtype=torch.float16).unbind()
            return Pair(*halves, self.empty(*shape))

        return pair(self.key_padded), pair(self.value_padded)

    def boundary_states(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.empty(count, self.heads, self.key_dim, self.key_dim),
            self.empty(count, self.heads, self.key_dim, self.value_dim),
        )

    def carry(self, kernel, how: Carry, initial, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch `kernel` over all segments, once or twice, from `initial` states; returns the final ones."""
        blocks = self.key_padded // how.columns + self.value_padded // how.columns
        segments = Segments(self.plan, blocks * self.heads, how.programs)
        final = self.boundary_states(self.plan.sequences)

        def run_pass(number, **boundaries):
            launch(
                kernel,
                (segments.count * self.heads, blocks),
                **arguments,
                **boundaries,
                segment_table=segments.table,
                heads=self.heads,
                chunks_per_row=self.plan.chunks_per_row,
                chunks_per_segment=segments.chunks,
                HAS_INITIAL=boundaries["initial_h"] is not None,
                PASS=number.value,
                PACKED=self.plan.packed,
                TERMS=self.terms,
                BK=how.columns,
                BV=how.columns,
                num_warps=8,
                num_stages=how.stages,
                **self.sizes,
            )

        ends = named("initial_h", "initial_g", values=initial) | named("final_h", "final_g", values=final)
        if not segments.several:
            run_pass(SINGLE_PASS, **ends, **named("parts_h", "parts_g", values=None), segment_numbers=None)
            return final
        sums = named("parts_h", "parts_g", values=self.boundary_states(segments.count))
        sums["segment_numbers"] = self.empty(segments.count, self.heads, SEGMENT_NUMBERS.value)
        run_pass(FIRST_PASS, **dict.fromkeys(ends), **sums)
        run_pass(SECOND_PASS, **ends, **sums)
        return final

    @property
    def chunk_arguments(self) -> dict:
        return {
            "chunk_table": self.plan.chunk_table,
            "heads": self.heads,
            "length": self.plan.length,
            "chunks_per_row": self.plan.chunks_per_row,
            "PACKED": self.plan.packed,
        }

    def new_chunks(self) -> Chunks:
        shape = (self.plan.chunks, self.heads, self.chunk_size)
        pairs = [
            [self.empty(*shape, size, dtype=torch.float16) if term < self.terms else None for term in range(2)]
            for size in (self.key_padded, self.value_padded)
        ]
        vectors = self.empty(9, *shape).unbind()
        return Chunks(*pairs[0], *pairs[1], *vectors, self.empty(*shape[:2], CHUNK_NUMBERS.value))

    @property
    def chunk_sizes(self) -> dict[str, int]:
        return {name: self.sizes[name] for name in ("C", "K", "V", "KP", "VP")}

    def prepare(self) -> Chunks:
        chunks = self.new_chunks()
        launch(
            prepare_chunks_kernel,
            (self.plan.chunks * self.heads,),
            k=self.k,
            v=self.v,
            log_gamma=self.log_gamma,
            beta=self.beta,
            **chunks._asdict(),
            epsilon=L2_NORM_EPS,
            NORMALIZE=self.normalize,
            TERMS=self.terms,
            num_warps=4,
            **self.chunk_arguments,
            **self.chunk_sizes,
        )
        return chunks

    def convolve(
        self, projections, weights, states, logits, biases, bound
    ) -> tuple[torch.Tensor, list[torch.Tensor], Chunks]:
        """What `prepare` makes, of keys and values that are yet to be convolved; arguments as in `launch_prefill`.

        Returns:
            The convolved queries `[B, T, H, K]`, the new states of the convolutions, and the chunks.
        """
        chunks, (batch, length) = self.new_chunks(), self.k.shape[:2]
        q = torch.empty_like(self.k, memory_format=torch.contiguous_format)
        width, count = weights[0].shape[-1], len(weights)
        new_states = [x.new_empty(batch, x.shape[2], width - 1) for x in projections[:count]]
        missing = (None,) * (3 - count)
        launch(
            convolve_chunks_kernel,
            (self.plan.chunks * self.heads, 2),
            xs=tuple(projections),
            weights=(*(weight.contiguous() for weight in weights), *missing),
            states=(*(None if state is None else state.contiguous() for state in states), *missing),
            new_states=(*new_states, *missing),
            batch_strides=tuple(x.stride(0) for x in projections),
            time_strides=tuple(x.stride(1) for x in projections),
            **named("beta_logit", "gamma_logit", values=tuple(logit.contiguous() for logit in logits)),
            **named("beta_bias", "gamma_bias", values=tuple(bias.contiguous() for bias in biases)),
            q=q,
            **chunks._asdict(),
            heads=self.heads,
            length=length,
            chunks_per_row=self.plan.chunks_per_row,
            bound_less_one=0.0 if bound is None else bound - 1,
            epsilon=L2_NORM_EPS,
            HAS_BOUND=bound is not None,
            TERMS=self.terms,
            W=width,
            num_warps=1,
            # 16 warps a multiprocessor; wide convolutions need more registers for their weights and inputs.
            maxnreg=128 if width <= 4 else None,
            **self.chunk_sizes,
        )
        return q, new_states, chunks

    def states(
        self, chunks: Chunks, initial, only_final: bool = False
    ) -> tuple[Pair | None, Pair | None, tuple[torch.Tensor, torch.Tensor]]:
        """The states before every chunk (None if `only_final`), and the final states."""
        h, g = (None, None) if only_final else self.new_pairs()
        how = self.carry_options()
        final = self.carry(
            carry_states_kernel,
            how,
            initial,
            **chunks.some("keys", "keys_rest", "values", "values_rest", "key_update", "value_update", "numbers"),
            **named("h_high", "h_low", "h_scale", values=h),
            **named("g_high", "g_low", "g_scale", values=g),
            STAGES=how.stages,
        )
        return h, g, final

    def carry_options(self) -> Carry:
        wide = {self.key_padded, self.value_padded} == {HOPPER_CARRY.columns}
        return HOPPER_CARRY if is_hopper(self.k.device) and wide and self.terms == 1 else CARRY

    def adjoints(self, x: Rows, y: Rows, adjoints: Adjoints, h, g, chunks, initial):
        """The adjoint states after every chunk, their products with the states, and the initial states' gradients."""
        dh, dg = self.new_pairs()
        # One number for each row of every block of columns; where the blocks are no power of two, zeros follow.
        blocks = (self.key_padded + self.value_padded) // CARRY.columns
        crossings = round_to_power_of_two(blocks) * self.key_padded
        crossing = self.empty(self.plan.chunks, self.heads, crossings)
        if crossings > blocks * self.key_padded:
            crossing.zero_()
        final = self.carry(
            carry_adjoints_kernel,
            CARRY,
            initial,
            x=x.top,
            x_rest=x.rest,
            y=y.top,
            y_rest=y.rest,
            grad_rows=adjoints.grad_rows,
            grad_rows_rest=adjoints.grad_rows_rest,
            update_h=adjoints.update_h,
            update_g=adjoints.update_g,
            numbers=chunks.numbers,
            **named("dh_high", "dh_low", "dh_scale", values=dh),
            **named("dg_high", "dg_low", "dg_scale", values=dg),
            **named("h_high", "h_low", "h_scale", values=h),
            **named("g_high", "g_low", "g_scale", values=g),
            crossing=crossing,
            CROSSINGS=crossings,
            # Two programs a multiprocessor; the compiler's own choice leaves room for one.
            maxnreg=128,
        )
        return dh, dg, crossing, final

    def solve(
        self,
        b,
        lam,
        h,
        g,
        chunks,
        max_steps,
        tolerance,
        *,
        x: Rows | None = None,
        o=None,
        keep=True,
        stats=False,
        norm: Norm | None = None,
    ) -> tuple[Rows | None, torch.Tensor | None, torch.Tensor | None, Adjoints | None]:
        """Solve for every token: forward (writes `o`, normalised if there is a `norm`), or backward given `x`.

        Returns:
            The solutions (None unless `keep`), steps and residual (None unless `stats`), and what the backward pass
            goes on with (None forward).
        """
        backward = x is not None
        shape, tokens = (self.plan.chunks, self.heads, self.chunk_size), self.k.shape[:3]
        solution = adjoints = None
        if keep:
            halves = (self.empty(*shape, self.key_padded, dtype=torch.float16) for _ in range(2))
            solution = Rows(*halves, self.empty(*shape))
            if self.plan.packed:  # what is kept of chunks that do not exist must be the same in every run
                for tensor in solution:
                    tensor.zero_()
        if backward:
            halves = [self.empty(*shape, self.value_padded, dtype=torch.float16) for _ in range(self.terms)]
            adjoints = Adjoints(halves[0], *(halves[1:] or [None]), *(self.empty(*shape) for _ in range(4)))
        steps = self.empty(*tokens, dtype=torch.int32) if stats else None
        residual = self.empty(*tokens) if stats else None
        if stats and max_steps == 0:  # the kernel has none to write
            steps.zero_(), residual.zero_()
        arguments = {
            "b": b,
            "lam": lam,
            **chunks.some("keys", "values", "decay_whole", "decay_fraction"),
            **chunks.some("key_weight", "value_weight", "value_unit"),
            **named("h_high", "h_low", "h_scale", values=h),
            **named("g_high", "g_low", "g_scale", values=g),
            "o": o,
            **named("x", "x_rest", "x_unit", values=x),
            **named("solution", "solution_rest", "solution_unit", values=solution),
            **named(*Adjoints._fields, values=adjoints),
            "steps": steps,
            "residual": residual,
            "max_steps": max_steps,
            "threshold": residual_bound(tolerance, torch.float32) ** 2,
            "epsilon": L2_NORM_EPS,
            "BACKWARD": backward,
            "STORE_SOLUTION": keep,
            "STATS": stats,
            **self.chunk_arguments,
        }
        blocks = self.plan.chunks * self.heads
        solved = max_steps > 0 and self.fits_hopper(backward) and self.solve_on_hopper(blocks, arguments, chunks, norm)
        if not solved:
            rows, resident, rows_of_slice = solve_blocks(shared_memory_of(self.k.device), self.key_padded, self.terms)
            # Directions pass through memory where H does not stay on chip.
            scratch = h.high if resident else self.empty(*shape, self.key_padded, dtype=torch.float16)
            launch(
                solve_chunks_kernel,
                (blocks, self.chunk_size // rows),
                **arguments,
                **chunks.some("keys_rest", "values_rest"),
                **self.sizes,
                BV=VALUE_COLUMNS,
                scratch=scratch,
                NORMALIZE=self.normalize,
                SOLVE=max_steps > 0,
                RESIDENT=resident,
                TERMS=self.terms,
                R=rows,
                BS=rows_of_slice,
                num_warps=4,
                num_stages=2,
            )
            if norm is not None and not ONLY_COMPILE.get():
                write_head_norm(o, *norm, o)
        return solution, steps, residual, adjoints

    def solve_on_hopper(self, blocks: int, arguments: dict, chunks: Chunks, norm: Norm | None) -> bool:
        """Launch the solve written for Hopper; False where there is none, or where it failed once."""
        kernel = hopper_kernel(self.k.device)
        if kernel is None or HOPPER_FAULTS:
            return False
        sizes = {name: self.sizes[name] for name in ("K", "V")}
        try:
            launch(
                kernel,
                (blocks,),
                **arguments,
                **sizes,
                **named("norm_weight", "norm_epsilon", "gate", values=norm),
                values_rest=chunks.values_rest,
                VALUE_TERMS=self.terms,
                num_warps=4,
            )
        # Gluon is younger than the rest of triton, and still moves; the plain kernel does the same.
        except Exception as error:
            HOPPER_FAULTS.append(error)
            message = f"The Triton solve for Hopper fails ({type(error).__name__}: {error}); a slower kernel solves."
            warnings.warn(message, stacklevel=2)
        return not HOPPER_FAULTS

    def gradients(self, x: Rows, y: Rows, q, adjoints: Adjoints, dh, dg, crossing, chunks, solved):
        """The gradients of q, k, v, log_gamma, beta and lam."""
        grads = [torch.empty_like(tensor) for tensor in (q, self.k, self.v, self.log_gamma, self.beta)]
        grad_lam = self.empty(self.plan.chunks, self.heads, self.key_padded)
        launch(
            gradients_kernel,
            (2 * self.plan.chunks * self.heads,),
            **named("x", "x_rest", "x_unit", values=x),
            **named("y", "y_rest", "y_unit", values=y),
            q=q,
            beta=self.beta,
            **chunks.some("keys", "keys_rest", "key_unit", "key_factor", "values", "values_rest", "value_unit"),
            **chunks.some("decay_whole", "decay_fraction"),
            **named("grad_rows", "grad_rows_rest", "grad_unit", values=adjoints[:3]),
            from_earlier=adjoints.from_earlier,
            **named("dh_high", "dh_low", "dh_scale", values=dh),
            **named("dg_high", "dg_low", "dg_scale", values=dg),
            crossing=crossing,
            **named("grad_q", "grad_k", "grad_v", "grad_log_gamma", "grad_beta", values=grads),
            grad_lam=grad_lam,
            epsilon=L2_NORM_EPS,
            SOLVED=solved,
            NORMALIZE=self.normalize,
            TERMS=self.terms,
            CROSSINGS=crossing.shape[-1],
            **self.chunk_arguments,
            **self.sizes | gradient_blocks(is_hopper(self.k.device), self.key_padded, self.terms),
        )
        return *grads, grad_lam[..., : self.key_dim].sum(0)

    def fits_hopper(self, backward: bool) -> bool:
        """Float32 values are read out in two terms; float32 keys, and gradients, are left to the plain kernel.

        So are keys that are not normalised: their products may leave float16, which only the plain kernel prevents.
        """
        terms = self.terms == 1 or (not backward and self.k.dtype != torch.float32)
        return terms and self.normalize and {self.key_dim, self.value_dim} <= {64, 128}


def compile_ahead(q, k, v, log_gamma, beta, lam, differentiable: bool) -> None:
    """Compile the kernels for such inputs, all at once: at their launches they would be compiled one after the other.

    Args:
        q, k, v, log_gamma, beta, lam: as `triton_chunkwise` takes them.
        differentiable: those of the backward pass, too; else that of a usual layer's prompt.
    """
    inputs = q, k, v, log_gamma, beta, lam
    # A kernel that does not compile says so again when it is launched.
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        only_compile = ONLY_COMPILE.set(True)
        try:
            steps = 1, None
            *_, x, x_rest, x_unit = triton_chunkwise(
                *inputs, None, None, None, *steps, *steps, True, differentiable, False
            )
            if not differentiable:
                launch_prefill(*usual_prompt(*inputs))
            else:
                triton_chunkwise_backward(v, None, None, x, x_rest, x_unit, *inputs, None, None, None, *steps, True)
        finally:
            ONLY_COMPILE.reset(only_compile)


def usual_prompt(q, k, v, log_gamma, beta, lam) -> tuple:
    """Arguments of `launch_prefill` as a layer of the published sizes gives them for a first prompt."""
    weights = [x.new_empty(x.shape[2] * x.shape[3], USUAL_WIDTH) for x in (q, k)]
    bias = beta.new_empty(beta.shape[2])
    norm = v.new_empty(v.shape[3]), L2_NORM_EPS, None
    projections = [x.flatten(2) for x in (q, k, v)]
    return projections, weights, [None, None], (beta, log_gamma), (bias, bias), 0.5, lam, None, 1, None, False, norm


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def solve_blocks(shared_memory: int, key_padded: int, terms: int) -> tuple[int, bool, int]:
    """Tokens that a program of the plain solve takes, whether H stays on chip, and else the rows of H in a slice.

    With H on chip, K = V = 128 and 32 tokens take 88 kB of shared memory in 16 bits and 104 kB in float32; an A100 has
    163 kB, an RTX 3090 or 4090 99 kB. In slices of 32 rows they take 64 kB at most, and 256 takes 74 kB.
    """
    if key_padded == 64 or (key_padded == 128 and (terms == 1 or shared_memory >= 104 * 1024)):
        return 32, True, 64
    return 16, False, 32


def gradient_blocks(hopper: bool, key_padded: int, terms: int) -> dict[str, int]:
    """Columns of the states and tokens that `gradients_kernel` takes at once, warps, and stages of loads.

    On Hopper, with as much shared memory as leaves room for two programs (90 kB for K = V = 128, 96 kB in float32), of
    which one computes while the other loads. Elsewhere 60 and 95 kB, where RTX 3090 and 4090 have 99 kB; for heads of
    256 in float32, neither the copies of a second stage would fit, nor blocks of tokens.
    """
    if hopper:
        warps = 4 if key_padded <= 128 else 8
        return {"BK": 64, "BV": 64, "TARGETS": chunk_size_of(key_padded), "num_warps": warps, "num_stages": 1}
    if terms == 2 and key_padded > 128:
        return {"BK": 32, "BV": 32, "TARGETS": chunk_size_of(key_padded), "num_warps": 8, "num_stages": 1}
    return {"BK": 32, "BV": 32, "TARGETS": 16, "num_warps": 8 if key_padded > 64 else 4, "num_stages": 2}


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def hopper_kernel(device: torch.device):
    """The solve written for Hopper, or None on other devices."""
    if not is_hopper(device):
        return None
    try:
        from .mesa_hopper_solver import solve_chunks_hopper_kernel
    except Exception as error:  # as in `solve_on_hopper`
        warnings.warn(f"Triton's Gluon cannot be used ({error}); a slower kernel solves instead.", stacklevel=2)
        return None
    return solve_chunks_hopper_kernel


def chunk_size_of(key_dim: int) -> int:
    """Tokens a chunk; with heads above 128, as many as the rows of the keys leave room for."""
    return 64 if padded(key_dim) <= 128 else 32


def solution_shape(k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, ...]:
    """`[N, H, C, KP]` of what the forward pass keeps, from shapes alone."""
    batch, length, heads, key_dim = k.shape
    size = chunk_size_of(key_dim)
    if cu_seqlens is None:
        chunks = batch * ceil_div(length, size)
    else:
        chunks = length // size + cu_seqlens.shape[0] - 1
    return chunks, heads, size, padded(key_dim)


def launch_chunkwise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_steps: int,
    tolerance: float | None,
    normalize_qk: bool,
    keep_solution: bool,
    output_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Rows | None]:
    """Forward pass. q, k, v in bfloat16, float16 or float32, all others float32; all contiguous.

    Returns:
        o `[B, T, H, V]` in the dtype of `v`, final states `[S, H, K, K]` and `[S, H, K, V]`; steps (int32) and
        relative residual `[B, T, H]` if `output_stats`; the solutions for the backward pass if `keep_solution`. What
        was not asked for is None.
    """
    # Triton launches on the current device, which may be another one.
    with torch.cuda.device_of(k):
        layer = Layer(k, v, log_gamma, beta, cu_seqlens, normalize_qk)
        chunks = layer.prepare()
        h, g, final = layer.states(chunks, None if initial_h is None else (initial_h, initial_g))
        o = torch.empty_like(v)
        x, steps, residual, _ = layer.solve(
            q, lam, h, g, chunks, max_steps, tolerance, o=o, keep=keep_solution, stats=output_stats
        )
        return o, *final, steps, residual, x


def launch_states(
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
    normalize_k: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The final states of `launch_chunkwise` alone, `[B, H, K, K]` and `[B, H, K, V]`; arguments as there."""
    with torch.cuda.device_of(k):
        layer = Layer(k, v, log_gamma, beta, None, normalize_k)
        initial = None if initial_h is None else (initial_h, initial_g)
        *_, final = layer.states(layer.prepare(), initial, only_final=True)
        return final


def launch_prefill(
    projections: list[torch.Tensor],
    weights: list[torch.Tensor],
    conv_states: list[torch.Tensor | None],
    logits: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor],
    bound: float | None,
    lam: torch.Tensor,
    initial: tuple[torch.Tensor, torch.Tensor] | None,
    max_steps: int,
    tolerance: float | None,
    output_stats: bool,
    norm: tuple[torch.Tensor, float, torch.Tensor | None],
) -> tuple[
    torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor | None, torch.Tensor | None
]:
    """A prompt's tokens between the projections of a layer, without gradients.

    The numbers are those of `launch_short_convolutions`, `launch_gates`, `launch_chunkwise` and `launch_head_norm`,
    one after the other.

    Args:
        projections: of q and k `[B, T, H*K]` and v `[B, T, H*V]`, in bfloat16, float16 or float32, all in one.
        weights: of the convolutions of q, k and, if it has one, v, `[channels, W]`, W from 2 to 8.
        conv_states: their last W - 1 inputs, `[B, channels, W - 1]` in that dtype; all None for zeros.
        logits: of beta and gamma, float32 `[B, T, H]`, without their biases.
        biases: of beta and gamma, `[H]`.
        bound, max_steps, tolerance: as in `launch_gates` and `launch_chunkwise`.
        lam: float32 `[H, K]`.
        initial: states H and G as in `launch_chunkwise`, or None.
        output_stats: also return steps and residual.
        norm: weight, epsilon and gate (`[B, T, H, V]` or None) of the outputs' norm.

    Returns:
        Normalised o `[B, T, H, V]`, new states of the convolutions, final H and G, steps and residual (or None).
    """
    heads = logits[0].shape[-1]
    # Triton launches on the current device, which may be another one.
    with torch.cuda.device_of(lam):
        projections = [with_dense_channels(x) for x in projections]
        _, k, v = (x.unflatten(-1, (heads, -1)) for x in projections)
        layer = Layer(k, v, None, None, None, True)  # of keys and values yet to be convolved: their sizes count
        q, conv_states, chunks = layer.convolve(projections, weights, conv_states, logits, biases, bound)
        if initial is not None:
            initial = tuple(state.contiguous() for state in initial)
        h, g, final = layer.states(chunks, initial)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        weight, norm_epsilon, gate = norm
        _, steps, residual, _ = layer.solve(
            q,
            lam.contiguous(),
            h,
            g,
            chunks,
            max_steps,
            tolerance,
            o=o,
            keep=False,
            stats=output_stats,
            norm=Norm(weight.contiguous(), norm_epsilon, None if gate is None else gate.contiguous()),
        )
        return o, conv_states, final, steps, residual


@torch.library.custom_op(f"{NAMESPACE}::triton_chunkwise", mutates_args=())
def triton_chunkwise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_steps: int,
    tolerance: float | None,
    backward_max_steps: int,
    backward_tolerance: float | None,
    normalize_qk: bool,
    keep_solution: bool,
    output_stats: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """`launch_chunkwise` as an operator with gradients: the solutions are three tensors, and empty stands for None."""
    o, final_h, final_g, steps, residual, x = launch_chunkwise(
        q, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens,
        max_steps, tolerance, normalize_qk, keep_solution, output_stats,
    )  # fmt: skip
    if steps is None:
        steps, residual = beta.new_empty(0, dtype=torch.int32), beta.new_empty(0)
    if x is None:
        x = (*(beta.new_empty(0, dtype=torch.float16) for _ in range(2)), beta.new_empty(0))
    return o, final_h, final_g, steps, residual, *x


@triton_chunkwise.register_fake
def _(q, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens, *options):
    keep_solution, output_stats = options[-2:]
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens = k.shape[:3] if output_stats else (0,)
    solution = solution_shape(k, cu_seqlens) if keep_solution else (0,)
    return (
        torch.empty_like(v),
        beta.new_empty(sequences, heads, key_dim, key_dim),
        beta.new_empty(sequences, heads, key_dim, value_dim),
        beta.new_empty(tokens, dtype=torch.int32),
        beta.new_empty(tokens),
        beta.new_empty(solution, dtype=torch.float16),
        beta.new_empty(solution, dtype=torch.float16),
        beta.new_empty(solution[:3]),
    )


@torch.library.custom_op(f"{NAMESPACE}::triton_chunkwise_backward", mutates_args=())
def triton_chunkwise_backward(
    grad_o: torch.Tensor | None,
    grad_final_h: torch.Tensor | None,
    grad_final_g: torch.Tensor | None,
    x: torch.Tensor,
    x_rest: torch.Tensor,
    x_unit: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_steps: int,
    tolerance: float | None,
    normalize_qk: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Implicit gradients of q, k, v, log_gamma, beta, lam and the two initial states; see `chunkwise_backward`."""
    with torch.cuda.device_of(k):
        layer = Layer(k, v, log_gamma, beta, cu_seqlens, normalize_qk)
        chunks = layer.prepare()
        initial = None if initial_h is None else (initial_h, initial_g)
        h, g, final = layer.states(chunks, initial)
        grad_o = torch.zeros_like(v) if grad_o is None else grad_o
        grad_final = None
        if grad_final_h is not None or grad_final_g is not None:
            grad_final = tuple(
                torch.zeros_like(state) if grad is None else grad
                for grad, state in zip((grad_final_h, grad_final_g), final, strict=True)
            )
        x = Rows(x, x_rest, x_unit)
        y, _, _, adjoints = layer.solve(grad_o, lam, h, g, chunks, max_steps, tolerance, x=x)
        dh, dg, crossing, grad_initial = layer.adjoints(x, y, adjoints, h, g, chunks, grad_final)
        grads = layer.gradients(x, y, q, adjoints, dh, dg, crossing, chunks, max_steps > 0)
        return (*grads, *grad_initial)


@triton_chunkwise_backward.register_fake
def _(
    grad_o,
    grad_h,
    grad_g,
    x,
    x_rest,
    x_unit,
    q,
    k,
    v,
    log_gamma,
    beta,
    lam,
    initial_h,
    initial_g,
    cu_seqlens,
    *options,
):
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (
        beta.new_empty(sequences, heads, key_dim, key_dim),
        beta.new_empty(sequences, heads, key_dim, value_dim),
    )
    return (*(torch.empty_like(t) for t in (q, k, v, log_gamma, beta, lam)), *states)


def _setup_context(ctx, inputs, output):
    q, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens, max_steps, _, steps, tolerance, normalize, *_ = (
        inputs
    )
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*output[5:], q, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens)
    ctx.options = (steps if max_steps > 0 else 0), tolerance, normalize


def _backward(ctx, grad_o, grad_final_h, grad_final_g, *_):
    saved = ctx.saved_tensors  # once: gradient checkpointing forbids unpacking a tensor twice
    grads = OPERATORS.triton_chunkwise_backward(
        *(None if grad is None else grad.contiguous() for grad in (grad_o, grad_final_h, grad_final_g)),
        *saved,
        *ctx.options,
    )
    has_initial_state = saved[9] is not None
    return (*grads[:6], *(grads[6:] if has_initial_state else (None, None)), *[None] * 8)


triton_chunkwise.register_autograd(_backward, setup_context=_setup_context)
