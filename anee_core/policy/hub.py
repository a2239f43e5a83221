"""Policies on the model hub: how a repository is named, fetched and filled."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from anee_core.errors import CheckpointError, InputError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"\w[\w./-]*")
_FILES = ("*.json", "*.safetensors", "README.md")


def is_repository(name: str) -> bool:
    """Return whether a name may be that of a repository on the hub, ``OWNER/NAME``."""
    return _REPOSITORY.fullmatch(name) is not None


def is_address(name: str) -> bool:
    """Return whether a name may be that of a repository, or of a revision of one, ``OWNER/NAME@REVISION``."""
    repository, at, revision = name.partition("@")
    return is_repository(repository) and (not at or _REVISION.fullmatch(revision) is not None)


def fetch(address: str) -> Path:
    """Return a local folder with the policy of a repository on the hub.

    Args:
        address: ``OWNER/NAME``, for the newest revision, or ``OWNER/NAME@REVISION``: a commit, tag or branch.

    Raises:
        CheckpointError: it cannot be had.
    """
    repository, _, revision = address.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"there is no folder '{address}', and no policy of that name can be had from the hub: {error}"
        ) from error


def push(folder: str | Path, repository: str, private: bool | None = None) -> str:
    """Put a folder into a repository on the hub, made if need be, and return its address.

    Raises:
        InputError: the name is none of a repository.
        CheckpointError: the hub does not take it.
    """
    if not is_repository(repository):
        raise InputError(f"a repository on the hub is OWNER/NAME; got '{repository}'")
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="ANEE policy")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(f"the hub did not take the policy ({error}); 'hf auth login' logs you in") from error
    return address
