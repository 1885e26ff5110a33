"""Writing checkpoints whole."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from genmodels.atomic import whole_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, flushes it to disk, and renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None
    ) -> None:
        """Save the checkpoint at path: after a kill there is the old file or the new one."""
        with whole_file(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch.save hides a full disk behind its own
                reason = error.__context__
                if not isinstance(reason, OSError) or reason.errno is None:
                    raise
                raise reason from None
