# What is tuned, and how. The hook that reads this key stands in each config:
# MMEngine refuses a key that two bases share, as default_hooks would be.
efficient_conv_bn_eval = dict(modules=['backbone'], mode='Tune')
