"""Write what the site shows: the drawings, and the tables of figures.

``python docs/render.py`` draws the block of the first page and the call of
"How it works", and writes the tables between the markers of the pages from
the JSON files beside them. The tests check that what is committed is what
this writes.
"""
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent / 'en'
MIB = 2**20


# --------------------------------------------------------------------------
# The drawing of a block
# --------------------------------------------------------------------------


class Map(NamedTuple):
    """A feature map, and whether autograd keeps it for backward."""

    name: str
    kept: bool


class Row(NamedTuple):
    """A block in one mode: feature maps, and the operations between them."""

    mode: str
    caption: str
    steps: tuple[Map | str, ...]


ROWS = (
    Row('Eval', 'two maps are kept',
        (Map('X', True), 'convolution', Map('Y', True), 'BatchNorm',
         Map('Z', False))),
    Row('Deploy', 'one map, but folded for good: unstable to train',
        (Map('X', True), 'convolution with the folded weight',
         Map('Z', False))),
    Row('Tune', "one map, Eval's numbers: folded anew at each call",
        (Map('X', True), 'fold, then convolution', Map('Z', False))),
)
WIDTH, ROW_HEIGHT, LEGEND_HEIGHT = 520, 96, 34
BOX_HEIGHT, MAP_WIDTH, ARROW = 40, 52, 28
# All of them can be read on white and on the dark theme's near black.
KEPT, OPERATION, GREY = '#d9660a', '#3568a8', '#7f8a96'
FONT = "font-family='system-ui, sans-serif'"


def drawing() -> str:
    """Draw a block in each mode, one below another.

    Returns:
        str: An SVG file, as wide as a phone can show.
    """
    parts: list[str] = []
    for index, row in enumerate(ROWS):
        parts += draw_row(row, index * ROW_HEIGHT)
    parts += draw_legend(ROW_HEIGHT * len(ROWS) + 6)
    return svg('What a block keeps for backward in each mode',
               LEGEND_HEIGHT + ROW_HEIGHT * len(ROWS), parts)


def svg(title: str, height: int, parts: Iterable[str]) -> str:
    """Put the parts of a drawing together, as wide as all of them."""
    return '\n'.join([
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} "
        f"{height}' role='img' {FONT} font-size='16'>",
        f'<title>{title}</title>',
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' "
        "markerWidth='8' markerHeight='8' orient='auto'>"
        f"<path d='M0 0L8 4L0 8z' fill='{GREY}'/></marker></defs>",
        *parts,
        '</svg>',
        '',
    ])


def draw_row(row: Row, top: int) -> Iterator[str]:
    """Draw one mode: its name and caption, and the block below."""
    yield heading(row.mode, row.caption, top)
    n_maps = sum(isinstance(step, Map) for step in row.steps)
    n_operations = len(row.steps) - n_maps
    room = WIDTH - n_maps * MAP_WIDTH - (len(row.steps) - 1) * ARROW
    x, y = 0, top + 30
    for index, step in enumerate(row.steps):
        if index:
            middle = y + BOX_HEIGHT // 2
            yield arrow(x + 3, middle, x + ARROW - 3, middle)
            x += ARROW
        if isinstance(step, Map):
            yield from draw_map(step.name, step.kept, x, y)
            x += MAP_WIDTH
        else:
            width = room // n_operations
            yield from draw_operation(step, x, y, width)
            x += width


def heading(name: str, caption: str, top: int) -> str:
    """Write a name in bold, and what there is to say of it."""
    return (f"<text x='0' y='{top + 18}' fill='{GREY}'>"
            f"<tspan font-weight='bold' font-size='18'>{name}</tspan>"
            f"<tspan dx='10'>{caption}</tspan></text>")


def arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    """Draw an arrow, level or upright."""
    end = f'H{to_x}' if y == to_y else f'V{to_y}'
    return (f"<path d='M{x} {y}{end}' stroke='{GREY}' stroke-width='2' "
            "marker-end='url(#tip)'/>")


def draw_operation(name: str, x: int, y: int, width: int) -> Iterator[str]:
    """Draw what computes something, with its name inside."""
    yield (f"<rect x='{x}' y='{y}' width='{width}' "
           f"height='{BOX_HEIGHT}' rx='4' fill='{OPERATION}'/>")
    yield centred(name, x + width // 2, y, '#fff')


def draw_map(name: str, kept: bool, x: int, y: int,
             width: int = MAP_WIDTH) -> Iterator[str]:
    """Draw a feature map: full where it is kept, an outline where not."""
    look = (f"fill='{KEPT}'" if kept else
            f"fill='none' stroke='{GREY}' stroke-width='1.5' "
            "stroke-dasharray='4 3'")
    yield (f"<rect x='{x + 1}' y='{y + 1}' width='{width - 2}' "
           f"height='{BOX_HEIGHT - 2}' rx='4' {look}/>")
    yield centred(name, x + width // 2, y, '#fff' if kept else GREY)


def centred(text: str, x: int, y: int, colour: str) -> str:
    """Write a text into the middle of a box that begins at height ``y``."""
    return (f"<text x='{x}' y='{y + 26}' text-anchor='middle' "
            f"fill='{colour}'>{text}</text>")


def draw_legend(y: int) -> Iterator[str]:
    """Say what the two kinds of maps mean."""
    for x, look, text in (
        (1, f"fill='{KEPT}'", 'kept for backward'),
        (190, f"fill='none' stroke='{GREY}' stroke-width='1.5' "
         "stroke-dasharray='4 3'", 'not kept by this block'),
    ):
        yield (f"<rect x='{x}' y='{y}' width='22' height='18' rx='3' "
               f'{look}/>')
        yield f"<text x='{x + 30}' y='{y + 15}' fill='{GREY}'>{text}</text>"


# --------------------------------------------------------------------------
# The drawing of a call
# --------------------------------------------------------------------------

# Where the columns begin: a map, the convolution, the promise, the fold.
COLUMNS = (0, 80, 208, 388)
CALL_HEIGHT = 340


def call_drawing() -> str:
    """Draw one call of a block in Tune mode, and its backward below.

    Returns:
        str: An SVG file, as wide as that of the block.
    """
    return svg('One call of a block in Tune mode, and its backward',
               CALL_HEIGHT, [
                   heading('Forward', 'conv(X), then bn(promise)', 0),
                   *draw_forward(30),
                   heading('Backward', "reads X and w, makes w' again", 154),
                   *draw_backward(184),
                   *draw_legend(CALL_HEIGHT - 28),
               ])


def draw_forward(top: int) -> Iterator[str]:
    """Draw the calls in one row, and what then runs back in the next."""
    first, conv, promise, fold = COLUMNS
    middle, below = top + BOX_HEIGHT // 2, top + BOX_HEIGHT + ARROW
    yield from draw_map('X', True, first, top)
    yield arrow(first + MAP_WIDTH + 3, middle, conv - 3, middle)
    yield from draw_operation('conv', conv, top, promise - ARROW - conv)
    yield arrow(promise - ARROW + 3, middle, promise - 3, middle)
    yield from draw_map('promise, holds X', False, promise, top,
                        fold - ARROW - promise)
    yield arrow(fold - ARROW + 3, middle, fold - 3, middle)
    yield from draw_operation('BatchNorm', fold, top, WIDTH - fold)
    for x in ((promise + fold - ARROW) // 2, (fold + WIDTH) // 2):
        yield arrow(x, top + BOX_HEIGHT + 3, x, below - 3)
    middle = below + BOX_HEIGHT // 2
    yield from draw_operation("fold: w', b'", fold, below, WIDTH - fold)
    yield arrow(fold - 3, middle, fold - ARROW + 3, middle)
    yield from draw_operation("one convolution with w', b'", conv, below,
                              fold - ARROW - conv)
    yield arrow(conv - 3, middle, first + MAP_WIDTH + 3, middle)
    yield from draw_map('Z', False, first, below)


def draw_backward(top: int) -> Iterator[str]:
    """Draw how gradients come back, and in the next row what they are."""
    first, conv, promise, fold = COLUMNS
    middle, below = top + BOX_HEIGHT // 2, top + BOX_HEIGHT + ARROW
    split = promise + MAP_WIDTH
    yield from draw_map('dZ', False, first, top)
    yield arrow(first + MAP_WIDTH + 3, middle, conv - 3, middle)
    yield from draw_operation('backward of conv', conv, top, split - conv)
    yield arrow(split + 3, middle, fold - 3, middle)
    yield (f"<text x='{(split + fold) // 2}' y='{middle - 6}' "
           f"text-anchor='middle' fill='{GREY}'>dw', db'</text>")
    yield from draw_operation('through fold', fold, top, WIDTH - fold)
    for x in ((conv + split) // 2, (fold + WIDTH) // 2):
        yield arrow(x, top + BOX_HEIGHT + 3, x, below - 3)
    yield from draw_map('dX', False, (conv + split - MAP_WIDTH) // 2, below)
    yield (f"<text x='{WIDTH}' y='{below + 18}' text-anchor='end' "
           f"fill='{GREY}'>dw, dgamma, dbeta</text>")


DRAWINGS = {'block.svg': drawing, 'call.svg': call_drawing}


# --------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------

# Backbones whole, and detectors with the stages frozen that their configs
# freeze, from what saves most to what saves least.
BACKBONES = ('HRNetV2-W32', 'RegNetX-3.2GF', 'ResNeXt-101 32x4d', 'ResNet-101',
             'ResNet-50', 'ResNet-18', 'MobileNetV2', 'CSPNeXt-S',
             'EfficientNet-B3')
DETECTORS = {
    'Faster R-CNN, HRNetV2p-W32': 'faster-rcnn_hrnetv2p-w32',
    'Faster R-CNN, ResNet-50': 'faster-rcnn_r50_fpn',
    'Mask R-CNN, ResNet-50': 'mask-rcnn_r50_fpn',
    'RetinaNet, ResNet-50': 'retinanet_r50_fpn',
}

# As tests/benchmarks/activations.py calls them; of training, the first is
# stock.
PAPERS_TUNE = 'Tune, stock activations'
TRAINING_MODES = ('Train', 'Tune, BN trains')


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown, with numbers to the right."""
    rows = list(rows)
    if not rows:
        return 'None.'
    sides = ['---:' if cell[:1].isdigit() else '---' for cell in rows[0]]
    lines = [titles, sides, *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def savings() -> str:
    """Write what a whole training step takes in Eval and in Tune mode."""
    architectures = read('reproduction/architectures.json')['rows']
    detectors = read('reproduction/table4.json')['rows']
    steps = {
        row['name']: row['modes']
        for row in architectures
        if row['setting'] == 'backbone, as in detection'
    }
    named = [(name, steps[name]) for name in BACKBONES]
    named += [(name, detector_step(detectors, config))
              for name, config in DETECTORS.items()]
    return table(
        ('network', 'Eval (MiB)', 'Tune (MiB)', 'saved'),
        [saving(name, modes) for name, modes in named])


def kept() -> str:
    """Write what a forward of each backbone keeps for backward."""
    records = figures('cost.json')
    record, = (r for r in records
               if r['benchmark'] == 'kept' and r['device'] == 'CPU')
    modes = ('Eval', 'MMEngine', 'Tune', 'Deploy')
    rows = [(row['case']['backbone'], unbroken(row['case']['input']),
             *(f'{row["values"][mode][0] / MIB:.1f}' for mode in modes))
            for row in record['rows']]
    return table(('backbone', 'images', *modes), rows)


def ways() -> str:
    """Write what a block keeps in each of the ways that there are."""
    counted = figures('ways.json')
    activations = list(counted['rows']['stock'])
    rows = [(way, *(f'{counts[name]:.2f}' for name in activations))
            for way, counts in counted['rows'].items()]
    return table(('maps that a block keeps', *(
        f'with {name}' for name in activations)), rows) + (
        f'\n\n`{counted["command"]}`, blocks of 64 channels and maps of '
        f'{counted["size"]} x {counted["size"]}; torch {counted["torch"]}; '
        f'commit {counted["commit"]}.')


def combinations() -> str:
    """Write what Tune mode does together with other ways to save memory."""
    measured = figures('combinations.json')
    found = measured['found']
    height, width = found['image']
    rows = [(row['other'], row['mode'], mib(row['kept']), mib(row['peak']),
             '{1:.2f} ({0:.2f}-{2:.2f})'.format(*row['time']))
            for row in found['rows']]
    return (f'A training step of a ResNet-{found["depth"]} at 2 x 3 x '
            f'{height} x {width}.\n\n' + table(
                ('together with', 'mode', 'kept (MiB)', 'peak (MiB)',
                 'time / Eval'), rows) +
            f'\n\n{origin(measured)}.')


def libraries() -> str:
    """Write what a step of other libraries' models saves."""
    measured = figures('libraries.json')
    rows = [(row['name'], row['package'],
             unbroken(f'{row["batch"]} x 3 x {row["size"]} x {row["size"]}'),
             *(mib(row[mode][figure]) for figure in ('kept', 'peak')
               for mode in ('Eval', 'Tune')),
             '{1:.2f} ({0:.2f}-{2:.2f})'.format(*row['time']))
            for row in measured['found']['rows']]
    versions = ', '.join(f'{name} {version}' for name, version in
                         measured['packages'].items())
    return table(
        ('model', 'library', 'images', 'kept, Eval', 'kept, Tune',
         'peak, Eval', 'peak, Tune', 'time / Eval'), rows) + (
        f'\n\n{origin(measured, ", " + versions)}; commit '
        f'{measured["commit"]}.')


def activations_kept() -> str:
    """Write what forwards keep where activations keep one map."""
    measured = figures('activations.json')
    modes = ('Eval', 'Deploy', PAPERS_TUNE, 'Tune')
    rows = []
    for row in measured['found']['networks']:
        bytes_kept, aims = row['kept'], measured['aims']['networks'][
            row['name']]
        rows.append((row['name'], *(mib(bytes_kept[mode]) for mode in modes),
                     judged(bytes_kept['Tune'] / bytes_kept['Eval'],
                            aims['of_eval']),
                     judged(bytes_kept['Tune'] / bytes_kept['Deploy'],
                            aims['of_deploy'])))
    chain = measured['found']['chain']['kept']
    eight = ('eight blocks with SiLU', *(mib(chain[mode]) for mode in modes),
             judged(chain['Tune'] / chain['Eval']),
             judged(chain['Tune'] / chain['Deploy']))
    return table(('network', *modes, 'Tune / Eval', 'Tune / Deploy'),
                 [*rows, eight])


def activations_in_training() -> str:
    """Write what forwards keep where BatchNorms train."""
    measured = figures('activations.json')
    return table(
        ('network', 'stock', 'Tune', 'Tune / stock'),
        [(row['name'], *(mib(row['kept'][mode]) for mode in TRAINING_MODES),
          judged(row['kept'][TRAINING_MODES[1]] / row['kept']['Train'],
                 measured['aims']['networks'][row['name']]['of_train']))
         for row in measured['found']['networks']])


def activations_of_detectors() -> str:
    """Write what steps of detectors take where BatchNorms train."""
    measured = figures('activations.json')
    height, width = measured['found']['image']
    rows = []
    for row in measured['found']['detectors']:
        stock, tuned = (row['steps'][mode] for mode in TRAINING_MODES)
        saved, aim = 1 - tuned['peak'] / stock['peak'], (
            measured['aims']['detectors'][row['name']])
        verdict = 'met' if saved >= aim else 'missed'
        rows.append((row['name'],
                     *(mib(step['kept']) for step in (stock, tuned)),
                     *(mib(step['peak']) for step in (stock, tuned)),
                     f'{saved:.0%} (at least {aim:.0%}: {verdict})'))
    return (f'2 x 3 x {height} x {width}, in MiB.\n\n' + table(
        ('detector', 'kept, stock', 'kept, Tune', 'peak, stock', 'peak, Tune',
         'saved of the peak'), rows))


def activations_time() -> str:
    """Write how long a step takes where activations keep one map."""
    measured = figures('activations.json')
    found, slowest = measured['found'], measured['aims']['slowest']
    named = [*((row['name'], row['time']) for row in found['networks']),
             ('eight blocks with SiLU', found['chain']['time'])]
    return table(
        ('network', 'time / with stock activations', 'quartiles'),
        [(name, judged(median, slowest), f'{low:.2f}-{high:.2f}')
         for name, (low, median, high) in named])


def activations_origin() -> str:
    """Write what the figures of the page on activations come from."""
    measured = figures('activations.json')
    return f'{origin(measured)}; commit {measured["commit"]}.'


def origin(measured: dict, packages: str = '') -> str:
    """Write by which command, on what and how often something was timed."""
    return (f'`{measured["command"]}` on {measured["cpu"]} '
            f'({measured["cores"]} cores), threads: {measured["threads"]}; '
            f'torch {measured["torch"]}{packages}; rounds: '
            f'{measured["found"]["rounds"]}')


def judged(value: float, most: float | None = None) -> str:
    """Write a ratio, and whether it is as small as it was aimed at."""
    if most is None:
        return f'{value:.2f}'
    verdict = 'met' if value <= most else 'missed'
    return f'{value:.2f} (at most {most:.2f}: {verdict})'


def sweeps() -> str:
    """Write what each sweep found, a library a row."""
    return table(
        ('library', 'networks', 'wrong', 'raised', 'not compared', 'eligible',
         'fused', 'share'),
        [sweep(name, found) for name, found in read_sweeps().items()])


def sweep(name: str, found: dict) -> tuple[str, ...]:
    """Write the row of a library."""
    package, version = next(iter(found['versions'].items()))
    eligible, fused = map(sum, zip(*found['networks'].values()))
    counts = (len(found['networks']), len(found['wrong']),
              len(found['raised']), len(found['skipped']), eligible, fused)
    return (f'{package} {version}', *map(str, counts),
            f'{fused / eligible:.1%}')


def left_out() -> str:
    """Write why eligible blocks of the sweeps were not fused."""
    return table(('library', 'blocks', 'reason', 'one of the networks'),
                 [(name, str(count), code(reason), code(network))
                  for name, found in read_sweeps().items()
                  for reason, (count, network) in found['left_out'].items()])


def skipped() -> str:
    """Write why networks were not compared with stock, a reason a row."""
    networks: dict[tuple[str, str], list[str]] = {}
    for name, found in read_sweeps().items():
        for network, text in found['skipped'].items():
            # The rest of a message is advice, or sizes that differ.
            reason = text.partition('. ')[0]
            networks.setdefault((name, reason), []).append(code(network))
    return table(('library', 'reason', 'networks'),
                 [(name, code(reason), ', '.join(named))
                  for (name, reason), named in networks.items()])


def sweep_runs() -> str:
    """Write on what each sweep ran."""
    return table(('command', 'CPU', 'version', 'commit', 'beside it'),
                 [(code(found['command']),
                   f'{found["cpu"]} ({found["cores"]} cores)',
                   f'torch {found["torch"]}', found['commit'],
                   ', '.join(map(' '.join, list(
                       found['versions'].items())[1:])) or '-')
                  for found in read_sweeps().values()])


def code(text: str) -> str:
    """Write a text as it is into a cell."""
    return f"`{text.replace('|', '/').replace('`', '')}`"


def read_sweeps() -> dict[str, dict]:
    """Read what the sweeps of all libraries found."""
    return json.loads((DOCS / 'sweeps.json').read_text())


def unbroken(shape: str) -> str:
    """Write a shape so that no cell breaks it into lines."""
    return shape.replace(' x ', '×')


def mib(n_bytes: int | None) -> str:
    """Write bytes in MiB, or that there is no figure."""
    return '' if n_bytes is None else f'{n_bytes / MIB:.1f}'


def detector_step(rows: Sequence[dict], config: str) -> dict:
    """Find the step of a config at batch 2."""
    row, = (row for row in rows if row['name'] == f'{config}_tune-1x_coco')
    return row['steps']['2']


def saving(name: str, modes: dict) -> tuple[str, ...]:
    """Write a row: the peak of a step with all that is there all the time."""
    eval_mode, tune = (modes[mode]['peak'] + modes[mode]['resident']
                       for mode in ('Eval', 'Tune'))
    return (name, f'{eval_mode / MIB:.0f}', f'{tune / MIB:.0f}',
            f'{1 - tune / eval_mode:.0%}')


def read(name: str) -> dict:
    """Read what a reproduction found."""
    return figures(name)['found']


def figures(name: str) -> Any:
    """Read a file of figures."""
    return json.loads((DOCS / name).read_text())


# What a page has between `<!-- NAME -->` and `<!-- end of NAME -->`.
TABLES = {
    'activations.md': {
        'kept': activations_kept,
        'train': activations_in_training,
        'detectors': activations_of_detectors,
        'time': activations_time,
        'origin': activations_origin,
    },
    'comparison.md': {'ways': ways, 'kept': kept,
                      'combinations': combinations},
    'index.md': {'savings': savings},
    'libraries.md': {'libraries': libraries},
    'sweeps.md': {'sweeps': sweeps, 'left out': left_out, 'skipped': skipped,
                  'runs': sweep_runs},
}


def page(name: str) -> str:
    """Write a page's tables anew.

    Args:
        name (str): Of the page, in docs/en.

    Returns:
        str: The whole page.
    """
    text = (DOCS / name).read_text()
    for marker, write in TABLES[name].items():
        start, end = f'<!-- {marker} -->\n', f'<!-- end of {marker} -->'
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f'{name} needs one place between {start.strip()} '
                             f'and {end}')
        before, _, rest = text.partition(start)
        text = f'{before}{start}\n{write()}\n\n{end}{rest.partition(end)[2]}'
    return text


def main() -> None:
    """Write the drawings and the pages."""
    for name, draw in DRAWINGS.items():
        (DOCS / '_static' / name).write_text(draw())
    for name in TABLES:
        (DOCS / name).write_text(page(name))


if __name__ == '__main__':
    main()
