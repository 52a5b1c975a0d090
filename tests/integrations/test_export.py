"""Traces and exports of a model in Tune mode against those of stock."""
import io

import onnx
import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.analysis import get_model_complexity_info
from onnx.reference import ReferenceEvaluator
from torch.onnx._internal.torchscript_exporter import utils as onnx_utils

from mmtune import turn_on
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy
from tests.toy import ToyClassifier, conv_bns


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def resnet():
    torch.manual_seed(0)
    # Its `train` returns nothing.
    return randomize(ResNet(depth=18, norm_eval=False)).double()


def both(build, training=False):
    stock = build()
    stock.train(training)
    model = stock_copy(stock)
    turn_on(model)
    return stock, model


def kinds(graph):
    """What a TorchScript graph calls, constants and names left aside."""
    return [
        node.kind() for node in graph.nodes()
        if not node.kind().startswith('prim::')
    ]


@pytest.mark.parametrize('training', [False, True])
def test_jit_trace(training, x):
    """The traced model is the one that stock gives; it learns, is saved."""
    stock, model = both(conv_bns, training)
    traces = [torch.jit.trace(one, x, check_trace=False)
              for one in (stock, model)]
    graphs = [kinds(trace.inlined_graph) for trace in traces]
    assert graphs[0] == graphs[1] and 'aten::_convolution' in graphs[0]
    file = io.BytesIO()
    torch.jit.save(traces[1], file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for trace in (traces[1], loaded):
        trace.load_state_dict(traces[0].state_dict(), strict=False)
        expected, actual = step(traces[0], x + 1), step(trace, x + 1)
        actual = {k: v for k, v in actual.items()
                  if 'coeff' not in k and 'delta' not in k}
        assert_equal_steps(expected, actual)
        traces[0].load_state_dict(trace.state_dict(), strict=False)
    stock.load_state_dict(model.state_dict())
    assert_equal_steps(step(stock, x), step(model, x))
    assert runs(model) == ['train mode' if training else 'fused'] * 2


@pytest.mark.parametrize('build, shape', [
    (conv_bns, (3, 8, 8)),
    (resnet, (3, 64, 64)),
])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('warm', [False, True])
def test_model_complexity(build, shape, training, warm, x):
    """Figures of stock, and the model goes on as before."""
    stock, model = both(build, training)
    if warm:
        model(torch.randn(2, *shape, dtype=torch.float64))
        stock.load_state_dict(model.state_dict())
    results = [
        get_model_complexity_info(
            one, inputs=(torch.ones(1, *shape).double().expand(2, -1, -1, -1),
                         ))
        for one in (stock, model)
    ]
    for key in ('flops', 'params', 'activations', 'out_table'):
        assert results[0][key] == results[1][key], key
    assert results[0]['flops'] > 0
    x = torch.randn(2, *shape, dtype=torch.float64)
    stock.load_state_dict(model.state_dict())
    assert_equal_steps(step(stock, x), step(model, x))
    ran = 'train mode' if training else 'fused'
    assert set(runs(model)) == {ran}


def test_model_complexity_of_mmengines_own_model():
    """By shape, as MMEngine's `tools/get_flops.py` call it."""
    stock, model = both(ToyClassifier)
    for one in (stock, model):
        one.forward = lambda x, one=one: one.neck(one.backbone(x))
    results = [
        get_model_complexity_info(one, (3, 8, 8), show_table=False)
        for one in (stock, model)
    ]
    assert results[0]['flops_str'] == results[1]['flops_str']
    assert results[0]['params_str'] == results[1]['params_str']


def onnx_graph(model, x):
    """The graph that the TorchScript exporter of ONNX writes.

    Its last step, to a file, would ask for the package `onnx`.
    """
    with onnx_utils.exporter_context(
            model, torch.onnx.TrainingMode.EVAL, False):
        onnx_utils._trigger_symbolic_function_registration()
        onnx_utils.GLOBALS.export_onnx_opset_version = 17
        graph, parameters, _ = onnx_utils._model_to_graph(
            model, (x, ), do_constant_folding=True, input_names=['x'],
            training=torch.onnx.TrainingMode.EVAL, dynamic_axes={})
    return graph, parameters


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('build', [conv_bns, resnet])
def test_onnx_holds_plain_convolutions(build, training):
    """Whatever mode the model is in, the exporter puts it into eval mode."""
    stock, model = both(build, training)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    (expected_graph, expected), (graph, parameters) = (
        onnx_graph(one, x) for one in (stock, model))
    called = kinds(graph)
    assert called == kinds(expected_graph)
    assert 'onnx::BatchNormalization' not in called
    assert set(called) <= {'onnx::Conv', 'onnx::Relu', 'onnx::MaxPool',
                           'onnx::Add', 'onnx::Constant'}
    count = called.count('onnx::Conv')
    assert count == len(runs(model))
    assert len(parameters) == len(expected) == 2 * count
    for one, other in zip(expected.values(), parameters.values()):
        torch.testing.assert_close(one, other)
    assert model.training == training
    stock.load_state_dict(model.state_dict())
    assert_equal_steps(step(stock, x), step(model, x))


@pytest.mark.parametrize('dynamo', [False, True])
def test_onnx_file(dynamo):
    stock, model = both(lambda: conv_bns(torch.float32))
    x = torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.onnx.export(model, (x, ), file, dynamo=dynamo)
    exported = onnx.load_from_string(file.getvalue())
    called = [node.op_type for node in exported.graph.node]
    assert called == ['Conv', 'Relu', 'Conv']
    evaluator = ReferenceEvaluator(exported)
    y, = evaluator.run(None, {exported.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), stock(x).detach())


def operators(program):
    """What a program calls, beside the checks that export puts in."""
    return {node.target for node in program.graph.nodes
            if node.op == 'call_function' and '_assert' not in node.name}


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('learns', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_torch_export(training, learns, strict, x):
    stock, model = both(conv_bns, training)
    for one in (stock, model):
        one.requires_grad_(learns)
    batch = torch.export.Dim('batch', min=2, max=64)
    programs = [
        torch.export.export(
            one, (x, ), dynamic_shapes=({0: batch}, ), strict=strict)
        for one in (stock, model)
    ]
    normalizes = any('batch_norm' in str(operator)
                     for operator in operators(programs[1]))
    assert normalizes == training
    for size in (2, 5):
        y = torch.randn(size, 3, 8, 8, dtype=torch.float64)
        expected, actual = (p.module()(y) for p in programs)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    decomposed = [program.run_decompositions() for program in programs]
    signatures = [program.graph_signature for program in decomposed]
    assert signatures[0].parameters == signatures[1].parameters
    # In eval mode a program is to change nothing.
    assert list(signatures[0].buffers_to_mutate.values()) == list(
        signatures[1].buffers_to_mutate.values())
    # Those of core ATen can be run, or exported further, anywhere.
    for operator in operators(decomposed[1]) - operators(decomposed[0]):
        assert torch.Tag.core in operator.tags, operator
    file = io.BytesIO()
    torch.export.save(programs[1], file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-10, atol=1e-12)


def test_training_of_an_exported_program(x):
    stock, model = both(conv_bns)
    exported = torch.export.export(model, (x, )).module()
    torch.nn.functional.mse_loss(exported(x), x[:, :1, 1:-1, 1:-1].expand(
        -1, 4, -1, -1)).backward()
    torch.nn.functional.mse_loss(stock(x), x[:, :1, 1:-1, 1:-1].expand(
        -1, 4, -1, -1)).backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(
            exported.get_parameter(name).grad, parameter.grad, rtol=1e-10,
            atol=1e-12)
