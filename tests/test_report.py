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
        '1 blocks in Tune mode; 2 left out: its input comes from `relu`')


def test_table():
    assert str(REPORT).splitlines() == [
        'conv         bn         mode   reason',
        '-----------  ---------  -----  ------',
        'layer1.conv  layer1.bn  Tune',
        '-            bn         stock  its input comes from `relu`',
        'conv         bn2        stock  its input comes from `relu`',
        REPORT.summary(),
    ]
