"""The model families; importing them registers every model with timm."""

from localvit.models import localvit_swin, localvit_tnt, localvit_vit
