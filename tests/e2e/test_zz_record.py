from tests.e2e.conftest import *
from tests.e2e.conftest import QUICKSTART
import shutil
def test_record(serve, train, model):
    shutil.copytree(model, '/tmp/shared_model', dirs_exist_ok=True)
    q=QUICKSTART
    done=train(serve(), '--external_plugins', str(q/'../../plugin/treepo_plugin.py'), str(q/'reward.py'), '/tmp/record_rows.py', steps=4)
    assert done.returncode==0, done.stderr[-2000:]
    print([l for l in (done.stdout+done.stderr).splitlines() if 'treepo' in l or "'loss'" in l])
