"""A trained model shared through the Hugging Face Hub, in the layout that timm and transformers read."""

from localvit.checkpoints.hub_download import HubError
from localvit.hub.folder import save_hub_folder
from localvit.hub.repository import from_hub, push

__all__ = ["HubError", "from_hub", "push", "save_hub_folder"]
