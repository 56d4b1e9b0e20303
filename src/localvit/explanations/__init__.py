"""What a model looks at, and what locality changes."""

from localvit.explanations import hosts
from localvit.explanations.attention import AttentionMap, attention_maps
from localvit.explanations.cam import ClassActivation, grad_cam
from localvit.explanations.explain import Explanation, HeatMap, Method, explain
from localvit.explanations.files import write_explanations
from localvit.explanations.layers import Placement, TokenGrid, layers_of
from localvit.explanations.overlay import class_overlays, draw_explanation, draw_overlay
from localvit.explanations.distance import attention_distance, receptive_fields
from localvit.explanations.neighbors import local_layers, without_neighbors
from localvit.explanations.rollout import rollout
from localvit.explanations.measures import LocalityMeasures, measure_locality

__all__ = [
    "AttentionMap",
    "ClassActivation",
    "Explanation",
    "HeatMap",
    "LocalityMeasures",
    "Method",
    "Placement",
    "TokenGrid",
    "attention_distance",
    "attention_maps",
    "class_overlays",
    "draw_explanation",
    "draw_overlay",
    "explain",
    "grad_cam",
    "layers_of",
    "local_layers",
    "measure_locality",
    "receptive_fields",
    "rollout",
    "without_neighbors",
    "write_explanations",
]
