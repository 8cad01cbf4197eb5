"""The CPU patches: targets exist, a missing one is an error, an accelerator makes them inert."""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from treepo_swift.compat import cpu

torch = pytest.importorskip('torch')

TARGETS: list[tuple[Callable[[], None], str, str]] = [
    (cpu.patch_synchronize, 'torch.cuda', 'synchronize'),
    (cpu.patch_device_check, 'swift.arguments.deploy_args:RolloutArguments', '_check_device_count'),
    (cpu.patch_weight_broadcast, 'vllm.distributed.device_communicators.pynccl:PyNcclCommunicator', 'broadcast'),
    (cpu.patch_deepspeed_backend, 'accelerate.state:PartialState', '_prepare_backend'),
    (cpu.patch_weight_packing, 'vllm.model_executor.layers.utils', 'dispatch_cpu_unquantized_gemm'),
    (cpu.patch_adapter_scaling, 'vllm.lora.lora_weights:LoRALayerWeights', 'optimize'),
    (cpu.patch_idle_spin, 'vllm.distributed.device_communicators.shm_broadcast:SpinCondition', '__init__'),
]
IDS = [f'{owner}.{name}' for _, owner, name in TARGETS]


def owner_of(path: str) -> Any:
    pytest.importorskip(path.split('.')[0])
    module, _, attribute = path.partition(':')
    target = importlib.import_module(module)
    return getattr(target, attribute) if attribute else target


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undo, after the test, what the patches do to swift, vLLM, torch and the environment."""
    monkeypatch.setattr(torch.cpu, 'device', None, raising=False)
    monkeypatch.delattr(torch.cpu, 'device')
    for _, owner, name in TARGETS:
        target = owner_of(owner)
        monkeypatch.setattr(target, name, original(target, name))
    communicator = owner_of('vllm.distributed.device_communicators.pynccl:PyNcclCommunicator')
    monkeypatch.setattr(communicator, 'device', None, raising=False)
    monkeypatch.delattr(communicator, 'device')
    for variable in ('VLLM_PLUGINS', 'VLLM_CPU_KVCACHE_SPACE'):
        monkeypatch.setenv(variable, '')
        monkeypatch.delenv(variable)
    monkeypatch.setattr(cpu, 'is_cpu_only', lambda: True)
    return monkeypatch


def original(target: Any, name: str) -> Any:
    """The unpatched attribute, also where an earlier test or vLLM's plugin loader has patched it in this process."""
    value = getattr(target, name)
    return value.__wrapped__ if hasattr(value, cpu._MARK) else value


def current() -> list[Any]:
    return [getattr(owner_of(owner), name) for _, owner, name in TARGETS]


def test_import_is_light() -> None:
    code = (
        'import sys, treepo_swift.compat.cpu; '
        'print([name for name in ("torch", "vllm", "swift", "numpy") if name in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_every_target_exists_and_is_patched_once(keep: pytest.MonkeyPatch) -> None:
    before = current()
    cpu.apply()
    cpu.register()
    once = current()
    cpu.apply()
    cpu.register()
    assert all(new is not old and new.__wrapped__ is old for new, old in zip(once, before, strict=True))
    assert all(again is new for again, new in zip(current(), once, strict=True))


@pytest.mark.parametrize(('patch', 'owner', 'name'), TARGETS, ids=IDS)
def test_a_missing_target_is_an_error(
    keep: pytest.MonkeyPatch, patch: Callable[[], None], owner: str, name: str
) -> None:
    keep.delattr(owner_of(owner), name)
    with pytest.raises(RuntimeError) as caught:
        patch()
    assert f'{owner}.{name}' in str(caught.value) and cpu.SUPPORTED in str(caught.value)


def test_a_missing_module_is_an_error() -> None:
    with pytest.raises(RuntimeError, match='vllm.gone:Engine.run'):
        cpu._replace('vllm.gone:Engine', 'run', lambda original: original)


def test_inert_with_an_accelerator(keep: pytest.MonkeyPatch) -> None:
    keep.setattr(cpu, 'is_cpu_only', lambda: False)
    before = current()
    cpu.apply()
    cpu.register()
    assert all(now is old for now, old in zip(current(), before, strict=True))
    assert not hasattr(torch.cpu, 'device')
    assert 'VLLM_PLUGINS' not in os.environ and 'VLLM_CPU_KVCACHE_SPACE' not in os.environ


def test_is_cpu_only_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    assert not cpu.is_cpu_only()
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert cpu.is_cpu_only()


def test_environment_defaults_keep_what_the_user_set(keep: pytest.MonkeyPatch) -> None:
    cpu.set_vllm_environment()
    assert os.environ['VLLM_PLUGINS'] == 'treepo_cpu' and os.environ['VLLM_CPU_KVCACHE_SPACE'] == '1'
    keep.setenv('VLLM_PLUGINS', 'mine')
    keep.setenv('VLLM_CPU_KVCACHE_SPACE', '7')
    cpu.set_vllm_environment()
    cpu.set_vllm_environment()
    assert os.environ['VLLM_PLUGINS'] == 'mine,treepo_cpu' and os.environ['VLLM_CPU_KVCACHE_SPACE'] == '7'


def test_only_beside_the_cpu_build_are_gpu_and_nccl_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {'vllm-cpu'}

    def version(name: str) -> str:
        if name not in installed:
            raise cpu.importlib.metadata.PackageNotFoundError(name)
        return '0.32.0'

    monkeypatch.setattr(cpu.importlib.metadata, 'version', version)
    assert cpu.environment() == {'VLLM_DISABLE_PYNCCL': '1', 'CUDA_VISIBLE_DEVICES': ''}
    installed.clear()
    assert cpu.environment() == {}


def test_scripts_take_the_environment_over() -> None:
    command = f'eval "$({sys.executable} -m treepo_swift.compat.cpu)"; env'
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True, check=True)
    assert {f'{name}={value}' for name, value in cpu.environment().items()} <= set(done.stdout.splitlines())


def test_an_uninstalled_package_is_an_error(keep: pytest.MonkeyPatch) -> None:
    keep.setattr(cpu.importlib.metadata, 'entry_points', lambda group: [])
    with pytest.raises(RuntimeError, match='pip install'):
        cpu.set_vllm_environment()


def test_the_entry_point_loads_register() -> None:
    entries = cpu.importlib.metadata.entry_points(group=cpu.ENTRY_POINT_GROUP)
    assert [entry.load() for entry in entries if entry.name == cpu.ENTRY_POINT] == [cpu.register]


def test_device_context_and_synchronize(keep: pytest.MonkeyPatch) -> None:
    cpu.apply()
    torch.cuda.synchronize(torch.device('cpu'))
    with torch.cpu.device(torch.device('cpu')):
        assert (torch.ones(2) + 1).sum() == 4


def test_linear_weights_stay_loadable(keep: pytest.MonkeyPatch) -> None:
    cpu.patch_weight_packing()
    layer = torch.nn.Linear(3, 2, bias=False)
    weight = layer.weight
    owner_of('vllm.model_executor.layers.utils').dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    layer.weight.data.copy_(torch.ones(2, 3))
    assert layer.weight is weight
    assert layer.cpu_linear(torch.ones(1, 3), layer.weight, None).tolist() == [[3.0, 3.0]]


def test_an_adapter_of_the_trainer_is_not_scaled_in_place(keep: pytest.MonkeyPatch) -> None:
    weights = pytest.importorskip('vllm.lora.lora_weights')
    keep.setattr(weights.LoRALayerWeights, 'optimize', weights.LoRALayerWeights.optimize)
    cpu.patch_adapter_scaling()
    mine = torch.ones(4, 2)
    held = weights.LoRALayerWeights('x', rank=2, lora_alpha=8, lora_a=torch.ones(2, 3), lora_b=mine).optimize()
    assert torch.equal(held.lora_b, torch.full((4, 2), 4.0)) and torch.equal(mine, torch.ones(4, 2))


def test_an_enabled_communicator_keeps_its_own_broadcast(keep: pytest.MonkeyPatch) -> None:
    communicator = owner_of('vllm.distributed.device_communicators.pynccl:PyNcclCommunicator')
    calls: list[tuple[Any, ...]] = []
    keep.setattr(communicator, 'broadcast', lambda self, tensor, src, stream=None: calls.append((tensor, src, stream)))
    cpu.patch_weight_broadcast()
    communicator.broadcast(SimpleNamespace(disabled=False), 'tensor', src=1, stream='s')
    assert calls == [('tensor', 1, 's')]


def test_an_idle_reader_of_vllms_queue_leaves_the_core(keep: pytest.MonkeyPatch) -> None:
    """vLLM's own reader would spin for a second; a message still reaches one that sleeps."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    asked = 0

    def count() -> None:
        nonlocal asked
        asked += 1

    keep.setattr(shm_broadcast, 'sched_yield', count)  # a reader calls it each time that it finds nothing

    def times_asked(writer: MessageQueue, reader: MessageQueue) -> int:
        writer.enqueue('step')
        assert reader.dequeue(timeout=60) == 'step'
        before = asked
        with pytest.raises(TimeoutError):
            reader.dequeue(timeout=0.5)
        return asked - before

    def connect() -> tuple[MessageQueue, MessageQueue]:
        writer = MessageQueue(n_reader=1, n_local_reader=1)
        with ThreadPoolExecutor(1) as pool:
            ready = pool.submit(writer.wait_until_ready)
            reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
            reader.wait_until_ready()
            ready.result(timeout=60)
        return writer, reader

    spinning = times_asked(*connect())
    cpu.patch_idle_spin()
    writer, sleeping = connect()
    assert times_asked(writer, sleeping) < spinning / 10
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(sleeping.dequeue, timeout=60)
        time.sleep(10 * cpu.SPIN_SECONDS)
        writer.enqueue('weights')
        assert received.result(timeout=60) == 'weights'


def weights() -> list[Any]:
    """What a sync sends: a large tensor, one that is not contiguous, a scalar, an empty one."""
    return [
        torch.arange(300_000, dtype=torch.float32),
        torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
        torch.tensor(5, dtype=torch.int64),
        torch.empty(0),
    ]


@pytest.mark.parametrize('world_size', [2, 3])
def test_weights_reach_every_rank(keep: pytest.MonkeyPatch, world_size: int) -> None:
    """A sync as swift does it: from the last rank to all others, a barrier after each tensor."""
    communicator_class = owner_of('vllm.distributed.device_communicators.pynccl:PyNcclCommunicator')
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.network_utils import get_open_port

    port, src = get_open_port(), world_size - 1
    for name, value in cpu.environment().items():
        keep.setenv(name, value)

    def connect(rank: int) -> Any:
        group = StatelessProcessGroup.create(host='127.0.0.1', port=port, rank=rank, world_size=world_size)
        return communicator_class(group, device=torch.device('cpu'))

    def sync(communicator: Any) -> list[Any]:
        tensors = weights() if communicator.rank == src else [torch.zeros_like(tensor) for tensor in weights()]
        for tensor in tensors:
            communicator.broadcast(tensor, src=src, stream=None)
            communicator.group.barrier()
        return tensors

    with ThreadPoolExecutor(world_size) as pool:
        communicators = list(pool.map(connect, range(world_size), timeout=60))
        cpu.patch_weight_broadcast()  # after they were built, as in the trainer
        received = list(pool.map(sync, communicators, timeout=60))
    assert all(communicator.device.type == 'cpu' for communicator in communicators)
    for tensors in received:
        assert all(torch.equal(got, sent) for got, sent in zip(tensors, weights(), strict=True))


@pytest.mark.parametrize(
    ('host', 'expected'),
    [
        ('127.0.0.1', True),
        ('::1', True),
        ('localhost', True),
        ('0.0.0.0', False),
        ('10.0.0.7', False),
        ('node7', False),
    ],
)
def test_only_a_loopback_address_keeps_gloo_local(host: str, expected: bool) -> None:
    assert cpu._is_loopback(host) is expected
