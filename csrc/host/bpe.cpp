// Python bindings of the BPE trainer and encoder: megascratch.tokenizer._bpe, compiled once an instruction-set level.
//
// Text crosses the border in bulk, as one UTF-8 buffer and the end offsets of its documents or pre-tokens; the GIL is
// released for all the work in between. Offsets are checked here once, so that a wrong caller gets an exception and not a
// bad read.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bpe_decode.h"
#include "bpe_encode.h"
#include "bpe_train.h"
#include "python_bytes.h"

namespace py = pybind11;
using namespace megascratch::bpe;
using megascratch::Bytes;

namespace {

using Offsets = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

void check_offsets(const Offsets& ends, int64_t last, bool strictly, const char* what) {
    if (ends.ndim() != 1) throw std::invalid_argument(std::string(what) + " must be one-dimensional");
    int64_t previous = 0;
    for (py::ssize_t i = 0; i < ends.size(); ++i) {
        const int64_t end = ends.data()[i];
        if (end < previous || (strictly && end == previous))
            throw std::invalid_argument(std::string(what) + " must increase");
        previous = end;
    }
    if (previous != last) throw std::invalid_argument(std::string(what) + " must reach the end exactly");
}

template <class Id>
py::tuple to_numpy(Encoded<Id>&& encoded) {
    py::array_t<Id> ids(0);
    if (const size_t n_ids = encoded.ids.size()) {
        Id* const data = encoded.ids.release();
        ids = py::array_t<Id>(py::ssize_t(n_ids), data, py::capsule(data, [](void* p) { IdMemory::give_back(p); }));
    }
    return py::make_tuple(ids, py::array_t<int64_t>(py::ssize_t(encoded.ends.size()), encoded.ends.data()));
}

py::array_t<int64_t> scan(const std::string& scanner, const py::buffer& text) {
    const Bytes bytes(text);
    std::vector<int64_t> ends;
    with_scanner(scanner, [&](auto scan_next) {
        const py::gil_scoped_release release;
        const Text whole(bytes.data(), bytes.data() + bytes.size());
        Cutter<decltype(scan_next)> cut(whole, whole.end);
        const uint8_t* next[kMostCut + kCutAtOnce];
        while (const size_t n = cut(next))
            for (size_t i = 0; i < n; ++i) ends.push_back(next[i] - whole.begin);
    });
    return py::array_t<int64_t>(py::ssize_t(ends.size()), ends.data());
}

void add(PieceCounter& counter, const std::string& scanner, const py::buffer& text, const Offsets& ends, size_t threads) {
    const Bytes bytes(text);
    check_offsets(ends, bytes.size(), false, "ends");
    with_scanner(scanner, [&](auto scan_next) {
        const py::gil_scoped_release release;
        counter.add(scan_next, bytes.data(), ends.data(), size_t(ends.size()), std::max<size_t>(threads, 1));
    });
}

py::tuple train(PieceCounter& counter, const std::string& byte_order, size_t n_tokens,
                const std::function<void(size_t)>& progress) {
    if (byte_order.size() != 256) throw std::invalid_argument("byte_order must hold 256 bytes");
    Trained trained;
    {
        const py::gil_scoped_release release;
        trained = Trainer(counter.counts(), byte_order).train(n_tokens, [&](size_t n) {
            const py::gil_scoped_acquire acquire;  // Ctrl-C arrives here, as the callback's exception
            progress(n);
        });
    }
    py::list tokens;
    for (const std::string& token : trained.tokens) tokens.append(py::bytes(token));
    py::array_t<int32_t> merges({py::ssize_t(trained.merges.size()), py::ssize_t(3)});
    static_assert(sizeof(Merge) == 3 * sizeof(int32_t));
    std::copy_n(reinterpret_cast<const int32_t*>(trained.merges.data()), 3 * trained.merges.size(),
                merges.mutable_data());
    return py::make_tuple(tokens, merges);
}

std::unique_ptr<Encoder> make_encoder(const std::vector<py::bytes>& tokens, const Ids& merges, bool whole_first) {
    if (merges.ndim() != 2 || merges.shape(1) != 4) throw std::invalid_argument("merges must be [m, 4]");
    const std::vector<std::string_view> views(tokens.begin(), tokens.end());
    std::vector<uint64_t> pairs;
    std::vector<Rule> rules;
    const auto row = merges.unchecked<2>();
    for (py::ssize_t i = 0; i < merges.shape(0); ++i) {
        for (py::ssize_t column = 0; column < 3; ++column)
            if (row(i, column) < 0 || size_t(row(i, column)) >= tokens.size())
                throw std::invalid_argument("a merge names an id that is not in the vocabulary");
        pairs.push_back(pair_key(row(i, 0), row(i, 1)));
        rules.push_back({row(i, 3), row(i, 2)});
    }
    return std::make_unique<Encoder>(views, pairs, rules, whole_first);
}

template <class Id>
py::tuple encode_documents(const Encoder& encoder, const std::string& scanner, const py::buffer& text,
                           const Offsets& ends, size_t threads) {
    const Bytes bytes(text);
    check_offsets(ends, bytes.size(), false, "ends");
    return to_numpy(with_scanner(scanner, [&](auto scan_next) {
        const py::gil_scoped_release release;
        return encoder.encode_documents<Id>(scan_next, bytes.data(), ends.data(), size_t(ends.size()),
                                            std::max<size_t>(threads, 1));
    }));
}

template <class Id>
py::tuple encode_pieces(const Encoder& encoder, const py::buffer& text, const Offsets& ends,
                        const Offsets& document_ends, size_t threads) {
    const Bytes bytes(text);
    check_offsets(ends, bytes.size(), true, "ends");
    check_offsets(document_ends, ends.size(), false, "document_ends");
    Encoded<Id> encoded;
    {
        const py::gil_scoped_release release;
        encoded = encoder.encode_pieces<Id>(bytes.data(), ends.data(), document_ends.data(),
                                            size_t(document_ends.size()), std::max<size_t>(threads, 1));
    }
    return to_numpy(std::move(encoded));
}

std::unique_ptr<Decoder> make_decoder(const std::vector<py::bytes>& tokens) {
    return std::make_unique<Decoder>(std::vector<std::string_view>(tokens.begin(), tokens.end()));
}

template <class Id>
py::bytes decode(const Decoder& decoder, const py::array_t<Id, py::array::c_style>& ids) {
    const int64_t length = decoder.length(ids.data(), size_t(ids.size()));
    if (length < 0) throw py::index_error(std::to_string(ids.data()[-1 - length]));
    py::bytes bytes(nullptr, size_t(length));
    decoder.decode(ids.data(), size_t(ids.size()), PyBytes_AS_STRING(bytes.ptr()));
    return bytes;
}

/// Whether this processor can run what is compiled for x86-64-v3 and AES.
bool runs_v3() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("aes");
#else
    return false;
#endif
}

}  // namespace

PYBIND11_MODULE(MEGASCRATCH_MODULE, m) {
    m.doc() = "Byte-level BPE: scanners, trainer, encoder and decoder.";
    m.attr("UNICODE_VERSION") = kUnicodeVersion;
    m.def("runs_v3", &runs_v3);
    m.def("scan", &scan, py::arg("scanner"), py::arg("text"));
    m.def("character_classes", [] { return py::bytes(reinterpret_cast<const char*>(class_table()), 0x110000); });
    py::class_<PieceCounter>(m, "PieceCounter", "Counts distinct pre-tokens and trains on the counts.", py::module_local())
        .def(py::init<>())
        .def("add", &add, py::arg("scanner"), py::arg("text"), py::arg("ends"), py::arg("threads"))
        .def_property_readonly("n_distinct", [](PieceCounter& c) { return c.counts().size(); })
        .def("train", &train, py::arg("byte_order"), py::arg("n_tokens"), py::arg("progress"));
    const auto text = py::arg("text"), ends = py::arg("ends"), threads = py::arg("threads");
    py::class_<Encoder>(m, "Encoder", "Encodes documents, or pre-tokens, by ranked merges.", py::module_local())
        .def(py::init(&make_encoder), py::arg("tokens"), py::arg("merges"), py::arg("whole_first"))
        .def_property_readonly("linear", &Encoder::linear)
        .def("encode_documents", &encode_documents<uint32_t>, py::arg("scanner"), text, ends, threads)
        .def("encode_documents_16", &encode_documents<uint16_t>, py::arg("scanner"), text, ends, threads)
        .def("encode", &encode_pieces<uint32_t>, text, ends, py::arg("document_ends"), threads);
    py::class_<Decoder>(m, "Decoder", "Decodes ids to bytes.", py::module_local())
        .def(py::init(&make_decoder), py::arg("tokens"))
        .def("decode", &decode<uint16_t>, py::arg("ids").noconvert())
        .def("decode", &decode<uint32_t>, py::arg("ids").noconvert())
        .def("decode", &decode<int32_t>, py::arg("ids").noconvert())
        .def("decode", &decode<int64_t>, py::arg("ids"));
}
