"""Thousands of trees with faults, to see that nothing grows but them: memory, tasks, threads and requests stay flat.

``python -m tests.soak`` takes a few minutes. It is not part of the tests; `docs/reliability.md` has its figures.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from swift.infer_engine.protocol import RequestConfig
from swift.utils import get_logger

from tests.integration.fake_engine import FakeTokenizer
from tests.integration.test_fault_schedules import ENGINE, HOOKS, Faulty, Schedule, Shop, check_outputs
from tests.integration.test_scheduler import requests
from treepo_swift.config import TreeConfig
from treepo_swift.server.scheduler import RolloutFailure

WIDTH = 4
CONFIG = TreeConfig(
    segment_length=16,
    max_depth=4,
    faults={'max_failure_fraction': 1.0, 'hook_timeout': 0.1, 'stall_timeout': 0.5, 'max_hung_hooks': 10_000},
)


class Soaked(Shop):
    """Also a plain hook, whose thread hangs for longer than its deadline where it does."""

    def check_finished(self, infer_request: Any, response_choice: Any, current_turn: int) -> bool:
        self.calls += 1
        fault = self.schedule.fault(f'finished {self.calls}')
        if fault == 'raises':
            raise ValueError('no such tool')
        if fault == 'hangs':
            time.sleep(0.3)
        return current_turn == 2


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def state(trees: int, failed: int, began: float) -> dict[str, Any]:
    gc.collect()
    return {
        'trees': trees,
        'failed answers': failed,
        'seconds': round(time.monotonic() - began),
        'resident MiB': round(resident() / 2**20, 1),
        'objects': len(gc.get_objects()),
        'tasks': len(asyncio.all_tasks()),
        'threads': threading.active_count(),
    }


async def soak(trees: int, per_batch: int, rate: float) -> list[dict[str, Any]]:
    engine = Faulty(Schedule(1, rate, ENGINE))
    target = Soaked(segment_engine=engine, tokenizer=FakeTokenizer())
    target.schedule = Schedule(2, rate, HOOKS)
    seen, failed, began = [], 0, time.monotonic()
    every = max(trees // per_batch // 10, 1)
    for number in range(trees // per_batch):
        prompts = [f'{number} {index}' for index in range(per_batch) for _ in range(WIDTH)]
        batch = requests(*prompts, config=CONFIG, num_generations=WIDTH)
        answer = await target.async_infer(batch, RequestConfig(max_tokens=64, seed=number), use_tqdm=False)
        assert not isinstance(answer, RolloutFailure), answer.message
        check_outputs(batch, answer, CONFIG)
        assert engine.running == 0 and len(asyncio.all_tasks()) == 1
        failed += sum(output.rollout_infos['tree']['stop'] == 'failed' for output in answer)
        answer = batch = None
        for record in (engine.inputs, engine.prompts, engine.places):
            record.clear()
        if number % every == every - 1:
            seen.append(state((number + 1) * per_batch, failed, began))
            print(seen[-1], flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--trees', type=int, default=10_000)
    parser.add_argument('--per-batch', type=int, default=100)
    parser.add_argument('--rate', type=float, default=0.1, help='share of engine calls and hook calls that go wrong')
    args = parser.parse_args()
    get_logger().setLevel(logging.CRITICAL)
    first, *_, last = seen = asyncio.run(soak(args.trees, args.per_batch, args.rate))
    # The first tenth fills caches and starts threads.
    assert last['resident MiB'] < 1.1 * first['resident MiB'] + 20, seen
    # A few for each thread that is there now; what is left of every tree would be thousands.
    assert last['objects'] - first['objects'] < 0.2 * (last['trees'] - first['trees']), seen
    assert last['tasks'] == 1, seen
    assert max(row['threads'] for row in seen) <= 300, seen
    print('flat')


if __name__ == '__main__':
    main()
