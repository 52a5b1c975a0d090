# mmpretrain has the dataset, but no config: its CUB-200 recipe on Cars.
_base_ = 'mmpretrain::resnet/resnet50_8xb8_cub.py'

model = dict(head=dict(num_classes=196))
data_preprocessor = dict(num_classes=196)

train_dataloader = dict(
    dataset=dict(type='StanfordCars', data_root='data/Stanford_Cars'))
val_dataloader = dict(
    dataset=dict(type='StanfordCars', data_root='data/Stanford_Cars'))
test_dataloader = val_dataloader
