"""Run a function in a process of its own, which may hang, or crash."""
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

# What the parent has imported is there without being imported again.
FORK = multiprocessing.get_context('fork')


class Failed(Exception):
    """The process gave no result.

    Args:
        reason (str): How it ended.
        doing (str): What it told last.
    """

    def __init__(self, reason: str, doing: str) -> None:
        super().__init__(f'{reason} while {doing}')
        self.doing = doing


def isolated(function: Callable, *args: Any, seconds: float) -> Any:
    """Call ``function(*args, tell)`` in a process of its own.

    Args:
        function (Callable): It may say by ``tell(text)`` what it is doing.
        *args: To hand on.
        seconds (float): How long it may take.

    Returns:
        What the function returns.

    Raises:
        Failed: If it takes longer, or the process ends without a result.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_serve, args=(function, args, sender))
    process.start()
    sender.close()
    doing, result = 'starting', None
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            doing, result = receiver.recv()
            if not doing:
                return result
        raise Failed(f'it took more than {seconds:g} seconds', doing)
    except EOFError:
        process.join()
        raise Failed(f'the process ended with {process.exitcode}',
                     doing) from None
    finally:
        process.kill()
        process.join()


def _serve(function: Callable, args: tuple, sender: Any) -> None:
    result = function(*args, lambda doing: sender.send((doing, None)))
    sender.send(('', result))
