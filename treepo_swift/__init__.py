"""Tree rollouts for GRPO training with ms-swift (TreePO, arXiv 2508.17445).

Importing this package loads no torch, vllm or swift: the search, the policies and the advantages are plain Python.
"""

__version__ = '0.2.0'
