"""How exact Eval and Tune are in low precision, over thousands of steps."""
import copy
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from reproductions.material import put_in_folding_mode
from reproductions.page import (
    Page,
    by,
    cell,
    drawing,
    quartiles_text,
    span,
    table,
)

MODES = ('Eval', 'Tune')
# What autocast casts to; the weights are in float32.
DTYPES = {'float32': None, 'bfloat16': torch.bfloat16,
          'float16': torch.float16}
# The last is what the BatchNorm of a dead channel has.
VARIANCES = (100., 1., 1e-3, 0.)
EPS = 1e-5
WIDTH = 4
LEARNING_RATE, MOMENTUM = .005, .9
TENSORS = {'output': 'output', 'x': 'input', 'conv.weight': 'weight',
           'norm.weight': 'gamma', 'norm.bias': 'beta'}
BUT_GAMMA = [key for key in TENSORS if key != 'norm.weight']
# What docs/en/method.md says of these.
BOUND = 1.5
# An error below that of one rounding to float32 is none.
ROUNDING = 2.**-24


def loss_scale(precision: str, rstd: float) -> float:
    """Scale the loss about as a GradScaler would, but always alike.

    Without it float16 loses small gradients. Eval's gradient of a weight is as
    large as rstd, and limits the scale.
    """
    if precision != 'float16':
        return 1.
    return 2.**round(10 - math.log2(max(1., rstd)))


class Block(nn.Module):
    """A convolution without a bias, and a BatchNorm.

    Of several networks at once: groups that know nothing of each other. The
    running variance is about that of the convolution's output.
    """

    def __init__(self, networks: int, kernel: int, var: float,
                 generator: torch.Generator) -> None:
        super().__init__()
        channels = networks * WIDTH
        self.conv = nn.Conv2d(channels, channels, kernel, bias=False,
                              padding=kernel // 2, groups=networks)
        self.norm = nn.BatchNorm2d(channels, EPS)
        randn = partial(torch.randn, generator=generator)
        deviation = (var + EPS)**.5
        with torch.no_grad():
            weight = randn(self.conv.weight.shape) * deviation
            self.conv.weight.copy_(weight / weight[0].numel()**.5)
            self.norm.running_mean.copy_(.3 * deviation * randn(channels))
            self.norm.running_var.fill_(var)
            self.norm.weight.copy_((randn(channels) / 2).exp())
            self.norm.bias.copy_(.3 * randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        return self.norm(self.conv(x))


def make_networks(networks: int, var: float, seed: int) -> nn.Sequential:
    """Make networks of two blocks, of the same variance.

    Smooth ones: where a ReLU switches, any error is amplified at random.
    """
    generator = torch.Generator().manual_seed(seed)
    return nn.Sequential(
        Block(networks, 3, var, generator), nn.Tanh(),
        Block(networks, 1, var, generator)).double()


class Task:
    """What the networks of a variance learn: what others of them say."""

    def __init__(self, networks: int, var: float, seed: int) -> None:
        self.start = make_networks(networks, var, seed)
        self.rstd = (var + EPS)**-.5
        teacher = make_networks(networks, var, seed + 1).eval()
        generator = torch.Generator().manual_seed(seed + 2)
        self.inputs, self.probe = (
            torch.randn((*batches, 4, networks * WIDTH, 6, 6),
                        generator=generator).double()
            for batches in ((20, ), ()))
        with torch.no_grad():
            self.targets = torch.stack([teacher(x) for x in self.inputs])
        self.networks = networks

    def model(self, mode: str, dtype: torch.dtype) -> nn.Module:
        """Put a copy of the untrained networks into a mode."""
        model = copy.deepcopy(self.start).to(dtype)
        put_in_folding_mode(model, mode)
        return model

    def train(self, mode: str, precision: str, steps: int,
              every: int) -> Iterator[dict[str, Tensor]]:
        """Train, and give the state at the start and every so many steps."""
        dtype = torch.float64 if precision == 'float64' else torch.float32
        half = DTYPES.get(precision)
        scale = loss_scale(precision, self.rstd)
        model = self.model(mode, dtype)
        inputs, targets = self.inputs.to(dtype), self.targets.to(dtype)
        weights = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        # A step of the folded weight is one of the weight times coeff^2.
        optimizer = torch.optim.SGD(
            [dict(params=weights, lr=LEARNING_RATE / self.rstd**2),
             dict(params=vectors, lr=LEARNING_RATE)], momentum=MOMENTUM)
        for step in range(steps + 1):
            if step % every == 0:
                yield copy.deepcopy(model.state_dict())
            i = step % len(inputs)
            with torch.autocast('cpu', half, enabled=half is not None):
                output = model(inputs[i])
            error = output.to(dtype) - targets[i]
            (scale * self.networks * error.square().mean()).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.grad /= scale
            optimizer.step()
            optimizer.zero_grad()

    def says(self, state: dict[str, Tensor]) -> Tensor:
        """Give the output of a state in float64, network by network."""
        model = self.model('Eval', torch.float64)
        model.load_state_dict(state)
        with torch.no_grad():
            output = model(self.probe)
        return output.unflatten(1, (self.networks, WIDTH))


def gradients(model: nn.Module, x: Tensor, grad: Tensor,
              half: torch.dtype | None = None) -> list[dict[str, Tensor]]:
    """Give, of each block, output and gradients by :data:`TENSORS`."""
    first, between, second = model
    model.zero_grad()
    with torch.autocast('cpu', half, enabled=half is not None):
        inputs = [x.clone().requires_grad_()]
        outputs = [first(inputs[0])]
        inputs.append(between(outputs[0]))
        inputs[1].retain_grad()
        outputs.append(second(inputs[1]))
    outputs[1].backward(grad.to(outputs[1].dtype))
    found = []
    for block, x, output in zip((first, second), inputs, outputs):
        found.append(dict(output=output.detach().double(), x=x.grad.double()))
        found[-1].update((name, parameter.grad.double())
                         for name, parameter in block.named_parameters())
    return found


def rounding(task: Task, states: Sequence[dict[str, Tensor]],
             precision: str) -> dict[str, list[dict[str, float]]]:
    """Measure the error of single steps, at points of an exact training.

    At each point the same float32 weights, input and gradient of the output
    go into each mode, and into Eval in float64.

    Returns:
        dict[str, list[dict[str, float]]]: By mode, for each block, for each
        tensor: norm of the error divided by the norm of the value, the root
        of the mean square over all points.
    """
    half = DTYPES[precision]
    models = {mode: task.model(mode, torch.float32) for mode in MODES}
    exact = task.model('Eval', torch.float64)
    squares = defaultdict(list)
    for i, state in enumerate(states):
        state = {key: value.float() for key, value in state.items()}
        exact.load_state_dict(state)
        i %= len(task.inputs)
        x = task.inputs[i].to(half or torch.float32)
        with torch.no_grad():
            grad = exact(x.double()) - task.targets[i]
        grad *= loss_scale(precision, task.rstd) / grad[0].numel()
        grad = grad.to(x.dtype)
        expected = gradients(exact, x.double(), grad.double())
        for mode, model in models.items():
            model.load_state_dict(state)
            found = gradients(model, x.float(), grad, half)
            for block, (values, ideal) in enumerate(zip(found, expected)):
                for key in TENSORS:
                    error = (values[key] - ideal[key]).norm()
                    squares[mode, block, key].append(
                        float(error / ideal[key].norm())**2)
    return {
        mode: [{key: math.sqrt(statistics.fmean(squares[mode, block, key]))
                for key in TENSORS} for block in range(2)] for mode in MODES
    }


def run(steps: int = 2000, every: int = 50, networks: int = 8,
        variances: Sequence[float] = VARIANCES) -> dict:
    """Train the networks of each variance in each precision and mode.

    Args:
        steps (int): How long each is trained.
        every (int): How many steps from one measurement to the next.
        networks (int): How many of each variance.
        variances (Sequence[float]): Running variance of all BatchNorms.

    Returns:
        dict: ``rows``, one for each variance and precision, with ``drift``,
        by mode: how far the networks are from float64, the median at each
        point and every network in the end.
    """
    rows = []
    for var in track(variances, 'Train in every precision'):
        task = Task(networks, var, 0)
        states = list(task.train('Eval', 'float64', steps, every))
        right = [task.says(state) for state in states]
        for precision in DTYPES:
            drift: dict[str, dict] = {}
            for mode in MODES:
                distances = [
                    relative(task.says(state), ideal) for state, ideal in
                    zip(task.train(mode, precision, steps, every), right)
                ]
                drift[mode] = dict(last=distances[-1], medians=[
                    statistics.median(point) for point in distances])
            rows.append(dict(
                var=var, rstd=task.rstd, precision=precision, drift=drift,
                rounding=rounding(task, states, precision),
                learned=relative(right[0], right[-1])))
    return dict(steps=steps, every=every, networks=networks,
                points=list(range(0, steps + 1, every)), rows=rows)


def relative(output: Tensor, ideal: Tensor) -> list[float]:
    """Norm of the error over that of the value, network by network."""
    error, norm = (t.square().sum((0, 2, 3, 4)).sqrt()
                   for t in (output - ideal, ideal))
    return (error / norm).tolist()


def ratio(stock: float, tune: float) -> float:
    """Tune's error over Eval's."""
    return max(tune, ROUNDING) / max(stock, ROUNDING)


def ratios(rows: Iterable[dict], keys: Iterable[str]) -> list[float]:
    """The same of some tensors in every row and block."""
    return [
        ratio(stock[key], tune[key]) for row in rows for stock, tune in zip(
            *(row['rounding'][mode] for mode in MODES)) for key in keys
    ]


def drift_ratios(row: dict) -> list[float]:
    """Tune's distance over Eval's in the end, network by network."""
    stock, tune = (row['drift'][mode]['last'] for mode in MODES)
    return [b / a for a, b in zip(stock, tune)]


def drift_median(row: dict) -> float:
    """The same of the median network."""
    return statistics.median(drift_ratios(row))


def medians_by_rstd(rows: Sequence[dict]) -> dict[float, float]:
    """The median ratio over tensors and precisions, by increasing rstd."""
    return {
        rstd: statistics.median(ratios(group, TENSORS))
        for rstd, group in sorted(by('rstd', rows).items())
    }


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    rows = found['rows']
    steps, others = ratios(rows, TENSORS), ratios(rows, BUT_GAMMA)
    values: dict[str, object] = {
        'steps': found['steps'], 'networks': found['networks'],
        'points': len(found['points']),
        'step': f'{statistics.median(steps):.2f}',
        'step-span': span(steps, '.2f'),
        'ends': span(map(drift_median, rows), '.2f'),
        'single': span([x for row in rows for x in drift_ratios(row)], '.2f'),
        'others': span(others, '.2f'),
        'others-median': f'{statistics.median(others):.2f}',
        'by-rstd': ', '.join(f'{median:.2f} at {rstd:.4g}' for rstd, median
                             in medians_by_rstd(rows).items()),
        'output': output_errors(rows),
        'drift': table(rows, {
            'rstd': cell('.4g', 'rstd'),
            'precision': cell('', 'precision'),
            'learned': lambda row: f'{statistics.median(row["learned"]):.2f}',
            **{mode: cell('.1e', 'drift', mode, 'medians', -1)
               for mode in MODES},
            'Tune / Eval': lambda row: quartiles_text(drift_ratios(row), 2)
        })
    }
    for precision, group in by('precision', rows).items():
        values |= {
            precision: rounding_table(group),
            f'gamma-{precision}': span(ratios(group, ['norm.weight']), '.2f'),
            f'ends-{precision}': span(map(drift_median, group), '.2f')
        }
    return values


def rounding_table(rows: Sequence[dict]) -> str:
    """Lay out the errors of a step in one precision."""
    blocks = [(row, number, *errors) for row in rows for number, errors in
              enumerate(zip(*(row['rounding'][mode] for mode in MODES)), 1)]
    return table(blocks, {
        'rstd': cell('.4g', 0, 'rstd'),
        'block': cell('', 1),
        **{title: lambda it, key=key: f'{it[2][key]:.1e} '
           f'({ratio(it[2][key], it[3][key]):.2f})'
           for key, title in TENSORS.items()}
    })


def output_errors(rows: Sequence[dict]) -> str:
    """Write the larger error in float32 at the least and the largest rstd."""
    single = sorted((row for row in rows if row['precision'] == 'float32'),
                    key=lambda row: row['rstd'])
    return ', '.join(
        f'{mode} {max(block["output"] for block in row["rounding"][mode]):.1e}'
        f' at {row["rstd"]:.4g}'
        for mode in MODES for row in (single[0], single[-1]))


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    rows = found['rows']
    medians = medians_by_rstd(rows).values()
    return {
        f"but for gamma, no error of Tune's is above {BOUND:g} times Eval's":
        max(ratios(rows, BUT_GAMMA)) <= BOUND,
        'the ratio does not depend much on rstd':
        max(medians) / min(medians) < 1.25,
        f'after the whole training no median is above {BOUND:g}':
        all(drift_median(row) <= BOUND for row in rows)
    }


@drawing(7)
def plot(found: dict, figure: Figure) -> None:
    """Draw errors against rstd, and distances against the step."""
    grid = figure.subplots(2, 2)
    colors = dict(zip(DTYPES, ('tab:blue', 'tab:orange', 'tab:green')))
    styles = dict(Eval='o-', Tune='x--')
    shown = {'output': 'output', 'conv.weight': "weight's gradient",
             'norm.weight': "gamma's gradient"}
    for axes, (key, name) in zip(grid.flat, shown.items()):
        for precision, rows in by('precision', found['rows']).items():
            for mode, style in styles.items():
                axes.loglog([row['rstd'] for row in rows],
                            [row['rounding'][mode][0][key] for row in rows],
                            style, color=colors[precision],
                            label=f'{precision}, {mode}')
        axes.set(xlabel='rstd', ylabel='error of a step',
                 title=f'{name}, first block')
    last, rows = max(by('rstd', found['rows']).items())
    for row in rows:
        for mode, style in styles.items():
            grid[1, 1].semilogy(
                found['points'][1:], row['drift'][mode]['medians'][1:],
                style[1:], color=colors[row['precision']])
    grid[1, 1].set(xlabel='step', ylabel='distance from float64',
                   title=f'whole training, rstd {last:.4g}')
    figure.legend(*grid[0, 0].get_legend_handles_labels(),
                  loc='outside lower center', ncols=3)


PAGE = Page(run, figures, claims, plot)
