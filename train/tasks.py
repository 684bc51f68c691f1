"""Synthetic instructions: the skills that the shipped base is trained on, and a task that it never sees.

A word is transformed by one step ("Reverse.") or two ("Reverse and double."); other skills are arithmetic, look-up
and word problems. The held-out task is a word the base does not know, "Encrypt.", for two steps that it knows one by
one but has never seen joined: it fails, and a small update can teach it.

Run `python -m train.tasks runs/tasks` to write the held-out task as JSONL files for `train.finetune`.
"""

import json
import os
import random
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Record = dict[str, str]

ALPHABETS = (string.ascii_lowercase, string.ascii_uppercase)
NEXT = str.maketrans("".join(ALPHABETS), "".join(alphabet[1:] + alphabet[0] for alphabet in ALPHABETS))

STEPS: dict[str, Callable[[str], str]] = {
    "copy": lambda s: s,
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
    "capitalize": str.upper,
    "advance": lambda s: s.translate(NEXT),
    "rotate": lambda s: s[1:] + s[:1],
    "double": lambda s: "".join(c + c for c in s),
}

# Held out of pretraining in either order, and what the demo's new word stands for.
HELD_OUT = ("reverse", "advance")
PAIRS = [(a, b) for a in STEPS for b in STEPS if "copy" not in (a, b) and a != b and {a, b} != set(HELD_OUT)]

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "shells")


def letters(rng: random.Random, low: int = 3, high: int = 6) -> str:
    """A random word of `low` to `high` lower-case letters."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def apply(steps: tuple[str, ...], word: str) -> str:
    """`word` after the steps, from left to right.

    Example:
        >>> apply(("reverse", "double"), "abc")
        'ccbbaa'
    """
    for step in steps:
        word = STEPS[step](word)
    return word


def one_step(rng: random.Random) -> Record:
    step, word = rng.choice(list(STEPS)), letters(rng)
    return {"instruction": f"{step.capitalize()}.", "input": word, "output": apply((step,), word)}


def two_steps(rng: random.Random) -> Record:
    pair, word = rng.choice(PAIRS), letters(rng)
    instruction = f"{pair[0].capitalize()} and {pair[1]}."
    return {"instruction": instruction, "input": word, "output": apply(pair, word)}


def count(rng: random.Random) -> Record:
    word = letters(rng, 2, 9)
    return {"instruction": "Count.", "input": word, "output": str(len(word))}


def add(rng: random.Random) -> Record:
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    return {"instruction": "Add.", "input": f"{a} {b}", "output": str(a + b)}


def largest(rng: random.Random) -> Record:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(2, 3))]
    return {"instruction": "Largest.", "input": " ".join(map(str, numbers)), "output": str(max(numbers))}


def look_up(rng: random.Random) -> Record:
    keys = rng.sample(string.ascii_lowercase, rng.randint(2, 5))
    table = {key: str(rng.randint(0, 9)) for key in keys}
    query = rng.choice(keys)
    pairs = " ".join(f"{key}={value}" for key, value in table.items())
    return {"instruction": f"Look up {query}.", "input": pairs, "output": table[query]}


def word_problem(rng: random.Random) -> Record:
    """English with a little arithmetic, in a few fixed sentences."""
    who, other = rng.sample(PEOPLE, 2)
    what, a, b, c = rng.choice(THINGS), rng.randint(10, 50), rng.randint(2, 9), rng.randint(2, 5)
    story, sums, result = rng.choice(
        [
            (f"{who} has {a} {what}. {other} gives {who} {b} more.", f"{a} + {b}", a + b),
            (f"There are {a} {what}. {who} takes {b} of them.", f"{a} - {b}", a - b),
            (f"{who} buys {b} bags of {c} {what} each.", f"{b} x {c}", b * c),
        ]
    )
    question = f"{story} How many {what} are there now?"
    return {"instruction": question, "input": "", "output": f"{sums} = {result} {what}"}


# Skills and their shares of the pretraining mixture.
SKILLS: dict[Callable[[random.Random], Record], float] = {
    one_step: 0.38,
    two_steps: 0.4,
    count: 0.03,
    add: 0.05,
    largest: 0.04,
    look_up: 0.05,
    word_problem: 0.05,
}


def mixture(seed: int) -> Iterator[Record]:
    """Records of all skills, without end.

    Example:
        >>> sorted(next(mixture(0)))
        ['input', 'instruction', 'output']
    """
    rng = random.Random(seed)
    while True:
        yield rng.choices(list(SKILLS), list(SKILLS.values()))[0](rng)


def held_out(seed: int, n_train: int, n_test: int) -> tuple[list[Record], list[Record]]:
    """Train and test records of the task that the base never saw; no input occurs twice.

    Example:
        >>> train, test = held_out(0, 2, 1)
        >>> train[0]
        {'instruction': 'Encrypt.', 'input': 'tkgnk', 'output': 'lohlu'}
    """
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < n_train + n_test:
        words[letters(rng, 4, 6)] = None
    records = [{"instruction": "Encrypt.", "input": w, "output": apply(HELD_OUT, w)} for w in words]
    return records[:n_train], records[n_train:]


def write(directory: str | Path, seed: int = 0, n_train: int = 4000, n_test: int = 200) -> tuple[Path, Path]:
    """Write the held-out task as `train.jsonl` and `test.jsonl` and return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "test.jsonl"
    for path, records in zip(paths, held_out(seed, n_train, n_test), strict=True):
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(partial, path)
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.tasks DIRECTORY")
    print(*write(sys.argv[1]), sep="\n")
