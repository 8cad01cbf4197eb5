"""Say whether this environment can grow and train on trees, and what to mend."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable

from treepo_swift.compat import capabilities, versions
from treepo_swift.config import TreeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    checks: list[tuple[str, Callable[[], str]]] = [
        ('python', lambda: sys.version.split()[0]),
        ('ms-swift', lambda: _installed('ms-swift')),
        ('vllm', lambda: _installed('vllm')),
        ('pair', _pair),
        ('accelerator', _accelerator),
        ('torchvision', _no_foreign_torchvision),
        ('plugin', _plugin),
        ('trainer', _trainer),
        ('vllm has', _features),
        ('tree config', lambda: f'{TreeConfig.load().max_response_tokens} tokens at most on a path'),
    ]
    healthy = True
    for name, check in checks:
        try:
            print(f'ok    {name:12} {check()}')
        except Exception as e:
            healthy = False
            print(f'FAIL  {name:12} {type(e).__name__}: {e}')
    return 0 if healthy else 1


def _installed(package: str) -> str:
    versions.check(package)
    return str(versions.installed_version(package))


def _pair() -> str:
    return versions.untested() or 'tested with this release'


def _accelerator() -> str:
    from treepo_swift.compat.cpu import is_cpu_only

    if is_cpu_only():
        return 'none: treepo_swift.compat.cpu lets the whole loop run on the CPU'
    import torch

    return f'{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}'


def _no_foreign_torchvision() -> str:
    from treepo_swift.compat.cpu import is_cpu_only

    if not is_cpu_only() or importlib.util.find_spec('torchvision') is None:
        return 'fine'
    try:
        import torchvision  # noqa: F401
    except Exception as e:
        raise RuntimeError(
            f'does not load ({e}) and breaks transformers with it: `pip uninstall torchvision torchaudio torchcodec`'
        ) from None
    return 'fine'


def _plugin() -> str:
    from treepo_swift.plugin import SCHEDULERS, register

    register()
    return f'registers the schedulers {", ".join(SCHEDULERS)} and the trainer for --rlhf_type grpo'


def _trainer() -> str:
    capabilities.require(capabilities.TRAINER_NEEDS)
    return 'ms-swift has all that TreeGRPOTrainer overrides'


def _features() -> str:
    vllm = capabilities.vllm_features()
    chunks = {
        'request': 'chunks of a segment by request',
        'engine': 'chunks of a segment by engine',
        'none': 'a chunk for every token, which costs processor time',
    }
    named = {
        'flat log-probs': vllm.flat_logprobs,
        'requests without copies': vllm.skip_clone,
        'token inputs': vllm.token_inputs,
        'counters': vllm.metrics,
    }
    lacks = [name for name, there in named.items() if not there]
    return chunks[vllm.stream_interval] + (f'; lacks {", ".join(lacks)}' if lacks else ', and all else that is used')
