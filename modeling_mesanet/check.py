# SPDX-License-Identifier: Apache-2.0
"""`mesanet check`: proves of a checkpoint that it gives the same results whichever way its tokens reach it.

Dimensions: B batch, T tokens, S packed sequences.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from transformers import GenerationConfig, PreTrainedModel, StaticCache

from .doctor import installed_versions
from .loading import find_checkpoint, load_checkpoint, weights_sha256
from .mesa import select_backend
from .state_mesanet import load_state, save_state

# Largest relative difference between two ways to the logits of a token. In float32 they differ by rounding, which may
# make a token stop a step earlier or later, within the solver's tolerance; a pad or a token that leaks changes the
# logits a hundred times as much. Tolerances above 1e-4 widen the bound.
BOUND = 1e-3
_BOUND_OVER_TOLERANCE = 10

# Tokens of the longest prompt: two chunks of the usual size and a rest.
LENGTH = 150
_NEW_TOKENS = 24


class NotRun(Exception):
    """A property that cannot be tested here; the message says why."""


def check(
    path: str | os.PathLike | None = None, device: torch.device | str = "cpu", *, argument: str = "path"
) -> dict:
    """Test a checkpoint on `device`, in float32 and with its own solver settings, on random tokens.

    Args:
        path: folder of a checkpoint or Hub id; None is the bundled one.
        device: where the model runs.
        argument: what to call `path` in messages.

    Returns:
        JSON types: `verdict` ("pass" or "fail"), `checks` (a list of dicts with `name`, `error`, `bound`, `status` of
        "pass", "fail" or "not run", and `reason`, a sentence or None; `error` and `bound` are None where nothing was
        compared), `path`, `weights` (their SHA-256), `device`, `backend`, `dtype` and `versions`.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    device = torch.device(device)
    folder = find_checkpoint(path, argument=argument)
    model = load_checkpoint(folder, device=device, argument=argument)
    bound = max(BOUND, _BOUND_OVER_TOLERANCE * (model.config.cg_tolerance or 0.0))
    checks = [_run(name, function, bound, model) for name, function in CHECKS.items()]
    return {
        "verdict": "fail" if any(entry["status"] == "fail" for entry in checks) else "pass",
        "checks": checks,
        "path": str(folder),
        "weights": weights_sha256(folder),
        "device": str(device),
        "backend": select_backend(device, model.config.kernel_backend)[0],
        "dtype": "float32",
        "versions": installed_versions(),
    }


def _run(name: str, function: Callable[[PreTrainedModel], float], bound: float, model: PreTrainedModel) -> dict:
    entry = {"name": name, "error": None, "bound": None, "reason": None}
    try:
        with torch.no_grad():
            error = function(model)
    except NotRun as reason:
        return entry | {"status": "not run", "reason": str(reason)}
    # Whatever goes wrong in one property is its result, and the others are tested all the same.
    except Exception as failure:
        return entry | {"status": "fail", "reason": f"{type(failure).__name__}: {' '.join(str(failure).split())}"}
    # NaN compares false, and has no place in JSON.
    entry |= {"error": error if error < float("inf") else None, "bound": 0.0 if function in EXACT else bound}
    if entry["error"] is None:
        return entry | {"status": "fail", "reason": "the logits are not finite"}
    return entry | {"status": "pass" if error <= entry["bound"] else "fail"}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two logits `[..., vocabulary]` of a token, relative to their norm."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm(dim=-1) / size(expected)).max().item()


def size(logits: torch.Tensor) -> torch.Tensor:
    """The norm of each token's logits; where all are 0, as good as that, so that others must be 0, too."""
    return logits.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)


def largest(errors: Iterable[float]) -> float:
    """The largest error, NaN if one of them is (Python's `max` may pass over it)."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """Random tokens `[B, T]`, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[T, vocabulary]` of one sequence `[T]` by itself, without a cache."""
    return model(ids.unsqueeze(0), use_cache=False).logits[0]


def finite_weights(model: PreTrainedModel) -> float:
    """The share of the weights that are NaN or infinite; some of them reach few logits or none."""
    counts = [(weight.numel(), (~weight.isfinite()).sum().item()) for weight in model.state_dict().values()]
    return sum(bad for _, bad in counts) / sum(count for count, _ in counts)


def batch_size(model: PreTrainedModel) -> float:
    """A batch against its rows one by one."""
    ids = tokens(model, 3, LENGTH)
    together = model(ids, use_cache=False).logits
    return largest(difference(row, alone(model, own)) for row, own in zip(together, ids, strict=True))


def padding(model: PreTrainedModel, place: Callable[[int, int], torch.Tensor]) -> float:
    """Rows of several lengths with pads, fed in two pieces with a cache, against the rows by themselves.

    Args:
        place: where the tokens lie, bool `[T]`, from their number and T.
    """
    lengths = (LENGTH // 2, 70, 5, 1)
    mask = torch.stack([place(length, LENGTH // 2) for length in lengths]).to(model.device)
    # Pads hold tokens too, which must not matter.
    ids = tokens(model, *mask.shape)
    half = LENGTH // 4
    first = model(ids[:, :half], attention_mask=mask[:, :half], use_cache=True)
    second = model(ids[:, half:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits, second.logits], dim=1)
    return largest(
        difference(row[real], alone(model, own[real])) for row, own, real in zip(logits, ids, mask, strict=True)
    )


def left(length: int, width: int) -> torch.Tensor:
    return torch.arange(width) >= width - length


def right(length: int, width: int) -> torch.Tensor:
    """A prompt padded on the right, and the few tokens that are written after the pads."""
    return (torch.arange(width) < length) | left(4, width)


def between(length: int, width: int) -> torch.Tensor:
    """Half of the tokens at either end, as in a chat whose first turns were padded."""
    return (torch.arange(width) < length // 2) | left(length - length // 2, width)


def packing(model: PreTrainedModel) -> float:
    """Sequences packed into one row against the sequences by themselves."""
    bounds = [0, 3, 67, 68, LENGTH]
    ids = tokens(model, 1, LENGTH)
    packed = model(ids, cu_seq_lens_q=torch.tensor(bounds, device=model.device), use_cache=False).logits[0]
    return largest(difference(packed[start:end], alone(model, ids[0, start:end])) for start, end in pairwise(bounds))


def split(model: PreTrainedModel) -> float:
    """A text in pieces, some of them one token, each from the state after the last, against the text at once."""
    ids = tokens(model, 2, LENGTH)
    bounds = [0, 1, 2, 5, 69, 70, LENGTH - 8, *range(LENGTH - 7, LENGTH + 1)]
    cache, pieces = None, []
    for start, end in pairwise(bounds):
        output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return difference(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits)


def fork(model: PreTrainedModel) -> float:
    """Two texts that share their beginning, read once and copied, against both at once."""
    ids = tokens(model, 2, LENGTH)
    ids[1, :80] = ids[0, :80]
    state = model(ids[:1, :80], use_cache=True).past_key_values
    errors = []
    for row in ids:
        rest = model(row[None, 80:], past_key_values=copy.deepcopy(state), use_cache=True).logits[0]
        errors.append(difference(rest, alone(model, row)[80:]))
    return largest(errors)


def state_file(model: PreTrainedModel) -> float:
    """A text continued from a state that was saved and loaded, against the text at once."""
    ids = tokens(model, 2, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "state.safetensors")
        save_state(model(ids[:, :80], use_cache=True).past_key_values, path, model=model)
        state = load_state(path, model=model)
    rest = model(ids[:, 80:], past_key_values=state, use_cache=True).logits
    return difference(rest, model(ids, use_cache=False).logits[:, 80:])


def generated(model: PreTrainedModel, ids: torch.Tensor, **options) -> float:
    """How far greedy decoding is from what the model says of the same tokens at once, without a cache.

    Returns:
        The larger of two errors: of the logits, where `generate()` hands them out, and of the choice (by how much, in
        units of the logits' norm, another token was likelier than the chosen one).
    """
    own = model.generation_config
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=0 if own.pad_token_id is None else own.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    # Rows of one length have no pads, whatever tokens they are made of.
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    # `min_new_tokens` keeps the end-of-text tokens from being chosen, so they are no rivals either.
    length = ids.shape[1]
    expected = model(output.sequences[:, :-1], use_cache=False).logits[:, length - 1 :].double()
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    rivals = expected.clone()
    rivals[..., [end for end in ends if end is not None]] = -torch.inf
    chosen = expected.gather(-1, output.sequences[:, length:, None]).squeeze(-1)
    choice = ((rivals.amax(dim=-1) - chosen) / size(expected)).max().item()
    if output.logits is None or len(output.logits) != _NEW_TOKENS:
        return choice
    return largest([choice, difference(torch.stack(output.logits, dim=1), expected)])


def cached(model: PreTrainedModel) -> float:
    return generated(model, tokens(model, 2, 40))


def static(model: PreTrainedModel) -> float:
    """The static cache, whose addresses stay, fed in pieces and token by token, against no cache."""
    ids = tokens(model, 2, 60)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    pieces = [
        model(ids[:, start:end], past_key_values=cache, use_cache=True).logits
        for start, end in pairwise([0, 50, *range(51, 61)])
    ]
    return difference(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits)


def rollback(model: PreTrainedModel) -> float:
    """Prompt-lookup decoding, which takes back the tokens that it guessed wrongly."""
    if model._is_stateful:
        raise NotRun("decoding that takes tokens back is not available for this model")
    # A text that repeats itself: some guesses are right, some are not.
    return generated(model, tokens(model, 1, 12).repeat(1, 4), prompt_lookup_num_tokens=4)


def reload(model: PreTrainedModel) -> float:
    """Saved and loaded again: the same logits, bit for bit."""
    ids = tokens(model, 2, 20)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load_checkpoint(folder, model_class=type(model), dtype=model.dtype, device=model.device)
        return difference(again(ids).logits, model(ids).logits)


def cpu_against_triton(model: PreTrainedModel) -> float:
    """The torch path on the CPU against the Triton path: a prompt at once, then token by token."""
    if model.device.type != "cuda":
        raise NotRun("no GPU" if not torch.cuda.is_available() else f"the device is {model.device}")
    backend, reason = select_backend(model.device, model.config.kernel_backend)
    if backend != "triton":
        raise NotRun(f"Triton does not run the model: {reason}")
    on_cpu = copy.deepcopy(model).to("cpu")
    ids = tokens(model, 2, LENGTH)
    prompt = model(ids[:, :-8], use_cache=True)
    pieces = [prompt.logits]
    for position in range(LENGTH - 8, LENGTH):
        token = ids[:, position : position + 1]
        pieces.append(model(token, past_key_values=prompt.past_key_values, use_cache=True).logits)
    return difference(torch.cat(pieces, dim=1), on_cpu(ids.cpu(), use_cache=False).logits)


# What is tested, by the name it is reported under.
CHECKS: dict[str, Callable[[PreTrainedModel], float]] = {
    "finite weights": finite_weights,
    "batch size": batch_size,
    "padding left": lambda model: padding(model, left),
    "padding right": lambda model: padding(model, right),
    "padding between turns": lambda model: padding(model, between),
    "packing": packing,
    "split": split,
    "fork of a state": fork,
    "state file": state_file,
    "cached against uncached": cached,
    "static cache": static,
    "rollback": rollback,
    "save and reload": reload,
    "CPU against Triton": cpu_against_triton,
}

# Those where nothing may differ: each repeats a computation, or counts.
EXACT = {finite_weights, reload}


__all__ = ["BOUND", "CHECKS", "check"]
