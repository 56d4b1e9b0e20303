"""Do the patches that an explanation shows matter? Hide them, and compare with hiding random ones.

The patches of highest value get the mean color, which is 0 after normalization. The probability of the predicted class
falls; the table has the mean fall, and the paired t of its difference to that of random patches.

    python benchmarks/explanations.py --data-path cifar10/val --limit 500
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from localvit import fuse, load_model
from localvit.data.folders import PathImages
from localvit.explanations import attention_maps, grad_cam, layers_of, rollout
from localvit.explanations.explain import received
from localvit.inference.runner import InferenceOptions, Runner

RANDOM_REPEATS = 8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="localvit_nano_patch4_32", help="a name or a checkpoint")
    parser.add_argument("--data-path", type=Path, required=True, help="folder of images")
    parser.add_argument("--limit", type=int, default=500, help="number of images, at equal steps through the folder")
    parser.add_argument("--hidden", type=float, nargs="+", default=[0.125, 0.25, 0.375], help="parts of the patches")
    arguments = parser.parse_args()

    loaded = load_model(arguments.model)
    images = PathImages([arguments.data_path])
    step = max(1, len(images) // arguments.limit)
    indices = range(0, len(images), step)[: arguments.limit]
    runner = Runner.of(loaded, options=InferenceOptions(device=torch.device("cpu"), fuse=False))
    images_BCHW = torch.cat([batch for _, batch, _ in runner.load_batches(images, indices) if batch is not None])
    model, read = loaded.model, layers_of(loaded.model).num_tokens_read
    parts = images_BCHW.split(50)
    scores = {
        "class activation map": torch.cat([grad_cam(model, part).map_BHW for part in parts]),
        "attention of the last layer": torch.cat([received(attention_maps(model, part)[-1], read) for part in parts]),
        "rollout": torch.cat([rollout(model, part) for part in parts]),
    }
    fused = fuse(model)
    print(f"{loaded.name}, {len(images_BCHW)} images\n")
    print("| hidden | by | fall of the probability | random patches | lowest patches | paired t to random |")
    print("|---|---|---|---|---|---|")
    for share in arguments.hidden:
        generator = torch.Generator().manual_seed(0)

        def fall(score_BHW: Tensor, share: float = share) -> Tensor:
            return fall_of_probability(fused, images_BCHW, score_BHW, share)

        random_B = mean_of(lambda: fall(torch.rand(scores["rollout"].shape, generator=generator)))  # noqa: B023
        for name, score_BHW in scores.items():
            highest_B, lowest_B = fall(score_BHW), fall(-score_BHW)
            difference_B = highest_B - random_B
            t = difference_B.mean() / difference_B.std() * len(difference_B) ** 0.5
            numbers = " | ".join(f"{100 * each.mean():.1f}" for each in (highest_B, random_B, lowest_B))
            print(f"| {100 * share:.1f} % | {name} | {numbers} | {t:.1f} |", flush=True)


def mean_of(draw: Callable[[], Tensor]) -> Tensor:
    """The mean of several random draws."""
    return torch.stack([draw() for _ in range(RANDOM_REPEATS)]).mean(0)


@torch.inference_mode()
def fall_of_probability(model: nn.Module, images_BCHW: Tensor, score_BHW: Tensor, share: float) -> Tensor:
    """By how much (B) the predicted class's probability falls when a share of the patches, the highest, is hidden."""
    rows, columns = (images_BCHW.shape[2] // score_BHW.shape[1], images_BCHW.shape[3] // score_BHW.shape[2])
    order_BN = score_BHW.flatten(1).argsort(dim=1, descending=True)
    hidden_BN = order_BN[:, : round(share * order_BN.shape[1])]
    kept_BHW = torch.ones_like(score_BHW).flatten(1).scatter(1, hidden_BN, 0).view_as(score_BHW)
    kept_B1HW = kept_BHW.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, None]
    before = torch.cat([model(part).softmax(1) for part in images_BCHW.split(50)])
    after = torch.cat([model(part).softmax(1) for part in (images_BCHW * kept_B1HW).split(50)])
    return (before - after).gather(1, before.argmax(1, keepdim=True))[:, 0]


if __name__ == "__main__":
    main()
