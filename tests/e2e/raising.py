"""An external plugin for tests: one in ten calls of the scheduler's hook raises."""

import random

from swift.rollout import multi_turns

from treepo_swift.server.scheduler import TreeRolloutScheduler

rng = random.Random(0)


class Raises(TreeRolloutScheduler):
    async def check_segment(self, path, text):
        if rng.random() < 0.1:
            raise KeyError('board')
        return super().check_segment(path, text)


multi_turns['raises'] = Raises
