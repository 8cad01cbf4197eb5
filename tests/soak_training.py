"""A real training on real rollout servers with fault after fault, beside the same training without any.

    python -m tests.soak_training --model output/quickstart/base --data output/quickstart/data/train.jsonl

Both run at the same time, for `--minutes`, on the quickstart's model and scripts. Two servers of the first are killed
on the way. It is not part of the tests; docs/reliability.md has its report. Ends with status 1 where the training with
faults ended, or a fault left no trace.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import socket
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Beside the scripts of the quickstart, where conftest lets Python look.
from run import read_log

from tests.e2e.conftest import ROOT, Service, free_port, quickstart_script, servers_at
from treepo_swift.lab.services import guarded, offline_environment

CALLS = (
    'a hook raises',
    'the engine raises',
    'vLLM aborts a request',
    'a hook hangs',
    'log-probs are NaN',
    'a hook returns a wrong type',
    'the engine loses a request',
    'a hook exits',
    'the reward is slow',
)
"""Done by `soak_faults` within a server or the trainer."""
OUTSIDE = ('a server stands still', 'a client goes away', 'rubbish is sent', 'the trainer stands still')
"""Done from here, to processes and by HTTP."""
ONCE = ('an engine core is killed', 'a server is killed', 'the disk is full')
"""At a third and at two thirds of the time; the writer of trees stops for good, so it is the last of all."""
LASTS = 20.0
"""Seconds of a fault; the rest of its minute is quiet."""
CONFIG = {
    'TREEPO_FAULTS__HOOK_TIMEOUT': '5',
    'TREEPO_FAULTS__STALL_TIMEOUT': '20',
}


@dataclass
class Run:
    """One training with its servers, and what was seen of it."""

    name: str
    folder: Path
    servers: list[Service] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    """When each step was logged, in seconds since the soak began."""
    training: Service | None = None

    @property
    def log(self) -> Path:
        return self.folder / 'train' / 'logging.jsonl'

    def look(self, began: float) -> None:
        rows = len(read_log(self.log))
        self.seen += [time.monotonic() - began] * (rows - len(self.seen))


@dataclass
class Fault:
    kind: str
    began: float
    ended: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', type=Path, required=True)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--minutes', type=float, default=30)
    parser.add_argument('--every', type=float, default=60, help='seconds from one fault to the next')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'soak')
    args = parser.parse_args()
    ended: list[int] = []
    status = guarded(lambda: ended.append(soak(args)), f'Logs are in {args.output}.')
    return status or ended[0]


def soak(args: argparse.Namespace) -> int:
    args.output.mkdir(parents=True, exist_ok=True)
    faults = args.output / 'fault'
    for old in args.output.glob('fault*'):
        old.unlink()
    base = offline_environment(args.model.resolve(), args.data.resolve())
    base.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', STEPS='100000', SAVE_STEPS='50', **CONFIG)
    with ExitStack() as stack:
        soaked = start(stack, 'faults', args.output, base, servers=3, faults=faults)
        quiet = start(stack, 'quiet', args.output, base, servers=1, faults=None)
        began = time.monotonic()
        for run in (soaked, quiet):
            train(stack, run, base, faults if run is soaked else None)
        done = drive(args.minutes, args.every, soaked, quiet, faults, began)
        status = soaked.training.process.poll()
    happened = count(faults)
    text = report(soaked, quiet, done, happened, status)
    (args.output / 'report.md').write_text(text)
    print(text)
    draw(args.output / 'soak.png', soaked, quiet, done)
    silent = [kind for kind in {fault.kind for fault in done} if kind in CALLS and not happened[kind]]
    if status is not None:
        print(f'The training with faults ended with status {status}: {soaked.training.log}\n{soaked.training.tail()}')
    if silent:
        print(f'Asked for, and never happened: {", ".join(silent)}')
    return int(status is not None or bool(silent))


def start(stack: ExitStack, name: str, output: Path, base: dict[str, str], *, servers: int, faults: Path | None) -> Run:
    run = Run(name, output / name)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.log.unlink(missing_ok=True)
    script = scripted(run.folder, 'rollout.sh', faults)
    for number in range(servers):
        port = free_port()
        env = {**base, 'PORT': str(port), **scheduler(faults)}
        service = Service(f'server {number}', ['bash', str(script)], log=run.folder / f'rollout-{number}.log', env=env)
        run.servers.append(stack.enter_context(service))
        run.ports.append(port)
        service.wait_for_health(port, timeout=400)
    print(f'{name}: {servers} servers are up', flush=True)
    return run


def train(stack: ExitStack, run: Run, base: dict[str, str], faults: Path | None) -> None:
    script = scripted(run.folder, 'train.sh', faults)
    command = ['bash', str(script), *servers_at(run.ports), '--save_total_limit', '1']
    env = {**base, 'OUTPUT': str(run.folder / 'train'), 'MASTER_PORT': str(free_port()), **scheduler(faults)}
    if faults:
        env['REWARD_FUNCS'] = 'slow_sum'
    run.training = stack.enter_context(Service(run.name, command, log=run.folder / 'train.log', env=env))


def scripted(folder: Path, name: str, faults: Path | None) -> Path:
    """A script of the quickstart that loads `soak_faults` too, with a KV cache that leaves room for several servers."""
    plugins = [Path(__file__).with_name('soak_faults.py')] if faults else []
    return quickstart_script(folder, name, plugins=plugins, engine={'num_gpu_blocks_override': 512})


def scheduler(faults: Path | None) -> dict[str, str]:
    return {'SCHEDULER': 'soaked', 'SOAK_FAULTS': str(faults)} if faults else {}


# Faults come and go.


def drive(minutes: float, every: float, soaked: Run, quiet: Run, faults: Path, began: float) -> list[Fault]:
    """Fault after fault until the time is over, or the training with faults has ended."""
    wait_until(lambda: len(soaked.seen) >= 3 and len(quiet.seen) >= 3, [soaked, quiet], began, limit=600)
    first, end = time.monotonic(), time.monotonic() + 60 * minutes
    kinds = planned(round(60 * minutes / every))
    done: list[Fault] = []
    while time.monotonic() < end and soaked.training.process.poll() is None:
        number = int((time.monotonic() - first) // every)
        if len(done) <= number < len(kinds):
            done.append(one(kinds[len(done)], soaked, faults, began))
            steps = len(soaked.seen)
            print(f'fault {len(done):2}: {done[-1].kind}; {steps} steps, {len(quiet.seen)} without faults', flush=True)
        look(1.0, [soaked, quiet], began)
    return done


def planned(count: int) -> list[str]:
    """A kind for each time, each as often as another, in an order of their own."""
    several = [*CALLS, *OUTSIDE]
    kinds = [several[i % len(several)] for i in range(count)]
    random.Random(0).shuffle(kinds)
    for share, kind in zip((1 / 3, 2 / 3, 1), ONCE, strict=True):
        kinds[min(round(share * count), count - 1)] = kind
    return kinds


def one(kind: str, soaked: Run, faults: Path, began: float) -> Fault:
    since = time.monotonic() - began
    match kind:
        case 'an engine core is killed':
            for child in psutil.Process(soaked.servers[2].process.pid).children(recursive=True):
                if 'EngineCore' in child.name():
                    child.kill()
        case 'a server is killed':
            os.killpg(soaked.servers[1].process.pid, signal.SIGKILL)
        case 'a server stands still':
            stand_still(soaked.servers[0].process.pid, soaked, began)
        case 'the trainer stands still':
            stand_still(soaked.training.process.pid, soaked, began)
        case 'a client goes away':
            go_away(soaked.ports[0])
        case 'rubbish is sent':
            send_rubbish(soaked.ports[0])
        case _:
            faults.write_text(kind)
            look(LASTS, [soaked], began)
            faults.write_text('')
    return Fault(kind, since, time.monotonic() - began)


def stand_still(group: int, run: Run, began: float) -> None:
    os.killpg(group, signal.SIGSTOP)
    try:
        look(LASTS, [run], began)
    finally:
        os.killpg(group, signal.SIGCONT)


def go_away(port: int) -> None:
    """Ask for 64 answers and hang up, ten times."""
    body = json.dumps(
        {
            'infer_requests': [
                {'messages': [{'role': 'user', 'content': f'Sum {i}'}], 'uuid': f'away{i}', 'data_dict': {}}
                for i in range(64)
            ],
            'request_config': {'max_tokens': 64},
        }
    ).encode()
    head = f'POST /infer/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n'
    for _ in range(10):
        with socket.create_connection(('127.0.0.1', port), timeout=10) as connection:
            connection.sendall(head.encode() + body)


def send_rubbish(port: int) -> None:
    """What no client of swift's would send; the server must answer each, with an error."""
    for body in (b'{', b'[]', b'{"infer_requests": 3}', b'{"infer_requests": [{"messages": []}]}', b'\xff' * 1_000_000):
        request = urllib.request.Request(
            f'http://127.0.0.1:{port}/infer/', data=body, headers={'Content-Type': 'application/json'}
        )
        try:
            with urllib.request.urlopen(request, timeout=60):
                pass
        except urllib.error.HTTPError as e:
            print(f'  rubbish was answered with {e.code}', flush=True)


def look(seconds: float, runs: list[Run], began: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for run in runs:
            run.look(began)
        time.sleep(0.25)


def wait_until(true: Callable[[], bool], runs: list[Run], began: float, *, limit: float) -> None:
    end = time.monotonic() + limit
    while not true():
        for run in runs:
            if run.training is not None:
                run.training.check()
        if time.monotonic() > end:
            raise TimeoutError(f'no steps after {limit:.0f} s')
        look(1.0, runs, began)


# What came of it.


def count(faults: Path) -> Counter[str]:
    """How often each kind really happened, over all processes."""
    happened: Counter[str] = Counter()
    for file in faults.parent.glob(f'{faults.name}.*'):
        happened.update(file.read_text().splitlines())
    return happened


def durations(run: Run) -> list[tuple[float, float, float]]:
    """(begin, end, seconds) of every step but the first."""
    return [(a, b, b - a) for a, b in zip(run.seen, run.seen[1:])]


def report(soaked: Run, quiet: Run, done: list[Fault], happened: Counter[str], status: int | None) -> str:
    rows = read_log(soaked.log)
    steps = durations(soaked)

    def touched(fault: Fault) -> list[int]:
        return [i for i, (begin, end, _) in enumerate(steps) if begin < fault.ended and end > fault.began]

    during = {i for fault in done for i in touched(fault)}
    usual = statistics.median([seconds for i, (_, _, seconds) in enumerate(steps) if i not in during] or [math.nan])
    lines = [
        f'{len(soaked.seen)} steps with faults and {len(quiet.seen)} without, side by side; '
        f'{len(done)} faults of {len({fault.kind for fault in done})} kinds. The training with faults '
        + ('was running at the end.' if status is None else f'ended with status {status}.'),
        f'A step between faults took {usual:.1f} s (median).',
        '',
        '| fault | times | calls that went wrong | paths that failed | longest step, s | seconds lost |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for kind in (*CALLS, *OUTSIDE, *ONCE):
        of_kind = [fault for fault in done if fault.kind == kind]
        if not of_kind:
            continue
        hit = sorted({i for fault in of_kind for i in touched(fault)})
        failed = sum(rows[i + 1].get('tree/failures', 0) for i in hit if i + 1 < len(rows))
        longest = max((steps[i][2] for i in hit), default=0)
        lost = sum(max(steps[i][2] - usual, 0) for i in hit)
        lines.append(
            f'| {kind} | {len(of_kind)} | {happened[kind] or "-"} | {failed:.0f} | {longest:.1f} | {lost:.0f} |'
        )
    lines += ['', '| steps | reward with faults | reward without |', '| --- | --- | --- |']
    others = read_log(quiet.log)
    size = max(min(len(rows), len(others)) // 8, 1)
    for begin in range(0, min(len(rows), len(others)) - size + 1, size):
        means = [statistics.mean(row['reward'] for row in some[begin : begin + size]) for some in (rows, others)]
        lines.append(f'| {begin + 1} to {begin + size} | {means[0]:.3f} | {means[1]:.3f} |')
    return '\n'.join(lines) + '\n'


def draw(path: Path, soaked: Run, quiet: Run, done: list[Fault]) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for run, label in ((soaked, 'a fault every minute'), (quiet, 'none')):
        rows = read_log(run.log)
        left.plot(range(1, len(rows) + 1), smooth([row['reward'] for row in rows]), label=label)
        right.plot([t / 60 for t in run.seen], range(1, len(run.seen) + 1), label=label)
    for fault in done:
        right.axvspan(fault.began / 60, fault.ended / 60, alpha=0.15, color='tab:red')
    left.set(xlabel='GRPO step', ylabel='reward, mean of 9 steps', ylim=(0, 1.02))
    right.set(xlabel='minutes', ylabel='steps done')
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(i - 4, 0) : i + 5]) for i in range(len(values))]


if __name__ == '__main__':
    sys.exit(main())
