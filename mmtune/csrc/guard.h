// Whether what a pair was known by is still so, asked in one call.
//
// Python checks a pair in full (mmtune/behaviours/known.py) and writes down what it saw:
// facts about dicts and classes, and what tensors and the thread's modes are
// like. Here both are compared with what there is now.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstring>

namespace mmtune {

// Numbers enough for the modes, the input and six tensors of five dimensions.
class Numbers {
 public:
  void add(int64_t number) {
    TORCH_CHECK(size_ < numbers_.size(), "too many numbers to compare");
    numbers_[size_++] = number;
  }
  PyObject* bytes() const {
    return PyBytes_FromStringAndSize(data(), length());
  }
  bool equals(PyObject* bytes) const {
    return PyBytes_GET_SIZE(bytes) == length() &&
        std::memcmp(PyBytes_AS_STRING(bytes), data(), length()) == 0;
  }

 private:
  const char* data() const {
    return reinterpret_cast<const char*>(numbers_.data());
  }
  Py_ssize_t length() const {
    return static_cast<Py_ssize_t>(size_ * sizeof(int64_t));
  }

  std::array<int64_t, 128> numbers_;
  size_t size_ = 0;
};

// A fact is (dict, its keys and values in a row) or (owner, name, value).
inline bool holds(PyObject* fact) {
  PyObject* owner = PyTuple_GET_ITEM(fact, 0);
  if (PyTuple_GET_SIZE(fact) == 3) {
    PyObject* value = PyObject_GetAttr(owner, PyTuple_GET_ITEM(fact, 1));
    if (value == nullptr) {
      PyErr_Clear();
      return false;
    }
    const bool same = value == PyTuple_GET_ITEM(fact, 2);
    Py_DECREF(value);
    return same;
  }
  PyObject* items = PyTuple_GET_ITEM(fact, 1);
  if (2 * PyDict_Size(owner) != PyTuple_GET_SIZE(items)) {
    return false;
  }
  PyObject* key;
  PyObject* value;
  Py_ssize_t position = 0;
  Py_ssize_t i = 0;
  while (PyDict_Next(owner, &position, &key, &value)) {
    if (PyTuple_GET_ITEM(items, i) != key ||
        PyTuple_GET_ITEM(items, i + 1) != value) {
      return false;
    }
    i += 2;
  }
  return true;
}

inline bool all_hold(PyObject* facts) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(facts); i++) {
    if (!holds(PyTuple_GET_ITEM(facts, i))) {
      return false;
    }
  }
  return true;
}

// By value: old versions of torch ask for a set that may change.
inline int64_t raw(c10::DispatchKeySet keys) {
  return static_cast<int64_t>(keys.raw_repr());
}

// Everything of the thread that decides what a call would do.
inline void add_modes(Numbers& numbers, c10::DeviceType device) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  numbers.add(raw(local.included_));
  numbers.add(raw(local.excluded_));
  numbers.add(c10::AutogradState::get_tls_state().get_grad_mode());
  numbers.add(c10::AutogradState::get_tls_state().get_fw_grad_mode());
  numbers.add(c10::AutogradState::get_tls_state().get_inference_mode());
  numbers.add(at::impl::PythonTorchFunctionTLS::stack_len());
  numbers.add(torch::autograd::get_current_graph_task_id() != -1);
  // Whether autocast is on is among the keys above.
  numbers.add(device == c10::kCPU || device == c10::kCUDA
                  ? static_cast<int64_t>(
                        at::autocast::get_autocast_dtype(device))
                  : -1);
}

inline const at::Tensor& unpack(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor");
  return THPVariable_Unpack(object);
}

// What of a tensor decides how it is computed with, its values apart.
inline void add_kind(Numbers& numbers, PyObject* object, bool is_input) {
  if (object == Py_None) {
    numbers.add(-1);
    return;
  }
  const at::Tensor& tensor = unpack(object);
  numbers.add(reinterpret_cast<intptr_t>(Py_TYPE(object)));
  numbers.add(raw(tensor.key_set()));
  numbers.add(static_cast<int64_t>(tensor.scalar_type()));
  numbers.add(static_cast<int64_t>(tensor.device().index()));
  numbers.add(tensor.dim());
  // Of an input, the channels alone are to stay what they were.
  for (int64_t i = is_input ? 1 : 0; i < (is_input ? 2 : tensor.dim()); i++) {
    numbers.add(i < tensor.dim() ? tensor.size(i) : -1);
  }
}

inline Numbers likeness(PyObject* x, PyObject* tensors) {
  Numbers numbers;
  add_modes(numbers, unpack(x).device().type());
  add_kind(numbers, x, true);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); i++) {
    add_kind(numbers, PyTuple_GET_ITEM(tensors, i), false);
  }
  return numbers;
}

// What tells that a tensor was changed: its version and its memory.
inline void add_state(Numbers& numbers, PyObject* object) {
  if (object == Py_None) {
    return;
  }
  const at::Tensor& tensor = unpack(object);
  numbers.add(tensor.is_inference() ? -1 : tensor._version());
  numbers.add(reinterpret_cast<intptr_t>(tensor.const_data_ptr()));
}

// What a pair is like now: to be compared by `unchanged` later.
inline py::object like(const py::object& x, const py::tuple& tensors) {
  return py::reinterpret_steal<py::object>(
      likeness(x.ptr(), tensors.ptr()).bytes());
}

// Whether each fact is as it was.
inline bool all_facts_hold(const py::tuple& facts) {
  return all_hold(facts.ptr());
}

// Versions and addresses of an input, a weight and a bias (or None).
inline py::object versions(const py::object& x, const py::object& weight,
                           const py::object& bias) {
  Numbers numbers;
  add_state(numbers, x.ptr());
  add_state(numbers, weight.ptr());
  add_state(numbers, bias.ptr());
  return py::reinterpret_steal<py::object>(numbers.bytes());
}

// Whether each fact and the likeness are as they were.
inline bool unchanged(const py::tuple& facts, const py::object& x,
                      const py::tuple& tensors, const py::bytes& before) {
  return all_hold(facts.ptr()) &&
      likeness(x.ptr(), tensors.ptr()).equals(before.ptr());
}

}  // namespace mmtune
