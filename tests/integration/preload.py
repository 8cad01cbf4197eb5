"""What the processes of the fixture `loaded` begin with. It starts no thread: threads do not survive a fork."""

import treepo_swift.server.scheduler
import treepo_swift.trainer.trainer  # noqa: F401
