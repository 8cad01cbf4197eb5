"""An external plugin that measures: every batch of a colocate run is sampled by trees and by swift's own rollout.

Both have the same prompts, engine and weights, an empty prefix cache, and take turns at being first. The run trains on
the trees; a line of JSON for each batch goes to the file that COMPARE names.

    COLOCATE=1 COMPARE=compare.jsonl bash train.sh --external_plugins ../../plugin/treepo_plugin.py reward.py \
        compare_colocate.py
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

from swift.rlhf_trainers import GRPOTrainer

from treepo_swift.trainer.trainer import TreeGRPOTrainer

grow, plain = TreeGRPOTrainer._infer_single_or_multi_turn, GRPOTrainer._infer_single_or_multi_turn
batches = 0


def sampled_tokens(samples: list[Any]) -> int:
    turns = [sample.response_token_ids for sample in samples]
    return sum(len(ids) if isinstance(ids[0], int) else sum(map(len, ids)) for ids in turns)


def sample_both_ways(self: TreeGRPOTrainer, samples: list[Any], *args: Any) -> list[Any]:
    global batches
    row: dict[str, float] = {}
    results = {}
    ways = [('trees', grow), ('plain', plain)]
    for name, way in ways if batches % 2 == 0 else reversed(ways):
        self.engine.engine.reset_prefix_cache()
        began = time.perf_counter()
        results[name] = way(self, copy.deepcopy(samples), *args)
        row |= {f'{name}_seconds': time.perf_counter() - began, f'{name}_tokens': sampled_tokens(results[name])}
    batches += 1
    with Path(os.environ['COMPARE']).open('a') as file:
        file.write(json.dumps(row) + '\n')
    return results['trees']


TreeGRPOTrainer._infer_single_or_multi_turn = sample_both_ways
