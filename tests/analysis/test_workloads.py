"""Batches and losses where there is no data."""
import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.nn import functional as F

from mmtune.analysis.sources import build_model, load_config
from mmtune.analysis.workloads import detection_workload, image_workload

TREES = 'configs/trees/retinanet_mobilenet-v2_fpn_250i_trees.py'
SHAPE = (96, 128)


class Spy:
    """Stands for a detector, and keeps what it is given."""

    def __call__(self, images, samples, mode):
        assert mode == 'loss'
        self.images, self.samples = images, samples
        return dict(loss=images.sum())

    def parse_losses(self, losses):
        return losses['loss'], {}


@pytest.fixture(scope='module')
def trees():
    config = load_config(TREES)
    return config, build_model(config)


def samples_of(workload):
    spy = Spy()
    workload.loss(spy, workload.images)
    return spy.samples


def test_images_are_always_the_same():
    images = image_workload((4, 6), 2).images
    assert images.shape == (2, 3, 4, 6)
    assert torch.equal(images, image_workload((4, 6), 2).images)
    assert .5 < images.std() < 1.5


def test_the_loss_of_a_classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    workload = image_workload((4, 6), 2)
    found = workload.loss(model, workload.images)
    output = model(workload.images)
    candidates = [
        F.cross_entropy(output, torch.tensor([i, j])) for i in range(5)
        for j in range(5)
    ]
    assert any(torch.equal(found, candidate) for candidate in candidates)
    assert torch.equal(found, workload.loss(model, workload.images))


@pytest.mark.parametrize('forward', [
    lambda x: x,
    lambda x: (x, ),
    lambda x: dict(out=x, classes=torch.ones(2, dtype=torch.int64)),
])
def test_the_loss_of_maps(forward):
    workload = image_workload((4, 6), 2)
    found = workload.loss(forward, workload.images)
    torch.testing.assert_close(found, (workload.images**2).mean())


def test_the_loss_of_several_maps():
    workload = image_workload((4, 6), 2)
    found = workload.loss(lambda x: [x, 2 * x.half()], workload.images)
    expected = (workload.images**2).mean()
    torch.testing.assert_close(found, 5 * expected, rtol=1e-3, atol=0)


def test_sgd_trains_what_learns():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    updater = image_workload((4, 6), 2).updater(model)
    before = [p.detach().clone() for p in model.parameters()]
    updater.update_params(model(torch.ones(1, 2)).sum())
    changed = [
        not torch.equal(p, old) for p, old in zip(model.parameters(), before)
    ]
    assert changed == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_a_detector_and_its_batch(trees):
    config, model = trees
    workload = detection_workload(config, model, SHAPE, 3)
    assert workload.images.shape == (3, 3, *SHAPE)
    assert workload.images.dtype == torch.float32
    # Normalized as the model's preprocessor says.
    assert abs(workload.images.mean()) < 1 < workload.images.std()
    samples = samples_of(workload)
    assert len(samples) == 3
    for sample in samples:
        boxes = sample.gt_instances.bboxes
        size = boxes[:, 2:] - boxes[:, :2]
        assert boxes.shape == (7, 4)
        assert (size > 15.99).all()
        assert (size < torch.tensor([64.01, 48.01])).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([128, 96])).all()
        # Trees are the one class of this config.
        assert sample.gt_instances.labels.tolist() == [0] * 7
        assert 'masks' not in sample.gt_instances
        assert 'gt_sem_seg' not in sample
    again = detection_workload(config, model, SHAPE, 3)
    assert torch.equal(again.images, workload.images)
    # An image more changes nothing in those before.
    for more, sample in zip(
            samples_of(detection_workload(config, model, SHAPE, 4)), samples):
        torch.testing.assert_close(more.gt_instances.bboxes,
                                   sample.gt_instances.bboxes)


def test_the_loss_of_a_detector_is_its_own(trees):
    config, model = trees
    workload = detection_workload(config, model, SHAPE, 2)
    found = workload.loss(model, workload.images)
    expected = model(workload.images, samples_of(workload), mode='loss')
    total = sum(sum(v) for k, v in expected.items() if 'loss' in k)
    assert found.item() == pytest.approx(total.item())


def test_masks_and_maps_where_the_pipeline_loads_them(trees):
    config, model = trees
    config = Config(dict(
        model=dict(heads=[dict(num_classes=9), dict(num_classes=4)]),
        optim_wrapper=config.optim_wrapper,
        train_dataloader=dict(dataset=dict(dataset=dict(pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_mask=True, with_seg=True),
        ])))))
    sample, = samples_of(detection_workload(config, model, SHAPE, 1))
    assert sample.gt_instances.labels.max() < 4
    assert sample.gt_sem_seg.sem_seg.shape == (1, 12, 16)
    assert sample.gt_sem_seg.sem_seg.max() < 4
    boxes = sample.gt_instances.bboxes.int()
    for mask, (left, top, right, bottom) in zip(
            sample.gt_instances.masks.masks, boxes.tolist()):
        assert mask.sum() == (right - left) * (bottom - top) > 0
        assert mask[top:bottom, left:right].all()


def test_the_optimizer_is_that_of_the_config(trees):
    config, model = trees
    amp = Config(config.to_dict())
    amp.optim_wrapper.update(
        type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic',
        accumulative_counts=4)
    for each in (config, amp):
        updater = detection_workload(each, model, SHAPE, 1).updater(model)
        assert type(updater).__name__ == 'OptimWrapper'
        assert isinstance(updater.optimizer, torch.optim.AdamW)
        rates = {group['lr'] for group in updater.optimizer.param_groups}
        assert rates == {.002, .0002}
        weight = model.bbox_head.retina_cls.weight
        before = weight.detach().clone()
        updater.update_params(weight.sum())
        assert not torch.equal(weight, before)
    assert amp.optim_wrapper.type == 'AmpOptimWrapper'


def test_what_is_no_detector(trees):
    with pytest.raises(ValueError, match='but is a Linear; pass.*--model'):
        detection_workload(trees[0], nn.Linear(2, 2), SHAPE, 1)


@pytest.mark.parametrize('settings', [
    None, {}, dict(constructor='mine', generator=dict(optimizer=dict()))
])
def test_a_config_without_one_optimizer(trees, settings):
    config = Config(dict(model=dict(), optim_wrapper=settings))
    with pytest.raises(ValueError, match='one `optim_wrapper` with an'):
        detection_workload(config, trees[1], SHAPE, 1)
