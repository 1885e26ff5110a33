"""Files from elsewhere: what is looked at before a library's reader is let loose on them.

Only plain files are opened; what an archive unpacks to is bounded; the pickles in files of
torch.save are read as inert data first. docs/reliability.md has the table of all readers.
"""

from genmodels.foreign.archives import Npz, check_npy, open_npz
from genmodels.foreign.plain import check_plain, open_plain, read_plain
from genmodels.foreign.torch_files import check_key, is_torch_file, load_torch

__all__ = [
    "Npz",
    "check_key",
    "check_npy",
    "check_plain",
    "is_torch_file",
    "load_torch",
    "open_npz",
    "open_plain",
    "read_plain",
]
