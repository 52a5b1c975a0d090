"""Adversarial examples: the gradient goes to the image, nothing is learned."""
import copy
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from demo import CONFIGS
from matplotlib.figure import Figure
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.nn import functional as F

from mmtune.analysis.steps import Step
from mmtune.analysis.timing import interleaved_seconds, quartiles
from mmtune.analysis.workloads import Workload
from mmtune.api import latest_runs
from reproductions.material import (
    digits,
    fetch_trees,
    fetch_weights,
    pretrained_classifier,
    put_in_paper_mode,
)
from reproductions.page import (
    MIB,
    Page,
    drawing,
    mib,
    sheet,
    span,
    table,
    track,
)

MODES = ('Eval', 'MMEngine', 'Tune', 'Deploy')
# What is attacked in float64 too.
EXACT_MODES = ('Eval', 'Tune')
# In units of normalized images: about 4 of the 255 levels of a pixel.
RADIUS = .07
STEP_SIZE = RADIUS / 4
# A detection counts from this score and this overlap on.
MIN_SCORE, MIN_OVERLAP = .3, .5
# What is a success of each target.
SUCCESS = dict(classifier='digits recognised', detector='trees found')


@dataclass
class Target:
    """A model that works, images, and what it is asked.

    Attributes:
        model (nn.Module): Stock, on the way to be put into modes.
        images (Tensor): Normalized.
        loss (Callable): Of a model and images, a scalar to be increased.
        success (Callable): Of a model and images, the share that is right.
    """

    model: nn.Module
    images: Tensor
    loss: Callable[[nn.Module, Tensor], Tensor]
    success: Callable[[nn.Module, Tensor], float]

    def variant(self, mode: str, dtype: torch.dtype) -> nn.Module:
        """A copy in a mode whose parameters do not learn."""
        model = copy.deepcopy(self.model).to(dtype)
        put_in_paper_mode(model, mode, ['backbone'])
        return model.requires_grad_(False)


def classifier(size: int, batch_size: int, train_size: int) -> Target:
    """Fit a linear layer to what MobileNetV2 says of digits.

    Args:
        size (int): Height and width of the images in pixels.
        batch_size (int): How many to attack.
        train_size (int): How many to fit the layer to.

    Returns:
        Target: Its images are others than those of the fit.
    """
    model = pretrained_classifier().eval()
    images, labels = digits(size, train_size)
    with torch.no_grad():
        features = torch.cat([
            model.backbone(batch)[0].mean((2, 3))
            for batch in track(images.split(16), 'Look at digits')
        ])
    optimizer = torch.optim.LBFGS(
        model.head.parameters(), max_iter=100, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.head(features), labels)
        # Weight decay; without it there would be no minimum.
        loss = loss + 1e-3 * model.head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    images, labels = digits(size, batch_size, 'test')

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        return model(images, labels, mode='loss')['loss']

    def success(model: nn.Module, images: Tensor) -> float:
        return sum(model(images, labels, mode='predict')) / len(labels)

    return Target(model, images.contiguous(), loss, success)


def detector(batches: int, iterations: int, batch_size: int) -> Target:
    """Train neck and head of the trees' RetinaNet on a fixed backbone.

    The maps of the backbone are computed once for each image.

    Args:
        batches (int): How many batches of images to train on.
        iterations (int): Steps of training.
        batch_size (int): How many validation images to attack.

    Returns:
        Target: The detector.
    """
    weights = fetch_weights()
    fetch_trees()
    config = Config.fromfile(CONFIGS / 'retinanet_mobilenet-v2_fpn_250i_trees'
                             '.py')
    init_default_scope('mmdet')
    # Of the head's weights, and of how images are flipped.
    set_random_seed(0)
    config.model.backbone.init_cfg.checkpoint = weights
    model = MODELS.build(config.model)
    model.init_weights()
    put_in_paper_mode(model, 'Eval', ['backbone'])
    train(model, config, batches, iterations)

    loader = config.val_dataloader.to_dict()
    loader.update(
        num_workers=0, persistent_workers=False, batch_size=batch_size)
    data = model.data_preprocessor(next(iter(Runner.build_dataloader(loader))))
    samples = data['data_samples']

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        losses = model(images, samples, mode='loss')
        return model.parse_losses(losses)[0]

    def success(model: nn.Module, images: Tensor) -> float:
        model.eval()
        # It writes its predictions into the samples.
        found = model.predict(
            images, copy.deepcopy(samples), rescale=False)
        model.train()
        hits = torch.cat([hit(sample) for sample in found])
        return float(hits.double().mean())

    return Target(model, data['inputs'], loss, success)


def train(model: nn.Module, config: Config, batches: int,
          iterations: int) -> None:
    """Train all of a detector but its backbone."""
    loader = config.train_dataloader.to_dict()
    loader.update(num_workers=0, persistent_workers=False)
    batches_of_data = itertools.islice(
        Runner.build_dataloader(loader, seed=0), batches)
    seen = []
    with torch.no_grad():
        for batch in batches_of_data:
            data = model.data_preprocessor(batch, training=True)
            seen.append((model.backbone(data['inputs']), data['data_samples']))
    parameters = [*model.neck.parameters(), *model.bbox_head.parameters()]
    settings = config.optim_wrapper
    optimizer = torch.optim.AdamW(
        parameters, settings.optimizer.lr,
        weight_decay=settings.optimizer.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, iterations)
    for i in track(range(iterations), 'Train neck and head'):
        maps, samples = seen[i % len(seen)]
        losses = model.bbox_head.loss(model.neck(maps), samples)
        optimizer.zero_grad()
        model.parse_losses(losses)[0].backward()
        nn.utils.clip_grad_norm_(parameters, **settings.clip_grad)
        optimizer.step()
        schedule.step()


def hit(sample) -> Tensor:
    """Which of the annotated objects of an image were found."""
    detections = sample.pred_instances
    boxes = detections.bboxes[detections.scores >= MIN_SCORE]
    truth = sample.gt_instances.bboxes
    overlaps = bbox_overlaps(truth.to(boxes), boxes)
    if not len(boxes):
        return torch.zeros(len(truth), dtype=torch.bool)
    return overlaps.amax(1) >= MIN_OVERLAP


# ----------------------------------------------------------------------------
# The attack
# ----------------------------------------------------------------------------


@dataclass
class Attack:
    """What projected gradient descent goes through.

    Attributes:
        images (list[Tensor]): At the start and after each step.
        losses (list[float]): The same.
        gradient (Tensor): Of the first step.
    """

    images: list[Tensor]
    losses: list[float]
    gradient: Tensor


def attack(target: Target, model: nn.Module, dtype: torch.dtype,
           steps: int) -> Attack:
    """Search for adversarial examples (PGD, L-infinity).

    Args:
        target (Target): Gives images and loss.
        model (nn.Module): In some mode.
        dtype (torch.dtype): Of model and images.
        steps (int): How many.

    Returns:
        Attack: From a random point of the ball, the same in every call.
    """
    center = target.images.to(dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(center.shape, generator=generator).to(dtype)
    images = center + RADIUS * (2 * noise - 1)
    path, losses, first = [images], [], None
    for _ in range(steps):
        images = images.detach().requires_grad_()
        loss = target.loss(model, images)
        gradient, = torch.autograd.grad(loss, images)
        losses.append(loss.item())
        first = gradient if first is None else first
        images = images.detach() + STEP_SIZE * gradient.sign()
        images = images.clamp(center - RADIUS, center + RADIUS)
        path.append(images)
    with torch.no_grad():
        losses.append(target.loss(model, images).item())
    return Attack(path, losses, first)


def differing(one: Attack, other: Attack) -> list[float]:
    """The share of values that differ after each step.

    Where a sign differs, the values are at least a step apart.
    """
    return [
        float(((a.double() - b.double()).abs() > STEP_SIZE / 2)
              .double().mean())
        for a, b in zip(one.images[1:], other.images[1:])
    ]


def compare(one: Attack, other: Attack) -> dict:
    """Compare an attack with another that should be the same."""
    flipped = one.gradient.sign() != other.gradient.sign()
    sizes = other.gradient.double().abs()
    sizes = (sizes[flipped] / sizes.median()).tolist() or [0.]
    return dict(
        differing=differing(one, other),
        flipped=int(flipped.sum()),
        # The gradients there, in units of the median of all.
        median_flipped=statistics.median(sizes),
        largest_flipped=max(sizes),
        loss_difference=max(
            abs(a / b - 1) for a, b in zip(one.losses, other.losses)))


def measure(target: Target, steps: int, rounds: int, what: str) -> dict:
    """Attack in every mode, and count what it costs.

    Args:
        target (Target): What to attack.
        steps (int): Of each attack.
        rounds (int): How many steps of each mode to time.
        what (str): For the progress.

    Returns:
        dict: Plain data.
    """
    single, double = torch.float32, torch.float64
    models = {mode: target.variant(mode, single) for mode in MODES}
    runs = [(mode, single) for mode in MODES]
    runs += [(mode, double) for mode in EXACT_MODES]
    attacks = {}
    for mode, dtype in track(runs, f'Attack the {what}'):
        model = models[mode] if dtype == single else target.variant(
            mode, dtype)
        attacks[mode, dtype] = attack(target, model, dtype, steps)
    rows = {}
    exact = attacks['Eval', double]
    workload = Workload(target.images, target.loss, updater=None)
    tools = {mode: Step(model, workload, grad_to='input')
             for mode, model in models.items()}
    for mode, model in models.items():
        found = attacks[mode, single]
        memory = tools[mode].memory()
        with torch.no_grad():
            success = [target.success(model, images)
                       for images in (target.images, found.images[-1])]
            clean_loss = target.loss(model, target.images).item()
        rows[mode] = dict(
            losses=[clean_loss, found.losses[-1]],
            success=success,
            from_eval=compare(found, attacks['Eval', single]),
            from_exact=differing(found, exact),
            kept=memory.kept,
            peak=memory.peak)
    timer = interleaved_seconds({m: s.run for m, s in tools.items()}, rounds)
    timings = [next(timer) for _ in track(range(rounds), f'Time the {what}')]
    for mode, row in rows.items():
        row['seconds'] = quartiles(t[mode] for t in timings)[1]
        row['ratio'] = quartiles(t[mode] / t['Eval'] for t in timings)
    return dict(
        shape=list(target.images.shape),
        ran=Counter(latest_runs(models['Tune']).values()),
        rows=rows,
        exact=compare(attacks['Tune', double], exact))


def run(steps: int = 10,
        rounds: int = 7,
        digit_size: int = 160,
        digit_batch: int = 8,
        train_digits: int = 400,
        train_batches: int = 12,
        iterations: int = 120,
        detector_batch: int = 2) -> dict:
    """Attack a classifier and a detector in every mode.

    Args:
        steps (int): Of each attack.
        rounds (int): How many steps of each mode to time.
        digit_size (int): Height and width of the digits in pixels.
        digit_batch (int): How many digits to attack.
        train_digits (int): How many the classifier learns from.
        train_batches (int): How many batches the detector learns from.
        iterations (int): For how many steps.
        detector_batch (int): How many tiles to attack.

    Returns:
        dict: ``targets`` by name.
    """
    found = dict(steps=steps, train_digits=train_digits,
                 iterations=iterations, targets={})
    found['targets']['classifier'] = measure(
        classifier(digit_size, digit_batch, train_digits), steps, rounds,
        'classifier')
    found['targets']['detector'] = measure(
        detector(train_batches, iterations, detector_batch), steps, rounds,
        'detector')
    return found


# ----------------------------------------------------------------------------
# Page
# ----------------------------------------------------------------------------


def spared_text(targets: dict[str, dict], key: str) -> str:
    """Write the share of Eval's bytes that Tune spares on each target."""
    return ' and '.join(
        f'{1 - rows["Tune"][key] / rows["Eval"][key]:.0%} ({name})'
        for name, rows in ((name, target['rows'])
                           for name, target in targets.items()))


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    targets = found['targets']
    values: dict[str, object] = {
        'ends': span([target['rows'][mode]['from_exact'][-1]
                      for target in targets.values() for mode in EXACT_MODES],
                     '.0%'),
        'kept': spared_text(targets, 'kept'),
        'peak': spared_text(targets, 'peak'),
        'steps': found['steps'],
        'digits': found['train_digits'],
        'iterations': found['iterations'],
        'attacked': targets['classifier']['shape'][0],
        'in-images': targets['detector']['shape'][0],
        'signs': signs(targets)
    }
    for name, target in targets.items():
        values |= {
            f'{name}-shape': ' x '.join(map(str, target['shape'])),
            f'{name}-perturbation': perturbations(target, found['steps']),
            f'{name}-success': successes(name, target),
            f'{name}-cost': costs(target)
        }
    return values


def signs(targets: dict[str, dict]) -> str:
    """Lay out whether Tune finds what Eval finds."""

    def count(target: dict, share: float) -> str:
        return f'{share * math.prod(target["shape"]):.0f}'

    def flipped(key: str, spec: str) -> Callable[[dict], str]:
        return lambda target: format(
            target['rows']['Tune']['from_eval'][key], spec)

    def missed(mode: str) -> Callable[[dict], str]:
        return lambda target: f'{target["rows"][mode]["from_exact"][-1]:.1%}'

    def apart(target: dict) -> str:
        stock, tune = (target['rows'][mode]['losses'][1]
                       for mode in EXACT_MODES)
        return f'{abs(tune / stock - 1):.1%}'

    return sheet('', targets, {
        'values in the images': lambda it: math.prod(it['shape']),
        'in float64: values that differ after the last step':
        lambda it: count(it, it['exact']['differing'][-1]),
        'losses differ by at most':
        lambda it: f'{it["exact"]["loss_difference"]:.1e}',
        'in float32: signs that differ in the first step':
        flipped('flipped', 'd'),
        "Eval's that differ from those in float64 there":
        lambda it: count(it, it['rows']['Eval']['from_exact'][0]),
        'the gradient at these values, of the usual (medians)':
        flipped('median_flipped', '.1e'),
        'the same, at most': flipped('largest_flipped', '.1e'),
        'in the end Eval misses of what float64 finds': missed('Eval'),
        'and Tune': missed('Tune'),
        'the losses that they reach differ by': apart,
        'blocks of Tune, by how they ran': lambda it: ', '.join(
            f'{count} {kind}' for kind, count in it['ran'].items())
    })


def perturbations(target: dict, steps: int) -> str:
    """Lay out by how much perturbations differ from those of Eval."""
    rows = target['rows']
    return table(rows, {
        'mode': str,
        'differs from Eval after 1 step':
        lambda mode: f'{rows[mode]["from_eval"]["differing"][0]:.1e}',
        f'from Eval after {steps}':
        lambda mode: f'{rows[mode]["from_eval"]["differing"][-1]:.1e}',
        'loss differs by':
        lambda mode: f'{rows[mode]["from_eval"]["loss_difference"]:.1e}',
        'differs from float64 after 1 step':
        lambda mode: f'{rows[mode]["from_exact"][0]:.1e}',
        f'from float64 after {steps}':
        lambda mode: f'{rows[mode]["from_exact"][-1]:.1e}'
    })


def successes(name: str, target: dict) -> str:
    """Lay out what is right before the attack and after."""
    rows = target['rows']
    return table(rows, {
        'mode': str,
        'loss before': lambda mode: f'{rows[mode]["losses"][0]:.3f}',
        'loss after': lambda mode: f'{rows[mode]["losses"][1]:.3f}',
        f'{SUCCESS[name]} before':
        lambda mode: f'{rows[mode]["success"][0]:.0%}',
        'after': lambda mode: f'{rows[mode]["success"][1]:.0%}'
    })


def costs(target: dict) -> str:
    """Lay out what a step costs."""
    rows = target['rows']

    def of_eval(key: str) -> Callable[[str], str]:
        return lambda mode: f'{rows[mode][key] / rows["Eval"][key]:.3f}'

    return table(rows, {
        'mode': str,
        'kept, MiB': lambda mode: mib(rows[mode]['kept']),
        'kept / Eval': of_eval('kept'),
        'peak, MiB': lambda mode: mib(rows[mode]['peak']),
        'peak / Eval': of_eval('peak'),
        'time of a step, s': lambda mode: f'{rows[mode]["seconds"]:.3f}',
        'time / Eval': lambda mode: '{1:.3f} ({0:.3f}-{2:.3f})'.format(
            *rows[mode]['ratio'])
    })


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    targets = found['targets'].values()
    return {
        'in float64 Tune finds the same perturbation as Eval':
        not any(any(target['exact']['differing']) for target in targets),
        'in float32 some signs differ in the first step':
        all(target['rows']['Tune']['from_eval']['flipped']
            for target in targets),
        'the attacks of all modes succeed alike':
        all(len({row['success'][1] for row in target['rows'].values()}) == 1
            for target in targets),
        'Tune keeps less than Deploy':
        all(target['rows']['Tune']['kept'] < target['rows']['Deploy']['kept']
            for target in targets),
        'a step of Tune takes no more time':
        all(target['rows']['Tune']['ratio'][0] <= 1 for target in targets)
    }


@drawing(7)
def plot(found: dict, figure: Figure) -> None:
    """Draw where perturbations differ and what is kept."""
    grid = figure.subplots(2, len(found['targets']))
    colors = dict(
        zip(MODES, ('tab:blue', 'tab:orange', 'tab:green', 'tab:red')))
    for column, (name, target) in enumerate(found['targets'].items()):
        top, bottom = grid[:, column]
        steps = range(1, found['steps'] + 1)
        for mode, row in target['rows'].items():
            top.plot(
                steps, row['from_exact'], color=colors[mode],
                label=f'{mode}, float32')
        top.plot(
            steps,
            target['exact']['differing'],
            '--',
            color=colors['Tune'],
            label='Tune, float64')
        top.set_yscale('symlog', linthresh=1e-6)
        top.set(title=name, xlabel='step', ylim=(0, 1),
                ylabel='values unlike those of Eval in float64')
        for offset, key in ((-.2, 'kept'), (.2, 'peak')):
            bars = bottom.bar(
                [i + offset for i in range(len(MODES))],
                [row[key] / MIB for row in target['rows'].values()],
                .4,
                color=[colors[mode] for mode in target['rows']],
                alpha=1 if key == 'kept' else .5)
            bottom.bar_label(bars, fmt='%.0f', fontsize=8)
        bottom.set_xticks(range(len(MODES)), labels=list(target['rows']))
        bottom.set(ylabel='MiB', title='kept for backward; pale: peak')
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3)


PAGE = Page(run, figures, claims, plot)
