"""Reading checkpoints: from a file or folder to an index of where each tensor's bytes are.

path -> format (index.py) -> tree of entries -> weights (weights.py)

One file per format (`torch_zip.py`, `torch_legacy.py`, `safetensors.py`, `huggingface.py`), each an instance of
`CheckpointFormat` named in one line of `index.py`. Nothing here reads a tensor, but for `read_entry` and
`LazyTensor`.
"""

from lightning_efficient_init.checkpoint.entry import Chunk, Entry
from lightning_efficient_init.checkpoint.file import Seal
from lightning_efficient_init.checkpoint.format import CheckpointFormat, CheckpointTree
from lightning_efficient_init.checkpoint.index import FORMATS, CheckpointIndex, index_checkpoint, index_tree
from lightning_efficient_init.checkpoint.lazy import LazyTensor, as_saved, lazy_tree, read_entry
from lightning_efficient_init.checkpoint.tree import map_leaves
from lightning_efficient_init.checkpoint.weights import Weights, weights_of

__all__ = [
    "FORMATS",
    "CheckpointFormat",
    "CheckpointIndex",
    "CheckpointTree",
    "Chunk",
    "Entry",
    "LazyTensor",
    "Seal",
    "Weights",
    "as_saved",
    "index_checkpoint",
    "index_tree",
    "lazy_tree",
    "map_leaves",
    "read_entry",
    "weights_of",
]
