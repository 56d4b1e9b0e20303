"""The model families; importing them registers every model with timm."""

from localvit.models import localvit_pvt, localvit_swin, localvit_t2t, localvit_tnt, localvit_vit
