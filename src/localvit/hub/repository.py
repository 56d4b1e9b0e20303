"""Pushing a model to a repository of the Hugging Face Hub, and loading one from there."""

import tempfile
from pathlib import Path

from localvit.checkpoints.hub_download import PREFIX, HubError, check_name, library, status_of, unreachable
from localvit.checkpoints.hub_folder import CONFIG, is_hub_folder
from localvit.hub.folder import save_hub_folder
from localvit.inference.runner import LoadedModel, load_model


def push(loaded: LoadedModel, name: str, *, private: bool = False, update: bool = False) -> str:
    """Upload a model to the Hugging Face Hub, as the folder of `save_hub_folder`.

    The address of the hub and the token are those of huggingface_hub (`hf auth login`, HF_TOKEN, HF_ENDPOINT).

    Args:
        loaded: the model, from `localvit.load_model`.
        name: "user/name" of the repository, which is created.
        private: create a private repository.
        update: add a commit to a repository that exists, instead of refusing it.

    Returns:
        The address of the repository.

    Raises:
        ValueError: for another form of name, and as `save_hub_folder`.
        HubError: without huggingface_hub, a token or a network, or if the repository exists or may not be written.
    """
    check_name(name)
    hub = library()
    if hub.get_token() is None:
        raise HubError("there is no token to write with: run 'hf auth login', or set HF_TOKEN to one from the hub")
    api = hub.HfApi(library_name="localvit")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_hub_folder(loaded, temporary, title=name)
        try:
            url = api.create_repo(name, private=private, exist_ok=update)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the model with localvit push")
        except Exception as error:  # of huggingface_hub or of its HTTP library, which depends on its version
            raise HubError(_reason(error, name, str(api.endpoint))) from error
    return str(url)


def _reason(error: Exception, name: str, endpoint: str) -> str:
    status = status_of(error)
    if status == 409:
        return f"{name} exists: choose another name, or add a commit to it with --update"
    if status in (401, 403):
        return f"the token may not write to {name} (status {status}): use one of that user, with permission to write"
    return unreachable(error, endpoint)


def from_hub(
    source: str | Path, *, revision: str | None = None, input_size: tuple[int, int] | None = None
) -> LoadedModel:
    """Load a model from the Hugging Face Hub, or from a folder with the same files.

    Models of `localvit push`, and others in timm's layout whose weights have timm's names. No code in the files is run.

    Args:
        source: "user/name" of the repository, or a folder.
        revision: branch, tag or commit of the repository.
        input_size: height and width to use instead of the model's own, in pixels.

    Raises:
        ValueError: if `source` is neither a model's folder nor "user/name".
        CheckpointError: if a file is missing, damaged or unsafe.
        HubError: without huggingface_hub or a network, or if there is no such repository.
    """
    if is_hub_folder(source):
        return load_model(source, input_size=input_size)
    if Path(source).exists():
        raise ValueError(f"{source} is not a model's folder: it has no {CONFIG}")
    name = PREFIX + str(source).removeprefix(PREFIX)
    return load_model(f"{name}@{revision}" if revision else name, input_size=input_size)
