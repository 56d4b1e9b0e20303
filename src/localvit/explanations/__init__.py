"""What a model looks at, and what locality changes."""

from localvit.explanations import hosts
from localvit.explanations.attention import AttentionMap, attention_maps
from localvit.explanations.cam import ClassActivation, grad_cam
from localvit.explanations.explain import Explanation, HeatMap, Method, explain
from localvit.explanations.files import write_explanations
from localvit.explanations.layers import Placement, TokenGrid, layers_of
from localvit.explanations.overlay import draw_explanation, draw_overlay
from localvit.explanations.rollout import rollout

__all__ = [
    "AttentionMap",
    "ClassActivation",
    "Explanation",
    "HeatMap",
    "Method",
    "Placement",
    "TokenGrid",
    "attention_maps",
    "draw_explanation",
    "draw_overlay",
    "explain",
    "grad_cam",
    "layers_of",
    "rollout",
    "write_explanations",
]
