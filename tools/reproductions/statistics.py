"""Tune follows Eval when the statistics of BatchNorms jump."""
import copy
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import mmcv
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune.api import latest_runs
from reproductions.material import (
    digits,
    fetch_trees,
    pretrained_classifier,
    put_in_folding_mode,
)
from reproductions.pages import paragraph, table, track

TITLE = 'Unstable statistics'
OF_PAPER = 'left open'
QUESTION = paragraph("""
    Eval and Tune take the statistics of BatchNorm as given. What if they
    change in the middle of a run: re-estimated on new data, moved by a while
    in train mode, taken from another domain, or so that a scale is near zero
    or a variance is? The paper folds anew at every step, and so Tune should
    follow Eval at every step, whatever happens to the statistics.
    """)

# How many of MobileNetV2's seven stages the network has.
STAGES = 4
# Its blocks whose gamma, or variance, is made small.
SMALL_GAMMA = 'backbone.layer3.1.linear_conv.bn'
SMALL_VAR = 'backbone.layer4.2.depthwise_conv.bn'
RUNS = {
    'Eval': 'Eval',
    'Tune': 'Tune',
    # Knows how far apart two runs get by rounding alone.
    'Eval, shuffled': 'Eval',
    'Tune, same point': 'Tune',
    'Deploy': 'Deploy'
}
ONE_STEP = 'Tune, same point'
DTYPES = ('float64', 'float32')
# What float64 has to agree to at the same point, as in docs/en/method.md.
TOLERANCE = 1e-10
# A relative error that float32 does not make by rounding alone.
LARGE = 1e-4


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a model; in Deploy mode it has none."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def set_training(model: nn.Module, training: bool) -> None:
    for norm in norms(model):
        norm.train(training)


@torch.no_grad()
def reestimate(model: nn.Module, images: Sequence[Tensor]) -> None:
    """Take the statistics from batches, each with the same weight."""
    for norm in norms(model):
        norm.reset_running_stats()
        norm.momentum = None
    set_training(model, True)
    for batch in images:
        model(batch, None)
    set_training(model, False)
    for norm in norms(model):
        norm.momentum = 0.1


@torch.no_grad()
def shrink_gamma(model: nn.Module) -> None:
    """Half of a block's channels get a gamma of 0, the others 1e-8."""
    for name, norm in model.named_modules():
        if name == SMALL_GAMMA and isinstance(norm, _BatchNorm):
            norm.weight.fill_(1e-8)[::2] = 0


@torch.no_grad()
def shrink_var(model: nn.Module) -> None:
    """A block's variances become 0, where rstd is 316."""
    for name, norm in model.named_modules():
        if name == SMALL_VAR and isinstance(norm, _BatchNorm):
            norm.running_var.zero_()


class Material:
    """Batches of digits to learn, and of trees.

    Args:
        size (int): Height and width in pixels.
        batch_size (int): Images of a batch.
        batches (int): How many of digits; they are used in turn.
    """

    def __init__(self, size: int, batch_size: int, batches: int) -> None:
        images, labels = digits(size, batch_size * batches)
        self.batches = list(
            zip(images.split(batch_size), labels.split(batch_size)))
        self.digits = [images for images, _ in self.batches[:4]]
        files = sorted(Path('data/trees/train').glob('*.png'))
        trees = torch.stack([
            torch.tensor(mmcv.imread(file, channel_order='rgb'))
            .permute(2, 0, 1).float() for file in files[:4 * batch_size]
        ])
        trees = F.interpolate(trees, (size, size), mode='area')
        trees -= trees.mean((0, 2, 3), keepdim=True)
        trees /= trees.std((0, 2, 3), keepdim=True)
        self.trees = trees.split(batch_size)


def events(material: Material) -> dict[str, Callable]:
    """What happens to a model, in this order."""

    def on(images: Sequence[Tensor]) -> Callable:

        def event(model: nn.Module) -> None:
            dtype = model.head.weight.dtype
            reestimate(model, [batch.to(dtype) for batch in images])

        return event

    return {
        're-estimated on the digits': on(material.digits),
        'train mode: moved by momentum': lambda m: set_training(m, True),
        'eval mode again': lambda m: set_training(m, False),
        'from another domain, the trees': on(material.trees),
        're-estimated again': on(material.digits),
        'a gamma of 0 or 1e-8': shrink_gamma,
        'a variance of 0': shrink_var
    }


class Learner:
    """A model that is trained step by step.

    Args:
        start (nn.Module): Stock.
        mode (str): To put a copy of it into.
        dtype (torch.dtype): Of everything.
    """

    def __init__(self, start: nn.Module, mode: str,
                 dtype: torch.dtype) -> None:
        self.model = copy.deepcopy(start).to(dtype)
        put_in_folding_mode(self.model, mode)
        self.dtype = dtype
        # Adam divides a gradient by its size: with a smaller eps, those that
        # are zero but for rounding would move parameters at random.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, eps=1e-5)

    def look(self, images: Tensor, labels: Tensor) -> tuple[float, dict]:
        """Give the loss and the gradients of the point where it is."""
        self.optimizer.zero_grad()
        loss = self.model(images.to(self.dtype), labels, mode='loss')['loss']
        loss.backward()
        return loss.item(), {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def step(self) -> None:
        """Learn from where it looked last."""
        self.optimizer.step()

    def go_to(self, other: 'Learner') -> None:
        """Take over the point where another is."""
        self.model.load_state_dict(other.model.state_dict())
        for own, norm in zip(norms(self.model), norms(other.model)):
            own.train(norm.training)


def worst(gradients: dict[str, Tensor], stock: dict[str, Tensor]) -> float:
    """The largest difference among the gradients of all parameters.

    Relative to the largest of the same convolution and BatchNorm: where
    another BatchNorm in train mode follows, that of a bias is zero but for
    rounding.
    """
    errors: dict[str, list[float]] = {}
    norms: dict[str, list[float]] = {}
    for name, value in stock.items():
        block = name.rsplit('.', 2)[0]
        error = gradients[name].double() - value.double()
        errors.setdefault(block, []).append(error.norm().item())
        norms.setdefault(block, []).append(value.norm().item())
    return max(max(errors[block]) / max(norms[block]) for block in norms)


def run(interval: int = 14,
        size: int = 48,
        batch_size: int = 8,
        dtypes: Sequence[str] = DTYPES) -> dict:
    """Train in all modes side by side while statistics jump.

    Args:
        interval (int): Steps from one event to the next.
        size (int): Height and width of the images in pixels.
        batch_size (int): Images of a step.
        dtypes (Sequence[str]): Names of types.

    Returns:
        dict: ``events`` by step; ``runs`` by dtype and run, with curves of
        ``loss``, ``loss_difference``, ``difference`` and ``error``; ``ran``,
        how many blocks of Tune ran how in each step; ``smooth``, errors of a
        network without ReLU6.
    """
    fetch_trees()
    start = truncated()
    material = Material(size, batch_size, 24)
    happenings = events(material)
    schedule = {
        interval * (i + 1): name for i, name in enumerate(happenings)
    }
    steps = interval * (len(happenings) + 1)
    found: dict = dict(
        size=size,
        batch_size=batch_size,
        blocks=len(norms(start)),
        interval=interval,
        steps=steps,
        events=schedule,
        runs={})
    batches = list(itertools.islice(itertools.cycle(material.batches), steps))
    for dtype in dtypes:
        learners = {
            name: Learner(start, mode, getattr(torch, dtype))
            for name, mode in RUNS.items()
        }
        exact = (learners['Eval'] if dtype == 'float64' else Learner(
            start, 'Eval', torch.float64))
        curves: dict[str, dict] = {
            name: dict(loss=[], loss_difference=[], difference=[], error=[])
            for name in RUNS
        }
        ran = []
        for step, batch in enumerate(
                track(batches, f'Train side by side in {dtype}')):
            if step in schedule:
                for learner in learners.values():
                    happenings[schedule[step]](learner.model)
            take_step(learners, exact, batch, curves)
            ran.append(Counter(latest_runs(learners['Tune'].model).values()))
        found['runs'][dtype] = curves
        found['ran'] = ran
    found['smooth'] = smooth_errors(start, material, 2 * interval)
    return found


def take_step(learners: dict[str, Learner], exact: Learner,
              batch: tuple[Tensor, Tensor], curves: dict[str, dict]) -> None:
    """Take a step in every run, and note how far each is from Eval.

    Args:
        learners (dict[str, Learner]): By the keys of :data:`RUNS`.
        exact (Learner): Eval in float64; may be one of the learners.
        batch (tuple[Tensor, Tensor]): Images and labels.
        curves (dict[str, dict]): What is known of each run goes there.
    """
    images, labels = batch
    learners[ONE_STEP].go_to(learners['Eval'])
    looks = {}
    for name, learner in learners.items():
        order = torch.arange(len(labels))
        if name == 'Eval, shuffled':
            order = order.flip(0)
        looks[name] = learner.look(images[order], labels[order])
    stock_loss, stock = looks['Eval']
    truth = stock
    if exact is not learners['Eval']:
        exact.go_to(learners['Eval'])
        truth = exact.look(images, labels)[1]
    for name, (loss, gradients) in looks.items():
        curve = curves[name]
        curve['loss'].append(loss if math.isfinite(loss) else None)
        curve['loss_difference'].append(abs(loss / stock_loss - 1))
        if name != 'Deploy':
            curve['difference'].append(worst(gradients, stock))
        if name in ('Eval', ONE_STEP):
            curve['error'].append(worst(gradients, truth))
        learners[name].step()


def smooth_errors(start: nn.Module, material: Material,
                  steps: int) -> dict[str, list[float]]:
    """Errors of steps in float32 where nothing bends.

    Args:
        start (nn.Module): The network; a copy gets SiLU for ReLU6.
        material (Material): Its batches.
        steps (int): How many.

    Returns:
        dict[str, list[float]]: As ``error`` of :func:`run`, of Eval and Tune.
    """
    start = copy.deepcopy(start)
    for module in list(start.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.SiLU())
    exact = Learner(start, 'Eval', torch.float64)
    learners = {mode: Learner(start, mode, torch.float32)
                for mode in ('Eval', 'Tune')}
    reestimate(learners['Eval'].model, material.digits)
    errors: dict[str, list[float]] = {mode: [] for mode in learners}
    batches = list(itertools.islice(itertools.cycle(material.batches), steps))
    for batch in track(batches, 'Train without ReLU6'):
        for follower in (exact, learners['Tune']):
            follower.go_to(learners['Eval'])
        truth = exact.look(*batch)[1]
        for mode, learner in learners.items():
            errors[mode].append(worst(learner.look(*batch)[1], truth))
        learners['Eval'].step()
    return errors


def truncated() -> nn.Module:
    """A classifier with the first stages of MobileNetV2."""
    model = pretrained_classifier()
    backbone = model.backbone
    for name in backbone.layers[STAGES:]:
        delattr(backbone, name)
    del backbone.layers[STAGES:]
    backbone.out_indices = (STAGES - 1, )
    last = getattr(backbone, backbone.layers[-1])[-1]
    model.head = nn.Linear(last.linear_conv.conv.out_channels, 10)
    return model


# ----------------------------------------------------------------------------
# Page
# ----------------------------------------------------------------------------


def spans(found: dict) -> dict[str, slice]:
    """The steps after each event, until the next."""
    begins = [0, *map(int, found['events']), found['steps']]
    names = ["ImageNet's statistics", *found['events'].values()]
    return {
        name: slice(begin, end)
        for name, begin, end in zip(names, begins, begins[1:])
    }


def answer(found: dict) -> str:
    """Say in a sentence what came out."""
    exact = max(found['runs']['float64'][ONE_STEP]['error'])
    return (f'From the same point no gradient of Tune is more than {exact:.0e}'
            f" from Eval's in float64 in any of {found['steps']} steps, "
            f'through {len(found["events"])} jumps of the statistics.')


def page(found: dict) -> str:
    """Write the page."""
    parts = [
        paragraph(f"""
        MobileNetV2 with ImageNet weights, its first {STAGES} stages
        ({found["blocks"]} BatchNorms), and a linear layer learn handwritten
        digits, {found["size"]} x {found["size"]} pixels, batch
        {found["batch_size"]}, for {found["steps"]} steps of AdamW. Every
        {found["interval"]} steps the statistics or scales of each model
        change, by the same code, from its own weights. The models start alike
        and each then goes its own way:
        """),
        table(['run', 'what it is'], [
            ['Eval', 'stock'],
            ['Tune', 'folded anew at every step'],
            ['Eval, shuffled', 'Eval with the images of each batch in another '
             'order, which changes nothing but rounding'],
            ['Tune, same point', 'Tune, set to where Eval is before every '
             'step: what one step rounds'],
            ['Deploy', 'folded once before the first step']]),
        paragraph("""
        A difference is that from Eval's at the same step: of the loss,
        divided by the loss; of the gradient of each parameter, its norm
        divided by the largest of its block, of which the largest counts. Tune
        folds however small a map is; as it comes it would run maps as small
        as these as stock, where there is nothing to test.
        """)
    ]
    for dtype, curves in found['runs'].items():
        parts += [
            f'## {dtype}',
            table([
                'after', 'loss, Eval', 'loss, Tune', 'loss: Tune from Eval',
                'shuffled from Eval', 'gradients: Tune from Eval',
                'shuffled from Eval', 'one step: Eval', 'one step: Tune'
            ], [
                row_of_event(name, steps, curves)
                for name, steps in spans(found).items()
            ]),
            paragraph(verdict(dtype, curves))
        ]
    bent = found['runs']['float32']['Eval']['error']
    parts.append(paragraph(verdict_on_bends(found['smooth'], bent)))
    parts.append(
        paragraph("""
        The losses are means over the steps after that event and before the
        next, the differences the largest. The last two columns are medians:
        how far the gradients of a step are from those of Eval in float64 at
        the same point.
        """))
    parts.append(paragraph(how_it_ran(found)))
    parts += ['## Deploy', paragraph(verdict_on_deploy(found))]
    parts += [
        '## Not run here',
        paragraph("""
        Distributed training, where statistics may jump in one process alone:
        there Eval goes wrong in the same way. Long runs.
        """)
    ]
    return '\n\n'.join(parts)


def row_of_event(name: str, steps: slice, curves: dict) -> list[str]:
    """Sum up the steps after an event."""
    row = [name]
    row += [loss_text(curves[run]['loss'][steps]) for run in ('Eval', 'Tune')]
    row += [
        f'{max(curves[run][key][steps]):.1e}'
        for key in ('loss_difference', 'difference')
        for run in ('Tune', 'Eval, shuffled')
    ]
    row += [
        f'{statistics.median(curves[run]["error"][steps]):.1e}'
        for run in ('Eval', ONE_STEP)
    ]
    return row


def loss_text(losses: Sequence[float | None]) -> str:
    value = mean_loss(losses)
    return 'not finite' if value is None else f'{value:.3f}'


def mean_loss(losses: Sequence[float | None]) -> float | None:
    return None if None in losses else statistics.fmean(losses)


def verdict(dtype: str, curves: dict) -> str:
    """Say whether Tune follows Eval."""
    stock, tune = (curves[run]['error'] for run in ('Eval', ONE_STEP))
    own, control = (
        max(curves[run]['loss_difference'])
        for run in ('Tune', 'Eval, shuffled'))
    if dtype == 'float64':
        text = f"""From the same point no gradient of Tune's is more than
            {max(tune):.1e} from Eval's in any of {len(tune)} steps, """
        text += (f'within the {TOLERANCE:g} that is promised.'
                 if max(tune) <= TOLERANCE else
                 f'more than the {TOLERANCE:g} that is promised.')
    else:
        text = f"""From the same point the gradients of Eval are
            {statistics.median(stock):.1e} from those in float64 in the median
            step and {max(stock):.1e} in the worst, those of Tune
            {statistics.median(tune):.1e} and {max(tune):.1e}; more than
            {LARGE:g} in {sum(error > LARGE for error in stock)} of
            {len(stock)} steps and in {sum(error > LARGE for error in tune)}.
            """
    text += f""" By their own steps the losses of Tune and Eval come to differ
        by up to {own:.1e} of Eval's, those of Eval with shuffled batches by up
        to {control:.1e}: """
    if own <= 10 * control:
        return text + """Tune stays as near to Eval as Eval does to itself, in
            order of magnitude."""
    return text + 'Tune moves away from Eval faster than Eval from itself.'


def verdict_on_bends(smooth: dict, bent: Sequence[float]) -> str:
    """Say whether large errors in float32 come from ReLU6."""
    steps = len(smooth['Eval'])
    large = {mode: sum(error > LARGE for error in errors)
             for mode, errors in smooth.items()}
    text = f"""The same network with SiLU in place of ReLU6, in float32, from
        the same point, for {steps} steps after re-estimating the statistics,
        without jumps: errors above {LARGE:g} in {large["Eval"]} steps of Eval
        and {large["Tune"]} of Tune; the largest are {max(smooth["Eval"]):.1e}
        and {max(smooth["Tune"]):.1e}. With ReLU6 Eval has such errors in
        {sum(error > LARGE for error in bent[:steps])} of its first {steps}
        steps. """
    if not any(large.values()):
        return text + """So errors as large as that are made where a ReLU6
            bends: a value next to that point gets a gradient or none, as it is
            rounded, in Eval as in Tune."""
    return text + 'So ReLU6 alone does not explain errors as large as that.'


def how_it_ran(found: dict) -> str:
    runs = Counter()
    for step in found['ran']:
        runs.update({tuple(sorted(step.items())): 1})
    listed = '; '.join(
        f'in {count} steps ' + ', '.join(
            f'{blocks} blocks "{kind}"' for kind, blocks in key)
        for key, count in runs.items())
    return f"""How Tune ran its blocks: {listed}. In train mode it runs the
        stock modules, and it folds again as soon as they are back in eval
        mode, without being told."""


def verdict_on_deploy(found: dict) -> str:
    """Say how far Deploy is from Eval."""
    curves = list(found['runs'].values())[-1]
    ratios = {}
    for name, steps in spans(found).items():
        stock, deploy = (mean_loss(curves[run]['loss'][steps])
                         for run in ('Eval', 'Deploy'))
        if stock is not None and deploy is not None:
            ratios[name] = deploy / stock
    text = """Deploy has no statistics left after the fold, so none of these
        changes reaches it: no BatchNorm to re-estimate, to put into train
        mode or to load another domain's statistics into. It learns on as if
        nothing had happened, and by other steps than Eval from the first on
        ([deploy.md](../deploy.md)): it is not the run that Eval makes. """
    if not ratios:
        return text + 'In no stretch are the losses of both finite.'
    low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    below = sum(ratio < 1 for ratio in ratios.values())
    return text + f"""Its mean loss is below Eval's in {below} of
        {len(ratios)} stretches: {ratios[low]:.2g} times Eval's after "{low}"
        and {ratios[high]:.2g} times after "{high}"."""


def plot(found: dict, path: Path) -> None:
    """Plot the losses, and the differences below, a column for each dtype."""
    figure = Figure(figsize=(8, 7), layout='constrained')
    grid = figure.subplots(
        2, len(found['runs']), sharex=True, sharey='row', squeeze=False)
    styles = {
        'Eval': ('tab:blue', '-', 1),
        'Tune': ('tab:green', '--', 1.5),
        'Eval, shuffled': ('tab:gray', '-', 1),
        'Tune, same point': ('tab:olive', ':', 1.5),
        'Deploy': ('tab:red', '-', .8)
    }
    for column, (dtype, curves) in enumerate(found['runs'].items()):
        top, bottom = grid[:, column]
        for name, (color, line, width) in styles.items():
            style = dict(
                color=color, linestyle=line, linewidth=width, label=name)
            if name in ('Eval', 'Tune', 'Deploy'):
                top.semilogy([math.nan if v is None else v
                              for v in curves[name]['loss']], **style)
            key = 'error' if name == ONE_STEP else 'difference'
            if name not in ('Eval', 'Deploy'):
                bottom.semilogy(
                    [value or math.nan for value in curves[name][key]],
                    **style)
        for number, step in enumerate(map(int, found['events']), 1):
            for axes in (top, bottom):
                axes.axvline(step, color='black', linewidth=.5, alpha=.5)
            top.annotate(
                str(number), (step, 1), xycoords=('data', 'axes fraction'),
                xytext=(2, -10), textcoords='offset points', fontsize=8)
        top.set(title=dtype)
        bottom.set(xlabel='step')
    grid[0, 0].set(ylabel='loss')
    grid[1, 0].set(ylabel='largest relative difference of a gradient')
    handles = dict(
        zip(*reversed(grid[0, 0].get_legend_handles_labels())))
    handles.update(zip(*reversed(grid[1, 0].get_legend_handles_labels())))
    figure.legend(
        handles.values(), handles, loc='outside lower left', ncols=2)
    figure.text(
        1,
        0,
        '\n'.join(f'{i}: {name}'
                  for i, name in enumerate(found['events'].values(), 1)),
        ha='right',
        va='bottom',
        fontsize=7)
    figure.savefig(path, dpi=120)
