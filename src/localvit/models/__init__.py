"""The published models, one family a file; importing the package registers every name with timm."""

from localvit.models import pvt, swin, t2t, tnt, vit
