"""The temperature of a trained model: logits divided by it give probabilities that agree with the accuracy.

`localvit.evaluation.temperature` fits it. A checkpoint holds it in what it says about the run, so that it goes wherever
that goes: into exported files and to the hub. A model that is trained further starts without.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from localvit.utils.weight_files import CheckpointError

CALIBRATION = "calibration"
"""Name of the record in what a checkpoint says about its run."""
LIMITS = (1e-3, 1e3)
"""The temperatures that make sense. Beyond them, probabilities are those of one class, or all equal."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature and how it was fitted (On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2)."""

    temperature: float
    """What logits are divided by, above 0: above 1 for an overconfident model."""
    num_images: int
    """Number of images it was fitted to."""
    images: str
    """Hash of these images' names (`localvit.evaluation.temperature.hash_of`)."""
    ece_before: float
    """Expected calibration error on these images with temperature 1, from 0 to 1."""
    ece_after: float
    """The same with temperatures that were fitted to other images than those they are applied to (cross-fitting)."""
    loss_before: float
    """Mean cross-entropy with temperature 1, in nats."""
    loss_after: float
    """The same with the temperatures of `ece_after`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, about: Mapping[str, Any], source: object) -> Self | None:
        """What a checkpoint says about its run, read strictly; None without a temperature.

        Args:
            about: What it says.
            source: Its path, for messages.

        Raises:
            CheckpointError: For a record that is not complete, or a temperature that makes no sense.
        """
        record = about.get(CALIBRATION)
        if record is None:
            return None
        values = record if isinstance(record, Mapping) else {}
        types: dict[str, Any] = {each.name: each.type for each in fields(cls)}
        numbers = [name for name, kind in types.items() if kind in (int, float)]
        wrong = [name for name, kind in types.items() if type(values.get(name)) not in (kind, *_ALSO.get(kind, ()))]
        wrong += [name for name in numbers if name not in wrong and not math.isfinite(values[name])]
        if not wrong and not LIMITS[0] <= values["temperature"] <= LIMITS[1]:
            wrong = ["temperature"]
        if wrong:
            raise CheckpointError(
                f"{source} has a damaged temperature ({', '.join(wrong)} missing or not what it should be): fit it "
                "again with localvit eval --fit-temperature"
            )
        return cls(**{name: values[name] for name in types})


_ALSO: dict[Any, tuple[type, ...]] = {float: (int,)}


def for_weights(about: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """What a checkpoint says, without a temperature that was fitted to its other (raw or averaged) weights."""
    record = about.get(CALIBRATION)
    if not isinstance(record, Mapping) or record.get("weights", weights) == weights:
        kept = dict(about)
        if isinstance(record, Mapping):
            kept[CALIBRATION] = {name: value for name, value in record.items() if name != "weights"}
        return kept
    return {name: value for name, value in about.items() if name != CALIBRATION}
