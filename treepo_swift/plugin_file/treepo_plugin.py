"""Give this file to both `swift rollout` and `swift rlhf --rlhf_type grpo`: --external_plugins treepo_plugin.py

It registers the rollout scheduler `treepo` and the trainer that computes tree advantages; all code is in the
installed package treepo_swift. To add a scheduler of your own, copy this file and register your subclass in
`swift.rollout.multi_turns` below.
"""

from treepo_swift.plugin import register

register()
