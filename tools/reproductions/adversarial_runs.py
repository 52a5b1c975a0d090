"""Adversarial examples: the gradient goes to the image, nothing is learned."""
import copy
import itertools
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import demo
import torch
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed
from rich.progress import track
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

MODES = ('Eval', 'MMEngine', 'Tune', 'Deploy')
# What is attacked in float64 too.
EXACT_MODES = ('Eval', 'Tune')
# In units of normalized images: about 4 of the 255 levels of a pixel.
RADIUS = .07
STEP_SIZE = RADIUS / 4
# A detection counts from this score and this overlap on.
MIN_SCORE, MIN_OVERLAP = .3, .5


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

    What is attacked are others than those of the fit.
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
    """
    fetch_weights()
    fetch_trees()
    config = Config.fromfile(demo.MODES['Eval'])
    init_default_scope('mmdet')
    # Of the head's weights, and of how images are flipped.
    set_random_seed(0)
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

    From a random point of the ball, which is the same in every call.
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
    """Attack in every mode, and count what it costs."""
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
            losses=[clean_loss, found.losses[-1]], success=success,
            from_eval=compare(found, attacks['Eval', single]),
            from_exact=differing(found, exact),
            kept=memory.kept, peak=memory.peak)
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


def run(steps: int = 10, rounds: int = 7, digit_size: int = 160,
        digit_batch: int = 8, train_digits: int = 400,
        train_batches: int = 12, iterations: int = 120,
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
    targets = dict(
        classifier=classifier(digit_size, digit_batch, train_digits),
        detector=detector(train_batches, iterations, detector_batch))
    return dict(
        steps=steps, train_digits=train_digits, iterations=iterations,
        targets={name: measure(target, steps, rounds, name)
                 for name, target in targets.items()})
