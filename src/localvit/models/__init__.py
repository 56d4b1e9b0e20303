"""The published models, one family a file, and their registry: importing the package registers every name with timm.

Each model is also a function of this package: `localvit.models.localvit_tiny(pretrained=True)`.
"""

from localvit.models import vit  # isort: split

# The line above comes first so that LocalViT-T heads every list of models.
from localvit.models import pvt, swin, t2t, tnt
from localvit.models.factory import create_model, is_model, pretrained_cfg
from localvit.models.family import Family
from localvit.models.localized import LOCALIZED
from localvit.models.registry import ModelInfo, find_model, list_models, register_model, registered_models
