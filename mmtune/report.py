"""What :func:`mmtune.turn_on` did, block by block."""
from collections import Counter
from dataclasses import dataclass, field

__all__ = ['Report', 'Row']

# From more rows than these on, a reason has one line in the table.
MANY = 3


@dataclass(frozen=True)
class Row:
    """One block, or one normalization that belongs to none.

    Attributes:
        conv (str, optional): Name of the convolution, None where the
            normalization does not follow one.
        bn (str): Name of the normalization, a BatchNorm most often.
        mode (str): ``'Train'``, ``'Eval'``, ``'Tune'`` or ``'Deploy'``, or
            ``'stock'`` for what is left out.
        reason (str): Why it is left out, else empty.
    """

    conv: str | None
    bn: str
    mode: str
    reason: str = ''


@dataclass
class Report:
    """Rows for every block and normalization of the chosen modules.

    ``print(report)`` shows them as a table.

    Attributes:
        mode (str): The mode that was asked for.
        rows (list[Row]): In the order of the model's forwards.
        in_train_mode (int): How many of the blocks in Tune mode have their
            BatchNorm in train mode at this moment, where they run as stock.
        activations (list[str]): Names of the activations that are to keep
            one map.
    """

    mode: str
    rows: list[Row] = field(default_factory=list)
    in_train_mode: int = 0
    activations: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Row]:
        """The rows that run in the mode asked for."""
        return [row for row in self.rows if row.mode != 'stock']

    @property
    def left_out(self) -> list[Row]:
        """The rows that run as stock, each with its reason."""
        return [row for row in self.rows if row.mode == 'stock']

    def summary(self) -> str:
        """Count blocks, and the reasons of those left out, in a line."""
        count = len(self.rewritten)
        text = f'{count} block{"s" * (count != 1)} in {self.mode} mode'
        if self.in_train_mode:
            text += (f', {self.in_train_mode} of them with their BatchNorm in '
                     'train mode now, which runs as stock (norm_eval=True '
                     'holds it in eval mode)')
        if self.activations:
            count = len(self.activations)
            text += (f'; {count} activation{"s" * (count != 1)} to keep one '
                     'map (those called as functions stay as they are)')
        reasons = Counter(row.reason for row in self.left_out)
        for reason, count in reasons.most_common():
            text += f'; {count} left out: {reason}'
        return text

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [('conv', 'bn', 'mode', 'reason')]
        lines += self._lines()
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        lines.insert(1, tuple('-' * width for width in widths) + ('------', ))
        table = [
            '  '.join([cell.ljust(width) for cell, width in zip(line, widths)]
                      + [line[3]]).rstrip() for line in lines
        ]
        return '\n'.join(table + [self.summary()])

    def _lines(self) -> list[tuple[str, ...]]:
        """A line a row; of many that a reason leaves out, the first alone."""
        counts = Counter(row.reason for row in self.left_out)
        lines: list[tuple[str, ...]] = []
        told = set()
        for row in self.rows:
            is_many = row.mode == 'stock' and counts[row.reason] > MANY
            if is_many and row.reason in told:
                continue
            told.add(row.reason)
            more = f' and {counts[row.reason] - 1} more' if is_many else ''
            lines.append((row.conv or '-', row.bn + more, row.mode,
                          row.reason))
        return lines
