// Bytes that Python owns, read where they lie.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace megascratch {

/// The bytes of any object with a contiguous buffer: bytes, memory maps, arrays.
class Bytes {
  public:
    explicit Bytes(const pybind11::buffer& buffer) {
        if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE) != 0) throw pybind11::error_already_set();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    const char* data() const { return static_cast<const char*>(view_.buf); }
    int64_t size() const { return int64_t(view_.len); }

  private:
    Py_buffer view_;
};

}  // namespace megascratch
