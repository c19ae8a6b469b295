# SPDX-License-Identifier: Apache-2.0
"""The recurrent state of a MesaNet inside transformers' caches: constant size, whatever the number of tokens."""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, StaticCache
from transformers.configuration_utils import PreTrainedConfig

from .rollback_mesanet import KEPT_TOKENS, Consumed, StateTape

# Slots of a layer's convolution states (the inputs of the last `conv_kernel_size - 1` tokens) and recurrent states.
CONV_Q, CONV_K, CONV_V = 0, 1, 2
RECURRENT_H, RECURRENT_G = 0, 1


class MesaNetCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """State of one Mesa layer for a batch of B sequences.

    `recurrent_states` hold H `[B, H, K, K]` and G `[B, H, K, V]` in float32; `conv_states` the last inputs of each
    convolution, `[B, channels, conv_kernel_size - 1]`, in the dtype of the activations. Unlike the stock linear layer
    it counts tokens (stock `generate()` asks for that), can be expanded and reduced along the batch, can be reused
    outside the `torch.inference_mode` it was made in, and can take tokens back that it consumed while recording.

    Args:
        number_of_states: convolution slots, 2 or 3.
        static: belongs to a static cache: shapes and addresses stay fixed, so a compiled step may read it.
    """

    def __init__(self, number_of_states: int = 2, static: bool = False):
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.keys = self.values = None
        self.is_initialized = False
        # Only static caches may be compiled: for others `generate` would replace the 2D mask by a dictionary of masks.
        self.is_compileable = static
        # A tensor, because a Python number in a compiled step would be a new constant at every token.
        self.seen_tokens: torch.Tensor | None = None
        # Whether `write` counts, or somebody else does.
        self.is_counting = True

    @property
    def record_past(self) -> bool:
        """Whether consumed tokens are recorded. Also transformers sets it; what is recorded goes with it."""
        return self._record_past

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self._record_past = on
        self._forget_tape()

    def _forget_tape(self) -> None:
        # What was consumed since the last `crop`, and the last tokens before that; only while recording.
        self.tape: StateTape | None = None
        self.past: StateTape | None = None

    @property
    def batch_size(self) -> int:
        """Sequences held. Missing before the first forward pass, which is how transformers tells an unused layer."""
        if not self.is_initialized:
            raise AttributeError("batch_size is known after the first forward pass")
        return self.recurrent_states[RECURRENT_H].shape[0]

    def fits(self, conv_states: int, heads_key_value: tuple[int, int, int], memory: int) -> bool:
        """Whether a layer of these sizes can continue from here; an unused layer takes any but the first.

        Args:
            conv_states: convolutions of the layer.
            heads_key_value: H, K and V.
            memory: `conv_kernel_size - 1`.
        """
        return self.number_of_states == conv_states and (
            not self.is_initialized
            or (
                self.recurrent_states[RECURRENT_G].shape[1:] == heads_key_value
                and self.conv_states[CONV_Q].shape[-1] == memory
            )
        )

    def check_dtype(self, dtype: torch.dtype, under_autocast: bool) -> None:
        """Refuse activations of `dtype` that would be rounded to what the states are stored in, or the other way.

        Under autocast, which converts activations, the states may be stored in a wider dtype.

        Raises:
            ValueError: as above.
        """
        if not self.is_initialized:
            return
        stored, state = self.conv_states[CONV_Q].dtype, self.recurrent_states[RECURRENT_H].dtype
        fits = stored == dtype or (under_autocast and torch.promote_types(stored, dtype) == stored)
        if not fits or state != torch.promote_types(dtype, torch.float32):
            raise ValueError(
                f"past_key_values was made with activations in {stored} but this model's are in {dtype}; use a cache "
                "that this model made, or load the model with the other's dtype."
            )

    def get_seq_length(self) -> torch.Tensor | int:
        """Tokens consumed so far, pads included; a zero-dimensional tensor once the layer is in use."""
        return 0 if self.seen_tokens is None else self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything consumed and `query_length` new tokens."""
        return self.get_seq_length() + query_length, 0

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("A Mesa layer keeps a recurrent state, no keys and values.")

    def conv_state(self, slot: int) -> torch.Tensor | None:
        """Convolution state of `slot`, None before the first token; a copy where autograd may need it unchanged."""
        return self._read(self.conv_states[slot], slot)

    def recurrent_state(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(H, G)`, None before the first token; copies where a later update would spoil autograd."""
        h = self._read(self.recurrent_states[RECURRENT_H], RECURRENT_H)
        return None if h is None else (h, self._read(self.recurrent_states[RECURRENT_G], RECURRENT_G))

    def _read(self, state: torch.Tensor | None, slot: int) -> torch.Tensor | None:
        if not self.has_previous_state[slot]:
            return None
        return state.clone() if torch.is_grad_enabled() else state

    def write(
        self,
        conv_states: list[torch.Tensor],
        recurrent_states: tuple[torch.Tensor, torch.Tensor],
        tokens: int,
    ) -> None:
        """Take over the states after `tokens` more tokens, in place and outside autograd.

        Args:
            conv_states: one `[B, channels, conv_kernel_size - 1]` a slot.
            recurrent_states: `(H, G)`; tensors that are already the stored ones are left alone.
            tokens: tokens consumed since the last call.
        """
        for slot, state in enumerate(conv_states):
            if self.is_conv_states_initialized[slot]:
                self._overwrite(self.conv_states, slot, state)
            else:
                self.lazy_initialization(conv_states=state, state_idx=slot)
        for slot, state in enumerate(recurrent_states):
            if self.is_recurrent_states_initialized[slot]:
                self._overwrite(self.recurrent_states, slot, state)
            else:
                self.lazy_initialization(recurrent_states=state, state_idx=slot)
        if self.seen_tokens is None:
            self.seen_tokens = torch.zeros((), dtype=torch.long, device=recurrent_states[RECURRENT_H].device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.seen_tokens)
        if (writable := self._writable(self.seen_tokens)) is not self.seen_tokens:
            self.seen_tokens = writable
        if self.is_counting:
            self.seen_tokens.add_(tokens)
        # The first tokens, or the first after `reset`.
        if not self.has_previous_state[RECURRENT_H]:
            self.has_previous_state = dict.fromkeys(self.has_previous_state, True)
            self.is_initialized = True

    def lazy_initialization(
        self,
        conv_states: torch.Tensor | None = None,
        recurrent_states: torch.Tensor | None = None,
        state_idx: int = 0,
        **kwargs,
    ) -> None:
        """As the stock layer's, but what is given is itself stored, where the stock one makes room for it.

        To fill that with zeros and then to write over them would be two launches a state.
        """
        if conv_states is not None:
            if self.device is None:
                self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = conv_states.shape[-1]
            self.conv_states[state_idx] = self._adopt(conv_states)
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = self._adopt(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    @staticmethod
    def _adopt(state: torch.Tensor) -> torch.Tensor:
        """`state` if nothing else lies in its memory, else a copy; its address stays for a compiled step to read."""
        state = state.detach()
        if torch.compiler.is_compiling():
            return state.clone(memory_format=torch.contiguous_format)
        alone = state.is_contiguous() and state.untyped_storage().nbytes() == state.nbytes
        if torch.is_grad_enabled() or not alone:  # autograd may need what it was
            state = state.clone(memory_format=torch.contiguous_format)
        torch._dynamo.mark_static_address(state)
        return state

    def make_writable(self) -> None:
        """Allow in-place updates, which the tensors of a cache made under `inference_mode` forbid outside it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        self.move(self._writable)

    def move(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace all states and the counter by what `function` makes of them, which must be as large."""
        self._map_states(function)
        if self.seen_tokens is not None:
            self.seen_tokens = function(self.seen_tokens)

    def _overwrite(self, states: dict[int, torch.Tensor], slot: int, state: torch.Tensor) -> None:
        stored = states[slot]
        if stored is state:
            return
        # A compiled step repeats every assignment, also of what was there: nothing is assigned that has not changed.
        if (writable := self._writable(stored)) is not stored:
            states[slot] = writable
        writable.copy_(state.detach())

    @staticmethod
    def _writable(stored: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return stored
        return stored.clone() if stored.is_inference() and not torch.is_inference_mode_enabled() else stored

    def reset(self) -> None:
        """Forget every token; tensors and addresses stay."""
        self.make_writable()
        self._forget_tape()
        super().reset()
        if self.seen_tokens is not None:
            self.seen_tokens.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let the sequences be those of `beam_idx`, in that order."""
        self.batch_select_indices(beam_idx)

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs to take tokens back."""
        self.record_past = True

    def stop_recording(self) -> None:
        """Keep no more than the states; tokens consumed so far stay."""
        self.record_past = False

    def record(self, consumed: Consumed, memory: int, backend: str | None = None) -> None:
        """Remember tokens, called before the states take them in.

        Args:
            consumed: what the layer reads of them.
            memory: `conv_kernel_size - 1`.
            backend: as in `mesa_attention`, for the replay.
        """
        if self.tape is None:
            conv_states = [
                x.new_zeros(x.shape[0], x.shape[2], memory)
                if (state := self._read(self.conv_states[slot], slot)) is None
                else state.clone()
                for slot, x in enumerate(consumed.conv_inputs)
            ]
            state = self.recurrent_state()
            # A snapshot of its own: the states are updated in place.
            self.tape = StateTape(conv_states, None if state is None else tuple(x.clone() for x in state), backend)
            # Here, since after the last `crop` of all nobody needs it.
            if self.past is not None and self.past.tokens > 2 * KEPT_TOKENS:
                self.past.settle(self.past.tokens - KEPT_TOKENS)
        tokens = self.tape.tokens + consumed.k.shape[1]
        self.tape.append(consumed)
        if self.tape.tokens < tokens:  # it begins later now, and no longer where `past` ends
            self.past = None

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back, and go on recording.

        Args:
            tokens_to_remove: 0 or negative, as transformers counts; at most as many as were recorded since the last
                call, and KEPT_TOKENS of those before.

        Raises:
            ValueError: positive.
            RuntimeError: so many tokens were not recorded. The state is then untouched.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(
                f"tokens_to_remove is {-count}; give minus the number of tokens to take back, such as {count}."
            )
        since = 0 if self.tape is None else self.tape.tokens
        before = 0 if self.past is None else self.past.tokens
        if count > since + before and self.is_initialized:
            raise RuntimeError(
                f"{count} tokens cannot be taken back, since a recurrent state does not contain its past and "
                f"{since + before} are recorded; call activate_past_recording() on the cache before the tokens, or "
                "copy the cache (copy.deepcopy) before them."
            )
        if not self.is_initialized:
            return
        tape, self.tape = self.tape, None
        left = since - count
        if left < 0:
            tape, self.past, left = self.past, None, before + left
        if tape is None:  # nothing recorded, nothing to take back
            return
        if tape.take_back is not None:  # the next pass writes over this tape: none of it may stay in `past`
            tape.take_back(left)
            return
        conv_states, recurrent_states = tape.states_after(left) if count else (None, None)
        tape.cut(left)
        if self.past is None:
            self.past = tape
        else:
            self.past.extend(tape)
        if count and recurrent_states is None:
            self.reset()
        elif count:
            self.write(conv_states, recurrent_states, -count)

    def take_back_unchecked(self) -> None:
        """Take back what was recorded since the last `crop`: drafts that have not been compared."""
        if self.tape is not None:
            self.crop(-self.tape.tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies side by side."""
        self._forget_tape()  # of the sequences as they were
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        self._forget_tape()
        self._map_states(lambda state: state[indices.to(state.device) if torch.is_tensor(indices) else indices])

    def _map_states(self, function) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for slot, state in states.items():
                if state is not None:
                    states[slot] = function(state)


def upgrade_cache(cache: Cache, config: PreTrainedConfig) -> Cache:
    """Replace the unused stock layers of `cache` by Mesa layers, in place; checks that the cache fits the model.

    Works on what `generate()` prepares and on a user's `DynamicCache(config=...)` or `StaticCache(config=...)`.

    Raises:
        ValueError: `cache` is no transformers cache, was made without a config, or belongs to another model.
    """
    remedy = "pass DynamicCache(config=model.config), or leave past_key_values out."
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}; {remedy}")
    if not cache.layers and cache.layer_class_to_replicate is not None:
        raise ValueError(f"past_key_values is a {type(cache).__name__} made without a config; {remedy}")
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers but the model has {config.num_hidden_layers}; {remedy}"
        )
    # Read once: a config's attributes are slow, and this runs at every token.
    sizes = (
        config.number_of_conv_states,
        (config.num_attention_heads, config.head_dim, config.value_head_dim),
        config.conv_kernel_size - 1,
    )
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MesaNetCacheLayer):
            if not layer.fits(*sizes):
                raise ValueError(f"past_key_values holds the state of another model at layer {index}; {remedy}")
        elif type(layer) is not LinearAttentionLayer or any(layer.has_previous_state.values()):
            if isinstance(layer, CacheLayerMixin):
                raise ValueError(
                    f"past_key_values holds keys and values (a {type(layer).__name__} at layer {index}), which a "
                    f"recurrent state has no place for; {remedy} Instead of prefix tuning, use LoRA or prompt tuning."
                )
            raise ValueError(f"past_key_values holds a {type(layer).__name__} at layer {index}; {remedy}")
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, MesaNetCacheLayer):
            static = isinstance(cache, StaticCache)
            cache.layers[index] = MesaNetCacheLayer(config.number_of_conv_states, static=static)
            cache.layers[index].record_past = layer.record_past
    return cache


def cached_length(cache: Cache) -> int:
    """Tokens that an upgraded cache has consumed; a pipeline's stage counts in its own layers, not in the first."""
    layer = next((layer for layer in cache.layers if layer.is_initialized), cache.layers[0])
    return int(layer.get_seq_length())


def state_bytes(config: PreTrainedConfig, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the recurrent state of `batch_size` sequences with activations of `dtype`, at any number of tokens."""
    key_channels = config.num_attention_heads * config.head_dim
    value_channels = config.num_attention_heads * config.value_head_dim
    conv_channels = 2 * key_channels + (value_channels if config.conv_on_value else 0)
    conv = conv_channels * (config.conv_kernel_size - 1) * dtype.itemsize
    recurrent = config.num_attention_heads * config.head_dim * (config.head_dim + config.value_head_dim) * 4
    return config.num_hidden_layers * batch_size * (conv + recurrent)
