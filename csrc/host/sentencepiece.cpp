// Python bindings of the encoder of SentencePiece's BPE: megascratch.tokenizer._sentencepiece.
//
// Text crosses the border in bulk, as one UTF-8 buffer and the end offsets of its pieces; the GIL is released for all
// the work in between. Offsets and ids are checked here once, so that a wrong caller gets an exception, not a bad read.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "sentencepiece.h"

namespace py = pybind11;
using namespace megascratch::sentencepiece;

namespace {

using Offsets = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

void check_offsets(const Offsets& ends, int64_t last, const char* what) {
    if (ends.ndim() != 1) throw std::invalid_argument(std::string(what) + " must be one-dimensional");
    int64_t previous = 0;
    for (py::ssize_t i = 0; i < ends.size(); previous = ends.data()[i++])
        if (ends.data()[i] < previous) throw std::invalid_argument(std::string(what) + " must not decrease");
    if (previous != last) throw std::invalid_argument(std::string(what) + " must reach the end exactly");
}

std::unique_ptr<CharacterEncoder> make_encoder(const std::vector<py::bytes>& tokens, const Ids& merges,
                                               const std::vector<int32_t>& byte_ids,
                                               const std::vector<int32_t>& frozen, bool cut_spaces) {
    if (merges.ndim() != 2 || merges.shape(1) != 4) throw std::invalid_argument("merges must be [m, 4]");
    if (byte_ids.size() != 256) throw std::invalid_argument("byte_ids must hold 256 ids");
    const std::vector<std::string_view> views(tokens.begin(), tokens.end());
    const auto check = [&](int32_t id) {
        if (id < 0 || size_t(id) >= views.size() || views[size_t(id)].empty())
            throw std::invalid_argument("an id that is to be merged or kept whole has no text");
    };
    std::vector<uint64_t> pairs;
    std::vector<Merging> rules;
    const auto row = merges.unchecked<2>();
    for (py::ssize_t i = 0; i < merges.shape(0); ++i) {
        for (py::ssize_t column = 0; column < 3; ++column) check(row(i, column));
        pairs.push_back(pair_key(row(i, 0), row(i, 1)));
        rules.push_back({row(i, 3), row(i, 2)});
    }
    for (const int32_t id : frozen) check(id);
    return std::make_unique<CharacterEncoder>(views, byte_ids, pairs, rules, frozen, cut_spaces);
}

template <class T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
    return py::array_t<T>(py::ssize_t(values.size()), values.data());
}

py::tuple encode(const CharacterEncoder& encoder, std::string_view text, const Offsets& ends,
                 const Offsets& document_ends, size_t threads) {
    check_offsets(ends, int64_t(text.size()), "ends");
    check_offsets(document_ends, ends.size(), "document_ends");
    std::vector<int32_t> ids;
    std::vector<int64_t> id_ends;
    {
        const py::gil_scoped_release release;
        ids = encoder.encode(text.data(), ends.data(), document_ends.data(), size_t(document_ends.size()),
                             std::max<size_t>(threads, 1), id_ends);
    }
    return py::make_tuple(to_numpy(ids), to_numpy(id_ends));
}

}  // namespace

PYBIND11_MODULE(_sentencepiece, m) {
    m.doc() = "The encoder of SentencePiece's BPE with byte fallback.";
    py::class_<CharacterEncoder>(m, "CharacterEncoder", py::module_local(), "Encodes text by merges over characters.")
        .def(py::init(&make_encoder), py::arg("tokens"), py::arg("merges"), py::arg("byte_ids"), py::arg("frozen"),
             py::arg("cut_spaces"))
        .def("encode", &encode, py::arg("text"), py::arg("ends"), py::arg("document_ends"), py::arg("threads"));
}
