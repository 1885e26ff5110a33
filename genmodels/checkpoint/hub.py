"""Models on the Hugging Face hub: fetched by OWNER/NAME, and put there.

A model there is an export: config.json and model.safetensors, beside its card. These two alone are
fetched, and looked at as those of any other export; nothing in them is executed.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from genmodels.distributed import gather_to_all, joined, rank, together, world
from genmodels.version import __version__

WEIGHTS, SETTINGS = "model.safetensors", "config.json"  # of an export
_NAME = re.compile(r"(hf://)?([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def repository(text: str) -> tuple[str, str | None] | None:
    """Return (OWNER/NAME, revision or None) of a word that may be a model of the hub, else None.

    Such a word is OWNER/NAME or OWNER/NAME@REVISION. If OWNER is a folder here it is a path, unless
    it begins with hf://.
    """
    match = _NAME.fullmatch(text)
    if match is None or text.endswith(".ckpt"):
        return None
    explicit, name, revision = match.groups()
    if not explicit and Path(name.partition("/")[0]).is_dir():
        return None
    return name, revision


def fetch(text: str) -> Path | None:
    """Return where a model of the hub lies in the hub's cache; None of a word that names none.

    Of processes that are joined the first one fetches, the others then take the same commit. Of
    others the hub's own locks keep two from fetching at the same time.

    Raises:
        ValueError: no connection, no such repository or revision, a private one, no export.
    """
    named = repository(text)
    if named is None:
        return None
    name, revision = named
    if world() == 1 or not joined():
        return _snapshot(text, name, revision)
    with together():
        folder = _snapshot(text, name, revision) if rank() == 0 else None
    commit = gather_to_all(folder and folder.name)[0]
    with together():
        return folder or _snapshot(text, name, commit)


def _snapshot(text: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _clear_errors("model", text, "is no run folder, .ckpt file or exported folder here, and "):
        fetched = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[SETTINGS, WEIGHTS],
            library_name="genmodels",
            library_version=__version__,
        )
    folder = Path(str(fetched))
    for file in (SETTINGS, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"model={text}: that repository of the hub has no {file}: no export of genmodels"
            )
    return folder


def upload(folder: Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Put an export into a repository of the hub, which is made if there is none; return its URL.

    Args:
        folder: of the export; what else lies in it stays here.
        name: OWNER/NAME.
        private: nobody else is to see it.
        token: of the hub; None: the one that `hf auth login` or HF_TOKEN left.

    Raises:
        ValueError: no connection, not logged in, not allowed, a public repository is there where
            a private one was asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="genmodels", library_version=__version__)
    with _clear_errors("to", name):
        url = api.create_repo(name, private=private or None, exist_ok=True)
        public = private and not api.model_info(name).private
    if public:
        raise ValueError(
            f"to={name}: is there and public; make it private on its page, or leave private out"
        )
    with _clear_errors("to", name):
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[SETTINGS, WEIGHTS, "README.md", "*.png"],
            commit_message=f"Model by genmodels {__version__}",
        )
    return str(url)


@contextlib.contextmanager
def _clear_errors(key: str, text: str, before: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into one line of the user's.

    Args:
        key, text: the word that named the repository.
        before: what the line says first.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        reason = f"the hub wants its terms accepted, on its page: do so, then {_LOGIN}"
    except errors.RepositoryNotFoundError:
        reason = f"the hub shows no such repository: mind the name; if it is private, {_LOGIN}"
    except errors.RevisionNotFoundError:
        reason = "its repository on the hub has no such revision"
    except errors.HFValidationError:
        reason = "that is no name for the hub: write OWNER/NAME"
    except Exception as error:  # of the network and of the server: nearly any kind
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine, as a full disk
        reason = _reason(error)
    else:
        return
    raise ValueError(f"{key}={text}: {before}{reason}") from None


def _reason(error: Exception) -> str:
    """Return in one line what went wrong with the hub."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses it ({status}): {_LOGIN}, with a token that may do this"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if status:
        return f"the hub answers {status} ({' '.join(lines)[:200]})"
    if isinstance(error, ValueError):  # of a card that it does not take
        return f"the hub does not take it ({' '.join(lines)[:200]})"
    said = lines[0][:200] if lines else type(error).__name__
    return f"the hub cannot be reached ({said})"
