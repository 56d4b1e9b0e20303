"""Localized Hugging Face models from the folders that their `save_pretrained` writes.

The classes of transformers know no locality: they would leave its weights out. Here a subclass adds it where the
class makes the model, so that transformers itself loads all weights, with whatever it does for devices and dtypes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from localvit.surgery.adapter import LocalityAdapter
from localvit.surgery.localize import freeze_others, localize_with_options
from localvit.surgery.model_config import ENTRY
from localvit.surgery.options import parse_options
from localvit.surgery.projection import CHILD
from localvit.utils.weight_files import CheckpointError, check_plain_arguments

_PLACE = ("revision", "cache_dir", "token", "subfolder", "local_files_only")
"""Arguments of `from_pretrained` that say where the configuration is."""


def from_pretrained(path: str | Path, model_class: type[nn.Module] | None = None, **kwargs: Any) -> Any:
    """Load a localized model of Hugging Face transformers that its `save_pretrained` has written.

    Args:
        path: the folder, or "user/name" on the Hugging Face Hub.
        model_class: a class of transformers. By default that of the saved model, such as ViTForImageClassification.
        kwargs: arguments of its `from_pretrained`, such as `dtype` or `device_map`. Code in the folder is never run.

    Returns:
        The model, in evaluation mode.

    Raises:
        ImportError: without transformers.
        CheckpointError: if the saved model was not localized, its options are damaged, or weights are missing,
            unexpected or of another shape. With `ignore_mismatched_sizes=True`, for a new head, only those of locality.
        OSError: as transformers raises it, if there is no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("from_pretrained needs transformers: pip install 'localvit[transformers]'") from error
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code=True would run code of the folder: load such a model with transformers")
    where = {key: kwargs[key] for key in _PLACE if key in kwargs}
    config = kwargs.get("config") or transformers.AutoConfig.from_pretrained(path, **where)
    options = _options(path, getattr(config, ENTRY, None))
    model_class = model_class or _saved_class(path, config)

    def __init__(self: Any, *args: Any, **arguments: Any) -> None:
        model_class.__init__(self, *args, **arguments)
        localize_with_options(self, options, inplace=True)

    names = {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    localized: Any = type(model_class.__name__, (model_class,), names)  # `save_pretrained` writes the class's name
    new_head = kwargs.pop("ignore_mismatched_sizes", False)
    arguments = kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, loading = localized.from_pretrained(path, **arguments)
    _check_loaded(path, model_class, loading, new_head=new_head)
    for module in model.modules():
        if isinstance(module, LocalityAdapter):
            module.never_initialized = False
    if options.get("trainable") == "locality":  # transformers has put other parameters in the place of frozen ones
        freeze_others(model)
    return model


def _check_loaded(path: str | Path, model_class: Any, loading: Mapping[str, Any], *, new_head: bool) -> None:
    """Raise CheckpointError for keys of transformers' report; only for those of locality with a new head."""
    for kind, keys in loading.items():
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
        wrong = [name for name in names if not new_head or f".{CHILD}." in name]
        if wrong:
            raise CheckpointError(
                f"{path} does not fit {model_class.__name__} with locality: {len(wrong)} {kind.replace('_', ' ')}, "
                f"first {wrong[0]}"
            )


def _options(path: str | Path, entry: Any) -> dict[str, Any]:
    """The options of `localize` in a configuration. Raises CheckpointError if it has none, or not plain ones."""
    if entry is None:
        raise CheckpointError(f"{path} is not of a localized model: load it with transformers, then call localize")
    options = entry.get("localize") if isinstance(entry, dict) else None
    if not isinstance(options, dict):
        raise CheckpointError(f"{path} has a damaged config.json: {ENTRY!r} has no options of localize")
    check_plain_arguments(path, options)
    try:
        parse_options(options)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged config.json: {error}") from error
    return options


def _saved_class(path: str | Path, config: Any) -> Any:
    """The class of transformers that the configuration names. Raises CheckpointError if there is none."""
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"{path} names no class of transformers ({name!r}): pass model_class")
    return found
