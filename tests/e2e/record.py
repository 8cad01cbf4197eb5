"""An external plugin for tests: samples with a seed, rewards long answers, and writes down what a trainer computes.

RECORD names the file: a line for each batch, written by the main process.
"""

import json
import os
from pathlib import Path

from accelerate.utils import gather_object
from swift.rewards import ORM, orms

from treepo_swift.trainer.trainer import TreeGRPOTrainer
from treepo_swift.wire.report import REPORT_KEY


class Length(ORM):
    """Moves every policy: hardly any two answers are equally long."""

    def __call__(self, completions, **kwargs):
        return [len(text) / 100 for text in completions]


orms['length'] = Length
prepare, compute = TreeGRPOTrainer._prepare_rollout_params, TreeGRPOTrainer._compute_advantages


def prepare_with_seed(self):
    prepare(self)
    self.request_config.seed = 7


def compute_and_record(self, samples, *args):
    advantages = compute(self, samples, *args)
    rows = gather_object(
        [
            {
                'prompt': sample.messages[0]['content'],
                'ids': sample.response_token_ids,
                'mask': sample.response_loss_mask,
                'logprobs': sample.rollout_logprobs,
                'nodes': sample.rollout_infos.get(REPORT_KEY, {}).get('nodes'),
                'tree': sample.rollout_infos.get(REPORT_KEY, {}).get('id'),
            }
            for sample in samples
        ]
    )
    if self.accelerator.is_main_process and self.model.training:
        batch = [{**row, 'advantage': value} for row, value in zip(rows, advantages.tolist(), strict=True)]
        with Path(os.environ['RECORD']).open('a') as file:
            file.write(json.dumps(batch) + '\n')
    return advantages


TreeGRPOTrainer._prepare_rollout_params = prepare_with_seed
TreeGRPOTrainer._compute_advantages = compute_and_record
