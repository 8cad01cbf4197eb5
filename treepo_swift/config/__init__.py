"""`TreeConfig`: how trees grow, stop and turn into advantages. Imports nothing of the package's other rooms."""

from .errors import ConfigError
from .reference import reference, schema
from .sources import CONFIG_ENV, ENV_PREFIX
from .tree_config import TreeConfig

__all__ = ['CONFIG_ENV', 'ENV_PREFIX', 'ConfigError', 'TreeConfig', 'reference', 'schema']
