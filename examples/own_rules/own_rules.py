"""An external plugin: trees, with a branching policy, an answer rule and an advantage estimator of one's own.

Give it to both commands instead of treepo_plugin.py. tree.yaml names the three.
"""

from statistics import median

from treepo_swift import register, register_advantage, register_answer, register_branching
from treepo_swift.core.policies.branching import split_branches


@register_branching('short_first')
def short_first(live, total, context):
    """More branches for shorter paths: they have more room to grow."""
    return split_branches([1 / path.leaf.length for path in live], total, context.rng)


@register_answer('boxed_number')
def boxed_number(text: str) -> bool:
    """A box that holds a number. Asked about what the turn says so far, so it must be linear in it."""
    begin = text.rfind('\\boxed{')
    end = text.find('}', begin)
    return begin >= 0 and end > begin and text[begin + 7 : end].isdigit()


@register_advantage('above_median')
def above_median(paths, rewards, **options):
    """1 above the tree's median reward, -1 below, 0 at it; a tree of one kind of reward gives nothing."""
    trees = {}
    for path, reward in zip(paths, rewards, strict=True):
        trees.setdefault(path[0], []).append(reward)
    medians = {tree: median(values) for tree, values in trees.items()}
    return [float(r > medians[p[0]]) - float(r < medians[p[0]]) for p, r in zip(paths, rewards, strict=True)]


register()
