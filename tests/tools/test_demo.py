"""tools/demo.py: what it reads, compares and draws, and a short whole run."""
import importlib.util
import io
import json
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from rich.console import Console

from tests.tools.synthetic import fill, shorten

ROOT = Path(__file__).parents[2]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(
        Path(name).stem, ROOT / 'tools' / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_tool('demo.py')

SUMMARY = dict(
    modes=dict(
        Eval=dict(
            mAP=0.125,
            AP50=0.5,
            bytes_kept=100 << 20,
            peak_bytes=200 << 20,
            peak_rss=1000 << 20,
            seconds=0.5),
        Tune=dict(
            mAP=0.12,
            AP50=0.51,
            bytes_kept=50 << 20,
            peak_bytes=150 << 20,
            peak_rss=900 << 20,
            seconds=0.45)),
    loss_difference=dict(first=1e-7, first_10=2e-4, all=0.3))


def write_scalars(run_dir, lines):
    path = run_dir / '20240101_000000/vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, lines)))


def iteration(step, loss):
    return dict(loss=loss, loss_cls=loss / 2, time=step / 10, step=step)


def test_scalars_are_read(tmp_path):
    write_scalars(tmp_path, [
        iteration(1, 2.0),
        {'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_50': 0.2, 'step': 1},
        iteration(2, 1.5),
        {'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.4, 'step': 2},
    ])
    assert demo.read_scalars(tmp_path) == dict(
        losses=[2.0, 1.5], seconds=[0.1, 0.2], mAP=0.3, AP50=0.4)


def test_a_run_that_detects_nothing_has_no_accuracy(tmp_path):
    write_scalars(tmp_path, [iteration(1, 2.0)])
    run = demo.read_scalars(tmp_path)
    assert run['mAP'] == run['AP50'] == 0


def test_loss_differences():
    losses = [1.0] * 30
    others = list(losses)
    others[0] += 0.001
    others[7] -= 0.01
    others[12] += 0.1
    assert demo.loss_differences(losses, others) == pytest.approx(
        dict(first=0.001, first_10=0.01, all=0.1))


def test_table():
    file = io.StringIO()
    Console(file=file, width=80).print(demo.make_table(SUMMARY))
    cells = [
        line.replace('│', ' ').split() for line in file.getvalue().split('\n')
    ]
    assert 'Eval 0.125 0.500 100.0 MiB 200.0 MiB 1000 MiB 0.500 s'.split(
    ) in cells
    assert 'Tune 0.120 0.510 50.0 MiB 150.0 MiB 900 MiB 0.450 s'.split(
    ) in cells
    assert 'change -0.005 +0.010 -50.0% -25.0% -10.0% -10.0%'.split() in cells
    assert '1.0e-07 in the first iteration' in file.getvalue()


def test_output_becomes_progress(capsys):
    lines = [
        'starting\n',
        'INFO - Iter(train) [ 20/200]  lr: 1e-3  loss: 1.2345  time: 0.5\n',
        'INFO - Iter(train) [200/200]  lr: 1e-3  loss: 0.5  time: 0.5\n',
    ]
    assert demo.follow('Eval', iter(lines)) == ''.join(lines)
    shown = capsys.readouterr().out
    assert 'Eval: loss 1.23, 20/200' in shown
    assert 'Eval: loss 0.50, 200/200' in shown


def test_only_the_end_of_a_long_output_is_shown():
    assert demo.follow('Eval', map('{}\n'.format, range(99))).startswith(
        '59\n60\n')


@pytest.fixture
def finished(tmp_path):
    """A finished run and its config."""
    config = Config(dict(train_cfg=dict(max_iters=7)))
    (tmp_path / 'iter_7.pth').touch()
    (tmp_path / 'run.json').write_text(
        json.dumps(dict(config=config.pretty_text)))
    return tmp_path, config


def test_finished_run_is_recognised(finished):
    assert demo.is_finished(*finished)


@pytest.mark.parametrize('name', ['iter_7.pth', 'run.json'])
def test_unfinished_run_is_recognised(finished, name):
    folder, config = finished
    (folder / name).unlink()
    assert not demo.is_finished(folder, config)


def test_run_of_another_config_is_recognised(finished):
    folder, config = finished
    config.lr = 0.1
    assert not demo.is_finished(folder, config)


def test_failing_run_shows_its_output(tmp_path, capsys):
    with pytest.raises(SystemExit, match='(?s)no_config.*in Eval mode failed'):
        demo.train('Eval', tmp_path / 'no_config.py', tmp_path / 'run')
    assert not (tmp_path / 'run/run.json').exists()


def test_failing_tool_stops_the_demo():
    with pytest.raises(SystemExit, match='download_dataset.py failed'):
        demo.run_tool('misc/download_dataset.py', '--dataset-name', 'shrubs')


def test_plot(tmp_path):
    losses = dict(Eval=[3.0, 2.0], Tune=[3.0, 2.1])
    demo.plot_comparison(losses, SUMMARY['modes'], tmp_path / 'plot.png')
    image = mmcv.imread(tmp_path / 'plot.png')
    assert image.std() > 10
    changed = dict(losses, Tune=[3.0, 1.0])
    demo.plot_comparison(changed, SUMMARY['modes'], tmp_path / 'other.png')
    assert (mmcv.imread(tmp_path / 'other.png') != image).any()


@pytest.mark.parametrize('score, drawn', [(0.9, True), (0.1, False)])
def test_picture_shows_annotations_and_sure_detections(tmp_path, score, drawn):
    mmcv.imwrite(np.zeros((120, 160, 3), np.uint8), str(tmp_path / 'in.png'))
    sample = DetDataSample(
        metainfo=dict(img_path=str(tmp_path / 'in.png')),
        gt_instances=InstanceData(bboxes=torch.tensor([[10., 10, 60, 60]])),
        ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)),
        pred_instances=InstanceData(
            bboxes=torch.tensor([[20., 20, 90, 90]]),
            scores=torch.tensor([score])))
    demo.draw_sample(sample, tmp_path / 'out.png')
    picture = mmcv.imread(tmp_path / 'out.png', channel_order='rgb')
    left, right = np.split(picture, [picture.shape[1] // 2], axis=1)
    yellow, cyan = (255, 255, 0), (0, 255, 255)
    assert (left == yellow).all(-1).sum() > 50
    assert not (right == yellow).all(-1).any()
    assert ((right == cyan).all(-1).sum() > 50) == drawn


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder where data and weights are there, and training is short."""
    fill(tmp_path, monkeypatch, crops=2)
    shorten(demo.MODES, tmp_path, monkeypatch, iterations=3)
    return demo.WORK_DIR


@pytest.mark.slow
def test_whole_demo(place, capsys, monkeypatch):
    demo.main()
    shown = capsys.readouterr().out
    assert 'Largest difference of the losses' in shown
    summary = json.loads((place / 'table.json').read_text())
    stock, tune = summary['modes']['Eval'], summary['modes']['Tune']
    assert tune['bytes_kept'] < 0.9 * stock['bytes_kept']
    assert tune['peak_bytes'] < stock['peak_bytes']
    assert stock['peak_rss'] > 100 << 20 and stock['seconds'] > 0
    assert summary['loss_difference']['first'] < 1e-5
    assert (place / 'comparison.png').is_file()
    pictures = sorted(
        path.name for path in (place / 'detections').iterdir())
    assert pictures == ['0000_0000.png', '0128_0000.png']

    # A second time everything is reused ...
    with monkeypatch.context() as patch:
        patch.setattr(demo, 'train', None)
        patch.setattr(demo, 'compare', None)
        demo.main()
    assert 'Largest difference of the losses' in capsys.readouterr().out

    # ... but what was lost is made anew, and compared again.
    lost = place / 'tune/iter_3.pth'
    lost.unlink()
    trained = []
    monkeypatch.setattr(demo, 'train', lambda mode, *_: trained.append(mode))
    monkeypatch.setattr(demo, 'compare', lambda configs: summary)
    demo.main()
    assert trained == ['Tune'] and (place / 'table.json').is_file()
