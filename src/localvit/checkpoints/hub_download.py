"""Downloading a model's folder from the Hugging Face Hub, with one clear line for whatever prevents it."""

import re
from pathlib import Path
from typing import Any

from localvit.checkpoints.hub_folder import CONFIG, WEIGHTS

PREFIX = "hf-hub:"
"""What the name of a repository begins with where a model's name or a file could be meant, as in timm."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class HubError(RuntimeError):
    """The hub cannot be used. The message says why, in one line, and what to do."""


def download(name: str, revision: str | None = None) -> Path:
    """The folder in huggingface_hub's cache with the config.json and the weights of a repository.

    Args:
        name: "user/name", with `PREFIX` or without, and with "@revision" or without.
        revision: branch, tag or commit.

    Raises:
        ValueError: for another form of name.
        HubError: without huggingface_hub or a network, or if there is no such repository.
    """
    name, _, tag = name.removeprefix(PREFIX).partition("@")
    check_name(name)
    hub = library()
    try:
        paths = [hub.hf_hub_download(name, file, revision=revision or tag or None) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # of huggingface_hub or of its HTTP library, which depends on its version
        raise HubError(_reason(error, name, hub.constants.ENDPOINT)) from error
    return Path(paths[0]).parent


def check_name(name: str) -> None:
    """Raise ValueError unless the name is that of a repository, "user/name"."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not the name of a repository: give user/name, of letters, digits, '.', '_' and '-'"
        )


def library() -> Any:
    """huggingface_hub. Raises HubError, with what to install, if it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            f"the hub needs huggingface_hub, which cannot be imported ({error}): pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _reason(error: Exception, name: str, endpoint: str) -> str:
    kind = type(error).__name__
    if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return f"{name} has no {CONFIG} with a {WEIGHTS} beside it, so it is not a model in timm's layout"
    if kind == "RevisionNotFoundError":
        return f"{name} has no such revision: give a branch, tag or commit of it"
    if kind == "RepositoryNotFoundError" or status_of(error) in (401, 403, 404):
        return f"{endpoint} has no model {name}, or it is private and needs a token ('hf auth login')"
    return unreachable(error, endpoint)


def status_of(error: Exception) -> int | None:
    """The status with which the hub answered, if it did."""
    return getattr(getattr(error, "response", None), "status_code", None)


def unreachable(error: Exception, endpoint: str) -> str:
    """The message for an error that is not about the repository."""
    cause: BaseException = error
    while cause.__cause__ is not None:  # huggingface_hub hides a closed network behind "not found in the cache"
        cause = cause.__cause__
    kind = type(cause).__name__
    first = (str(cause).strip().splitlines() or [kind])[0]
    if status_of(error) is not None:
        return f"{endpoint} answered with status {status_of(error)} ({first}): try again later"
    if kind == "OfflineModeIsEnabled":
        return "the environment variable HF_HUB_OFFLINE forbids to use the network: unset it"
    return f"{endpoint} cannot be reached ({kind}: {first}): check the network, or HF_ENDPOINT"
