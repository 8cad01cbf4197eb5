"""Compare where a path stops that has given its answer: at the segment's end, at EOS, or right behind the answer.

    python answer_stop.py --model quickstart --seeds 42 1 2
    python answer_stop.py --model talkative --seeds 42 1 2

The quickstart's loop, each way with the same model, prompts, steps and seeds. `--model talkative` is a model whose
demonstrations go on after the box (`talkative_task.py`). For every training it counts the trajectories that were
trained on without EOS, and what the trained model does on held-out problems. Runs that are finished are used again, so
that a comparison that was stopped goes on where it was. Results: results.md and results.json in --output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / 'quickstart'
OUTPUT = HERE.parents[1] / 'output'
sys.path.insert(0, str(QUICKSTART))
from run import HELDOUT, START_TIMEOUT, follow, make_model, read_log, step

from treepo_swift.core.policies.stopping import has_boxed_answer
from treepo_swift.lab.services import Service, free_port, guarded, offline_environment

SEGMENT = 32
"""Tokens of a segment in quickstart's tree.yaml."""

WAYS = {
    'boundary': ("at the segment's end", {'STOP__ANSWER__NEEDS_EOS': 'false', 'STOP__ANSWER__AFTER': 'keep'}),
    'eos': ('at EOS (`needs_eos: true`)', {'STOP__ANSWER__NEEDS_EOS': 'true', 'STOP__ANSWER__AFTER': 'keep'}),
    'cut': ('behind the answer (`after: cut`)', {'STOP__ANSWER__NEEDS_EOS': 'false', 'STOP__ANSWER__AFTER': 'cut'}),
}
"""Title, and keys of the tree config."""

PARTS: dict[str, Callable[[int, int], bool]] = {
    'all': lambda step, steps: True,
    'first 3 steps': lambda step, steps: step < 3,
    'last 3 steps': lambda step, steps: step >= steps - 3,
}


def main() -> int:
    parser = argparse.ArgumentParser(description='Compare where a path stops that has given its answer.')
    parser.add_argument('--output', type=Path, default=OUTPUT / 'answer-stop')
    parser.add_argument(
        '--quickstart',
        type=Path,
        default=OUTPUT / 'quickstart',
        help='folder of the base model and its data, made there unless they are',
    )
    parser.add_argument('--model', choices=('quickstart', 'talkative'), default='quickstart')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[42, 1, 2])
    parser.add_argument('--steps', type=int, default=40, help='GRPO steps of each run')
    args = parser.parse_args()
    return guarded(lambda: compare(args), f'The same command goes on. Logs: {args.output}')


def compare(args: argparse.Namespace) -> None:
    output: Path = args.output.resolve() / args.model
    step('1/3', 'the model and its task')
    base, data = make_model(args.quickstart.resolve())
    if args.model == 'talkative':
        base = make_talkative(output / 'base')
    before = measure(base, output / 'base-heldout.json')
    runs = {(way, seed): output / f'{way}-seed-{seed}-steps-{args.steps}' for seed in args.seeds for way in args.ways}
    missing = {key: folder for key, folder in runs.items() if not (folder / 'heldout.json').is_file()}
    step('2/3', f'training: {len(missing)} of {len(runs)} runs of {args.steps} steps, the others are there')
    if missing:
        train_all(missing, args.steps, output, base, data)
    step('3/3', 'the result')
    eos = json.loads((base / 'config.json').read_text())['eos_token_id']
    results = {
        'base': before,
        'runs': [
            {
                'way': way,
                'seed': seed,
                'training': training_figures(folder, args.steps, eos),
                'heldout': json.loads((folder / 'heldout.json').read_text()),
            }
            for (way, seed), folder in runs.items()
        ],
    }
    (output / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    text = table(results)
    (output / 'results.md').write_text(text)
    print(f'\n{text}\n  {output}/results.md, results.json')


def make_talkative(base: Path) -> Path:
    if not (base / 'model.safetensors').is_file():
        command = [QUICKSTART / 'make_model.py', '--output', base, '--task', HERE / 'talkative_task.py']
        subprocess.run([sys.executable, *map(str, command)], check=True)
    return base


# Training.


def train_all(runs: dict[tuple[str, int], Path], steps: int, output: Path, base: Path, data: Path) -> None:
    """One server for all: the trainer sends its tree config with every request, and its weights before the first."""
    port = free_port()
    env = offline_environment(base, data) | {'PORT': str(port), 'STEPS': str(steps)}
    log = output / 'rollout.log'
    with Service('The rollout server', ['bash', str(QUICKSTART / 'rollout.sh')], log=log, env=env) as server:
        server.wait_for_health(port, timeout=START_TIMEOUT)
        for (way, seed), folder in runs.items():
            shutil.rmtree(folder, ignore_errors=True)  # what a run that was stopped has left
            print(f'      {way}, seed {seed}', flush=True)
            train(way, seed, folder, env, server)
            measure(folder / 'train' / f'checkpoint-{steps}', folder / 'heldout.json')


def train(way: str, seed: int, folder: Path, env: dict[str, str], server: Service) -> None:
    env = (
        env
        | {f'TREEPO_{key}': value for key, value in WAYS[way][1].items()}
        | {
            'GROUP_PORT': str(free_port()),
            'SEED': str(seed),
            'OUTPUT': str(folder / 'train'),
            'REWARD_FUNCS': 'recorded_digit_sum',
            'ANSWER_RECORD': str(folder / 'trajectories.jsonl'),
        }
    )
    plugins = [HERE.parents[1] / 'plugin' / 'treepo_plugin.py', QUICKSTART / 'reward.py', HERE / 'answer_record.py']
    command = ['bash', str(QUICKSTART / 'train.sh'), '--external_plugins', *map(str, plugins)]
    with Service(f'The training {way}, seed {seed}', command, log=folder / 'train.log', env=env) as training:
        follow(folder / 'train' / 'logging.jsonl', int(env['STEPS']), [server.check, training.check])


def training_figures(folder: Path, steps: int, eos: int) -> dict[str, Any]:
    log = read_log(folder / 'train' / 'logging.jsonl')
    decoded, independent = (sum(row[f'tree/{name}_tokens'] for row in log) for name in ('decoded', 'independent'))
    rows = [json.loads(line) for line in (folder / 'trajectories.jsonl').read_text().splitlines()]
    parts = {}
    for name, within in PARTS.items():
        part = [row for row in rows if within(row['step'], steps)]
        unfinished = [row for row in part if row['token_ids'][-1] != eos]
        parts[name] = {
            'trajectories': len(part),
            'stops': share_of(Counter(row['stop'] for row in part), len(part)),
            'without_eos': len(unfinished) / len(part),
            'without_eos_by_stop': share_of(Counter(row['stop'] for row in unfinished), len(part)),
            'tokens': statistics.mean(len(row['token_ids']) for row in part),
            'reward': statistics.mean(row['reward'] for row in part),
        }
    return {'decoded': decoded, 'independent': independent, 'parts': parts}


def share_of(counts: Counter[str], total: int) -> dict[str, float]:
    return {name: count / total for name, count in counts.most_common()}


# The trained model.


def measure(model: Path, cache: Path) -> dict[str, float]:
    """What a model does on held-out problems, sampled at temperature 1; computed once per model."""
    if cache.is_file():
        return json.loads(cache.read_text())
    import torch
    from make_model import sample
    from task import distinct_problems
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    problems = distinct_problems('heldout', HELDOUT, 0)
    torch.manual_seed(0)
    answers = sample(network, tokenizer, problems)
    figures = answer_figures(answers, [problem.solution for problem in problems], tokenizer)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(figures, indent=1))
    return figures


def answer_figures(answers: list[list[int]], solutions: list[str], tokenizer: Any) -> dict[str, float]:
    from task import is_correct

    right = [is_correct(text_of(ids, tokenizer), known) for ids, known in zip(answers, solutions, strict=True)]
    boxed = [(ids, box_tokens(ids, tokenizer)) for ids in answers if has_boxed_answer(text_of(ids, tokenizer))]
    behind = [text_of(ids[count:], tokenizer) for ids, count in boxed]
    going_on = [text for text in behind if text.strip()]
    return {
        'accuracy': statistics.mean(right),
        'tokens': statistics.mean(map(len, answers)),
        'with_eos': statistics.mean(ids[-1] == tokenizer.eos_token_id for ids in answers),
        'boxed': len(boxed) / len(answers),
        'going_on': len(going_on) / len(answers),
        'characters_behind': statistics.mean(map(len, going_on)) if going_on else 0,
        'tokens_behind': statistics.mean(len(ids) - count for ids, count in boxed) if boxed else 0,
        'cut_by_boundary': sum(len(ids) > -(-count // SEGMENT) * SEGMENT for ids, count in boxed) / len(answers),
    }


def text_of(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def box_tokens(ids: list[int], tokenizer: Any) -> int:
    """Tokens up to the one that completes the first box."""
    return bisect_left(range(len(ids)), True, key=lambda count: has_boxed_answer(text_of(ids[:count], tokenizer)))


# The table.


def table(results: dict[str, Any]) -> str:
    def training(*keys: str) -> Callable[[dict[str, Any]], float]:
        return lambda run: nested(run['training'], keys)

    def heldout(key: str) -> Callable[[dict[str, Any]], float]:
        return lambda run: run['heldout'][key]

    columns: list[tuple[str, Callable[[dict[str, Any]], float], str, str | None]] = [
        ('trained without EOS', training('parts', 'all', 'without_eos'), '%', None),
        ('first 3 steps', training('parts', 'first 3 steps', 'without_eos'), '%', None),
        ('last 3 steps', training('parts', 'last 3 steps', 'without_eos'), '%', None),
        ('trained tokens per answer', training('parts', 'all', 'tokens'), '', None),
        ('decoded tokens', training('decoded'), ',', None),
        ('saved', lambda run: 1 - run['training']['decoded'] / run['training']['independent'], '%', None),
        ('accuracy', heldout('accuracy'), '%', 'accuracy'),
        ('tokens', heldout('tokens'), '', 'tokens'),
        ('with EOS', heldout('with_eos'), '%', 'with_eos'),
        ('text after the box', heldout('going_on'), '%', 'going_on'),
        ('characters of it', heldout('characters_behind'), '', 'characters_behind'),
    ]
    ways = [way for way in WAYS if any(run['way'] == way for run in results['runs'])]
    lines = ['| | before | ' + ' | '.join(WAYS[way][0] for way in ways) + ' |', '| --- ' * (len(ways) + 2) + '|']
    for title, value, form, key in columns:
        cells = [cell([value(run) for run in results['runs'] if run['way'] == way], form) for way in ways]
        before = cell([results['base'][key]], form) if key else ''
        lines.append(f'| {title} | {before} | ' + ' | '.join(cells) + ' |')
    seeds = sorted({run['seed'] for run in results['runs']})
    lines.append(
        f'\nMean (lowest to highest) over seeds {", ".join(map(str, seeds))}; from "accuracy" on of '
        f'{HELDOUT} held-out problems.\n'
    )
    return '\n'.join(lines)


def nested(values: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        values = values[key]
    return values


def cell(values: list[float], form: str) -> str:
    def show(value: float) -> str:
        return f'{value:,.0f}' if form == ',' else f'{100 * value:.1f} %' if form == '%' else f'{value:.1f}'

    spread = f' ({show(min(values))} to {show(max(values))})' if len(values) > 1 else ''
    return show(statistics.mean(values)) + spread


if __name__ == '__main__':
    sys.exit(main())
