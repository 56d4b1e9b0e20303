"""Whether torch.export traces."""

import torch


def is_exporting() -> bool:
    """Whether torch.export traces without torch.compile's tracer, as it does by default.

    Inside of that tracer, torch before 2.14 answers `torch.compiler.is_exporting` with yes for torch.compile, too.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
