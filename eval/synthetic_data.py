# SPDX-License-Identifier: Apache-2.0
"""Examples of the synthetic benchmarks, drawn from a random generator.

The six tasks of MAD (mechanistic architecture design, arXiv 2403.17844), multi-query associative recall (MQAR, arXiv
2312.04927, in the sizes of arXiv 2402.18668) and in-context language learning after RegBench (arXiv 2401.12973).

Dimensions: N examples, T tokens, P key-value pairs, V vocabulary.
"""

from typing import NamedTuple

import numpy as np

# A target that is neither trained on nor scored.
IGNORED = -100


class Examples(NamedTuple):
    """Examples of one length.

    `inputs` int32 `[N, T]`; `targets` int64 `[N, T]`, the token that belongs at each position, `IGNORED` where nothing
    is asked; `accepted` bool `[N, T, V]`, where other answers than the target count as right, else None.
    """

    inputs: np.ndarray
    targets: np.ndarray
    accepted: np.ndarray | None = None


def next_tokens(tokens: np.ndarray, scored: np.ndarray, training: bool) -> Examples:
    """Examples of predicting the next token, from `tokens` `[N, T + 1]`.

    MAD trains on every next token and tests on the `scored` ones (bool, as `tokens`).
    """
    targets = np.where(scored | training, tokens, IGNORED)
    return Examples(tokens[:, :-1].astype(np.int32), targets[:, 1:].astype(np.int64))


def pick(rng: np.random.Generator, allowed: np.ndarray) -> np.ndarray:
    """A column of each row of `allowed` (bool), all allowed ones equally likely."""
    return np.where(allowed, rng.random(allowed.shape), -1).argmax(axis=1)


def distinct(rng: np.random.Generator, count: int, size: int, choices: int) -> np.ndarray:
    """`[count, size]` numbers below `choices`, distinct within each row."""
    rows = max(1, 1 << 24 >> max(0, choices - 1).bit_length())  # some 64 MB of random numbers at a time
    drawn = np.empty((count, size), np.int64)
    for start in range(0, count, rows):
        keys = rng.random((min(rows, count - start), choices), np.float32)
        part = np.argpartition(keys, size - 1, axis=1)[:, :size] if size < choices else keys.argsort(axis=1)
        drawn[start : start + rows] = part
    return drawn


def in_context_recall(
    rng: np.random.Generator, count: int, training: bool, *, length: int, vocab: int, noise: float, noise_vocab: int
) -> Examples:
    """Pairs of key and value, in another random mapping each example; the value of a key shown before is asked.

    A share `noise` of the pairs is replaced by two tokens of a vocabulary of their own.
    """
    symbols, pairs = vocab - noise_vocab, length // 2
    key_count = symbols // 2
    keys = rng.integers(key_count, size=(count, pairs))
    noisy = rng.random((count, pairs)) < noise
    rows = np.arange(count)
    # One pair at least is shown, and the last one asks for a key that was.
    noisy[rows, rng.integers(pairs - 1, size=count)] = False
    noisy[:, -1] = False
    shown = np.zeros((count, key_count), bool)
    seen = np.zeros((count, pairs), bool)
    for pair in range(pairs):
        if pair == pairs - 1:
            keys[:, pair] = pick(rng, shown)
        seen[:, pair] = shown[rows, keys[:, pair]] & ~noisy[:, pair]
        shown[rows, keys[:, pair]] |= ~noisy[:, pair]
    mapping = rng.integers(key_count, symbols, size=(count, key_count))
    tokens = np.stack([keys, np.take_along_axis(mapping, keys, axis=1)], axis=2)
    if noise_vocab:
        tokens = np.where(noisy[:, :, None], rng.integers(symbols, vocab, size=tokens.shape), tokens)
    scored = np.stack([np.zeros_like(seen), seen], axis=2)
    return next_tokens(tokens.reshape(count, -1), scored.reshape(count, -1), training)


def fuzzy_in_context_recall(
    rng: np.random.Generator, count: int, training: bool, *, length: int, vocab: int, motif: int
) -> Examples:
    """Recall of keys and values that are several tokens long: one to `motif`, keys of the test always `motif`.

    No token occurs twice in a key or a value. One pair is shown for certain and asked for at the end; pads stand in
    front.
    """
    pad = vocab - 1
    key_count = pad // 2
    value_count = pad - key_count
    tokens = np.full((count, length + 1), pad)
    scored = np.zeros((count, length + 1), bool)
    most = length  # pairs that fit, each of at least two tokens, with room to spare
    key_sizes = rng.integers(1, motif + 1, size=(count, most)) if training else np.full((count, most), motif)
    value_sizes = rng.integers(1, motif + 1, size=(count, most))
    key_symbols = distinct(rng, count * most, motif, key_count).reshape(count, most, motif)
    value_symbols = key_count + distinct(rng, count * most, motif, value_count).reshape(count, most, motif)
    probe_place = rng.random(count)
    for row in range(count):
        sizes = zip(key_sizes[row].tolist(), value_sizes[row].tolist(), strict=True)
        symbols = zip(key_symbols[row].tolist(), value_symbols[row].tolist(), sizes, strict=True)
        pairs = [(tuple(key[:k]), tuple(value[:v])) for key, value, (k, v) in symbols]
        probe = pairs.pop()
        probe_size = len(probe[0]) + len(probe[1])
        # Early enough to be reached before the line is full, whatever the sizes of the pairs.
        probe_from = int(probe_place[row] * (length - probe_size - 4 * motif + 1))
        known: dict[tuple, tuple] = {}
        line: list[int] = []
        asked: list[bool] = []
        while len(line) < length - probe_size - 2 * motif:
            due = len(line) >= probe_from and probe[0] not in known
            key, value = probe if due else pairs.pop()
            if key == probe[0]:
                value = probe[1]
            repeated = key in known
            value = known.setdefault(key, value)
            line += [*key, *value]
            asked += [False] * len(key) + [repeated] * len(value)
        line += [*probe[0], *probe[1]]
        asked += [False] * len(probe[0]) + [True] * len(probe[1])
        tokens[row, -len(line) :] = line
        scored[row, -len(line) :] = asked
    return next_tokens(tokens, scored, training)


def selective_copying(
    rng: np.random.Generator, count: int, training: bool, *, length: int, vocab: int, copied: int
) -> Examples:
    """Tokens scattered among blanks; after the copy token they are asked for in their order."""
    copy_token, blank = vocab - 1, vocab - 2
    blanks = length - 2 * copied - 1
    symbols = rng.integers(blank, size=(count, copied))
    before = rng.multinomial(blanks, [1 / copied] * copied, size=count).cumsum(axis=1)
    inputs = np.full((count, length), blank, np.int32)
    np.put_along_axis(inputs, before + np.arange(copied), symbols, axis=1)
    inputs[:, blanks + copied] = copy_token
    targets = np.full((count, length), IGNORED, np.int64)
    targets[:, -copied:] = symbols
    return Examples(inputs, targets)


def memorization(
    rng: np.random.Generator, count: int, training: bool, *, length: int, vocab: int, mapping_seed: int
) -> Examples:
    """Keys, each followed by a place to fill in with its value, in one mapping for all examples of a seed."""
    fill_in = vocab - 1
    key_count = fill_in // 2
    mapping = key_count + np.random.default_rng(mapping_seed).permutation(fill_in - key_count)
    keys = rng.integers(key_count, size=(count, length // 2))
    inputs = np.full((count, length), fill_in, np.int32)
    targets = np.full((count, length), IGNORED, np.int64)
    inputs[:, ::2], targets[:, 1::2] = keys, mapping[keys]
    return Examples(inputs, targets)


def compression(rng: np.random.Generator, count: int, training: bool, *, length: int, vocab: int) -> Examples:
    """Random tokens and one that ends them, from whose output alone all of them are asked for."""
    inputs = rng.integers(vocab - 1, size=(count, length))
    inputs[:, -1] = vocab - 1
    return Examples(inputs.astype(np.int32), inputs.astype(np.int64))


def multi_query_recall(
    rng: np.random.Generator, count: int, training: bool, *, length: int, vocab: int, pairs: int, power: float = 0.01
) -> Examples:
    """Key-value pairs, then each key once more among random tokens: its value is asked there.

    The distance of a key's second occurrence follows a power law of exponent `power - 1`.
    """
    half = vocab // 2
    keys = 1 + distinct(rng, count, pairs, half - 1)
    values = half + distinct(rng, count, pairs, vocab - half)
    shown = 2 * pairs
    places = (length - shown) // 2
    # The largest of log-probabilities with Gumbel noise are a weighted draw without replacement, in its order.
    chance = (power - 1) * np.log(np.arange(1, places + 1)) + rng.gumbel(size=(count, places))
    query = shown + 2 * (-chance).argsort(axis=1)[:, :pairs]
    inputs = rng.integers(vocab, size=(count, length), dtype=np.int32)
    inputs[:, :shown:2], inputs[:, 1:shown:2] = keys, values
    np.put_along_axis(inputs, query, keys, axis=1)
    targets = np.full((count, length), IGNORED, np.int64)
    np.put_along_axis(targets, query, values, axis=1)
    return Examples(inputs, targets)


def in_context_language(
    rng: np.random.Generator,
    count: int,
    training: bool,
    *,
    length: int,
    alphabet: int,
    states: tuple[int, int] = (4, 12),
    symbols: tuple[int, int] = (4, 18),
    most_edges: int = 4,
    strings: tuple[int, int] = (10, 20),
    longest_string: int = 50,
) -> Examples:
    """Strings of a random automaton, another one each example: any symbol that it allows next counts as right.

    An automaton has `states` states over `symbols` symbols (both from, to) of the `alphabet`; each state has one to
    `most_edges` outgoing edges, equally likely, each with its symbol. `strings` strings of up to `longest_string`
    symbols, each from the first state, are joined by a separator (the token `alphabet`) and cut at `length`.
    """
    separator, pad = alphabet, alphabet + 1
    tokens = np.full((count, length + 1), pad)
    scored = np.zeros((count, length + 1), bool)
    accepted = None if training else np.zeros((count, length + 1, alphabet + 2), bool)
    for row in range(count):
        state_count, symbol_count = rng.integers(*states, endpoint=True), rng.integers(*symbols, endpoint=True)
        own = rng.choice(alphabet, size=symbol_count, replace=False)
        edges = []
        for _ in range(state_count):
            leaving = rng.choice(
                own, size=min(rng.integers(1, most_edges, endpoint=True), symbol_count), replace=False
            )
            edges.append(
                list(zip(leaving.tolist(), rng.integers(state_count, size=len(leaving)).tolist(), strict=True))
            )
        choices = rng.random(length + 1).tolist()
        place = 0
        for size in rng.integers(
            1, longest_string, endpoint=True, size=rng.integers(*strings, endpoint=True)
        ).tolist():
            state = 0
            for _ in range(size):
                if place > length:
                    break
                symbol, following = edges[state][int(choices[place] * len(edges[state]))]
                tokens[row, place], scored[row, place] = symbol, True
                if accepted is not None:
                    accepted[row, place, [allowed for allowed, _ in edges[state]]] = True
                state, place = following, place + 1
            if place <= length:
                tokens[row, place] = separator
                place += 1
    targets = np.where(scored | (training & (tokens != pad)), tokens, IGNORED)[:, 1:].astype(np.int64)
    return Examples(tokens[:, :-1].astype(np.int32), targets, None if accepted is None else accepted[:, 1:])
