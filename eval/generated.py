# SPDX-License-Identifier: Apache-2.0
"""Documents made from a seed: scrambled words, needles in haystacks, pass keys, key-value pairs.

The same seed and tokenizer give the same documents on every machine. Nothing is downloaded, and no text is taken from
other benchmarks: figures compare between models that ran these tasks, not with figures published for similar ones.
"""

import itertools
import uuid
from collections.abc import Callable, Iterator
from random import Random

KINDS = ("words", "numbers", "uuids")
HAYSTACKS = ("noise", "essay")
# Scramblings of GPT-3 (arXiv 2005.14165, section 3.9.2) by the names of its files.
SCRAMBLINGS = ("cycle_letters", "anagrams1", "anagrams2", "random_insertion", "reversed_words")

# fmt: off
_COLOURS = [
    "amber", "azure", "bronze", "copper", "coral", "crimson", "golden", "green", "grey", "indigo", "ivory", "lilac",
    "maroon", "olive", "pearl", "purple", "red", "rose", "russet", "scarlet", "silver", "teal", "violet", "white",
    "yellow",
]
_THINGS = [
    "anchor", "apple", "arrow", "barrel", "basket", "beacon", "bell", "bottle", "bridge", "candle", "carpet", "castle",
    "clock", "compass", "cradle", "crown", "drum", "feather", "fiddle", "forest", "garden", "hammer", "harbour",
    "island", "jacket", "kettle", "ladder", "lantern", "lemon", "letter", "marble", "meadow", "mirror", "mountain",
    "needle", "orchard", "paddle", "parrot", "pebble", "pillow", "planet", "pocket", "ribbon", "river", "saddle",
    "shell", "shovel", "spoon", "table", "temple", "thimble", "ticket", "tower", "tunnel", "turnip", "valley",
    "village", "violin", "wagon", "walnut", "whistle", "window",
]
_PEOPLE = [
    "the baker", "the clerk", "the doctor", "the farmer", "the gardener", "the judge", "the miller", "the painter",
    "the pilot", "the printer", "the sailor", "the teacher", "the traveller", "the widow", "my brother",
    "my neighbour", "an old friend", "a stranger",
]
_VERBS = [
    "admired", "bought", "described", "drew", "dropped", "found", "forgot", "kept", "lost", "mended", "noticed",
    "painted", "praised", "remembered", "repaired", "sold", "wanted", "watched",
]
_TIMES = [
    "in the morning", "after the rain", "before supper", "at the end of the week", "that winter", "in those years",
    "by the time the boats came in", "when nobody was looking", "a little later", "on the way home",
]
_REASONS = [
    "because it was worth little", "as people do in small towns", "and thought no more of it",
    "though nobody had asked", "and told everyone about it", "which surprised me at the time", "without saying why",
    "and that was the end of the matter", "as I was told later",
]
# fmt: on

_NOISE = (
    "Waves come in, and waves go out. The clock ticks on the wall. Dust settles on the shelves. Nothing else happens. "
)
_NEEDLE = "The secret {kind} of the {key} is {value}."
_QUESTION = "\n\nWhat is the secret {kind} of the {key}?\nThe secret {kind} of the {key} is"


def scramble(word: str, how: str, rng: Random) -> str:
    """`word` in the manner `how`, one of SCRAMBLINGS; never the word itself where another result exists."""
    if how == "reversed_words":
        return word[::-1]
    if how == "random_insertion":
        return "".join(letter + rng.choice(" .,!?;:-/") for letter in word[:-1]) + word[-1]
    if how == "cycle_letters":
        turns = [word[by:] + word[:by] for by in range(1, len(word))]
        return rng.choice([turn for turn in turns if turn != word] or turns)
    kept = {"anagrams1": 1, "anagrams2": 2}[how]
    middle = word[kept : len(word) - kept]
    letters = list(middle)
    while len(set(middle)) > 1 and "".join(letters) == middle:
        rng.shuffle(letters)
    return word[:kept] + "".join(letters) + word[len(word) - kept :]


def essay(rng: Random) -> Iterator[str]:
    """Sentences without end: grammatical, varied, and about nothing."""
    while True:
        sentence = (
            f"{rng.choice(_TIMES)} {rng.choice(_PEOPLE)} {rng.choice(_VERBS)} the {_thing(rng).replace('-', ' ')}"
        )
        if rng.random() < 0.5:
            sentence += f", {rng.choice(_REASONS)}"
        yield sentence[0].upper() + sentence[1:] + ". "


def needle_documents(
    count_tokens: Callable[[str], int],
    *,
    length: int,
    samples: int,
    seed: int,
    haystack: str,
    keys: str,
    values: str,
) -> list[dict]:
    """One needle in a haystack each, at depths spread evenly from the beginning to the end.

    Args:
        count_tokens: tokens of a text, special ones included.
        length: tokens of a prompt at most, and as nearly as whole sentences allow.
        samples: number of documents.
        seed: of everything random.
        haystack: `noise` (the same four sentences over and over) or `essay`.
        keys, values: `words`, `numbers` or `uuids`.

    Returns:
        Rows with `text`, `answers` (as the recall tasks have them), `length` and `depth` (0 to 1).

    Raises:
        ValueError: a name is not one of those above, or `length` is too small for the needle and the question alone.
    """
    for name, value, known in (("haystack", haystack, HAYSTACKS), ("keys", keys, KINDS), ("values", values, KINDS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
    rows = []
    for sample in range(samples):
        rng = Random(f"needle {seed} {length} {haystack} {keys} {values} {sample}")
        names = {"kind": values[:-1], "key": _name(keys, rng), "value": _name(values, rng)}
        needle, question = _NEEDLE.format(**names) + " ", _QUESTION.format(**names)
        depth = sample / max(samples - 1, 1)
        sentences = essay(rng) if haystack == "essay" else itertools.repeat(_NOISE)
        text = _fill(count_tokens, sentences, needle, question, length, depth)
        rows.append({"text": text, "answers": [[names["value"]]], "length": length, "depth": depth})
    return rows


def passkey_documents(count_tokens: Callable[[str], int], *, length: int, samples: int, seed: int) -> list[dict]:
    """A five-digit pass key in noise; arguments, result and errors as `needle_documents`."""
    rows = []
    for sample in range(samples):
        rng = Random(f"passkey {seed} {length} {sample}")
        key = str(rng.randrange(10_000, 100_000))
        needle = f"The pass key is {key}. Keep it in mind: {key} is the pass key. "
        depth = sample / max(samples - 1, 1)
        question = "\n\nWhat is the pass key?\nThe pass key is"
        opening = "Somewhere in this dull text there is a pass key. Find it and keep it in mind.\n\n"
        text = _fill(count_tokens, itertools.repeat(_NOISE), needle, question, length, depth, opening)
        rows.append({"text": text, "answers": [[key]], "length": length, "depth": depth})
    return rows


def associative_recall_documents(*, pairs: int, queries: int, samples: int, seed: int) -> list[dict]:
    """Key-value pairs, one a line, then some of the keys again in another order, each to be followed by its value.

    Args:
        pairs: number of pairs, all keys distinct, at most 1,550.
        queries: number of keys asked for, at most `pairs`.
        samples: number of documents.
        seed: of everything random.

    Returns:
        Rows with `pairs` (the number), `prompts` and `targets` (lists of `queries` texts): a prompt holds everything
        before its target, earlier questions with their right answers among it.

    Raises:
        ValueError: `pairs` or `queries` is out of range.
    """
    keys = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    if not 1 <= pairs <= len(keys):
        raise ValueError(f"pairs is {pairs}; it must be from 1 to {len(keys)}.")
    if not 1 <= queries <= pairs:
        raise ValueError(f"queries is {queries}; it must be from 1 to pairs, which is {pairs}.")
    rows = []
    for sample in range(samples):
        rng = Random(f"mqar {seed} {pairs} {queries} {sample}")
        table = {key: str(rng.randrange(1_000, 10_000)) for key in rng.sample(keys, pairs)}
        text, prompts, targets = "".join(f"{key}: {value}\n" for key, value in table.items()) + "\n", [], []
        for key in rng.sample(list(table), queries):
            prompts.append(f"{text}{key}:")
            targets.append(f" {table[key]}")
            text += f"{key}: {table[key]}\n"
        rows.append({"pairs": pairs, "prompts": prompts, "targets": targets})
    return rows


def _thing(rng: Random) -> str:
    return f"{rng.choice(_COLOURS)}-{rng.choice(_THINGS)}"


def _name(kind: str, rng: Random) -> str:
    if kind == "words":
        return _thing(rng)
    if kind == "numbers":
        return str(rng.randrange(1_000_000, 10_000_000))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _fill(
    count_tokens: Callable[[str], int],
    sentences: Iterator[str],
    needle: str,
    question: str,
    length: int,
    depth: float,
    opening: str = "",
) -> str:
    """As many of the sentences as fit into `length` tokens, with the needle between them at `depth`."""
    hay = []

    def text(number: int) -> str:
        before = round(depth * number)
        return opening + "".join(hay[:before]) + needle + "".join(hay[before:number]).rstrip() + question

    # Tokens of the parts add up to those of the whole but for a few at the joints, which the loop below settles.
    room = length - count_tokens(text(0))
    if room < 0:
        raise ValueError(f"length is {length}, but the question alone has {length - room} tokens; give more.")
    costs = {}
    while room > 0:
        sentence = next(sentences)
        if sentence not in costs:
            costs[sentence] = max(1, count_tokens(sentence) - count_tokens(""))
        room -= costs[sentence]
        hay.append(sentence)
    number = len(hay)
    while number and count_tokens(text(number)) > length:
        number -= 1
    return text(number)
