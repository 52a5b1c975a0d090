from mmtune.report import Report, Row

REPORT = Report('Tune', [
    Row('layer1.conv', 'layer1.bn', 'Tune'),
    Row(None, 'bn', 'stock', 'its input comes from `relu`'),
    Row('conv', 'bn2', 'stock', 'its input comes from `relu`'),
])


def test_rows_by_what_became_of_them():
    assert REPORT.rewritten == REPORT.rows[:1]
    assert REPORT.left_out == REPORT.rows[1:]


def test_summary():
    assert REPORT.summary() == (
        '1 block in Tune mode; 2 left out: its input comes from `relu`')


def test_table():
    assert str(REPORT).splitlines() == [
        'conv         bn         mode   reason',
        '-----------  ---------  -----  ------',
        'layer1.conv  layer1.bn  Tune',
        '-            bn         stock  its input comes from `relu`',
        'conv         bn2        stock  its input comes from `relu`',
        REPORT.summary(),
    ]


def test_summary_says_what_runs_as_stock_for_now():
    report = Report('Tune', REPORT.rows[:1], in_train_mode=1)
    assert '1 of them with their BatchNorm in train mode' in report.summary()
    assert 'norm_eval=True' in str(report)


def test_many_rows_of_one_reason_are_one_line():
    """Where they are few, or of several reasons, each has its own."""
    reason = 'its input comes from `cat`'
    rows = [Row('stem', 'bn', 'Tune')]
    for i in range(4):
        rows += [Row(None, f'layer{i}.bn1', 'stock', reason),
                 Row(f'layer{i}.conv', f'layer{i}.bn2', 'Tune'),
                 Row(None, f'layer{i}.bn3', 'stock', f'another {i % 2}')]
    table = str(Report('Tune', rows)).splitlines()
    first, = (line for line in table[:-1] if reason in line)
    assert 'layer0.bn1 and 3 more' in first
    assert len(table) == 2 + 5 + 1 + 4 + 1
    assert '4 left out: ' + reason in table[-1]
