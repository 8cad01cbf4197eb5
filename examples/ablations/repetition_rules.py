"""Which rule stops loops and lets everything else go on: counts, for texts that people wrote and for loops.

    python repetition_rules.py [FOLDER] [--answers FILE.jsonl ...]

Texts: the first 24,000 characters of files of 12 to 40 KB under FOLDER (default: the installed packages), at most 150 a
row, evenly from the sorted list. A text counts as stopped if it is stopped at any point while it grows. Prints one
Markdown table, and which files the new rules stop.

--answers adds answers of a model, one JSON object a line, with the text in the field `response`. They count as stuck if
they never came to the mark of a final answer (--mark).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from treepo_swift.core.policies.loops import LoopDetector
from treepo_swift.core.policies.repetition import RepetitionDetector, has_repetition

SUFFIXES = '.md', '.rst', '.txt', '.py'
MOST_FILES, MOST_CHARACTERS = 150, 24_000
SEGMENT, SHORT_SEGMENT = 2000, 500
"""Characters. The rules' answers do not depend on them, but for the official code's."""
LATEX = re.compile(r'\\(?:frac|sum|int|sqrt|begin|mathbb|mathcal)\b')
TABLE = re.compile(r'(?:^\s*\|.*\|\s*\n){3}|^\s*=+(?: +=+)+\s*$|^\s*\+(?:-+\+)+\s*$', re.MULTILINE)

Texts = dict[str, str]
"""By name."""
Rule = Callable[[str, int], bool]
"""Whether a text (1) that grows by so many characters (2) is stopped."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=Path(sysconfig.get_path('purelib')))
    parser.add_argument('--near', type=int, nargs='+', default=[1000, 1500, 2000], help='near_characters to try')
    parser.add_argument('--answers', type=Path, nargs='+', default=[], metavar='FILE.jsonl')
    parser.add_argument('--mark', default='####', help='what the answers say before the final one')
    args = parser.parse_args()

    old_rules = {'window of 32, 8 times': until_found(RepetitionDetector(32, 8)), 'the same, a segment': in_a_segment}
    new_rules = {'loop': until_found(LoopDetector())}
    for near in args.near:
        new_rules[f'loop or near-loop of {near:,}'] = until_found(LoopDetector(near_characters=near))
    rules = old_rules | new_rules
    healthy = people_texts(args.folder)
    rows = healthy | {
        'generated loops, units of 1 to 512': generated_loops(),
        'generated near-loops, with counters': generated_near_loops(),
    }
    if args.answers:
        rows |= model_answers(args.answers, args.mark)
    print('| texts | number | ' + ' | '.join(rules) + ' |')
    print('| --- ' * (len(rules) + 2) + '|')
    stopped: dict[str, list[str]] = {}
    calm = {name: text for texts in healthy.values() for name, text in texts.items()}
    for title, texts in rows.items():
        cells = [f'{len(texts):,}']
        for rule_name, rule in rules.items():
            hits = [name for name, text in texts.items() if rule(text, SEGMENT) or rule(text, SHORT_SEGMENT)]
            cells.append(f'{len(hits):,}' + (f' ({len(hits) / len(texts):.1%})'.replace('%', ' %') if texts else ''))
            for name in hits if title in healthy else []:
                calm.pop(name, None)
                if rule_name in new_rules:
                    stopped.setdefault(f'{name} ({title})', []).append(rule_name)
        print(f'| {title} | ' + ' | '.join(cells) + ' |')
    cells = [f'{microseconds(rule, calm.values()):.0f}' for rule in rules.values()]
    print(f'| microseconds a segment, where no rule stops | {len(calm):,} | ' + ' | '.join(cells) + ' |')
    for name, by in sorted(stopped.items()):
        print(f'\n{name}: ' + ', '.join(by))


# Rules


def until_found(detector: RepetitionDetector | LoopDetector) -> Rule:
    """As a path is stopped: what the detector knows after each segment."""

    def rule(text: str, size: int) -> bool:
        state: Any = detector.start()
        for i in range(0, len(text), size):
            state = detector.feed(state, text[i : i + size])
        return state.found

    return rule


def in_a_segment(text: str, size: int) -> bool:
    """As the official code looks: at one segment, without what came before."""
    return any(has_repetition(text[i : i + size], 32, 8) for i in range(0, len(text), size))


def microseconds(rule: Rule, texts: Collection[str]) -> float:
    """Of processor time for a segment, mean. Nothing more is done once a text is stopped: take texts that are not."""
    segments = sum(-(-len(text) // SEGMENT) for text in texts)
    started = time.process_time()
    for text in texts:
        rule(text, SEGMENT)
    return (time.process_time() - started) / segments * 1e6


# Texts


def people_texts(folder: Path) -> dict[str, Texts]:
    """By row of the table and name of the file."""
    paths = [path for path in folder.rglob('*') if path.suffix in SUFFIXES and path.is_file()]
    paths = sorted(path for path in paths if 12_000 <= path.stat().st_size <= 40_000)
    texts = {str(path.relative_to(folder)): _head(path) for path in paths}
    rows = {suffix: [name for name in texts if name.endswith(suffix)] for suffix in SUFFIXES}
    rows['any of these with LaTeX'] = [name for name, text in texts.items() if LATEX.search(text)]
    rows['any of these with a table'] = [name for name, text in texts.items() if TABLE.search(text)]
    return {row: {name: texts[name] for name in _some(names)} for row, names in rows.items()}


def _head(path: Path) -> str:
    with path.open(encoding='utf-8', errors='replace') as file:
        return file.read(MOST_CHARACTERS)


def _some(names: list[str]) -> list[str]:
    number = min(len(names), MOST_FILES)
    return [names[i * len(names) // number] for i in range(number)]


def generated_loops() -> Texts:
    """A unit of random words after a beginning of random words, 8 times and 500 characters long or a bit more."""
    rng = random.Random(0)
    texts = {}
    for length in range(1, 513):
        unit = _words(rng, length)
        size = max(8 * length, 500) + rng.randrange(length)
        texts[f'unit of {length}'] = _words(rng, rng.randrange(4000)) + (unit * size)[:size]
    return texts


def generated_near_loops() -> Texts:
    """4,000 characters of one sentence, with two numbers in it that go up."""
    rng = random.Random(0)
    texts = {}
    for i in range(100):
        parts = [_words(rng, rng.randrange(5, 60)) for _ in range(3)]
        first, by = rng.randrange(100), rng.randrange(1, 20)
        sentences = (f'{parts[0]} {first + n} {parts[1]} {(first + n) * by}{parts[2]}. ' for n in range(500))
        texts[f'sentence {i}'] = _words(rng, rng.randrange(4000)) + ''.join(sentences)[:4000]
    return texts


def _words(rng: random.Random, size: int) -> str:
    return ''.join(rng.choices('abcdefghijklmnopqrstuvwxyz' + ' ' * 6, k=size))


def model_answers(files: Collection[Path], mark: str) -> dict[str, Texts]:
    rows: dict[str, Texts] = {'answers of a model, finished': {}, 'answers of a model, stuck': {}}
    for file in files:
        for number, line in enumerate(file.read_text(encoding='utf-8').splitlines()):
            text = json.loads(line)['response']
            row = 'answers of a model, finished' if mark in text else 'answers of a model, stuck'
            rows[row][f'{file}:{number}'] = text
    return rows


if __name__ == '__main__':
    main()
