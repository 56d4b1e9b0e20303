"""How fast is each LocalViT compared with its baseline, and with a straightforward implementation of itself?

    python benchmarks/families_speed.py [--families T S PVT TNT Swin T2T] [--batch-size 16] [--rounds 9]
        [--dtype float32] [--train] [--compile] [--json FILE]

For each family, four models run in turn, round by round, in one process on the CPU: the LocalViT fused by
`localvit.fuse`, its baseline as it is and fused, and the LocalViT in the implementation of
`benchmarks/straightforward.py`. With `--train`, training steps (forward, cross entropy, backward, AdamW) are measured
instead, of models that are not fused.
Weights and images are random. Ratios are the speed of the LocalViT relative to the other model, taken within rounds:
medians, with quartiles in parentheses. As in the `localvit` commands, the C library keeps freed memory. torch uses all
cores unless OMP_NUM_THREADS limits them.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from straightforward import straightforward

from localvit.bench.measure import time_rounds
from localvit.bench.prepare import BenchModel, BenchOptions, prepare
from localvit.bench.result import Quartiles
from localvit.checkpoints import versions
from localvit_cli.allocator import keep_freed_memory

FAMILIES = {
    "T": ("localvit_tiny_mlp4_act3_r192", "deit_tiny_patch16_224"),
    "S": ("localvit_small_mlp4_act3_r384", "deit_small_patch16_224"),
    "PVT": ("localvit_pvt_tiny", "pvt_tiny"),
    "TNT": ("localvit_tnt_t_patch16_224", "tnt_t_patch16_224"),
    "Swin": ("localvit_swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
    "T2T": ("localvit_T2t_conv7", "T2t_vit_7"),
}
"""The published LocalViT and its baseline, from timm or this package."""

WARM_UP_CALLS = 3


def prepare_straightforward(name: str, options: BenchOptions) -> BenchModel:
    """Like `prepare`, for the straightforward implementation of the model."""
    model = prepare(name, replace(options, fuse=False, compile=False))
    module: Any = straightforward(model.module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True) if options.train else None
    module = torch.compile(module, dynamic=False) if options.compile else module
    return replace(model, module=module, optimizer=optimizer)


def measure_family(family: str, options: BenchOptions) -> dict[str, Any]:
    """Images per second of each model of a family, and the speed of the LocalViT relative to each other model."""
    torch._dynamo.reset()  # torch.compile keeps the code of only a few models per class
    name, baseline = FAMILIES[family]
    models = {"localvit": prepare(name, options), "baseline": prepare(baseline, replace(options, fuse=False))}
    if not options.train:
        models["fused baseline"] = prepare(baseline, options)
    models["straightforward"] = prepare_straightforward(name, options)
    (batch_size,) = options.batch_sizes
    calls = {label: model.call(batch_size) for label, model in models.items()}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for call in calls.values():
            for _ in range(WARM_UP_CALLS):
                call()
        seconds = time_rounds(calls, dict.fromkeys(calls, 1), options, lambda rounds: None)
    own = seconds["localvit"]
    return {
        "localvit": name,
        "baseline": baseline,
        "images_per_second": {label: Quartiles.of([batch_size / each for each in seconds[label]]) for label in seconds},
        "speed_over": {
            label: Quartiles.of([each / mine for each, mine in zip(seconds[label], own, strict=True)])
            for label in seconds
            if label != "localvit"
        },
    }


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9, help="at least 3")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--train", action="store_true", help="training steps; in half precision under autocast")
    parser.add_argument("--compile", action="store_true", help="compile every model")
    parser.add_argument("--json", type=Path, help="write medians and quartiles to this file")
    args = parser.parse_args()
    keep_freed_memory()
    options = BenchOptions(
        device=torch.device("cpu"),
        dtype=getattr(torch, args.dtype),
        train=args.train,
        batch_sizes=(args.batch_size,),
        rounds=args.rounds,
        compile=args.compile,
    )
    about = {name: value for name, value in vars(args).items() if name not in ("json", "families")}
    about |= {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    about |= {"versions": versions()}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    others = ["baseline", *([] if args.train else ["fused baseline"]), "straightforward"]
    print(f"| family | images/s | {' | '.join(f'over {other}' for other in others)} |\n|---|---|{'---|' * len(others)}")
    measured = {}
    for family in args.families:
        measured[family] = result = measure_family(family, options)
        cells = [f"{result['images_per_second']['localvit'].median:.1f}"]
        for other in others:
            ratio = result["speed_over"][other]
            cells.append(f"{ratio.median:.2f} ({ratio.first_quartile:.2f} to {ratio.third_quartile:.2f})")
        print(f"| LocalViT-{family} | {' | '.join(cells)} |", flush=True)
    if args.json:
        plain = {"about": about, "families": measured}
        args.json.write_text(json.dumps(plain, default=asdict, indent=1) + "\n")


if __name__ == "__main__":
    main()
