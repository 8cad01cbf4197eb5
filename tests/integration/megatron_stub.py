"""What swift's Megatron trainer needs of packages that only run on a GPU, so that its own source runs here.

Stubbed are `megatron` (megatron-core), `mcore_bridge` and `ray`; of swift only `swift.megatron.init`, which patches
torch. Every other module of swift is the installed one. Parallel groups are torch's, of processes that talk by gloo.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PACKAGES = ('megatron', 'mcore_bridge', 'ray')
OURS = ('treepo_swift.trainer.megatron', 'treepo_swift.trainer.ray', 'treepo_swift.trainer.ray_trainer')
SWIFTS = ('swift.megatron', 'swift.ray')


class Stub(ModuleType):
    """A package in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition('.')[0] not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Mpu:
    """Megatron's groups, in its order of ranks: tensor, context, data, pipeline. Tensor and context are 1 here."""

    def __init__(self, *, stages: int = 1) -> None:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.stages, self.replicas = stages, world // stages
        self.stage, self.replica = divmod(rank, self.replicas)
        # All ranks make all groups.
        models = [[r + s * self.replicas for s in range(stages)] for r in range(self.replicas)]
        data = [[r + s * self.replicas for r in range(self.replicas)] for s in range(stages)]
        self.model_group = [torch.distributed.new_group(ranks) for ranks in models][self.replica]
        self.data_group = [torch.distributed.new_group(ranks) for ranks in data][self.stage]

    def module(self) -> ModuleType:
        values = {
            'get_model_parallel_group': lambda: self.model_group,
            'get_data_parallel_group': lambda with_context_parallel=False: self.data_group,
            'get_data_parallel_world_size': lambda: self.replicas,
            'get_data_parallel_rank': lambda: self.replica,
            'get_pipeline_model_parallel_world_size': lambda: self.stages,
            'get_tensor_model_parallel_world_size': lambda: 1,
            'get_context_parallel_world_size': lambda: 1,
            'is_pipeline_first_stage': lambda **kwargs: self.stage == 0,
            'is_pipeline_last_stage': lambda **kwargs: self.stage == self.stages - 1,
        }
        module = ModuleType('megatron.core.mpu')
        vars(module).update(values)
        return module


def install() -> None:
    """Let `swift.megatron` be imported in this process. `use_groups` when torch.distributed has been started."""
    sys.meta_path.insert(0, StubFinder())
    core = importlib.import_module('megatron.core')
    core.__version__ = '0.16.1'
    sys.modules['megatron.core.mpu'] = core.mpu = ModuleType('megatron.core.mpu')
    core.mpu.RankGenerator = None
    parallel = importlib.import_module('megatron.core.tensor_parallel')
    parallel.vocab_parallel_cross_entropy = cross_entropy
    importlib.import_module('megatron.core.packed_seq_params').PackedSeqParams = SimpleNamespace
    importlib.import_module('megatron.core.rerun_state_machine').RerunDataIterator = iter
    ray = importlib.import_module('ray')
    ray.remote, ray.is_initialized = lambda *args, **kwargs: lambda cls: cls, lambda: False
    init = sys.modules['swift.megatron.init'] = ModuleType('swift.megatron.init')
    init.init_megatron_env = lambda: None


def cross_entropy(vocab_parallel_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of a vocabulary that lies on one rank."""
    logprobs = vocab_parallel_logits.log_softmax(-1)
    return -logprobs.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def use_groups(mpu: Mpu) -> None:
    vars(sys.modules['megatron.core.mpu']).update(vars(mpu.module()))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    between = importlib.import_module('megatron.core.inference.communication_utils')
    between.send_to_next_pipeline_rank = lambda tensor: torch.distributed.send(tensor, (rank + mpu.replicas) % world)
    between.recv_from_prev_pipeline_rank_ = lambda tensor: torch.distributed.recv(tensor, (rank - mpu.replicas) % world)
    torch.cuda.current_device = lambda: 'cpu'  # where swift makes the buffers for them


@contextmanager
def installed() -> Iterator[None]:
    """`install`, and everything as it was afterwards."""
    before, path = dict(sys.modules), list(sys.meta_path)
    packages = {name: sys.modules.get(name) for name in ('swift', 'treepo_swift.trainer')}
    try:
        install()
        yield
    finally:
        sys.meta_path[:] = path
        added = [name for name in sys.modules if name not in before and belongs(name)]
        for name in added:
            del sys.modules[name]
            parent, _, child = name.rpartition('.')
            if parent in packages and packages[parent] is not None:
                vars(packages[parent]).pop(child, None)


def belongs(name: str, roots: Sequence[str] = (*PACKAGES, *OURS, *SWIFTS)) -> bool:
    return any(name == root or name.startswith(f'{root}.') for root in roots)
