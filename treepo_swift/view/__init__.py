"""Trees that were written to disk: `load` reads them, ``treepo-swift view`` shows them."""

from treepo_swift.wire.record import NodeRecord, TrajectoryRecord, TreeRecord

from .files import TreesError, load

__all__ = ['NodeRecord', 'TrajectoryRecord', 'TreeRecord', 'TreesError', 'load']
