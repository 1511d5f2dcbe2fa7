"""Checkpoints to and from the Hugging Face hub; HF_ENDPOINT names another hub with the same API.

Only the files of a checkpoint and its card are uploaded, not other files in the folder (training states, logs).
"""

from __future__ import annotations

from pathlib import Path

from anytoken.inference.checkpoint import CHECKPOINT, HUB_ID, check_folder, find_checkpoint
from anytoken.utils.atomic import check_target, write_folder
from anytoken.utils.errors import CheckpointError

CARD = "README.md"


def push(name_or_path: str | Path, repo: str, private: bool = False, message: str | None = None) -> str:
    """Upload a checkpoint to a hub repository, which is created if missing; returns the commit's URL.

    CheckpointError for an incomplete checkpoint, an invalid id, or a rejected upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    folder = find_checkpoint(name_or_path)
    check_folder(folder)
    _check_id(repo)
    files = [path.as_posix() for path in CHECKPOINT.own_files(folder)]
    files += [CARD] if (folder / CARD).is_file() else []
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=files,
            commit_message=message or f"Upload {folder.name}",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise CheckpointError(
            f"The hub rejected {repo} ({_reason(error)}). Log in with `hf auth login` or set HF_TOKEN, and check "
            "that you may write there."
        ) from error
    return str(done.commit_url)


def pull(repo: str, out: Path, revision: str | None = None, overwrite: bool = False) -> Path:
    """Download a checkpoint from the hub into a folder, completely or not at all.

    revision: a branch, tag or commit. CheckpointError for a repository that is missing or has no checkpoint, or a
    folder that contains something else.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    _check_id(repo)
    check_target(out, CHECKPOINT, overwrite)
    with write_folder(out, CHECKPOINT, overwrite) as scratch:
        try:
            found = Path(snapshot_download(repo, revision=revision, allow_patterns=[*CHECKPOINT.files, CARD]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(f"The hub did not provide {repo} ({_reason(error)}).") from error
        check_folder(found)
        for path in [*CHECKPOINT.own_files(found), *([Path(CARD)] if (found / CARD).is_file() else [])]:
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            (scratch / path).write_bytes((found / path).read_bytes())
    return out


def _check_id(repo: str) -> None:
    if not HUB_ID.fullmatch(repo):
        raise CheckpointError(f"A hub repository is written owner/name; received {repo!r}.")


def _reason(error: Exception) -> str:
    """The first line of the hub client's error."""
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(
            ": "
        )
    )
