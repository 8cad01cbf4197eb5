"""An external plugin for tests: vLLM's CPU worker sleeps. What a GPU would give away is lost here too.

All else of sleeping is vLLM's and swift's own: the scheduler that is paused, caches that are reset, partial waking.
"""

from swift.rlhf_trainers import rollout_mixin, utils
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_worker import CPUWorker

LOST = 1e4
"""What stands in lost memory: nothing that was computed from it could pass for an answer."""


def lose(tensors):
    for tensor in tensors:
        tensor.data.fill_(LOST)


def sleep(self, level=1):
    parameters = dict(self.model_runner.model.named_parameters())
    # Level 1 keeps weights in the host's memory, level 2 only buffers.
    self.kept = {name: p.detach().clone() for name, p in parameters.items()} if level == 1 else {}
    lose(parameters.values())
    lose(self.model_runner.kv_caches)
    print(f'worker sleeps at level {level}', flush=True)


def wake_up(self, tags=None):
    if tags is None or 'weights' in tags:
        for name, parameter in self.model_runner.model.named_parameters():
            if name in self.kept:
                parameter.data.copy_(self.kept[name])
    if tags is None or 'kv_cache' in tags:
        for cache in self.model_runner.kv_caches:
            cache.zero_()
    print(f'worker wakes {tags}', flush=True)


CpuPlatform.is_sleep_mode_available = lambda self: True
CPUWorker.sleep, CPUWorker.wake_up = sleep, wake_up
# It asks for a device's memory, which a CPU has not.
rollout_mixin.aggressive_empty_cache = utils.aggressive_empty_cache = lambda *args, **kwargs: None
