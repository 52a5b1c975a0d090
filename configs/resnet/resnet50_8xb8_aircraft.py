# mmpretrain has the dataset, but no config: its CUB-200 recipe on Aircraft.
_base_ = 'mmpretrain::resnet/resnet50_8xb8_cub.py'

model = dict(head=dict(num_classes=100))
data_preprocessor = dict(num_classes=100)

train_dataloader = dict(
    dataset=dict(
        type='FGVCAircraft',
        data_root='data/fgvc-aircraft-2013b',
        split='trainval'))
val_dataloader = dict(
    dataset=dict(type='FGVCAircraft', data_root='data/fgvc-aircraft-2013b'))
test_dataloader = val_dataloader
