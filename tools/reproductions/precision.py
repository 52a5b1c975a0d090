"""How exact Eval and Tune are in low precision, over thousands of steps."""
import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mmtune.analysis.timing import quartiles
from reproductions.material import put_in_folding_mode
from reproductions.pages import paragraph, table, track

TITLE = 'Numerical precision'
OF_PAPER = 'left open'
QUESTION = paragraph("""
    Tune computes what Eval computes by another way, and so rounds
    differently. The paper shows equal accuracy, but no errors. How far is each
    mode from float64 in float32, bfloat16 and float16, in a step and after
    thousands of them, and does the error grow with
    `rstd = 1 / sqrt(var + eps)`, which multiplies each weight?
    """)

MODES = ('Eval', 'Tune')
# What autocast casts to; the weights are in float32.
DTYPES = {
    'float32': None,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16
}
# The last is what the BatchNorm of a dead channel has.
VARIANCES = (100., 1., 1e-3, 0.)
EPS = 1e-5
WIDTH = 4
MOMENTUM = 0.9
TENSORS = {
    'output': 'output',
    'x': 'input',
    'conv.weight': 'weight',
    'norm.weight': 'gamma',
    'norm.bias': 'beta'
}
# What docs/en/method.md says of all but gamma.
BOUND = 1.5
# An error below that of one rounding to float32 is none.
ROUNDING = 2.**-24


def loss_scale(precision: str, rstd: float) -> float:
    """Scale the loss as a GradScaler would, about, but always alike.

    Without it float16 loses small gradients. Eval's gradient of a weight is as
    large as rstd, and limits the scale.
    """
    if precision != 'float16':
        return 1.
    return 2.**round(10 - math.log2(max(1., rstd)))


class Block(nn.Module):
    """A convolution without a bias, and a BatchNorm.

    Args:
        networks (int): How many networks it is a part of: groups that know
            nothing of each other.
        kernel (int): Width of the convolution.
        var (float): Running variance, about that of the convolution's output.
        generator (torch.Generator): Draws everything else.
    """

    def __init__(self, networks: int, kernel: int, var: float,
                 generator: torch.Generator) -> None:
        super().__init__()
        channels = networks * WIDTH
        self.conv = nn.Conv2d(
            channels,
            channels,
            kernel,
            padding=kernel // 2,
            groups=networks,
            bias=False)
        self.norm = nn.BatchNorm2d(channels, EPS)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        deviation = (var + EPS)**.5
        with torch.no_grad():
            weight = randn(*self.conv.weight.shape)
            self.conv.weight.copy_(weight * deviation
                                   / weight[0].numel()**.5)
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
    """What the networks of a variance learn: what others of them say.

    Args:
        networks (int): How many.
        var (float): Running variance of all BatchNorms.
        seed (int): Of networks and inputs.
    """

    def __init__(self, networks: int, var: float, seed: int) -> None:
        self.start = make_networks(networks, var, seed)
        self.learning_rate = .005
        self.rstd = (var + EPS)**-.5
        teacher = make_networks(networks, var, seed + 1).eval()
        generator = torch.Generator().manual_seed(seed + 2)
        self.inputs = torch.randn((20, 4, networks * WIDTH, 6, 6),
                                  generator=generator).double()
        self.probe = torch.randn((4, networks * WIDTH, 6, 6),
                                 generator=generator).double()
        with torch.no_grad():
            self.targets = torch.stack([teacher(x) for x in self.inputs])
        self.networks = networks

    def model(self, mode: str, dtype: torch.dtype) -> nn.Module:
        """Put a copy of the untrained networks into a mode."""
        model = copy.deepcopy(self.start).to(dtype)
        put_in_folding_mode(model, mode)
        return model

    def train(self, mode: str, precision: str, steps: int,
              every: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
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
            [
                dict(params=weights, lr=self.learning_rate / self.rstd**2),
                dict(params=vectors, lr=self.learning_rate)
            ],
            momentum=MOMENTUM)
        for step in range(steps + 1):
            if step % every == 0:
                yield step, copy.deepcopy(model.state_dict())
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


def gradients(model: nn.Module,
              x: Tensor,
              grad: Tensor,
              half: torch.dtype | None = None) -> list[dict[str, Tensor]]:
    """Give, of each block, its output and every gradient in float64.

    Returns:
        list[dict[str, Tensor]]: A dict by the keys of :data:`TENSORS` for
        each of the two blocks.
    """
    first, between, second = model
    model.zero_grad()
    with torch.autocast('cpu', half, enabled=half is not None):
        inputs = [x.clone().requires_grad_()]
        outputs = [first(inputs[0])]
        inputs.append(between(outputs[0]))
        inputs[1].retain_grad()
        outputs.append(second(inputs[1]))
    outputs[1].backward(grad.to(outputs[1].dtype))
    return [{
        key: value.detach().double()
        for key, value in dict(
            output=outputs[i],
            x=inputs[i].grad,
            **{k: p.grad
               for k, p in block.named_parameters()}).items()
    } for i, block in enumerate((first, second))]


def rounding(task: Task, states: Sequence[dict[str, Tensor]],
             precision: str) -> dict[str, list[dict[str, float]]]:
    """Measure the error of single steps, at points of an exact training.

    At each point the same float32 weights, input and gradient of the output
    go into each mode, and into Eval in float64.

    Args:
        task (Task): What was trained.
        states (Sequence[dict[str, Tensor]]): Points, in float64.
        precision (str): Key of :data:`DTYPES`.

    Returns:
        dict[str, list[dict[str, float]]]: By mode, for each block, for each
        tensor: norm of the error divided by the norm of the value, the root
        of the mean square over all points.
    """
    half = DTYPES[precision]
    models = {mode: task.model(mode, torch.float32) for mode in MODES}
    exact = task.model('Eval', torch.float64)
    squares: dict[str, list] = {
        mode: [{key: [] for key in TENSORS} for _ in range(2)]
        for mode in MODES
    }
    for i, state in enumerate(states):
        state = {key: value.float() for key, value in state.items()}
        exact.load_state_dict(state)
        i %= len(task.inputs)
        x = task.inputs[i].to(half or torch.float32)
        with torch.no_grad():
            grad = exact(x.double()) - task.targets[i]
        grad *= loss_scale(precision, task.rstd) / grad[0].numel()
        grad = grad.to(half or torch.float32)
        expected = gradients(exact, x.double(), grad.double())
        for mode, model in models.items():
            model.load_state_dict(state)
            found = gradients(model, x.float(), grad, half)
            for block, (values, ideal) in enumerate(zip(found, expected)):
                for key in TENSORS:
                    error = (values[key] - ideal[key]).norm()
                    squares[mode][block][key].append(
                        float(error / ideal[key].norm())**2)
    return {
        mode: [{
            key: math.sqrt(statistics.fmean(values))
            for key, values in block.items()
        } for block in blocks]
        for mode, blocks in squares.items()
    }


def run(steps: int = 2000,
        every: int = 50,
        networks: int = 8,
        variances: Sequence[float] = VARIANCES,
        seed: int = 0) -> dict:
    """Train the networks of each variance in each precision and mode.

    Args:
        steps (int): How long each is trained.
        every (int): How many steps from one measurement to the next.
        networks (int): How many of each variance.
        variances (Sequence[float]): Running variance of all BatchNorms.
        seed (int): Of everything drawn.

    Returns:
        dict: ``rows``, one for each variance and precision, with ``drift``,
        by mode: how far the networks are from float64, the median at each
        point and every network in the end.
    """
    rows = []
    cases = [(var, precision) for var in variances for precision in DTYPES]
    exact: dict[float, tuple] = {}
    for var, precision in track(cases, 'Train in every precision'):
        task = Task(networks, var, seed)
        if var not in exact:
            states = [s for _, s in task.train('Eval', 'float64', steps,
                                               every)]
            exact[var] = states, [task.says(state) for state in states]
        states, right = exact[var]
        drift: dict[str, dict] = {}
        for mode in MODES:
            distances = [
                relative(task.says(state), ideal) for (_, state), ideal in
                zip(task.train(mode, precision, steps, every), right)
            ]
            drift[mode] = dict(
                medians=[statistics.median(point) for point in distances],
                last=distances[-1])
        rows.append(
            dict(
                var=var,
                rstd=task.rstd,
                precision=precision,
                rounding=rounding(task, states, precision),
                learned=relative(right[0], right[-1]),
                drift=drift))
    return dict(
        steps=steps,
        every=every,
        networks=networks,
        points=list(range(0, steps + 1, every)),
        rows=rows)


def relative(output: Tensor, ideal: Tensor) -> list[float]:
    """Norm of the error over that of the value, network by network."""
    error, norm = ((t.square().sum((0, 2, 3, 4)).sqrt())
                   for t in (output - ideal, ideal))
    return (error / norm).tolist()


# ----------------------------------------------------------------------------
# Page
# ----------------------------------------------------------------------------


def ratio(stock: float, tune: float) -> float:
    """Tune's error over Eval's."""
    return max(tune, ROUNDING) / max(stock, ROUNDING)


def ratios(rows: Sequence[dict], *keys: str) -> list[float]:
    """The same of some tensors in every row and block."""
    return [
        ratio(stock[key], tune[key]) for row in rows for stock, tune in zip(
            *(row['rounding'][mode] for mode in MODES)) for key in keys
    ]


def final_drift(row: dict, mode: str) -> float:
    """How far the median network is from float64 in the end."""
    return row['drift'][mode]['medians'][-1]


def answer(found: dict) -> str:
    """Say in a sentence what came out."""
    rows = found['rows']
    steps = ratios(rows, *TENSORS)
    ends = [statistics.median(drift_ratios(row)) for row in rows]
    single = [value for row in rows for value in drift_ratios(row)]
    return (f"Tune's error of a step is {statistics.median(steps):.2f} times "
            f"Eval's in the median ({min(steps):.2f} to {max(steps):.2f}), "
            f'and after {found["steps"]} steps it is {min(ends):.2f} to '
            f'{max(ends):.2f} times as far from float64 in the median of '
            f'{found["networks"]} networks (single ones {min(single):.2f} to '
            f'{max(single):.2f}).')


def page(found: dict) -> str:
    """Write the page."""
    rows = found['rows']
    parts = [
        paragraph(f"""
        For each running variance, {found["networks"]} small networks (two
        blocks of {WIDTH} channels and a tanh between, 6 x 6 maps, batch 4)
        learn for {found["steps"]} steps what others of their kind say, with
        SGD and momentum. Weights are as small as their `rstd` is large, so
        that the outputs of all blocks have about the same size; so are their
        learning rates, by its square. The networks of a variance are groups
        of one model and know nothing of each other. Weights are float32;
        autocast runs the convolutions in bfloat16 or float16, there with a
        fixed loss scale, the same in both modes, of 1024 or where rstd is
        above 1 that much less. The rule that runs small maps as stock is off:
        these are all small.
        """),
        '## The error of a step',
        paragraph(f"""
        At {len(found["points"])} points of a training in float64, Eval and
        Tune get the same weights, input and gradient of the output; Eval in
        float64 says what is right. An error is the norm of what is wrong over
        the norm of what is right, the root of the mean square over the points.
        In a cell: Eval's error, and in brackets how many times as large
        Tune's is, where one below {ROUNDING:.0e}, half of float32's last
        digit, counts as that.
        """)
    ]
    for precision in DTYPES:
        parts.append(f'### {precision}')
        parts.append(
            table(['rstd', 'block', *TENSORS.values()], [[
                f'{row["rstd"]:.4g}', block + 1, *(
                    f'{stock[key]:.1e} ({ratio(stock[key], tune[key]):.2f})'
                    for key in TENSORS)
            ] for row in rows if row['precision'] == precision
                for block, (stock, tune) in enumerate(
                    zip(*(row['rounding'][mode] for mode in MODES)))]))
    parts += [paragraph(verdict_on_rounding(rows)),
              paragraph(verdict_on_rstd(rows))]
    parts += ['## The whole training']
    parts.append(
        paragraph(f"""
        How far the networks are after {found["steps"]} steps from those that
        were trained in float64: the error of their outputs on images not
        seen, computed in float64. Median of the {found["networks"]} networks,
        and the quartiles of the ratio of Tune's distance to Eval's. For
        comparison, how far they learned: the distance between the untrained
        networks and the trained ones.
        """))
    parts.append(
        table(['rstd', 'precision', 'learned', 'Eval', 'Tune', 'Tune / Eval'],
              [[
                  f'{row["rstd"]:.4g}', row['precision'],
                  f'{statistics.median(row["learned"]):.2f}',
                  *(f'{final_drift(row, mode):.1e}' for mode in MODES),
                  quartile_text(drift_ratios(row))
              ] for row in rows]))
    parts.append(paragraph(verdict_on_drift(rows)))
    parts += [
        '## Not run here',
        paragraph("""
        GPUs, whose kernels round differently (TF32, tensor cores) and add up
        in another order. Deep networks with ReLU, whose paths part by chance
        wherever one switches: [statistics](statistics.md) has them in float32
        and float64, on real images; in bfloat16 and float16 they were not
        compared.
        """)
    ]
    return '\n\n'.join(parts)


def drift_ratios(row: dict) -> list[float]:
    """Tune's distance over Eval's in the end, network by network."""
    return [
        tune / stock
        for tune, stock in zip(*(row['drift'][mode]['last']
                                 for mode in ('Tune', 'Eval')))
    ]


def quartile_text(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f'{values[0]:.2f}'
    low, median, high = quartiles(values)
    return f'{median:.2f} ({low:.2f}-{high:.2f})'


def verdict_on_rounding(rows: Sequence[dict]) -> str:
    """Compare what is found with what the documentation promises."""
    others = ratios(rows, *(key for key in TENSORS if key != 'norm.weight'))
    text = f"""
        For the output and every gradient but that of gamma, Tune's error is
        {min(others):.2f} to {max(others):.2f} times Eval's (median
        {statistics.median(others):.2f}). [method.md](../method.md) says at
        most {BOUND:g} of many blocks taken together; here, of single ones,
        """
    beyond = sum(value > BOUND for value in others)
    text += (f'{beyond} of {len(others)} values are above that.'
             if beyond else 'none is above that.')
    by_precision = ', '.join(
        f'{min(found):.2f} to {max(found):.2f} times in {precision}'
        for precision in DTYPES
        for found in [ratios([row for row in rows
                              if row['precision'] == precision],
                             'norm.weight')])
    return text + f""" For gamma it is {by_precision}: Tune has the gradient of
        gamma from that of the weight and is as exact as that, where Eval adds
        it up for itself."""


def verdict_on_rstd(rows: Sequence[dict]) -> str:
    """Say whether the ratio of the modes depends on rstd."""
    means = {}
    for row in rows:
        means.setdefault(row['rstd'], []).extend(ratios([row], *TENSORS))
    medians = {
        rstd: statistics.median(values)
        for rstd, values in means.items()
    }
    listed = ', '.join(f'{value:.2f} at {rstd:.4g}'
                       for rstd, value in sorted(medians.items()))
    low, high = min(medians.values()), max(medians.values())
    change = ('does not depend much on' if high / low < 1.25 else
              'depends on')
    return f"""The ratio {change} rstd: over all tensors and precisions its
        median is {listed}. {errors_text(rows)} Here the weights make up for
        rstd, as in a network that has learned with it; a product rounds by a
        share of its size, whatever that is."""


def errors_text(rows: Sequence[dict]) -> str:
    """Tell the error itself at the smallest and at the largest rstd."""
    by_rstd = sorted((row for row in rows if row['precision'] == 'float32'),
                     key=lambda row: row['rstd'])
    found = ', '.join(
        f'{mode} {max(block["output"] for block in row["rounding"][mode]):.1e}'
        f' at {row["rstd"]:.4g}'
        for mode in MODES for row in (by_rstd[0], by_rstd[-1]))
    return f"""The error itself of the output in float32, of the block where it
        is larger: {found}."""


def verdict_on_drift(rows: Sequence[dict]) -> str:
    """Compare the distances in the end."""
    text = 'Tune ends '
    text += '; '.join(
        f'{min(medians):.2f} to {max(medians):.2f} times as far from float64 '
        f'as Eval in {precision}'
        for precision in DTYPES for medians in [[
            statistics.median(drift_ratios(row)) for row in rows
            if row['precision'] == precision
        ]])
    medians = [statistics.median(drift_ratios(row)) for row in rows]
    beyond = sum(median > BOUND for median in medians)
    return text + ' (medians of networks). ' + (
        f'{beyond} of {len(rows)} are above {BOUND:g}.'
        if beyond else f'None is above {BOUND:g}.')


def plot(found: dict, path: Path) -> None:
    """Plot errors against rstd, and distances against the step."""
    figure = Figure(figsize=(8, 7), layout='constrained')
    grid = figure.subplots(2, 2)
    colors = dict(zip(DTYPES, ('tab:blue', 'tab:orange', 'tab:green')))
    styles = dict(Eval='o-', Tune='x--')
    shown = {'output': 'output', 'conv.weight': "weight's gradient",
             'norm.weight': "gamma's gradient"}
    for axes, (key, name) in zip(grid.flat, shown.items()):
        for precision, color in colors.items():
            rows = [row for row in found['rows']
                    if row['precision'] == precision]
            for mode, style in styles.items():
                axes.loglog(
                    [row['rstd'] for row in rows],
                    [row['rounding'][mode][0][key] for row in rows],
                    style,
                    color=color,
                    label=f'{precision}, {mode}')
        axes.set(xlabel='rstd', ylabel='error of a step',
                 title=f'{name}, first block')
    last = max(found['rows'], key=lambda row: row['rstd'])['rstd']
    for row in found['rows']:
        for mode in MODES if row['rstd'] == last else ():
            grid[1, 1].semilogy(
                found['points'][1:],
                row['drift'][mode]['medians'][1:],
                styles[mode][1:],
                color=colors[row['precision']])
    grid[1, 1].set(xlabel='step', ylabel='distance from float64',
                   title=f'whole training, rstd {last:.4g}')
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3)
    figure.savefig(path, dpi=120)
