"""Measure Tune mode together with other ways to save memory.

A training step of a ResNet-50 in Eval and in Tune mode, by itself and with
activation checkpointing, with bfloat16 and with torch.compile; and compiled
Eval with Inductor's own pass for such blocks. Bytes are counted, times are
taken in rounds, each combination once a round::

    python tests/benchmarks/combinations.py --json docs/en/combinations.json

``python docs/render.py`` then writes the table of docs/en/comparison.md.
"""
import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmdet.models.backbones import ResNet
from torch import Tensor

from mmtune import turn_on
from mmtune.analysis import peak_bytes, saved_bytes
from mmtune.analysis.machine import describe_commit, describe_machine
from mmtune.analysis.modes import randomize_new_norms
from mmtune.analysis.timing import interleaved_seconds, quartiles

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Combination:
    """A mode, and what goes with it.

    Attributes:
        mode (str): ``'Eval'`` or ``'Tune'``.
        other (str): What goes with it, one of :data:`OTHERS`.
    """

    mode: str
    other: str


OTHERS = ('nothing', 'checkpointing', 'bfloat16', 'compile')
COMBINATIONS = (
    *(Combination(mode, other) for other in OTHERS
      for mode in ('Eval', 'Tune')),
    Combination('Eval', "compile, Inductor's pass"),
)


class Step:
    """A model that takes training steps on noise.

    Args:
        combination (Combination): What to run.
        depth (int): Of the ResNet.
        image (tuple[int, int]): Height and width, in pixels.
    """

    def __init__(self, combination: Combination, depth: int,
                 image: tuple[int, int]) -> None:
        self.other = combination.other
        torch.manual_seed(0)
        self.model = ResNet(
            depth, norm_eval=True, with_cp=self.other == 'checkpointing')
        randomize_new_norms(self.model)
        self.model.train()
        if combination.mode == 'Tune':
            turn_on(self.model)
        self.images = torch.randn(2, 3, *image)
        self.call: Callable = self.model
        if self.compiles:
            # The two share code: without options of its own, the second
            # would run what was compiled for the first.
            own = {'efficient_conv_bn_eval_fx_passes': True}
            self.call = torch.compile(
                self.model,
                options=own if self.other.endswith('pass') else None)

    @property
    def compiles(self) -> bool:
        """Whether the step is compiled."""
        return self.other.startswith('compile')

    def forward(self) -> Tensor:
        """Run the model.

        Returns:
            Tensor: Something to send a gradient through.
        """
        with torch.autocast(
                'cpu', torch.bfloat16, enabled=self.other == 'bfloat16'):
            maps = self.call(self.images)
        return sum(one.float().square().mean() for one in maps)

    def __call__(self) -> None:
        """Take a step, but for the optimizer's part."""
        self.model.zero_grad()
        self.forward().backward()

    def kept(self) -> int:
        """Count the bytes that a forward keeps for backward."""
        with saved_bytes(self.model) as saved:
            loss = self.forward()
        total = saved.total
        loss.backward()
        return total

    def peak(self) -> int | None:
        """Count the most bytes that a step has alive at once.

        Returns:
            int | None: None for what is compiled: nobody sees its maps.
        """
        if self.compiles:
            return None
        with peak_bytes() as memory:
            self()
        return memory.peak


def measure(depth: int, image: tuple[int, int], rounds: int,
            combinations: Sequence[Combination] = COMBINATIONS) -> list[dict]:
    """Measure combinations, plain Eval among them.

    Args:
        depth (int): Of the ResNet.
        image (tuple[int, int]): Height and width, in pixels.
        rounds (int): How often to time each.
        combinations (Sequence[Combination]): Defaults to all.

    Returns:
        list[dict]: One for each: bytes, and the quartiles of its time as a
        share of plain Eval's in the same round.
    """
    steps = {c: Step(c, depth, image) for c in combinations}
    bytes_of = {c: (step.kept(), step.peak()) for c, step in steps.items()}
    stock = Combination('Eval', 'nothing')
    times = list(interleaved_seconds(steps, rounds))
    return [
        dict(
            mode=c.mode,
            other=c.other,
            kept=bytes_of[c][0],
            peak=bytes_of[c][1],
            time=quartiles(t[c] / t[stock] for t in times))
        for c in combinations
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--json', type=Path, required=True, metavar='FILE')
    parser.add_argument('--depth', type=int, default=50)
    parser.add_argument('--image', type=int, nargs=2, default=(320, 320),
                        metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args(arguments)
    rows = measure(args.depth, tuple(args.image), args.rounds)
    found = dict(
        command='python tests/benchmarks/combinations.py --json '
        'docs/en/combinations.json',
        **describe_machine(),
        threads=torch.get_num_threads(),
        commit=describe_commit(ROOT),
        found=dict(depth=args.depth, image=args.image, rounds=args.rounds,
                   rows=rows))
    args.json.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
