"""Writing checkpoints whole."""

import os
import shutil
from pathlib import Path

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, flushes it to disk, and renames it."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        """Save the checkpoint at path: after a kill there is the old file or the new one."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind its own
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError) or reason.errno is None:
                raise
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        finally:
            partial.unlink(missing_ok=True)


def link(path, target):
    """Make target the same file as path (a copy where there are no hard links), all or nothing."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copy(path, partial)
    os.replace(partial, target)
