"""Surgery: locality in a transformer that somebody else wrote.

`sites` finds the feed-forwards and how their tokens lie on the patch grid, by the rules of `timm_hosts` and
`transformers_hosts`; `branch` and `paper_form` are the two ways to put locality there; `localize` is the call.
"""

from localvit.surgery import timm_hosts as timm_hosts  # importing it registers its rules
from localvit.surgery import timm_pyramids as timm_pyramids
from localvit.surgery import timm_naflex as timm_naflex
from localvit.surgery import transformers_hosts as transformers_hosts
