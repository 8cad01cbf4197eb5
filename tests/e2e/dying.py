"""An external plugin for tests: this server dies in the middle of the rollout of step DIES_AT; DIES says which process.

`worker`: swift's worker process; `engine`: vLLM's engine core below it; `server`: all of them.
"""

import asyncio
import os
import signal

import psutil

from treepo_swift.server.scheduler import TreeRolloutScheduler

rollout = TreeRolloutScheduler.rollout


def die():
    if os.environ['DIES'] == 'server':
        os.killpg(0, signal.SIGKILL)
    elif os.environ['DIES'] == 'worker':
        os.kill(os.getpid(), signal.SIGKILL)
    for child in psutil.Process().children(recursive=True):
        if 'EngineCore' in child.name():
            child.kill()


async def rollout_and_die(self, infer_requests, *args, **kwargs):
    growing = asyncio.ensure_future(rollout(self, infer_requests, *args, **kwargs))
    note = infer_requests[0]['data_dict']['treepo']
    if note['mode'] == 'tree' and note.get('step', 0) == int(os.environ['DIES_AT']):
        await asyncio.sleep(0.2)
        assert not growing.done()
        die()
    return await growing


TreeRolloutScheduler.rollout = rollout_and_die
