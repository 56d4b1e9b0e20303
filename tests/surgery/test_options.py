"""The methods of `localize` as plain values, through JSON and back, and what they refuse."""

import json

import pytest

from localvit import Adapter, Replace
from localvit.surgery.options import options_of, parse_options

METHODS = [
    (Adapter(), {}),
    (Adapter(kernel_size=5, dilation=2, gate="se", reduction=16, norm="layernorm"), None),
    (Adapter(gate="eca"), {"gate": "eca"}),
    (Replace(), {"method": "replace"}),
    (Replace(act=3, reduction=192), {"method": "replace", "act": 3, "reduction": 192}),
    (Replace(act="hs", expand_ratio=1.5, depthwise=False), None),
]


@pytest.mark.parametrize(("method", "expected"), METHODS, ids=str)
def test_methods_come_back_from_json(method, expected):
    options = options_of(method)
    assert expected is None or options == expected
    assert parse_options(json.loads(json.dumps(options))) == (method, {})


def test_other_arguments_are_separated():
    others = {"blocks": "1-4", "filter_fn": ["fc2"], "num_prefix_tokens": 1, "trainable": "locality"}
    options = json.loads(json.dumps({"gate": "se", "grid": (3, 5)} | others))
    assert parse_options(options) == (Adapter(gate="se"), {"grid": (3, 5)} | others)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "remove"}, ValueError, "method='remove' is not known; choose one of adapter, replace"),
        ({"kernel": 5}, TypeError, "method='adapter' has no option kernel; its options are kernel_size, .* blocks,"),
        ({"method": "replace", "gate": "se"}, TypeError, "method='replace' has no option gate; its options are act,"),
        ({"preserve": False}, TypeError, "has no option preserve"),
        ({"method": "replace", "act": "gelu"}, ValueError, "act='gelu' is not known"),
    ],
)
def test_unknown_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        parse_options(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act": 6}, "act=6 is not known"),
        ({"reduction": 0}, "reduction=0 must be at least 1"),
        ({"expand_ratio": 0.0}, "expand_ratio=0.0 must be positive"),
        ({"depthwise": False, "depthwise_first": True}, "depthwise_first=True needs the depth-wise convolution"),
    ],
)
def test_replace_is_validated_when_it_is_created(arguments, message):
    with pytest.raises(ValueError, match=message):
        Replace(**arguments)
