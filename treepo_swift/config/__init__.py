"""`TreeConfig`: how trees grow, stop and turn into advantages. Imports nothing of the package's other rooms."""

from .errors import ConfigError
from .reference import reference, schema
from .sources import CONFIG_ENV, ENV_PREFIX
from .tree_config import KV_BLOCK, SHAPE, TreeConfig

__all__ = ['CONFIG_ENV', 'ENV_PREFIX', 'KV_BLOCK', 'SHAPE', 'ConfigError', 'TreeConfig', 'reference', 'schema']
