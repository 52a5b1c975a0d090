"""What a config says of the modes."""
from collections.abc import Mapping
from typing import Any

__all__ = ['CONFIG_KEY', 'OPTIONS', 'merge_options']

CONFIG_KEY = 'efficient_conv_bn_eval'
OPTIONS = ('modules', 'mode', 'norm_eval', 'activations', 'begin')


def merge_options(key: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Put together what a config's key and a hook's arguments ask for.

    Args:
        key (str | Sequence[str] | dict, optional): The value of
            ``efficient_conv_bn_eval``: names of submodules, or a dict of
            :data:`OPTIONS`.
        arguments (Mapping[str, Any]): Of
            :class:`mmtune.hooks.TuneModeHook`. Where they are not None, they
            win over the key.

    Returns:
        dict[str, Any]: What is given of :data:`OPTIONS`; always ``mode``.

    Raises:
        ValueError: If the key is of another type or has other options, or
            the mode is no name.
    """
    if key is None:
        options = {}
    elif isinstance(key, dict):
        options = dict(key)
    elif isinstance(key, (str, list, tuple)):
        options = dict(modules=key)
    else:
        raise ValueError(
            f'`{CONFIG_KEY}` must be a name, a list of names or a dict, '
            f'but got {key!r}')
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise ValueError(
            f'`{CONFIG_KEY}` takes {", ".join(OPTIONS)}, but got '
            f'{", ".join(sorted(unknown))}')
    options.update({
        name: value
        for name, value in arguments.items() if value is not None
    })
    if options.get('mode') is None:
        options['mode'] = 'Tune'
    if not isinstance(options['mode'], str):
        raise ValueError('`mode` must be a name, but got '
                         f'{options["mode"]!r}')
    return options
